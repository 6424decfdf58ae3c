"""Layout and WeightPool: every byte owned once a replica, even shares, matrices rebuilt bitwise."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_pd.weights.layout import (
    ALIGNMENT,
    LINEARS,
    ModelDims,
    deal,
    group_of,
    make_layout,
)
from torch_pd.weights.pool import WeightPool

QWEN3_32B = ModelDims(64, 5120, 64, 8, 128, 25600, 151936, 2)
SMOLLM2 = ModelDims(30, 576, 9, 3, 64, 1536, 49152, 4, tied=True)
MATRICES = (*LINEARS, "lm_head", "embedding")


@st.composite
def dims(draw) -> ModelDims:
    kv_heads = draw(st.integers(1, 9))
    return ModelDims(
        num_layers=draw(st.integers(1, 9)),
        hidden_size=draw(st.sampled_from([8, 40, 64])),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 8, 12])),
        intermediate_size=draw(st.one_of(st.integers(64, 400), st.sampled_from([1024, 1536]))),
        vocab_size=draw(st.integers(8, 300)),
        itemsize=draw(st.sampled_from([2, 4])),
        tied=draw(st.booleans()),
    )


@st.composite
def layouts(draw):
    """All layouts of one world, one for each group."""
    model = draw(dims())
    replicas = draw(st.integers(1, 3))
    width = draw(st.integers(1, 8 // replicas))
    size = replicas * width
    kind = draw(st.sampled_from(["shard", "layer"]))
    owners = None
    if draw(st.booleans()):
        owners = [
            group * width + i
            for group in range(replicas)
            for i in draw(st.sets(st.integers(0, width - 1), min_size=1))
        ]
    if kind == "layer":
        model = dataclasses.replace(model, num_layers=max(model.num_layers, width))
    return [
        make_layout(
            model, size, g * width, weight_layout=kind, replicas=replicas, param_ranks=owners
        )
        for g in range(replicas)
    ]


@settings(deadline=None, max_examples=150)
@given(layouts())
def test_every_weight_is_owned_once_a_group(group_layouts):
    seen = [rank for layout in group_layouts for rank in layout.ranks]
    assert seen == list(range(len(seen)))
    for layout in group_layouts:
        model = layout.dims
        for layer, split in enumerate(layout.splits):
            assert sum(split.kv_heads) == model.num_kv_heads
            assert sum(split.mlp) == model.intermediate_size
            assert sum(split.vocab) == model.vocab_size
            for linear in MATRICES:
                count = torch.zeros(model.shape(linear), dtype=torch.int8)
                for piece in layout.pieces(linear, layer):
                    count[slice(*piece.rows), slice(*piece.cols)] += 1
                assert (count == 1).all()


@settings(deadline=None, max_examples=150)
@given(layouts())
def test_pieces_are_aligned_and_apart(group_layouts):
    for layout in group_layouts:
        names = [(linear, i) for i in range(layout.dims.num_layers) for linear in LINEARS]
        names += [("lm_head", 0)] if layout.dims.tied else [("lm_head", 0), ("embedding", 0)]
        for owner in range(layout.size):
            end = 0
            pieces = [layout.pieces(*name)[owner] for name in names]
            for piece in sorted((p for p in pieces if p.nbytes), key=lambda p: p.offset):
                assert piece.owner == owner
                assert piece.offset % ALIGNMENT == 0
                assert end <= piece.offset < end + ALIGNMENT
                end = piece.offset + piece.nbytes
            assert end <= layout.arena_bytes(owner) < end + ALIGNMENT


@given(st.integers(0, 5000), st.integers(1, 8), st.sampled_from([1, 8, 16, 128]))
def test_shares_are_within_one_unit_of_equal(total, owners, unit):
    shares = deal(total, owners, unit)
    assert sum(shares) == total
    assert len(shares) == owners
    assert max(shares) - min(shares) <= unit
    assert all(share % unit == 0 for share in shares[:-1])


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_matrices_are_rebuilt_bitwise(group_layouts):
    """Pools filled by segments and columns, put together again from the piece table."""
    for layout in group_layouts:
        model = layout.dims
        dtype = {2: torch.bfloat16, 4: torch.float32}[model.itemsize]
        pools = [WeightPool(layout, rank, dtype, "cpu") for rank in layout.ranks]
        for layer in range(model.num_layers):
            group = model.num_heads * model.head_dim
            kv = model.num_kv_heads * model.head_dim
            width, mlp = model.hidden_size, model.intermediate_size
            sizes = {"q": group, "k": kv, "v": kv, "gate": mlp, "up": mlp}
            parts = {name: torch.randn(rows, width).to(dtype) for name, rows in sizes.items()}
            o, down = torch.randn(width, group).to(dtype), torch.randn(width, mlp).to(dtype)
            for pool in pools:
                mine = pool.layers[layer]
                for linear, target in (("qkv", mine.qkv), ("gate_up", mine.gate_up)):
                    for segment in layout.segments(linear, layer, pool.index):
                        rows = parts[segment.part][slice(*segment.rows)]
                        target[segment.at : segment.at + len(rows)] = rows
                mine.o.copy_(o[:, slice(*layout.pieces("o", layer)[pool.index].cols)])
                mine.down.copy_(down[:, slice(*layout.pieces("down", layer)[pool.index].cols)])
            biases = {name: torch.arange(rows).to(dtype) for name, rows in sizes.items()}
            for pool in pools:
                pool.set_biases(
                    layer,
                    torch.cat([biases[name] for name in "qkv"]),
                    None,
                    torch.cat([biases["gate"], biases["up"]]),
                    None,
                )
            whole = {linear: rebuild(layout, pools, linear, layer) for linear in LINEARS}
            assert torch.equal(whole["o"], o)
            assert torch.equal(whole["down"], down)
            for linear, names in (("qkv", "qkv"), ("gate_up", ("gate", "up"))):
                at, blocks = 0, {name: [] for name in names}
                full = getattr(pools[0].layers[layer], f"full_{linear}_bias")
                bias = {name: [] for name in names}
                for owner in range(layout.size):
                    assert layout.pieces(linear, layer)[owner].rows[0] == at
                    for segment in layout.segments(linear, layer, owner):
                        rows = segment.rows[1] - segment.rows[0]
                        blocks[segment.part].append(whole[linear][at : at + rows])
                        bias[segment.part].append(full[at : at + rows])
                        at += rows
                    mine = getattr(pools[owner].layers[layer], f"{linear}_bias")
                    assert torch.equal(mine, full[slice(*layout.pieces(linear, layer)[owner].rows)])
                for name in names:
                    assert torch.equal(torch.cat(blocks[name]), parts[name])
                    assert torch.equal(torch.cat(bias[name]), biases[name])


def rebuild(layout, pools, linear, layer=0):
    """A whole matrix from the arenas, by the piece table alone."""
    whole = torch.empty(layout.dims.shape(linear), dtype=pools[0].dtype)
    for piece, pool in zip(layout.pieces(linear, layer), pools, strict=True):
        whole[slice(*piece.rows), slice(*piece.cols)] = pools[0].view(piece, pool.arena)
    return whole


def test_pool_views_lie_in_one_given_arena():
    sizes = []

    def allocate(nbytes):
        sizes.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    layout = make_layout(SMOLLM2, 4)
    pool = WeightPool(layout, 1, torch.float32, "cpu", allocate)
    assert sizes == [layout.arena_bytes(1)]
    assert pool.embedding is pool.lm_head
    pool.lm_head.fill_(1.0)
    pool.layers[29].down.fill_(2.0)
    piece = layout.pieces("down", 29)[1]
    assert (pool.view(piece) == 2.0).all()
    assert pool.lm_head.shape == (12288, 576)
    assert pool.layers[0].qkv.shape == (5 * 64, 576)
    empty = WeightPool(layout, 3, torch.float32, "cpu")
    assert empty.layers[0].qkv.shape == (0, 576)
    assert empty.layers[0].o.shape == (576, 0)
    assert empty.layers[0].gate_up.shape == (768, 576)


def test_known_models():
    split = make_layout(SMOLLM2, 4).splits[0]
    assert split.kv_heads == (1, 1, 1, 0)
    assert split.mlp == (384,) * 4
    layout = make_layout(QWEN3_32B, 4)
    assert layout.splits[0].kv_heads == (2,) * 4
    assert layout.widths("down") == (6400,) * 4
    assert len({layout.arena_bytes(owner) for owner in range(4)}) == 1
    total = sum(layout.arena_bytes(owner) for owner in range(4))
    assert total == 2 * (64 * 5120 * (2 * 8192 + 2048 + 3 * 25600) + 2 * 151936 * 5120)
    # Layers: whole, neighbours on different ranks.
    layout = make_layout(QWEN3_32B, 4, weight_layout="layer")
    assert [layout.widths("qkv", i).index(8192 + 2048) for i in range(5)] == [0, 1, 2, 3, 0]
    # Not all ranks hold weights, two replicas.
    layout = make_layout(QWEN3_32B, 8, 5, replicas=2, param_ranks=[0, 1, 6, 7])
    assert layout.ranks == (4, 5, 6, 7)
    assert layout.splits[0].mlp == (0, 0, 12800, 12800)
    assert layout.index(6) == 2


def test_mlp_boundaries():
    """Multiples of 128 while there are enough of them; small models use a smaller unit."""
    model = dataclasses.replace(SMOLLM2, intermediate_size=1500)
    assert make_layout(model, 5).splits[0].mlp == (256, 256, 256, 384, 348)
    model = dataclasses.replace(SMOLLM2, intermediate_size=72)
    assert make_layout(model, 4).splits[0].mlp == (16, 16, 16, 24)


@pytest.mark.parametrize(
    ("size", "rank", "options", "message"),
    [
        (4, 4, {}, "rank 4 is none of 0..3"),
        (4, 0, {"replicas": 3}, "weight_replicas=3 does not divide 4 ranks.* one of 1, 2, 4"),
        (4, 0, {"param_ranks": []}, "must name at least one rank"),
        (4, 0, {"param_ranks": [1, 1]}, "each once"),
        (4, 0, {"param_ranks": [1, 4]}, "param_ranks has 4, but the ranks are 0..3"),
        (
            4,
            0,
            {"param_ranks": [2, 3], "replicas": 2},
            "none of the ranks 0..1 to hold .* needs an owner in each of its 2 groups",
        ),
        (8, 0, {"weight_layout": "layer"}, "cannot deal 2 layers to 8 owners: 6 would hold none"),
        (8, 0, {"weight_layout": "row"}, "weight_layout must be 'shard' or 'layer', got 'row'"),
        (
            8,
            0,
            {},
            "2 KV head groups and 40 MLP columns .in units of 8. cannot be dealt to 8 owners: 3 "
            "would hold nothing; hold the weights on fewer ranks .param_ranks., or raise",
        ),
    ],
)
def test_errors(size, rank, options, message):
    model = ModelDims(2, 32, 4, 2, 8, 40, 97, 4)
    with pytest.raises(ValueError, match=message):
        make_layout(model, size, rank, **options)


def test_groups():
    assert group_of(6, 4, 2) == (3, 4, 5)
    assert group_of(6, 4, 6) == (4,)
    with pytest.raises(ValueError, match=re.escape("query heads do not divide into 4 KV head")):
        make_layout(ModelDims(2, 32, 6, 4, 8, 64, 97, 4), 2)
