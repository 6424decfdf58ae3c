"""Joined: this process's rank among those that torchrun started."""

import contextlib
import dataclasses
import hashlib
import os
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch

from torch_pd.board import GroupError, PeerLost
from torch_pd.config import EngineConfig
from torch_pd.dist import World, join_torchrun
from torch_pd.engine.engine import Engine
from torch_pd.engine.group import Numbers, sum_stats
from torch_pd.engine.inflight import Request
from torch_pd.engine.lender import Lender
from torch_pd.engine.limits import Limits
from torch_pd.engine.work import Call, pack, run, unpack
from torch_pd.engine.worker import ABORT, make_engine
from torch_pd.launch import readable
from torch_pd.request import RequestOutput
from torch_pd.roll import Roll

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTLE_S = 0.3
"""Time in which the cause of a broken connection shows on the board."""


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
        given: bool,
        device: str,
    ):
        self._numbers = Numbers()
        self._threads = torch.get_num_threads()
        self._own: Engine | Lender | None = None
        self._roll = Roll()
        with self._roll.act(0, "making"), self._failing():
            self._world = world = join(config, given, device, self._roll)
            same = {"model": str(model) if isinstance(model, (str, Path)) else type(model).__name__}
            _compare(world.all_gather(same | dataclasses.asdict(config)))
            if device == "cpu":
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.size))
            self._own = make_engine(model, tokenizer, config, device, world)
            self._links = _link_up(world)
            self._inbox = _Inbox(self._links) if world.rank == 0 else None
        weakref.finalize(self, self._roll.drop).atexit = False

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
            with self._roll.act(call.number, "stream" if stream else "generate"), self._failing():
                self._enter(call.number, "generate", len(requests), call.digest())
                yield from self._lead(call) if self._world.rank == 0 else self._follow(call)
        finally:
            self._numbers.end()

    def _enter(self, number: int, what: str, total: int = 0, digest: int = 0) -> None:
        """Begins what all ranks do together; ValueError on (at least) the last rank to come if they
        do different things."""
        mine = f"{what} {digest}".encode()
        digest = int.from_bytes(hashlib.blake2b(mine, digest_size=8).digest(), "little")
        other = self._world.board.open(number, total, digest)
        if other is not None:
            raise ValueError(
                f"ranks {self._world.rank} and {other} were given different prompts or parameters, "
                f"or are not in the same call (here: {what}); under torchrun all ranks make the "
                f"same calls with the same arguments. {self._roll.about_all()}"
            )

    def _lead(self, call: Call) -> Iterator[RequestOutput]:
        known = call.by_id()
        working = set(self._links)
        finished: list[RequestOutput] = []
        own = run(self._engine, self._world.board, call)
        try:
            for output in self._all_outputs(call, known, working, own):
                if output.finished:
                    finished.append(output)
                if call.stream:
                    with self._roll.in_loop():
                        yield output
                else:
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
            self._check()
        else:
            self._roll.check()
        return outputs

    def _follow(self, call: Call) -> Iterator[RequestOutput]:
        link = self._links[0]
        own = run(self._engine, self._world.board, call)
        results = None
        for some in own:
            self._roll.check()
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
                self._check()
        self._roll.leave_act()
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
            self._roll.fail(f"{type(cause).__name__}: {cause}")
            self._own = None
            if cause is error:
                raise
            raise cause from error

    def _cause(self, error: BaseException) -> BaseException:
        """A rank that is gone, or failed, if a collective with it may have broken off: the error of
        the collective names a connection at most."""
        end = time.monotonic() + _SETTLE_S
        while True:
            if self._roll.verdict:
                return GroupError(self._roll.verdict)
            if isinstance(error, PeerLost):
                return self._roll.explain(error)
            if isinstance(error, GroupError) or not isinstance(error, (RuntimeError, OSError)):
                return error
            if time.monotonic() > end:
                return error
            try:
                self._roll.check_board()
            except GroupError as cause:
                error = cause
            time.sleep(0.02)

    def stats(self) -> dict[str, Any]:
        self._numbers.check()
        number, engine = self._numbers.next(), self._engine
        with self._roll.act(number, "stats"), self._failing():
            self._enter(number, "stats")
            return sum_stats(self._world.all_gather(engine.stats()))

    def shutdown(self) -> None:
        torch.set_num_threads(self._threads)
        if self._own is None:
            return
        number = self._numbers.next()
        with self._roll.act(number, "shutdown"), self._failing():
            self._enter(number, "shutdown")
            self._own.shutdown()
            self._own = None
            if self._inbox is not None:
                self._inbox.finish(self._check)  # once the others have closed their ends
            for link in self._links.values():
                link.close()
            self._world.meet()  # all leave together, or the first would be missed
            self._world.leave()
        self._roll.end("has shut it down")

    def _check(self) -> None:
        self._roll.check()
        self._world.board.check()


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

    def finish(self, check: Callable[[], None]) -> None:
        """Waits until all connections have ended; ``check`` raises if a rank fails before."""
        while self._thread.is_alive():
            self._thread.join(0.1)
            check()


def join(config: EngineConfig, given: bool, device: str, roll: Roll) -> World:
    """The world that torchrun made.

    Args:
        given: the caller named data_parallel_size.
    """
    world = join_torchrun(device, roll)
    roll.attach(world.board)
    if given and config.data_parallel_size != world.size:
        raise ValueError(
            f"data_parallel_size={config.data_parallel_size} given, but torchrun started "
            f"{world.size} ranks; leave it out, or start as many"
        )
    config.check_ranks(world.size)
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
