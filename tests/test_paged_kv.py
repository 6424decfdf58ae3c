"""write_kv, gather_kv and copy_pages against plain torch, and every error they raise."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FLOAT8, INT8

from torch_pd import ops

MODEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
few = settings(max_examples=60, deadline=None)


@st.composite
def pools(draw, dtypes=(*MODEL_DTYPES, FLOAT8, INT8)):
    return {
        "num_pages": draw(st.integers(1, 6)),
        "num_layers": draw(st.integers(1, 3)),
        "block_size": draw(st.sampled_from([16, 32, 64])),
        "num_kv_heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([1, 2, 7, 16, 20, 64])),
        "dtype": draw(st.sampled_from(dtypes)),
        "generator": torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
    }


def model_dtype(pool, draw):
    return draw(st.sampled_from(MODEL_DTYPES)) if pool["dtype"] in (FLOAT8, INT8) else pool["dtype"]


def random_slots(pool, num_tokens, generator):
    """Distinct slots in random order, every fifth or so replaced by padding."""
    slots = torch.randperm(pool["num_pages"] * pool["block_size"], generator=generator)[:num_tokens]
    padding = torch.rand(slots.shape, generator=generator) < 0.2
    return slots.masked_fill(padding, -1)


@few
@given(st.data())
def test_write_kv_changes_its_slots_and_nothing_else(data):
    shape = data.draw(pools())
    generator = shape["generator"]
    dtype = model_dtype(shape, data.draw)
    pool = reference.make_pool(**shape)
    layer = data.draw(st.integers(0, shape["num_layers"] - 1))
    num_tokens = data.draw(st.integers(0, min(40, shape["num_pages"] * shape["block_size"])))
    slots = random_slots(shape, num_tokens, generator)
    # k and v as a model makes them: slices of one merged row, values over many magnitudes.
    heads, dim = shape["num_kv_heads"], shape["head_dim"]
    merged = torch.randn(num_tokens, 3, heads, dim, generator=generator)
    merged *= torch.logspace(-3, 3, heads)[:, None]
    merged = merged.to(dtype)
    k, v = merged[:, 1], merged[:, 2]
    if num_tokens:
        k[0] = 0
    expected = pool.clone()
    reference.ref_write_kv(k, v, expected, layer, slots)
    ops.write_kv(k, v, *pool.layer(layer), slots, **pool.scales(layer))
    assert torch.equal(pool.memory, expected.memory)


def test_write_kv_takes_k_and_v_of_different_width():
    k, v = torch.randn(3, 2, 24), torch.randn(3, 2, 16)
    k_cache, v_cache = torch.zeros(4, 16, 2, 24), torch.zeros(4, 16, 2, 16)
    slots = torch.tensor([63, -1, 17])
    ops.write_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache.view(64, 2, 24)[[63, 17]], k[[0, 2]])
    assert torch.equal(v_cache.view(64, 2, 16)[[63, 17]], v[[0, 2]])
    assert k_cache.count_nonzero() == 2 * 2 * 24
    assert v_cache.count_nonzero() == 2 * 2 * 16


def written(values, dtype):
    """What a cache of bytes holds of one head of so many values (16 at most), and its scale."""
    k = torch.zeros(1, 1, 16)
    k[0, 0, : len(values)] = torch.tensor(values)
    cache, scale = torch.zeros(2, 1, 16, 1, 16, dtype=dtype), torch.zeros(2, 1, 16, 1)
    slots = torch.tensor([5])
    ops.write_kv(k, k, cache[0], cache[1], slots, k_scale=scale[0], v_scale=scale[1])
    assert torch.equal(cache[0], cache[1])
    return reference.values_of(cache[0, 0, 5, 0, : len(values)]), scale[0, 0, 5, 0]


def test_write_kv_float8_rounds_ties_away_from_zero():
    """With 31 as the largest value the steps are 1, 1/2 and so on; below 1/2 they are 1/64."""
    values = [31, -31, 16.5, 17.5, -16.49, 1.03125, 1.03, 2**-7, -(2**-7), 0.0078, 0.375, 23.45]
    held, scale = written(values, FLOAT8)
    assert scale == 4096
    rounded = [31, -31, 17, 18, -16, 1.0625, 1, 2**-6, -(2**-6), 0, 0.375, 23]
    assert (held * scale).tolist() == rounded


def test_write_kv_int8_rounds_ties_to_even():
    held, scale = written([127.0, -127.0, 0.5, 1.5, -2.5, 3.4], INT8)
    assert scale == 1
    assert held.tolist() == [127, -127, 0, 2, -2, 3]


@pytest.mark.parametrize("dtype", [FLOAT8, INT8])
def test_write_kv_of_extreme_heads(dtype):
    """NaN and infinities make all of a head NaN, whatever else it holds; tiny ones become 0."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        held, scale = written([3.0, bad, 1.0, 0.0], dtype)
        assert (held * scale).isnan().all()
    held, scale = written([1e-44, 0.0, -1e-45], dtype)
    assert scale == 1
    assert not held.any()
    held, scale = written([1e30, -1e30], dtype)
    assert (held * scale).tolist() == pytest.approx([1e30, -1e30], rel=1e-6)


@st.composite
def batches(draw, pool, num_places=1):
    """block_tables [S, max_pages] and seq_lens [S]; unused entries hold ids of no page."""
    lengths = draw(st.lists(st.integers(0, 70), max_size=4))
    width = -(-max(lengths, default=0) // pool["block_size"]) + draw(st.integers(0, 2))
    tables = torch.full((len(lengths), width), -7, dtype=torch.int32)
    for i, length in enumerate(lengths):
        for j in range(-(-length // pool["block_size"])):
            place = draw(st.integers(0, num_places - 1))
            page = draw(st.integers(0, pool["num_pages"] - 1))
            tables[i, j] = place << ops.PLACE_SHIFT | page
    return tables, torch.tensor(lengths, dtype=torch.int32)


def starts_of(seq_lens):
    return torch.nn.functional.pad(seq_lens.cumsum(0), (1, 0)).to(torch.int32)


@few
@given(st.data())
def test_gather_kv_equals_plain_indexing(data):
    shape = data.draw(pools())
    dtype = model_dtype(shape, data.draw)
    places = [reference.make_pool(**shape) for _ in range(data.draw(st.integers(1, 3)))]
    layer = data.draw(st.integers(0, shape["num_layers"] - 1))
    tables, lengths = data.draw(batches(shape, len(places)))
    rows = torch.tensor([[p.memory.data_ptr(), shape["num_pages"]] for p in places])
    num_tokens = int(lengths.sum())
    # The outputs are a slice of something larger, whose rest must stay as it was.
    around = torch.full((num_tokens + 2, 2, shape["num_kv_heads"] + 1, shape["head_dim"] + 3), 7.0)
    around = around.to(dtype)
    k, v = around[1:-1, :, :-1, :-3].unbind(1)
    k.fill_(float("nan"))
    v.fill_(float("nan"))
    expected = around.clone()
    for out, gathered in zip(
        expected[1:-1, :, :-1, :-3].unbind(1),
        reference.ref_gather_kv(places, layer, tables, lengths),
        strict=True,
    ):
        out.copy_(gathered)
    pool = places[0]
    ops.gather_kv(
        *pool.layer(layer),
        tables,
        lengths,
        starts_of(lengths),
        k,
        v,
        **pool.scales(layer),
        places=rows if len(places) > 1 or data.draw(st.booleans()) else None,
    )
    assert torch.equal(around, expected)


@few
@given(st.data())
def test_a_written_sequence_is_gathered_back(data):
    shape = data.draw(pools(dtypes=MODEL_DTYPES))
    pool, block_size = reference.make_pool(**shape), shape["block_size"]
    length = data.draw(st.integers(1, shape["num_pages"] * block_size))
    order = torch.randperm(shape["num_pages"], generator=shape["generator"])
    positions = torch.arange(length)
    slots = order[positions // block_size] * block_size + positions % block_size
    k, v = torch.randn(2, length, shape["num_kv_heads"], shape["head_dim"]).to(shape["dtype"])
    ops.write_kv(k, v, *pool.layer(0), slots)
    out_k, out_v = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    lengths = torch.tensor([length], dtype=torch.int32)
    table = order[None].to(torch.int32)
    ops.gather_kv(*pool.layer(0), table, lengths, starts_of(lengths), out_k, out_v)
    assert torch.equal(out_k, k)
    assert torch.equal(out_v, v)


@few
@given(st.data())
def test_copy_pages_moves_whole_pages(data):
    shape = data.draw(pools())
    src, dst = reference.make_pool(**shape), reference.make_pool(**shape)
    pages = list(range(shape["num_pages"]))
    targets = data.draw(st.lists(st.sampled_from(pages), unique=True))
    moves = [(data.draw(st.sampled_from(pages)), target) for target in targets]
    expected = dst.memory.clone()
    for source, target in moves:
        expected[target] = src.memory[source]
    ops.copy_pages(src.memory, dst.memory, torch.tensor(moves, dtype=torch.int64).view(-1, 2))
    assert torch.equal(dst.memory, expected)


def test_copy_pages_within_one_pool_and_of_one_layer():
    pool = torch.randn(6, 3, 2, 5)
    before = pool.clone()
    ops.copy_pages(pool, pool, torch.tensor([[0, 4], [2, 5], [0, 1]]))
    assert torch.equal(pool, before[[0, 0, 2, 3, 0, 2]])
    # Layer 0 to layer 2 of other pages: strided pages that interleave in memory but never meet.
    before = pool.clone()
    ops.copy_pages(pool[:, 0], pool[:, 2], torch.tensor([[0, 0], [1, 5]]))
    before[[0, 5], 2] = before[[0, 1], 0]
    assert torch.equal(pool, before)


def test_copy_pages_larger_than_a_piece_with_a_rest():
    src = torch.randint(0, 255, (3, 300_001), dtype=torch.uint8)
    dst = torch.zeros(2, 300_001, dtype=torch.uint8)
    ops.copy_pages(src, dst, torch.tensor([[2, 0], [1, 1]]))
    assert torch.equal(dst, src[[2, 1]])


# --- errors: the message names the op and both values, and nothing is written ---


def write_arguments():
    pool = reference.make_pool(64, 1, 16, 2, 8, torch.float32)
    return {
        "k": torch.randn(4, 2, 8),
        "v": torch.randn(4, 2, 8),
        "k_cache": pool.layer(0)[0],
        "v_cache": pool.layer(0)[1],
        "slots": torch.tensor([3, -1, 900, 5]),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"slots": torch.tensor([0, 1, 2, 4096])},
            r"write_kv: slot 4096 at token 3 is outside the pool of 64 pages x 16 = 1024 slots",
        ),
        ({"slots": torch.tensor([0, 1, 2, 1024])}, "slot 1024 at token 3"),
        ({"slots": torch.tensor([0, -2, 2, 3])}, "slot -2 at token 1"),
        (
            {"slots": torch.tensor([9, 8, -1, 9])},
            "slot 9 is written by token 0 and by token 3",
        ),
        ({"slots": torch.tensor([5, 5, -1, -1])}, "slot 5 is written by token 0 and by token 1"),
        ({"slots": torch.zeros(4, dtype=torch.int32)}, "slots must be int64, got int32"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, r"slots size .* must be 4, got shape \[3\]"),
        ({"slots": torch.arange(8)[::2]}, "slots must be contiguous"),
        ({"k": torch.randn(4, 2, 9)}, r"k size of dimension 2 must be 8, got shape \[4, 2, 9\]"),
        ({"k": torch.randn(4, 3, 8)}, "k size of dimension 1 must be 2"),
        ({"v": torch.randn(5, 2, 8)}, "v size of dimension 0 must be 4"),
        ({"k": torch.randn(4, 2, 16)[..., ::2]}, "k must be contiguous in its last dimension"),
        ({"k": torch.randn(4, 16)}, "k must have 3 dimensions"),
        ({"k": torch.randn(4, 2, 8).bfloat16()}, "k is bfloat16 but k_cache is float32"),
        ({"k": torch.randn(4, 2, 8).double()}, "k must be float32, bfloat16 or float16"),
        ({"k_cache": torch.zeros(64, 10, 2, 8)}, "v_cache size of dimension 1 must be 10"),
        (
            {"k_cache": torch.zeros(1, 16, 2, 8).expand(64, 16, 2, 8)},
            "k_cache is written and must not be expanded",
        ),
        ({"v_cache": torch.zeros(63, 16, 2, 8)}, "v_cache size of dimension 0 must be 64"),
        ({"k_scale": torch.zeros(64, 16, 2)}, "not allowed for a float32 cache"),
    ],
)
def test_write_kv_errors(change, message):
    arguments = write_arguments()
    before = arguments["v_cache"].clone()
    with pytest.raises(RuntimeError, match=f"torch_pd::write_kv: .*{message.split(': ')[-1]}"):
        ops.write_kv(**(arguments | change))
    assert torch.equal(arguments["v_cache"], before)


def test_write_kv_block_size_and_scales_are_checked():
    cache = torch.zeros(4, 10, 2, 8)
    k = torch.zeros(1, 2, 8)
    slots = torch.tensor([0])
    with pytest.raises(RuntimeError, match="block_size must be 16, 32 or 64, got 10"):
        ops.write_kv(k, k, cache, cache.clone(), slots)
    cache = torch.zeros(4, 16, 2, 8, dtype=FLOAT8)
    with pytest.raises(RuntimeError, match="required for a uint8 cache"):
        ops.write_kv(k, k, cache, cache.clone(), slots)
    scale = torch.zeros(4, 16, 3)
    with pytest.raises(RuntimeError, match="k_scale size of dimension 2 must be 2"):
        ops.write_kv(k, k, cache, cache.clone(), slots, k_scale=scale, v_scale=scale)


def gather_arguments():
    pool = reference.make_pool(6, 2, 16, 2, 8, torch.float32)
    lengths = torch.tensor([20, 0, 5], dtype=torch.int32)
    return {
        "k_cache": pool.layer(1)[0],
        "v_cache": pool.layer(1)[1],
        "block_tables": torch.tensor([[5, 1], [-1, -1], [2, -1]], dtype=torch.int32),
        "seq_lens": lengths,
        "kv_start": starts_of(lengths),
        "k": torch.zeros(25, 2, 8),
        "v": torch.zeros(25, 2, 8),
    }


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD_GATHERS = {
    "sequence 2 has 33 tokens, its table holds 2 pages x 16 = 32": {"seq_lens": int32(20, 0, 33)},
    "sequence 0 has -1 tokens": {"seq_lens": int32(-1, 0, 5)},
    "entry 6 of sequence 0, page 1 names page 6 of place 0, which has 6": {
        "block_tables": int32([5, 6], [0, 0], [2, 0])
    },
    "sequence 2, page 0 names place 1, there are 1": {
        "block_tables": int32([5, 1], [0, 0], [1 << 28, 0])
    },
    "entry -1 of sequence 2, page 0 names place 15": {
        "block_tables": int32([5, 1], [0, 0], [-1, 0])
    },
    "kv_start of sequence 0 is 1, the lengths before it sum to 0": {
        "kv_start": int32(1, 20, 20, 25)
    },
    "kv_start of sequence 3 is 26, the lengths before it sum to 25": {
        "kv_start": int32(0, 20, 20, 26)
    },
    "k and v have 26 tokens, seq_lens sum to 25": {
        "k": torch.zeros(26, 2, 8),
        "v": torch.zeros(26, 2, 8),
    },
    "kv_start size of dimension 0 must be 4": {"kv_start": int32(0, 20, 20)},
    "seq_lens must be int32, got int64": {"seq_lens": torch.tensor([20, 0, 5])},
    "block_tables must have 2 dimensions": {"block_tables": int32(5, 1)},
    "v is float16 but k_cache is float32": {"v": torch.zeros(25, 2, 8).half()},
    "k is written and must not be expanded": {"k": torch.zeros(1, 2, 8).expand(25, 2, 8)},
    "places must be int64, got int32": {"places": int32([0, 6])},
    "places must have 1 to 8 rows, got 9": {"places": torch.ones(9, 2, dtype=torch.int64)},
    "row 0 of places has 5 pages, but k_cache has 6": {"places": torch.tensor([[1, 5]])},
    "outside its first page": {"places": torch.tensor([[64, 6]])},
}


@pytest.mark.parametrize("message", BAD_GATHERS)
def test_gather_kv_errors(message):
    arguments = gather_arguments() | BAD_GATHERS[message]
    with pytest.raises(RuntimeError, match=f"torch_pd::gather_kv: .*{message}"):
        ops.gather_kv(**arguments)
    assert arguments["k"].count_nonzero() == 0


@pytest.mark.parametrize("row", [[0, 4], [4096, -1]])
def test_gather_kv_refuses_a_place_without_memory(row):
    pool = reference.make_pool(6, 2, 16, 2, 8, torch.float32)
    arguments = gather_arguments()
    arguments["k_cache"], arguments["v_cache"] = pool.layer(1)
    arguments["places"] = torch.tensor([[pool.memory.data_ptr(), 6], row])
    with pytest.raises(RuntimeError, match=f"row 1 of places has address {row[0]} and {row[1]}"):
        ops.gather_kv(**arguments)


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ([[0, 8]], "move 0 writes page 8 of dst, which has 8"),
        ([[0, 1], [8, 2]], "move 1 reads page 8 of src, which has 8"),
        ([[-1, 2]], "move 0 reads page -1"),
        ([[2, -1]], "move 0 writes page -1"),
        ([[0, 3], [1, 2], [2, 3]], "page 3 of dst is written twice"),
    ],
)
def test_copy_pages_errors(moves, message):
    src, dst = torch.randn(2, 8, 4)
    before = dst.clone()
    with pytest.raises(RuntimeError, match=f"torch_pd::copy_pages: {message}"):
        ops.copy_pages(src, dst, torch.tensor(moves))
    assert torch.equal(dst, before)


def test_copy_pages_refuses_a_page_both_read_and_written():
    pool = torch.randn(8, 4)
    before = pool.clone()
    for moves in ([[0, 1], [1, 2]], [[3, 3]], [[5, 4], [6, 5]]):
        with pytest.raises(RuntimeError, match=r"move \d reads page \d of src, whose memory"):
            ops.copy_pages(pool, pool, torch.tensor(moves))
    # The same memory under other page numbers.
    with pytest.raises(RuntimeError, match="move 0 reads page 1 of src, whose memory is page 0"):
        ops.copy_pages(pool, pool[1:], torch.tensor([[1, 0]]))
    flat = pool.flatten()
    half = flat[2:].unfold(0, 4, 4)  # pages that straddle two of the pool's
    with pytest.raises(RuntimeError, match="whose memory is page"):
        ops.copy_pages(half, pool, torch.tensor([[0, 1]]))
    assert torch.equal(pool, before)


@pytest.mark.parametrize(
    ("src", "dst", "moves", "message"),
    [
        (torch.zeros(4, 6), torch.zeros(4, 7), [[0, 0]], "dst size of dimension 1 must be 6"),
        (
            torch.zeros(4, 6),
            torch.zeros(4, 6).half(),
            [[0, 0]],
            "dst is float16 but src is",
        ),
        (torch.zeros(4, 2, 6)[..., :3], torch.zeros(4, 2, 3), [[0, 0]], "pages must be contiguous"),
        (torch.zeros(4), torch.zeros(4), [[0, 0]], "src must have at least 2 dimensions"),
        (torch.zeros(4, 6), torch.zeros(4, 6), [[0, 0, 0]], "moves size of dimension 1 must be 2"),
        (torch.zeros(4, 6), torch.zeros(1, 6).expand(4, 6), [[0, 0]], "must not be expanded"),
        (
            torch.zeros(4, 6),
            torch.zeros(30).as_strided((4, 6), (3, 1)),
            [[0, 0]],
            "dst pages of 24 bytes overlap: their stride is 12",
        ),
    ],
)
def test_copy_pages_shape_errors(src, dst, moves, message):
    with pytest.raises(RuntimeError, match=f"torch_pd::copy_pages: .*{message}"):
        ops.copy_pages(src, dst, torch.tensor(moves))
