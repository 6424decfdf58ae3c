"""Where whole matrices come from while a rank runs a step by itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torch_pd.weights.layout import LINEARS, Piece
from torch_pd.weights.pool import WeightPool


@dataclass(frozen=True)
class Matrix:
    """A matrix ``[out, in]`` in one part or several, which lie in different places."""

    parts: tuple[Tensor, ...]
    """In order; together they are all rows, or all columns."""
    axis: int = 0
    """0: each part has some of the rows; 1: some of the columns."""

    def join(self) -> Tensor:
        """A copy in one piece."""
        return torch.cat(self.parts, self.axis)


def split_around(others: Tensor, own: Tensor | None, start: int, axis: int) -> Matrix:
    """The matrix whose rows (columns, if ``axis`` is 1) from ``start`` on are ``own`` and whose
    other ones are ``others``."""
    if own is None:
        return Matrix((others,))
    sides = others.narrow(axis, 0, start), others.narrow(axis, start, others.shape[axis] - start)
    parts = (sides[0], own, sides[1])
    return Matrix(tuple(part for part in parts if part.shape[axis]), axis)


class Source(Protocol):
    """Whole matrices ``[out, in]`` of a pool group, merged ones in shard-block order.

    A step asks for them in the order of use: `embed`, then qkv, o, gate_up, down of each layer,
    then `head_tiles`.
    """

    def acquire(self, layer: int, linear: str) -> Matrix:
        """A matrix of a layer (`layout.LINEARS`), ready on the current stream until `release`."""
        ...

    def release(self, layer: int, linear: str) -> None:
        """What was launched on the current stream is the last use of the matrix."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Rows ``[T, C]`` of the embedding for ``ids [T]``."""
        ...

    def head_tiles(self) -> Iterator[Tensor]:
        """lm_head in tiles ``[rows, C]``, in order; each is valid until the next is asked for."""
        ...


class Resident:
    """The whole matrices, kept here.

    Args:
        pools: of all ranks of the group in order. One alone is used as it lies; several are joined,
            as in a check of a split against its parts.
        index: of a rank; the matrices are in the parts in which that one streams them. GEMMs of
            other parts may round otherwise.
    """

    def __init__(self, pools: Sequence[WeightPool], index: int | None = None) -> None:
        layout = pools[0].layout
        self._layout, self._index = layout, index

        def join(parts: list[Tensor], linear: str) -> Tensor:
            return parts[0] if len(parts) == 1 else torch.cat(parts, int(linear in ("o", "down")))

        self._linears = {
            (layer, linear): join([getattr(pool.layers[layer], linear) for pool in pools], linear)
            for layer in range(layout.dims.num_layers)
            for linear in LINEARS
        }
        self._head = join([pool.lm_head for pool in pools], "lm_head")
        self._embedding = self._head
        if not layout.dims.tied:
            self._embedding = join([pool.embedding for pool in pools], "embedding")

    def acquire(self, layer: int, linear: str) -> Matrix:
        """See `Source`."""
        matrix = self._linears[layer, linear]
        if self._index is None:
            return Matrix((matrix,))
        piece = self._layout.pieces(linear, layer)[self._index]
        return _apart(matrix, piece)

    def release(self, layer: int, linear: str) -> None:
        """See `Source`."""

    def embed(self, ids: Tensor) -> Tensor:
        """See `Source`."""
        return torch.nn.functional.embedding(ids, self._embedding)

    def head_tiles(self) -> Iterator[Tensor]:
        """See `Source`."""
        yield self._head


def _apart(matrix: Tensor, piece: Piece) -> Matrix:
    """The matrix cut before and behind a rank's piece, each part contiguous but for those of the
    other ranks' columns, which a ring holds side by side."""
    axis = int(piece.rows == (0, matrix.shape[0]))
    start, stop = (piece.rows, piece.cols)[axis]
    if not piece.nbytes:
        return Matrix((matrix,))
    size = matrix.shape[axis] - (stop - start)
    others = matrix.narrow(axis, 0, start), matrix.narrow(axis, stop, size - start)
    own = matrix.narrow(axis, start, stop - start).contiguous()
    return split_around(torch.cat(others, axis), own, start, axis)
