"""CUDA attention against the float64 reference: everything that no query may see is NaN."""

import math
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reference import (
    BYTES,
    FLOAT8,
    INT8,
    PLACE_SHIFT,
    as_bytes,
    poisoned,
    ref_paged_attention,
    relative_error,
    values_of,
)

from torch_pd import ops

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Relative to the largest value of the reference; bfloat16 has 8 bits, and p is rounded as well.
TOLERANCE = {BF16: 1e-2, F16: 2e-3, F32: 2e-5}
LAYERS, LAYER = 2, 1


@dataclass
class Place:
    """A pool of pages, all bytes 0xff (NaN in every dtype) where nothing was written."""

    memory: Tensor
    data: Tensor
    scales: Tensor | None


@dataclass
class Case:
    """Arguments of one call and what it should give."""

    args: dict
    expected: Tensor
    expected_lse: Tensor
    places: list[Place]
    keep: list = field(default_factory=list)

    def run(self) -> tuple[Tensor, Tensor]:
        """Runs into poisoned outputs."""
        self.args["out"].fill_(float("nan"))
        self.args["lse"].fill_(float("nan"))
        ops.paged_attention(**self.args)
        torch.cuda.synchronize()
        return self.args["out"].clone(), self.args["lse"].clone()

    def check(self) -> None:
        ops.device_errors("cuda")
        out, lse = self.run()
        assert ops.describe_errors(ops.device_errors("cuda").tolist()) is None
        assert relative_error(out.cpu(), self.expected) < TOLERANCE[out.dtype]
        torch.testing.assert_close(lse.cpu().double(), self.expected_lse, atol=2e-3, rtol=1e-4)


def make_place(pages: int, block: int, heads: int, dim: int, dtype: torch.dtype, pinned: bool):
    shape = (pages, LAYERS, 2, block, heads, dim)
    size = math.prod(shape[1:]) * dtype.itemsize
    total = size + (math.prod(shape[1:5]) * 4 if dtype in BYTES else 0)
    kwargs = {"pin_memory": True} if pinned else {"device": "cuda"}
    # A guard page before and after.
    memory = torch.empty(pages + 2, total, dtype=torch.uint8, **kwargs).fill_(0xFF)
    inside = memory[1:-1]
    data = inside[:, :size].view(dtype).unflatten(1, shape[1:])
    scales = inside[:, size:].view(F32).unflatten(1, shape[1:5]) if dtype in BYTES else None
    return Place(memory, data, scales)


def make_case(
    lens: list[int],
    queries: list[int],
    *,
    group: int = 4,
    kv_heads: int = 2,
    dim: int = 128,
    block: int = 16,
    dtype: torch.dtype = BF16,
    stored: torch.dtype | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: bool = False,
    pinned: bool = False,
    strided: bool = False,
    max_query_len: int | None = None,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    heads = group * kv_heads
    kv_dtype = stored or dtype
    need = [-(-n // block) for n in lens]
    pages = sum(need) + 2
    places = [make_place(pages, block, kv_heads, dim, kv_dtype, False)]
    if pinned:
        places.append(make_place(pages, block, kv_heads, dim, kv_dtype, True))
    free = [rng.sample(range(1, pages), pages - 1) for _ in places]
    tables = torch.zeros(len(lens), max(need, default=0) + 1, dtype=torch.int32)
    truth = [poisoned(2, pages, block, kv_heads, dim, dtype=torch.float64) for _ in places]
    for s, length in enumerate(lens):
        # Keys behind every window may be anything: they stay NaN.
        begin = max(0, length - queries[s] - window + 1) if window else 0
        for i in range(need[s]):
            where = rng.randrange(len(places))
            page = free[where].pop()
            tables[s, i] = where << PLACE_SHIFT | page
            low, high = max(0, begin - i * block), min(block, length - i * block)
            if low >= high:
                continue
            kv = torch.randn(2, high - low, kv_heads, dim, generator=generator)
            place = places[where]
            if stored is not None:
                scale = torch.exp(torch.randn(2, high - low, kv_heads, generator=generator))
                most = BYTES[stored]
                kv = as_bytes((kv * most / 7).clamp(-most, most), stored)
                place.scales[page, LAYER, :, low:high] = (scale / most * 7).to(place.scales.device)
                exact = values_of(kv).double() * (scale / most * 7).double()[..., None]
            else:
                kv = kv.to(dtype)
                exact = kv.double()
            place.data[page, LAYER, :, low:high] = kv.to(place.data.device)
            truth[where][:, page, low:high] = exact
    tokens = sum(queries)
    merged = torch.randn(tokens, heads + 2, dim, generator=generator).to(dtype)
    q = merged[:, :heads] if strided else merged[:, :heads].contiguous()
    query_start = torch.tensor([0, *queries]).cumsum(0).int()
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    sink_values = torch.randn(heads, generator=generator) if sinks else None
    scale = dim**-0.5 * 1.3
    # NaN of the reference's unseen keys must not leak through 0 * NaN.
    visible = [(t[0].nan_to_num(0.0), t[1].nan_to_num(0.0)) for t in truth]
    expected, expected_lse = ref_paged_attention(
        q, visible, tables, seq_lens, query_start, scale,
        window=window, soft_cap=soft_cap, sinks=sink_values,
    )  # fmt: skip
    device = q.cuda() if not strided else merged.cuda()[:, :heads]
    table = None
    if pinned:
        rows = [[p.data.data_ptr(), pages] for p in places]
        table = torch.tensor(rows, dtype=torch.int64).cuda()
    out = torch.empty(tokens, heads + 1, dim, dtype=dtype, device="cuda")[:, :heads]
    args = {
        "q": device,
        "k_cache": places[0].data[:, LAYER, 0],
        "v_cache": places[0].data[:, LAYER, 1],
        "block_tables": tables.cuda(),
        "seq_lens": seq_lens.cuda(),
        "query_start": query_start.cuda(),
        "out": out if strided else out.contiguous(),
        "scale": scale,
        "max_query_len": max_query_len or max(1, *queries),
        "window": window,
        "soft_cap": soft_cap,
        "sinks": None if sink_values is None else sink_values.cuda(),
        "k_scale": places[0].scales[:, LAYER, 0] if stored else None,
        "v_scale": places[0].scales[:, LAYER, 1] if stored else None,
        "places": table,
        "lse": torch.empty(tokens, heads, device="cuda"),
    }
    return Case(args, expected, expected_lse, places)


@st.composite
def cases(draw, most_queries: int, most_keys: int) -> dict:
    queries = draw(st.lists(st.integers(0, most_queries), min_size=1, max_size=9))
    if sum(queries) == 0:
        queries[0] = 1
    lens = [n + draw(st.integers(0, most_keys)) for n in queries]
    stored = draw(st.sampled_from([None, FLOAT8, INT8]))
    return {
        "lens": lens,
        "queries": queries,
        "group": draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 20])),
        "kv_heads": draw(st.sampled_from([1, 2, 3, 8])),
        "dim": draw(st.sampled_from([64, 80, 96, 128, 256])),
        "block": draw(st.sampled_from([16, 32, 64])),
        "dtype": draw(st.sampled_from([BF16, F16])),
        "stored": stored,
        "window": draw(st.sampled_from([0, 0, 1, 17, 64, 200])),
        "soft_cap": draw(st.sampled_from([0.0, 0.0, 5.0])),
        "sinks": draw(st.booleans()),
        "pinned": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=80, deadline=None)
@given(cases(4, 300))
def test_decode(case: dict) -> None:
    make_case(**case).check()


@settings(max_examples=60, deadline=None)
@given(cases(150, 100))
def test_prefill(case: dict) -> None:
    make_case(**case).check()


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("stored", [None, FLOAT8, INT8])
@pytest.mark.parametrize("most", [1, 2])
def test_decode_many_slices(dim: int, stored: torch.dtype | None, most: int) -> None:
    """Long and skewed: sequences that many slices share, others that none cuts."""
    lens = [6000, 1, 17, 900, 1500, 64, 16]
    queries = [1, 1, 1, most, 1, 1, 1]
    make_case(lens, queries, dim=dim, stored=stored, kv_heads=8, group=8).check()


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("stored", [None, FLOAT8, INT8])
@pytest.mark.parametrize(("group", "window"), [(8, 0), (5, 150), (12, 0)])
def test_decode_many_pieces(dim: int, stored: torch.dtype | None, group: int, window: int) -> None:
    """Warps that end one sequence and begin another, both shared with others."""
    lens = [120 + 37 * i % 500 for i in range(90)]
    features = {"group": group, "window": window, "dim": dim, "stored": stored}
    make_case(lens, [1] * len(lens), kv_heads=8, **features).check()


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("queries", [[700], [300, 1, 0, 129, 5], [128, 64, 16]])
@pytest.mark.parametrize("features", [{}, {"window": 100, "soft_cap": 8.0, "sinks": True}])
def test_prefill_long(dtype: torch.dtype, dim: int, queries: list[int], features: dict) -> None:
    lens = [n + 333 * (i % 2) + (n == 0) for i, n in enumerate(queries)]
    make_case(lens, queries, dim=dim, dtype=dtype, group=8, kv_heads=2, **features).check()


@pytest.mark.parametrize(("dtype", "stored"), [(BF16, FLOAT8), (F16, INT8)])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("queries", [[700], [300, 1, 0, 129, 5]])
@pytest.mark.parametrize("features", [{}, {"window": 100, "sinks": True, "pinned": True}])
def test_prefill_long_bytes(
    dtype: torch.dtype, stored: torch.dtype, dim: int, queries: list[int], features: dict
) -> None:
    lens = [n + 333 * (i % 2) + (n == 0) for i, n in enumerate(queries)]
    shape = {"dim": dim, "group": 8, "kv_heads": 2, "block": 32}
    make_case(lens, queries, dtype=dtype, stored=stored, **shape, **features).check()


@pytest.mark.parametrize("extra", [0, 1, 15, 16, 17, 127, 128, 129, 1000])
def test_prefill_context_offsets(extra: int) -> None:
    make_case([140 + extra, 16 + extra], [140, 16], group=5, kv_heads=2, block=32).check()


@pytest.mark.parametrize("dim", [8, 20, 64, 512])
def test_plain(dim: int) -> None:
    """float32, and widths that the tensor-core kernels do not have."""
    make_case([50, 3, 90], [7, 1, 40], dim=dim, dtype=F32, window=30, sinks=True).check()
    if dim != 64:
        make_case([50, 3, 90], [7, 1, 40], dim=dim, dtype=F16, soft_cap=3.0).check()
        make_case([50, 3, 90], [7, 1, 40], dim=dim, dtype=F32, stored=FLOAT8, pinned=True).check()


@pytest.mark.parametrize(
    ("lens", "queries"), [([3000, 70, 1], [1, 1, 1]), ([400, 90, 500], [200, 1, 3])]
)
@pytest.mark.parametrize("stored", [None, FLOAT8, INT8])
def test_graph_replay_equals_eager(
    lens: list[int], queries: list[int], stored: torch.dtype | None
) -> None:
    """Replays with other lengths in the same tensors, bit for bit what an eager call gives."""
    case = make_case(lens, queries, stored=stored, kv_heads=4)
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.paged_attention(**case.args)
    for cut in (0, 40):
        lengths = [max(n - cut, q) for n, q in zip(lens, queries, strict=True)]
        case.args["seq_lens"].copy_(torch.tensor(lengths))
        eager, eager_lse = case.run()
        for _ in range(2):
            case.args["out"].fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(case.args["out"], eager)
            assert torch.equal(case.args["lse"], eager_lse)
        again, _ = case.run()
        assert torch.equal(again, eager)


@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("entry", "message"),
    [(9999, "page"), (5 << PLACE_SHIFT, "place"), (-1, "place"), (1 << PLACE_SHIFT | 9999, "page")],
)
def test_bad_pages_are_dropped(queries: int, dtype: torch.dtype, entry: int, message: str) -> None:
    case = make_case([160, 200], [queries, queries], dtype=dtype, pinned=True, kv_heads=8)
    before = [p.memory.clone() for p in case.places]
    case.args["block_tables"][0, 3] = entry
    ops.device_errors("cuda")
    out, _ = case.run()
    text = ops.describe_errors(ops.device_errors("cuda").tolist())
    assert text is not None
    assert "paged_attention" in text
    assert message in text
    assert ops.describe_errors(ops.device_errors("cuda").tolist()) is None  # was reset
    assert out.isfinite().all()
    assert relative_error(out[queries:].cpu(), case.expected[queries:]) < TOLERANCE[dtype]
    for place, memory in zip(case.places, before, strict=True):
        assert torch.equal(place.memory, memory)


@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("length", [-1, 0, 1 << 30])
def test_bad_lengths_are_dropped(queries: int, dtype: torch.dtype, length: int) -> None:
    case = make_case([160, 200], [queries, queries], dtype=dtype)
    case.args["seq_lens"][0] = length
    ops.device_errors("cuda")
    out, _ = case.run()
    assert "paged_attention" in (ops.describe_errors(ops.device_errors("cuda").tolist()) or "")
    assert out[:queries].isnan().all()
    assert relative_error(out[queries:].cpu(), case.expected[queries:]) < TOLERANCE[dtype]


def test_bad_query_start_is_dropped() -> None:
    case = make_case([160, 200, 50], [1, 1, 1])
    case.args["query_start"].copy_(torch.tensor([0, 1, 2000, 3]))
    ops.device_errors("cuda")
    out, _ = case.run()
    assert "paged_attention" in (ops.describe_errors(ops.device_errors("cuda").tolist()) or "")
    assert relative_error(out[:1].cpu(), case.expected[:1]) < TOLERANCE[BF16]
    assert out[1:].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_merge(dtype: torch.dtype, dim: int) -> None:
    """Two halves of the keys, merged, are the whole; a side without keys carries no weight."""
    generator = torch.Generator().manual_seed(0)
    out, other = torch.randn(2, 37, 6, dim, generator=generator).to(dtype)
    lse, other_lse = torch.randn(2, 37, 6, generator=generator) * 3
    lse[3], other_lse[5], lse[7], other_lse[7] = (-torch.inf,) * 4
    out[3], other[5] = float("nan"), float("nan")
    weights = torch.softmax(torch.stack([lse, other_lse]).double(), 0).nan_to_num(0.0)
    expected = weights[0, ..., None] * out.double().nan_to_num(0.0) + weights[
        1, ..., None
    ] * other.double().nan_to_num(0.0)
    got, got_lse = out.cuda(), lse.cuda()
    ops.merge_attention(got, got_lse, other.cuda(), other_lse.cuda())
    assert relative_error(got.cpu(), expected) < TOLERANCE[dtype]
    torch.testing.assert_close(got_lse.cpu(), torch.logaddexp(lse, other_lse), atol=1e-5, rtol=1e-5)


def test_parts_merge_to_the_whole() -> None:
    """Queries against the first pages without causality's cut, then the rest: one result."""
    whole = make_case([300], [1], kv_heads=4)
    out, lse = whole.run()
    first = dict(whole.args, seq_lens=torch.tensor([160], dtype=torch.int32, device="cuda"))
    first["out"], first["lse"] = torch.empty_like(out), torch.empty_like(lse)
    ops.paged_attention(**first)
    rest = dict(
        whole.args,
        seq_lens=torch.tensor([140], dtype=torch.int32, device="cuda"),
        block_tables=whole.args["block_tables"][:, 10:].contiguous(),
    )
    rest["out"], rest["lse"] = torch.empty_like(out), torch.empty_like(lse)
    ops.paged_attention(**rest)
    ops.merge_attention(first["out"], first["lse"], rest["out"], rest["lse"])
    assert relative_error(first["out"].cpu(), whole.expected) < TOLERANCE[BF16]
    torch.testing.assert_close(first["lse"], lse, atol=1e-4, rtol=1e-5)


def test_many_sequences() -> None:
    """More sequences than a block has threads, most of them without work."""
    queries = [(i % 3 == 0) * 1 for i in range(1500)]
    lens = [1 + i % 40 for i in range(1500)]
    make_case(lens, queries, group=2, kv_heads=2, dim=64).check()
    queries = [(i % 7 == 0) * (i % 80) for i in range(1500)]
    lens = [max(q, 1) + i % 40 for i, q in enumerate(queries)]
    make_case(lens, queries, group=2, kv_heads=2, dim=64).check()


def test_errors() -> None:
    case = make_case([20], [1])
    with pytest.raises(RuntimeError, match=r"query_start is on cpu"):
        ops.paged_attention(**dict(case.args, query_start=case.args["query_start"].cpu()))
