"""CUDA bodies of write_kv, gather_kv and copy_pages against plain torch; the device error flag."""

import pytest
import reference
import torch
from device_pools import (
    DEVICE,
    DTYPES,
    FLOAT8,
    INT8,
    LAYER,
    assert_frame,
    error,
    few,
    framed,
    guarded,
    nan,
    on_device,
    pools,
    random_slots,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_pd import ops

pytestmark = pytest.mark.usefixtures("clean_flag")


@few
@given(st.data())
def test_write_kv_changes_its_slots_and_nothing_else(data):
    shape = data.draw(pools())
    generator, heads, dim = shape["generator"], shape["num_kv_heads"], shape["head_dim"]
    dtype = (
        data.draw(st.sampled_from(DTYPES)) if shape["dtype"] in (FLOAT8, INT8) else shape["dtype"]
    )
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


@pytest.mark.parametrize("dtype", [FLOAT8, INT8])
@pytest.mark.parametrize("dim", [64, 18])
def test_bytes_of_extreme_heads(dtype, dim):
    """NaN and infinities make all of a head NaN; tiny and large values are those of the CPU."""
    pool = on_device(reference.make_pool(2, 2, 16, 2, dim, dtype))
    k = torch.randn(6, 2, dim)
    k[0, 0, 3], k[1, 1, 5], k[2, 0, 0] = nan, torch.inf, -torch.inf
    k[3], k[4], k[5] = k[3] * 1e-44, k[4] * 1e30, k[5] * 1e-30
    expected = reference._pool_views(pool.memory.cpu(), pool.data.shape, dtype)
    slots = torch.arange(6)
    ops.write_kv(k.to(DEVICE), k.to(DEVICE), *pool.layer(0), slots.to(DEVICE), **pool.scales(0))
    ops.write_kv(k, k, *expected.layer(0), slots, **expected.scales(0))
    for found in (pool.layer(0)[0][0, :6], pool.layer(0)[1][0, :6]):
        assert torch.equal(found[3:].cpu(), expected.layer(0)[0][0, 3:6])
    bad = torch.zeros(6, 2, dtype=torch.bool)
    bad[0, 0] = bad[1, 1] = bad[2, 0] = True
    for name, scale in pool.scales(0).items():
        found, same = scale[0, :6].cpu(), expected.scales(0)[name][0, :6]
        held = reference.values_of(pool.layer(0)[0][0, :6].cpu()) * found[..., None]
        assert torch.equal(held.isnan().all(-1), bad)
        assert torch.equal(held.isnan().any(-1), bad)
        assert torch.equal(found[~bad], same[~bad])


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@few
@given(st.data())
def test_gather_kv_equals_plain_indexing(data):
    shape = data.draw(pools())
    dtype = (
        data.draw(st.sampled_from(DTYPES)) if shape["dtype"] in (FLOAT8, INT8) else shape["dtype"]
    )
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
