"""SamplingRow: what the sampler needs to know of one running sequence."""

from collections.abc import Iterable, Sequence

import numpy as np

from torch_pd.request import SamplingParams


class TokenCounts:
    """The distinct tokens of one sequence and how often each is in its output, kept token by token
    so that penalties never count anew."""

    def __init__(self, prompt_ids: Iterable[int] = ()):
        self._place = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self._size = len(self._place)
        capacity = self._size + 64
        self._tokens = np.zeros(capacity, dtype=np.int64)
        self._tokens[: self._size] = list(self._place)
        self._counts = np.zeros(capacity, dtype=np.int64)

    def append(self, token: int) -> None:
        """Counts one more output token."""
        place = self._place.setdefault(token, self._size)
        if place == self._size:
            if self._size == len(self._tokens):
                self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._tokens[place] = token
            self._size += 1
        self._counts[place] += 1

    def place(self, token: int) -> int:
        """Where ``tokens`` holds a token, -1 if it does not."""
        return self._place.get(token, -1)

    @property
    def tokens(self) -> np.ndarray:
        """int64 [m], each token once."""
        return self._tokens[: self._size]

    @property
    def counts(self) -> np.ndarray:
        """int64 [m], 0 for tokens that only the prompt has."""
        return self._counts[: self._size]


class SamplingRow:
    """What the sampler needs to know of one running sequence; lives as long as the sequence.

    Args:
        params: of the request; ids in it lie inside the vocabulary (`check_vocabulary`).
        prompt_ids: token ids of the prompt.
        seed: of the request, its own or `draw.derive_seed`.
        index: which of the request's n sequences this is.
        request_id: named in errors.
    """

    __slots__ = ("counts", "index", "params", "plain", "position", "request_id", "seed")

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        seed: int,
        index: int = 0,
        request_id: str = "",
    ):
        self.params = params
        self.seed = seed & (1 << 64) - 1
        self.index = index
        self.request_id = request_id
        self.position = 0
        """Output tokens so far."""
        self.counts: TokenCounts | None = None
        if params.penalised:
            # Presence and frequency look at the output only.
            self.counts = TokenCounts(prompt_ids if params.repetition_penalty != 1.0 else ())
        self.plain = (
            (params.greedy or params.top_k == 1)
            and self.counts is None
            and not params.logit_bias
            and params.min_tokens == 0
            and params.logprobs is None
        )
        """True if the best token of the raw logits is all that is wanted."""

    @property
    def adjusted(self) -> bool:
        """True if some logits are changed before the choice, in a way known ahead."""
        return bool(self.params.logit_bias) or self.params.min_tokens > 0

    @property
    def on_host(self) -> bool:
        """True if every token must be known before the next one can be drawn, or log-probabilities
        are wanted."""
        return self.counts is not None or self.params.logprobs is not None

    def append(self, token: int) -> None:
        """Tells the row its next output token."""
        self.position += 1
        if self.counts is not None:
            self.counts.append(token)


def bad_logits(row: SamplingRow) -> str:
    """The message for a row whose logits allow no choice."""
    return (
        f"the logits of request {row.request_id!r} at output token {row.position} hold NaN or "
        "infinity, or allow no token"
    )
