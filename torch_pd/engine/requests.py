"""Requests: what an engine was asked for and what has come out of it so far."""

from typing import TYPE_CHECKING, Any

from torch_pd.config import as_int
from torch_pd.engine.detokenizer import Detokenizer
from torch_pd.engine.draw import derive_seed
from torch_pd.engine.inflight import InFlight, Output, Request
from torch_pd.engine.sampling_row import SamplingRow
from torch_pd.engine.scheduler import Scheduler
from torch_pd.engine.sequence import Sequence, Status
from torch_pd.request import Logprob, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENOUGH = 32
"""Outputs that must have ended before their mean length tells anything."""


class Requests:
    """Requests under way. Their sequences wait and run in the scheduler.

    Args:
        max_model_len: longest prompt and output together.
        seed: of the requests that have none.
        eos_token_ids: of `eos_token_ids`.
        counts: of the report; tokens are counted there.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        max_model_len: int,
        tokenizer: "PreTrainedTokenizerBase | None",
        seed: int,
        eos_token_ids: tuple[int, ...],
        counts: dict[str, int],
    ):
        self.by_id: dict[str, InFlight] = {}
        self.num_prompt_logprobs = 0
        """Requests that ask for log-probabilities of their prompt."""
        self.space = b""
        """Of the digests of new requests: they find the cached prefixes of the same space alone."""
        self._scheduler, self._max_model_len = scheduler, max_model_len
        self._tokenizer, self._eos_token_ids = tokenizer, eos_token_ids
        self._seed, self._num_added = seed, 0
        self._counts = counts
        self._ended = 0, 0  # outputs, and their tokens
        self._decoded: dict[int, str] = {}

    def __bool__(self) -> bool:
        return bool(self.by_id)

    def add(self, request: Request, stream: bool) -> None:
        """Queues a checked request; see `Engine.add`."""
        if request.request_id in self.by_id:
            raise ValueError(f"request id {request.request_id!r} is in use")
        params, ids = request.params, request.prompt_token_ids
        seed = params.seed
        if seed is None:
            seed = derive_seed(self._seed, self._num_added)
        self._num_added += 1
        running = InFlight(request, seed, stream)
        limit = self._max_model_len
        if params.max_tokens is not None:
            limit = min(limit, len(ids) + params.max_tokens)
        sequence = Sequence(
            request.request_id,
            ids,
            max_total_len=limit,
            expected_len=self._expected_len(params, len(ids), limit),
            no_prefix_lookup=params.prompt_logprobs is not None,
            space=self.space,
        )
        self._new_output(running, sequence)
        self._scheduler.add(sequence)
        self.by_id[request.request_id] = running
        self.num_prompt_logprobs += running.prompt_logprobs is not None

    def _expected_len(self, params: SamplingParams, prompt: int, limit: int) -> int | None:
        """At how many tokens a request will probably end: at its limit if nothing else ends it,
        else after as many as the earlier ones on the average; None while there are few of those."""
        if params.ignore_eos and not params.stop and not params.stop_ids:
            return limit
        outputs, tokens = self._ended
        return None if outputs < ENOUGH else min(limit, prompt + tokens // outputs)

    def _new_output(self, running: InFlight, sequence: Sequence) -> None:
        request = running.request
        row = SamplingRow(
            request.params,
            request.prompt_token_ids,
            seed=running.seed,
            index=len(running.outputs),
            request_id=request.request_id,
        )
        detokenizer = None
        if self._tokenizer is not None and request.params.detokenize:
            detokenizer = Detokenizer(
                self._tokenizer, request.prompt_token_ids, request.params, stream=running.stream
            )
        sequence.data = output = Output(len(running.outputs), row, detokenizer)
        running.outputs.append(output)
        running.sequences.append(sequence)

    def abort(self, request_id: str) -> None:
        """Drops a request with all its outputs; does nothing if it has finished."""
        running = self.by_id.get(request_id)
        if running is not None:
            for sequence in running.sequences:
                self._scheduler.abort(sequence.seq_id)
            self.forget(running)

    def forget(self, running: InFlight) -> None:
        """Of a request whose sequences have all ended."""
        del self.by_id[running.request.request_id]
        self.num_prompt_logprobs -= running.prompt_logprobs is not None

    def advance(
        self, sequence: Sequence, token: int, entry: dict[int, Logprob] | None
    ) -> InFlight | None:
        """Records a new token of a sequence and ends it if it should.

        Returns its request; None if the sequence had ended while the token was under way.
        """
        if sequence.status not in (Status.RUNNING, Status.WAITING):
            self._counts["wasted_rows"] += 1
            return None
        running = self.by_id[sequence.request_id]
        params, output = running.request.params, sequence.data
        self._counts["output_tokens"] += 1
        if running.begin(sequence.num_cached):
            self._counts["prompt_tokens"] += sequence.num_prompt
        if output.row.position == 0 and output.index == 0 and params.n > 1:
            for child in self._scheduler.fork(sequence, params.n - 1):
                self._new_output(running, child)
        if entry is not None:
            output.logprobs.append(self.named(entry))
            output.total += entry[token].logprob
        output.append(token, params, self._eos_token_ids, full=sequence.at_length_limit)
        if output.reason is not None:
            self._scheduler.finish(sequence)
            running.unfinished -= 1
            self._ended = self._ended[0] + 1, self._ended[1] + output.row.position
        return running

    def named(self, entry: dict[int, Logprob]) -> dict[int, Logprob]:
        """The entry with decoded tokens, if there is a tokenizer."""
        if self._tokenizer is None:
            return entry
        for token in entry:
            if token not in self._decoded:
                self._decoded[token] = str(self._tokenizer.decode([token]))
        return {
            token: Logprob(item.logprob, item.rank, self._decoded[token])
            for token, item in entry.items()
        }


def eos_token_ids(model: "PreTrainedModel", tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Tokens that end a text: of the generation config, the model config and the tokenizer. Those
    past the vocabulary (a tokenizer may have more) are left out, since none is ever chosen.

    Raises:
        ValueError: an eos_token_id is neither an int nor a list of them.
    """
    found: list[int] = []
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        listed = ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]
        try:
            found += [as_int("eos_token_id", token) for token in listed]
        except TypeError:
            raise ValueError(
                f"eos_token_id of {type(source).__name__} must be an int or a list of ints, got "
                f"{ids!r}"
            ) from None
    return tuple(token for token in dict.fromkeys(found) if 0 <= token < vocab_size)
