"""WeightPool: one rank's part of the weights, all of it in one byte arena."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_pd.weights.layout import LINEARS, Layout, Piece, ShardSplit

Allocate = Callable[[int], Tensor]
"""Bytes -> uint8 tensor of at least that many on the pool's device; on a GPU aligned to 256."""


@dataclass
class LayerShard:
    """One rank's part of a decoder layer's linears. ``C`` is the hidden size; widths may be 0."""

    qkv: Tensor
    """[q + 2 kv rows of me, C]; the rows of q, then k, then v."""
    o: Tensor
    """[C, q columns of me]."""
    gate_up: Tensor
    """[2 * mlp of me, C]; the rows of gate, then up."""
    down: Tensor
    """[C, mlp of me]."""
    qkv_bias: Tensor | None = None
    """[q + 2 kv rows of me]: my part of ``full_qkv_bias``."""
    full_qkv_bias: Tensor | None = None
    """Of the whole matrix in shard-block order; biases are resident on every rank."""
    o_bias: Tensor | None = None
    """[C], to be added once to the sum over the shards."""
    gate_up_bias: Tensor | None = None
    full_gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    """[C], to be added once to the sum over the shards."""


class WeightPool:
    """Views of one rank's pieces in its arena. New pools hold garbage; a loader fills them.

    Args:
        layout: of the rank's pool group.
        rank: in the world.
        dtype: of the weights; its size is the layout's itemsize.
        device: where they lie.
        allocate: gives the arena, once; default: `torch.empty`.

    Attributes:
        split: the cut of each layer.
        layers: my part of each layer.
        lm_head, embedding: [vocab of me, C]; one tensor if they are tied.
        arena: uint8, all of the above. Offsets are those of the layout's pieces.
        mapped: the arena is not of torch's allocator.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
        allocate: Allocate | None = None,
    ) -> None:
        assert dtype.itemsize == layout.dims.itemsize
        self.layout = layout
        self.rank = rank
        self.size = layout.size
        self.index = layout.index(rank)
        """Of this rank in its group."""
        self.dtype = dtype
        nbytes = layout.arena_bytes(self.index)
        self.mapped = allocate is not None
        if allocate is None:
            self.arena = torch.empty(nbytes, dtype=torch.uint8, device=device)
        else:
            self.arena = allocate(nbytes)
        assert self.arena.dtype == torch.uint8
        assert self.arena.numel() >= nbytes
        self.layers = [
            LayerShard(**{linear: self.view(self._mine(linear, layer)) for linear in LINEARS})
            for layer in range(layout.dims.num_layers)
        ]
        self.lm_head = self.view(self._mine("lm_head"))
        self.embedding = self.lm_head if layout.dims.tied else self.view(self._mine("embedding"))

    @property
    def split(self) -> tuple[ShardSplit, ...]:
        """Of each layer over the ranks of the group."""
        return self.layout.splits

    @property
    def device(self) -> torch.device:
        """Of the arena."""
        return self.arena.device

    def view(self, piece: Piece, arena: Tensor | None = None) -> Tensor:
        """A piece ``[rows, columns]`` as it lies in an arena of its owner; default: this one."""
        arena = self.arena if arena is None else arena
        data = arena[piece.offset : piece.offset + piece.nbytes]
        return data.view(self.dtype).view(piece.shape)

    def set_biases(
        self,
        layer: int,
        qkv: Tensor | None,
        o: Tensor | None,
        gate_up: Tensor | None,
        down: Tensor | None,
    ) -> None:
        """Resident biases of a layer, whole, in the order of the checkpoint (q k v; gate up)."""
        shard = self.layers[layer]
        shard.o_bias, shard.down_bias = o, down
        if qkv is not None:
            shard.full_qkv_bias, shard.qkv_bias = self._by_shard("qkv", layer, qkv)
        if gate_up is not None:
            shard.full_gate_up_bias, shard.gate_up_bias = self._by_shard("gate_up", layer, gate_up)

    def _mine(self, linear: str, layer: int = 0) -> Piece:
        return self.layout.pieces(linear, layer)[self.index]

    def _by_shard(self, linear: str, layer: int, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A merged bias in shard-block order, and this rank's part of it."""
        starts, at = {}, 0
        for part, rows in self.layout.dims.part_rows(linear).items():
            starts[part], at = at, at + rows
        full = torch.cat(
            [
                bias[
                    starts[segment.part] + segment.rows[0] : starts[segment.part] + segment.rows[1]
                ]
                for owner in range(self.size)
                for segment in self.layout.segments(linear, layer, owner)
            ]
        )
        start, stop = self._mine(linear, layer).rows
        return full, full[start:stop]
