"""PageAllocator: which KV pages are free, held (how often) or cached by content.

Integers only: the pages themselves live in kv/cache.py.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from hashlib import blake2b
from heapq import heappop, heappush
from itertools import islice
from struct import Struct
from typing import Protocol


class OutOfPages(ValueError):
    """More pages were asked for than are free; nothing was allocated."""


@cache
def _packer(block_size: int) -> Callable[..., bytes]:
    return Struct(f"{block_size}i").pack


def page_hashes(token_ids: Sequence[int], block_size: int, parent: bytes = b"") -> list[bytes]:
    """One digest for each full page of ``token_ids``, chained over the pages before it.

    Equal digests mean equal tokens from the sequence's start (blake2b, 128 bits), so a page may be
    shared by its digest alone. Incremental: ``page_hashes(all)`` equals ``head`` followed by
    ``page_hashes(rest, block_size, head[-1])`` for a head of full pages. Another first ``parent``
    (an adapter's name) gives another name space. A last page that is not full has no digest.
    """
    # Parent and tokens cannot be mistaken for each other: the tokens' part has one length.
    pack = _packer(block_size)
    digests = []
    for end in range(block_size, len(token_ids) + 1, block_size):
        page = pack(*token_ids[end - block_size : end])
        parent = blake2b(parent + page, digest_size=16).digest()
        digests.append(parent)
    return digests


class Backing(Protocol):
    """The memory of pages ``0 .. num_pages - 1``, which grows and shrinks (kv/elastic.py)."""

    num_pages: int
    """Pages that have memory."""
    stuck: bool
    """It could not grow when it was asked to last."""

    def grow(self, num_pages: int, insist: bool = False) -> None:
        """Gets memory for the first ``num_pages``, as far as there is any. Where that failed a
        moment ago it is not tried again, unless the caller insists."""
        ...

    def why_stuck(self) -> str:
        """What there is and what there is not, in words."""
        ...


class PageAllocator:
    """Reference counts of pages ``1 .. num_pages - 1``; page 0 pads block tables, nobody gets it.

    A page is *held* (reference count > 0) or *free*. With ``enable_prefix_caching`` a page that was
    published under a digest keeps its content while free and can be revived by ``lookup``, until
    ``allocate`` evicts it. Eviction is deterministic: free pages without content first, then the
    one that was freed first. Every operation is O(1) a page.

    Args:
        num_pages: pages of the pool, page 0 included; at least 2.
        enable_prefix_caching: keep published pages for later sequences; otherwise ``publish`` does
            nothing and ``lookup`` finds nothing.
        first_near: pages from this one on are nearer: of the free ones without content they are
            handed out first.
        backing: gives the pages memory as they are handed out, the lowest first; by default all
            have memory.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        enable_prefix_caching: bool = False,
        first_near: int | None = None,
        backing: Backing | None = None,
    ) -> None:
        if num_pages < 2:
            raise ValueError(
                f"num_pages is {num_pages}; at least 2 are needed, since page 0 is never handed "
                "out: give the KV cache more memory"
            )
        self.num_pages = num_pages
        self.enable_prefix_caching = enable_prefix_caching
        self.num_lookups = 0
        """Pages asked for by lookup."""
        self.num_hits = 0
        """Pages found by lookup."""
        self.on_evict: Callable[[int, bytes], None] | None = None
        """Called by allocate with (page, digest) of content that it gives up, while the page still
        holds it."""
        self._refcount = [0] * num_pages
        self.first_near = num_pages if first_near is None else first_near
        self.backing = backing
        self.highest = 0
        """With a backing: the highest page taken since the caller last set this."""
        self.clock = 0
        """With a backing: the caller's time, by which `evict_old` counts."""
        # Free without content, far and near ones; taken from the end. With a backing: a heap.
        self._blank = list(range(self.first_near - 1, 0, -1))
        self._near = list(range(num_pages - 1, self.first_near - 1, -1))
        if backing is not None:
            assert first_near is None, "pages with a backing have an order of their own"
            self._blank.reverse()
        self._cached: OrderedDict[int, int] = OrderedDict()
        # Free with content, and when they were freed; oldest first.
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_usable(self) -> int:
        """Pages that can be held at all: ``num_pages - 1``."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` could hand out now, cached ones included; with a backing, if it
        can grow."""
        return self.num_blank + len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages with a reference count above 0."""
        return self.num_usable - len(self._blank) - len(self._near) - len(self._cached)

    @property
    def num_blank(self) -> int:
        """Free pages without content; with a backing that cannot grow, those that have memory."""
        blank = len(self._blank) + len(self._near)
        if self.backing is not None and self.backing.stuck:
            blank -= self.num_pages - self.backing.num_pages
        return blank

    @property
    def num_cached(self) -> int:
        """Pages that ``lookup`` could find, held ones included."""
        return len(self._digest_of)

    @property
    def num_near_used(self) -> int:
        """Near pages with a reference count above 0; looks at all of them."""
        return sum(count > 0 for count in self._refcount[self.first_near :])

    def refcount(self, page: int) -> int:
        """How many block tables hold ``page``, 0 if it is free; ValueError if it does not exist."""
        if not 0 < page < self.num_pages:
            raise ValueError(f"page {page} is none of 1..{self.num_pages - 1}")
        return self._refcount[page]

    def secure(self, n: int, spare: int = 0, *, insist: bool = False) -> bool:
        """Whether ``n`` pages can be handed out while ``spare`` more are free.

        With a backing they have memory then, and all free ones have it before a cached one is
        given up. ``insist``: nothing goes on without them, see `Backing.grow`.
        """
        if self.backing is None:
            return n + spare <= self.num_free
        # What has no memory is blank.
        bare = self.num_pages - self.backing.num_pages
        missing = min(n - (len(self._blank) - bare), bare)
        if missing > 0 and n + spare <= len(self._blank) + len(self._cached):
            self.backing.grow(self.backing.num_pages + missing, insist)
        return n + spare <= self.num_free

    def allocate(self, n: int) -> list[int]:
        """``n`` pages with reference count 1, all or none.

        Raises:
            OutOfPages: fewer than ``n`` are free.
            ValueError: ``n`` is negative.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if not self.secure(n):
            raise OutOfPages(
                f"{n} pages wanted, {self.num_free} of {self.num_usable} are free: "
                "give the KV cache more memory or run fewer sequences"
            )
        pages = []
        for _ in range(n):
            page = self._take_blank()
            if not page:
                page = next(iter(self._cached))
                self._evict(page)
            self._refcount[page] = 1
            pages.append(page)
        if self.backing is not None:
            self.highest = max(self.highest, *pages, 0)
        return pages

    def _take_blank(self) -> int:
        """A free page without content that has memory, 0 if there is none."""
        if self._near:
            return self._near.pop()
        if not self._blank:
            return 0
        if self.backing is None:
            return self._blank.pop()
        return heappop(self._blank) if self._blank[0] < self.backing.num_pages else 0

    def _put_blank(self, page: int) -> None:
        if page >= self.first_near:
            self._near.append(page)
        elif self.backing is None:
            self._blank.append(page)
        else:
            heappush(self._blank, page)

    def _evict(self, page: int) -> None:
        """A cached page gives its content up; the caller puts it elsewhere."""
        del self._cached[page]
        digest = self._digest_of.pop(page)
        del self._page_of[digest]
        if self.on_evict is not None:
            self.on_evict(page, digest)

    def evict_old(self, first: int, before: int) -> None:
        """Evicts the cached pages from ``first`` on that were freed before the clock said
        ``before``."""
        old = []
        for page, freed in self._cached.items():
            if freed >= before:
                break
            if page >= first:
                old.append(page)
        for page in old:
            self._evict(page)
            self._put_blank(page)

    def last_used(self, *, cached: bool = True) -> int:
        """The highest page that has a reference or, with ``cached``, content; 0 if none has. With a
        backing. Looks at all pages above that have memory."""
        assert self.backing is not None
        refcount, digests = self._refcount, self._digest_of
        page = self.backing.num_pages - 1
        while page and not refcount[page] and not (cached and page in digests):
            page -= 1
        return page

    def fork(self, pages: Iterable[int]) -> None:
        """One more reference on each of ``pages``; ValueError, nothing changed, if one is free."""
        pages = list(pages)
        for page in pages:
            if self.refcount(page) == 0:
                raise ValueError(f"page {page} is free, so it cannot be shared")
        for page in pages:
            self._refcount[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """One reference less on each of ``pages`` (a page may be named as often as it is held).

        The last page is given up first, so that eviction shortens a cached prefix from its end.

        Raises:
            ValueError: a page is free already (a double free) or unknown; nothing was changed.
        """
        refcount = self._refcount
        released = []
        for i in range(len(pages) - 1, -1, -1):
            page = pages[i]
            if not 0 < page < self.num_pages or refcount[page] == 0:
                for done in pages[i + 1 :]:
                    refcount[done] += 1
                known = 0 < page < self.num_pages
                why = "is free already" if known else f"is none of 1..{self.num_pages - 1}"
                raise ValueError(f"page {page} {why}; nothing was freed")
            refcount[page] -= 1
            if refcount[page] == 0:
                released.append(page)
        for page in released:
            if page in self._digest_of:
                self._cached[page] = self.clock
            else:
                self._put_blank(page)

    def publish(self, page: int, digest: bytes) -> bool:
        """Lets ``lookup`` find a held page by its content; the content must not change any more.

        False if caching is off or another page has this content already (then that one stays).
        ValueError if the page is free or published under another digest.
        """
        if self.refcount(page) == 0:
            raise ValueError(f"page {page} is free, so it cannot be published")
        if not self.enable_prefix_caching:
            return False
        if self._digest_of.get(page, digest) != digest:
            raise ValueError(f"page {page} is published under another digest already")
        if self._page_of.setdefault(digest, page) != page:
            return False
        self._digest_of[page] = digest
        return True

    def holds(self, digest: bytes) -> bool:
        """Whether ``lookup`` would find this digest."""
        return digest in self._page_of

    def refresh(self, digest: bytes) -> None:
        """Puts a free page that is held under this digest to the end of the order of eviction."""
        page = self._page_of[digest]
        if page in self._cached:
            self._cached.move_to_end(page)
            self._cached[page] = self.clock

    def next_evicted(self, n: int) -> list[tuple[int, bytes]]:
        """(page, digest) of the ``n`` cached pages that are evicted next, in order."""
        return [(page, self._digest_of[page]) for page in islice(self._cached, n)]

    def peek(self, digests: Iterable[bytes]) -> list[int]:
        """The pages ``lookup`` would return, without taking them and without counting."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def lookup(self, digests: Sequence[bytes], *, count: bool = True) -> list[int]:
        """Takes the longest cached prefix of ``digests``: its pages, one reference more on each.
        ``count``: as a lookup of the prefix cache in num_lookups and num_hits."""
        pages = self.peek(digests)
        for page in pages:
            if self._refcount[page] == 0:
                del self._cached[page]
            self._refcount[page] += 1
        if self.backing is not None:
            self.highest = max(self.highest, *pages, 0)
        if count:
            self.num_lookups += len(digests)
            self.num_hits += len(pages)
        return pages

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Integrity, given the pages of every live block table (padding left out).

        Raises:
            AssertionError: a reference count differs from the number of tables that hold the page,
                a page is in two places or in none, or the cache names a wrong page.
        """
        held = Counter(page for table in tables for page in table)
        wrong = {
            page: (self._refcount[page] if 0 <= page < self.num_pages else None, held[page])
            for page in set(held) | {p for p, count in enumerate(self._refcount) if count}
            if not 0 < page < self.num_pages or self._refcount[page] != held[page]
        }
        assert not wrong, f"reference counts differ, page: (counted, held by tables): {wrong}"
        free = Counter([*self._blank, *self._near, *self._cached])
        twice = [page for page, count in free.items() if count > 1]
        assert not twice, f"pages on two free lists: {twice}"
        both = sorted(free.keys() & held.keys())
        assert not both, f"pages both free and held: {both}"
        lost = sorted(set(range(1, self.num_pages)) - free.keys() - held.keys())
        assert not lost, f"pages neither free nor held: {lost}"
        assert len(free) + len(held) == self.num_usable, "a free list holds an unknown page"
        if self.backing is not None:
            bare = [page for page in (*held, *self._cached) if page >= self.backing.num_pages]
            assert not bare, f"pages in use without memory: {bare}"
        published = {digest: page for page, digest in self._digest_of.items()}
        assert published == self._page_of, "the two maps of the prefix cache differ"
        misplaced = [
            *(page for page in (*self._blank, *self._near) if page in self._digest_of),
            *(page for page in self._cached if page not in self._digest_of),
            *(page for page in self._blank if page >= self.first_near),
            *(page for page in self._near if page < self.first_near),
        ]
        assert not misplaced, f"pages on the wrong free list: {misplaced}"
