"""LLM: offline generation with one call."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from torch_pd.config import EngineConfig
from torch_pd.engine.engine import Engine, resolve_device
from torch_pd.engine.inflight import Request
from torch_pd.request import Prompt, RequestOutput, SamplingParams, parse_prompts
from torch_pd.weights.loader import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Params = SamplingParams | Sequence[SamplingParams] | None
PromptInput = str | Sequence[int] | Mapping[str, Any]


class LLM:
    """A model with its paged KV cache, ready to generate.

    Args:
        model: a folder (config.json and safetensors), a GGUF file, or a Hugging Face causal LM,
            patched already or not. A module is patched in place and restored by `shutdown`.
        tokenizer: a Hugging Face tokenizer or its folder; default: the one beside the model.
        **config: fields of `EngineConfig`.

    Raises:
        ValueError: a setting or the model cannot work; says what to change.
        TypeError: an unknown setting, or one of the wrong type.
    """

    def __init__(
        self,
        model: "str | Path | PreTrainedModel",
        *,
        tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
        **config: Any,
    ):
        self._engine: Engine | None = None
        self.config = EngineConfig.from_kwargs(**config)
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            named = tokenizer
            tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)
            if tokenizer is None and named is not None:
                raise ValueError(f"{str(named)!r} holds no tokenizer")
        self.tokenizer = tokenizer
        device = resolve_device(self.config)
        loaded = load_model(
            model,
            dtype=self.config.dtype,
            load_format=self.config.load_format,
            device=device,
            seed=self.config.seed,
        )
        self._engine = Engine(loaded, tokenizer, self.config)

    @property
    def engine(self) -> Engine:
        """The engine underneath.

        Raises:
            RuntimeError: after `shutdown`.
        """
        if self._engine is None:
            raise RuntimeError("this LLM has been shut down; make a new one")
        return self._engine

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
        with _Progress(len(requests), use_tqdm) as progress:
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
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Like `generate` for one conversation (a list of messages) or a list of conversations."""
        return self.generate(
            self.chat_prompts(
                messages, chat_template=chat_template, add_generation_prompt=add_generation_prompt
            ),
            sampling_params,
            use_tqdm,
        )

    def chat_prompts(
        self,
        messages: Sequence[Any],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[dict[str, Any]]:
        """The prompts that the tokenizer's chat template makes of conversations."""
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer: give tokenizer=..., or a folder with one")
        if chat_template is None and self.tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template: give chat_template=...")
        if not messages:
            raise ValueError("messages is empty")
        conversations = [messages] if isinstance(messages[0], dict) else messages
        prompts = []
        for i, conversation in enumerate(conversations):
            for message in conversation:
                if not isinstance(message, dict) or "role" not in message:
                    raise ValueError(
                        f"conversation {i}: a message is a dict with 'role' and 'content', got "
                        f"{message!r}"
                    )
            text = self.tokenizer.apply_chat_template(
                list(conversation),
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return prompts

    def stats(self) -> dict[str, Any]:
        """Counters since the start: tokens, steps, preemptions, KV use, prefix cache hits."""
        return self.engine.stats()

    def shutdown(self) -> None:
        """Frees the KV pages and restores a module that was given. Calling it twice is fine."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

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
        else:
            params = list(sampling_params)
            if len(params) != len(parsed):
                raise ValueError(
                    f"{len(params)} sampling_params for {len(parsed)} prompts; give one for each, "
                    "or a single one for all"
                )
        call = self.engine.next_call()
        requests = []
        for i, (prompt, param) in enumerate(zip(parsed, params, strict=True)):
            try:
                if not isinstance(param, SamplingParams):
                    raise TypeError(f"sampling_params must be SamplingParams, got {param!r}")
                request = Request(f"{call}-{i}", prompt.text, self._token_ids(prompt), param)
                self.engine.check(request)
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
        engine = self.engine
        pending = set()
        try:
            for request in requests:
                engine.add(request, stream=stream)
                pending.add(request.request_id)
            while pending:
                for output in engine.step():
                    if output.finished:
                        pending.discard(output.request_id)
                    yield output
        finally:
            # An error, or a caller that left the loop: nothing of this call stays behind.
            for request_id in pending:
                engine.abort(request_id)


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
