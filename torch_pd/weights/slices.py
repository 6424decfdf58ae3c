"""Slice: a part of a tensor by name, and the memory it goes to; Filler: what can fill slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Rows and columns of one stored tensor, seen as a matrix: all but the last dimension are rows.

    A vector is one row, a scalar one value.
    """

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    rows: tuple[int, int]
    cols: tuple[int, int]
    target: Tensor
    """[rows, columns] of any strides, dtype and device: written."""

    @classmethod
    def whole(cls, name: str, target: Tensor) -> "Slice":
        """All of a tensor into ``target``, which is contiguous and has its shape."""
        cols = target.shape[-1] if target.dim() else 1
        matrix = target.detach().view(-1, cols) if cols else target.detach().view(0, 0)
        return cls(name, tuple(target.shape), (0, matrix.shape[0]), (0, cols), matrix)


class Filler(Protocol):
    """Where the values of weights come from."""

    def fill(self, slices: Sequence[Slice]) -> None:
        """Writes the targets; all of it is done when this returns."""
