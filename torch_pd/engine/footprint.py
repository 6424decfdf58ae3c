"""Footprint: the lines of a rank's ledger (engine/memory.py) before there is a rank, or a GPU.

The model is built on meta, two layers of it, and the same steps are run that the ledger runs on
the GPU (engine/trial.py). What they allocate and free is played to an allocator that works as
torch's does. Everything else is computed by the code that lays it out: shard, ring, mailbox,
staging.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_pd.config import EngineConfig
from torch_pd.costs import ModelShape
from torch_pd.engine.trial import Trial, steps_staging, try_steps
from torch_pd.nn.patch import patch_model
from torch_pd.nn.pooled import pool_model
from torch_pd.sizing import GIB
from torch_pd.weights.layout import Layout, ModelDims, make_layout
from torch_pd.weights.mailbox import Mailbox
from torch_pd.weights.pool import WeightPool
from torch_pd.weights.ring import Ring, default_ring_bytes
from torch_pd.weights.ship import Exchange

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT_BYTES = 690 << 20
"""CUDA context, cuBLAS, kernels that are loaded. This and what follows: by ledgers of H100s."""
MAPPED_BYTES = 400 << 20
"""More than that where memory of peers is mapped."""
NCCL_BYTES = 900 << 20
"""A communicator's channels and buffers, and kernels that the first exchanges load."""
WORKSPACE_BYTES = 32 << 20
"""Of cuBLAS, in torch's allocator."""
_LAYERS = 2
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def dims_of(shape: ModelShape) -> ModelDims | None:
    """The sizes that a pool splits, None if there is more in the layers than it knows."""
    dims = ModelDims(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        itemsize=shape.itemsize,
        tied=shape.tied,
    )
    rows = [dims.shape(linear) for linear in ("qkv", "o", "gate_up", "down")]
    params = shape.num_layers * sum(out * width for out, width in rows)
    return dims if params == shape.layer_params and not shape.expert_params else None


def footprint(
    mode: str,
    shape: ModelShape,
    config: EngineConfig,
    ranks: int,
    longest: int,
    rank: int | None = None,
) -> dict[str, int]:
    """Bytes of a rank by the ledger's lines, KV pages left out.

    Args:
        mode: "replicate", or how shared weights are used: "ship", "stream", "auto".
        config: of the engine.
        ranks: that share one copy of the weights.
        longest: tokens of the longest sequence.
        rank: which of them; default: the one that holds most.

    Raises:
        ValueError: the weights cannot be split over so many ranks, or ring_gib is too small.
    """
    max_pages = -(-longest // config.block_size)
    lines = {"weights": shape.resident_bytes, "shard": 0, "ring": 0}
    mailbox = 0
    if mode == "replicate" or ranks == 1:
        lines["weights"] += shape.pooled_bytes
        activations, graphs = _replicated(shape, config, max_pages)
    else:
        dims = dims_of(shape)
        assert dims is not None
        layout = make_layout(
            dims, ranks, weight_layout=config.weight_layout, param_ranks=config.param_ranks
        )
        if rank is None:
            rank = max(range(ranks), key=layout.arena_bytes)
        lines["shard"] = layout.arena_bytes(rank)
        if mode != "ship" and _serves(config, rank):
            asked = config.ring_gib
            lines["ring"] = default_ring_bytes(layout, rank) if asked is None else int(asked * GIB)
        if mode != "stream":
            mailbox = Mailbox.nbytes(ranks)
        activations, graphs = _shared(mode, shape, config, layout, rank, max_pages)
    return {
        **lines,
        "activations": activations,
        "graphs": graphs,
        "staging": steps_staging(config, max_pages),
        "context": CONTEXT_BYTES + (MAPPED_BYTES if mode != "replicate" and ranks > 1 else 0),
        "communication": NCCL_BYTES + mailbox if mailbox else 0,
    }


def _serves(config: EngineConfig, rank: int) -> bool:
    return config.data_ranks is None or rank in config.data_ranks


def _replicated(shape: ModelShape, config: EngineConfig, max_pages: int) -> tuple[int, int]:
    trial = Trial(build(shape), max_pages, (), 0)
    return _try(trial, config)


def _shared(
    mode: str, shape: ModelShape, config: EngineConfig, layout: Layout, rank: int, max_pages: int
) -> tuple[int, int]:
    model = build(shape)
    few = replace(layout, dims=replace(layout.dims, num_layers=_LAYERS), splits=layout.splits[:2])
    dtype = _DTYPES[shape.itemsize]
    weights = WeightPool(few, rank, dtype, "meta")
    ring = None
    if mode != "ship" and _serves(config, rank):
        arenas = [
            torch.empty(few.arena_bytes(owner), dtype=torch.uint8, device="meta")
            for owner in range(few.size)
        ]
        arenas[rank] = weights.arena
        asked = None if config.ring_gib is None else int(config.ring_gib * GIB)
        ring = Ring(few, rank, arenas, dtype, asked)
    exchange = None if mode == "stream" else NoExchange(rank, few.size)
    pool_model(model, weights, exchange, ring)
    serving = [] if exchange is None else [_serves(config, rank) for rank in range(few.size)]
    return _try(Trial(model, max_pages, serving, rank), config)


def _try(trial: Trial, config: EngineConfig) -> tuple[int, int]:
    blocks = Blocks()
    with Meter(blocks):
        activations, graphs = try_steps(trial, config, blocks)
    # The graphs are captured on a stream of their own, which has a workspace too.
    return activations + WORKSPACE_BYTES, graphs + (WORKSPACE_BYTES if graphs else 0)


def build(shape: ModelShape) -> "PreTrainedModel":
    """A patched model of such layers on meta, two of them."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=_LAYERS,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max(1, shape.max_position),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=_DTYPES[shape.itemsize])
    return patch_model(model)


class NoExchange(Exchange):
    """Gives the results room and sends nothing; as large messages go, by NCCL."""

    def __init__(self, rank: int, size: int) -> None:
        self.group = self.mailbox = None
        self.rank, self.size = rank, size
        self._whole = self._lists = True

    def gather(self, x: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """See `Exchange`."""
        return x.new_empty(sum(rows) if widths[self.rank] else 0, x.shape[1])

    def to_tokens(self, y: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """See `Exchange`."""
        return y.new_empty(rows[self.rank] * sum(widths))

    def to_owners(self, x: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """See `Exchange`."""
        packed = x.new_empty(x.numel())  # the others' parts, one after another
        out = packed.new_empty(sum(rows) * widths[self.rank])
        return out.view(sum(rows), widths[self.rank])

    def scatter_sum(self, y: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """See `Exchange`."""
        return y.new_empty(rows[self.rank], y.shape[1])


class Blocks:
    """What torch's allocator of a GPU would hold (a `Gauge`): freed blocks are kept, split for
    smaller requests and merged again.

    Small requests come from segments of 2 MiB, middle ones of 20, large ones have their own; the
    smallest free block that suffices is taken.
    """

    _SMALL, _MIDDLE = 1 << 20, 10 << 20

    def __init__(self) -> None:
        self._free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
        """By size, segment, place; of small requests and of others."""
        self._used: dict[int, tuple[int, int, int]] = {}
        self._segments: list[int] = []
        self._next = self._now = self._most = 0

    def reserved(self) -> int:
        """See `Gauge`."""
        return sum(self._segments)

    def allocated(self) -> int:
        """See `Gauge`."""
        return self._now

    def peak(self) -> int:
        """See `Gauge`."""
        return self._most

    def restart(self) -> None:
        """See `Gauge`."""
        self._most = self._now

    def allocate(self, nbytes: int) -> int:
        """A block; returns a number for `free`."""
        size = max(512, -(-nbytes // 512) * 512)
        small = size <= self._SMALL
        free = self._free[small]
        at = bisect_left(free, (size, -1, -1))
        if at == len(free):
            whole = 2 << 20 if small else 20 << 20
            if size >= self._MIDDLE:
                whole = -(-size // (2 << 20)) * (2 << 20)
            self._segments.append(whole)
            found = whole, len(self._segments) - 1, 0
        else:
            found = free.pop(at)
        have, segment, place = found
        rest = have - size
        if rest > (0 if small else self._SMALL):
            insort(free, (rest, segment, place + size))
            have = size
        self._next += 1
        self._used[self._next] = have, segment, place
        self._now += have
        self._most = max(self._most, self._now)
        return self._next

    def free(self, number: int) -> None:
        """Gives a block back; neighbours that are free become one with it."""
        size, segment, place = self._used.pop(number)
        self._now -= size
        free = self._free[self._is_small(segment)]
        for other in [block for block in free if block[1] == segment]:
            if other[2] + other[0] == place or place + size == other[2]:
                free.remove(other)
                place, size = min(place, other[2]), size + other[0]
        insort(free, (size, segment, place))

    def segments(self) -> list[int]:
        """Their sizes."""
        return list(self._segments)

    def places(self) -> list[tuple[int, int, int]]:
        """Segment, start and end of each block in use."""
        return [(segment, at, at + size) for size, segment, at in self._used.values()]

    def largest_free(self) -> int:
        """Of the blocks that are free."""
        return max(block[0] for free in self._free.values() for block in free)

    def _is_small(self, segment: int) -> bool:
        return self._segments[segment] == 2 << 20


class Meter(TorchDispatchMode):
    """Plays what is made and dropped inside to an allocator.

    Args:
        blocks: the allocator.
        device: type of the tensors that count.
    """

    def __init__(self, blocks: Blocks, device: str = "meta") -> None:
        super().__init__()
        self._blocks, self._device = blocks, device
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for key, (ref, number) in list(self._live.items()):
            if ref.expired():
                del self._live[key]
                self._blocks.free(number)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == self._device:
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._live:
                    number = self._blocks.allocate(storage.nbytes())
                    self._live[key] = StorageWeakRef(storage), number
        return out


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
