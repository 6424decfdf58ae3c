"""CUDA bodies of the paged and elementwise ops against plain torch, and the device error flag."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reference

from torch_pd import ops

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = torch.float8_e4m3fn
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
LAYER = 1
nan = float("nan")
few = settings(max_examples=80, deadline=None)


@pytest.fixture(autouse=True)
def clean_flag():
    """Every test starts with a clean flag and, unless it reads it itself, leaves one."""
    ops.device_errors(DEVICE)
    yield
    assert error() is None


def error() -> str | None:
    """The message of the error flag, which is cleared."""
    return ops.describe_errors(ops.device_errors(DEVICE).tolist())


def generators():
    return st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


def framed(*shape: int, dtype: torch.dtype, pad: int) -> tuple[Tensor, Tensor]:
    """A tensor of 7 on the device and a view of it, poisoned with NaN: ``pad`` columns on both
    sides of the last dimension, a row before and one behind."""
    whole = torch.full((shape[0] + 2, *shape[1:-1], shape[-1] + 2 * pad), 7.0, device=DEVICE)
    whole = whole.to(dtype)
    inside = whole[1:-1, ..., pad : shape[-1] + pad]
    inside.fill_(nan)
    return whole, inside


def assert_frame(whole: Tensor, inside: Tensor) -> None:
    inside.fill_(7)
    assert torch.equal(whole, torch.full_like(whole, 7))


# --- pools ---


@st.composite
def pools(draw, dtypes=(*DTYPES, FLOAT8)):
    return {
        "num_pages": draw(st.integers(3, 7)),  # the first and the last are guards
        "num_layers": 2,
        "block_size": draw(st.sampled_from([16, 32, 64])),
        "num_kv_heads": draw(st.sampled_from([1, 2, 3, 8])),
        "head_dim": draw(st.sampled_from([1, 7, 16, 20, 64, 80, 128, 256])),
        "dtype": draw(st.sampled_from(dtypes)),
        "generator": draw(generators()),
    }


def on_device(pool: reference.Pool, pinned: bool = False) -> reference.Pool:
    """The same pool on the device (or in pinned memory)."""
    memory = pool.memory.pin_memory() if pinned else pool.memory.to(DEVICE)
    return reference._pool_views(memory, pool.data.shape, pool.data.dtype)


def guarded(pool: reference.Pool) -> reference.Pool:
    """The pool without its first and last page; ``memory`` still has them."""
    cut = slice(1, -1)
    if pool.k_scale is None:
        return reference.Pool(pool.memory, pool.data[cut], None, None)
    return reference.Pool(pool.memory, pool.data[cut], pool.k_scale[cut], pool.v_scale[cut])


def random_slots(pool: reference.Pool, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Distinct slots in random order, every fifth or so replaced by padding."""
    count = pool.data.shape[0] * pool.data.shape[3]
    slots = torch.randperm(count, generator=generator)[:num_tokens]
    return slots.masked_fill(torch.rand(slots.shape, generator=generator) < 0.2, -1)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8).cpu(), b.contiguous().view(torch.uint8))


@few
@given(st.data())
def test_write_kv_changes_its_slots_and_nothing_else(data):
    shape = data.draw(pools())
    generator, heads, dim = shape["generator"], shape["num_kv_heads"], shape["head_dim"]
    dtype = data.draw(st.sampled_from(DTYPES)) if shape["dtype"] == FLOAT8 else shape["dtype"]
    whole = reference.make_pool(**shape)
    expected, actual = guarded(whole), guarded(on_device(whole))
    slots = random_slots(expected, data.draw(st.integers(0, 70)), generator)
    # Slices of one merged row; `odd` moves them off every alignment.
    odd = data.draw(st.sampled_from([0, 1]))
    merged = torch.randn(len(slots), 3, heads, dim + odd, generator=generator)
    merged = (merged * torch.logspace(-3, 3, heads)[:, None]).to(dtype)[..., odd:]
    merged[:1] = 0
    k, v = merged.unbind(1)[1:]
    there = merged.new_empty(len(slots), 3, heads, dim + odd, device=DEVICE)[..., odd:]
    there.copy_(merged)
    reference.ref_write_kv(k, v, expected, LAYER, slots)
    ops.write_kv(
        *there.unbind(1)[1:], *actual.layer(LAYER), slots.to(DEVICE), **actual.scales(LAYER)
    )
    assert torch.equal(actual.memory.cpu(), expected.memory)


def test_k_and_v_of_different_width():
    k, v = torch.randn(3, 2, 24, device=DEVICE), torch.randn(3, 2, 16, device=DEVICE)
    k_cache = torch.zeros(4, 16, 2, 24, device=DEVICE)
    v_cache = torch.zeros(4, 16, 2, 16, device=DEVICE)
    ops.write_kv(k, v, k_cache, v_cache, torch.tensor([63, -1, 17], device=DEVICE))
    assert torch.equal(k_cache.view(64, 2, 24)[[63, 17]], k[[0, 2]])
    assert torch.equal(v_cache.view(64, 2, 16)[[63, 17]], v[[0, 2]])
    assert k_cache.count_nonzero() == 2 * 2 * 24
    assert v_cache.count_nonzero() == 2 * 2 * 16
    lengths = torch.tensor([18], dtype=torch.int32, device=DEVICE)
    tables = torch.tensor([[3, 1]], dtype=torch.int32, device=DEVICE)
    start = torch.tensor([0, 18], dtype=torch.int32, device=DEVICE)
    k_out = torch.full((18, 2, 24), nan, device=DEVICE)
    v_out = torch.full((18, 2, 16), nan, device=DEVICE)
    ops.gather_kv(k_cache, v_cache, tables, lengths, start, k_out, v_out)
    assert torch.equal(k_out[[15, 17]], k[[0, 2]])
    assert torch.equal(v_out[[15, 17]], v[[0, 2]])


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@few
@given(st.data())
def test_gather_kv_equals_plain_indexing(data):
    shape = data.draw(pools())
    dtype = data.draw(st.sampled_from(DTYPES)) if shape["dtype"] == FLOAT8 else shape["dtype"]
    num_places = data.draw(st.integers(1, 3))
    whole = [reference.make_pool(**shape) for _ in range(num_places)]
    # The last place is pinned host memory, read in place.
    there = [on_device(pool, 0 < i == num_places - 1) for i, pool in enumerate(whole)]
    places, actual = [guarded(pool) for pool in whole], [guarded(pool) for pool in there]
    pages, block = shape["num_pages"] - 2, shape["block_size"]
    lengths = data.draw(st.lists(st.integers(0, 100), max_size=40))
    width = -(-max(lengths, default=0) // block) + data.draw(st.integers(0, 2))
    tables = torch.full((len(lengths), width), -7, dtype=torch.int32)
    for i, length in enumerate(lengths):
        used = -(-length // block)
        place = torch.randint(num_places, (used,), generator=shape["generator"])
        page = torch.randint(pages, (used,), generator=shape["generator"])
        tables[i, :used] = (place << ops.PLACE_SHIFT | page).to(torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    rows = torch.tensor([[p.memory[1].data_ptr(), pages] for p in there], device=DEVICE)
    use_places = num_places > 1 or data.draw(st.booleans())
    pad = data.draw(st.sampled_from([0, 3, 8]))
    size = (sum(lengths), shape["num_kv_heads"], shape["head_dim"])
    outs = [framed(*size, dtype=dtype, pad=pad) for _ in range(2)]
    ops.gather_kv(
        *actual[0].layer(LAYER),
        tables.to(DEVICE),
        seq_lens.to(DEVICE),
        starts_of(lengths).to(DEVICE),
        outs[0][1],
        outs[1][1],
        **actual[0].scales(LAYER),
        places=rows if use_places else None,
    )
    expected = reference.ref_gather_kv(places, LAYER, tables, seq_lens)
    for (frame, out), want in zip(outs, expected, strict=True):
        assert torch.equal(out.cpu(), want.to(dtype))
        assert_frame(frame, out)


@few
@given(st.data())
def test_copy_pages_moves_whole_pages(data):
    shape = data.draw(pools())
    src, dst = reference.make_pool(**shape), reference.make_pool(**shape)
    there = [on_device(pool).memory for pool in (src, dst)]
    pages = list(range(shape["num_pages"] - 2))
    targets = data.draw(st.lists(st.sampled_from(pages), unique=True))
    moves = [(data.draw(st.sampled_from(pages)), target) for target in targets]
    for source, target in moves:
        dst.memory[target + 1] = src.memory[source + 1]
    table = torch.tensor(moves, dtype=torch.int64).view(-1, 2).to(DEVICE)
    ops.copy_pages(there[0][1:-1], there[1][1:-1], table)
    assert torch.equal(there[1].cpu(), dst.memory)


@pytest.mark.parametrize("size", [300_001, 1 << 22, (1 << 15) + 16])
def test_copy_pages_of_many_pieces_within_one_pool(size):
    pool = torch.randint(0, 255, (4, size), dtype=torch.uint8, device=DEVICE)
    before = pool.clone()
    ops.copy_pages(pool, pool, torch.tensor([[2, 0], [3, 1]], device=DEVICE))
    assert torch.equal(pool, before[[2, 3, 2, 3]])


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
        # residual + scale * x in one rounding or two: float32 differs in the last bit.
        reference.assert_rounded(there.cpu(), new_residual.double(), 2e-7)
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
    cache_dtype = draw(st.sampled_from([*DTYPES, FLOAT8]))
    dtype = draw(st.sampled_from(DTYPES)) if cache_dtype == FLOAT8 else cache_dtype
    shards = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    kv_heads, group = sum(shards), draw(st.sampled_from([1, 3, 8]))
    dim = draw(st.sampled_from([2, 6, 15, 16, 64, 80, 96, 128, 192, 256, 576]))
    heads, num_tokens = kv_heads * group, draw(st.sampled_from([0, 1, 6, 40]))
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
    pool = reference.make_pool(5, 2, block, kv_heads, dim, cache_dtype, generator)
    slots = random_slots(guarded(pool), num_tokens, generator)
    qkv = normal(num_tokens, (heads + 2 * kv_heads) * dim)
    return qkv, heads, kv_heads, pool, slots, draw(st.sampled_from([0, 1, 8])), arguments


def to_device(arguments: dict) -> dict:
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}


@settings(max_examples=200, deadline=None)
@given(rope_cases())
def test_rope_write_kv(case):
    qkv, heads, kv_heads, whole, slots, pad, arguments = case
    before, pool = guarded(whole), guarded(on_device(whole))
    num_tokens, dim = len(slots), pool.data.shape[-1]
    expected_q, k, v = reference.ref_rope(qkv, heads, kv_heads, **arguments)
    frame, q = framed(num_tokens, heads, dim, dtype=qkv.dtype, pad=pad)
    row = torch.zeros(num_tokens, qkv.shape[1] + pad, dtype=qkv.dtype, device=DEVICE)
    row[:, pad:] = qkv.to(DEVICE)
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
    written = slots >= 0
    page, token = slots[written] // pool.data.shape[3], slots[written] % pool.data.shape[3]
    k_cache, v_cache = pool.layer(LAYER)
    if pool.k_scale is None:
        reference.assert_rounded(k_cache[page, token], k[written], 4e-6)
        assert torch.equal(v_cache[page, token], v[written].to(qkv.dtype))
    else:
        v_bytes, v_scale = reference.quantize_e4m3(v[written])
        assert same_bytes(v_cache[page, token], v_bytes)
        assert torch.equal(pool.scales(LAYER)["v_scale"][page, token], v_scale)
        scale = pool.scales(LAYER)["k_scale"][page, token]
        largest = k[written].abs().amax(-1)
        assert ((scale - largest / 448).abs() <= scale * 1e-5).all()
        restored = k_cache[page, token].double() * scale[..., None]
        # Half a step of three mantissa bits, or of the smallest one.
        allowed = k[written].abs() * (2**-4 + 1e-5) + largest[..., None] * 2**-10 / 448 * 1.01
        allowed += largest[..., None] * 1e-5
        assert ((restored - k[written]).abs() <= allowed).all()
    # Everything else in the pool is as it was.
    for cache, old in zip(pool.layer(LAYER), before.layer(LAYER), strict=True):
        cache[page, token] = old[page, token]
    for name, scale in pool.scales(LAYER).items():
        scale[page, token] = before.scales(LAYER)[name][page, token]
    assert torch.equal(pool.memory, before.memory)


# --- the error flag: a bad index is reported and touches nothing ---


def test_bad_slots_are_dropped_and_reported():
    whole = reference.make_pool(5, 2, 16, 2, 64, torch.bfloat16)
    before, pool = whole.memory.clone(), guarded(on_device(whole))
    k = torch.randn(4, 2, 64, device=DEVICE).bfloat16()
    qkv, q = torch.randn(4, 6 * 64, device=DEVICE).bfloat16(), k.new_full((4, 2, 64), nan)
    bad = torch.tensor([3 * 16, -2, 1 << 40, -(1 << 40)], device=DEVICE)
    ops.write_kv(k, k, *pool.layer(0), bad)
    message = error()
    assert message.startswith("torch_pd::write_kv on the device: a slot outside the pool: ")
    assert message.endswith(" (and 3 more errors)")
    ops.rope_write_kv(qkv, q, *pool.layer(0), bad)
    assert "rope_write_kv on the device: a slot outside the pool" in error()
    assert torch.equal(q.flatten(1), qkv[:, :128])
    assert torch.equal(pool.memory.cpu(), before)
    # The good ones beside a bad one are written.
    slots = torch.tensor([47, 48, 0, -1], device=DEVICE)
    ops.write_kv(k, k, *pool.layer(0), slots)
    assert error() == "torch_pd::write_kv on the device: a slot outside the pool: 48"
    assert torch.equal(pool.layer(0)[0][2, 15], k[0])
    assert torch.equal(pool.layer(0)[1][0, 0], k[2])


def test_bad_slots_of_a_float8_cache():
    whole = reference.make_pool(5, 2, 16, 2, 64, FLOAT8)
    before, pool = whole.memory.clone(), guarded(on_device(whole))
    k = torch.randn(2, 2, 64, device=DEVICE)
    slots = torch.tensor([48, -7], device=DEVICE)
    ops.write_kv(k, k, *pool.layer(0), slots, **pool.scales(0))
    assert "a slot outside the pool" in error()
    assert torch.equal(pool.memory.cpu(), before)


BAD_GATHERS = {
    "a block table entry of a page beyond its pool: 3": {"block_tables": [[2, 3], [0, 0]]},
    f"place beyond the table of places: {1 << 28}": {"block_tables": [[2, 1], [1 << 28, 0]]},
    "place beyond the table of places: -1": {"block_tables": [[2, 1], [-1, 0]]},
    "a length or start outside its tables or tensors: 40": {"seq_lens": [40, 5]},
    "a length or start outside its tables or tensors: -1": {"seq_lens": [20, -1]},
    "a length or start outside its tables or tensors: 5": {"kv_start": [0, 5, 25]},
}


@pytest.mark.parametrize("message", BAD_GATHERS)
def test_bad_gathers_are_dropped_and_reported(message):
    whole = reference.make_pool(5, 2, 16, 2, 64, torch.float32)
    pool = guarded(on_device(whole))
    good = {"block_tables": [[2, 1], [0, 0]], "seq_lens": [20, 5], "kv_start": [0, 20, 25]}
    bad = good | BAD_GATHERS[message]
    if message.endswith("40"):  # beyond the table, though not beyond the output
        bad["kv_start"] = [0, 40, 45]
    num_tokens = bad["kv_start"][-1]
    there = {k: torch.tensor(v, dtype=torch.int32, device=DEVICE) for k, v in bad.items()}
    k, v = torch.full((2, num_tokens, 2, 64), nan, device=DEVICE)
    ops.gather_kv(*pool.layer(0), **there, k=k, v=v)
    assert message in error()
    dropped = k.isnan().flatten(1).all(1)
    assert dropped.any()
    assert not k[~dropped].isnan().any()
    assert torch.equal(v.isnan(), k.isnan())


def test_bad_moves_are_dropped_and_reported():
    pool = torch.randint(0, 255, (6, 4096), dtype=torch.uint8, device=DEVICE)
    before = pool.clone()
    for row in ([4, 0], [0, 4], [-1, 0], [0, -1], [1 << 60, 0]):
        ops.copy_pages(pool[1:-1], pool[1:-1], torch.tensor([row], device=DEVICE))
        wrong = next(page for page in row if page != 0)
        assert error() == (
            "torch_pd::copy_pages on the device: a move from or to a page outside its pool: "
            f"{wrong}"
        )
    assert torch.equal(pool, before)


def test_flag_keeps_the_first_error_until_it_is_reset():
    pool = torch.zeros(4, 64, dtype=torch.uint8, device=DEVICE)
    for page in (9, 8):
        ops.copy_pages(pool, pool, torch.tensor([[page, 0]], device=DEVICE))
    row = ops.device_errors(DEVICE, reset=False).tolist()
    assert ops.device_errors(DEVICE, reset=True).tolist() == row
    assert row[0] == 2
    assert row[2:] == [9, 0]
    assert ops.device_errors(DEVICE).tolist() == [0, 0, 0, 0]


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
