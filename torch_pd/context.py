"""Batch: the tensors of one forward pass over packed tokens."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class GroupBatch:
    """Where one KV group (layers that share window and shape) reads and writes in this pass."""

    block_tables: Tensor
    """int32 [num_seqs, max_pages]; page 0 pads."""
    slots: Tensor
    """int64 [num_tokens]; -1 writes nothing."""


@dataclass(slots=True)
class StagedPart:
    """A sequence whose pages are gathered before its attention."""

    first: int
    """Of its query tokens."""
    end: int
    length: int
    """Tokens in the cache after this pass."""
    query_start: Tensor
    """int32 [0, end - first]."""
    key_start: Tensor
    """int32 [0, length]."""


@dataclass(slots=True)
class Staged:
    """The last sequences of a batch, which compute several tokens over pages in other pools."""

    parts: list[StagedPart]
    max_query_len: int
    """Of the sequences before them."""
    table: Tensor
    """int32 [1, pages], a block table of the buffers: 0, 1, 2, ..."""
    buffers: tuple[Tensor, Tensor]
    """[tokens, num_kv_heads, head_dim], room for the keys and values of one layer."""


@dataclass(slots=True)
class Batch:
    """One forward pass: num_tokens packed query tokens of num_seqs sequences."""

    num_tokens: int
    max_query_len: int
    query_start: Tensor
    """int32 [num_seqs + 1], cumulative query tokens."""
    seq_lens: Tensor
    """int32 [num_seqs], tokens in the cache after this pass, the query tokens included."""
    groups: tuple[GroupBatch, ...]
    places: Tensor | None = None
    """int64 [num_places, 2] if a block table names another pool (docs/layouts.md)."""
    staged: Staged | None = None
