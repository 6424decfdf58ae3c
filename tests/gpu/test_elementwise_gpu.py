"""CUDA bodies of rms_norm, gated_act and rope_write_kv against plain torch; graphs."""

import pytest
import reference
import torch
from device_pools import (
    ACTIVATIONS,
    DEVICE,
    DTYPES,
    FLOAT8,
    INT8,
    LAYER,
    assert_frame,
    few,
    framed,
    generators,
    guarded,
    nan,
    on_device,
    random_slots,
    same_bytes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_pd import ops

pytestmark = pytest.mark.usefixtures("clean_flag")


# --- rms_norm, gated_act ---


@few
@given(
    generators(),
    st.sampled_from([0, 1, 5, 300]),
    st.sampled_from([1, 7, 8, 64, 520, 1024, 5120, 8200, 16384, 16392, 17001]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0, 8, 3]),
)
def test_rms_norm(generator, rows, width, dtype, with_residual, in_place, offset, pad):
    rows = rows if width < 6000 else min(rows, 5)
    size = torch.rand(rows, 1, generator=generator) * 20
    x = (torch.randn(rows, width, generator=generator) * size).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)
    residual = torch.randn(rows, width, generator=generator).to(dtype) if with_residual else None
    scale = 0.22 if with_residual else 1.0
    expected, new_residual = reference.ref_rms_norm(x, weight, 1e-5, residual, scale, offset)
    whole, out = framed(rows, width, dtype=dtype, pad=pad)
    given_x = out.copy_(x) if in_place else x.to(DEVICE)
    there = residual.to(DEVICE) if with_residual else None
    ops.rms_norm(given_x, weight.to(DEVICE), out, 1e-5, residual=there, scale=scale, offset=offset)
    if with_residual:
        # In one rounding or two, of terms that may cancel: float32 differs in their last bit.
        terms = residual.double().abs() + scale * x.double().abs()
        error = (there.cpu().double() - new_residual.double()).abs()
        assert (error <= terms * (torch.finfo(dtype).eps + 2e-7)).all()
        expected = reference.ref_rms_norm(there.cpu(), weight, 1e-5, offset=offset)[0]
    reference.assert_rounded(out.cpu(), expected)
    assert_frame(whole, out)


@few
@given(
    generators(),
    st.sampled_from([0, 1, 4, 33]),
    st.lists(st.sampled_from([0, 1, 6, 8, 40, 128, 1000, 2560]), min_size=1, max_size=6).filter(
        any
    ),
    st.sampled_from(DTYPES),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.sampled_from([0, 3, 8]),
)
def test_gated_act(generator, rows, widths, dtype, name, merged, pad):
    if not merged:
        widths = [sum(widths)]
    width = sum(widths)
    frame = (torch.randn(rows, 2 * width + 2 * pad, generator=generator) * 3).to(dtype)
    inside = slice(pad, 2 * width + pad)
    gate, up = reference.split_shards(frame[:, inside], [(w, w) for w in widths])
    whole, out = framed(rows, width, dtype=dtype, pad=pad)
    ops.gated_act(frame.to(DEVICE)[:, inside], out, name, shard_widths=widths if merged else None)
    # 16-bit values are made with the fast exponential.
    allowed = 2e-6 if dtype == torch.float32 else 1e-5
    expected = reference.ref_activation(gate, name) * up.double()
    reference.assert_rounded(out.cpu(), expected, allowed)
    assert_frame(whole, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_far_out(name, dtype):
    x = torch.linspace(-110, 110, 8192).to(dtype)[None]
    both = torch.cat([x, torch.ones_like(x)], 1).to(DEVICE)
    out = torch.full(x.shape, nan, dtype=dtype, device=DEVICE)
    ops.gated_act(both, out, name)
    expected = reference.ref_activation(x, name)
    step = torch.finfo(dtype).eps
    error = (out.cpu().double() - expected).abs()
    assert (error <= expected.abs() * max(step, 1e-5) + 1e-6).all()
    special = torch.tensor([[torch.inf, nan, 0.0, -0.0, 60000.0, -60000.0]]).to(dtype).to(DEVICE)
    out = torch.full_like(special, 5)
    ops.gated_act(torch.cat([special, torch.ones_like(special)], 1), out, name)
    values = out[0].tolist()
    assert values[0] == torch.inf
    assert values[1] != values[1]
    assert values[2:4] == [0, 0]
    assert values[4] == special[0, 4].item()
    assert values[5] == 0


# --- rope_write_kv ---


@st.composite
def rope_cases(draw):
    generator = draw(generators())
    cache_dtype = draw(st.sampled_from([*DTYPES, FLOAT8, INT8]))
    dtype = draw(st.sampled_from(DTYPES)) if cache_dtype in (FLOAT8, INT8) else cache_dtype
    shards = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    kv_heads, group = sum(shards), draw(st.sampled_from([1, 3, 8]))
    dim = draw(st.sampled_from([2, 6, 15, 16, 64, 80, 96, 128, 192, 256, 576]))
    heads = kv_heads * group
    # With many tokens a group of threads takes several heads.
    many = [1500] if (heads + 2 * kv_heads) * dim <= 2560 else []
    num_tokens = draw(st.sampled_from([0, 1, 6, 40, *many]))
    arguments = {
        "shard_heads": shards if draw(st.booleans()) else None,
        "eps": draw(st.sampled_from([1e-6, 1e-5])),
    }

    def normal(*size, dtype=dtype):
        return torch.randn(size, generator=generator).to(dtype)

    if draw(st.booleans()):
        width = draw(st.sampled_from([dim, dim // 2, 2, 32])) // 2 * 2
        width = max(2, min(width, dim // 2 * 2))
        rope_dtype = draw(st.sampled_from([torch.float32, dtype]))
        # Both halves differ: nothing may assume that Hugging Face repeats them.
        arguments |= {name: normal(num_tokens, width, dtype=rope_dtype) for name in ("cos", "sin")}
    norm = draw(st.sampled_from(["none", "head", "whole"]))
    if norm != "none":
        per_head = norm == "head"
        arguments["q_norm"] = normal(dim if per_head else heads * dim)
        arguments["k_norm"] = normal(dim if per_head else kv_heads * dim)
        arguments["norm_offset"] = draw(st.sampled_from([0.0, 1.0]))
    block = draw(st.sampled_from([16, 32]))
    pages = 5 if num_tokens < 100 else 100
    pool = reference.make_pool(pages, 2, block, kv_heads, dim, cache_dtype, generator)
    slots = random_slots(guarded(pool), num_tokens, generator)
    qkv = normal(num_tokens, (heads + 2 * kv_heads) * dim)
    pad = draw(st.sampled_from([0, 1, 8]))
    blocked = pad == 0 and arguments["shard_heads"] is not None and draw(st.booleans())
    return qkv, heads, kv_heads, pool, slots, pad, blocked, arguments


def to_device(arguments: dict) -> dict:
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}


@settings(max_examples=200, deadline=None)
@given(rope_cases())
def test_rope_write_kv(case):
    qkv, heads, kv_heads, whole, slots, pad, blocked, arguments = case
    before, pool = guarded(whole), guarded(on_device(whole))
    num_tokens, dim = len(slots), pool.data.shape[-1]
    expected_q, k, v = reference.ref_rope(qkv, heads, kv_heads, **arguments)
    frame, q = framed(num_tokens, heads, dim, dtype=qkv.dtype, pad=pad)
    row = torch.zeros(num_tokens, qkv.shape[1] + pad, dtype=qkv.dtype, device=DEVICE)
    row[:, pad:] = qkv.to(DEVICE)
    if blocked:
        widths = [n * (heads // kv_heads + 2) * dim for n in arguments["shard_heads"]]
        row.flatten().copy_(reference.ref_pack_shards(qkv, widths))
        arguments = arguments | {"blocked": True}
    ops.rope_write_kv(
        row[:, pad:],
        q,
        *pool.layer(LAYER),
        slots.to(DEVICE),
        **pool.scales(LAYER),
        **to_device(arguments),
    )
    reference.assert_rounded(q.cpu(), expected_q, 4e-6)
    assert_frame(frame, q)

    pool = guarded(reference._pool_views(pool.memory.cpu(), whole.data.shape, whole.data.dtype))
    reference.assert_rope_written(pool, before, LAYER, slots, k, v, qkv.dtype)


# --- pack_shards, unpack_shards ---


@few
@given(
    st.lists(st.sampled_from([0, 1, 3, 8, 64, 1024, 5000]), min_size=1, max_size=5),
    st.sampled_from([0, 1, 40, 300]),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 1, 8]),
)
def test_shards(widths, rows, dtype, pad):
    frame = torch.randn(rows, sum(widths) + 2 * pad).to(dtype).to(DEVICE)
    x = frame[:, pad : sum(widths) + pad]
    blocks = torch.full((2 + x.numel(),), nan, dtype=dtype, device=DEVICE)
    out = blocks[1:-1] if pad == 1 else torch.full_like(blocks[1:-1], nan)
    ops.pack_shards(x, out, widths)
    assert torch.equal(out.cpu(), reference.ref_pack_shards(x.cpu(), widths))
    assert blocks[[0, -1]].isnan().all()
    whole, back = framed(rows, sum(widths), dtype=dtype, pad=pad)
    ops.unpack_shards(out, back, widths)
    assert torch.equal(back, x)
    assert_frame(whole, back)


# --- graphs ---


def decode_step(tokens: int, generator: torch.Generator):
    """Inputs, outputs and a function of one layer's elementwise ops."""
    heads, kv_heads, dim, width = 8, 2, 128, 1024

    def normal(*size):
        return torch.randn(size, generator=generator).to(torch.bfloat16).to(DEVICE)

    pool = on_device(reference.make_pool(9, 2, 16, kv_heads, dim, torch.bfloat16, generator))
    x, residual, weight = normal(tokens, width), normal(tokens, width), normal(width)
    qkv, norm = normal(tokens, (heads + 2 * kv_heads) * dim), normal(dim)
    cos, sin = normal(2, tokens, dim)
    slots = torch.randperm(9 * 16, generator=generator)[:tokens].to(DEVICE)
    outs = [
        torch.full_like(x, nan),
        x.new_full((tokens, heads, dim), nan),
        x.new_full((tokens, width // 2), nan),
    ]

    def run():
        ops.rms_norm(x, weight, outs[0], 1e-6, residual=residual)
        ops.rope_write_kv(
            qkv, outs[1], *pool.layer(0), slots, cos=cos, sin=sin, q_norm=norm, k_norm=norm
        )
        ops.gated_act(x, outs[2], "silu")
        ops.write_kv(qkv.view(tokens, -1, dim)[:, :2], normal_v, *pool.layer(1), slots)

    normal_v = normal(tokens, kv_heads, dim)
    return run, [x, residual, qkv, slots], [*outs, residual, pool.memory]


def test_graph_replay_equals_eager_bitwise():
    generator = torch.Generator().manual_seed(0)
    run, inputs, outputs = decode_step(64, generator)
    first = [t.clone() for t in inputs], [t.clone() for t in outputs]
    run()
    expected = [t.clone() for t in outputs]

    def restore():
        for tensors, saved in zip((inputs, outputs), first, strict=True):
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)

    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(2):
        restore()
        graph.replay()
        torch.cuda.synchronize()
        for actual, want in zip(outputs, expected, strict=True):
            assert same_bytes(actual, want.cpu())


def test_rows_are_bitwise_independent():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 520, generator=generator).bfloat16().to(DEVICE)
    out, act = torch.full_like(x, nan), x.new_full((300, 260), nan)
    ops.rms_norm(x, x[0], out, 1e-6)
    ops.gated_act(x, act, "gelu_tanh")
    for row in (0, 7, 299):
        one = slice(row, row + 1)
        alone, alone_act = torch.full_like(out[one], nan), torch.full_like(act[one], nan)
        ops.rms_norm(x[one], x[0], alone, 1e-6)
        ops.gated_act(x[one], alone_act, "gelu_tanh")
        assert torch.equal(alone, out[one])
        assert torch.equal(alone_act, act[one])
