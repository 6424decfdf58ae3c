"""Tiers: the pages that the GPU pool has no room for, in the host pool and on disk.

Integers only. A page's content goes down by its digest when the GPU pool gives it up (prefix
cache), or with a sequence that gives way (swap).
"""

import logging
from collections.abc import Sequence

from torch_pd.kv.moves import HOST_BITS, DiskJob, MoveQueue
from torch_pd.kv.pages import PageAllocator
from torch_pd.kv.records import RecordIndex

logger = logging.getLogger(__name__)

DISK_WRITES = 32
"""Pages being written to disk at once."""
DISK_AHEAD = 1024
"""Pages looked at in a step for what is to be written; bounds the time of a step."""
DISK_ERRORS = 16
"""Failed transfers after which the disk is not used any more."""
PASSES = 2
"""Steps after which the forward passes that were under way have ended."""


class Tiers:
    """Moves page contents between the GPU pool, the host pool and the records on disk.

    Entries of block tables are pages of the GPU pool, or ``HOST_BITS | page`` where a sequence left
    a page on the host. The moves of a step are collected in ``queue`` and ``jobs``; the caller
    executes both and reports with ``queue.done`` and ``ended``.

    Args:
        gpu: pages of the GPU pool. Its evictions are handled here from now on.
        host_pages: pages of the host pool, page 0 included.
        num_records: pages of the disk tier, 0 for none.
    """

    def __init__(self, gpu: PageAllocator, host_pages: int, num_records: int = 0) -> None:
        self.gpu = gpu
        self.host = PageAllocator(host_pages, enable_prefix_caching=gpu.enable_prefix_caching)
        self.queue = MoveQueue(gpu.num_pages, host_pages)
        self.disk = RecordIndex(num_records)
        self.jobs: list[DiskJob] = []
        """To be started by the caller, who empties the list."""
        gpu.on_evict = self._demote
        self._writing: dict[int, bytes] = {}  # by record
        self._on_way_down: set[bytes] = set()
        self._reading: dict[bytes, int] = {}  # host page
        self._digest_read: dict[int, bytes] = {}  # by host page
        self._held_up: list[DiskJob] = []  # reads into pages that are still in use
        self._busy_until: dict[int, int] = {}  # host page: step, after it was read in place
        self._step = 0
        self.disk_errors = 0
        self.disk_written = 0
        self.disk_read = 0
        """Pages."""
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
            The held pages of the host pool, in order.
        """
        saved: list[int] = []
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
        self, saved: Sequence[int], digests: Sequence[bytes], num_pages: int, left: int = 0
    ) -> list[int]:
        """Block table entries of a sequence that comes back; its host pages are given up.

        Args:
            saved: what `swap_out` returned.
            digests: of its first full pages; what the GPU pool still holds is not moved.
            num_pages: entries wanted.
            left: of the saved pages, the first ones that stay on the host.

        ``num_pages - left`` less the GPU pages found must be free.
        """
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
        for page in on_host:
            self._busy_until[page] = self._step + PASSES

    # Disk.

    @property
    def uses_disk(self) -> bool:
        """Whether there is a disk tier, and it works."""
        return self.disk.num_records > 0 and self.disk_errors < DISK_ERRORS

    def fetch(self, digests: Sequence[bytes]) -> None:
        """Starts to read what follows the cached prefix from disk into the host pool."""
        if not self.uses_disk:
            return
        on_gpu, on_host = self.find(digests)
        for digest in digests[len(on_gpu) + len(on_host) :]:
            if digest in self._reading or self.host.holds(digest) or self.gpu.holds(digest):
                continue
            # A quarter of the pool stays for what is moved out meanwhile.
            if digest not in self.disk or 4 * self.host.num_free <= self.host.num_usable:
                break
            (page,) = self.host.allocate(1)
            self._reading[digest], self._digest_read[page] = page, digest
            self._held_up.append(DiskJob(False, self.disk.pin(digest), page))

    def is_fetching(self, digests: Sequence[bytes]) -> bool:
        """Whether any of the contents is being read from disk."""
        return bool(self._reading) and any(digest in self._reading for digest in digests)

    def write_ahead(self, n: int) -> None:
        """Writes what the host pool would evict for its next ``n`` pages to disk."""
        most = min(DISK_WRITES, max(1, self.host.num_usable // 4))
        ahead = min(n - self.host.num_blank, DISK_AHEAD)
        if not self.uses_disk or ahead <= 0 or len(self._writing) >= most:
            return
        for page, digest in self.host.next_evicted(ahead):
            if len(self._writing) >= most:
                break
            if digest in self.disk or digest in self._on_way_down or not self.queue.has_left(page):
                continue
            record = self.disk.allocate()
            if record is None:
                break
            self.host.lookup([digest], count=False)  # stays until it is written
            self._writing[record] = digest
            self._on_way_down.add(digest)
            self.jobs.append(DiskJob(True, record, page))

    def ended(self, job: DiskJob, error: str | None) -> None:
        """A disk job has ended."""
        if error is not None:
            self._note_error(job, error)
        if job.write:
            digest = self._writing.pop(job.record)
            self._on_way_down.remove(digest)
            if error is None:
                self.disk.put(digest, job.record)
                self.disk_written += 1
            else:
                self.disk.give_back(job.record)
        else:
            digest = self._digest_read.pop(job.host_page)
            del self._reading[digest]
            self.disk.unpin(digest)
            if error is None:
                self.host.publish(job.host_page, digest)
                self.disk_read += 1
            else:
                self.disk.drop(digest)  # computed again by whoever needs it
        self.host.free([job.host_page])

    def _note_error(self, job: DiskJob, error: str) -> None:
        self.disk_errors += 1
        what = "written" if job.write else "read"
        logger.warning("KV page on disk (record %d) cannot be %s: %s", job.record, what, error)
        if self.disk_errors == DISK_ERRORS:
            logger.error("%d KV pages failed: the disk is not used any more", DISK_ERRORS)

    # Steps.

    def end_step(self) -> None:
        """To be called once a step, after its moves were taken: lets reads go that were held up."""
        self._step += 1
        if self._held_up:
            waiting = []
            for job in self._held_up:
                idle = self.queue.is_idle(job.host_page)
                if idle and self._busy_until.get(job.host_page, 0) <= self._step:
                    self.jobs.append(job)
                else:
                    waiting.append(job)
            self._held_up = waiting
        if self._busy_until and self._step % 64 == 0:
            self._busy_until = {p: s for p, s in self._busy_until.items() if s > self._step}

    @property
    def disk_busy(self) -> bool:
        """Whether disk jobs are under way: a sequence may wait for what is read, or for a host page
        that is being written."""
        return bool(self._reading or self._writing)

    def check(self, saved: Sequence[Sequence[int]], entries: Sequence[Sequence[int]]) -> None:
        """Integrity, given the host pages of swapped sequences and the tables of running ones.

        Raises:
            AssertionError: a page or record is lost or held twice.
        """
        in_place = [[e - HOST_BITS for e in table if e >= HOST_BITS] for table in entries]
        writing = [self.host.peek([digest]) for digest in self._writing.values()]
        self.host.check([*saved, *in_place, *writing, list(self._digest_read)])
        self.gpu.check([[e for e in table if e < HOST_BITS] for table in entries])
        self.disk.check(len(self._writing))
        assert set(self._reading.values()) == set(self._digest_read)
