"""Sampling parameters, prompts and results: plain data, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch_pd.config import as_float, as_int, check_fields, check_names, option

GREEDY_BELOW = 1e-5
"""A temperature under this is greedy, as in vLLM."""

_BEAMS = "for beams call generate(num_beams=...) of a model after torch_pd.patch_model(model)"
_GUIDED = "outputs cannot be held to a grammar here"
_BIASES = "give logit_bias={token: -100} for every token that must not come"
_ELSEWHERE = {
    "best_of": "give n, with logprobs=0, and choose by cumulative_logprob",
    "use_beam_search": _BEAMS,
    "num_beams": _BEAMS,
    "guided_decoding": _GUIDED,
    "structured_outputs": _GUIDED,
    "response_format": _GUIDED,
    "logits_processors": "give logit_bias, or use generate of a model after patch_model",
    "bad_words": _BIASES,
    "allowed_token_ids": _BIASES,
    "include_stop_str_in_output": "leave it out: stop_reason of an output is the stop string",
    "truncate_prompt_tokens": "cut the prompt's token ids",
    "max_new_tokens": "did you mean 'max_tokens'?",
    "max_length": "did you mean 'max_tokens'? (it counts new tokens alone)",
    "do_sample": "temperature=0 is greedy, any other samples",
    "num_return_sequences": "did you mean 'n'?",
    "eos_token_id": "did you mean 'stop_token_ids'?",
}
"""Parameters of vLLM and transformers, and what stands for them here."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen; names, meanings and defaults are vLLM's.

    Lists are stored as tuples, one stop string as a tuple of one, and seed=-1 as None.

    Raises:
        ValueError: a value is out of range or contradicts another; the message says what is
            allowed.
        TypeError: a value of the wrong type, or an unknown name (with the closest valid one).
    """

    n: int = option(1, "completions of each prompt", bounds="[1, 16384]")
    temperature: float = option(1.0, "0 is greedy", bounds="[0, inf)")
    top_p: float = option(1.0, "share of the probability to draw from", bounds="(0, 1]")
    top_k: int = option(0, "best tokens to draw from; 0 or -1: all", bounds="[-1, inf)")
    min_p: float = option(0.0, "least probability, as a share of the best token's", bounds="[0, 1]")
    seed: int | None = option(
        None, "of the random draws", bounds="[-9223372036854775808, 18446744073709551615]"
    )
    max_tokens: int | None = option(
        16, "longest output; None: up to max_model_len", bounds="[1, inf)"
    )
    min_tokens: int = option(0, "tokens before end of text or a stop", bounds="[0, inf)")
    stop: str | Sequence[str] | None = option(None, "strings that end the output")
    stop_token_ids: Sequence[int] | None = option(None, "tokens that end the output")
    ignore_eos: bool = option(False, "go on after the end-of-text token")
    presence_penalty: float = option(0.0, "subtracted from tokens in the output", bounds="[-2, 2]")
    frequency_penalty: float = option(
        0.0, "subtracted per occurrence in the output", bounds="[-2, 2]"
    )
    repetition_penalty: float = option(
        1.0, "divides the logits of tokens in prompt or output; 1e-6 to 1e6", bounds="(0, inf)"
    )
    logprobs: int | None = option(
        None, "best tokens to report at each step; -1: all", bounds="[-1, inf)"
    )
    prompt_logprobs: int | None = option(None, "the same at each prompt token", bounds="[-1, inf)")
    logit_bias: Mapping[int, float] | None = option(None, "added to the logits, -100 to 100")
    detokenize: bool = option(True, "make text of the tokens")
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")

    def __new__(cls, *args: Any, **kwargs: Any) -> "SamplingParams":
        check_names(cls.__name__, cls.__dataclass_fields__, kwargs, _ELSEWHERE)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise ValueError(
                "repetition_penalty must be in [1e-06, 1e+06], or logits overflow; got "
                f"{self.repetition_penalty}"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be <= max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        if self.stop and not self.detokenize:
            raise ValueError(f"stop={list(self.stop)} needs detokenize=True: it is found in text")
        if self.greedy and self.n > 1:
            raise ValueError(
                f"n must be 1 with greedy sampling (temperature={self.temperature}), got {self.n}: "
                "all outputs would be equal"
            )

    @property
    def greedy(self) -> bool:
        """True if every token is simply the best one."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """True if a presence, frequency or repetition penalty is set."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as it is stored."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """``stop_token_ids`` as it is stored."""
        assert isinstance(self.stop_token_ids, tuple)
        return self.stop_token_ids

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if a token id or a count named here is past the vocabulary."""
        for name, ids in (("stop_token_ids", self.stop_ids), ("logit_bias", self.logit_bias or ())):
            past = [token for token in ids if token >= vocab_size]
            if past:
                raise ValueError(
                    f"{name} names token {past[0]}, but the vocabulary has {vocab_size} tokens"
                )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count > vocab_size:
                raise ValueError(
                    f"{name} must be at most the vocabulary's {vocab_size} tokens (-1: all), "
                    f"got {count}"
                )


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, list | tuple):
        raise TypeError(f"stop must be a string or a list of strings, got {stop!r}")
    for text in stop:
        if not isinstance(text, str):
            raise TypeError(f"stop must hold strings, got {text!r} ({type(text).__name__})")
        if not text:
            raise ValueError("stop must not hold an empty string: it would match everywhere")
    return tuple(stop)


def _stop_ids(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, list | tuple):
        raise TypeError(f"stop_token_ids must be a list of ints, got {ids!r}")
    result = tuple(as_int(f"stop_token_ids[{i}]", token) for i, token in enumerate(ids))
    if result and min(result) < 0:
        raise ValueError(f"stop_token_ids must be >= 0, got {min(result)}")
    return result


def _biases(bias: Any) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias must be a dict of token id to bias, got {bias!r}")
    result = {
        as_int("a token of logit_bias", token): as_float(f"logit_bias[{token!r}]", value)
        for token, value in bias.items()
    }
    for token, value in result.items():
        if token < 0:
            raise ValueError(f"a token of logit_bias must be >= 0, got {token}")
        if not -100.0 <= value <= 100.0:
            raise ValueError(f"logit_bias[{token}] must be in [-100, 100], got {value}")
    return result


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its text, its token ids, or both (the ids count, the text is reported)."""

    text: str | None
    token_ids: list[int] | None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if a token id is past the vocabulary."""
        if self.token_ids is not None and max(self.token_ids) >= vocab_size:
            raise ValueError(
                f"prompt_token_ids holds {max(self.token_ids)}, but the vocabulary has "
                f"{vocab_size} tokens (0 to {vocab_size - 1})"
            )


def parse_prompt(prompt: Any) -> Prompt:
    """Reads one prompt: a string, a list of token ids, or a dict with ``prompt`` and / or
    ``prompt_token_ids``. An empty string stands for the tokens that begin every text, if any.

    Raises:
        TypeError: another type, or token ids that are not ints.
        ValueError: an empty prompt, a negative token id, an unknown or missing key.
    """
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is no valid Unicode text: {error}") from None
        return Prompt(prompt, None)
    if isinstance(prompt, list | tuple):
        return Prompt(None, _prompt_ids(prompt))
    if not isinstance(prompt, Mapping):
        raise TypeError(
            "a prompt must be a string, a list of token ids, or a dict with 'prompt' or "
            f"'prompt_token_ids'; got {type(prompt).__name__}"
        )
    unknown = [key for key in prompt if key not in ("prompt", "prompt_token_ids")]
    if unknown:
        raise ValueError(
            f"a prompt dict has no key {unknown[0]!r}; allowed are 'prompt' and 'prompt_token_ids'"
        )
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and token_ids is None:
        raise ValueError("a prompt dict needs 'prompt' (a string) or 'prompt_token_ids' (a list)")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"'prompt' must be a string, got {type(text).__name__}")
    if token_ids is None:
        return parse_prompt(text)
    if not isinstance(token_ids, list | tuple):
        raise TypeError(f"'prompt_token_ids' must be a list, got {type(token_ids).__name__}")
    return Prompt(text, _prompt_ids(token_ids))


def parse_prompts(prompts: Any) -> list[Prompt]:
    """Reads one prompt or a list of them; a list of ints is one prompt.

    Raises:
        TypeError, ValueError: as `parse_prompt`, with the prompt's place in the list.
    """
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, list | tuple):
        return [parse_prompt(prompts)]
    if not prompts:
        raise ValueError("no prompts: the list is empty")
    if not isinstance(prompts[0], str | Mapping | list | tuple):
        return [parse_prompt(prompts)]
    result = []
    for index, prompt in enumerate(prompts):
        try:
            result.append(parse_prompt(prompt))
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompt {index}: {error}") from None
    return result


def _prompt_ids(ids: Sequence[Any]) -> list[int]:
    if not ids:
        raise ValueError("the prompt has no tokens; give at least one token id")
    if set(map(type, ids)) == {int}:  # the usual case, at the speed of C
        result = list(ids)
    else:
        result = [as_int(f"prompt_token_ids[{i}]", token) for i, token in enumerate(ids)]
    if min(result) < 0:
        raise ValueError(f"token ids must be >= 0, got {min(result)}")
    return result


@dataclass(slots=True)
class Logprob:
    """The log-probability of a token by the model's own logits, before any sampling parameter."""

    logprob: float
    rank: int
    """1 for the best token."""
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` outputs of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Sum over ``token_ids``, None unless logprobs were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token of ``token_ids``: token id to Logprob, the chosen token always among them."""
    finish_reason: str | None = None
    """"stop" (end of text or a stop), "length", "abort", or None while it runs."""
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it; None for end of text."""

    def finished(self) -> bool:
        """True if no more tokens will come."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When a request passed its stations, in seconds of `time.monotonic`."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request and its outputs, final or (while streaming) so far."""

    request_id: str
    prompt: str | None
    """None if token ids were given without text."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """For each prompt token (None for the first), if asked for."""
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens whose KV pages were found in the prefix cache."""
