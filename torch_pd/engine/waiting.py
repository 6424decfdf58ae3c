"""Waiting: the queue of sequences that hold no pages, oldest first."""

import heapq

from torch_pd.engine.sequence import Sequence, Status


class Waiting:
    """A heap by ``Sequence.order``, so that a preempted sequence comes back to its old place.

    A sequence that ends while it waits is only marked (by its status) and counted here; its entry
    goes when it comes to the front, or when half of the entries are such.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._num_ended = 0

    def push(self, seq: Sequence) -> None:
        """Queues a sequence."""
        seq.status = Status.WAITING
        heapq.heappush(self._heap, (seq.order, seq))

    def first(self) -> Sequence | None:
        """The oldest sequence, left in the queue."""
        while self._heap:
            seq = self._heap[0][1]
            if seq.status is Status.WAITING:
                return seq
            heapq.heappop(self._heap)
            self._num_ended -= 1
        return None

    def next(self, n: int) -> list[Sequence]:
        """The ``n`` oldest sequences, in order."""
        heap = self._heap
        found: list[Sequence] = []
        # The heads of the parts of the heap that were not looked at.
        heads = [(heap[0][0], 0)] if heap else []
        while heads and len(found) < n:
            _, i = heapq.heappop(heads)
            if heap[i][1].status is Status.WAITING:
                found.append(heap[i][1])
            for child in range(2 * i + 1, min(2 * i + 3, len(heap))):
                heapq.heappush(heads, (heap[child][0], child))
        return found

    def pop(self) -> None:
        """Takes out what ``first`` returned."""
        heapq.heappop(self._heap)

    def note_ended(self) -> None:
        """To be called after the status of a queued sequence was changed."""
        self._num_ended += 1
        if 2 * self._num_ended > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1].status is Status.WAITING]
            heapq.heapify(self._heap)
            self._num_ended = 0

    def check(self) -> list[Sequence]:
        """All that wait; raises AssertionError if one holds pages or the entries do not add up."""
        seqs = [seq for _, seq in self._heap if seq.status is Status.WAITING]
        assert len(seqs) + self._num_ended == len(self._heap), "ended entries miscounted"
        for seq in seqs:
            held = (seq.pages, seq.row)
            assert held == ([], -1), f"waiting sequence {seq.seq_id} holds pages and row {held}"
        return seqs
