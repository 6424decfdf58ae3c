"""Sampler: chooses the next token of every sequence from its logits.

The order is vLLM V1's: raw log-probabilities (for reporting), logit_bias, min_tokens, penalties;
then greedy rows take the best token, and the others go through temperature, min_p, top_k, top_p and
the draw. On a GPU `ops.adjust_logits` and `ops.sample` do the work, with the same results.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_pd import ops
from torch_pd.engine.draw import UNDECIDED, Draws, best, draw, draw_filtered, uniforms
from torch_pd.engine.logprobs import report
from torch_pd.engine.sampling_row import SamplingRow, bad_logits
from torch_pd.request import Logprob

CANDIDATES = 1024
"""Tokens that top_p looks at before it sorts the whole vocabulary."""
SLICE = 64
"""Rows handled at once where a whole sorted vocabulary is held for each."""


@dataclass(slots=True)
class SamplerOutput:
    """The chosen tokens of one step."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]
    """For each row that asked: the chosen token first, then the best ones; else None."""


class Sampler:
    """Samples rows of logits.

    Args:
        vocab_size: tokens that may be chosen; further columns of the logits are padding.
        eos_token_ids: tokens that end a text; forbidden, with stop_token_ids, before min_tokens.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int] = ()):
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)

    def __call__(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        positions: Sequence[int] | None = None,
    ) -> SamplerOutput:
        """Chooses one token for each row; waits for the device.

        Args:
            logits: [n, V >= vocab_size]; overwritten if float32.
            rows: n rows; the caller appends the tokens to them.
            positions: output tokens of each row before this one, if some are not appended yet.

        Raises:
            RuntimeError: a row of logits holds NaN or +inf, or nothing but -inf.
        """
        if positions is None:
            positions = [row.position for row in rows]
        if not logits.is_cuda:
            return self._choose(self._checked(logits, len(rows)), rows, positions)
        result = SamplerOutput([], [])
        self._check(logits, len(rows))
        for start in range(0, len(rows), SLICE):  # bounds the float32 copies
            part = slice(start, start + SLICE)
            some = self._choose(logits[part, : self.vocab_size], rows[part], positions[part])
            result.token_ids += some.token_ids
            result.logprobs += some.logprobs
        return result

    def _choose(
        self, logits: Tensor, rows: Sequence[SamplingRow], positions: Sequence[int]
    ) -> SamplerOutput:
        reported = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        raw = logits[_index(reported, logits)].float() if reported else None
        drawn: list[_Group] = []
        if logits.is_cuda:
            tokens = self._choose_on_gpu(logits, rows, positions).tolist()
        elif all(row.plain for row in rows):
            peak, chosen = best(logits)
            tokens = torch.where(peak.isfinite(), chosen, -1).tolist()
        else:
            self._bias(logits, rows)
            self._forbid_stops(logits, rows, positions)
            _penalise(logits, rows)
            peak, chosen = best(logits)
            drawn = _groups(logits, peak, rows, positions)
            for part in drawn:
                chosen[part.index] = part.first()
            tokens = torch.where(peak.isfinite(), chosen, -1).tolist()
        for token, row in zip(tokens, rows, strict=True):
            if token == -1:
                raise RuntimeError(bad_logits(row))
        for part in drawn:
            part.finish(tokens)
        logprobs: list[dict[int, Logprob] | None] = [None] * len(rows)
        if raw is not None:
            counts = [rows[i].params.logprobs or 0 for i in reported]
            reports = report(raw, [tokens[i] for i in reported], counts)
            for i, entry in zip(reported, reports, strict=True):
                logprobs[i] = entry
        return SamplerOutput(tokens, logprobs)

    def _choose_on_gpu(
        self, logits: Tensor, rows: Sequence[SamplingRow], positions: Sequence[int]
    ) -> Tensor:
        """The tokens int64 [n] on the device, -1 for a row of bad logits."""
        device = logits.device
        adjustments = self.adjustments(rows, positions)
        if adjustments is not None:
            logits = adjustments.apply(logits)
        params = [row.params for row in rows]
        settings = np.array([[p.temperature, p.top_p, p.min_p] for p in params])
        vocab = self.vocab_size
        top_k = [p.top_k if 0 < p.top_k < vocab else 0 for p in params]
        seeds = np.array([row.seed for row in rows], np.uint64).view(np.int64)
        keys = np.stack([top_k, seeds, [row.index for row in rows], np.asarray(positions)], axis=1)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
        ops.sample(
            logits,
            tokens,
            torch.from_numpy(settings).to(device),
            torch.from_numpy(keys.astype(np.int64)).to(device),
        )
        return tokens

    def adjustments(
        self, rows: Sequence[SamplingRow], positions: Sequence[int]
    ) -> "Adjustments | None":
        """Biases, forbidden stop tokens and penalties of the rows; None if there are none."""
        entries: list[np.ndarray] = []
        biases: list[np.ndarray] = []
        for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
            bias = dict(row.params.logit_bias or {})
            if position < row.params.min_tokens:
                bias |= dict.fromkeys((*self.eos_token_ids, *row.params.stop_ids), float("-inf"))
            tokens, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
            if row.counts is not None:
                tokens, counts = row.counts.tokens, row.counts.counts
            places = {token: row.counts.place(token) if row.counts else -1 for token in bias}
            more = [token for token, place in places.items() if place < 0]
            size = len(tokens) + len(more)
            if not size:
                continue
            values = np.zeros(size, np.float32)
            for token, place in places.items():
                values[place if place >= 0 else len(tokens) + more.index(token)] = bias[token]
            ids = np.concatenate((tokens, np.array(more, np.int64)))
            times = np.concatenate((counts, np.full(len(more), -1)))
            entries.append(np.stack((np.full(size, i), ids, times), axis=1))
            biases.append(values)
        if not entries:
            return None
        penalties = [
            (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
            for p in (row.params for row in rows)
        ]
        return Adjustments(
            np.concatenate(entries).astype(np.int32),
            np.concatenate(biases),
            np.array(penalties, np.float32),
        )

    def prompt_logprobs(
        self, logits: Tensor, next_ids: Sequence[int], count: int
    ) -> list[dict[int, Logprob]]:
        """Log-probabilities of prompt tokens: ``logits [T, V]`` at T prompt positions, ``next_ids``
        the T tokens that follow them, ``count`` best tokens beside each (-1: all)."""
        self._check(logits, len(next_ids))
        result = []
        for start in range(0, len(next_ids), SLICE):
            part = slice(start, start + SLICE)
            ids = next_ids[part]
            result += report(logits[part, : self.vocab_size].float(), ids, [count] * len(ids))
        return result

    def _check(self, logits: Tensor, num_rows: int) -> None:
        if logits.dim() != 2 or logits.shape[0] != num_rows or logits.shape[1] < self.vocab_size:
            raise ValueError(
                f"logits must be [{num_rows}, at least {self.vocab_size}], got {list(logits.shape)}"
            )

    def _checked(self, logits: Tensor, num_rows: int) -> Tensor:
        self._check(logits, num_rows)
        return logits[:, : self.vocab_size].float()

    def _bias(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        entries = [
            (i, token, bias)
            for i, row in enumerate(rows)
            if row.params.logit_bias
            for token, bias in row.params.logit_bias.items()
        ]
        if entries:
            row_ids, tokens, bias = zip(*entries, strict=True)
            at = (_index(row_ids, logits), _index(tokens, logits))
            logits[at] += torch.tensor(bias, dtype=torch.float32, device=logits.device)

    def _forbid_stops(
        self, logits: Tensor, rows: Sequence[SamplingRow], positions: Sequence[int]
    ) -> None:
        entries = [
            (i, token)
            for i, row in enumerate(rows)
            if positions[i] < row.params.min_tokens
            for token in (*self.eos_token_ids, *row.params.stop_ids)
        ]
        if entries:
            row_ids, tokens = zip(*entries, strict=True)
            logits[_index(row_ids, logits), _index(tokens, logits)] = float("-inf")


@dataclass(slots=True)
class Adjustments:
    """What `ops.adjust_logits` takes, still on the host."""

    entries: np.ndarray
    """int32 [E, 3]: row, token, occurrences (-1: no penalties)."""
    bias: np.ndarray
    """float32 [E]."""
    penalties: np.ndarray
    """float32 [n, 3]: repetition, frequency, presence."""

    def apply(self, logits: Tensor) -> Tensor:
        """The adjusted logits, a float32 copy."""
        adjusted = logits.to(torch.float32, copy=True)
        columns = (self.entries, self.bias, self.penalties)
        ops.adjust_logits(adjusted, *(torch.from_numpy(x).to(logits.device) for x in columns))
        return adjusted


@dataclass(slots=True)
class _Group:
    """Rows that are drawn in one way: from all tokens, by top_k (and top_p), or by top_p alone."""

    way: int
    rows: list[int]
    index: Tensor
    x: Tensor
    """[m, V] logits of the rows."""
    draws: Draws
    width: int

    def first(self) -> Tensor:
        """The tokens [m], `UNDECIDED` where ``width`` candidates were too few."""
        if self.way == _ALL:
            return draw(self.x, self.draws)
        return draw_filtered(self.x, self.draws, self.width, self.way == _TOP_K)

    def finish(self, tokens: list[int]) -> None:
        """Draws the undecided rows again, from all tokens, into ``tokens``."""
        missing = [place for place, row in enumerate(self.rows) if tokens[row] == UNDECIDED]
        for start in range(0, len(missing), SLICE):
            places = missing[start : start + SLICE]
            at = _index(places, self.x)
            x = self.x[at]
            final = draw_filtered(x, self.draws.take(at), x.shape[1], self.way == _TOP_K)
            for place, token in zip(places, final.tolist(), strict=True):
                tokens[self.rows[place]] = token


_ALL, _TOP_K, _TOP_P = range(3)


def _groups(
    logits: Tensor, peak: Tensor, rows: Sequence[SamplingRow], positions: Sequence[int]
) -> list[_Group]:
    """The rows that are not greedy, by the way they are drawn."""
    vocab = logits.shape[1]
    members: tuple[list[int], ...] = ([], [], [])
    for i, row in enumerate(rows):
        params = row.params
        if params.greedy or params.top_k == 1:
            continue
        if 0 < params.top_k < vocab:
            members[_TOP_K].append(i)
        else:
            members[_TOP_P if params.top_p < 1.0 else _ALL].append(i)
    result = []
    for way, chosen in enumerate(members):
        if not chosen:
            continue
        index = _index(chosen, logits)
        whole = len(chosen) == len(rows)
        of = [rows[i] for i in chosen]
        at = [positions[i] for i in chosen]
        draws = _draws(peak if whole else peak[index], of, at, vocab)
        width = CANDIDATES
        if way == _TOP_K:
            # Some beyond the largest top_k, for values equal to the last one kept.
            width = min(width, 2 * max(row.params.top_k for row in of) + 32)
        x = logits if whole else logits[index]
        result.append(_Group(way, chosen, index, x, draws, min(width, vocab)))
    return result


def _draws(
    peak: Tensor, rows: Sequence[SamplingRow], positions: Sequence[int], vocab: int
) -> Draws:
    u = uniforms(
        np.array([row.seed for row in rows], dtype=np.uint64),
        np.array([row.index for row in rows], dtype=np.uint64),
        np.array(positions, dtype=np.uint64),
    )
    # All float64, so that one copy carries them to the device.
    columns = np.array(
        [
            [row.params.temperature for row in rows],
            [row.params.top_k if 0 < row.params.top_k < vocab else vocab for row in rows],
            [row.params.top_p for row in rows],
            [row.params.min_p for row in rows],
            u,
        ]
    )
    temperature, top_k, top_p, min_p, u_there = torch.from_numpy(columns).to(peak.device)
    return Draws(peak, temperature.float(), top_k.long(), top_p, min_p.float(), u_there)


def _penalise(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Repetition, frequency and presence penalties, on the tokens that occur."""
    lists = [(i, row.params, row.counts) for i, row in enumerate(rows) if row.counts is not None]
    if not lists:
        return
    sizes = [len(counts.tokens) for _, _, counts in lists]
    entries = np.stack(
        [
            np.repeat([i for i, _, _ in lists], sizes),
            np.concatenate([counts.tokens for _, _, counts in lists]),
            np.concatenate([counts.counts for _, _, counts in lists]),
            np.repeat(np.arange(len(lists)), sizes),
        ]
    )
    penalties = [
        (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for _, p, _ in lists
    ]
    row_ids, tokens, counts, place = torch.from_numpy(entries).to(logits.device)
    table = torch.tensor(penalties, dtype=torch.float32, device=logits.device)
    repetition, frequency, presence = table[place].T
    values = logits[row_ids, tokens]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts - presence * (counts > 0)
    logits[row_ids, tokens] = values


def _index(ids: Sequence[int], like: Tensor) -> Tensor:
    """int64 tensor of ``ids`` on the device of ``like``."""
    return torch.tensor(ids, dtype=torch.int64, device=like.device)
