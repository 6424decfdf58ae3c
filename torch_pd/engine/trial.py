"""Trial: the largest steps of a model, run once to see what memory they take.

The ledger (engine/memory.py) runs them on the GPU, the planner (engine/footprint.py) on meta.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from torch_pd import ops
from torch_pd.config import EngineConfig
from torch_pd.context import Batch, GroupBatch
from torch_pd.engine.graphs import bucket_sizes, largest_graph
from torch_pd.engine.logprobs import report
from torch_pd.engine.sampler import SLICE
from torch_pd.nn.patched import forward_packed, new_pool, patch_state
from torch_pd.nn.pooled import new_logits, shared_of
from torch_pd.sizing import staging_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_LOGPROB_TOKENS = 512
"""Tokens of a step while prompt log-probabilities are wanted: each needs a row of logits."""
GRAPH_BYTES = 1 << 20
"""What the driver keeps for one captured step, beside the tensors of the graphs' pool."""


class Gauge(Protocol):
    """What an allocator that keeps freed blocks says of itself, in bytes."""

    def reserved(self) -> int:
        """Of all blocks, in use or not."""
        ...

    def allocated(self) -> int:
        """In use."""
        ...

    def peak(self) -> int:
        """The most in use since `restart`."""
        ...

    def restart(self) -> None:
        """What is in use now is the peak."""
        ...


class Reserved:
    """torch's allocator of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reserved(self) -> int:
        """See `Gauge`."""
        return torch.cuda.memory_reserved(self._device)

    def allocated(self) -> int:
        """See `Gauge`."""
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """See `Gauge`."""
        return torch.cuda.max_memory_allocated(self._device)

    def restart(self) -> None:
        """See `Gauge`."""
        torch.cuda.reset_peak_memory_stats(self._device)


def try_steps(trial: "Trial", config: EngineConfig, gauge: Gauge) -> tuple[int, int]:
    """Bytes for the activations of the largest steps, with what the allocator rounds up to and
    keeps; and for the captured steps."""
    rows, tokens = config.max_num_seqs, config.max_num_batched_tokens
    largest = max(min(rows, tokens), min(PROMPT_LOGPROB_TOKENS, tokens))
    modes = trial.modes()
    start = gauge.reserved()
    for mode in modes:
        trial.run(mode, largest, tokens)
    activations = gauge.reserved() - start
    if not modes or modes[-1] == "stream" or config.enforce_eager:
        return activations, 0
    sizes = bucket_sizes(largest_graph(rows))
    gauge.restart()
    logits = new_logits(trial.model, sizes[-1])
    common = 0 if logits is None else logits.nbytes
    before = gauge.allocated()
    row = trial.run(modes[-1], sizes[-1], sizes[-1], logits)
    peak = gauge.peak() - before
    # The captured passes and those that went before them have memory of their own; a graph keeps
    # logits that do not lie in the common memory.
    # Half-batches have graphs of their own, of twice as many kernels.
    graphs = len(sizes) * (3 if trial.apart else 1)
    return activations, common + 2 * peak + sum(sizes[:-1]) * row + GRAPH_BYTES * graphs


def steps_staging(config: EngineConfig, max_pages: int) -> int:
    """Bytes on the GPU for what the host tells a step, and what is kept from one to the next."""
    rows, tokens = config.max_num_seqs, config.max_num_batched_tokens
    return 2 * staging_bytes(max(tokens, rows), rows, max_pages)


class Trial:
    """Runs the largest steps of a model once, to see what memory they take.

    Args:
        model: patched, on a GPU or on meta.
        max_pages: of the longest sequence.
        serving, rank: of the ranks that run steps together, see `Runner`.
    """

    def __init__(
        self, model: "PreTrainedModel", max_pages: int, serving: Sequence[bool], rank: int
    ) -> None:
        self.model, self.max_pages = model, max_pages
        self._serving, self._serves = serving, not serving or serving[rank]
        self._state = patch_state(model)

    @property
    def apart(self) -> bool:
        """Some ranks have no sequences."""
        return not all(self._serving)

    def modes(self) -> list[str]:
        """In which ways this rank runs steps; the last one is that of its graphs."""
        shared = shared_of(self.model)
        if shared is None:
            return ["resident"]
        modes = []
        if shared.source is not None and self._serves:
            modes.append("resident" if shared.weights.size == 1 else "stream")
        if shared.exchange is not None:
            modes.append("ship")
        return modes

    @torch.no_grad()
    def run(self, mode: str, rows: int, tokens: int, logits: Tensor | None = None) -> int:
        """``tokens`` tokens of ``rows`` sequences (one long, the others of one token), all of whose
        logits are looked at; reads page 0 alone and writes nothing. If the step is shipped, every
        rank that serves brings as much. A step that does not only decode also does what the host's
        way of choosing needs for one slice of rows. Returns the bytes of a row of logits, 0 if
        they lie in ``logits``.
        """
        running = self._state.running
        before, running.mode = running.mode, mode
        if mode == "ship":
            every = [(rows, tokens) if serves else (1, 1) for serves in self._serving]
            running.rows = [n for _, n in every]
            running.head_rows = [min(n) for n in every]
            if not self._state.takes_select:
                running.head_rows = running.rows
        try:
            if not self._serves:
                rows, tokens = 1, 1
            return self._run(rows, tokens, logits)
        finally:
            running.mode = before

    def _run(self, rows: int, tokens: int, common: Tensor | None) -> int:
        pool = new_pool(self.model, 2)
        device, max_pages = pool.device, self.max_pages
        rows = min(rows, tokens)
        longest = min(tokens - rows + 1, max_pages * pool.block_size)
        lengths = [longest]
        # What one sequence may not hold goes to the next ones.
        rest = tokens - longest
        for i in range(1, rows):
            lengths.append(1 + max(0, min(rest - (rows - i), max_pages * pool.block_size - 1)))
            rest -= lengths[-1]
        counts = torch.tensor(lengths)
        num = sum(lengths)
        starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        batch = Batch(
            num_tokens=num,
            max_query_len=int(counts.max()),
            query_start=starts.to(device, torch.int32),
            seq_lens=counts.to(device, torch.int32),
            groups=(
                GroupBatch(
                    block_tables=torch.zeros((rows, max_pages), dtype=torch.int32, device=device),
                    slots=torch.full((num,), -1, device=device),
                ),
            ),
        )
        ids = torch.zeros(num, dtype=torch.int64, device=device)
        select = None if num == rows else (starts[1:] - 1).to(device)
        logits: Tensor = forward_packed(self.model, pool, batch, ids, ids, select, common)
        if logits.is_cuda:
            ops.sample(logits, torch.empty(rows, dtype=torch.int64, device=device))
            if select is not None:
                part = logits[:SLICE].float()
                report(part.clone(), [0] * len(part), [0] * len(part))
                part.sort(dim=1, descending=True, stable=True)
            ops.device_errors(device)  # clears it: the logits of page 0 may be anything
        if common is not None and _storage(logits) == _storage(common):
            return 0
        return logits[0].nbytes


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
