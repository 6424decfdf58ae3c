"""Halving: whether a decoding step of parameter ranks and data ranks apart runs in two halves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch_pd.costs import Costs, Machine, Step
from torch_pd.engine.plan import Plan
from torch_pd.engine.shape import shape_of
from torch_pd.nn.pooled import shared_of

if TYPE_CHECKING:
    from torch import nn

MARGIN = 1.03
"""One batch takes longer by more than this where halves are worth their kernels."""


class Halving:
    """Two half-batches that take turns (nn/halves.py) keep both kinds of ranks busy, but the
    weights are read twice: they pay where attention takes about as long as one reading.

    Every data rank looks at its own sequences and says in its vote what it would rather have; one
    suffices, as all wait for the rank that attends longest.

    Args:
        costs: of the ranks that step together.
        graph: steps are replayed from CUDA graphs.
    """

    def __init__(self, costs: Costs, graph: bool) -> None:
        self.costs, self._graph = costs, graph

    def wants(self, plan: Plan) -> bool:
        """Whether the plan of a decoding step should run in halves."""
        return self.pays(len(plan.seqs), int((plan.starts + plan.counts).sum()))

    def pays(self, rows: int, kv_tokens: int) -> bool:
        """Whether a step is faster in halves.

        Args:
            rows: of every data rank.
            kv_tokens: that they attend to.
        """
        if rows < 2:
            return False
        step = Step(rows, rows, kv_tokens, graph=self._graph)
        return self.costs.ship(step) > MARGIN * self.costs.halved(step)


def find_halving(
    model: "nn.Module", serving: Sequence[bool], kv_token_bytes: int, graph: bool
) -> Halving | None:
    """None if the ranks with weights are those with sequences, or nothing is shipped.

    Args:
        model: pooled, or not.
        serving: of the ranks that step together, which have sequences.
        kv_token_bytes: of one token's keys and values.
    """
    shared = shared_of(model)
    if shared is None or shared.exchange is None or all(serving):
        return None
    owners = set()
    for split in shared.weights.split:
        owners |= {rank for rank, heads in enumerate(split.kv_heads) if heads}
        owners |= {rank for rank, width in enumerate(split.mlp) if width}
    if any(serving[rank] for rank in owners):
        return None
    shape = shape_of(model, shared.weights.dtype.itemsize)
    costs = Costs(
        shape,
        Machine(),
        len(owners),
        kv_token_bytes,
        data_ranks=sum(serving),
        whole=shared.weights.layout.whole,
    )
    return Halving(costs, graph)
