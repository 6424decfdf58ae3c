"""Where whole matrices come from while a rank runs a step by itself."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from torch_pd.weights.layout import LINEARS
from torch_pd.weights.pool import WeightPool


class Source(Protocol):
    """Whole matrices ``[out, in]`` of a pool group, merged ones in shard-block order.

    A step asks for them in the order of use: `embed`, then qkv, o, gate_up, down of each layer,
    then `head_tiles`.
    """

    def acquire(self, layer: int, linear: str) -> Tensor:
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
    """

    def __init__(self, pools: Sequence[WeightPool]) -> None:
        layout = pools[0].layout

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

    def acquire(self, layer: int, linear: str) -> Tensor:
        """See `Source`."""
        return self._linears[layer, linear]

    def release(self, layer: int, linear: str) -> None:
        """See `Source`."""

    def embed(self, ids: Tensor) -> Tensor:
        """See `Source`."""
        return torch.nn.functional.embedding(ids, self._embedding)

    def head_tiles(self) -> Iterator[Tensor]:
        """See `Source`."""
        yield self._head
