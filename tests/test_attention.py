"""paged_attention and merge_attention: values, independence of batch and chunks, errors."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    BYTES,
    FLOAT8,
    INT8,
    PLACE_SHIFT,
    TOLERANCE,
    as_bytes,
    poisoned,
    ref_paged_attention,
    relative_error,
    values_of,
)
from torch import Tensor

from torch_pd import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclasses.dataclass
class Pool:
    """One place: pages [P, L, 2, B, Hkv, D] of two layers, of which layer 1 is used.

    Every slot that holds no token of the test is NaN (or infinity), in K and in V.
    """

    pages: Tensor
    scales: Tensor | None  # of bytes: [P, L, 2, B, Hkv]
    free: list[int]

    def views(self) -> tuple[Tensor, ...]:
        return self.pages[:, 1, 0], self.pages[:, 1, 1]

    def scale_views(self) -> dict[str, Tensor]:
        if self.scales is None:
            return {}
        return {"k_scale": self.scales[:, 1, 0], "v_scale": self.scales[:, 1, 1]}

    def values(self) -> tuple[Tensor, Tensor]:
        """K and V as the op must read them, without bytes."""
        k, v = self.views()
        if self.scales is None:
            return k, v
        scales = self.scale_views()
        return (
            values_of(k).double() * scales["k_scale"][..., None],
            values_of(v).double() * scales["v_scale"][..., None],
        )


def make_pool(num_pages: int, block_size: int, kv_heads: int, dim: int, dtype) -> Pool:
    """Pages of bytes carry their scales behind their values."""
    poison = torch.tensor([float("nan"), float("inf"), -float("inf")])
    shape = (2, 2, block_size, kv_heads, dim)
    if dtype not in BYTES:
        values = poison[torch.randint(0, 3, (num_pages, *shape))].to(dtype)
        return Pool(values, None, torch.randperm(num_pages).tolist())
    size = math.prod(shape)
    raw = torch.randint(0, 256, (num_pages, size + 4 * size // dim), dtype=torch.uint8)
    pages = raw[:, :size].view(dtype).unflatten(1, shape)
    scales = raw[:, size:].view(torch.float32).unflatten(1, shape[:-1])
    scales.fill_(torch.nan)
    return Pool(pages, scales, torch.randperm(num_pages).tolist())


@dataclasses.dataclass
class Case:
    q: Tensor
    pools: list[Pool]
    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    scale: float
    options: dict

    def op_options(self) -> dict:
        places = {}
        if len(self.pools) > 1:
            rows = [[pool.pages.data_ptr(), len(pool.pages)] for pool in self.pools]
            places["places"] = torch.tensor(rows)
        return self.options | self.pools[0].scale_views() | places

    def run(self, q=None, seq_lens=None, query_start=None, rows=None, **changes):
        """out and lse; other queries, or other sequences (rows of the tables), on request."""
        q = self.q if q is None else q
        seq_lens = self.seq_lens if seq_lens is None else seq_lens
        query_start = self.query_start if query_start is None else query_start
        tables = self.block_tables if rows is None else self.block_tables[rows]
        k, v = self.pools[0].views()
        out = poisoned(*q.shape[:2], v.shape[3], dtype=q.dtype)
        lse = poisoned(*q.shape[:2])
        longest = max([1, *query_start.diff().tolist()])
        ops.paged_attention(
            q,
            k,
            v,
            tables,
            seq_lens,
            query_start,
            out,
            self.scale,
            longest,
            lse=lse,
            **(self.op_options() | changes),
        )
        return out, lse

    def reference(self):
        caches = [pool.values() for pool in self.pools]
        return ref_paged_attention(
            self.q,
            caches,
            self.block_tables,
            self.seq_lens,
            self.query_start,
            self.scale,
            **self.options,
        )


def ints(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_case(
    lengths: list[tuple[int, int]],
    *,
    dtype=torch.float32,
    cache_dtype=None,
    kv_heads=2,
    group=3,
    dim=16,
    block_size=16,
    window=0,
    soft_cap=0.0,
    sinks=False,
    num_places=1,
    shared=0,
) -> Case:
    """Sequences of (tokens, queries). ``shared``: sequences longer than this many tokens have the
    pages of those tokens in common, as a cached prefix would be."""
    cache_dtype = cache_dtype or dtype
    shared_pages = shared // block_size
    pages = sum(-(-n // block_size) for n, _ in lengths) + shared_pages + 3
    pools = [make_pool(pages, block_size, kv_heads, dim, cache_dtype) for _ in range(num_places)]

    def take() -> int:
        place = int(torch.randint(0, num_places, ()))
        return place << PLACE_SHIFT | pools[place].free.pop()

    prefix = [take() for _ in range(shared_pages)]
    max_pages = max([-(-n // block_size) for n, _ in lengths], default=0) + 2
    # Entries behind a sequence's last page are never looked at.
    block_tables = torch.full((len(lengths), max_pages), -1, dtype=torch.int32)
    for s, (length, queries) in enumerate(lengths):
        first = length - queries
        for i in range(-(-length // block_size)):
            common = i < shared_pages and length >= shared_pages * block_size
            entry = prefix[i] if common else take()
            block_tables[s, i] = entry
            pool = pools[entry >> PLACE_SHIFT]
            page = entry & ((1 << PLACE_SHIFT) - 1)
            used = min(block_size, length - i * block_size)
            # Pages wholly behind the first query's window may hold anything by now.
            behind = window and first - window + 1 >= (i + 1) * block_size and not common
            if behind:
                continue
            values = torch.randn(2, used, kv_heads, dim)
            if pool.scales is not None:
                top = values.abs().amax(-1).clamp_min(1e-6) / BYTES[cache_dtype]
                pool.scales[page, 1, :, :used] = top
                values = as_bytes(values / top[..., None], cache_dtype)
            pool.pages[page, 1, :, :used] = values
    query_start = ints(
        [0, *torch.tensor([q for _, q in lengths] or [0]).cumsum(0)][: len(lengths) + 1]
    )
    total = int(query_start[-1])
    options = {"window": window, "soft_cap": soft_cap}
    if sinks:
        options["sinks"] = torch.randn(kv_heads * group)
    return Case(
        torch.randn(total, kv_heads * group, dim).to(dtype),
        pools,
        block_tables,
        ints([n for n, _ in lengths]),
        query_start,
        dim**-0.5 * 2,
        options,
    )


def check(case: Case) -> None:
    out, lse = case.run()
    expected, expected_lse = case.reference()
    assert relative_error(out, expected) < TOLERANCE[case.q.dtype]
    assert relative_error(lse, expected_lse) < 1e-5


lengths = st.lists(
    st.tuples(st.integers(0, 150), st.integers(0, 40), st.booleans()).map(
        lambda x: (x[0], min(x[0], 1 if x[2] else x[1]))
    ),
    min_size=0,
    max_size=5,
)


@settings(deadline=None, max_examples=80)
@given(
    lengths=lengths,
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from([None, FLOAT8, INT8]),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12]),
    dim=st.sampled_from([8, 12, 16, 40, 64, 80, 96, 128, 256]),
    block_size=st.sampled_from([16, 32, 64]),
    window=st.sampled_from([0, 0, 1, 5, 40]),
    soft_cap=st.sampled_from([0.0, 0.0, 3.0]),
    sinks=st.booleans(),
    num_places=st.sampled_from([1, 1, 3]),
    shared=st.sampled_from([0, 32, 64]),
    seed=st.integers(0, 2**31),
)
def test_values(lengths, dtype, stored, seed, **options):
    torch.manual_seed(seed)
    check(make_case(lengths, dtype=dtype, cache_dtype=stored or dtype, **options))


@pytest.mark.parametrize("queries", [1, 4, 130])
@pytest.mark.parametrize("window", [0, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts(queries, window, dtype):
    """Several splits, alone in the batch (splits on several threads) and not."""
    check(make_case([(2500, queries)], dtype=dtype, window=window))
    check(make_case([(1024, 1), (3000, queries), (1025, 2)], dtype=dtype, window=window))


@pytest.mark.parametrize(("k_dim", "v_dim"), [(24, 16), (16, 40), (192, 128)])
@pytest.mark.parametrize("queries", [1, 9])
def test_key_and_value_widths_differ(k_dim, v_dim, queries):
    case = make_case([(70, queries), (33, 1)], dim=max(k_dim, v_dim))
    pool = case.pools[0].pages
    k, v = pool[:, 1, 0, :, :, :k_dim], pool[:, 1, 1, :, :, :v_dim]
    q = case.q[:, :, :k_dim]
    out = poisoned(*q.shape[:2], v_dim)
    tables = (case.block_tables, case.seq_lens, case.query_start)
    ops.paged_attention(q, k, v, *tables, out, 0.2, 10)
    expected, _ = ref_paged_attention(q, [(k, v)], *tables, 0.2)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]


def test_strided_queries_and_outputs():
    """q and out as slices of larger tensors; nothing beside them is written."""
    case = make_case([(40, 3), (90, 1)], group=2)
    tokens, heads, dim = case.q.shape
    merged = poisoned(tokens, heads + 4, dim + 5)
    q = merged[:, 2 : 2 + heads, 3 : 3 + dim]
    q.copy_(case.q)
    wide = torch.full((tokens, heads + 1, dim + 3), 7.0)
    wide_lse = torch.full((tokens, heads + 2), 7.0)
    k, v = case.pools[0].views()
    ops.paged_attention(
        q,
        k,
        v,
        case.block_tables,
        case.seq_lens,
        case.query_start,
        wide[:, 1:, 2 : 2 + dim],
        case.scale,
        3,
        lse=wide_lse[:, 1 : 1 + heads],
    )
    expected, expected_lse = case.reference()
    assert relative_error(wide[:, 1:, 2 : 2 + dim], expected) < 1e-5
    assert relative_error(wide_lse[:, 1 : 1 + heads], expected_lse) < 1e-5
    wide[:, 1:, 2 : 2 + dim] = wide_lse[:, 1 : 1 + heads] = 7
    assert (wide == 7).all()
    assert (wide_lse == 7).all()


@settings(deadline=None, max_examples=25)
@given(
    length=st.sampled_from([1, 60, 130, 1100]),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    group=st.sampled_from([1, 3, 8, 9]),
    dim=st.sampled_from([12, 64]),
    window=st.sampled_from([0, 7, 90]),
    soft_cap=st.sampled_from([0.0, 3.0]),
    threads=st.sampled_from([1, 2]),
)
def test_bits_do_not_depend_on_chunks_or_batch(length, data, dtype, threads, **options):
    """A prefill in chunks, alone or with others beside it, gives the same bits as in one piece."""
    queries = min(length, 70)
    case = make_case([(length, queries), (90, 5)], dtype=dtype, **options)
    whole, whole_lse = case.run()
    cuts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = 0
        while first < queries:
            n = min(cuts[first % len(cuts)], queries - first)
            out, lse = case.run(
                q=case.q[first : first + n],
                seq_lens=ints([length - queries + first + n]),
                query_start=ints([0, n]),
                rows=slice(0, 1),
            )
            assert torch.equal(out, whole[first : first + n])
            assert torch.equal(lse, whole_lse[first : first + n])
            first += n
    finally:
        torch.set_num_threads(before)


def test_rows_of_sequences_without_queries_are_not_touched():
    case = make_case([(0, 0), (20, 0), (30, 2), (0, 0)])
    out, _ = case.run()
    expected, _ = case.reference()
    assert relative_error(out, expected) < 1e-5
    empty = make_case([(20, 0)])
    out, lse = empty.run()
    assert out.shape[0] == lse.shape[0] == 0


def test_infinite_and_missing_scores():
    """-inf scores get no weight; a row of them alone is zero with lse -inf; +inf or NaN is NaN."""
    case = make_case([(20, 1)], kv_heads=1, group=1, dim=8)
    k, v = case.pools[0].views()
    page = int(case.block_tables[0, 0])
    case.q.fill_(1)
    k[page, :4] = -torch.inf
    v[page, :4] = 3e38
    out, lse = case.run()
    expected, expected_lse = case.reference()
    assert relative_error(out, expected) < 1e-5
    assert relative_error(lse, expected_lse) < 1e-5
    case.q.fill_(-1)
    assert case.run()[0].isnan().all()
    case.q.fill_(torch.nan)
    assert case.run()[0].isnan().all()
    case.q.fill_(1)
    k[page] = k[int(case.block_tables[0, 1])] = -torch.inf
    out, lse = case.run()
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    out, lse = case.run(sinks=torch.tensor([0.5]))
    assert (out == 0).all()
    assert torch.allclose(lse, torch.tensor(0.5))


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(0, 9),
    heads=st.integers(1, 5),
    dim=st.sampled_from([1, 8, 20, 64]),
    seed=st.integers(0, 2**31),
)
def test_merge_values(dtype, tokens, heads, dim, seed):
    torch.manual_seed(seed)
    a, b = torch.randn(2, tokens, heads, dim).to(dtype)
    a_lse, b_lse = torch.randn(2, tokens, heads) * 4
    # Rows that saw no key: their values may be anything.
    a_none, b_none = torch.rand(2, tokens, heads) < 0.2
    a_lse[a_none], b_lse[b_none] = -torch.inf, -torch.inf
    a[a_none], b[b_none] = torch.nan, torch.nan
    weights = torch.stack([a_lse, b_lse]).double().softmax(0).nan_to_num()[..., None]
    expected = a.double().nan_to_num() * weights[0] + b.double().nan_to_num() * weights[1]
    expected_lse = torch.logaddexp(a_lse.double(), b_lse.double())
    ops.merge_attention(a, a_lse, b, b_lse)
    assert relative_error(a, expected) < TOLERANCE[dtype]
    assert torch.equal(a_lse == -torch.inf, a_none & b_none)
    assert torch.allclose(a_lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_of_two_key_ranges_is_the_whole(dtype):
    """Keys 0 .. 63 by a sequence of their own, the rest by tables that start there."""
    case = make_case([(150, 1)], dtype=dtype, group=4, dim=32)
    q, (k, v), row = case.q, case.pools[0].views(), case.block_tables
    parts = []
    for tables, length in ((row[:, :4], 64), (row[:, 4:], 86)):
        out, lse = poisoned(*q.shape, dtype=dtype), poisoned(*q.shape[:2])
        one = ints([0, 1])
        ops.paged_attention(q, k, v, tables, ints([length]), one, out, case.scale, 1, lse=lse)
        parts += [out, lse]
    ops.merge_attention(*parts)
    whole, whole_lse = case.run()
    assert relative_error(parts[0], whole) < 2 * TOLERANCE[dtype]
    assert relative_error(parts[1], whole_lse) < 1e-5


CHANGES = [
    ({"q": torch.zeros(6, 6)}, "q must have 3 dimensions"),
    ({"q": torch.zeros(6, 5, 16)}, "out size of dimension 1 must be 5"),
    ({"q": torch.zeros(6, 6, 8)}, "q size of dimension 2 must be 16"),
    ({"q": torch.zeros(6, 6, 16).half()}, "q is float16 but k_cache is float32"),
    ({"q": torch.zeros(6, 16, 6).mT}, "q must be contiguous in its last dimension"),
    ({"out": torch.zeros(5, 6, 16)}, "out size of dimension 0 must be 6"),
    ({"out": torch.zeros(6, 6, 16).half()}, "out is float16 but q is float32"),
    ({"out": torch.zeros(1, 6, 16).expand(6, 6, 16)}, "out is written and must not be expanded"),
    ({"v_cache": torch.zeros(9, 16, 3, 16)}, "v_cache size of dimension 2 must be 2"),
    ({"v_cache": torch.zeros(9, 16, 2, 16).half()}, "v_cache is float16 but k_cache is float32"),
    ({"block_tables": torch.zeros(2, 5)}, "block_tables must be int32, got float32"),
    ({"block_tables": ints([[1], [2]])}, "sequence 1 has 40 tokens, its table holds 1 pages x 16"),
    ({"block_tables": ints([[1, 2, 3], [4, 5, 9]])}, "page 9 of place 0, which has 9"),
    ({"block_tables": ints([[1, 2, 3], [4, -1, 6]])}, "names place 15, there are 1"),
    ({"block_tables": ints([[1, 2, 3], [4, 1 << 28, 6]])}, "names place 1, there are 1"),
    ({"seq_lens": ints([10])}, "seq_lens size of dimension 0 must be 2"),
    ({"seq_lens": ints([-1, 40])}, "sequence 0 has -1 tokens"),
    ({"seq_lens": ints([1, 40])}, "sequence 0 has 2 queries but only 1 tokens"),
    ({"query_start": ints([0, 6])}, "query_start size of dimension 0 must be 3"),
    ({"query_start": ints([1, 2, 6])}, "query_start must run from 0 to 6 tokens, got 1 to 6"),
    ({"query_start": ints([0, 2, 5])}, "query_start must run from 0 to 6 tokens, got 0 to 5"),
    ({"query_start": ints([0, 9, 6])}, "query_start must not fall, got 9 then 6"),
    ({"query_start": ints([0, -2, 6])}, "query_start must not fall, got 0 then -2"),
    ({"max_query_len": 3}, "sequence 1 has 4 queries, max_query_len is 3"),
    ({"max_query_len": 0}, "max_query_len must be at least 1, got 0"),
    ({"window": -1}, r"window must be 0 \(none\) or positive, got -1"),
    ({"soft_cap": -2.0}, r"soft_cap must be 0 \(none\) or positive, got -2"),
    ({"sinks": torch.zeros(5)}, "sinks size of dimension 0 must be 6"),
    ({"sinks": torch.zeros(6).double()}, "sinks must be float32, got float64"),
    ({"lse": torch.zeros(6, 5)}, "lse size of dimension 1 must be 6"),
    ({"lse": torch.zeros(6, 6).half()}, "lse must be float32, got float16"),
    ({"k_scale": torch.zeros(9, 16, 2)}, "k_scale and v_scale are not allowed for a float32 cache"),
    ({"places": torch.zeros(0, 2).long()}, "places must have 1 to 8 rows, got 0"),
    ({"places": torch.zeros(1, 2)}, "places must be int64, got float32"),
    ({"places": torch.zeros(1, 2).long()}, "row 0 of places has 0 pages, but k_cache has 9"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_errors(change, message):
    out = torch.full((6, 6, 16), 7.0)
    arguments = {
        "q": torch.zeros(6, 6, 16),
        "k_cache": torch.zeros(9, 16, 2, 16),
        "v_cache": torch.zeros(9, 16, 2, 16),
        "block_tables": ints([[1, 2, 3], [4, 5, 6]]),
        "seq_lens": ints([10, 40]),
        "query_start": ints([0, 2, 6]),
        "out": out,
        "scale": 1.0,
        "max_query_len": 4,
    }
    with pytest.raises(RuntimeError, match=f"torch_pd::paged_attention: .*{message}"):
        ops.paged_attention(**(arguments | change))
    assert (out == 7).all()  # nothing is written before all is checked


def test_error_of_a_page_past_another_place():
    case = make_case([(40, 2)], num_places=2)
    case.block_tables[0, 1] = 1 << PLACE_SHIFT | len(case.pools[1].pages)
    with pytest.raises(RuntimeError, match=r"names page (\d+) of place 1, which has \1"):
        case.run()


def test_error_of_float8_without_scales():
    case = make_case([(40, 2)], cache_dtype=FLOAT8)
    with pytest.raises(RuntimeError, match="k_scale and v_scale are required"):
        case.run(k_scale=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other": torch.zeros(2, 3, 5)}, "other size of dimension 2 must be 4"),
        ({"other": torch.zeros(2, 3, 4).half()}, "other is float16 but out is float32"),
        ({"lse": torch.zeros(2, 4)}, "lse size of dimension 1 must be 3"),
        ({"lse": torch.zeros(2, 3).half()}, "lse must be float32, got float16"),
        ({"lse": torch.zeros(1, 3).expand(2, 3)}, "lse is written and must not be expanded"),
        ({"other_lse": torch.zeros(3, 3)}, "other_lse size of dimension 0 must be 2"),
        ({"out": torch.zeros(2, 12)}, "out must have 3 dimensions"),
    ],
)
def test_merge_errors(change, message):
    arguments = {
        "out": torch.zeros(2, 3, 4),
        "lse": torch.zeros(2, 3),
        "other": torch.zeros(2, 3, 4),
        "other_lse": torch.zeros(2, 3),
    }
    with pytest.raises(RuntimeError, match=f"torch_pd::merge_attention: .*{message}"):
        ops.merge_attention(**(arguments | change))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    case = make_case([(40, 3), (20, 1)], dtype=dtype, sinks=True)
    k, v = case.pools[0].views()
    # opcheck compares arguments before and after: no NaN, not even where nothing is read.
    case.pools[0].pages.nan_to_num_()
    tables = (case.block_tables, case.seq_lens, case.query_start)
    out, lse = torch.zeros_like(case.q), torch.zeros(case.q.shape[:2])
    options = {**case.options, "lse": lse}
    torch.library.opcheck(
        torch.ops.torch_pd.paged_attention.default,
        (case.q, k, v, *tables, out, case.scale, 3),
        options,
    )
    torch.library.opcheck(
        torch.ops.torch_pd.merge_attention.default, (out, lse, out.clone(), lse.clone())
    )
