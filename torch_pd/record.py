"""Record: what a rank of torchrun says of itself, in shared memory.

Under torchrun nobody coordinates, and what an LLM does (it is made, it generates, it shuts down:
its *acts*) has been done when all ranks have done it. So each process keeps a record of the LLMs
that it made and the acts that it is in. It is written when an act begins and ends, never in a step;
the others read it when they wait. It lies in a memfd, which ends with the process.
"""

import atexit
import contextlib
import mmap
import multiprocessing.util
import os
import pickle
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch_pd.board import Board

_HALF_BYTES = 1 << 18
_HALVES_AT = 4096
_KEPT = 8
_NEVER = 1 << 62


@dataclass
class Place:
    """How far a process is with one of its LLMs."""

    begun: int = -1
    """The last act that it came to: 0 is to make the LLM, others have the numbers of calls."""
    done: int = -1
    """The last act that it has left."""
    what: str = ""
    """Of the last act."""
    where: str = ""
    """The line of the script."""
    since: float = 0.0
    """When that began, or ended; on the clock that all processes share."""
    met: int = 0
    """How often it has met the others."""
    end: str = ""
    """Why it has the LLM no more; empty while it has."""

    def describe(self, llm: int) -> str:
        """The last act in words."""
        where = f", at {self.where}" if self.where else ""
        if self.begun == 0:
            return f"making LLM {llm}{where}"
        return f"{self.what} of LLM {llm} (its call {self.begun}{where})"


@dataclass
class State:
    """What a record says."""

    pid: int
    born: int
    """In ticks since boot: tells the process from a later one of the same number."""
    made: int = 0
    """LLMs, the one that is being made included."""
    sole: bool = True
    """It has no second thread that might begin an act."""
    llms: dict[int, Place] = field(default_factory=dict)
    """By number, from 1. Of those that have ended, the last ones."""
    acting: list[int] = field(default_factory=list)
    """LLMs that it is in an act of, innermost last."""
    crossed: set[tuple[int, int, int]] = field(default_factory=set)
    """Rank, LLM and act of others that waited for it while it waited for them: it has told its
    caller, and comes out of its own act."""

    def place(self, llm: int) -> Place:
        """Of any LLM."""
        if llm in self.llms or llm > self.made:
            return self.llms.get(llm, Place())
        return Place(begun=_NEVER, done=_NEVER, met=_NEVER, end="has shut it down")

    def describe(self, rank: int) -> str:
        """What the process does, as far as torch_pd knows."""
        name = f"rank {rank} (process {self.pid})"
        now = time.monotonic()
        if self.acting:
            llm = self.acting[-1]
            act = self.llms[llm]
            is_in = "is" if act.begun == 0 else "is in"
            return f"{name} {is_in} {act.describe(llm)} for {now - act.since:.0f} s"
        if not self.llms:
            return f"{name} is in no call"
        llm, last = max(self.llms.items(), key=lambda item: item[1].since)
        then = f"the last, {last.describe(llm)}, ended {now - last.since:.0f} s ago"
        return f"{name} is in no call ({then})" + f" and {last.end}" * bool(last.end)


CROSSED = "is in another call"


def stuck(mine: State, other: State, llm: int, looping: int = 0) -> str | None:
    """Why the act of an LLM that this process is in cannot end, for what another process does; None
    if it can. All ranks are needed for an act until they have left it. So

    * the other has the LLM no more, without having left this act; or
    * both are in different acts, neither has left the other's, and neither has another thread.

    Args:
        looping: the other's `Record.looping`: there its script can go on.
    """
    here, there = mine.place(llm), other.place(llm)
    if there.done >= here.begun:
        return None
    if there.end:
        return there.end
    if not (other.acting and mine.sole and other.sole and mine.acting[-1] == llm):
        return None
    elsewhere = other.acting[-1]
    begun, passed = other.place(elsewhere).begun, mine.place(elsewhere)
    # (Where this process has failed, the other will as well.)
    if elsewhere in (llm, looping) or passed.done >= begun or passed.end:
        return None
    return CROSSED


class Record:
    """A process's `State` in shared memory, and whether its caller has an output of a stream.

    Args:
        fd: of a file of `NBYTES`.
        own: this process writes it.
    """

    NBYTES = _HALVES_AT + 2 * _HALF_BYTES

    def __init__(self, fd: int, own: bool = False):
        access = mmap.ACCESS_WRITE if own else mmap.ACCESS_READ
        self._map = mmap.mmap(fd, self.NBYTES, access=access)

    @property
    def looping(self) -> int:
        """The LLM over whose stream the caller's innermost loop goes, while the loop's body runs; 0
        if none does."""
        return struct.unpack_from("=Q", self._map, 8)[0]

    @property
    def loops(self) -> int:
        """How often the body of such a loop was begun."""
        return struct.unpack_from("=Q", self._map, 16)[0]

    @contextlib.contextmanager
    def loop(self, llm: int) -> Iterator[None]:
        """While the body of a loop runs."""
        before = self.looping
        struct.pack_into("=QQ", self._map, 8, llm, self.loops + 1)
        try:
            yield
        finally:
            struct.pack_into("=Q", self._map, 8, before)

    def write(self, state: State) -> None:
        """Into the half that nobody reads: a process may die at any time."""
        data = pickle.dumps(state)
        assert len(data) < _HALF_BYTES - 16, "so many LLMs at once"
        half = 1 - self._map[0]
        at = _HALVES_AT + half * _HALF_BYTES
        struct.pack_into("=QQ", self._map, at, len(data), zlib.crc32(data))
        self._map[at + 16 : at + 16 + len(data)] = data
        self._map[0] = half

    def read(self) -> State:
        """What was written last."""
        while True:
            at = _HALVES_AT + self._map[0] * _HALF_BYTES
            size, check = struct.unpack_from("=QQ", self._map, at)
            data = self._map[at + 16 : at + 16 + size]
            if zlib.crc32(data) == check:
                return pickle.loads(data)
            time.sleep(0.001)  # it was written twice meanwhile


class ThisProcess:
    """What this process tells of itself. All its LLMs share it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("torch_pd_record")
        os.ftruncate(self.fd, Record.NBYTES)
        self.record = Record(self.fd, own=True)
        self.state = State(os.getpid(), process_state(os.getpid())[1])
        self.callers: set[int] = set()
        """Threads that have begun acts."""
        self.boards: dict[int, Board] = {}
        """Of its LLMs, by number."""
        self.failed: dict[int, Board] = {}
        """Of those that ended with an error."""
        self._lock = threading.RLock()
        self._at_exit = self._exited = False
        self.record.write(self.state)

    def add(self, llm: int, board: Board) -> None:
        """The board of an LLM."""
        self.boards[llm] = board
        if not self._at_exit:
            self._at_exit = True
            atexit.register(self._exit)  # so late that it runs before others' clean-up
            multiprocessing.util.Finalize(None, self._exit, exitpriority=0)  # instead, in a child

    @contextlib.contextmanager
    def change(self) -> Iterator[State]:
        """The state, to be changed."""
        with self._lock:
            yield self.state
            ended = [llm for llm, place in self.state.llms.items() if place.end]
            for llm in ended[:-_KEPT]:
                del self.state.llms[llm]
            if self.state.pid == os.getpid():  # a fork is nobody's rank
                self.record.write(self.state)

    def look_at_threads(self) -> None:
        """Notes whether a second thread might begin an act. Daemons that never did (of progress
        bars, of loggers) are not expected to."""
        threads = threading.enumerate()
        might = {
            thread.ident for thread in threads if not thread.daemon or thread.ident in self.callers
        }
        sole = len(might) == 1
        if sole != self.state.sole:
            with self.change() as state:
                state.sole = sole

    def _exit(self) -> None:
        """The script is at its end. Ranks that are not in need of this one go on, unless it ended
        with an error; one that is says so itself."""
        if self._exited or os.getpid() != self.state.pid:
            return
        self._exited = True
        for board in self.failed.values():
            # What is left to do may wait for ranks that are gone.
            board.guard(GRACE_S)
        if getattr(sys, "last_exc", None) or getattr(sys, "last_value", None):
            return
        with self.change() as state:
            for llm in self.boards:
                state.llms[llm].end = "has ended its script"
        for board in self.boards.values():
            board.leave()


GRACE_S = 5.0
"""How long a rank of torchrun may handle the loss of another before it is ended."""
_this: ThisProcess | None = None


def this_process() -> ThisProcess:
    """Made when it is first asked for."""
    global _this
    if _this is None or _this.state.pid != os.getpid():
        _this = ThisProcess()
    return _this


def line_of_caller() -> str:
    """The line outside of this package that led here."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in ("torch_pd", "contextlib"):
            break
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def process_state(pid: int) -> tuple[str, int]:
    """State letter of a process ("X": gone) and when it was born, in ticks since boot."""
    letter, _, born = _stat(pid)
    return letter.replace("Z", "X"), born


def _stat(pid: int) -> tuple[str, int, int]:
    """State letter, parent and time of birth."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0, 0
    return fields[0], int(fields[1]), int(fields[19])


def ranks_of_torchrun() -> dict[int, int] | None:
    """Process ids of the ranks that this process's torchrun started and that have not ended, by
    rank; None if they cannot be told."""
    mine = _environ(os.getpid())
    if not mine.keys() >= {"RANK", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "WORLD_SIZE"}:
        return None
    if mine["LOCAL_WORLD_SIZE"] != mine["WORLD_SIZE"]:
        return None
    entries = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    parents = {pid: _stat(pid)[1] for pid in entries}
    try:
        torchrun = parents[os.getpid()]
        while _environ(torchrun).get("RANK") == mine["RANK"]:  # a shell, a profiler, ...
            torchrun = parents[torchrun]
        ranks: dict[int, int] = {}
        for pid in entries:
            above = pid
            while above not in (torchrun, 0):
                above = parents.get(above, 0)
            if above and pid != torchrun and (rank := _environ(pid).get("RANK")) is not None:
                ranks.setdefault(int(rank), pid)
    except (PermissionError, KeyError, ValueError):
        return None
    return ranks


def _environ(pid: int) -> dict[str, str]:
    """Variables that a process was started with; none if it has ended."""
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (entry.partition("=") for entry in data.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}
