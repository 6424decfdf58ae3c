"""Running: the sequences that hold a row and pages, oldest first."""

from bisect import bisect_left, insort

import numpy as np

from torch_pd.engine.sequence import Sequence, Status


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order


class Running:
    """A list by ``Sequence.order``, its rows as an array, and whose turn it is."""

    def __init__(self) -> None:
        self.seqs: list[Sequence] = []
        self._rows: np.ndarray | None = None  # None: to be gathered again
        self._turn: tuple[int, int] | None = None  # order of the first one left out last time

    def add(self, seq: Sequence) -> None:
        """Puts a sequence in its place."""
        seq.status = Status.RUNNING
        insort(self.seqs, seq, key=_order)
        self._rows = None

    def remove(self, seq: Sequence) -> None:
        """Takes out a sequence."""
        del self.seqs[bisect_left(self.seqs, seq.order, key=_order)]
        self._rows = None

    @property
    def rows(self) -> np.ndarray:
        """int64 [num_running], the sequences' rows of the tables; not to be changed."""
        if self._rows is None:
            self._rows = np.array([seq.row for seq in self.seqs], np.int64)
        return self._rows

    def share(self, wanted: np.ndarray, budget: int) -> np.ndarray:
        """Deals ``budget`` tokens out: int64 [num_running], each at most ``wanted``.

        Oldest first if all get some; otherwise the next call begins with the first one left out.
        """
        turn, self._turn = self._turn, None
        if wanted.sum() <= budget:
            return wanted
        first = bisect_left(self.seqs, turn, key=_order) if turn else 0
        rolled = np.roll(wanted, -first)
        given = np.clip(budget - (np.cumsum(rolled) - rolled), 0, rolled)
        missed = (given == 0) & (rolled > 0)
        if missed.any():
            left_out = int(np.argmax(missed))
            self._turn = self.seqs[(first + left_out) % len(self.seqs)].order
        return np.roll(given, first)

    def check(self) -> list[Sequence]:
        """All that run; raises AssertionError if one does not or their order is wrong."""
        assert all(s.status is Status.RUNNING for s in self.seqs), f"{self.seqs} do not all run"
        orders = [seq.order for seq in self.seqs]
        assert orders == sorted(orders), f"running sequences out of order: {orders}"
        assert self.rows.tolist() == [seq.row for seq in self.seqs], "gathered rows are stale"
        return self.seqs
