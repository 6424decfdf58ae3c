"""A model whose weights are shared by the ranks, ready for an engine."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from torch_pd.board import Board
from torch_pd.config import EngineConfig
from torch_pd.dist import START_TIMEOUT_S, World
from torch_pd.engine.lockstep import Lockstep
from torch_pd.engine.planner import plan_settings
from torch_pd.engine.shape import shape_of
from torch_pd.engine.streaming import Streaming, resolve_mode, start_streaming
from torch_pd.nn.patch import patch_model
from torch_pd.nn.pooled import pool_model
from torch_pd.nn.pooled_model import load_pooled
from torch_pd.nn.twin import fused_blocks
from torch_pd.peer import PeerMemory
from torch_pd.sizing import GIB
from torch_pd.weights.layout import group_of
from torch_pd.weights.loader import read_config, resolve_dtype, resolve_format
from torch_pd.weights.mailbox import open_mailbox
from torch_pd.weights.ship import Exchange
from torch_pd.weights.skeleton import build_skeleton
from torch_pd.weights.source import Resident

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def load_shared(
    model: Any, config: EngineConfig, world: World
) -> "tuple[PreTrainedModel, Lockstep | None, Streaming | None]":
    """Loads this rank's part of a model. Collective.

    Returns:
        The model, what its ranks agree on their steps by, and what this rank streams by. Without
        the former the ranks step on their own; both are None if this rank holds all of the model
        (as many replicas as ranks).

    Raises:
        ValueError: the model cannot be shared like this.
    """
    if not isinstance(model, (str, Path)):
        raise ValueError(
            f"weights='pooled' reads each rank's part from the files: give a model folder, not a "
            f"{type(model).__name__}"
        )
    ranks = group_of(world.size, world.rank, config.weight_replicas)
    mode = "ship" if len(ranks) == 1 else resolve_mode(config, world, ranks)
    memory = None if mode == "ship" else PeerMemory(world.device)
    loaded, weights = load_pooled(
        model,
        config,
        world.rank,
        world.size,
        world.device,
        None if memory is None else memory.allocate,
    )
    if weights.size == 1:
        return pool_model(loaded, weights, source=Resident([weights])), None, None
    shape = shape_of(loaded, weights.dtype.itemsize)
    world.meet()  # ranks may load at very unlike speeds
    group, board = _meet(world, config.weight_replicas)
    streaming = None
    if memory is not None:
        key = f"{board.name}-{ranks[0]}"
        streaming = start_streaming(memory, weights, shape, config, world, key, mode)
    lockstep = None if mode == "stream" else Lockstep(board, world.board)
    exchange = None
    if mode != "stream":
        exchange = Exchange(group, open_mailbox(world, ranks, f"{board.name}-{ranks[0]}-mail"))
    source = None if streaming is None else streaming.ring
    return pool_model(loaded, weights, exchange, source), lockstep, streaming


def _meet(world: World, replicas: int) -> tuple[dist.ProcessGroup, Board]:
    """The process group and the board of the ranks that share one copy."""
    if replicas == 1:
        return world.group, world.board
    ranks = group_of(world.size, world.rank, replicas)
    width = len(ranks)
    # All ranks make all groups, in one order.
    groups = [
        dist.new_group(list(range(first, first + width))) for first in range(0, world.size, width)
    ]
    first = world.rank == ranks[0]
    board = Board("", 0, width, ranks) if first else None
    names = world.all_gather(board.name if board is not None else None)
    if board is None:
        board = Board(names[ranks[0]], ranks.index(world.rank), width, ranks)
    board.wait_for_all(START_TIMEOUT_S)
    return groups[ranks[0] // width], board


def follow_plan(model: Any, config: EngineConfig, world: World) -> EngineConfig:
    """The config with ``weights`` settled for these GPUs. Collective.

    The plan is for the planner's usual prompts and outputs. It presumes GPUs that read each other
    directly: without such links weights are shared only where copies do not fit. A model that
    cannot be shared gets copies too, and what does not fit is refused where memory is laid out.
    """
    if world.device.type != "cuda" or world.size == 1 or not isinstance(model, (str, Path)):
        return config
    path = Path(model).expanduser()
    if resolve_format(path, config.load_format) == "gguf":
        return config
    total = torch.cuda.get_device_properties(world.device).total_memory
    smallest = min(world.all_gather(total))
    copies = replace(config, weights="resident")
    try:
        plan = plan_settings(path, config, gpus=world.size, gpu_memory=smallest / GIB)
    except ValueError as error:
        logger.warning("%s", error)
        return copies
    logger.info("the plan is weights=%r: %s", plan.weights, plan.reason)
    if plan.weights == "resident":
        return copies
    if plan.modes["replicate"].run is not None and any(world.all_gather(bool(world.unlinked))):
        logger.warning("every GPU gets all weights: not all GPUs read each other directly")
        return copies
    try:
        fused_blocks(patch_model(build_skeleton(read_config(path), resolve_dtype(None, "auto"))))
    except ValueError as error:
        logger.warning("every GPU gets all weights: %s", error)
        return copies
    return replace(config, weights="pooled")
