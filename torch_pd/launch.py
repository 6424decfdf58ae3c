"""Launch: starts the ranks' processes, carries messages, and ends all of them when one ends.

The parent coordinates and computes nothing: it makes no CUDA context. A child is a fresh Python
that never imports the caller's script, so the script needs no ``__main__`` guard, and it talks to
the parent over a socket pair: no ports, no files. It dies with the parent, whatever kills that.
"""

import contextlib
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch_pd.board import GroupError
from torch_pd.child import BOOT, Fault, Phase

logger = logging.getLogger(__name__)

HANG_S = 7.0
"""A start in which nothing has happened for so long is taken to hang."""
STOPPED_S = 5.0
"""After so long without a message it is seen whether a signal has stopped a rank."""
_SETTLE_S = 0.3
"""Time in which the first rank to fall takes others with it; then the cause is looked for."""
_STOP_S = 5.0
"""Time to end in peace."""


def readable(link: Connection) -> bool:
    """True if a message, or the end, can be read. `Connection.poll` takes twenty times as long."""
    poll = select.poll()
    poll.register(link.fileno(), select.POLLIN)
    return bool(poll.poll(0))


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen
    link: Connection
    phase: str = "starting"
    fault: Fault | None = None
    ended: bool = False
    ticks: int = -1
    moved: float = field(default_factory=time.monotonic)


class Ranks:
    """The processes of a group, seen from their parent.

    Each runs ``target(link, *args[rank])``, where ``link`` is its end of a connection. What it
    sends comes out of `receive`, a `Phase` excepted. The first that ends, or hangs before its phase
    is ``READY``, ends all.

    Args:
        target: "module:function", importable with the parent's ``sys.path``.
        args: one tuple for each rank, picklable.
    """

    READY = "ready"
    WAITING = "waiting"
    """Phase of a rank that waits for others, and so does nothing without being to blame."""

    def __init__(self, target: str, args: Sequence[tuple]):
        self.failure: BaseException | None = None
        self._target, self._args = target, args
        self._messages: queue.Queue = queue.Queue()
        self._outgoing: queue.SimpleQueue = queue.SimpleQueue()
        self._closing = False
        self._children: list[_Child] = []
        self._stopped: set[int] = set()
        self._lock = threading.Lock()
        self._wake, self._woken = os.pipe()
        started: queue.Queue = queue.Queue()
        # The thread that starts the children must live as long as they do: they are killed when it
        # ends, which is how they end with this process.
        self._thread = threading.Thread(target=self._watch, args=(started,), daemon=True)
        self._thread.start()
        error = started.get()
        if error is not None:
            raise error

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [child.process.pid for child in self._children]

    def describe(self, rank: int) -> str:
        """A rank, its process, and whether a signal has stopped that."""
        pid = self.pids[rank]
        stopped = ", stopped by a signal," if _state(pid)[0] == "T" else ""
        return f"rank {rank} (process {pid}){stopped}"

    def send(self, message: Any, rank: int | None = None) -> None:
        """Sends to a child, or to all; all of it or nothing, even if Ctrl-C interrupts.

        A child must be reading when it is sent more than a socket buffer holds.

        Raises:
            as `check`.
        """
        self.check()
        # The thread writes: an interrupt, which hits this one, cannot cut a message in two.
        self._outgoing.put((rank, message))
        self._ring()

    def _ring(self) -> None:
        os.write(self._woken, b"x")

    def receive(self, timeout_s: float | None = None) -> tuple[int, Any]:
        """The next (rank, message) of any child.

        Raises:
            TimeoutError: nothing came.
            and as `check`.
        """
        try:
            rank, message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no message within {timeout_s} s") from None
        if rank is None:
            self._messages.put((None, None))  # for whoever asks again
            self.check()
        return rank, message

    def check(self) -> None:
        """Raises what ended the group, if it has: GroupError, or the ValueError, TypeError or
        ImportError of a rank that could not start."""
        if self.failure is not None:
            raise self.failure.with_traceback(None)
        if self._closing:
            raise GroupError("the group of ranks has been shut down")

    def close(self, stop: Any) -> None:
        """Sends ``stop`` to all, waits for them to end, kills those that do not."""
        with self._lock:
            if self._closing:
                return
            self._outgoing.put((None, stop))
            self._closing = True
        self._ring()
        self._finish()

    def kill(self) -> None:
        """Ends all at once."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        for child in self._children:
            child.process.kill()
        self._finish()

    def _finish(self) -> None:
        self._thread.join()
        for child in self._children:
            child.link.close()
        os.close(self._wake)
        os.close(self._woken)

    def _start(self) -> None:
        for rank in range(len(self._args)):
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-c", BOOT, str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for the parent, which decides
                )
            self._children.append(_Child(rank, process, Connection(ours.detach())))
        for child, args in zip(self._children, self._args, strict=True):
            with contextlib.suppress(BrokenPipeError):  # it has ended; `_pump` will see why
                child.link.send(sys.path)
                child.link.send((self._target, args))

    def _watch(self, started: queue.Queue) -> None:
        try:
            self._start()
        except BaseException as error:
            self._kill_all()
            started.put(error)
            return
        started.put(None)
        try:
            self._pump()
        except BaseException as error:
            self.failure = self.failure or error
            raise
        finally:
            self._kill_all()
            self._messages.put((None, None))

    def _pump(self) -> None:
        """Reads from the children until one or all of them end."""
        deadline = None
        while True:
            alive = [child for child in self._children if not child.ended]
            if not alive:
                return
            starting = [child for child in alive if child.phase != self.READY]
            timeout = 0.5 if starting else STOPPED_S
            if self._closing:
                deadline = deadline or time.monotonic() + _STOP_S
                timeout = max(0.0, deadline - time.monotonic())
            ready = wait([child.link for child in alive] + [self._wake], timeout)
            if self._wake in ready:
                os.read(self._wake, 4096)
                self._write(alive)
            for child in alive:
                if child.link in ready:
                    self._read(child)
            if self._closing:
                if deadline is not None and time.monotonic() >= deadline:
                    return
                continue
            if not ready and not starting:
                self._warn_of_stopped()
            fallen = [child for child in self._children if child.ended or child.fault is not None]
            if fallen:
                self.failure = self._why(alive)
                return
            hanging = self._hanging(starting)
            if hanging is not None:
                self.failure = GroupError(
                    f"rank {hanging.rank} (process {hanging.process.pid}) hung on start, while "
                    f"{hanging.phase}: it has done nothing for {HANG_S:.0f} s"
                )
                return

    def _warn_of_stopped(self) -> None:
        """Tells once of a rank that a signal has stopped: perhaps all wait for it."""
        stopped = {c.rank for c in self._children if _state(c.process.pid)[0] == "T"}
        for rank in sorted(stopped - self._stopped):
            logger.warning(
                "%s does nothing; it goes on after kill -CONT %d",
                self.describe(rank),
                self.pids[rank],
            )
        self._stopped = stopped

    def _write(self, alive: list[_Child]) -> None:
        while not self._outgoing.empty():
            rank, message = self._outgoing.get()
            data = ForkingPickler.dumps(message)  # once for all
            for child in alive:
                if rank is None or child.rank == rank:
                    try:
                        child.link.send_bytes(data)
                    except OSError:
                        child.ended = True

    def _read(self, child: _Child) -> None:
        try:
            message = child.link.recv()
        except (EOFError, OSError):
            child.ended = True
            return
        if isinstance(message, Phase):
            child.phase, child.moved = message, time.monotonic()
        elif isinstance(message, Fault):
            child.fault = message
        else:
            self._messages.put((child.rank, message))

    def _hanging(self, starting: list[_Child]) -> _Child | None:
        """A rank to blame if for `HANG_S` no starting rank has run, or wanted to, or read a disk.

        While any of them gets on, the others may be waiting for it. One that is stopped by a
        signal (state T) waits for nobody.
        """
        now = time.monotonic()
        stopped = set()
        for child in starting:
            state, ticks = _state(child.process.pid)
            if state == "T":
                stopped.add(child.rank)
            # A few ticks are the housekeeping of torch's threads.
            if state in "DR" or ticks > child.ticks + 5:
                child.ticks, child.moved = ticks, now
        still = [child for child in starting if now - child.moved > HANG_S]
        if len(still) < len(starting):
            still = [child for child in still if child.rank in stopped]
        # Rather not one that says it waits; the first to stand still may be what others wait for.
        return min(
            still,
            key=lambda c: (c.rank not in stopped, c.phase == self.WAITING, c.moved),
            default=None,
        )

    def _why(self, alive: list[_Child]) -> Exception:
        """The cause, once others have had the time to fall over it."""
        end = time.monotonic() + _SETTLE_S
        while (left := end - time.monotonic()) > 0:
            watched = [child for child in alive if not child.ended]
            for child in watched:
                if child.link in wait([child.link], 0):
                    self._read(child)
            time.sleep(min(left, 0.02))
        causes = []
        for child in self._children:
            fault = child.fault
            if fault is not None:
                order = (2 if fault.secondary else 1, fault.time)
            elif child.ended:
                code = child.process.wait()
                # SIGABRT is how libraries end a process whose peers are gone.
                order = (3 if code == -signal.SIGABRT else 0, 0.0)
            else:
                continue
            causes.append((order, child))
        _, child = min(causes, key=lambda cause: cause[0])
        fault, rank, during = child.fault, child.rank, f"while {child.phase}"
        if child.phase == self.READY:
            during = "while it ran"
        if fault is None:
            code = child.process.wait()
            how = f"exited with code {code}"
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}"
            return GroupError(f"rank {rank} (process {child.process.pid}) {how} {during}")
        if fault.kind is not None and child.phase != self.READY:
            return fault.kind(f"rank {rank}: {fault.message}")
        return GroupError(f"rank {rank} failed {during}: {fault.text}\n\n{fault.trace}")

    def _kill_all(self) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.process.kill()
        for child in self._children:
            child.process.wait()


def _state(pid: int) -> tuple[str, int]:
    """State letter and processor ticks of a process, ("X", 0) if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return fields[0], int(fields[11]) + int(fields[12])
