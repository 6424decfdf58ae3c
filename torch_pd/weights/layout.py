"""Layout: which rank of a pool group holds which part of every linear, and where. Pure arithmetic.

The drawings are in docs/layouts.md. Every rank computes the whole table, so any rank knows the byte
offset of any piece in any owner's arena without asking.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

LINEARS = ("qkv", "o", "gate_up", "down")
"""Of a decoder layer; qkv and gate_up are split by rows, o and down by columns."""
ALIGNMENT = 256
"""Bytes; of every piece in its arena."""
MLP_UNIT = 128
VOCAB_UNIT = 8
_SMALLEST_UNIT = 8


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a decoder whose layers are all alike in shape."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    itemsize: int
    """Bytes of one weight."""
    tied: bool = False
    """lm_head and embedding are one matrix."""

    def shape(self, linear: str) -> tuple[int, int]:
        """``[out, in]`` of a whole matrix: one of LINEARS, "lm_head" or "embedding"."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden_size),
            "o": (self.hidden_size, q),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
            "lm_head": (self.vocab_size, self.hidden_size),
            "embedding": (self.vocab_size, self.hidden_size),
        }[linear]

    def part_rows(self, linear: str) -> dict[str, int]:
        """Rows of the parts of a merged matrix, in their order: q, k, v or gate, up."""
        if linear == "qkv":
            q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
            return {"q": q, "k": kv, "v": kv}
        assert linear == "gate_up"
        return dict.fromkeys(("gate", "up"), self.intermediate_size)


@dataclass(frozen=True)
class ShardSplit:
    """How the linears of one layer are cut over the ranks of a pool group; zeros are allowed."""

    kv_heads: tuple[int, ...]
    """KV head groups of each rank; their sum is num_kv_heads."""
    mlp: tuple[int, ...]
    """MLP columns of each rank; multiples of 128 where possible, the last may be shorter."""
    vocab: tuple[int, ...]
    """Vocabulary rows of each rank (lm_head, embedding); the same in every layer."""


@dataclass(frozen=True)
class Piece:
    """One owner's part of one linear, contiguous in the owner's arena."""

    owner: int
    """Index in the pool group."""
    offset: int
    """In the owner's arena, bytes."""
    rows: tuple[int, int]
    """Of the full ``[out, in]`` matrix in shard-block order."""
    cols: tuple[int, int]
    itemsize: int

    @property
    def shape(self) -> tuple[int, int]:
        """``[rows, columns]``; either may be 0."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next in the arena."""
        return self.shape[1] * self.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the piece."""
        return self.shape[0] * self.pitch


@dataclass(frozen=True)
class Segment:
    """Rows of a shard and where they lie in the part ("q", "up", ...) that they come from."""

    part: str
    rows: tuple[int, int]
    """Of the part's own matrix."""
    at: int
    """First row inside the shard."""


@dataclass(frozen=True)
class Layout:
    """The weights of one model over the ranks of one pool group: one complete copy."""

    dims: ModelDims
    ranks: tuple[int, ...]
    """Of the group, in the world; `Piece.owner` and the tuples of a split index into it."""
    splits: tuple[ShardSplit, ...]
    """One for each layer."""

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return len(self.ranks)

    @property
    def whole(self) -> bool:
        """Each layer lies on one rank."""
        return all(sum(map(bool, split.mlp)) == 1 for split in self.splits)

    def index(self, rank: int) -> int:
        """The place of a rank of the world in the group."""
        return self.ranks.index(rank)

    def pieces(self, linear: str, layer: int = 0) -> tuple[Piece, ...]:
        """The pieces of a matrix, one for each rank of the group, in shard-block order.

        Args:
            linear: one of LINEARS, or "lm_head" or "embedding" (one matrix if they are tied).
            layer: of the model; without meaning for lm_head and embedding.
        """
        if linear not in LINEARS:
            layer = 0
            linear = "lm_head" if self.dims.tied else linear
        return self._table[linear, layer]

    def arena_bytes(self, owner: int) -> int:
        """Bytes of the arena of a rank of the group."""
        return self._sizes[owner]

    def widths(self, linear: str, layer: int = 0) -> tuple[int, ...]:
        """Rows (of o and down: columns) of each rank."""
        axis = 1 if linear in ("o", "down") else 0
        return tuple(piece.shape[axis] for piece in self.pieces(linear, layer))

    def segments(self, linear: str, layer: int, owner: int) -> tuple[Segment, ...]:
        """Which rows of q, k, v or gate, up make up an owner's rows of qkv or gate_up."""
        split, dims = self.splits[layer], self.dims
        if linear == "qkv":
            first, count = sum(split.kv_heads[:owner]), split.kv_heads[owner]
            units = dims.num_kv_heads
        else:
            first, count = sum(split.mlp[:owner]), split.mlp[owner]
            units = dims.intermediate_size
        segments, at = [], 0
        for part, rows in dims.part_rows(linear).items():
            size = rows // units
            segments.append(Segment(part, (first * size, (first + count) * size), at))
            at += count * size
        return tuple(segments)

    @functools.cached_property
    def _laid_out(self) -> tuple[dict[tuple[str, int], tuple[Piece, ...]], tuple[int, ...]]:
        dims = self.dims
        table: dict[tuple[str, int], tuple[Piece, ...]] = {}
        ends = [0] * self.size

        def place(linear: str, layer: int, widths: Sequence[int], by_rows: bool) -> None:
            pieces, start = [], 0
            whole = dims.shape(linear)[1 if by_rows else 0]
            for owner, width in enumerate(widths):
                cut = (start, start + width)
                rows, cols = (cut, (0, whole)) if by_rows else ((0, whole), cut)
                piece = Piece(owner, ends[owner], rows, cols, dims.itemsize)
                ends[owner] += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
                pieces.append(piece)
                start += width
            assert start == dims.shape(linear)[0 if by_rows else 1]
            table[linear, layer] = tuple(pieces)

        group = dims.num_heads // dims.num_kv_heads * dims.head_dim
        for layer, split in enumerate(self.splits):
            place("qkv", layer, [k * (group + 2 * dims.head_dim) for k in split.kv_heads], True)
            place("o", layer, [k * group for k in split.kv_heads], False)
            place("gate_up", layer, [2 * width for width in split.mlp], True)
            place("down", layer, split.mlp, False)
        vocab = self.splits[0].vocab
        place("lm_head", 0, vocab, True)
        if not dims.tied:
            place("embedding", 0, vocab, True)
        return table, tuple(ends)

    @property
    def _table(self) -> dict[tuple[str, int], tuple[Piece, ...]]:
        return self._laid_out[0]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self._laid_out[1]


def deal(total: int, owners: int, unit: int = 1) -> list[int]:
    """``total`` in whole units over the owners, as evenly as it goes: within one unit of equal.

    Only the last share may hold a fraction of a unit; then the larger shares come last, so that the
    fraction shortens one of them.
    """
    count = -(-total // unit)
    base, extra = divmod(count, owners)
    short = count * unit - total
    larger = range(owners - extra, owners) if short else range(extra)
    shares = [(base + (i in larger)) * unit for i in range(owners)]
    if short:
        shares[-1] -= short
    return shares


def _fitting_unit(total: int, owners: int, unit: int) -> int:
    """The unit, halved until there is one for every owner; not below 8."""
    while unit > _SMALLEST_UNIT and -(-total // unit) < owners:
        unit //= 2
    return unit


def group_of(size: int, rank: int, replicas: int = 1) -> tuple[int, ...]:
    """The ranks that share one copy of the weights with ``rank``: ``size / replicas`` neighbours.

    Raises:
        ValueError: replicas does not divide size, or rank is none of 0..size-1.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is none of 0..{size - 1} ({size} ranks)")
    if replicas < 1 or size % replicas:
        fitting = ", ".join(str(k) for k in range(1, size + 1) if size % k == 0)
        raise ValueError(
            f"weight_replicas={replicas} does not divide {size} ranks into equal groups; give one "
            f"of {fitting}, or change data_parallel_size"
        )
    width = size // replicas
    first = rank // width * width
    return tuple(range(first, first + width))


def make_layout(
    dims: ModelDims,
    size: int,
    rank: int = 0,
    *,
    weight_layout: str = "shard",
    replicas: int = 1,
    param_ranks: Sequence[int] | None = None,
) -> Layout:
    """The layout of the pool group that ``rank`` belongs to.

    Args:
        dims: of the model.
        size: ranks of the world.
        weight_layout: "shard" cuts every linear over the owners; "layer" keeps each layer whole,
            layer i on owner ``i % owners``: neighbouring layers lie on different ranks, so a reader
            that prefetches several layers draws on several links, and the shares stay within one
            layer. lm_head and embedding are cut by vocabulary either way.
        replicas: copies of the weights; each is held by ``size / replicas`` neighbouring ranks.
        param_ranks: the ranks that hold weights; None: all.

    Raises:
        ValueError: the ranks cannot be grouped so, or an owner would hold nothing of the layers;
            gives the numbers and what to change.
    """
    ranks = group_of(size, rank, replicas)
    if param_ranks is None:
        param_ranks = range(size)
    elif not param_ranks or len(set(param_ranks)) != len(param_ranks):
        raise ValueError(f"param_ranks={list(param_ranks)} must name at least one rank, each once")
    outside = [other for other in param_ranks if not 0 <= other < size]
    if outside:
        raise ValueError(f"param_ranks has {outside[0]}, but the ranks are 0..{size - 1}")
    owners = [i for i, other in enumerate(ranks) if other in param_ranks]
    if not owners:
        raise ValueError(
            f"param_ranks={list(param_ranks)} leaves none of the ranks {ranks[0]}..{ranks[-1]} to "
            f"hold a copy of the weights; weight_replicas={replicas} needs an owner in each of its "
            f"{replicas} groups of {len(ranks)} ranks"
        )
    if dims.num_heads % dims.num_kv_heads:
        raise ValueError(
            f"{dims.num_heads} query heads do not divide into {dims.num_kv_heads} KV head groups; "
            "use weights='resident'"
        )

    def spread(shares: Sequence[int]) -> tuple[int, ...]:
        widths = [0] * len(ranks)
        for owner, share in zip(owners, shares, strict=True):
            widths[owner] = share
        return tuple(widths)

    n = len(owners)
    vocab = spread(deal(dims.vocab_size, n, _fitting_unit(dims.vocab_size, n, VOCAB_UNIT)))
    remedy = "hold the weights on fewer ranks (param_ranks), or raise weight_replicas"
    if weight_layout == "layer":
        if n > dims.num_layers:
            raise ValueError(
                f"weight_layout='layer' cannot deal {dims.num_layers} layers to {n} owners: "
                f"{n - dims.num_layers} would hold none; {remedy}"
            )
        splits = []
        for layer in range(dims.num_layers):
            holds = [int(i == layer % n) for i in range(n)]
            splits.append(
                ShardSplit(
                    kv_heads=spread([dims.num_kv_heads * h for h in holds]),
                    mlp=spread([dims.intermediate_size * h for h in holds]),
                    vocab=vocab,
                )
            )
        return Layout(dims, ranks, tuple(splits))
    if weight_layout != "shard":
        raise ValueError(f"weight_layout must be 'shard' or 'layer', got {weight_layout!r}")
    heads = deal(dims.num_kv_heads, n)
    unit = _fitting_unit(dims.intermediate_size, n, MLP_UNIT)
    columns = deal(dims.intermediate_size, n, unit)
    idle = sum(not a and not b for a, b in zip(heads, columns, strict=True))
    if idle:
        raise ValueError(
            f"{dims.num_kv_heads} KV head groups and {dims.intermediate_size} MLP columns (in "
            f"units of {unit}) cannot be dealt to {n} owners: {idle} would hold nothing; {remedy}"
        )
    split = ShardSplit(spread(heads), spread(columns), vocab)
    return Layout(dims, ranks, (split,) * dims.num_layers)
