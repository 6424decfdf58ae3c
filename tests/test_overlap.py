"""Overlapped steps: the engine's tokens are those of steps that are waited for one by one."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from torch_pd import LLM, SamplingParams
from torch_pd.engine.inflight import Request
from torch_pd.engine.lockstep import CommonStep
from torch_pd.engine.runner import empty_plan

VOCAB = 61
PAGE = 2 * 2 * 16 * 1 * 8 * 4  # bytes


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def make(model, overlap, pages=24, **config):
    llm = LLM(model, kv_cache_gib=(pages + 0.5) * PAGE / 2**30, max_model_len=96, **config)
    llm.engine.overlap = overlap
    return llm


def params_of(rng):
    """Greedy or drawn, with what ends outputs early, and what needs the host."""
    common = {
        "max_tokens": rng.randint(1, 30),
        "ignore_eos": rng.random() < 0.5,
        "stop_token_ids": rng.sample(range(3, VOCAB), rng.choice([0, 3, 12])),
    }
    kind = rng.randrange(6)
    if kind == 0:
        return SamplingParams(temperature=0.0, **common)
    if kind == 1:
        return SamplingParams(n=rng.randint(1, 3), seed=rng.randrange(99), **common)
    if kind == 2:
        return SamplingParams(top_k=5, top_p=0.9, seed=3, repetition_penalty=1.3, **common)
    if kind == 3:
        return SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=1, **common)
    if kind == 4:
        least = min(3, common["max_tokens"])
        return SamplingParams(n=2, seed=7, min_tokens=least, logit_bias={5: 2.0}, **common)
    return SamplingParams(temperature=0.7, presence_penalty=0.5, seed=1, **common)


def run(llm, seed, count, aborts):
    """Requests arriving over time, some aborted; all outputs by request."""
    rng = random.Random(seed)
    engine = llm.engine
    todo = []
    for i in range(count):
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 50))]
        if i % 3 == 2:
            prompt = todo[-1].prompt_token_ids[:20] + prompt[:10]
        todo.append(Request(f"r{i}", None, prompt, params_of(rng)))
    results, arrivals = {}, random.Random(seed + 1)
    victims = {request.request_id for request in todo if rng.random() < aborts}
    while todo or engine.has_unfinished:
        while todo and (arrivals.random() < 0.4 or not engine.has_unfinished):
            request = todo.pop(0)
            engine.limits.check(request)
            engine.add(request)
        for victim in list(victims):
            if arrivals.random() < 0.1:
                engine.abort(victim)
        for output in engine.step():
            results[output.request_id] = [
                (choice.token_ids, choice.finish_reason, choice.logprobs)
                for choice in output.outputs
            ]
    assert engine.stats()["kv_pages_used"] == 0
    engine.scheduler.check()
    return results, victims


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pages=st.sampled_from([7, 10, 24]),
    max_num_seqs=st.sampled_from([1, 3, 8]),
    max_num_batched_tokens=st.sampled_from([1, 5, 64]),
    enable_prefix_caching=st.booleans(),
    aborts=st.sampled_from([0.0, 0.3]),
)
def test_overlapped_steps_draw_the_same_tokens(model, seed, aborts, pages, **config):
    runs = []
    for overlap in (False, True):
        with make(model, overlap, pages, **config) as llm:
            runs.append(run(llm, seed, 7, aborts))
    (one, victims), (other, _) = runs
    for request_id in one.keys() & other.keys():
        assert one[request_id] == other[request_id]
    # Who finishes before its abort comes depends on the number of steps.
    assert one.keys() ^ other.keys() <= victims


def test_stats_tell_what_was_waited_for_and_wasted(model):
    stopping = SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=list(range(3, VOCAB)))
    plain = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with make(model, True) as llm:
        llm.generate([[5, 6]], plain, use_tqdm=False)
        stats = llm.stats()
        assert (stats["steps"], stats["wasted_rows"], stats["synchronous_steps"]) == (5, 0, 0)
        llm.generate([[5, 6]], stopping, use_tqdm=False)
        assert llm.stats()["wasted_rows"] == 1
        llm.generate([[5, 6]], SamplingParams(logprobs=1, max_tokens=4), use_tqdm=False)
        assert llm.stats()["synchronous_steps"] == 4


def test_an_empty_step_between_others_changes_nothing(model):
    """Ranks in lockstep run every step of the others, some with no rows of their own."""
    prompts = [[5, 6, 7], [8]]
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with make(model, True) as llm:
        expected = llm.generate(prompts, greedy, use_tqdm=False)
    with make(model, True) as llm:
        engine = llm.engine
        launch = engine.runner.launch
        nothing = CommonStep(tokens=(0,), selected=(0,), decoding=True)

        def with_empty_steps(plan, **kwargs):
            assert engine.runner.wait(launch(empty_plan(), common=nothing)) == ([], None)
            return launch(plan, **kwargs)

        engine.runner.launch = with_empty_steps
        engine.overlap = False  # an empty step must not come before the tokens under way are read
        found = llm.generate(prompts, greedy, use_tqdm=False)
    for a, b in zip(found, expected, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids


def test_the_log_says_every_ten_seconds_what_was_done(model, caplog, monkeypatch):
    monkeypatch.setattr("torch_pd.engine.report.LOG_SECONDS", 0.0)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with make(model, True) as llm, caplog.at_level("INFO", logger="torch_pd"):
        llm.generate([[5, 6, 7]], greedy, use_tqdm=False)
    lines = [line for line in caplog.messages if "output tok/s, " in line]
    assert len(lines) >= 4
    assert "1 running, 0 waiting, KV" in lines[0]
    assert "device idle" in lines[0]
