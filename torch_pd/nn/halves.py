"""Halves: a shipped decoding step as two half-batches that take turns, on one stream of each rank.

For parameter ranks and data ranks apart: while the data ranks attend for one half, the parameter
ranks compute linears of the other. A layer of a half is nine steps (`pooled.Steps`): gather, qkv,
to_tokens, to_owners (attention before it), o, scatter_sum, gather, MLP, scatter_sum. The first half
is `LEAD - 1` steps ahead: every step of it is followed by one of the second. With that a
parameter rank always has a linear to compute while a data rank answers for the other half:

    parameter rank   MLP B        o A       qkv B      MLP A        o B       qkv A
    data rank        attention A  norm B    norm A     attention B  norm A    norm B

and between two columns there is an exchange of each half, first to the parameter ranks, then back.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_pd.context import Batch, GroupBatch
from torch_pd.nn.attention import Pass
from torch_pd.nn.block import Flow, FusedBlock, Rotation

if TYPE_CHECKING:
    from torch_pd.nn.pooled import PooledAttention, PooledMLP
    from torch_pd.weights.ship import Exchange

STEPS = 9
"""Of a layer."""
LEAD = 5
"""Of the first half, until the first of the second follows."""

Counts = tuple[tuple[int, ...], tuple[int, ...]]


def halve(rows: Sequence[int], serving: Sequence[bool]) -> Counts | None:
    """``rows`` of the ranks that serve in two halves, None if no rank has two. A rank that does not
    brings none: its row of padding is for the rest of the model alone."""
    rows = [n if serves else 0 for n, serves in zip(rows, serving, strict=True)]
    if max(rows) < 2:
        return None
    return tuple((n + 1) // 2 for n in rows), tuple(n // 2 for n in rows)


@dataclass
class PooledBlock(FusedBlock):
    """A fused block over shared weights, some of whose passes run in halves."""

    attention: "PooledAttention"
    mlp: "PooledMLP"
    halves: "Halves | None" = field(default=None, kw_only=True)

    def __call__(self, hidden: Tensor, rotation: Rotation | None) -> Tensor:
        """As a `FusedBlock`. In halves what it returns stands for both, until the last layer's."""
        if self.halves is None or not self.halves.wanted:
            return super().__call__(hidden, rotation)
        return self.halves.run(self, hidden, rotation)


@dataclass
class _Half:
    """What a half-batch has of its own in the running pass."""

    rows: slice
    """Of this rank's rows."""
    every: Sequence[int]
    """Rows of each rank."""
    batch: Batch
    hidden: Tensor
    flow: Flow
    layers: deque[Generator[None, None, Tensor]] = field(default_factory=deque)
    """That it is in, and that come next."""


class Halves:
    """Runs the layers of shipped passes in halves where `Pass.halves` says how many rows each has.

    Every row computes what it would in one batch.

    Both halves use one stream, and the order of their exchanges is the same on all ranks whatever
    each of them brings. So exchange n is all that a rank can wait for before it comes to exchange
    n + 1, and nothing can lock that could not with one batch.

    Between the first layer and the last transformers hands on a tensor that stands for both halves;
    nothing else may look at it.

    Args:
        running: of the model.
        exchange: among the ranks.
        last: number of the last layer.
    """

    def __init__(self, running: Pass, exchange: "Exchange", last: int) -> None:
        self._running, self._exchange, self._last = running, exchange, last
        self._halves: list[_Half] = []
        self._given: Tensor | None = None
        self._lead = 0

    @property
    def wanted(self) -> bool:
        """Whether the running pass is in halves."""
        return self._running.halves is not None and self._running.mode == "ship"

    def run(self, block: PooledBlock, hidden: Tensor, rotation: Rotation | None) -> Tensor:
        """A layer; see `PooledBlock`. The second half may end it within the next one."""
        layer = block.attention.fused.layer
        running = self._running
        batch, rows = running.batch, running.rows
        if layer == 0:
            self._begin(hidden)
        given = self._given
        if given is None or hidden.data_ptr() != given.data_ptr():
            raise RuntimeError("the model changes hidden states between its layers")
        first, second = self._halves
        for half in (first, second):
            half.layers.append(self._layer(block, half, rotation))
        try:
            for _ in range(STEPS):
                self._advance(first)
                self._lead += 1
                if self._lead >= LEAD:
                    self._advance(second)
            if layer == self._last:
                for half in (first, second):
                    while half.layers:
                        self._advance(half)
        except BaseException:
            self._halves, self._given = [], None
            raise
        finally:
            running.batch, running.rows = batch, rows
        return self._join(block, hidden) if layer == self._last else hidden

    def _begin(self, hidden: Tensor) -> None:
        running = self._running
        batch, _ = running.current()
        assert running.halves is not None
        assert batch.max_query_len == 1
        assert batch.staged is None
        count = [every[self._exchange.rank] for every in running.halves]
        assert sum(count) in (0, batch.num_tokens)
        places = slice(0, count[0]), slice(count[0], sum(count))
        self._halves = [
            _Half(rows, every, _part(batch, rows), hidden[rows], Flow(on=True))
            for rows, every in zip(places, running.halves, strict=True)
        ]
        self._given, self._lead = hidden, 0

    def _layer(
        self, block: PooledBlock, half: _Half, rotation: Rotation | None
    ) -> Generator[None, None, Tensor]:
        hidden, rows, flow = half.hidden, half.rows, half.flow
        turned = None
        if rotation is not None:
            factor = rotation.q_factor
            turned = Rotation(
                rotation.cos[rows], rotation.sin[rows], None if factor is None else factor[rows]
            )
        x, lacking = block.enter(hidden, flow)
        branch = yield from block.attention.steps(self._exchange, x, turned)
        residual, x = block.between(hidden, branch, lacking)
        del branch
        branch = yield from block.mlp.steps(self._exchange, x)
        return block.leave(residual, branch, flow)

    def _advance(self, half: _Half) -> None:
        """A step of a half, if there is one for it yet."""
        self._running.batch, self._running.rows = half.batch, half.every
        while half.layers:
            try:
                next(half.layers[0])
                return
            except StopIteration as end:
                half.hidden = end.value
                half.layers.popleft()

    def _join(self, block: PooledBlock, hidden: Tensor) -> Tensor:
        """What the last layer returns; a row that is in no half is as it came."""
        halves, self._halves, self._given = self._halves, [], None
        if not sum(len(half.hidden) for half in halves):
            return hidden
        scale = halves[0].flow.scale
        branches = [half.flow.take(half.hidden) for half in halves]
        whole = torch.cat([half.hidden for half in halves])
        lacking = [branch for branch in branches if branch is not None]
        return block.flow.give(whole, torch.cat(lacking), scale) if lacking else whole


def _part(batch: Batch, rows: slice) -> Batch:
    """Some sequences of a decoding batch."""
    groups = tuple(
        GroupBatch(block_tables=group.block_tables[rows], slots=group.slots[rows])
        for group in batch.groups
    )
    num = rows.stop - rows.start
    return replace(
        batch,
        num_tokens=num,
        query_start=batch.query_start[: num + 1],
        seq_lens=batch.seq_lens[rows],
        groups=groups,
    )
