"""SamplingParams, prompts and results: what is refused, and how it is said."""

import copy
import dataclasses
import pickle
import re

import numpy as np
import pytest

from torch_pd.request import CompletionOutput, SamplingParams, parse_prompt, parse_prompts


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.min_p, params.seed, params.max_tokens, params.min_tokens) == (0.0, None, 16, 0)
    assert (params.stop_strings, params.stop_ids, params.logit_bias) == ((), (), None)
    assert params.detokenize
    assert params.skip_special_tokens
    assert not params.ignore_eos
    assert not params.greedy
    assert not params.penalised


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "temperature must be >= 0, got -0.1"),
        ("temperature", float("nan"), "temperature must be a finite number"),
        ("temperature", float("inf"), "finite"),
        ("top_p", 0.0, "top_p must be in (0, 1], got 0.0"),
        ("top_p", 1.5, "(0, 1]"),
        ("top_p", float("nan"), "finite"),
        ("top_k", -2, "top_k must be >= -1, got -2"),
        ("min_p", 1.1, "min_p must be in [0, 1]"),
        ("min_p", -0.1, "[0, 1]"),
        ("n", 0, "n must be in [1, 16384]"),
        ("max_tokens", 0, "max_tokens must be >= 1, got 0"),
        ("min_tokens", -1, "min_tokens must be >= 0"),
        ("min_tokens", 17, "min_tokens must be <= max_tokens=16, got 17"),
        ("presence_penalty", 2.5, "[-2, 2]"),
        ("frequency_penalty", -2.5, "[-2, 2]"),
        ("repetition_penalty", 0.0, "repetition_penalty must be > 0"),
        ("repetition_penalty", 1e-40, "repetition_penalty must be in [1e-06, 1e+06]"),
        ("logprobs", -2, ">= -1"),
        ("prompt_logprobs", -2, ">= -1"),
        ("seed", 2**64, "seed must be in"),
        ("stop", "", "empty string"),
        ("stop", ["a", ""], "empty string"),
        ("stop_token_ids", [3, -1], "stop_token_ids must be >= 0, got -1"),
        ("logit_bias", {3: 101.0}, "logit_bias[3] must be in [-100, 100]"),
        ("logit_bias", {-3: 1.0}, ">= 0, got -3"),
        ("logit_bias", {3: float("nan")}, "logit_bias[3] must be a finite number"),
    ],
)
def test_value_out_of_range(field: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", True),
        ("n", 1.0),
        ("n", "1"),
        ("n", None),
        ("temperature", "0.7"),
        ("temperature", True),
        ("temperature", None),
        ("top_k", 1.5),
        ("max_tokens", False),
        ("seed", 1.0),
        ("ignore_eos", 1),
        ("detokenize", None),
        ("stop", 3),
        ("stop", [3]),
        ("stop_token_ids", 3),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [1.0]),
        ("logit_bias", [1.0]),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {3: "1"}),
        ("logprobs", True),
    ],
)
def test_wrong_type(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=field):
        SamplingParams(**{field: value})


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=0.5)
    with pytest.raises(TypeError, match="'best_of'; give n, with logprobs"):
        SamplingParams(best_of=2)
    with pytest.raises(TypeError, match="'stop_str'; valid names: n, temperature"):
        SamplingParams(stop_str="x")


def test_contradictions() -> None:
    with pytest.raises(ValueError, match="detokenize=True"):
        SamplingParams(stop="x", detokenize=False)
    with pytest.raises(ValueError, match="n must be 1 with greedy"):
        SamplingParams(n=2, temperature=0.0)
    assert SamplingParams(min_tokens=17, max_tokens=None).min_tokens == 17


def test_normal_forms() -> None:
    params = SamplingParams(
        stop="x", stop_token_ids=[1, np.int64(2)], seed=-1, logit_bias={1: 2}, temperature=1
    )
    assert params.stop_strings == ("x",)
    assert params.stop_ids == (1, 2)
    assert params.seed is None
    assert isinstance(params.temperature, float)
    assert params.logit_bias == {1: 2.0}
    assert SamplingParams(stop=["x", "y"]).stop_strings == ("x", "y")
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert SamplingParams(**{name: 0.5}).penalised


def test_copies() -> None:
    params = SamplingParams(stop=["x"], top_k=3, logit_bias={1: 2.0})
    assert pickle.loads(pickle.dumps(params)) == params
    assert copy.deepcopy(params) == params
    assert dataclasses.replace(params, top_k=4).top_k == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


def test_vocabulary() -> None:
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1.0}, logprobs=10).check_vocabulary(10)
    for params, words in (
        (SamplingParams(stop_token_ids=[10]), "stop_token_ids names token 10"),
        (SamplingParams(logit_bias={10: 1.0}), "logit_bias names token 10"),
        (SamplingParams(logprobs=11), "logprobs must be at most the vocabulary's 10"),
    ):
        with pytest.raises(ValueError, match=words):
            params.check_vocabulary(10)
    parse_prompt([9]).check_vocabulary(10)
    parse_prompt("text").check_vocabulary(10)
    with pytest.raises(ValueError, match="holds 10, but the vocabulary has 10 tokens"):
        parse_prompt([3, 10]).check_vocabulary(10)


def test_prompt_forms() -> None:
    assert (parse_prompt("a").text, parse_prompt("a").token_ids) == ("a", None)
    assert parse_prompt([1, np.int32(2)]).token_ids == [1, 2]
    assert parse_prompt({"prompt": "a"}).text == "a"
    both = parse_prompt({"prompt": "a", "prompt_token_ids": [5]})
    assert (both.text, both.token_ids) == ("a", [5])
    ids = [1, 2]
    assert parse_prompt(ids).token_ids is not ids  # the caller may change its list


@pytest.mark.parametrize(
    ("prompt", "kind", "words"),
    [
        ([], ValueError, "no tokens"),
        ([1, -2], ValueError, "token ids must be >= 0, got -2"),
        ([1, True], TypeError, r"prompt_token_ids\[1\] must be an int, got True"),
        ([1, 2.0], TypeError, "must be an int, got 2.0"),
        (["a"], TypeError, "must be an int, got 'a'"),
        ([np.arange(3)], TypeError, r"prompt_token_ids\[0\] must be an int, got array"),
        ("\ud800", ValueError, "no valid Unicode"),
        (None, TypeError, "NoneType"),
        (3, TypeError, "got int"),
        ({}, ValueError, "needs 'prompt'"),
        ({"prompt": 3}, TypeError, "'prompt' must be a string"),
        ({"text": "a"}, ValueError, "no key 'text'"),
        ({"prompt_token_ids": "12"}, TypeError, "must be a list"),
        ({"prompt_token_ids": []}, ValueError, "no tokens"),
    ],
)
def test_bad_prompt(prompt: object, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        parse_prompt(prompt)


def test_lists_of_prompts() -> None:
    assert len(parse_prompts("a")) == 1
    assert len(parse_prompts({"prompt": "a"})) == 1
    assert [p.token_ids for p in parse_prompts([1, 2])] == [[1, 2]]
    assert [p.token_ids for p in parse_prompts([[1, 2], [3]])] == [[1, 2], [3]]
    assert [p.text for p in parse_prompts(["a", {"prompt": "b"}])] == ["a", "b"]
    assert [p.text for p in parse_prompts(["a", ""])] == ["a", ""]
    with pytest.raises(TypeError, match="prompt 1: "):
        parse_prompts(["a", 3])
    with pytest.raises(ValueError, match="the list is empty"):
        parse_prompts([])


def test_completion_is_finished() -> None:
    assert not CompletionOutput(0, "", []).finished()
    assert CompletionOutput(0, "", [], finish_reason="length").finished()
