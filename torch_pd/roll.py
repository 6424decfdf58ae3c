"""Roll: the ranks of torchrun with whom an LLM is shared, seen by one of them.

While a rank is in an act of the LLM (record.py), a thread reads the others' records once a second:

* If it is certain that the act cannot end (two ranks are in different ones, one has ended, or has
  let go of the LLM), the rank raises a GroupError that says what every rank is doing.
* If it is not (a rank may load for minutes, or do other things between calls), a warning says now
  and then who is awaited.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from torch_pd.board import Board, GroupError, PeerLost
from torch_pd.record import (
    CROSSED,
    GRACE_S,
    Place,
    Record,
    State,
    line_of_caller,
    process_state,
    ranks_of_torchrun,
    stuck,
    this_process,
)

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0
"""How long ranks wait for each other while they start (torchrun's ranks may come far apart)."""
LOOK_S = 1.0
"""Between two looks at the others' records. What is said was seen twice."""
WARN_S = (10.0, 30.0, 60.0)
"""When it is said who is awaited; from the last time on, so often."""
_ABSENT_S = 4.0
"""torchrun starts all ranks together: one that was not there for so long has ended."""
_REMEDY = (
    "Under torchrun all ranks make the same LLMs and the same calls in the same order (for an LLM "
    "on one rank alone, start the script with python)"
)


class Roll:
    """Of one LLM, from before its ranks meet."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._board: Board | None = None
        self.process = this_process()
        self.records: dict[int, Record] = {}
        self.verdict = ""
        """Why the act of this rank cannot end. (No exception: it would hold the LLM.)"""
        self._over = threading.Event()
        with self.process.change() as state:
            state.made += 1
            self.llm = state.made
            state.llms[self.llm] = Place(since=time.monotonic())

    # What this rank does.

    @contextlib.contextmanager
    def act(self, number: int, what: str) -> Iterator[None]:
        """While this rank is in an act. An error in it ends the LLM."""
        self.process.callers.add(threading.get_ident())
        with self.process.change() as state:
            place = state.llms[self.llm]
            place.begun, place.what = number, what
            place.where, place.since = line_of_caller(), time.monotonic()
            state.acting.append(self.llm)
        self.process.look_at_threads()
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException as error:
            failed = f"has failed ({type(error).__name__}: {str(error)[:200]})"
            self.end("has given it up" if isinstance(error, GroupError) else failed)
            raise
        finally:
            self.leave_act()

    def leave_act(self) -> None:
        """This rank has done its part, and no other waits for it."""
        with self.process.change() as state:
            if self.llm not in state.acting:
                return
            state.acting.remove(self.llm)
            place = state.llms[self.llm]
            place.since = time.monotonic()
            if not place.end:
                place.done = place.begun

    @contextlib.contextmanager
    def in_loop(self) -> Iterator[None]:
        """While the caller has an output of a stream and may take its time."""
        with self.process.record.loop(self.llm):
            yield

    def end(self, why: str) -> None:
        """This process has the LLM no more."""
        self._over.set()
        self.process.boards.pop(self.llm, None)
        with self.process.change() as state:
            place = state.llms.get(self.llm)
            if place is not None and not place.end:
                place.end = why

    def drop(self) -> None:
        """The LLM is gone without having been shut down."""
        if not self._over.is_set() and self.process.state.pid == os.getpid():
            self.end("has let go of it without shutdown()")
            if self._board is not None:
                self._board.leave()

    def fail(self, text: str) -> None:
        """Tells the others of an error that has ended the LLM here. The process may go on."""
        if self._board is not None:
            self._board.fail(text)
            self._board.leave()
            self.process.failed[self.llm] = self._board

    def attach(self, board: Board) -> None:
        """From now on errors go over the board, and this process ends if it does not notice one."""
        self._board = board
        self.process.add(self.llm, board)
        # Out of a collective that a dead rank will never join, no exception leads.
        board.guard(GRACE_S)

    # Where the ranks wait for each other.

    def call(self, store: dist.Store, rank: int, size: int) -> None:
        """Waits until all ranks make this LLM.

        Raises:
            GroupError: a rank never will, or did not within `START_TIMEOUT_S`.
        """
        self.rank, self.size = rank, size
        threading.Thread(target=self._watch, name="torch_pd roll", daemon=True).start()
        state, host = self.process.state, "-".join(host_name())
        store.set(_key(rank), f"{state.pid} {state.born} {self.process.fd} {host}")
        end, nap = time.monotonic() + START_TIMEOUT_S, 0.001
        others = set(range(size)) - {rank}
        for other in others:
            while not store.check([_key(other)]) or not self._open(
                other, host, store.get(_key(other)).decode()
            ):
                nap = self._wait(nap, end)
        while not all(place.begun >= 0 and not place.end for place in map(self._place_of, others)):
            self._renumber()
            nap = self._wait(nap, end)

    def _renumber(self) -> None:
        """Takes the number that another rank gives the LLM that it makes, if that is higher: it has
        made some in vain."""
        making = [0]
        for record in self.records.values():
            there = record.read()
            making += [llm for llm in there.acting if there.place(llm).begun == 0]
        with self.process.change() as state:
            if max(making) > self.llm == state.made:
                state.made = max(making)
                state.llms[state.made] = state.llms.pop(self.llm)
                state.acting[state.acting.index(self.llm)] = state.made
                self.llm = state.made

    def _open(self, other: int, host: str, entry: str) -> bool:
        """Opens a rank's record; False if it is none: a store that outlives ranks has old ones."""
        pid, born, fd, there = entry.split(" ", 3)
        if there != host:
            return True  # all will be told that, and what to do, as soon as they have met
        if process_state(int(pid))[1] != int(born):
            return False
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/fd/{fd}", "rb") as file:
            self.records[other] = Record(file.fileno())
        return other in self.records

    def meet(self) -> None:
        """Waits for all ranks; each meets the others as often. There is a limit while the LLM is
        made.

        Raises:
            GroupError: a rank will not come.
        """
        with self.process.change() as state:
            place = state.llms[self.llm]
            place.met += 1
        end = time.monotonic() + START_TIMEOUT_S if place.begun == 0 else float("inf")
        for other in self.records:
            nap = 0.0
            while self._place_of(other).met < place.met:
                nap = self._wait(nap, end)

    def check_board(self) -> None:
        """Raises GroupError if another rank has failed or is gone."""
        if self._board is not None:
            self._board.check()

    def decide(self, verdict: str) -> None:
        """The act cannot end: all ranks that are in it are told."""
        self.verdict = verdict
        if self._board is not None:
            self._board.fail(f"GroupError: {verdict}")

    def _place_of(self, other: int) -> Place:
        """A rank on another host cannot be seen, and is taken to be where it should."""
        if other not in self.records:
            return Place(begun=0)
        return self.records[other].read().place(self.llm)

    def _wait(self, nap: float, end: float) -> float:
        """Naps; returns how long the next time."""
        time.sleep(nap)
        self.check()
        if nap >= 0.005:
            self.check_board()
        if time.monotonic() > end:
            raise GroupError(f"{START_TIMEOUT_S:.0f} s are over, and {self.about_all()}. {_REMEDY}")
        return min(0.01, nap + 0.0005)

    def check(self) -> None:
        """Raises GroupError if the act of this rank cannot end."""
        if self.verdict:
            raise GroupError(self.verdict)

    # What the others do.

    def about(self, rank: int) -> str:
        """What a rank does."""
        if rank == self.rank:
            return self.process.state.describe(rank)
        if rank in self.records:
            return self.records[rank].read().describe(rank)
        return f"rank {rank} has made no LLM"

    def about_all(self) -> str:
        """What all ranks do."""
        return "; ".join(self.about(rank) for rank in range(self.size))

    def explain(self, lost: PeerLost) -> PeerLost:
        """The error with what all ranks do, and what to do if the lost one went of its own will."""
        more = f". {self.about_all()}" + f". {_REMEDY}" * bool(self._place_of(lost.rank).end)
        return PeerLost(lost.rank, lost.pid, more)

    def _watch(self) -> None:
        watch = _Watch(self)
        while not self._over.wait(LOOK_S):
            watch.look()


class _Watch:
    """What one look after the other finds."""

    def __init__(self, roll: Roll):
        self._roll = roll
        self._certain: set[tuple[int, int]] = set()
        self._absent: dict[int, int] = {}
        self._loops: dict[int, int] = {}
        self._since: float | None = None
        self._told = 0.0
        self._decided: tuple[int, float] | None = None

    def look(self) -> None:
        """Decides or warns, if this rank is in an act."""
        roll = self._roll
        roll.process.look_at_threads()
        mine = roll.process.record.read()
        here = mine.place(roll.llm)
        # In the loop over a stream nothing waits, or the LLM of an inner call.
        looping = roll.process.record.looping == roll.llm
        if roll.llm not in mine.acting or looping or (mine.sole and mine.acting[-1] != roll.llm):
            self._certain, self._since = set(), None
            return
        if self._decided is not None:
            self._end_process(here)
            return
        certain, awaited = self._others(mine, here)
        now = {(here.begun, rank) for rank in certain}
        seen, self._certain = self._certain & now, now
        if seen:
            self._decide(
                here, {rank: why for rank, why in certain.items() if (here.begun, rank) in seen}
            )
        elif awaited:
            self._warn(here, awaited)
        else:
            self._since = None

    def _others(self, mine: State, here: Place) -> tuple[dict[int, str], dict[int, str]]:
        """Ranks for which it is certain that the act cannot end, and why; ranks that are awaited,
        and what is to be said of each."""
        roll = self._roll
        certain: dict[int, str] = {}
        awaited: dict[int, str] = {}
        running: dict[int, int] | None = {}
        if len(roll.records) < roll.size - 1:
            running = ranks_of_torchrun()
        for rank in range(roll.size):
            record = roll.records.get(rank)
            if rank == roll.rank:
                continue
            if record is None:
                runs = running is None or rank in running
                self._absent[rank] = 0 if runs else self._absent.get(rank, 0) + 1
                if self._absent[rank] * LOOK_S > _ABSENT_S:
                    certain[rank] = "has ended without making it"
                awaited[rank] = f"runs as process {running[rank]}" if runs and running else ""
                continue
            there = record.read()
            place = there.place(roll.llm)
            if place.done >= here.begun:
                continue
            letter, born = process_state(there.pid)
            looping = record.looping
            before, self._loops[rank] = self._loops.get(rank), record.loops
            if (roll.rank, roll.llm, here.begun) in there.crossed:
                certain[rank] = "was in another call, and has failed for it"
            elif letter == "X" or born != there.born:
                certain[rank] = place.end or "has ended"
            elif why := stuck(mine, there, roll.llm, looping):
                certain[rank] = why
            elif letter == "T":
                awaited[rank] = f"is stopped by a signal: it goes on after kill -CONT {there.pid}"
            elif place.begun < here.begun or place.met < here.met:
                awaited[rank] = ""
            elif looping == roll.llm and before == self._loops[rank]:
                awaited[rank] = "is in the loop over the outputs of a stream"
        return certain, awaited

    def _decide(self, here: Place, certain: dict[int, str]) -> None:
        roll = self._roll
        why = ", ".join(f"rank {rank} {why}" for rank, why in certain.items())
        text = f"{here.describe(roll.llm)} cannot end: {why}. {roll.about_all()}. {_REMEDY}"
        self._decided = here.begun, time.monotonic()
        with roll.process.change() as state:
            for rank in [rank for rank, why in certain.items() if why == CROSSED]:
                there = roll.records[rank].read()
                state.crossed |= {(rank, llm, there.place(llm).begun) for llm in there.acting[-1:]}
        roll.decide(text)

    def _end_process(self, here: Place) -> None:
        """Where the thread that is in the act has not left it by an error."""
        assert self._decided is not None
        act, at = self._decided
        if here.begun == act and time.monotonic() - at > GRACE_S:
            line = f"torch_pd: {self._roll.verdict}; so rank {self._roll.rank} ends\n"
            try:
                os.write(2, line.encode())
            finally:
                os._exit(1)  # nothing else can be done if stderr is gone

    def _warn(self, here: Place, awaited: dict[int, str]) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since, self._told = now, 0.0
        for_s = now - self._since
        due = next((at for at in WARN_S if at > self._told), self._told + WARN_S[-1])
        if for_s < due:
            return
        self._told = due
        roll = self._roll
        about = "; ".join(
            roll.about(rank) + ", and " * bool(text) + text for rank, text in awaited.items()
        )
        limit = "while its process lives it is waited for"
        if here.begun == 0:
            limit = f"it is waited for {START_TIMEOUT_S:.0f} s at most"
        logger.warning(
            "%s: rank %s is awaited for %.0f s now. %s; %s. %s",
            here.describe(roll.llm),
            ", ".join(map(str, awaited)),
            for_s,
            about,
            limit,
            _REMEDY,
        )


def _key(rank: int) -> str:
    return f"torch_pd/record/{rank}"


def host_name() -> tuple[str, str]:
    """The same for two processes if they run on one host and see each other's process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, os.readlink("/proc/self/ns/pid")
