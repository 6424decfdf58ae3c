"""rope_write_kv against plain torch in float64 and against Hugging Face, and its errors."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FLOAT8, INT8

from torch_pd import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
nan = float("nan")


@st.composite
def rope_cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    cache_dtype = draw(st.sampled_from([*DTYPES, FLOAT8, INT8]))
    dtype = draw(st.sampled_from(DTYPES)) if cache_dtype in (FLOAT8, INT8) else cache_dtype
    shards = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4).filter(any))
    kv_heads, group = sum(shards), draw(st.integers(1, 3))
    heads, dim = kv_heads * group, draw(st.sampled_from([2, 6, 16, 20, 64]))
    num_tokens = draw(st.integers(0, 6))
    arguments = {
        "shard_heads": shards if draw(st.booleans()) else None,
        "eps": draw(st.sampled_from([1e-6, 1e-5])),
    }

    def normal(*size, dtype=dtype):
        return torch.randn(size, generator=generator).to(dtype)

    if draw(st.booleans()):
        width = draw(st.integers(1, dim // 2)) * 2
        rope_dtype = draw(st.sampled_from([torch.float32, dtype]))
        # Both halves differ: nothing may assume that Hugging Face repeats them.
        arguments |= {name: normal(num_tokens, width, dtype=rope_dtype) for name in ("cos", "sin")}
    norm = draw(st.sampled_from(["none", "head", "whole"]))
    if norm != "none":
        per_head = norm == "head"
        arguments["q_norm"] = normal(dim if per_head else heads * dim)
        arguments["k_norm"] = normal(dim if per_head else kv_heads * dim)
        arguments["norm_offset"] = draw(st.sampled_from([0.0, 1.0]))
    pool = reference.make_pool(
        draw(st.integers(1, 4)), 2, draw(st.sampled_from([16, 32])), kv_heads, dim, cache_dtype,
        generator,
    )  # fmt: skip
    num_slots = pool.data.shape[0] * pool.data.shape[3]
    slots = torch.randperm(num_slots, generator=generator)[:num_tokens]
    slots[torch.rand(slots.shape, generator=generator) < 0.2] = -1
    qkv = normal(num_tokens, (heads + 2 * kv_heads) * dim + 4)[:, 2:-2]
    blocked = arguments["shard_heads"] is not None and draw(st.booleans())
    return qkv, heads, kv_heads, pool, slots, blocked, arguments


@settings(max_examples=150, deadline=None)
@given(rope_cases())
def test_rope_write_kv(case):
    qkv, heads, kv_heads, pool, slots, blocked, arguments = case
    num_tokens, dim = len(slots), pool.data.shape[-1]
    expected_q, k, v = reference.ref_rope(qkv, heads, kv_heads, **arguments)
    if blocked:
        widths = [n * (heads // kv_heads + 2) * dim for n in arguments["shard_heads"]]
        qkv = reference.ref_pack_shards(qkv, widths).view(qkv.shape)
        arguments = arguments | {"blocked": True}
    before = pool.clone()
    whole = torch.full((num_tokens + 2, heads + 1, dim + 3), 7.0).to(qkv.dtype)
    q = whole[1:-1, :-1, :-3]
    q.fill_(nan)
    layer = 1
    ops.rope_write_kv(qkv, q, *pool.layer(layer), slots, **pool.scales(layer), **arguments)
    reference.assert_rounded(q, expected_q, 4e-6)
    q.fill_(7)
    assert torch.equal(whole, torch.full_like(whole, 7))
    reference.assert_rope_written(pool, before, layer, slots, k, v, qkv.dtype)


def test_rope_equals_hugging_face():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    num_tokens, heads, kv_heads, dim = 5, 4, 2, 16
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * dim)
    angles = torch.arange(num_tokens)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
    q, k, _ = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    q, k = (x.view(1, num_tokens, -1, dim).transpose(1, 2) for x in (q, k))
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    out = torch.full((num_tokens, heads, dim), nan)
    caches = torch.zeros(2, 1, 16, kv_heads, dim)
    ops.rope_write_kv(qkv, out, *caches, torch.arange(num_tokens), cos=cos, sin=sin)
    torch.testing.assert_close(out, expected_q[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
    written = caches[0, 0, :num_tokens]
    torch.testing.assert_close(written, expected_k[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def rope_arguments():
    pool = reference.make_pool(4, 1, 16, 2, 8, torch.float32)
    return {
        "qkv": torch.randn(3, 64),
        "q": torch.full((3, 4, 8), nan),
        "k_cache": pool.layer(0)[0],
        "v_cache": pool.layer(0)[1],
        "slots": torch.tensor([5, -1, 63]),
        "cos": torch.randn(3, 8),
        "sin": torch.randn(3, 8),
        "q_norm": torch.ones(8),
        "k_norm": torch.ones(8),
        "shard_heads": [1, 0, 1],
    }


BAD_ROPES = {
    "slot 64 at token 2 is outside the pool of 4 pages x 16 = 64 slots": {
        "slots": torch.tensor([0, 1, 64])
    },
    "slot 7 is written by token 1 and by token 2": {"slots": torch.tensor([9, 7, 7])},
    r"qkv size of dimension 1 must be 64, got shape \[3, 63\]": {"qkv": torch.randn(3, 63)},
    "q has head_dim 4 but the cache has 8 and 8": {"q": torch.zeros(3, 4, 4)},
    "3 query heads are not a multiple of 2 KV heads": {"q": torch.zeros(3, 3, 8)},
    "q is float16 but qkv is float32": {"q": torch.zeros(3, 4, 8).half()},
    "q is written and must not be expanded": {"q": torch.zeros(1, 4, 8).expand(3, 4, 8)},
    "cos and sin must be given together": {"sin": None},
    "at most head_dim 8 wide, got 7": {"cos": torch.ones(3, 7), "sin": torch.ones(3, 7)},
    "at most head_dim 8 wide, got 10": {"cos": torch.ones(3, 10), "sin": torch.ones(3, 10)},
    "sin size of dimension 1 must be 8": {"sin": torch.ones(3, 6)},
    "cos is bfloat16 but qkv is float32": {
        "cos": torch.ones(3, 8).bfloat16(),
        "sin": torch.ones(3, 8).bfloat16(),
    },
    "q_norm and k_norm go together": {"k_norm": None},
    "q_norm must have 8 or 32 elements, got 16": {"q_norm": torch.ones(16)},
    "one is per head, the other over all heads": {"q_norm": torch.ones(32)},
    "shard_heads has 2 shards that sum to 3, the cache has 2": {"shard_heads": [1, 2]},
    "shard_heads must not be negative, got -1": {"shard_heads": [3, -1]},
    "blocked needs shard_heads": {"blocked": True, "shard_heads": None},
    "qkv must be contiguous": {"blocked": True, "qkv": torch.randn(3, 66)[:, 2:]},
    "slots must be int64, got int32": {"slots": torch.zeros(3, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", BAD_ROPES)
def test_rope_write_kv_errors(message):
    arguments = rope_arguments()
    ops.rope_write_kv(**arguments)
    before = arguments["k_cache"].clone()
    with pytest.raises(RuntimeError, match=f"torch_pd::rope_write_kv: .*{message}"):
        ops.rope_write_kv(**(arguments | BAD_ROPES[message]))
    assert torch.equal(arguments["k_cache"], before)
