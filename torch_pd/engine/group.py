"""Group: what `LLM` calls, be it one engine in this process or several ranks.

`Single` is one engine in this process. `Spawned` (spawned.py) starts the ranks and coordinates
them; `Joined` (joined.py) is this process's place among the ranks that torchrun started. All take
requests in order of arrival from one queue, so a rank that is done takes more.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn, Protocol

from torch_pd.engine.engine import Engine
from torch_pd.engine.inflight import Request
from torch_pd.engine.lender import Lender
from torch_pd.engine.limits import Limits
from torch_pd.engine.work import Call
from torch_pd.request import RequestOutput


class Runs(Protocol):
    """What `LLM` needs of an engine or a group of them."""

    @property
    def engine(self) -> Engine | None:
        """The engine, where it is in this process."""

    @property
    def pids(self) -> list[int]:
        """Processes that were started here, by rank."""

    @property
    def limits(self) -> Limits:
        """Which requests can run."""

    @property
    def first_rank(self) -> bool:
        """True in the one process that shows progress."""

    def run(self, requests: list[Request], stream: bool) -> Iterator[RequestOutput]:
        """Runs checked requests; yields them finished, or also whenever one grew."""

    def stats(self) -> dict[str, Any]:
        """Counters since the start."""

    def shutdown(self) -> None:
        """Ends all."""


class Numbers:
    """Numbers the calls of one LLM, of which one runs at a time."""

    def __init__(self) -> None:
        self.calls = self.requests = 0
        self._under_way = threading.Lock()

    def check(self) -> None:
        """Raises RuntimeError while a call is under way."""
        if self._under_way.locked():
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            "a call is under way, and an LLM runs one at a time: finish the loop over its stream, "
            "or close it; of several threads, let one make the calls"
        )

    def next(self) -> int:
        """The number of what all ranks do next."""
        self.calls += 1
        return self.calls

    def begin(self, requests: list[Request], stream: bool) -> Call:
        if not self._under_way.acquire(blocking=False):
            self._refuse()
        call = Call(self.next(), requests, self.requests, stream)
        self.requests += len(requests)
        return call

    def end(self) -> None:
        self._under_way.release()


def sum_stats(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of all ranks together (the longest time of any), and each rank's own as ``ranks``."""
    total: dict[str, Any] = {}
    for name in dict.fromkeys(name for stats in each for name in stats):
        values = [stats[name] for stats in each if name in stats]  # (a lender has few)
        if isinstance(values[0], int):
            total[name] = sum(values)
        elif isinstance(values[0], float):
            total[name] = max(values)
    return total | {"ranks": each}


class Single:
    """One engine, in this process."""

    first_rank = True
    engine: Engine
    pids: ClassVar[list[int]] = []

    def __init__(self, engine: Engine | Lender):
        assert isinstance(engine, Engine), "a single rank has nobody to lend to"
        self.engine = engine
        self._numbers = Numbers()
        self._closed = False
        self._stepping = threading.RLock()
        """Held during a step: another thread may shut down."""

    @property
    def limits(self) -> Limits:
        return self.engine.limits

    def run(self, requests: list[Request], stream: bool) -> Iterator[RequestOutput]:
        engine = self.engine
        self._numbers.begin(requests, stream)
        pending = set()
        try:
            with self._open():
                for request in requests:
                    engine.add(request, stream=stream)
                    pending.add(request.request_id)
            while pending:
                with self._open():
                    outputs = engine.step()
                for output in outputs:
                    if output.finished:
                        pending.discard(output.request_id)
                    yield output
        finally:
            # An error, or a caller that left the loop: nothing of this call stays behind.
            for request_id in pending:
                engine.abort(request_id)
            self._numbers.end()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        with self._stepping:
            if self._closed:
                raise RuntimeError("the LLM was shut down before all outputs had come")
            yield

    def stats(self) -> dict[str, Any]:
        return self.engine.stats()

    def shutdown(self) -> None:
        self._closed = True  # before the lock is waited for: the loop takes it again at once
        with self._stepping:
            self.engine.shutdown()
