"""Tiers: the pages that the GPU pool has no room for, in the host pool, on peers and on disk.

Integers only. A page's content goes down by its digest when the GPU pool gives it up (prefix
cache), or with a sequence that gives way (swap). What lies on disk is `Archive`'s.
"""

from collections.abc import Sequence

from torch_pd.kv.archive import LOST, RECORD, Archive
from torch_pd.kv.moves import HOST_BITS, MoveQueue
from torch_pd.kv.pages import PageAllocator


class Tiers:
    """Moves page contents between the GPU pool, the host pool and the disk.

    What lies in the host pool and what lies on peers is one pool here, ``host``, of which a peer's
    pages come last and are taken first. Entries of block tables are pages of the GPU pool, or
    ``HOST_BITS | page`` where a sequence left a page there. The moves of a step are collected in
    ``queue`` and ``archive.jobs``; the caller executes both and reports with ``queue.done`` and
    ``archive.ended``.

    Args:
        gpu: pages of the GPU pool. Its evictions are handled here from now on.
        host_pages: pages of the host pool, page 0 (never handed out) included, and of peers.
        num_records: pages of the disk tier, 0 for none.
        first_peer: of the host pages, the first one on a peer; None: none is. Not with a disk.
    """

    def __init__(
        self,
        gpu: PageAllocator,
        host_pages: int,
        num_records: int = 0,
        first_peer: int | None = None,
    ) -> None:
        assert not (num_records and first_peer is not None), "disk jobs need pages of the host"
        self.gpu = gpu
        caching = gpu.enable_prefix_caching
        self.host = PageAllocator(host_pages, enable_prefix_caching=caching, first_near=first_peer)
        self.queue = MoveQueue(gpu.num_pages, host_pages, first_peer)
        self.archive = Archive(self.host, self.queue, num_records)
        gpu.on_evict = self._demote
        self.num_dropped = 0
        """Contents that the GPU pool gave up and no tier had room for."""

    # Prefix cache.

    def _demote(self, page: int, digest: bytes) -> None:
        """The GPU pool gives a content up."""
        if self.host.holds(digest):
            self.host.refresh(digest)
        elif not self._copy_down(page, digest):
            self.num_dropped += 1

    def _copy_down(self, page: int, digest: bytes) -> bool:
        """A copy of the content in the host's prefix cache; False if the host pool is all held."""
        if not self.host.num_free:
            return False
        (host_page,) = self.host.allocate(1)
        self.queue.move_out(page, host_page)
        self.host.publish(host_page, digest)
        self.host.free([host_page])
        return True

    def clean(self, n: int) -> None:
        """Copies down what the GPU pool would evict for its next ``n`` pages, so that nobody waits
        for it then."""
        ahead = n - self.gpu.num_blank
        if ahead > 0:
            for page, digest in self.gpu.next_evicted(ahead):
                if not self.host.holds(digest):
                    self._copy_down(page, digest)

    def find(self, digests: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """The cached prefix: its pages in the GPU pool, and pages of the host pool after them."""
        on_gpu = self.gpu.peek(digests)
        return on_gpu, self.host.peek(digests[len(on_gpu) :])

    def take(self, digests: Sequence[bytes], num_pages: int) -> tuple[list[int], int]:
        """``num_pages`` GPU pages for a sequence that starts with the cached prefix of ``digests``,
        and how many of them hold it, partly once their moves are done (``queue.arrival``).

        ``num_pages`` less the GPU pages found must be free.
        """
        on_gpu = self.gpu.lookup(digests)
        rest = digests[len(on_gpu) :]
        on_host = self.host.lookup(rest)  # held, so that no eviction here takes them
        pages = on_gpu + self.gpu.allocate(num_pages - len(on_gpu))
        hits = len(on_gpu) + len(on_host)
        for host_page, page, digest in zip(on_host, pages[len(on_gpu) : hits], rest, strict=False):
            self.queue.move_in(host_page, page)
            self.gpu.publish(page, digest)
        self.host.free(on_host)
        self.queue.compute_on(pages[hits:])
        return pages, hits

    # Swap.

    def swap_cost(self, entries: Sequence[int], digests: Sequence[bytes]) -> int | None:
        """Pages to be moved out by `swap_out`; None if the host pool has no room for them."""
        moves = needed = 0
        for i, entry in enumerate(entries):
            if entry >= HOST_BITS:
                continue
            known = i < len(digests) and self.host.holds(digests[i])
            moves += not known
            needed += not known or self.host.refcount(self.host.peek([digests[i]])[0]) == 0
        return moves if needed <= self.host.num_free else None

    def swap_out(self, entries: Sequence[int], digests: Sequence[bytes]) -> list[int]:
        """Moves a sequence's pages to the host pool and frees them; there must be room.

        Args:
            entries: of its block table, as far as they hold anything.
            digests: of its first full pages.

        Returns:
            The held pages of the host pool, in order; `Archive` changes the list where pages go
            to disk.
        """
        saved: list[int] = []
        left = [entry - HOST_BITS for entry in entries if entry >= HOST_BITS]
        self.archive.was_read_in_place(left)
        known = [
            i < len(digests) and entry < HOST_BITS and self.host.holds(digests[i])
            for i, entry in enumerate(entries)
        ]
        # First what is there already, so that no eviction takes it.
        found = [
            self.host.lookup([digests[i]], count=False)[0] if known[i] else 0
            for i in range(len(entries))
        ]
        for i, entry in enumerate(entries):
            if entry >= HOST_BITS:
                saved.append(entry - HOST_BITS)
            elif known[i]:
                saved.append(found[i])
            else:
                saved += self._move_out(entry, digests[i] if i < len(digests) else None)
        self.gpu.free([entry for entry in entries if entry < HOST_BITS])
        return saved

    def _move_out(self, page: int, digest: bytes | None) -> list[int]:
        host_page = self.host.allocate(1)
        self.queue.move_out(page, host_page[0])
        if digest is not None:
            self.host.publish(host_page[0], digest)
        return host_page

    def swap_in(
        self, saved: list[int], digests: Sequence[bytes], num_pages: int, left: int = 0
    ) -> list[int]:
        """Block table entries of a sequence that comes back; its host pages are given up.

        Args:
            saved: what `swap_out` returned; all of it in the host pool.
            digests: of its first full pages; what the GPU pool still holds is not moved.
            num_pages: entries wanted.
            left: of the saved pages, the first ones that stay on the host.

        ``num_pages - left`` less the GPU pages found must be free.
        """
        self.archive.keep(saved)
        on_gpu = self.gpu.lookup(digests[left:], count=False)
        pages = on_gpu + self.gpu.allocate(num_pages - left - len(on_gpu))
        for i in range(left + len(on_gpu), len(saved)):
            page = pages[i - left]
            self.queue.move_in(saved[i], page)
            if i < len(digests):
                self.gpu.publish(page, digests[i])
        self.host.free(saved[left:])
        self.queue.compute_on(pages[max(0, len(saved) - left) :])
        return [HOST_BITS | page for page in saved[:left]] + pages

    # Sequences that are larger than the GPU pool.

    def leave(self, page: int, digest: bytes | None) -> int | None:
        """Moves a page of a running sequence to the host, where it is read in place: its new
        entry, None if the host pool is full. ``digest`` if the page is full."""
        if digest is not None and self.host.holds(digest):
            (host_page,) = self.host.lookup([digest], count=False)
        elif self.host.num_free:
            (host_page,) = self._move_out(page, digest)
        else:
            return None
        self.queue.read_in_place(host_page)
        self.gpu.free([page])
        return HOST_BITS | host_page

    def bring(self, entry: int, page: int) -> None:
        """Moves a page that was left on the host into a GPU page of the caller, and gives it up."""
        self.queue.move_in(entry - HOST_BITS, page)
        self.free([entry])

    def read_in_place(self, entries: Sequence[int]) -> None:
        """The step's forward pass reads those of the entries that lie on the host."""
        for entry in entries:
            if entry >= HOST_BITS:
                self.queue.read_in_place(entry - HOST_BITS)

    def publish(self, entry: int, digest: bytes) -> bool:
        """See `PageAllocator.publish`."""
        if entry < HOST_BITS:
            return self.gpu.publish(entry, digest)
        return self.host.publish(entry - HOST_BITS, digest)

    def fork(self, entries: Sequence[int]) -> None:
        """One more reference on each page."""
        self.gpu.fork([entry for entry in entries if entry < HOST_BITS])
        self.host.fork([entry - HOST_BITS for entry in entries if entry >= HOST_BITS])

    def free(self, entries: Sequence[int]) -> None:
        """One reference less on each page."""
        on_host = [entry - HOST_BITS for entry in entries if entry >= HOST_BITS]
        self.gpu.free([entry for entry in entries if entry < HOST_BITS])
        self.host.free(on_host)
        self.archive.was_read_in_place(on_host)

    # Disk.

    def on_disk(self, digests: Sequence[bytes]) -> tuple[int, list[bytes]]:
        """How many pages of a prefix are cached or on disk, and what of it has to be read."""
        on_gpu, on_host = self.find(digests)
        reached = len(on_gpu) + len(on_host)
        wanted = []
        for digest in digests[reached:]:
            if not (
                self.archive.fetches(digest) or self.host.holds(digest) or self.gpu.holds(digest)
            ):
                if digest not in self.archive.records:
                    break
                wanted.append(digest)
            reached += 1
        return reached, wanted

    def check(self, saved: Sequence[Sequence[int]], entries: Sequence[Sequence[int]]) -> None:
        """Integrity, given the host pages of swapped sequences and the tables of running ones.

        Raises:
            AssertionError: a page or record is lost or held twice.
        """
        in_place = [[e - HOST_BITS for e in table if e >= HOST_BITS] for table in entries]
        on_host = [[e for e in table if LOST < e < RECORD] for table in saved]
        self.host.check([*on_host, *in_place, self.archive.check(saved)])
        self.gpu.check([[e for e in table if e < HOST_BITS] for table in entries])
