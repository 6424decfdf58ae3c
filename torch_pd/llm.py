"""LLM: offline generation with one call."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from torch_pd.board import GroupError
from torch_pd.config import EngineConfig
from torch_pd.dist import launched_by_torchrun
from torch_pd.engine.device import resolve_device, uncollected, warming
from torch_pd.engine.inflight import Request
from torch_pd.engine.limits import Limits
from torch_pd.request import Prompt, RequestOutput, SamplingParams, parse_prompt, parse_prompts
from torch_pd.weights.loader import load_tokenizer, resolve_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from torch_pd.engine.engine import Engine
    from torch_pd.engine.group import Runs

Params = SamplingParams | Sequence[SamplingParams] | None
PromptInput = str | Sequence[int] | Mapping[str, Any]


class LLM:
    """A model with its paged KV cache, ready to generate.

    Args:
        model: a folder (config.json and safetensors), a GGUF file, or a Hugging Face causal LM,
            patched already or not. A module is patched in place and restored by `shutdown`.
        tokenizer: a Hugging Face tokenizer or its folder; default: the one beside the model.
        **config: fields of `EngineConfig`.

    With data_parallel_size=N, this process starts N ranks with an engine each and coordinates them.
    Under torchrun, every rank makes an LLM and calls it alike; all get all results.

    Raises:
        ValueError: a setting or the model cannot work; says what to change.
        TypeError: an unknown setting, or one of the wrong type.
        GroupError: (also of every other call) a rank died or failed; the LLM is shut down then.
    """

    def __init__(
        self,
        model: "str | Path | PreTrainedModel",
        *,
        tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
        **config: Any,
    ):
        self._runs: Runs | None = None
        self._ended = "this LLM has been shut down; make a new one"
        self._num_calls = 0
        self.config = EngineConfig.from_kwargs(**config)
        with uncollected():
            self._start(model, tokenizer, config)

    def _start(self, model: Any, tokenizer: Any, config: dict[str, Any]) -> None:
        device = resolve_device(self.config)
        alone = not launched_by_torchrun() and self.config.data_parallel_size == 1
        # What follows imports transformers, which takes seconds.
        with warming(device if alone else "cpu"):
            from torch_pd.engine import joined, spawned, worker
            from torch_pd.engine.group import Single

            named, tokenizer = tokenizer, self._find_tokenizer(model, tokenizer)
        self.tokenizer = tokenizer
        if launched_by_torchrun():
            given = "data_parallel_size" in config
            self._runs = joined.Joined(model, tokenizer, self.config, given, device)
            return
        self.config.check_ranks(self.config.data_parallel_size)
        if self.config.data_parallel_size == 1:
            self._runs = Single(worker.make_engine(model, tokenizer, self.config, device, None))
            return
        if not isinstance(model, (str, Path)):
            raise ValueError(
                f"data_parallel_size={self.config.data_parallel_size} starts processes that read "
                f"the model themselves: give a folder or a .gguf file, not a {type(model).__name__}"
            )
        path = Path(model).expanduser()
        resolve_format(path, self.config.load_format)
        if named is None and tokenizer is not None:
            tokenizer = path
        elif isinstance(named, (str, Path)):
            tokenizer = Path(named)
        self._runs = spawned.Spawned(path, tokenizer, self.config, device)

    @staticmethod
    def _find_tokenizer(model: Any, tokenizer: Any) -> "PreTrainedTokenizerBase | None":
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            found = load_tokenizer(model if tokenizer is None else tokenizer)
            if found is None and tokenizer is not None:
                raise ValueError(f"{str(tokenizer)!r} holds no tokenizer")
            return found
        if not (callable(tokenizer) and hasattr(tokenizer, "decode")):
            raise TypeError(
                "tokenizer must be a Hugging Face tokenizer or its folder, got "
                f"{type(tokenizer).__name__}"
            )
        return tokenizer

    @property
    def engine(self) -> "Engine":
        """The engine of this process.

        Raises:
            RuntimeError: after `shutdown`, or where the engines are in processes of their own.
        """
        runs = self._running()
        if runs.engine is None:
            raise RuntimeError(
                "with data_parallel_size > 1 the engines are in the ranks' processes (a rank that "
                "only lends memory has none); see stats()"
            )
        return runs.engine

    def get_tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """``tokenizer``, by vLLM's name for it."""
        return self.tokenizer

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks that were started (data_parallel_size > 1); else none."""
        return self._running().pids

    @property
    def limits(self) -> Limits:
        """Vocabulary, longest sequence and size of the KV pool."""
        with self._ending():
            return self._running().limits

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Shuts down if the group of ranks has ended."""
        try:
            yield
        except GroupError as error:
            self._ended = f"this LLM has ended, make a new one: {error}"
            self.shutdown()
            raise

    def _running(self) -> "Runs":
        if self._runs is None:
            raise RuntimeError(self._ended)
        return self._runs

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: Params = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generates for every prompt; results in the order of the prompts.

        Args:
            prompts: one prompt or a list. A prompt is a string, a list of token ids, or a dict
                with ``prompt`` or ``prompt_token_ids``.
            sampling_params: one for all, or one for each prompt. Default: `SamplingParams()`.
            use_tqdm: show a progress bar with prompt and output tokens per second.

        Raises:
            ValueError: a prompt or parameter that cannot work, named by its place in the list.
                All are checked before the first runs, so nothing is lost.
        """
        requests = self._parse(prompts, sampling_params)
        finished: dict[str, RequestOutput] = {}
        show = use_tqdm and self._running().first_rank
        with _Progress(len(requests), show) as progress:
            for output in self._run(requests, stream=False):
                finished[output.request_id] = output
                progress.show(output)
        return [finished[request.request_id] for request in requests]

    def stream(
        self, prompts: PromptInput | Sequence[PromptInput], sampling_params: Params = None
    ) -> Iterator[RequestOutput]:
        """Yields a request's output each time it grew: texts so far, ``finished`` on the last one.

        Outputs of several prompts come interleaved; ``request_id`` is the prompt's place in the
        list as a string of digits after the last dash. Leaving the loop early drops what is
        unfinished.
        """
        return self._run(self._parse(prompts, sampling_params), stream=True)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Like `generate` for one conversation (a list of messages) or a list of conversations.

        Args:
            **template: see `chat_prompts`.
        """
        return self.generate(self.chat_prompts(messages, **template), sampling_params, use_tqdm)

    def chat_prompts(
        self,
        messages: Sequence[Any],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """The prompts that the tokenizer's chat template makes of conversations.

        Args:
            chat_template: instead of the tokenizer's own.
            continue_final_message: the last message is left open; give add_generation_prompt=False.
            chat_template_kwargs: what else the template knows, such as ``enable_thinking``.
        """
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer: give tokenizer=..., or a folder with one")
        if chat_template is None and self.tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template: give chat_template=...")
        if not isinstance(messages, (list, tuple)):
            raise TypeError(
                "messages must be a list of messages, or of conversations, got "
                f"{type(messages).__name__}"
            )
        if not messages:
            raise ValueError("messages is empty")

        conversations = [messages] if isinstance(messages[0], dict) else messages
        prompts = []
        for i, conversation in enumerate(conversations):
            if not isinstance(conversation, (list, tuple)) or not conversation:
                raise ValueError(
                    f"conversation {i}: give a list of at least one message, got {conversation!r}"
                )
            for message in conversation:
                if not isinstance(message, dict) or "role" not in message:
                    raise ValueError(
                        f"conversation {i}: a message is a dict with 'role' and 'content', got "
                        f"{message!r}"
                    )
            try:
                text = self.tokenizer.apply_chat_template(
                    list(conversation),
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    tokenize=False,
                    **(chat_template_kwargs or {}),
                )
                parse_prompt(text)  # may it be encoded?
            except Exception as error:  # a template is a program
                raise ValueError(
                    f"conversation {i}: the chat template cannot take it: {error}"
                ) from error
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return prompts

    def reset_prefix_cache(self) -> None:
        """Keys and values of earlier prompts are not used any more.

        New weights of a module that was given are seen by themselves, but for those written through
        ``parameter.data``: call this after them. No call may be under way.
        """
        self.engine.reset_prefix_cache()

    def stats(self) -> dict[str, Any]:
        """Counters since the start: tokens, steps, preemptions, KV use, prefix cache hits.

        With several ranks: sums over all of them (of times, the longest), and under ``ranks`` each
        one's own. Under torchrun all ranks must ask.
        """
        with self._ending():
            return self._running().stats()

    def shutdown(self) -> None:
        """Frees the KV pages and restores a module that was given. Calling it twice is fine."""
        if self._runs is not None:
            runs, self._runs = self._runs, None
            runs.shutdown()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _parse(self, prompts: Any, sampling_params: Params) -> list[Request]:
        """One request for each prompt, all of them checked."""
        if isinstance(prompts, (list, tuple)) and not prompts:
            return []
        parsed = parse_prompts(prompts)
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            params = [sampling_params] * len(parsed)
        elif not isinstance(sampling_params, (list, tuple)):
            raise TypeError(
                "sampling_params must be SamplingParams or a list of them, got "
                f"{sampling_params!r} ({type(sampling_params).__name__})"
            )
        else:
            params = list(sampling_params)
            if len(params) != len(parsed):
                raise ValueError(
                    f"{len(params)} sampling_params for {len(parsed)} prompts; give one for each, "
                    "or a single one for all"
                )
        limits = self.limits
        self._num_calls += 1
        requests = []
        for i, (prompt, param) in enumerate(zip(parsed, params, strict=True)):
            try:
                if not isinstance(param, SamplingParams):
                    raise TypeError(f"sampling_params must be SamplingParams, got {param!r}")
                ids = self._token_ids(prompt)
                request = Request(f"{self._num_calls}-{i}", prompt.text, ids, param)
                limits.check(request)
            except (ValueError, TypeError) as error:
                raise type(error)(f"prompt {i}: {error}") from None
            requests.append(request)
        return requests

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if self.tokenizer is None:
            raise ValueError(
                "a text prompt needs a tokenizer: give tokenizer=..., or prompt_token_ids"
            )
        ids = self.tokenizer(prompt.text).input_ids
        if not ids:
            raise ValueError(f"the tokenizer makes no token of {prompt.text!r}")
        return ids

    def _run(self, requests: list[Request], *, stream: bool) -> Iterator[RequestOutput]:
        with self._ending():
            yield from self._running().run(requests, stream)


class _Progress:
    """A progress bar over requests with token rates."""

    def __init__(self, total: int, enabled: bool):
        self.bar = tqdm(total=total, desc="prompts", disable=not enabled, dynamic_ncols=True)
        self.prompt = self.output = 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def show(self, output: RequestOutput) -> None:
        self.prompt += len(output.prompt_token_ids)
        self.output += sum(len(choice.token_ids) for choice in output.outputs)
        self.bar.update(1)
        seconds = self.bar.format_dict["elapsed"]
        if seconds > 0 and not self.bar.disable:
            self.bar.set_postfix_str(
                f"prompt {self.prompt / seconds:.0f}, output {self.output / seconds:.0f} tok/s"
            )
