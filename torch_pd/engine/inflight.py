"""InFlight: a request under way and what has come out of it."""

import time
from dataclasses import dataclass

from torch_pd.engine.detokenizer import Detokenizer
from torch_pd.engine.sampling_row import SamplingRow
from torch_pd.engine.sequence import Sequence
from torch_pd.request import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)


@dataclass(frozen=True, slots=True)
class Request:
    """A checked prompt and its parameters."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams


class Output:
    """One of the n outputs of a running request."""

    __slots__ = ("detokenizer", "index", "logprobs", "reason", "row", "stop_reason", "total")

    def __init__(self, index: int, row: SamplingRow, detokenizer: Detokenizer | None):
        self.index = index
        self.row = row
        self.detokenizer = detokenizer
        self.logprobs: list[dict[int, Logprob]] = []
        self.total = 0.0
        self.reason: str | None = None
        self.stop_reason: int | str | None = None

    def append(
        self, token: int, params: SamplingParams, eos_token_ids: tuple[int, ...], *, full: bool
    ) -> None:
        """Records a token; sets ``reason`` if the output ends with it.

        Args:
            full: the sequence is at its length limit.
        """
        self.row.append(token)
        enough = self.row.position >= params.min_tokens
        if enough and token in params.stop_ids:
            self.reason, self.stop_reason = "stop", token
        elif enough and not params.ignore_eos and token in eos_token_ids:
            self.reason = "stop"
        elif self.detokenizer is not None:
            stop = self.detokenizer.append([token], check_stop=enough)
            if stop is not None:
                self.reason, self.stop_reason = "stop", stop
        if self.reason is None and full:
            self.reason = "length"
        if self.reason is not None and self.detokenizer is not None:
            self.detokenizer.finish()


class InFlight:
    """A request under way."""

    __slots__ = (
        "arrival",
        "first_token",
        "num_cached",
        "outputs",
        "prompt_logprobs",
        "request",
        "seed",
        "sequences",
        "stream",
        "unfinished",
    )

    def __init__(self, request: Request, seed: int, stream: bool):
        self.request = request
        self.seed = seed
        self.stream = stream
        self.arrival = time.monotonic()
        self.first_token: float | None = None
        self.num_cached: int | None = None
        self.unfinished = request.params.n
        self.sequences: list[Sequence] = []
        self.outputs: list[Output] = []
        wanted = request.params.prompt_logprobs is not None
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = [None] if wanted else None

    def begin(self, num_cached: int) -> bool:
        """Notes that a token has come; True if it is the first."""
        if self.first_token is not None:
            return False
        self.first_token = time.monotonic()
        self.num_cached = num_cached
        return True

    def report(self) -> RequestOutput:
        """The outputs so far, or the final ones."""
        request, finished = self.request, self.unfinished == 0
        outputs = []
        for output, sequence in zip(self.outputs, self.sequences, strict=True):
            asked = request.params.logprobs is not None
            outputs.append(
                CompletionOutput(
                    index=output.index,
                    text=output.detokenizer.text if output.detokenizer is not None else "",
                    token_ids=sequence.token_ids[sequence.num_prompt :],
                    cumulative_logprob=output.total if asked else None,
                    logprobs=list(output.logprobs) if asked else None,
                    finish_reason=output.reason,
                    stop_reason=output.stop_reason,
                )
            )
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=outputs,
            finished=finished,
            metrics=RequestMetrics(
                arrival_time=self.arrival,
                first_token_time=self.first_token,
                finished_time=time.monotonic() if finished else None,
            ),
            num_cached_tokens=self.num_cached,
        )
