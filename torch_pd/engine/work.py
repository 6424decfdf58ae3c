"""A rank's part of a call: it takes requests from the group's queue and runs them."""

import dataclasses
import hashlib
import pickle
from collections import deque
from collections.abc import Generator, Iterator, Sequence

from torch_pd.board import Board
from torch_pd.engine.draw import derive_seed
from torch_pd.engine.engine import Engine
from torch_pd.engine.inflight import Request
from torch_pd.engine.lender import Lender
from torch_pd.request import RequestOutput

LOOK_AHEAD = 4
"""Requests that wait in the engine while all its rows are in use, so that the next free one is."""


@dataclasses.dataclass(frozen=True)
class Call:
    """The requests of one call of generate or stream, the same on all ranks."""

    number: int
    """From 1."""
    requests: list[Request]
    first: int
    """Requests of all calls before; decides the seeds."""
    stream: bool

    def by_id(self) -> dict[str, Request]:
        """The requests by their ids."""
        return {request.request_id: request for request in self.requests}

    def digest(self) -> int:
        """A number that differs if anything differs."""
        data = pickle.dumps((self.requests, self.first, self.stream))
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

    def request(self, index: int, engine_seed: int) -> Request:
        """A request, with the seed that it would have in a single engine; which rank runs it must
        not matter."""
        request = self.requests[index]
        if request.params.seed is not None:
            return request
        seed = derive_seed(engine_seed, self.first + index)
        return dataclasses.replace(request, params=dataclasses.replace(request.params, seed=seed))


def pack(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """The outputs without their prompts: whoever gets them has those already, and a streamed one
    would carry its prompt at every step. Changes them in place."""
    for output in outputs:
        output.prompt, output.prompt_token_ids = None, []
    return outputs


def unpack(outputs: list[RequestOutput], requests: dict[str, Request]) -> list[RequestOutput]:
    """Undoes `pack`; ``requests`` are the call's by their ids."""
    for output in outputs:
        request = requests[output.request_id]
        output.prompt, output.prompt_token_ids = request.prompt, request.prompt_token_ids
    return outputs


def run(
    engine: Engine | Lender, board: Board, call: Call
) -> Generator[list[RequestOutput], None, None]:
    """Runs this rank's share of a call; yields the outputs of each step.

    A rank holds no more than its running sequences and what its next step can start, so idle ranks
    find the rest in the queue. Closing the iterator drops what is unfinished here.
    """
    if isinstance(engine, Lender):
        return
    pending: set[str] = set()
    lengths: deque[int] = deque(maxlen=max(LOOK_AHEAD, engine.config.max_num_seqs))
    try:
        while True:
            board.set_running(len(pending))
            for request in _take(engine, board, call, lengths, len(pending)):
                engine.add(request, stream=call.stream)
                pending.add(request.request_id)
            engine.scheduler.admission.num_elsewhere = board.left
            if engine.lockstep is None and not engine.has_unfinished:
                return
            outputs = engine.step()
            pending.difference_update(o.request_id for o in outputs if o.finished)
            yield outputs
            if engine.lockstep is not None and engine.group_idle:
                return
    except GeneratorExit:
        _drop(engine, board, pending)
        # The others go on until they have heard of it.
        while engine.lockstep is not None and not engine.group_idle:
            engine.step()
        raise
    finally:
        _drop(engine, board, pending)


def _drop(engine: Engine, board: Board, pending: set[str]) -> None:
    """Ends this rank's part of a call."""
    while pending:
        engine.abort(pending.pop())
    board.set_running(0)


def _take(
    engine: Engine, board: Board, call: Call, lengths: deque[int], pending: int
) -> Iterator[Request]:
    """Takes requests until the engine's next step is full.

    Args:
        lengths: prompt lengths of the requests taken last, kept here.
        pending: requests in the engine.
    """
    if not engine.serves:
        return
    config, among = engine.config, sum(engine.serving)
    waiting = engine.scheduler.num_waiting
    # The waiting ones are the newest: the scheduler admits in order.
    recent: Sequence[int] = list(lengths)[-waiting:] if waiting else ()
    tokens = sum(recent)
    while tokens < config.max_num_batched_tokens and (
        pending < config.max_num_seqs or waiting < LOOK_AHEAD
    ):
        taken = board.take(1, among)
        if not taken:
            return
        request = call.request(taken[0], config.seed)
        lengths.append(len(request.prompt_token_ids))
        tokens += lengths[-1]
        waiting += 1
        pending += 1
        yield request
