"""MoveQueue: the order in which pages may move between the GPU pool and the host pool.

Integers only. A page moved out goes from the GPU to the host, a page moved in the other way. Both
directions run at once, each in the order given, beside the forward pass; what must wait for what is
worked out here, from the pages that a move touches.
"""

from collections.abc import Iterable
from typing import NamedTuple

HOST = 1
"""The place of the host pool in block table entries (docs/layouts.md)."""
HOST_BITS = HOST << 28
"""``HOST_BITS | page`` is the block table entry of a page of the host pool."""


class Moves(NamedTuple):
    """A batch of page moves in one direction. Its copies run in any order."""

    out: bool
    """From the GPU to the host, else from the host to the GPU."""
    ticket: int
    """Number of the batch in its direction, from 1."""
    after: int
    """Ticket of the other direction that has to be complete first; 0: none."""
    pairs: list[tuple[int, int]]
    """(page of the source pool, page of the destination pool)."""


class DiskJob(NamedTuple):
    """A record of the file, to be written from a page of the host pool or read into it."""

    write: bool
    record: int
    host_page: int


class Waits(NamedTuple):
    """The last tickets that the forward pass of a step waits for; 0: none."""

    moved_in: int = 0
    moved_out: int = 0


NO_WAITS = Waits()


class MoveQueue:
    """Collects the moves of a step into batches and knows the last move of every page.

    Moves are taken to happen in the order in which they are given, each at once; the tickets make
    that come true. Whoever executes them (kv/migrate.py) runs a batch after the batches before it
    of its direction, after `Moves.after` of the other one, and after all forward passes started
    before; the next forward pass waits for `Waits`.

    Args:
        gpu_pages, host_pages: pages of the pools.
    """

    def __init__(self, gpu_pages: int, host_pages: int) -> None:
        # By direction (False in, True out) and page: the last ticket that read or wrote it.
        self._gpu = [0] * gpu_pages, [0] * gpu_pages
        self._host = [0] * host_pages, [0] * host_pages
        self._next = [1, 1]
        """Tickets of the batches being collected."""
        self._pairs: list[list[tuple[int, int]]] = [[], []]
        self._after = [0, 0]
        self._batches: list[Moves] = []
        self._computed: list[int] = []
        self._read: list[int] = []
        self.done = [0, 0]
        """Last tickets known to be complete, by direction; the caller writes them."""
        self.num_moved = [0, 0]
        """Pages moved in and out so far."""

    def move_out(self, gpu_page: int, host_page: int) -> None:
        """GPU page to host page."""
        self._add(True, gpu_page, host_page, self._host)

    def move_in(self, host_page: int, gpu_page: int) -> None:
        """Host page to GPU page."""
        self._add(False, gpu_page, host_page, self._gpu)

    def _add(
        self, out: bool, gpu_page: int, host_page: int, written: tuple[list[int], list[int]]
    ) -> None:
        other = not out
        after = max(self._gpu[other][gpu_page], self._host[other][host_page])
        if after == self._next[other]:
            self._close(other)
        # A batch has no order inside: it must not write a page twice.
        if written[out][host_page if out else gpu_page] == self._next[out]:
            self._close(out)
        self._after[out] = max(self._after[out], after)
        ticket = self._next[out]
        self._gpu[out][gpu_page] = self._host[out][host_page] = ticket
        self._pairs[out].append((gpu_page, host_page) if out else (host_page, gpu_page))
        self.num_moved[out] += 1

    def _close(self, out: bool) -> None:
        if self._pairs[out]:
            self._batches.append(Moves(out, self._next[out], self._after[out], self._pairs[out]))
            self._pairs[out], self._after[out] = [], 0
            self._next[out] += 1

    def compute_on(self, gpu_pages: Iterable[int]) -> None:
        """The step's forward pass may write to or read these pages: it waits for all moves of them,
        the step's included."""
        self._computed += gpu_pages

    def read_in_place(self, host_page: int) -> None:
        """The step's forward pass reads this page where it is: it waits until it has moved out."""
        self._read.append(host_page)

    def arrival(self, gpu_pages: Iterable[int]) -> int:
        """The ticket with which the last of these pages has come in; 0 if all have."""
        tickets = self._gpu[False]
        last = max((tickets[page] for page in gpu_pages), default=0)
        return last if last > self.done[False] else 0

    def has_left(self, host_page: int) -> bool:
        """Whether the host page holds what was moved out to it last."""
        return self._host[True][host_page] <= self.done[True]

    def is_idle(self, host_page: int) -> bool:
        """Whether no move reads or writes the host page."""
        return self.has_left(host_page) and self._host[False][host_page] <= self.done[False]

    @property
    def in_flight(self) -> bool:
        """Whether moves were given that are not known to be complete."""
        return any(
            next_ - (not pairs) > done
            for next_, pairs, done in zip(self._next, self._pairs, self.done, strict=True)
        )

    def take(self) -> tuple[list[Moves], Waits]:
        """The batches since the last call, to be executed in this order, and what the forward pass
        of the step waits for."""
        self._close(False)
        self._close(True)
        waits = [max((t[page] for page in self._computed), default=0) for t in self._gpu]
        waits[True] = max([waits[True], *(self._host[True][page] for page in self._read)])
        batches = self._batches
        self._batches, self._computed, self._read = [], [], []
        moved_in, moved_out = (w if w > d else 0 for w, d in zip(waits, self.done, strict=True))
        return batches, Waits(moved_in, moved_out)
