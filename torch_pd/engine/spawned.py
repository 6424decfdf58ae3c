"""Spawned: ranks in processes of their own, which this one starts and coordinates."""

import dataclasses
import logging
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_pd.board import GroupError
from torch_pd.config import EngineConfig
from torch_pd.dist import check_gpus
from torch_pd.engine.group import Numbers, sum_stats
from torch_pd.engine.inflight import Request
from torch_pd.engine.limits import Limits
from torch_pd.engine.work import unpack
from torch_pd.engine.worker import ABORT, ABORTED, STATS, STOP, Setup
from torch_pd.launch import Ranks
from torch_pd.request import RequestOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ABORT_S = 10.0
"""How long ranks may take to drop a call: some steps."""


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
        self._numbers = Numbers()
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
        return sum_stats([each[rank] for rank in sorted(each)])

    def shutdown(self) -> None:
        if self._ended.detach() is not None:
            self._ranks.close(STOP)
