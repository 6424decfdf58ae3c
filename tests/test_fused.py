"""rms_norm and gated_act against plain torch in float64, their errors, and rows on threads."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_pd import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
few = settings(max_examples=60, deadline=None)
nan = float("nan")


@pytest.fixture
def threads():
    """More threads than the machine may have: every split of the rows is legal."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def generators():
    return st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


def framed(rows, width, dtype, fill=7.0):
    """A tensor with guards around and its ``[rows, width]`` inside, poisoned with NaN."""
    whole = torch.full((rows + 2, width + 5), fill).to(dtype)
    inside = whole[1:-1, 3:-2]
    inside.fill_(nan)
    return whole, inside


def assert_guards(whole, fill=7.0):
    copy = whole.clone()
    copy[1:-1, 3:-2] = fill
    assert torch.equal(copy, torch.full_like(copy, fill))


# --- rms_norm ---


@few
@given(
    generators(),
    st.integers(0, 5),
    st.integers(1, 150),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
)
def test_rms_norm(generator, rows, width, dtype, with_residual, in_place, offset):
    size = torch.rand(rows, 1, generator=generator) * 20
    x = (torch.randn(rows, width, generator=generator) * size).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)
    residual = torch.randn(rows, width, generator=generator).to(dtype) if with_residual else None
    scale = 0.22 if with_residual else 1.0
    expected, new_residual = reference.ref_rms_norm(x, weight, 1e-5, residual, scale, offset)
    whole, out = framed(rows, width, dtype)
    if in_place:
        out.copy_(x)
        x = out
    ops.rms_norm(x, weight, out, 1e-5, residual=residual, scale=scale, offset=offset)
    assert_guards(whole)
    if with_residual:
        # residual + scale * x in one rounding or two: float32 differs in the last bit.
        reference.assert_rounded(residual, new_residual.double(), 1e-7)
        expected = reference.ref_rms_norm(residual, weight, 1e-5, offset=offset)[0]
    reference.assert_rounded(out, expected)


def test_rms_norm_of_zeros_and_of_large_values():
    x = torch.zeros(2, 40)
    x[1] = 1e18
    out = torch.full_like(x, nan)
    ops.rms_norm(x, torch.ones(40), out, 1e-6)
    assert out[0].eq(0).all()
    assert (out[1] - 1).abs().max() < 1e-6


def test_rms_norm_norms_the_rounded_residual():
    # 256 + 1 is 256 in bfloat16: the norm must not see the lost 1.
    residual = torch.full((1, 64), 256.0, dtype=torch.bfloat16)
    residual[0, 0] = 0
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    out = torch.full_like(x, nan)
    ops.rms_norm(x, x[0], out, 0.0, residual=residual)
    rounded = torch.full((64,), 256.0)
    rounded[0] = 1
    assert torch.equal(residual[0].float(), rounded)
    reference.assert_rounded(out, reference.ref_rms_norm(rounded[None], x[0], 0.0)[0])


# --- gated_act ---


def true_float32_steps(actual, expected):
    """Error in units of the last place of float32 at the true value."""
    size = expected.abs().float()
    step = torch.nextafter(size, torch.tensor(math.inf)) - size
    return (actual.double() - expected).abs() / step.double()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_accurate_to_a_few_units_in_the_last_place(name):
    x = torch.cat(
        [
            torch.linspace(-110, 110, 200_000),
            torch.linspace(-9, 9, 200_000),
            torch.logspace(-42, 3, 20_000),
            -torch.logspace(-42, 3, 20_000),
        ]
    )
    x = x.view(-1, 40)
    out = torch.full_like(x, nan)
    ops.gated_act(torch.cat([x, torch.ones_like(x)], 1), out, name)
    expected = reference.ref_activation(x, name)
    normal = expected.abs() > 1e-34  # further out e^-x itself is subnormal
    assert true_float32_steps(out, expected)[normal].max() <= 6
    assert (out.double() - expected)[~normal].abs().max() <= 1e-40
    central = x.abs() < 8
    assert true_float32_steps(out, expected)[normal & central].max() <= 5


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_special_values(name):
    x = torch.tensor([[math.inf, nan, 0.0, -0.0, 3e38, -3e38]])
    out = torch.zeros_like(x)
    ops.gated_act(torch.cat([x, torch.ones_like(x)], 1), out, name)
    assert out[0, 0] == math.inf
    assert out[0, 1].isnan()
    assert out[0, 2:4].eq(0).all()
    assert out[0, 4] == x[0, 4]
    assert out[0, 5] == 0


@few
@given(
    generators(),
    st.integers(0, 4),
    st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any),
    st.sampled_from(DTYPES),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
)
def test_gated_act(generator, rows, widths, dtype, name, merged):
    if not merged:
        widths = [sum(widths)]
    width = sum(widths)
    x = (torch.randn(rows, 2 * width + 3, generator=generator) * 3).to(dtype)[:, 1:-2]
    gate, up = reference.split_shards(x, [(w, w) for w in widths])
    whole, out = framed(rows, width, dtype)
    ops.gated_act(x, out, name, shard_widths=widths if merged else None)
    assert_guards(whole)
    reference.assert_rounded(out, reference.ref_activation(gate, name) * up.double())


# --- a row depends on its own inputs alone, whatever the batch and the threads ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("threads")
def test_rows_are_bitwise_independent(dtype):
    rows, width, kv_heads, heads, dim = 300, 520, 2, 6, 52
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
    out = torch.full_like(x, nan)
    ops.rms_norm(x, weight, out, 1e-6)
    act = torch.full((rows, width // 2), nan, dtype=dtype)
    ops.gated_act(x, act, "gelu_tanh", shard_widths=[3, 257])
    cos, sin = torch.randn(2, rows, dim)
    norms = {"q_norm": weight[:dim], "k_norm": weight[:dim]}
    q = torch.full((rows, heads, dim), nan, dtype=dtype)
    caches = torch.zeros(2, 20, 16, kv_heads, dim, dtype=dtype)
    slots = torch.randperm(320)[:rows]
    ops.rope_write_kv(x, q, *caches, slots, cos=cos, sin=sin, **norms)
    for row in (0, 7, 150, 299):
        one = slice(row, row + 1)
        alone = torch.full_like(out[one], nan)
        ops.rms_norm(x[one], weight, alone, 1e-6)
        assert torch.equal(alone, out[one])
        alone = torch.full_like(act[one], nan)
        ops.gated_act(x[one], alone, "gelu_tanh", shard_widths=[3, 257])
        assert torch.equal(alone, act[one])
        alone, pages = torch.full_like(q[one], nan), torch.zeros_like(caches[:, :1])
        ops.rope_write_kv(
            x[one], alone, *pages, slots[one] % 16, cos=cos[one], sin=sin[one], **norms
        )
        assert torch.equal(alone, q[one])
        slot = int(slots[row])
        assert torch.equal(pages[:, 0, slot % 16], caches[:, slot // 16, slot % 16])


@pytest.mark.usefixtures("threads")
def test_paged_kv_on_several_threads():
    length, pool = 900, reference.make_pool(60, 2, 16, 2, 64, torch.float32)
    k, v = torch.randn(2, length, 2, 64)
    table = torch.randperm(60)
    slots = (table[:, None] * 16 + torch.arange(16)).flatten()[:length]
    ops.write_kv(k, v, *pool.layer(1), slots)
    out = torch.full((2, length, 2, 64), nan)
    lengths = torch.tensor([500, 0, 400], dtype=torch.int32)
    tables = torch.stack([table[:32], table[:32], table[28:]]).to(torch.int32)
    starts = torch.tensor([0, 500, 500, 900], dtype=torch.int32)
    ops.gather_kv(*pool.layer(1), tables, lengths, starts, *out)
    rows = torch.cat([torch.arange(500), torch.arange(448, 848)])
    assert torch.equal(out[0], k[rows])
    assert torch.equal(out[1], v[rows])


# --- errors ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight size of dimension 0 must be 8, got shape \[7\]"),
        ({"weight": torch.ones(8).half()}, "weight is float16 but x is float32"),
        ({"weight": torch.ones(16)[::2]}, "weight must be contiguous"),
        ({"out": torch.zeros(3, 7)}, "out size of dimension 1 must be 8"),
        ({"out": torch.zeros(1, 8).expand(3, 8)}, "out is written and must not be expanded"),
        ({"out": torch.zeros(3, 8).bfloat16()}, "out is bfloat16 but x is float32"),
        ({"x": torch.zeros(3, 16)[:, ::2]}, "x must be contiguous in its last dimension"),
        ({"x": torch.zeros(24)}, "x must have 2 dimensions"),
        ({"x": torch.zeros(3, 8).double()}, "x must be float32, bfloat16 or float16, got float64"),
        ({"residual": torch.zeros(2, 8)}, "residual size of dimension 0 must be 3"),
        ({"scale": 0.5}, "scale 0.5 needs a residual"),
    ],
)
def test_rms_norm_errors(change, message):
    arguments = {"x": torch.zeros(3, 8), "weight": torch.ones(8), "out": torch.zeros(3, 8)}
    with pytest.raises(RuntimeError, match=f"torch_pd::rms_norm: .*{message}"):
        ops.rms_norm(**(arguments | change), eps=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation must be silu, gelu or gelu_tanh, got relu"),
        ({"x": torch.zeros(3, 15)}, "x must be an even number of columns, got 15"),
        ({"out": torch.zeros(3, 9)}, "out size of dimension 1 must be 8"),
        ({"out": torch.zeros(3, 8).half()}, "out is float16 but x is float32"),
        ({"x": torch.zeros(3, 16, dtype=torch.int32)}, "x must be float32, bfloat16 or float16"),
        ({"shard_widths": [4, 5]}, "shard_widths has 2 shards that sum to 9, out is 8 wide"),
        ({"shard_widths": [9, -1]}, "shard_widths must not be negative, got -1"),
        ({"shard_widths": [0] * 64 + [8]}, r"at most 64 shards"),
    ],
)
def test_gated_act_errors(change, message):
    arguments = {"x": torch.zeros(3, 16), "out": torch.zeros(3, 8), "activation": "silu"}
    with pytest.raises(RuntimeError, match=f"torch_pd::gated_act: .*{message}"):
        ops.gated_act(**(arguments | change))
