"""Sampling against a plain float64 reference, swept over the inverse CDF: nothing left to luck."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torch_pd.engine import sampler as sampler_module
from torch_pd.engine.draw import UNDECIDED, Draws, best, derive_seed, draw_filtered, mix, uniforms
from torch_pd.engine.logprobs import report
from torch_pd.engine.sampler import Sampler
from torch_pd.engine.sampling_row import SamplingRow, TokenCounts
from torch_pd.request import SamplingParams

NEAR = 1e-5
"""Probabilities closer than this to a filter's edge may fall on either side in float32."""


def reference_logits(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    eos: int,
) -> np.ndarray:
    """logits [V] after bias, min_tokens and penalties, straight from their definitions."""
    x = logits.astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if len(output) < params.min_tokens:
        for token in (eos, *params.stop_ids):
            x[token] = -math.inf
    for token in range(len(x)):
        if token in prompt or token in output:
            r = params.repetition_penalty
            x[token] = x[token] / r if x[token] > 0 else x[token] * r
        x[token] -= params.frequency_penalty * list(output).count(token)
        x[token] -= params.presence_penalty * (token in output)
    return x


def reference_distribution(x: np.ndarray, params: SamplingParams) -> list[tuple[int, float]]:
    """(token, probability) of all tokens that may be drawn, in the order of the inverse CDF."""
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if params.greedy:
        return [(order[0], 1.0)]
    weights = {token: math.exp((x[token] - x[order[0]]) / params.temperature) for token in order}
    for token in order:
        assume(abs(weights[token] - params.min_p) > NEAR or params.min_p in (0.0, weights[token]))
    kept = [token for token in order if weights[token] >= params.min_p and weights[token] > 1e-46]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    if params.top_p < 1.0:
        whole = sum(weights[token] for token in kept)
        before, nucleus = 0.0, []
        for token in kept:
            assume(abs(before / whole - params.top_p) > NEAR)
            if before / whole < params.top_p:
                nucleus.append(token)
            before += weights[token]
        kept = nucleus
    kept.sort()
    whole = sum(weights[token] for token in kept)
    return [(token, weights[token] / whole) for token in kept]


def sample(
    logits: torch.Tensor, rows: Sequence[SamplingRow], u: Any = None, eos: int = 0
) -> list[int]:
    """Tokens of rows, with uniform numbers of our choice if given."""
    with pytest.MonkeyPatch.context() as patch:
        if u is not None:
            patch.setattr(sampler_module, "uniforms", lambda *_: np.asarray(u))
        sampler = Sampler(logits.shape[1], eos_token_ids=(eos,))
        return sampler(logits.clone(), rows).token_ids


@st.composite
def logits_of(draw: Any, min_size: int = 2, max_size: int = 40) -> np.ndarray:
    """Random logits [V], some with many equal values as bfloat16 models give."""
    size = draw(st.integers(min_size, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.normal(scale=draw(st.sampled_from([0.5, 3.0, 10.0])), size=size)
    if draw(st.booleans()):
        x = np.round(x)
    return x.astype(np.float32)


def share(low: float) -> st.SearchStrategy[float]:
    # Not round numbers: those meet the sums of equal values exactly, where rounding decides.
    return st.integers(1, 999).map(lambda i: low + (1 - low) * (i + 0.377) / 1001)


params_of = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.01, 0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, -1, 1, 2, 3, 7, 1000]),
    top_p=st.one_of(st.just(1.0), share(0.0)),
    min_p=st.one_of(st.sampled_from([0.0, 1.0]), share(0.0)),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, -0.5, 1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.3, 0.7]),
    logit_bias=st.sampled_from([None, None, {0: 3.5}, {1: -100.0, 0: 0.25}]),
    min_tokens=st.sampled_from([0, 0, 3]),
    stop_token_ids=st.sampled_from([(), (), (1,)]),
)


@settings(deadline=None, max_examples=300)
@given(
    x=logits_of(min_size=3),
    params=params_of,
    prompt=st.lists(st.integers(0, 2), max_size=3),
    output=st.lists(st.integers(0, 2), max_size=5),
    candidates=st.sampled_from([2, 8, 1024]),
)
def test_distribution(
    x: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int], candidates: int
) -> None:
    expected = reference_distribution(reference_logits(x, params, prompt, output, eos=0), params)
    row = SamplingRow(params, prompt, seed=0)
    for token in output:
        row.append(token)
    shares = np.array([p for _, p in expected])
    middles = np.minimum(np.cumsum(shares) - shares / 2, 1 - 2.0**-53)
    u = [*middles, 0.0, 1 - 2.0**-53]
    logits = torch.from_numpy(x).repeat(len(u), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "CANDIDATES", candidates)
        got = sample(logits, [row] * len(u), u)
    allowed = {token for token, _ in expected}
    assert set(got) <= allowed
    # The middle of each token's stretch of the CDF gives that token.
    for token, (wanted, p) in zip(got, expected, strict=False):
        if p > NEAR:
            assert token == wanted


@settings(deadline=None, max_examples=60)
@given(
    x=logits_of(min_size=64, max_size=200),
    top_k=st.integers(2, 70),
    top_p=share(0.0),
    by_count=st.booleans(),
    width=st.sampled_from([4, 16, 63]),
)
def test_candidates_give_what_the_whole_vocabulary_gives(
    x: np.ndarray, top_k: int, top_p: float, by_count: bool, width: int
) -> None:
    logits = torch.from_numpy(x)[None].repeat(50, 1)
    vocab = logits.shape[1]
    draws = Draws(
        logits.max(dim=1).values,
        torch.ones(50),
        torch.full((50,), min(top_k, vocab) if by_count else vocab),
        torch.full((50,), top_p, dtype=torch.float64),
        torch.zeros(50),
        torch.linspace(0, 1 - 1e-9, 50, dtype=torch.float64),
    )
    quick = draw_filtered(logits, draws, width, by_count)
    full = draw_filtered(logits, draws, vocab, by_count)
    assert bool((full >= 0).all())
    decided = quick != UNDECIDED
    assert torch.equal(quick[decided], full[decided])
    ranked = np.sort(x)[::-1]
    if by_count and top_k < width and ranked[top_k - 1] > ranked[width - 1]:
        assert bool(decided.all())


@settings(deadline=None, max_examples=40)
@given(data=st.data(), params=st.lists(params_of, min_size=2, max_size=9))
def test_tokens_do_not_depend_on_the_batch(data: Any, params: list[SamplingParams]) -> None:
    vocab = 1500
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = torch.from_numpy(rng.normal(scale=2.0, size=(len(params), vocab))).float()
    rows = [SamplingRow(p, [1, 2, 3], seed=p.seed or 0, index=int(rng.integers(3))) for p in params]
    for row in rows:
        for token in rng.integers(vocab, size=rng.integers(6)):
            row.append(int(token))
    order = data.draw(st.permutations(range(len(params))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "CANDIDATES", 32)
        alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
        together = sample(logits[list(order)], [rows[i] for i in order])
    assert together == [alone[i] for i in order]


def test_seed_index_and_position_choose_the_number() -> None:
    seeds, indices, positions = (
        a.ravel().astype(np.uint64)
        for a in np.meshgrid(np.arange(40), np.arange(5), np.arange(200))
    )
    u = uniforms(seeds, indices, positions)
    assert u.dtype == np.float64
    assert len(np.unique(u)) == len(u)
    assert u.min() >= 0.0
    assert u.max() < 1.0
    # 40,000 numbers: the mean and the share of each tenth are within five standard deviations.
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(u))
    tenths = np.bincount((u * 10).astype(int), minlength=10)
    assert np.abs(tenths - len(u) / 10).max() < 5 * math.sqrt(len(u) * 0.09)
    grid = u.reshape(5, 40, 200)
    for axis in range(3):
        a, b = np.split(np.moveaxis(grid, axis, 0), [1])[0], np.moveaxis(grid, axis, 0)[1:2]
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.2
    assert uniforms(seeds[7:8], indices[7:8], positions[7:8])[0] == u[7]


def test_hash_is_splitmix64() -> None:
    state, outputs = np.zeros(1, dtype=np.uint64), []
    for _ in range(3):  # the published outputs for seed 0
        outputs.append(int(mix(state)[0]))
        state = state + np.uint64(0x9E3779B97F4A7C15)
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_derived_seeds() -> None:
    seeds = {derive_seed(engine, number) for engine in range(30) for number in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed(3, 4) == derive_seed(3, 4)
    for engine, number in ((0, 0), (3, 4), (-1, 2**70 + 5), (2**64 - 1, 2**63)):
        first, second = (np.array([x % 2**64], np.uint64) for x in (engine, number))
        assert derive_seed(engine, number) == int(mix(mix(mix(first)) ^ second)[0])


def test_a_request_repeats_with_its_seed() -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(1))

    def tokens(seed: int, index: int = 0) -> list[int]:
        row = SamplingRow(SamplingParams(temperature=1.5), [1], seed=seed, index=index)
        result = []
        for _ in range(20):
            result += sample(logits, [row])
            row.append(result[-1])
        return result

    assert tokens(7) == tokens(7)
    assert tokens(-7) == tokens(-7)
    assert len({tuple(tokens(7)), tuple(tokens(8)), tuple(tokens(7, index=1))}) == 3
    assert len(set(tokens(7))) > 5


@pytest.mark.parametrize("vocab", [5, 512, 1024, 1500, 2048])
def test_best_takes_the_lowest_of_equals(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    x = torch.randint(0, 3, (50, vocab), generator=generator).float()
    x[0] = 1.0
    x[1, :-1] = -math.inf
    value, index = best(x)
    for row in range(len(x)):
        values = x[row].tolist()
        assert value[row] == max(values)
        assert index[row] == values.index(max(values))
    padded = torch.full((50, vocab + 100), 9.0)
    padded[:, :vocab] = x
    assert torch.equal(best(padded[:, :vocab])[1], index)
    x[2, vocab // 2] = math.nan
    assert math.isnan(best(x)[0][2])
    assert sample(x[:1], [SamplingRow(SamplingParams(temperature=0.0), [], seed=0)]) == [0]


@given(
    prompt=st.lists(st.integers(0, 300), max_size=50),
    output=st.lists(st.integers(0, 300), max_size=300),
)
@settings(deadline=None, max_examples=50)
def test_token_counts(prompt: list[int], output: list[int]) -> None:
    counts = TokenCounts(prompt)
    for token in output:
        counts.append(token)
    expected = Counter(output)
    expected.update(dict.fromkeys(prompt, 0))
    assert len(set(counts.tokens.tolist())) == len(counts.tokens)
    assert dict(zip(counts.tokens.tolist(), counts.counts.tolist(), strict=True)) == expected


@settings(deadline=None, max_examples=60)
@given(x=logits_of(min_size=30), count=st.integers(-1, 12), data=st.data())
def test_logprobs(x: np.ndarray, count: int, data: Any) -> None:
    token = data.draw(st.integers(0, len(x) - 1))
    entry = report(torch.from_numpy(x)[None], [token], [count])[0]
    exact = torch.from_numpy(x).double().log_softmax(0)
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    listed = order if count == -1 else order[:count]
    assert next(iter(entry)) == token
    assert list(entry)[1:] == [i for i in listed if i != token]
    for i, value in entry.items():
        assert value.logprob == pytest.approx(float(exact[i]), rel=1e-5, abs=1e-5)
        assert value.rank == order.index(i) + 1


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    rows = [
        SamplingRow(
            SamplingParams(temperature=0.5, logit_bias={3: 50.0}, logprobs=2, top_k=5), [], seed=1
        ),
        SamplingRow(SamplingParams(temperature=0.0), [], seed=1),
        SamplingRow(SamplingParams(temperature=0.0, logprobs=0), [], seed=1),
        SamplingRow(SamplingParams(temperature=2.0, logprobs=-1), [], seed=1),
    ]
    exact = logits.double().log_softmax(1)
    output = Sampler(50)(logits.clone(), rows)
    assert output.token_ids[0] == 3
    first, second, third, fourth = output.logprobs
    assert first is not None
    assert third is not None
    assert fourth is not None
    assert first[3].logprob == pytest.approx(float(exact[0, 3]), abs=1e-5)
    assert first[3].rank == 1 + int((exact[0] > exact[0, 3]).sum())
    assert [value.rank for token, value in first.items() if token != 3] == [1, 2]
    assert second is None
    assert {token: value.rank for token, value in third.items()} == {int(exact[2].argmax()): 1}
    assert len(fourth) == 50


def test_prompt_logprobs() -> None:
    logits = torch.randn(150, 30, generator=torch.Generator().manual_seed(3))
    exact = logits.double().log_softmax(1)
    next_ids = [i % 30 for i in range(150)]
    entries = Sampler(30).prompt_logprobs(logits, next_ids, 1)
    assert len(entries) == 150
    for i, entry in enumerate(entries):
        assert entry[next_ids[i]].logprob == pytest.approx(float(exact[i, next_ids[i]]), abs=1e-5)
        assert entry[int(exact[i].argmax())].rank == 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.9),
        SamplingParams(temperature=0.0, repetition_penalty=1.5),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_name_the_row(params: SamplingParams, bad: float) -> None:
    rows = [SamplingRow(params, [1], seed=0, request_id=f"r{i}") for i in range(3)]
    logits = torch.zeros(3, 2000)
    assert len(sample(logits, rows)) == 3
    logits[1, 1234] = bad
    with pytest.raises(RuntimeError, match=r"request 'r1' at output .* hold NaN or inf"):
        sample(logits, rows)
    logits[1] = -math.inf
    with pytest.raises(RuntimeError, match="request 'r1'"):
        sample(logits, rows)


def test_shapes_and_dtypes() -> None:
    row = SamplingRow(SamplingParams(temperature=0.0, logit_bias={1: 1.0}), [], seed=0)
    padded = torch.zeros(1, 12, dtype=torch.bfloat16)
    padded[0, 11] = 5.0  # a column past the vocabulary
    assert Sampler(10)(padded, [row]).token_ids == [1]
    assert float(padded.sum()) == 5.0  # only float32 logits are overwritten
    with pytest.raises(ValueError, match=r"\[1, at least 10\], got \[1, 9\]"):
        Sampler(10)(torch.zeros(1, 9), [row])
    with pytest.raises(ValueError, match="logits must be"):
        Sampler(10)(torch.zeros(2, 10), [row])


def test_any_temperature_stays_finite() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0] * 300])
    for temperature in (1.1e-5, 1.0, 1e30):
        row = SamplingRow(SamplingParams(temperature=temperature), [], seed=3)
        assert sample(logits, [row])[0] % 3 == 0 or temperature == 1e30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_what_the_cpu_draws() -> None:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(min_p=0.05),
        SamplingParams(top_k=40),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=40, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.1),
        SamplingParams(temperature=3.0, top_p=0.99),
    ]
    rows = [SamplingRow(params[i % len(params)], [1, 2, 3], seed=i) for i in range(280)]
    logits = torch.randn(280, 50000, generator=torch.Generator().manual_seed(4)).bfloat16() * 2
    there = Sampler(50000, (0,))(logits.cuda(), rows).token_ids
    here = Sampler(50000, (0,))(logits, rows).token_ids
    # exp differs in its last bit between the devices: a draw on the very edge may fall over it.
    assert sum(a != b for a, b in zip(here, there, strict=True)) <= 2
