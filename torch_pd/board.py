"""Board: where the ranks of one host vote, share a queue of work, and notice who is gone.

Everything lies in shared memory without a name (csrc/runtime/board.cpp), so nothing outlives the
ranks. No call waits for another rank's progress but `wait` and `wait_for_all`.

* **Vote.** Steps that all ranks must run together are agreed on: each calls `ready` at a step's
  border; whoever is last commits, and from then on nobody may withdraw. `wait` returns the same
  `Commit` to all. A rank without rows votes like every other.
* **Queue.** The requests of one call are numbered from 0; `take` gives out the next numbers so that
  a rank never works on more than its share of what is left and running.
* **Liveness.** A rank is gone when its process is (by id and start time), however slow it may be.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch_pd._runtime as _runtime

_DIGEST_BITS = 40


class GroupError(RuntimeError):
    """The group of ranks has ended; the message names the rank that ended it and why."""


class PeerLost(GroupError):
    """The process of ``rank`` is gone."""

    def __init__(self, rank: int, pid: int, more: str = ""):
        super().__init__(f"rank {rank} (process {pid}) has died or left the group{more}")
        self.rank, self.pid = rank, pid


class PeerFailed(GroupError):
    """``rank`` failed with an error of its own."""

    def __init__(self, rank: int, text: str):
        super().__init__(f"rank {rank} failed: {text}")
        self.rank = rank


@dataclass(frozen=True, slots=True)
class Commit:
    """What the ranks agreed on for their next common step."""

    epoch: int
    """Number of the commit, from 1, modulo 2**32."""
    rows: tuple[int, ...]
    """The rows that each rank brings."""
    flags: int
    """All ranks' flags, combined with or."""

    @property
    def bucket(self) -> int:
        """The largest number of rows of a rank."""
        return max(self.rows)


class Board:
    """One rank's hold on the board of its group.

    Args:
        name: "" to create a board, else the `name` of the one that another rank created; it can
            be opened while that rank lives.
        rank, world: who this is of how many (at most 16).
        names: what errors call the ranks; default: their numbers here.

    Raises:
        ValueError: no such rank, the rank is taken, or ``name`` is no board of this size.
        OSError: the board cannot be opened.
    """

    def __init__(self, name: str, rank: int, world: int, names: Sequence[int] | None = None):
        self._board = _runtime.Board(name, rank, world)
        self._names = range(world) if names is None else names
        self.rank, self.world = rank, world

    @property
    def name(self) -> str:
        """What the other ranks open it by."""
        return self._board.name

    def wait_for_all(self, timeout_s: float) -> None:
        """Waits until every rank has attached; TimeoutError names those that have not."""
        end = time.monotonic() + timeout_s
        while (mask := self._board.attached()) != (1 << self.world) - 1:
            self.check()
            if time.monotonic() > end:
                absent = [str(self._names[r]) for r in range(self.world) if not mask >> r & 1]
                raise TimeoutError(
                    f"after {timeout_s:.0f} s rank {', '.join(absent)} has not come to the board"
                )
            time.sleep(0.002)

    # The vote.

    def ready(self, rows: int, flags: int = 0) -> None:
        """Votes for a common step to which this rank brings ``rows`` rows; the last vote commits.

        Follow it with `wait` or `poll` until they return a commit, or with `withdraw`.
        """
        self._board.ready(rows, flags)

    def withdraw(self) -> bool:
        """Takes the vote back. False: too late, the step is committed and must be run."""
        return self._board.withdraw()

    def poll(self) -> Commit | None:
        """The commit of the vote that this rank cast, if there is one yet."""
        return Commit(*self._committed()) if self._board.committed() else None

    def wait(self, timeout_s: float) -> Commit:
        """Waits for the commit of the vote that this rank cast; other Python threads run on.

        Raises:
            TimeoutError: the vote still stands; wait again, or withdraw.
            PeerLost: a rank's process is gone, so the commit cannot come.
            PeerFailed: a rank called `fail`.
        """
        status, rank = self._board.wait(timeout_s)
        if status == _runtime.BoardStatus.COMMITTED:
            return Commit(*self._committed())
        if status == _runtime.BoardStatus.LOST:
            raise PeerLost(self._names[rank], self._board.pid(rank))
        if status == _runtime.BoardStatus.FAILED:
            raise PeerFailed(self._names[rank], self._error(rank))
        raise TimeoutError(f"no commit within {timeout_s} s")

    def _committed(self) -> tuple[int, tuple[int, ...], int]:
        epoch, rows, flags = self._board.commit()
        return epoch, tuple(rows), flags

    # Failure.

    def fail(self, text: str) -> None:
        """Tells all ranks that this one cannot go on. Nothing is committed from now on."""
        self._board.fail(text)

    def check(self) -> None:
        """Raises PeerFailed or PeerLost if another rank failed, or its process is gone."""
        rank = self._board.failed()
        if rank >= 0 and rank != self.rank:
            raise PeerFailed(self._names[rank], self._error(rank))
        rank = self._board.missing(False)
        if rank >= 0:
            raise PeerLost(self._names[rank], self._board.pid(rank))

    def guard(self, grace_s: float) -> None:
        """From now on, this process ends ``grace_s`` seconds after another rank died or failed,
        with a line on stderr and exit code 1, even if it hangs in a collective. `leave` ends it.
        """
        self._board.guard(grace_s)

    def leave(self) -> None:
        """Says goodbye: this process may end without being missed."""
        self._board.leave()

    def pid(self, rank: int) -> int:
        """The process of a rank; 0 before it has attached."""
        return self._board.pid(rank)

    def _error(self, rank: int) -> str:
        return self._board.error(rank).decode(errors="replace")

    # The queue.

    def open(self, call: int, total: int, digest: int) -> int | None:
        """Enters call number ``call`` with a queue of ``total`` requests; the first to come resets
        the queue. Calls are entered in order; a rank that comes after others have ended the call
        finds nothing left.

        Returns:
            A rank that is in this call with another total or digest (of two that differ, at least
            the later one sees it); None if all agree.
        """
        mixed = (digest ^ total * 0x9E3779B97F4A7C15) & (1 << _DIGEST_BITS) - 1
        other = self._board.open(call & 0xFFFFFF, total, mixed)
        return None if other < 0 else other

    @property
    def left(self) -> int:
        """Requests of this rank's call that nobody has taken."""
        return self._board.left()

    @property
    def running(self) -> int:
        """Requests that all ranks work on."""
        return self._board.running()

    def take(self, want: int, among: int | None = None) -> range:
        """The next numbers of the queue, at most ``want``, and no more than bring this rank to its
        share: what is left and what runs, divided by the ranks that take any (``among``, default
        all), rounded up. They count as running.
        """
        return range(*self._board.take(want, among or self.world))

    def set_running(self, count: int) -> None:
        """Says how many requests this rank works on."""
        self._board.set_running(count)

    def drain(self) -> None:
        """Drops what is left of this rank's call."""
        self._board.drain()
