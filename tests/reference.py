"""Plain torch references of the ops, in float64 unless said otherwise."""

import torch
from torch import Tensor

PLACE_SHIFT = 28
PAGE_MASK = (1 << PLACE_SHIFT) - 1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Largest error allowed, relative to the largest value of the reference, by dtype of the result."""


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output full of NaN: what an op leaves unwritten shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|; NaN anywhere in ``a`` gives NaN, which fails every ``<``."""
    if b.numel() == 0:
        return 0.0
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).item()


def ref_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [M, K] @ weight [N, K].T + bias [N]``."""
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()
