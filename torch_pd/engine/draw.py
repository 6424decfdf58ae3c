"""Drawing tokens from logits: filters, inverse CDF, counter-based random numbers.

Every row is drawn on its own: its token depends on its logits, its parameters and its uniform
number, never on the rows beside it or on which of the paths below was taken. ``n`` rows, ``V``
tokens of the vocabulary. Nothing here waits for the device.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 512
"""Tokens of a block in two-level searches over the vocabulary."""
UNDECIDED = -2
"""`draw_filtered` could not tell from its candidates; ask again with width V."""

_MASK = (1 << 64) - 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(state: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 on uint64: advance by the golden gamma, then scramble.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014
    (the scrambler is Stafford's variant 13).
    """
    with np.errstate(over="ignore"):
        state = state + _GAMMA
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def uniforms(seeds: np.ndarray, indices: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) for each (seed, index of the sequence in n, position), all uint64 [n].

    A hash of the three, so that a draw needs no state and no order.
    """
    return (mix(mix(mix(seeds) ^ indices) ^ positions) >> np.uint64(11)) * 2.0**-53


def derive_seed(engine_seed: int, request_number: int) -> int:
    """The seed of a request without one of its own, from the engine's and a running number."""
    return _mix_one(_mix_one(_mix_one(engine_seed & _MASK)) ^ request_number & _MASK)


def _mix_one(state: int) -> int:
    """`mix` of one number, for which numpy takes twenty times as long."""
    state = state + int(_GAMMA) & _MASK
    state = (state ^ state >> 30) * int(_MIX_1) & _MASK
    state = (state ^ state >> 27) * int(_MIX_2) & _MASK
    return state ^ state >> 31


def best(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value and its index (the lowest one among equals) of each row of ``x [n, V]``.

    A row with NaN gives NaN. In two levels: torch's plain maximum is vectorised on the CPU, its
    maximum with index is not and takes eight times as long.
    """
    vocab = x.shape[1]
    blocks = vocab // BLOCK
    if blocks < 2:
        value, index = x.max(dim=1)
        return value, index
    tops = x[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(dim=2)
    if vocab > blocks * BLOCK:
        tops = torch.cat((tops, x[:, blocks * BLOCK :].amax(dim=1, keepdim=True)), dim=1)
    value, block = tops.max(dim=1)
    values, index = _block_of(x, block, float("-inf"))
    return value, index[:, 0] + values.argmax(dim=1)


def _block_of(x: Tensor, block: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """Values and indices [n, BLOCK] of one block of each row; past the end, ``fill``."""
    index = block[:, None] * BLOCK + torch.arange(BLOCK, device=x.device)
    past = index >= x.shape[1]
    return x.gather(1, index.masked_fill(past, 0)).masked_fill(past, fill), index


def ranked(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """``width`` best values and token ids of ``x [n, V]`` in canonical order: by falling value,
    equals by rising id.

    With width < V the order is canonical among those returned, but of the values equal to the last
    one any ids may have been taken (torch.topk promises none).
    """
    if width >= x.shape[1]:
        values, ids = x.sort(dim=1, descending=True, stable=True)
        return values, ids
    ids = x.topk(width, dim=1, sorted=False).indices.sort(dim=1).values
    values, order = x.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


class Draws(NamedTuple):
    """How each of n rows is drawn."""

    peak: Tensor
    """float32 [n], the row's largest logit, finite."""
    temperature: Tensor
    """float32 [n]."""
    top_k: Tensor
    """int64 [n], V where off."""
    top_p: Tensor
    """float64 [n], 1 where off."""
    min_p: Tensor
    """float32 [n]."""
    u: Tensor
    """float64 [n] in [0, 1)."""

    def take(self, rows: Tensor) -> "Draws":
        """Some of the rows."""
        return Draws(*(column[rows] for column in self))


def draw(x: Tensor, draws: Draws) -> Tensor:
    """Draws one token of each row from all that min_p leaves; top_k and top_p are not looked at.

    The inverse CDF runs in the order of token ids, over blocks first, so nothing is sorted.
    ``x`` are logits float32 [n, V], overwritten. Returns token ids int64 [n].
    """
    weights = _weights(x, draws, inplace=True)
    vocab = x.shape[1]
    blocks = vocab // BLOCK
    mass = weights[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).sum(dim=2)
    if vocab > blocks * BLOCK:
        mass = torch.cat((mass, weights[:, blocks * BLOCK :].sum(dim=1, keepdim=True)), dim=1)
    block, rest = _invert(mass.double(), draws.u)
    values, index = _block_of(weights, block, 0.0)
    place, _ = _invert(values.double(), rest)
    return index.gather(1, place[:, None])[:, 0]


def draw_filtered(x: Tensor, draws: Draws, width: int, by_count: bool) -> Tensor:
    """Draws one token of each row after min_p, then top_k, then top_p over what those leave.

    top_k keeps exactly k tokens (of equals the lowest ids); top_p keeps the fewest best tokens
    whose mass reaches top_p. The inverse CDF runs over those left in the order of token ids, as in
    `draw` and in ops.sample.

    Args:
        x: logits float32 [n, V], left as they are.
        width: candidates to look at, at most V. `UNDECIDED` is returned for a row whose filters
            reach past them (never with V).
        by_count: True if top_k is on in every row, False if in none.

    Returns:
        Token ids int64 [n].
    """
    values, ids = ranked(x, width)
    mass = _weights(values, draws).double()
    total = mass.cumsum(dim=1)
    if by_count:
        whole = total.gather(1, draws.top_k.clamp(max=width)[:, None] - 1)[:, 0]
    else:
        whole = _weights(x, draws).sum(dim=1, dtype=torch.float64)
    # A token stays while the mass before it has not reached top_p; without top_p, rounding must
    # not cut the last one off.
    goal = torch.where(draws.top_p < 1.0, draws.top_p * whole, torch.inf)
    kept = torch.minimum(((total - mass) < goal[:, None]).sum(dim=1), (mass > 0).sum(dim=1))
    kept = torch.minimum(kept, draws.top_k).clamp(min=1)
    inside = torch.arange(width, device=x.device) < kept[:, None]
    ids, order = ids.masked_fill(~inside, x.shape[1]).sort(dim=1)
    place, _ = _invert(mass.masked_fill(~inside, 0.0).gather(1, order), draws.u)
    token = ids.gather(1, place[:, None])[:, 0]
    if width == x.shape[1]:
        return token
    # The candidates are enough if the last one lies beyond the filters, and the last one kept is
    # not one of several equals of which others, with lower ids, may have been left out.
    last = values.gather(1, kept[:, None] - 1)[:, 0]
    enough = (kept < width) & (last > values[:, -1])
    if by_count:
        enough &= draws.top_k < width
    return torch.where(enough, token, UNDECIDED)


def _weights(x: Tensor, draws: Draws, inplace: bool = False) -> Tensor:
    """exp((x - peak) / temperature), 1 for the best token and 0 under min_p. Subtracting first
    keeps any temperature from overflowing."""
    x = x.sub_(draws.peak[:, None]) if inplace else x - draws.peak[:, None]
    x = x.div_(draws.temperature[:, None]).exp_()
    return x.masked_fill_(x < draws.min_p[:, None], 0.0)


def _invert(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF over ``mass`` float64 [n, m]: the place where the share ``u [n]`` of the whole is
    passed, and how far into that place it lies [n], in [0, 1). A place of no mass is never taken.
    """
    total = mass.cumsum(dim=1)
    target = u * total[:, -1]
    # Rounding up to the whole would run past the last place with mass.
    target = torch.minimum(target, torch.nextafter(total[:, -1], torch.zeros_like(target)))
    place = (total <= target[:, None]).sum(dim=1)
    here = mass.gather(1, place[:, None])[:, 0]
    before = total.gather(1, place[:, None])[:, 0] - here
    rest = ((target - before) / here).clamp(0.0, 1.0 - 2.0**-53)
    return place, rest
