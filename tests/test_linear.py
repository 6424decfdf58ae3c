"""linear: values, batch invariance, strides, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TOLERANCE, poisoned, ref_linear, relative_error

from torch_pd import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(x, weight, bias=None):
    out = poisoned(x.shape[0], weight.shape[0], dtype=x.dtype)
    ops.linear(x, weight, bias, out)
    return out


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 80),
    width=st.one_of(st.integers(0, 130), st.sampled_from([576, 767, 769, 1024, 1600])),
    out_features=st.integers(0, 120),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_values(dtype, rows, width, out_features, bias, seed):
    torch.manual_seed(seed)
    x = torch.randn(rows, width).to(dtype)
    weight = torch.randn(out_features, width).to(dtype)
    b = torch.randn(out_features).to(dtype) if bias else None
    assert relative_error(run(x, weight, b), ref_linear(x, weight, b)) < TOLERANCE[dtype]


@settings(deadline=None, max_examples=20)
@given(
    dtype=st.sampled_from(DTYPES),
    width=st.sampled_from([8, 50, 576, 1000]),
    out_features=st.sampled_from([5, 48, 100]),
    cuts=st.lists(st.integers(1, 45), min_size=1, max_size=12),
    threads=st.sampled_from([1, 2]),
)
def test_row_is_independent_of_batch(dtype, width, out_features, cuts, threads):
    """Any way to cut the rows into calls, on any number of threads, gives the same bits."""
    x = torch.randn(sum(cuts), width).to(dtype)
    weight = torch.randn(out_features, width).to(dtype)
    whole = run(x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = torch.cat([run(part, weight) for part in x.split(cuts)])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(dtype):
    """More rows than one packed block holds."""
    x, weight = torch.randn(1100, 700).to(dtype), torch.randn(60, 700).to(dtype)
    out = run(x, weight)
    assert relative_error(out, ref_linear(x, weight, None)) < TOLERANCE[dtype]
    assert torch.equal(run(x[1093:], weight), out[1093:])


@pytest.mark.parametrize("rows", [1, 3, 12, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(dtype, rows):
    """Rows apart from each other, and nothing outside the views read or written."""
    wide_x, wide_w = poisoned(rows, 90, dtype=dtype), poisoned(50, 100, dtype=dtype)
    wide_out = torch.full((rows, 70), 7.0, dtype=dtype)
    x, weight, out = wide_x[:, 20:61], wide_w[1:48, 30:71], wide_out[:, 11:58]
    x.copy_(torch.randn(rows, 41))
    weight.copy_(torch.randn(47, 41))
    ops.linear(x, weight, None, out)
    assert relative_error(out, ref_linear(x, weight, None)) < TOLERANCE[dtype]
    assert (wide_out[:, :11] == 7).all()
    assert (wide_out[:, 58:] == 7).all()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, rows):
    """Infinity and NaN stay in their row; overflow rounds to infinity; subnormals survive, except
    where the CPU's dot product of bfloat16 takes them as zero."""
    tiny = torch.finfo(dtype).smallest_normal / (4 if dtype != torch.bfloat16 else 1)
    x, weight = torch.zeros(rows, 32, dtype=dtype), torch.zeros(16, 32, dtype=dtype)
    x[:, 0] = 1
    weight[:, 0] = torch.tensor(
        [float("inf"), float("nan"), torch.finfo(dtype).max, tiny] * 4, dtype=dtype
    )
    out = run(x, weight)
    assert torch.equal(out.nan_to_num(nan=-1), weight[:, 0].expand(rows, 16).nan_to_num(nan=-1))
    x[-1, 0] = 4
    out = run(x, weight)
    assert out[-1, 2] == float("inf")
    assert out[-1, 3] == 4 * tiny


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_nearest_even(dtype):
    values = torch.randn(4096, 1) * torch.logspace(-8, 8, 4096, base=2).unsqueeze(1)
    x = torch.cat([values, -values], 1)
    hi = x.to(dtype)
    x = torch.stack([hi[:, 0], (x[:, 0] - hi[:, 0].float()).to(dtype)], 1)  # hi + rest
    weight = torch.ones(3, 2, dtype=dtype)
    out = run(x, weight)
    assert torch.equal(out, (x[:, :1].float() + x[:, 1:].float()).to(dtype).expand(-1, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 9)}, r"linear: weight size of dimension 1 must be 9"),
        ({"x": torch.zeros(8)}, r"linear: x must have 2 dimensions, got shape \[8\]"),
        ({"x": torch.zeros(4, 8).bool()}, r"linear: x must be float32, bfloat16 or float16"),
        ({"weight": torch.zeros(6, 8).half()}, r"linear: weight is float16 but x is float32"),
        ({"weight": torch.zeros(8, 6).T}, r"linear: weight must be contiguous in its last"),
        ({"bias": torch.zeros(5)}, r"linear: bias size of dimension 0 must be 6"),
        ({"bias": torch.zeros(6).bfloat16()}, r"linear: bias is bfloat16 but x is float32"),
        ({"out": torch.zeros(3, 6)}, r"linear: out size of dimension 0 must be 4"),
        ({"out": torch.zeros(4, 5)}, r"linear: out size of dimension 1 must be 6"),
        ({"out": torch.zeros(1, 6).expand(4, 6)}, r"linear: out is written and must not be"),
    ],
)
def test_errors(change, message):
    given_ = {
        "x": torch.zeros(4, 8),
        "weight": torch.zeros(6, 8),
        "bias": torch.zeros(6),
        "out": torch.zeros(4, 6),
    }
    with pytest.raises(RuntimeError, match=message):
        ops.linear(**(given_ | change))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, weight = torch.randn(5, 24).to(dtype), torch.randn(10, 24).to(dtype)
    for bias in (None, torch.randn(10).to(dtype)):
        torch.library.opcheck(
            torch.ops.torch_pd.linear.default, (x, weight, bias, torch.zeros(5, 10, dtype=dtype))
        )
