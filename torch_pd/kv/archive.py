"""Archive: what of the host pool lies on disk, and what is on its way there or back.

Integers only. Two kinds of content go to disk: pages of the prefix cache, found by their digest,
and pages of sequences that were swapped out and for which the host pool has no room (`spill`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

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

# The entries of `Sequence.saved`, beside pages of the host pool.
RECORD = 1 << 32
"""``RECORD | record``: the page lies on disk."""
READING = 1 << 33
"""``READING | page``: it is being read from there into the page of the host pool."""
LOST = -1
"""It could not be read."""


@dataclass(slots=True, eq=False)
class Transfer:
    """What a disk job is for."""

    digest: bytes | None
    """Of the content; None: only one sequence knows it."""
    saved: list[int] | None = None
    """The list of a swapped sequence to which the page belongs; None: nobody waits for the end."""
    index: int = 0
    """In that list."""


class Archive:
    """The disk tier under a host pool. A page is held here while a job uses it.

    Args:
        host: pages of the host pool.
        queue: the moves between it and the GPU pool.
        num_records: pages on disk, 0 for none.
    """

    def __init__(self, host: PageAllocator, queue: MoveQueue, num_records: int) -> None:
        self.host = host
        self.queue = queue
        self.records = RecordIndex(num_records)
        self.jobs: list[DiskJob] = []
        """To be started by the caller, who empties the list and reports with `ended`."""
        self.page_seconds = 0.0
        """What the disk takes for a page; the caller measures it."""
        self.num_errors = 0
        self.num_written = 0
        self.num_read = 0
        self.num_spilled = 0
        """Pages of swapped sequences that went to disk."""
        self._transfers: dict[DiskJob, Transfer] = {}
        self._num_writing = 0
        self._on_way_down: set[bytes] = set()
        self._fetching: set[bytes] = set()
        self._of_page: dict[int, Transfer] = {}  # those of swapped sequences, by host page
        self._held_up: list[DiskJob] = []  # reads into pages that are still in use
        self._busy_until: dict[int, int] = {}  # host page: step, after it was read in place
        self._step = 0

    @property
    def works(self) -> bool:
        """Whether there is a disk, and it works."""
        return self.records.num_records > 0 and self.num_errors < DISK_ERRORS

    @property
    def busy(self) -> bool:
        """Whether jobs are under way: a sequence may wait for what is read, or for a host page
        that is being written."""
        return bool(self._transfers)

    @property
    def _most_writes(self) -> int:
        return min(DISK_WRITES, max(1, self.host.num_usable // 4)) - self._num_writing

    def _write(self, record: int, page: int, transfer: Transfer) -> None:
        if transfer.digest is not None:
            self._on_way_down.add(transfer.digest)
        self._num_writing += 1
        job = DiskJob(True, record, page)
        self._transfers[job] = transfer
        self.jobs.append(job)

    def _read(self, record: int, page: int, transfer: Transfer) -> None:
        job = DiskJob(False, record, page)
        self._transfers[job] = transfer
        self._held_up.append(job)

    # Prefix cache.

    def fetches(self, digest: bytes) -> bool:
        """Whether a content is being read into the host's prefix cache."""
        return digest in self._fetching

    def is_fetching(self, digests: Sequence[bytes]) -> bool:
        """Whether any of the contents is being read."""
        return bool(self._fetching) and any(digest in self._fetching for digest in digests)

    def read_seconds(self, more: int) -> float:
        """How long it takes until ``more`` pages have been read behind those that are."""
        return (len(self._transfers) - self._num_writing + more) * self.page_seconds

    def fetch(self, digests: Sequence[bytes]) -> None:
        """Starts to read contents that lie on disk into the host pool, in order and as far as it
        has room."""
        for digest in digests:
            # A quarter of the pool stays for what is moved out meanwhile.
            if 4 * self.host.num_free <= self.host.num_usable:
                break
            (page,) = self.host.allocate(1)
            self._fetching.add(digest)
            self._read(self.records.pin(digest), page, Transfer(digest))

    def write_ahead(self, n: int) -> None:
        """Writes what the host pool would evict for its next ``n`` pages to disk."""
        ahead = min(n - self.host.num_blank, DISK_AHEAD)
        if not self.works or ahead <= 0 or self._most_writes <= 0:
            return
        for page, digest in self.host.next_evicted(ahead):
            if self._most_writes <= 0:
                break
            known = digest in self.records or digest in self._on_way_down
            if known or not self.queue.has_left(page):
                continue
            record = self.records.allocate()
            if record is None:
                break
            self.host.lookup([digest], count=False)  # stays until it is written
            self._write(record, page, Transfer(digest))

    # Swapped sequences.

    def spill(self, saved: list[int], digests: Sequence[bytes]) -> bool:
        """Starts to write those pages of a swapped sequence that it alone holds; where they are
        written, the list names records.

        Args:
            saved: of the sequence.
            digests: of its first full pages.

        Returns:
            Whether another sequence's pages may be looked at: no limit was reached.
        """
        for i, page in enumerate(saved):
            if page >= HOST_BITS or page == LOST or page in self._of_page:
                continue
            if self.host.refcount(page) != 1 or not self.queue.has_left(page):
                continue
            digest = digests[i] if i < len(digests) else None
            if digest is not None and digest in self.records:  # a clean copy
                saved[i] = RECORD | self.records.pin(digest)
                self.host.free([page])
                self.num_spilled += 1
                continue
            if digest is not None and digest in self._on_way_down:
                continue
            record = self.records.allocate() if self._most_writes > 0 else None
            if record is None:
                return False
            self.host.fork([page])
            self._of_page[page] = transfer = Transfer(digest, saved, i)
            self._write(record, page, transfer)
        return True

    def recall(self, saved: list[int]) -> bool:
        """Reads a swapped sequence's pages back into the host pool, as far as it has room; whether
        all are there."""
        for i, entry in enumerate(saved):
            if not RECORD <= entry < READING:
                continue
            record = entry - RECORD
            digest = self.records.pinned_digest(record)
            if digest is not None and self.host.holds(digest):
                saved[i] = self.host.lookup([digest], count=False)[0]
                self.records.unpin(digest)
                continue
            if not self.host.num_free:
                break
            (page,) = self.host.allocate(1)
            saved[i] = READING | page
            self._of_page[page] = transfer = Transfer(digest, saved, i)
            self._read(record, page, transfer)
        return all(0 < entry < HOST_BITS for entry in saved)

    def keep(self, saved: list[int]) -> None:
        """The pages stay in the host pool, though some may be being written."""
        for page in saved:
            transfer = self._of_page.pop(page, None)
            if transfer is not None:
                transfer.saved = None

    def release(self, saved: list[int]) -> None:
        """Gives up all that a swapped sequence holds here and in the host pool."""
        pages = []
        for entry in saved:
            if entry >= READING:
                self._of_page.pop(entry - READING).saved = None  # the page goes when it is read
            elif entry >= RECORD:
                self._let_go(entry - RECORD)
            elif entry != LOST:
                pages.append(entry)
        self.keep(pages)
        self.host.free(pages)

    def _let_go(self, record: int) -> None:
        digest = self.records.pinned_digest(record)
        if digest is None:
            self.records.give_back(record)
        else:
            self.records.unpin(digest)

    # What ends.

    def ended(self, job: DiskJob, error: str | None) -> None:
        """A job has ended."""
        transfer = self._transfers.pop(job)
        if error is not None:
            self._note_error(job, error)
        if transfer.saved is not None:
            del self._of_page[job.host_page]
        if job.write:
            self._num_writing -= 1
            if transfer.digest is not None:
                self._on_way_down.remove(transfer.digest)
            self._written(job, transfer, error is None)
        else:
            self._let_go(job.record)
            self._was_read(job, transfer, error is None)

    def _written(self, job: DiskJob, transfer: Transfer, good: bool) -> None:
        digest, saved = transfer.digest, transfer.saved
        if not good or (digest is None and saved is None):
            self.records.give_back(job.record)
        elif digest is not None:
            self.records.put(digest, job.record)
        else:
            self.records.hold(job.record)
        if good:
            self.num_written += 1
            if saved is not None:
                record = job.record if digest is None else self.records.pin(digest)
                saved[transfer.index] = RECORD | record
                self.num_spilled += 1
                self.host.free([job.host_page])  # the sequence's
        self.host.free([job.host_page])

    def _was_read(self, job: DiskJob, transfer: Transfer, good: bool) -> None:
        page, digest, saved = job.host_page, transfer.digest, transfer.saved
        if digest is not None:
            self._fetching.discard(digest)
            if good:
                self.host.publish(page, digest)
            else:
                self.records.drop(digest)  # computed again by whoever needs it
        if good:
            self.num_read += 1
        if good and saved is not None:
            saved[transfer.index] = page
            return
        if saved is not None:
            saved[transfer.index] = LOST
        self.host.free([page])

    def _note_error(self, job: DiskJob, error: str) -> None:
        self.num_errors += 1
        what = "written" if job.write else "read"
        logger.warning("KV page on disk (record %d) cannot be %s: %s", job.record, what, error)
        if self.num_errors == DISK_ERRORS:
            logger.error("%d KV pages failed: the disk is not used any more", DISK_ERRORS)

    # Steps.

    def was_read_in_place(self, pages: Sequence[int]) -> None:
        """Forward passes under way may still read these pages of the host pool."""
        for page in pages:
            self._busy_until[page] = self._step + PASSES

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

    def check(self, saved: Sequence[Sequence[int]]) -> list[int]:
        """Integrity, given the lists of all swapped sequences; returns the host pages held here.

        Raises:
            AssertionError: a record is lost or held twice.
        """
        self.records.check(self._num_writing)
        entries = [entry for entries in saved for entry in entries]
        held = sum(
            RECORD <= entry < READING and self.records.pinned_digest(entry - RECORD) is None
            for entry in entries
        )
        held += sum(not job.write and t.digest is None for job, t in self._transfers.items())
        assert held == self.records.num_held, f"{held} records held of {self.records.num_held}"
        reading = sorted(entry - READING for entry in entries if entry >= READING)
        waited_for = [job.host_page for job, t in self._transfers.items() if t.saved is not None]
        assert sorted(waited_for) == sorted(self._of_page), "transfers and pages differ"
        assert set(reading) <= set(waited_for), "nobody reads what a sequence waits for"
        return [job.host_page for job in self._transfers]
