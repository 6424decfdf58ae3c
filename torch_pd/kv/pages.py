"""PageAllocator: which KV pages are free, held (how often) or cached by content.

Integers only: the pages themselves live in kv/cache.py.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from hashlib import blake2b
from itertools import islice
from struct import Struct


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
    """

    def __init__(
        self, num_pages: int, *, enable_prefix_caching: bool = False, first_near: int | None = None
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
        # Free without content, far and near ones; taken from the end.
        self._blank = list(range(self.first_near - 1, 0, -1))
        self._near = list(range(num_pages - 1, self.first_near - 1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free with content; oldest first
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_usable(self) -> int:
        """Pages that can be held at all: ``num_pages - 1``."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` could hand out now, cached ones included."""
        return len(self._blank) + len(self._near) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages with a reference count above 0."""
        return self.num_usable - self.num_free

    @property
    def num_blank(self) -> int:
        """Free pages without content."""
        return len(self._blank) + len(self._near)

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

    def allocate(self, n: int) -> list[int]:
        """``n`` pages with reference count 1, all or none.

        Raises:
            OutOfPages: fewer than ``n`` are free.
            ValueError: ``n`` is negative.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if n > self.num_free:
            raise OutOfPages(
                f"{n} pages wanted, {self.num_free} of {self.num_usable} are free: "
                "give the KV cache more memory or run fewer sequences"
            )
        pages = []
        for _ in range(n):
            if self._near:
                page = self._near.pop()
            elif self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                digest = self._digest_of.pop(page)
                del self._page_of[digest]
                if self.on_evict is not None:
                    self.on_evict(page, digest)
            self._refcount[page] = 1
            pages.append(page)
        return pages

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
                self._cached[page] = None
            else:
                (self._near if page >= self.first_near else self._blank).append(page)

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
        published = {digest: page for page, digest in self._digest_of.items()}
        assert published == self._page_of, "the two maps of the prefix cache differ"
        misplaced = [
            *(page for page in (*self._blank, *self._near) if page in self._digest_of),
            *(page for page in self._cached if page not in self._digest_of),
            *(page for page in self._blank if page >= self.first_near),
            *(page for page in self._near if page < self.first_near),
        ]
        assert not misplaced, f"pages on the wrong free list: {misplaced}"
