"""PageAllocator: each rule by itself, then any order of calls against a simple model."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from torch_pd.kv.pages import OutOfPages, PageAllocator, page_hashes


def test_page_zero_is_never_handed_out():
    pages = PageAllocator(9)
    assert sorted(pages.allocate(8)) == list(range(1, 9))
    assert (pages.num_usable, pages.num_free, pages.num_used) == (8, 0, 8)


def test_allocation_is_all_or_nothing():
    pages = PageAllocator(5)
    held = pages.allocate(2)
    with pytest.raises(OutOfPages, match="3 pages wanted, 2 of 4 are free"):
        pages.allocate(3)
    assert pages.num_free == 2
    pages.check([held])
    assert pages.allocate(0) == []
    with pytest.raises(ValueError, match="-1"):
        pages.allocate(-1)


@pytest.mark.parametrize("num_pages", [-1, 0, 1])
def test_a_pool_needs_a_page(num_pages):
    with pytest.raises(ValueError, match="at least 2"):
        PageAllocator(num_pages)


def test_fork_and_free_count_references():
    pages = PageAllocator(4)
    held = pages.allocate(2)
    pages.fork(held)
    pages.free(held)
    assert [pages.refcount(p) for p in held] == [1, 1]
    assert pages.num_used == 2
    pages.check([held])
    pages.free(held)
    assert pages.num_used == 0
    pages.check([])


@pytest.mark.parametrize("bad", [0, -1, 5, 99])
def test_unknown_pages_are_refused(bad):
    pages = PageAllocator(5)
    held = pages.allocate(2)
    for call in (pages.free, pages.fork):
        with pytest.raises(ValueError, match=f"page {bad} is none of 1..4"):
            call([held[0], bad, held[1]])
    with pytest.raises(ValueError, match=f"page {bad}"):
        pages.refcount(bad)
    pages.check([held])


def test_a_double_free_is_refused_and_changes_nothing():
    pages = PageAllocator(5)
    a, b = pages.allocate(2)
    pages.fork([b])
    with pytest.raises(ValueError, match=f"page {a} is free already; nothing was freed"):
        pages.free([a, b, a])
    pages.check([[a, b], [b]])
    pages.free([a])
    with pytest.raises(ValueError, match="free already"):
        pages.free([a])
    with pytest.raises(ValueError, match="cannot be shared"):
        pages.fork([b, a])
    pages.check([[b], [b]])
    pages.free([b, b])
    pages.check([])


def test_check_finds_each_kind_of_damage():
    pages = PageAllocator(6)
    held = pages.allocate(2)
    for tables in ([], [held, held], [held[:1]], [[*held, 5]], [[*held, 0]], [[*held, 77]]):
        with pytest.raises(AssertionError, match="reference counts differ"):
            pages.check(tables)
    pages.check([held])
    blank = pages._blank
    pages._blank = blank[1:]
    with pytest.raises(AssertionError, match="neither free nor held"):
        pages.check([held])
    pages._blank = [*blank, blank[0]]
    with pytest.raises(AssertionError, match="two free lists"):
        pages.check([held])
    pages._blank = [*blank, held[0]]
    with pytest.raises(AssertionError, match="both free and held"):
        pages.check([held])


def test_hashes_are_chained_incremental_and_salted():
    ids = [random.Random(0).randrange(2**31) for _ in range(50)]
    hashes = page_hashes(ids, 16)
    assert len(hashes) == 3  # the last two tokens fill no page
    assert hashes == page_hashes(ids[:32], 16) + page_hashes(ids[32:], 16, hashes[1])
    assert page_hashes(ids, 16, b"adapter")[0] != hashes[0]
    other = page_hashes([ids[0] ^ 1, *ids[1:]], 16)
    assert not set(other) & set(hashes)  # a change in the first page changes all that follow
    assert page_hashes([7] * 32, 16)[0] != page_hashes([7] * 32, 16)[1]
    assert page_hashes([], 16) == []
    # Tokens that spell out a digest do not stand for it.
    assert page_hashes([1, 2], 1)[1] != page_hashes([2], 1, page_hashes([2], 1)[0])


def test_prefix_cache_revives_shares_and_evicts_in_order():
    pages = PageAllocator(5, enable_prefix_caching=True)
    hashes = page_hashes(range(4), 1)
    held = pages.allocate(4)
    assert all(pages.publish(p, h) for p, h in zip(held, hashes, strict=True))
    assert pages.lookup(hashes[:2]) == held[:2]  # shared while held
    pages.check([held, held[:2]])
    pages.free(held[:2])
    pages.free(held)
    assert (pages.num_free, pages.num_cached) == (4, 4)
    assert pages.peek(hashes) == held
    assert pages.allocate(1) == [held[3]]  # the end of the prefix goes first
    assert pages.lookup(hashes) == held[:3]  # revived
    assert pages.num_free == 0
    assert (pages.num_hits, pages.num_lookups) == (5, 6)
    with pytest.raises(OutOfPages):
        pages.allocate(1)
    pages.check([held[:3], [held[3]]])


def test_blank_pages_go_before_cached_ones_and_the_first_freed_before_the_last():
    pages = PageAllocator(6, enable_prefix_caching=True)
    a, b, c = pages.allocate(3)
    for page in (a, b, c):
        pages.publish(page, bytes([page]))
    for page in (b, a, c):
        pages.free([page])
    blank = pages.allocate(2)
    assert not {a, b, c} & set(blank)
    assert pages.lookup([bytes([b])]) == [b]
    pages.free([b])  # used again, so it is now the last to go
    assert pages.allocate(3) == [a, c, b]
    assert pages.num_cached == 0


def test_publish_keeps_the_first_page_and_refuses_nonsense():
    pages = PageAllocator(5, enable_prefix_caching=True)
    a, b = pages.allocate(2)
    assert pages.publish(a, b"x")
    assert pages.publish(a, b"x")
    assert not pages.publish(b, b"x")
    with pytest.raises(ValueError, match="another digest"):
        pages.publish(a, b"y")
    pages.free([b])
    with pytest.raises(ValueError, match="cannot be published"):
        pages.publish(b, b"z")
    assert pages.lookup([b"x", b"y"]) == [a]


def test_without_caching_nothing_is_found():
    pages = PageAllocator(5)
    (a,) = pages.allocate(1)
    assert not pages.publish(a, b"x")
    assert pages.lookup([b"x"]) == []


class AllocatorMachine(RuleBasedStateMachine):
    """Tables of pages and a model of the cache: digest -> (page, content is still there)."""

    @initialize(usable=st.integers(1, 12), caching=st.booleans())
    def start(self, usable, caching):
        self.pages = PageAllocator(usable + 1, enable_prefix_caching=caching)
        self.usable, self.caching = usable, caching
        self.tables: list[list[int]] = []
        self.published: dict[int, bytes] = {}
        self.freed: list[int] = []  # published free pages, first freed first
        self.serial = 0

    def held(self):
        return {page for table in self.tables for page in table}

    @rule(n=st.integers(0, 6))
    def allocate(self, n):
        free = self.usable - len(self.held())
        if n > free:
            with pytest.raises(OutOfPages):
                self.pages.allocate(n)
            return
        evicted = max(0, n - (free - len(self.freed)))
        for page in self.freed[:evicted]:
            del self.published[page]
        expected = self.freed[:evicted]
        del self.freed[:evicted]
        new = self.pages.allocate(n)
        assert len(set(new)) == n
        assert not set(new) & self.held()
        assert new[n - evicted :] == expected
        assert not set(new) & self.published.keys()
        self.tables.append(new)

    @rule(data=st.data())
    def fork(self, data):
        if self.tables:
            table = data.draw(st.sampled_from(self.tables))
            self.pages.fork(table)
            self.tables.append(list(table))

    @rule(data=st.data())
    def free(self, data):
        if self.tables:
            table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
            self.pages.free(table)
            held = self.held()
            for page in reversed(dict.fromkeys(table)):  # its first place counts if named twice
                if page in self.published and page not in held:
                    self.freed.append(page)

    @rule(data=st.data())
    def double_free(self, data):
        """Frees a held table together with a page that is free: refused, nothing changed."""
        free = sorted(set(range(1, self.usable + 1)) - self.held())
        if free and self.tables:
            table = data.draw(st.sampled_from(self.tables))
            bad = data.draw(st.permutations([*table, data.draw(st.sampled_from(free))]))
            with pytest.raises(ValueError, match="free already"):
                self.pages.free(bad)

    @rule(data=st.data())
    def publish(self, data):
        held = sorted(self.held())
        if not held:
            return
        page = data.draw(st.sampled_from(held))
        if page in self.published:
            digest = self.published[page]
        elif self.published and data.draw(st.booleans()):
            digest = data.draw(st.sampled_from(sorted(self.published.values())))
        else:
            self.serial += 1
            digest = b"%d" % self.serial
        taken = {d: p for p, d in self.published.items()}
        expected = self.caching and taken.get(digest, page) == page
        assert self.pages.publish(page, digest) == expected
        if expected:
            self.published[page] = digest

    @rule(data=st.data())
    def lookup(self, data):
        known = {d: p for p, d in self.published.items()}
        digests = data.draw(st.lists(st.sampled_from([*sorted(known), b"none"]), max_size=4))
        expected = []
        for digest in digests:
            if digest not in known:
                break
            expected.append(known[digest])
        assert self.pages.peek(digests) == expected
        assert self.pages.lookup(digests) == expected
        self.freed = [page for page in self.freed if page not in expected]
        if expected:
            self.tables.append(expected)

    @invariant()
    def adds_up(self):
        held = self.held()
        self.pages.check(self.tables)
        assert self.pages.num_used == len(held)
        assert self.pages.num_free == self.usable - len(held)
        assert self.pages.num_cached == len(self.published)
        for page in range(1, self.usable + 1):
            assert self.pages.refcount(page) == sum(t.count(page) for t in self.tables)

    def teardown(self):
        if hasattr(self, "pages"):
            for table in self.tables:
                self.pages.free(table)
            self.pages.check([])
            assert self.pages.num_free == self.usable


AllocatorMachine.TestCase.settings = settings(
    deadline=None, max_examples=100, stateful_step_count=40
)
TestAllocator = AllocatorMachine.TestCase
