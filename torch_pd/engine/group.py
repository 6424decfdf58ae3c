"""Group: several ranks behind the interface of one engine.

`Single` is one engine in this process. `Spawned` starts the ranks and coordinates them; `Joined` is
this process's place among the ranks that torchrun started. All take requests in order of arrival
from one queue, so a rank that is done takes more.
"""

import contextlib
import dataclasses
import logging
import os
import queue
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol

import torch

from torch_pd.board import GroupError, PeerLost
from torch_pd.config import EngineConfig
from torch_pd.dist import World, check_gpus, join_torchrun
from torch_pd.engine.engine import Engine
from torch_pd.engine.inflight import Request
from torch_pd.engine.lender import Lender
from torch_pd.engine.limits import Limits
from torch_pd.engine.work import Call, pack, run, unpack
from torch_pd.engine.worker import ABORT, ABORTED, STATS, STOP, Setup, make_engine
from torch_pd.launch import Ranks, readable
from torch_pd.request import RequestOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ABORT_S = 10.0
"""How long ranks may take to drop a call: some steps."""
_GRACE_S = 5.0
"""How long a rank of torchrun may handle the loss of another before it is ended."""
_SETTLE_S = 0.3
"""Time in which the cause of a broken connection shows on the board."""


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


class Single:
    """One engine, in this process."""

    first_rank = True
    engine: Engine
    pids: ClassVar[list[int]] = []

    def __init__(self, engine: Engine | Lender):
        assert isinstance(engine, Engine), "a single rank has nobody to lend to"
        self.engine = engine
        self._numbers = _Numbers()
        self._closed = False

    @property
    def limits(self) -> Limits:
        return self.engine.limits

    def run(self, requests: list[Request], stream: bool) -> Iterator[RequestOutput]:
        engine = self.engine
        self._numbers.begin(requests, stream)
        pending = set()
        try:
            for request in requests:
                engine.add(request, stream=stream)
                pending.add(request.request_id)
            while pending:
                if self._closed:
                    raise RuntimeError("it was shut down before the loop over its stream ended")
                for output in engine.step():
                    if output.finished:
                        pending.discard(output.request_id)
                    yield output
        finally:
            # An error, or a caller that left the loop: nothing of this call stays behind.
            for request_id in pending:
                engine.abort(request_id)
            self._numbers.end()

    def stats(self) -> dict[str, Any]:
        return self.engine.stats()

    def shutdown(self) -> None:
        self._closed = True
        self.engine.shutdown()


class Spawned:
    """Ranks in processes of their own, started and coordinated by this one.

    Raises:
        ValueError: not enough GPUs, or what a rank could not do.
        GroupError: a rank died, hung or failed while starting; names it.
    """

    first_rank = True
    engine = None

    def __init__(
        self,
        model: Path,
        tokenizer: "PreTrainedTokenizerBase | Path | None",
        config: EngineConfig,
        device: str,
    ):
        size = config.data_parallel_size
        if device == "cuda":
            check_gpus(size)
        threads = max(1, torch.get_num_threads() // size)
        setups = [
            (Setup(rank, size, device, threads, model, tokenizer, config),) for rank in range(size)
        ]
        self.config = config
        self._numbers = _Numbers()
        self._kept: deque[tuple[int, Any]] = deque()
        self._ranks = Ranks(f"{Setup.__module__}:main", setups)
        self._ended = weakref.finalize(self, self._ranks.kill)
        try:
            rank, port = self._ranks.receive()
            assert rank == 0, rank
            for other in range(1, size):
                self._ranks.send(port, other)
            limits: dict[int, Limits] = {}
            while len(limits) < size:
                rank, (limits[rank], memory) = self._ranks.receive()
                logger.info("rank %d: %s", rank, memory)
        except BaseException:
            self._ended()
            raise
        self._limits = dataclasses.replace(
            limits[0], kv_tokens=min(one.kv_tokens for one in limits.values())
        )

    @property
    def pids(self) -> list[int]:
        """The ranks' processes."""
        return self._ranks.pids

    @property
    def limits(self) -> Limits:
        self._ranks.check()
        return self._limits

    def run(self, requests: list[Request], stream: bool) -> Iterator[RequestOutput]:
        working = set(range(self.config.data_parallel_size))
        call = self._numbers.begin(requests, stream)
        known = call.by_id()
        try:
            self._ranks.send(call)
            while working:
                rank, message = self._kept.popleft() if self._kept else self._ranks.receive()
                if message == call.number:
                    working.discard(rank)
                elif isinstance(message, list):  # (not of a `stats` that was interrupted)
                    yield from unpack(message, known)
        except GroupError:
            self._ended()
            raise
        except BaseException as error:
            self._drop(error)
            raise
        finally:
            self._numbers.end()

    def _drop(self, left: BaseException) -> None:
        """Ends a call that the caller left (by an interrupt or otherwise); if a rank does not get
        out of it, ends all."""
        inside = set(range(self.config.data_parallel_size))
        self._kept.clear()
        try:
            self._ranks.send(ABORT)
            while inside:
                rank, message = self._ranks.receive(_ABORT_S)
                if message == ABORTED:
                    inside.discard(rank)
        except TimeoutError:
            names = ", ".join(self._ranks.describe(rank) for rank in sorted(inside))
            self._ended()
            raise GroupError(
                f"{names} did not leave the call within {_ABORT_S:.0f} s of "
                f"{type(left).__name__}, so the group was ended"
            ) from left
        except BaseException:
            self._ended()
            raise

    def stats(self) -> dict[str, Any]:
        each: dict[int, dict[str, Any]] = {}
        self._ranks.send(STATS)
        while len(each) < self.config.data_parallel_size:
            rank, message = self._ranks.receive()
            if isinstance(message, dict):
                each[rank] = message
            else:
                self._kept.append((rank, message))  # of a call under way
        return _sum_stats([each[rank] for rank in sorted(each)])

    def shutdown(self) -> None:
        if self._ended.detach() is not None:
            self._ranks.close(STOP)


class Joined:
    """This process's rank among those that torchrun started. All call alike.

    Every rank gets all results; only rank 0 gets partial ones while they stream.

    Raises:
        ValueError: the ranks' arguments differ, or torchrun's world is not as asked for.
    """

    pids: ClassVar[list[int]] = []

    def __init__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase | None",
        config: EngineConfig,
        device: str,
        world: World,
    ):
        self._world = world
        self._numbers = _Numbers()
        self._threads = torch.get_num_threads()
        self._own: Engine | Lender | None = None
        # Out of a collective that a dead rank will never join, no exception leads.
        world.board.guard(_GRACE_S)
        with self._failing():
            same = {"model": str(model) if isinstance(model, (str, Path)) else type(model).__name__}
            _compare(world.all_gather(same | dataclasses.asdict(config)))
            if device == "cpu":
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.size))
            self._own = make_engine(model, tokenizer, config, device, world)
            self._links = _link_up(world)
            self._inbox = _Inbox(self._links) if world.rank == 0 else None

    @property
    def first_rank(self) -> bool:
        return self._world.rank == 0

    @property
    def limits(self) -> Limits:
        return self._engine.limits

    @property
    def engine(self) -> Engine | None:
        return self._own if isinstance(self._own, Engine) else None

    @property
    def _engine(self) -> Engine | Lender:
        if self._own is None:
            raise GroupError("this rank failed, and the group ended with it")
        return self._own

    def run(self, requests: list[Request], stream: bool) -> Iterator[RequestOutput]:
        call = self._numbers.begin(requests, stream)
        try:
            with self._failing():
                other = self._world.board.open(call.number, len(requests), call.digest())
                if other is not None:
                    raise ValueError(
                        f"ranks {self._world.rank} and {other} were given different prompts or "
                        "parameters; under torchrun all ranks call with the same ones"
                    )
                yield from self._lead(call) if self._world.rank == 0 else self._follow(call)
        finally:
            self._numbers.end()

    def _lead(self, call: Call) -> Iterator[RequestOutput]:
        known = call.by_id()
        working = set(self._links)
        finished: list[RequestOutput] = []
        own = run(self._engine, self._world.board, call)
        try:
            for output in self._all_outputs(call, known, working, own):
                if output.finished:
                    finished.append(output)
                yield output
        except GeneratorExit:  # the caller left the loop
            self._world.board.drain()
            for rank in sorted(working):
                self._links[rank].send(ABORT)
            own.close()  # in lockstep it waits for the others to hear of it
            while working:
                self._receive(call, known, working, 0.1)
            self._send_all([])
            raise
        self._send_all(finished)

    def _send_all(self, message: Any) -> None:
        for link in self._links.values():
            link.send(message)

    def _all_outputs(
        self,
        call: Call,
        known: dict[str, Request],
        working: set[int],
        own: Iterator[list[RequestOutput]],
    ) -> Iterator[RequestOutput]:
        for some in own:
            yield from some
            yield from self._receive(call, known, working, None)
        while working:
            yield from self._receive(call, known, working, 0.1)

    def _receive(
        self,
        call: Call,
        known: dict[str, Request],
        working: set[int],
        timeout_s: float | None,
    ) -> list[RequestOutput]:
        """Outputs that other ranks have sent, for the first of which it waits; a rank that is done
        leaves ``working``."""
        assert self._inbox is not None
        outputs: list[RequestOutput] = []
        for rank, message in self._inbox.take(timeout_s):
            if message is _GONE:
                self._lost(rank)
            elif message == call.number:
                working.discard(rank)
            else:
                outputs += unpack(message, known)
        if timeout_s is not None and not outputs:
            self._world.board.check()
        return outputs

    def _follow(self, call: Call) -> Iterator[RequestOutput]:
        link = self._links[0]
        own = run(self._engine, self._world.board, call)
        results = None
        for some in own:
            if some:
                link.send(pack(some))
            if readable(link):
                message = self._read(link, 0)
                assert message == ABORT, message
                own.close()
                break
        link.send(call.number)
        while results is None or results == ABORT:
            if link.poll(0.1):
                results = self._read(link, 0)
            else:
                self._world.board.check()
        yield from results

    def _read(self, link: Connection, rank: int) -> Any:
        try:
            return link.recv()
        except (EOFError, OSError):
            self._lost(rank)

    def _lost(self, rank: int) -> NoReturn:
        self._world.board.check()  # its own words, if it left any, say more
        raise PeerLost(rank, self._world.board.pid(rank))

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Tells the others of an error; the guard ends them if they hang."""
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException as error:
            cause = self._cause(error)
            torch.set_num_threads(self._threads)
            self._world.board.fail(f"{type(cause).__name__}: {cause}")
            self._own = None
            if cause is error:
                raise
            raise cause from error

    def _cause(self, error: BaseException) -> BaseException:
        """A rank that is gone, or failed, if a collective with it may have broken off: the error of
        the collective names a connection at most."""
        end = time.monotonic() + _SETTLE_S
        while isinstance(error, RuntimeError) and not isinstance(error, GroupError):
            try:
                self._world.board.check()
            except GroupError as cause:
                return cause
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        return error

    def stats(self) -> dict[str, Any]:
        self._numbers.check()
        with self._failing():
            return _sum_stats(self._world.all_gather(self._engine.stats()))

    def shutdown(self) -> None:
        torch.set_num_threads(self._threads)
        if self._own is None:
            return
        self._own.shutdown()
        self._own = None
        if self._inbox is not None:
            self._inbox.finish()  # once the others have closed their ends
        for link in self._links.values():
            link.close()
        self._world.all_gather(None)  # all leave together, or the first would be missed
        self._world.leave()


_GONE = object()
"""In place of a message: the connection has ended."""


class _Inbox:
    """Reads what the other ranks send, so that they never wait for this one to read: in lockstep
    it may be waiting for them."""

    def __init__(self, links: dict[int, Connection]):
        self._messages: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, args=(links,), daemon=True)
        self._thread.start()

    def _read(self, links: dict[int, Connection]) -> None:
        ranks = {link: rank for rank, link in links.items()}
        while ranks:
            for link in wait(list(ranks)):
                assert isinstance(link, Connection)
                try:
                    self._messages.put((ranks[link], link.recv()))
                except (EOFError, OSError):
                    self._messages.put((ranks.pop(link), _GONE))

    def take(self, timeout_s: float | None) -> Iterator[tuple[int, Any]]:
        """The (rank, message) that are there; waits for the first one if a timeout is given."""
        try:
            if timeout_s is not None:
                yield self._messages.get(timeout=timeout_s)
            while True:
                yield self._messages.get_nowait()
        except queue.Empty:
            return

    def finish(self) -> None:
        """Waits until all connections have ended."""
        self._thread.join()


class _Numbers:
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

    def begin(self, requests: list[Request], stream: bool) -> Call:
        if not self._under_way.acquire(blocking=False):
            self._refuse()
        self.calls += 1
        call = Call(self.calls, requests, self.requests, stream)
        self.requests += len(requests)
        return call

    def end(self) -> None:
        self._under_way.release()


def join(config: EngineConfig, given: bool, device: str) -> World:
    """The world that torchrun made.

    Args:
        given: the caller named data_parallel_size.
    """
    world = join_torchrun(device)
    if given and config.data_parallel_size != world.size:
        world.leave()
        raise ValueError(
            f"data_parallel_size={config.data_parallel_size} given, but torchrun started "
            f"{world.size} ranks; leave it out, or start as many"
        )
    return world


def _compare(each: list[dict[str, Any]]) -> None:
    for rank, fields in enumerate(each):
        for name, value in fields.items():
            if value != each[0][name]:
                raise ValueError(
                    f"{name} differs between the ranks: {each[0][name]!r} on rank 0, {value!r} on "
                    f"rank {rank}; give all the same"
                )


def _link_up(world: World) -> dict[int, Connection]:
    """Connections between rank 0 and each other rank, over a socket that is no file."""
    if world.rank == 0:
        key, address = secrets.token_bytes(16), f"\0torch_pd-{os.getpid()}-{secrets.token_hex(8)}"
        links: dict[int, Connection] = {}
        with Listener(address, "AF_UNIX", backlog=world.size, authkey=key) as listener:
            world.all_gather((address, key))
            while len(links) < world.size - 1:
                link = listener.accept()
                links[link.recv()] = link
        return links
    address, key = world.all_gather(None)[0]
    link = Client(address, "AF_UNIX", authkey=key)
    link.send(world.rank)
    return {0: link}


def _sum_stats(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of all ranks together (the longest time of any), and each rank's own as ``ranks``."""
    total: dict[str, Any] = {}
    for name in dict.fromkeys(name for stats in each for name in stats):
        values = [stats[name] for stats in each if name in stats]  # (a lender has few)
        if isinstance(values[0], int):
            total[name] = sum(values)
        elif isinstance(values[0], float):
            total[name] = max(values)
    return total | {"ranks": each}
