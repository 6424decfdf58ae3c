"""sample and adjust_logits against plain torch on the same uniform numbers."""

import numpy as np
import pytest
import torch
from device_pools import DEVICE, DTYPES, error, nan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_pd import ops
from torch_pd.engine import draw

VOCABS = [1, 7, 50, 1000, 4096, 8200, 49152]
inf = float("inf")


pytestmark = pytest.mark.usefixtures("clean_flag")


def uniform(key: list[int]) -> float:
    """The number that a row of keys (top_k, seed, index, position) draws with."""
    columns = [np.array([word % 2**64], dtype=np.uint64) for word in key[1:]]
    return float(draw.uniforms(*columns)[0])


def kept(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float):
    """Token ids that the filters leave, their weights in float64 (both in the order of ids), and
    how near a filter came to deciding otherwise."""
    x = row.double()
    weights = ((x - x.max()) / temperature).exp()
    margin = (weights - min_p).abs().min().item() if min_p not in (0.0, 1.0) else inf
    weights[weights < min_p] = 0
    order = x.sort(descending=True, stable=True).indices  # of equals the lowest ids first
    order = order[: (weights > 0).sum()]
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        mass = weights[order]
        goal = top_p * mass.sum()
        before = mass.cumsum(0) - mass
        margin = min(margin, (before - goal).abs().min().item())
        order = order[before < goal]
    ids = order.sort().values
    return ids, weights[ids], margin


def check_row(row: Tensor, token: int, setting: list[float], key: list[int]) -> None:
    temperature, top_p, min_p = setting
    if temperature < 1e-5 or key[0] == 1:
        best = row.max()
        assert token == (row == best).nonzero()[0].item()
        return
    ids, weights, margin = kept(row, temperature, key[0], top_p, min_p)
    if margin < 1e-5:
        return
    assert token in ids.tolist()
    end = weights.cumsum(0) / weights.sum()
    place = ids.tolist().index(token)
    u = uniform(key)
    assert (end[place - 1].item() if place else 0.0) - 1e-5 <= u < end[place].item() + 1e-5


def sample(logits: Tensor, settings_: list[list[float]], keys: list[list[int]]) -> Tensor:
    tokens = torch.full((len(logits),), -9, device=DEVICE)
    ops.sample(
        logits,
        tokens,
        torch.tensor(settings_, dtype=torch.float64, device=DEVICE).view(-1, 3),
        torch.tensor(keys, dtype=torch.int64, device=DEVICE).view(-1, 4),
    )
    return tokens.cpu()


@st.composite
def cases(draw_):
    generator = torch.Generator().manual_seed(draw_(st.integers(0, 2**31)))
    rows, vocab = draw_(st.integers(0, 5)), draw_(st.sampled_from(VOCABS))
    spread = draw_(st.sampled_from([0.0, 0.3, 3.0, 30.0]))
    logits = torch.randn(rows, vocab, generator=generator) * spread
    if draw_(st.booleans()):  # many equal values
        logits = (logits * 2).round() / 2
    logits = logits.to(draw_(st.sampled_from(DTYPES)))
    if vocab > 1 and draw_(st.booleans()):
        logits[torch.rand(logits.shape, generator=generator) < 0.3] = -inf
        logits[:, vocab // 2] = 1
    words = st.integers(-(2**63), 2**63 - 1)
    settings_, keys = [], []
    for _ in range(rows):
        settings_.append(
            [
                draw_(st.sampled_from([0.0, 0.05, 0.7, 1.0, 1.5, 100.0])),
                draw_(st.sampled_from([1.0, 0.95, 0.5, 0.01])),
                draw_(st.sampled_from([0.0, 0.0, 0.05, 1.0])),
            ]
        )
        top_k = draw_(st.sampled_from([0, -1, 1, 2, 20, 500, vocab, 10 * vocab]))
        keys.append([top_k, draw_(words), draw_(st.integers(0, 3)), draw_(st.integers(0, 9999))])
    return logits, settings_, keys, draw_(st.sampled_from([0, 1, 8]))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_sample_follows_the_filters_and_the_uniform_number(case):
    logits, settings_, keys, pad = case
    rows, vocab = logits.shape
    # A view whose surroundings would win if they were read.
    frame = torch.full((rows, vocab + 2 * pad), 1e4, dtype=logits.dtype, device=DEVICE)
    view = frame[:, pad : pad + vocab]
    view.copy_(logits)
    tokens = sample(view, settings_, keys)
    for i in range(rows):
        check_row(logits[i].float(), int(tokens[i]), settings_[i], keys[i])
    assert torch.equal(view.cpu(), logits)
    # A row depends on nothing beside it, and every run gives the same.
    assert torch.equal(sample(view, settings_, keys), tokens)
    if rows > 1:
        assert torch.equal(sample(view[1:], settings_[1:], keys[1:]), tokens[1:])


@pytest.mark.parametrize("vocab", [128256, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample_from_a_large_vocabulary(vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(6, vocab, generator=generator) * 3).to(dtype)
    settings_ = [[1.0, 1.0, 0.0], [0.7, 0.9, 0.0], [1.0, 0.95, 0.0]] * 2
    keys = [[0, 5, 0, 1], [50, 5, 0, 2], [0, 5, 0, 3], [1000, 5, 1, 4], [7, 6, 0, 5], [1, 7, 0, 6]]
    tokens = sample(logits.to(DEVICE), settings_, keys)
    for i in range(6):
        check_row(logits[i].float(), int(tokens[i]), settings_[i], keys[i])


def test_uniform_numbers_are_those_of_the_cpu_sampler():
    # Equal logits: the token is the first 12 bits of the number.
    logits = torch.zeros(64, 4096, device=DEVICE)
    keys = [[0, seed * 0x9E3779B97F4A7, seed % 3, seed * 7] for seed in range(64)]
    tokens = sample(logits, [[1.0, 1.0, 0.0]] * 64, keys)
    assert tokens.tolist() == [int(uniform(key) * 4096) for key in keys]


def test_rows_without_filters_equal_the_cpu_sampler():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 3000, generator=generator) * 2
    keys = [[0, 17, 0, position] for position in range(40)]
    u = torch.tensor([uniform(key) for key in keys], dtype=torch.float64)
    off = torch.full((40,), 3000)
    columns = torch.full((40,), 0.8), off, off.double(), torch.full((40,), 0.01)
    draws = draw.Draws(logits.amax(1), *columns, u)
    expected = draw.draw(logits.clone(), draws)
    tokens = sample(logits.to(DEVICE), [[0.8, 1.0, 0.01]] * 40, keys)
    assert (tokens == expected).float().mean() > 0.97  # but for numbers on a boundary


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[0, [4000, 1234]] = 2
    logits[1] = -0.0
    logits[1, 7:] = 0.0
    logits[2, 4999] = 1e-20
    tokens = torch.full((3,), -9, device=DEVICE)
    ops.sample(logits, tokens)
    assert tokens.tolist() == [1234, 0, 4999]


def test_rows_that_allow_no_token_are_reported():
    logits = torch.randn(5, 1000, device=DEVICE)
    good = sample(logits, [[1.0, 0.9, 0.0]] * 5, [[0, 1, 0, i] for i in range(5)])
    logits[1, 77] = nan
    logits[2] = -inf
    logits[4, 999] = inf
    tokens = sample(logits, [[1.0, 0.9, 0.0]] * 5, [[0, 1, 0, i] for i in range(5)])
    assert tokens.tolist() == [good[0], -1, -1, good[3], -1]
    message = error()
    assert "torch_pd::sample on the device: a row of logits that holds NaN or infinity" in message
    assert message.endswith("(and 2 more errors)")


@pytest.mark.parametrize("setting", [[nan, nan, nan], [1.0, -1.0, 5.0], [inf, 0.0, inf]])
def test_settings_that_make_no_sense_still_give_a_token(setting):
    logits = torch.randn(1, 1000, device=DEVICE)
    assert 0 <= sample(logits, [setting], [[3, 1, 0, 0]]).item() < 1000


def test_adjust_logits():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 300, generator=generator)
    penalties = torch.tensor([[1.0, 0.0, 0.0], [1.5, 0.2, 0.1], [0.7, -0.5, 0.0], [1.3, 0.0, 1.0]])
    places = torch.randperm(1200, generator=generator)[:500]
    counts = torch.randint(-1, 4, (500,), generator=generator)
    bias = torch.randn(500, generator=generator)
    bias[::50] = -inf
    entries = torch.stack([places // 300, places % 300, counts], 1).to(torch.int32)
    entries[3] = torch.tensor([-1, 10**9, 10**9])
    there = logits.to(DEVICE)
    ops.adjust_logits(there, entries.to(DEVICE), bias.to(DEVICE), penalties.to(DEVICE))
    for (row, token, count), value in zip(entries.tolist(), bias.tolist(), strict=True):
        if row < 0:
            continue
        repetition, frequency, presence = penalties[row].tolist()
        x = logits[row, token] + value
        if count >= 0:
            x = x / repetition if x > 0 else x * repetition
            x = x - frequency * count - presence * (count > 0)
        logits[row, token] = x
    torch.testing.assert_close(there.cpu(), logits, rtol=1e-6, atol=1e-6)


def test_adjustments_outside_the_logits_are_dropped_and_reported():
    logits = torch.randn(4, 300, device=DEVICE)
    before, frame = logits.clone(), logits[1:3]
    for row, token, wrong in ((2, 0, 2), (0, 300, 300), (1, -1, -1), (-2, 5, -2)):
        entries = torch.tensor([[row, token, 1]], dtype=torch.int32, device=DEVICE)
        ones = torch.ones(2, 3, device=DEVICE)
        ops.adjust_logits(frame, entries, ones[0, :1], ones)
        assert error() == (
            f"torch_pd::adjust_logits on the device: a token id or row outside the logits: {wrong}"
        )
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 8).double()}, "logits must be float32, bfloat16 or float16"),
        ({"logits": torch.zeros(2, 16)[:, ::2]}, "logits must be contiguous in its last"),
        ({"logits": torch.zeros(2, 0)}, "logits must have 1 to 1048576 columns, got 0"),
        ({"tokens": torch.zeros(3).long()}, "tokens size of dimension 0 must be 2"),
        ({"tokens": torch.zeros(2).int()}, "tokens must be int64, got int32"),
        ({"settings": None}, "settings and keys must be given together"),
        ({"settings": torch.zeros(2, 3)}, "settings must be float64, got float32"),
        ({"keys": torch.zeros(2, 3).long()}, "keys size of dimension 1 must be 4"),
    ],
)
def test_sample_errors(change, message):
    arguments = {
        "logits": torch.zeros(2, 8),
        "tokens": torch.zeros(2).long(),
        "settings": torch.zeros(2, 3).double(),
        "keys": torch.zeros(2, 4).long(),
    } | change
    # A view of a view: .to() would make a strided one contiguous.
    there = {k: v if v is None else place(v) for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"torch_pd::sample: .*{message}"):
        ops.sample(**there)


def place(t: Tensor) -> Tensor:
    """``t`` on the device with the same strides."""
    there = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)
    return there.copy_(t)


def test_graph_replays_follow_their_parameters():
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 32000, generator=generator) * 2).bfloat16().to(DEVICE)
    settings_ = torch.tensor([[0.8, 0.9, 0.0]] * 7, dtype=torch.float64, device=DEVICE)
    keys = torch.tensor([[40, 3, 0, i] for i in range(7)], device=DEVICE)
    tokens = torch.full((7,), -9, device=DEVICE)
    ops.sample(logits, tokens, settings_, keys)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.sample(logits, tokens, settings_, keys)
    seen = set()
    for position in range(5):
        keys[:, 3] = position
        settings_[:, 0] = 0.5 + position
        graph.replay()
        replayed = tokens.tolist()
        ops.sample(logits, tokens, settings_, keys)
        assert replayed == tokens.tolist()
        seen.add(tuple(replayed))
    assert len(seen) > 1


def test_opcheck():
    logits, tokens = torch.randn(2, 64, device=DEVICE), torch.zeros(2, device=DEVICE).long()
    params = torch.ones(2, 3, device=DEVICE).double(), torch.ones(2, 4, device=DEVICE).long()
    torch.library.opcheck(torch.ops.torch_pd.sample.default, (logits, tokens, *params))
    entries = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    arguments = (logits, entries, torch.ones(1, device=DEVICE), torch.ones(2, 3, device=DEVICE))
    torch.library.opcheck(torch.ops.torch_pd.adjust_logits.default, arguments)
