"""Lockstep: the steps that the ranks of a pool group run together."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch_pd.board import Board, Commit

_BUSY = 1
_MIXED = 2
_HALVED = 4
_SELECTED_BITS = 24
_WAIT_S = 1.0
_ADMIT_EVERY = 8


@dataclass(frozen=True, slots=True)
class CommonStep:
    """A step that all ranks run, in which each may have no work of its own."""

    tokens: tuple[int, ...]
    """Of each rank."""
    selected: tuple[int, ...]
    """Rows of each rank whose logits are wanted."""
    decoding: bool
    """No rank does anything but decode one token a sequence."""
    halved: bool = False
    """It decodes, and runs in half-batches if it can: a rank asked for that."""

    def padded(self, sizes: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``tokens`` and ``selected`` as they are run: a rank without work computes a row of
        padding and its logits; with sizes, the ranks compute those."""
        if sizes is not None:
            return tuple(sizes), tuple(sizes)
        pairs = zip(self.tokens, self.selected, strict=True)
        return tuple(max(1, n) for n in self.tokens), tuple(m if n else 1 for n, m in pairs)


class Gate:
    """When the ranks of a group start new sequences.

    A step in which one rank reads a prompt is no plain decoding step for any rank. So all start
    new ones in the same steps: every so often, where many rows are free, and as long as others do.
    """

    def __init__(self) -> None:
        self._steps = self._most = 0
        self._mixed = False

    def opens(self, running: int) -> bool:
        """Whether a rank with so many running sequences may start new ones in its next step."""
        self._most = max(self._most, running)
        often = self._steps % _ADMIT_EVERY == 0
        opens = self._mixed or often or running * 8 <= self._most * 7
        if opens:
            self._most = running
        return opens

    def note(self, mixed: bool) -> None:
        """Notes a common step; ``mixed``: a rank read a prompt in it."""
        self._steps += 1
        self._mixed = mixed

    def rest(self) -> None:
        """No rank has anything to do."""
        self._steps = self._most = 0


class Lockstep:
    """Votes for one step after the other; every rank of the group calls `agree` for each.

    A vote costs some microseconds beside the wait for the last rank, and nothing on the device:
    with steps planned ahead the device does not notice it.

    Args:
        board: of the ranks that share one copy of the weights, for the votes.
        queue: where requests wait for all ranks; the same board if there is one copy.
    """

    def __init__(self, board: Board, queue: Board) -> None:
        self._board, self._queue = board, queue
        self._gate = Gate()

    @property
    def ranks(self) -> int:
        """How many run every step together."""
        return self._board.world

    def admits(self, running: int) -> bool:
        """Whether this rank, with so many running sequences, may start new ones: see `Gate`."""
        return self._gate.opens(running)

    def agree(
        self, tokens: int, selected: int, *, decoding: bool, busy: bool, halved: bool = False
    ) -> CommonStep | None:
        """The next common step, or None if no rank is busy and so none runs anything.

        Args:
            tokens, selected: of this rank's plan; 0 if it has none.
            decoding: it has no plan, or one that only decodes.
            busy: it has requests under way. Those that wait in the queue count as well.
            halved: it asks for half-batches.

        Raises:
            GroupError: another rank is gone or failed.
        """
        assert 0 <= selected < 1 << _SELECTED_BITS
        flags = (busy or self._queue.left > 0) * _BUSY | (not decoding) * _MIXED
        flags |= halved * _HALVED
        self._board.ready(tokens << _SELECTED_BITS | selected, flags)
        commit = self._wait()
        if not commit.flags & _BUSY:
            self._gate.rest()
            return None
        mixed = bool(commit.flags & _MIXED)
        self._gate.note(mixed)
        mask = (1 << _SELECTED_BITS) - 1
        return CommonStep(
            tokens=tuple(rows >> _SELECTED_BITS for rows in commit.rows),
            selected=tuple(rows & mask for rows in commit.rows),
            decoding=not mixed,
            halved=not mixed and bool(commit.flags & _HALVED),
        )

    def _wait(self) -> Commit:
        while True:
            try:
                return self._board.wait(_WAIT_S)
            except TimeoutError:
                # Ranks of other copies are not on this board. (And Python handles signals here.)
                if self._queue is not self._board:
                    self._queue.check()

    def leave(self) -> None:
        """Says goodbye to the ranks of this copy; the queue's board stays."""
        if self._queue is not self._board:
            self._board.leave()
