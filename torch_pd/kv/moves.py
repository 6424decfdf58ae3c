"""MoveQueue: the order in which pages may move between the GPU pool and the pools under it.

Integers only. A page moved out goes from the GPU to the host or to a peer, a page moved in the
other way. All lanes run at once, each in the order given, beside the forward pass; what must wait
for what is worked out here, from the pages that a move touches.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

HOST = 1
"""The place of the host pool in block table entries (docs/layouts.md); peers follow."""
HOST_BITS = HOST << 28
"""``HOST_BITS | page`` is the scheduler's entry of a page of the pools under the GPU's; a peer's
place is filled in where block tables become a tensor (`Carrier.entries`)."""

LANES = 4
"""A lane is a direction of a link: from the host, to the host, from peers, to peers; odd ones lead
out. Lanes of peers are there only if pages are."""


class Moves(NamedTuple):
    """A batch of page moves on one lane. Its copies run in any order."""

    lane: int
    """See `LANES`."""
    ticket: int
    """Number of the batch on its lane, from 1."""
    after: tuple[int, ...]
    """By lane, tickets that have to be complete first; 0: none."""
    pairs: list[tuple[int, int]]
    """(page of the source pool, page of the destination pool)."""

    @property
    def out(self) -> bool:
        """From the GPU pool, else into it."""
        return self.lane % 2 == 1


class DiskJob(NamedTuple):
    """A record of the file, to be written from a page of the host pool or read into it."""

    write: bool
    record: int
    host_page: int


class Waits(NamedTuple):
    """By lane, the last tickets that the forward pass of a step waits for; 0: none."""

    from_host: int = 0
    to_host: int = 0
    from_peer: int = 0
    to_peer: int = 0


NO_WAITS = Waits()


class MoveQueue:
    """Collects the moves of a step into batches and knows the last move of every page.

    Moves are taken to happen in the order in which they are given, each at once; the tickets make
    that come true. Whoever executes them (kv/migrate.py) runs a batch after the batches before it
    of its lane, after `Moves.after` of the others, and after all forward passes started before; the
    next forward pass waits for `Waits`.

    Args:
        gpu_pages: pages of the GPU pool.
        host_pages: pages of the pools under it, the host's and the peers'.
        first_peer: of those, the first one that lies on a peer; None: none does.
    """

    def __init__(self, gpu_pages: int, host_pages: int, first_peer: int | None = None) -> None:
        self._first_peer = host_pages if first_peer is None else first_peer
        lanes = range(2 if first_peer is None else LANES)
        self._others = [[other for other in lanes if other != lane] for lane in lanes]
        self._gpu = [[0] * gpu_pages for _ in lanes]
        """By lane and page: the last ticket that read or wrote it."""
        self._host = [0] * host_pages, [0] * host_pages
        """By direction (False in, True out) of the page's link, and page."""
        self._next = [1 for _ in lanes]
        """Tickets of the batches being collected."""
        self._pairs: list[list[tuple[int, int]]] = [[] for _ in lanes]
        self._after = [[0 for _ in lanes] for _ in lanes]
        self._batches: list[Moves] = []
        self._computed: list[int] = []
        self._read: list[int] = []
        self.done = [0 for _ in lanes]
        """Last tickets known to be complete, by lane; the caller writes them."""
        self.num_moved = [0 for _ in lanes]
        """Pages moved so far, by lane."""

    def _lane(self, out: bool, host_page: int) -> int:
        return out + 2 * (host_page >= self._first_peer)

    def move_out(self, gpu_page: int, host_page: int) -> None:
        """GPU page to host page."""
        self._add(True, gpu_page, host_page)

    def move_in(self, host_page: int, gpu_page: int) -> None:
        """Host page to GPU page."""
        self._add(False, gpu_page, host_page)

    def _add(self, out: bool, gpu_page: int, host_page: int) -> None:
        lane = self._lane(out, host_page)
        after = [(other, self._gpu[other][gpu_page]) for other in self._others[lane]]
        after.append((lane ^ 1, self._host[not out][host_page]))
        for other, ticket in after:
            if ticket == self._next[other]:
                self._close(other)
        # A batch has no order inside: it must not write a page twice.
        written = self._host[True][host_page] if out else self._gpu[lane][gpu_page]
        if written == self._next[lane]:
            self._close(lane)
        for other, ticket in after:
            self._after[lane][other] = max(self._after[lane][other], ticket)
        self._gpu[lane][gpu_page] = self._host[out][host_page] = self._next[lane]
        self._pairs[lane].append((gpu_page, host_page) if out else (host_page, gpu_page))
        self.num_moved[lane] += 1

    def _close(self, lane: int) -> None:
        if self._pairs[lane]:
            after = tuple(self._after[lane])
            self._batches.append(Moves(lane, self._next[lane], after, self._pairs[lane]))
            self._pairs[lane], self._after[lane] = [], [0] * len(after)
            self._next[lane] += 1

    def compute_on(self, gpu_pages: Iterable[int]) -> None:
        """The step's forward pass may write to or read these pages: it waits for all moves of them,
        the step's included."""
        self._computed += gpu_pages

    def read_in_place(self, host_page: int) -> None:
        """The step's forward pass reads this page where it is: it waits until it has moved out."""
        self._read.append(host_page)

    def arrival(self, gpu_pages: Sequence[int]) -> Waits:
        """The tickets with which the last of these pages have come in; none if all have."""
        tickets = [0] * LANES
        for lane in range(0, len(self.done), 2):
            on_lane = self._gpu[lane]
            tickets[lane] = max((on_lane[page] for page in gpu_pages), default=0)
        return self._left(tickets)

    def _left(self, tickets: Iterable[int]) -> Waits:
        return Waits(*(t if t > d else 0 for t, d in zip(tickets, self.done, strict=False)))

    def has_come(self, arrival: Waits, waited: Waits = NO_WAITS) -> bool:
        """Whether the tickets of an arrival are complete, or are by the time that a step waiting
        for ``waited`` runs."""
        left = self._left(arrival)
        return all(ticket <= there for ticket, there in zip(left, waited, strict=True))

    def has_left(self, host_page: int) -> bool:
        """Whether the host page holds what was moved out to it last."""
        return self._host[True][host_page] <= self.done[self._lane(True, host_page)]

    def is_idle(self, host_page: int) -> bool:
        """Whether no move reads or writes the host page."""
        came = self._host[False][host_page] <= self.done[self._lane(False, host_page)]
        return came and self.has_left(host_page)

    def is_quiet(self, first: int) -> bool:
        """Whether no move reads or writes a GPU page from ``first`` on."""
        return all(
            max(tickets[first:], default=0) <= done
            for tickets, done in zip(self._gpu, self.done, strict=True)
        )

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
        for lane in range(len(self._next)):
            self._close(lane)
        waits = [max((t[page] for page in self._computed), default=0) for t in self._gpu]
        for page in self._read:
            lane = self._lane(True, page)
            waits[lane] = max(waits[lane], self._host[True][page])
        batches = self._batches
        self._batches, self._computed, self._read = [], [], []
        return batches, self._left(waits)
