"""Streaming: the ring of a rank that may compute with all its group's weights, and when it does."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from torch_pd.config import EngineConfig
from torch_pd.costs import Costs, ModelShape
from torch_pd.dist import World
from torch_pd.engine.lockstep import CommonStep
from torch_pd.kv.host import available_memory
from torch_pd.peer import PeerMemory, check_links
from torch_pd.sizing import GIB
from torch_pd.weights.choice import Choice
from torch_pd.weights.machine import machine_of
from torch_pd.weights.ring import Ring

if TYPE_CHECKING:
    from torch_pd.weights.pool import WeightPool

logger = logging.getLogger(__name__)


class Streaming:
    """A rank's ring, and the choice where its group may ship as well.

    Args:
        memory: with this rank's shard and views of the others'.
        ring: of this rank; None: it has no requests, and so nothing to stream.
        choice: None: every step is streamed, and the ranks need not agree on anything.
    """

    def __init__(self, memory: PeerMemory, ring: Ring | None, choice: Choice | None):
        self._memory = memory
        self.ring = ring
        self.choice = choice

    def streams(self, common: CommonStep | None) -> bool:
        """Whether the next step is streamed; every rank of the group finds the same."""
        if self.choice is None:
            return True
        assert common is not None
        return self.choice.decide(common.tokens, common.selected, common.decoding) == "stream"

    def close(self) -> None:
        """Lets go of the ring and of the other ranks' weights."""
        if self.ring is not None:
            self.ring.close()
        self._memory.close()


def resolve_mode(config: EngineConfig, world: World, ranks: tuple[int, ...]) -> str:
    """remote_mode, or "ship" where "auto" cannot stream. Collective.

    Args:
        ranks: of this rank's group.

    Raises:
        ValueError: "stream" is forced and a rank cannot read another's GPU.
    """
    if config.remote_mode == "ship":
        return "ship"
    if config.remote_mode == "stream":
        check_links(world.unlinked, ranks, world.rank)
        return "stream"
    if any(world.all_gather([other for other in world.unlinked if other in ranks])):
        logger.warning(
            "remote_mode='auto' only ships: not all GPUs can read each other directly (see "
            "torch-pd info)"
        )
        return "ship"
    return "auto"


def _check_ring(nbytes: int, world: World) -> None:
    if world.device.type == "cuda":
        free, where = torch.cuda.mem_get_info(world.device)[0], "the GPU's memory"
    else:
        free, where = available_memory() // world.size, "host memory, shared by the ranks,"
    if nbytes > free:
        raise ValueError(
            f"ring_gib={nbytes / GIB:g}, but of {where} {free / GIB:.2f} GiB are left: lower "
            "ring_gib, or leave it out"
        )


def start_streaming(
    memory: PeerMemory,
    weights: "WeightPool",
    shape: ModelShape,
    config: EngineConfig,
    world: World,
    key: str,
    mode: str,
) -> Streaming:
    """Connects the filled pools of a group and fills the ring. Collective.

    Args:
        memory: holds the pool's arena.
        key: of the group, the same on its ranks.
        mode: "stream" or "auto".

    Raises:
        ValueError: ring_gib is too small for the largest matrix, or more than there is memory.
    """
    layout = weights.layout
    nbytes = None if config.ring_gib is None else int(config.ring_gib * GIB)
    if nbytes is not None:
        _check_ring(nbytes, world)
    arenas = memory.connect(key, weights.index, weights.size)
    ring = None
    if config.data_ranks is None or world.rank in config.data_ranks:
        ring = Ring(layout, weights.index, arenas, weights.dtype, nbytes)
    if mode == "stream":
        return Streaming(memory, ring, None)
    machine = machine_of(ring, world.device, world.all_gather)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # of what was measured
    costs = Costs(shape, machine, weights.size, whole=layout.whole)
    owners, data = config.param_ranks, config.data_ranks
    if owners is not None and data is not None and not set(owners) & set(data):
        costs = replace(costs, shards=len(owners), data_ranks=len(data))
    return Streaming(memory, ring, Choice(costs))
