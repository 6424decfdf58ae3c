"""Memory of a GPU: what the engine will need, line by line, before the KV pages are allocated."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_pd import ops
from torch_pd.config import EngineConfig
from torch_pd.context import Batch, GroupBatch
from torch_pd.engine.graphs import bucket_sizes, largest_graph
from torch_pd.engine.logprobs import report
from torch_pd.engine.sampler import SLICE
from torch_pd.nn.patch import forward_packed, new_pool, patch_state
from torch_pd.nn.pooled import new_logits, shared_of
from torch_pd.sizing import Ledger, staging_bytes
from torch_pd.weights.ring import Ring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_LOGPROB_TOKENS = 512
"""Tokens of a step while prompt log-probabilities are wanted: each needs a row of logits."""
MOST_CONTEXT = 2 << 30
"""More than a context and libraries take."""
GRAPH_BYTES = 1 << 20
"""What the driver keeps for one captured step, beside the tensors of the graphs' pool."""


def foresee(
    model: "PreTrainedModel",
    config: EngineConfig,
    max_pages: int,
    device: torch.device,
    serving: Sequence[bool] = (),
    rank: int = 0,
) -> Ledger:
    """The ledger of the model's GPU: the weights are there, the largest steps are run once.

    Collective where weights are shipped: all ranks of the group run those steps together.

    Args:
        model: patched, on a GPU.
        max_pages: of the longest sequence.
        device: the GPU.
        serving, rank: of the ranks that run steps together, see `Runner`.
    """
    rows, tokens = config.max_num_seqs, config.max_num_batched_tokens
    shared = shared_of(model)
    weights = storage_bytes(model)
    shard = 0 if shared is None else shared.weights.arena.nbytes
    ring = shared.source.nbytes if shared is not None and isinstance(shared.source, Ring) else 0
    torch.cuda.empty_cache()
    start = torch.cuda.memory_reserved(device)
    mapped = shard if shared is not None and shared.weights.mapped else 0
    outside = _outside(device)
    largest = max(min(rows, tokens), min(PROMPT_LOGPROB_TOKENS, tokens))
    steps = _Steps(model, max_pages, serving, rank)
    modes = steps.modes()
    for mode in modes:
        steps.run(mode, largest, tokens)
    # With what the allocator rounds up to; it keeps that.
    activations = torch.cuda.memory_reserved(device) - start
    graphs = 0
    if modes and modes[-1] != "stream" and not config.enforce_eager:
        sizes = bucket_sizes(largest_graph(rows))
        torch.cuda.reset_peak_memory_stats(device)
        logits = new_logits(model, sizes[-1])
        common = 0 if logits is None else logits.nbytes
        before = torch.cuda.memory_allocated(device)
        row = steps.run(modes[-1], sizes[-1], sizes[-1], logits)
        peak = torch.cuda.max_memory_allocated(device) - before
        # The captured passes and those that went before them have memory of their own; a graph
        # keeps logits that do not lie in the common memory.
        graphs = common + 2 * peak + sum(sizes[:-1]) * row + GRAPH_BYTES * len(sizes)
        del logits
    total = torch.cuda.get_device_properties(device).total_memory
    others = other_processes(device)
    held = sum(size for _, _, size in others)
    # What the driver counts beside torch's allocator: context, loaded kernels, libraries.
    grown = max(0, _outside(device) - outside)
    context = max(0, outside - mapped - held)
    named = bool(others) or context <= MOST_CONTEXT
    lines = {
        "weights": weights,
        "shard": shard,
        "ring": ring,
        "other tensors": max(0, start - weights - shard + mapped - ring),
        "activations": activations,
        "graphs": graphs,
        "staging": 2 * staging_bytes(max(tokens, rows), rows, max_pages),
        "context" if named else "context and other processes": context
        + (grown if shared is None else 0),
        # Buffers of the collectives; and kernels that the steps have loaded.
        "communication": 0 if shared is None else grown,
        "other processes": held,
    }
    return Ledger(
        total=total,
        share=config.gpu_memory_share,
        lines=lines,
        others=tuple(f"{name} (pid {pid})" for pid, name, _ in others),
    )


def _outside(device: torch.device) -> int:
    """Bytes of the GPU in use that torch's allocator does not hold."""
    return driver_bytes(device) - torch.cuda.memory_reserved(device)


def storage_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers, shared storage counted once, meta tensors not."""
    tensors = [x for x in (*model.parameters(), *model.buffers()) if not x.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


class _Steps:
    """Runs the largest steps of a model once, to see what memory they take.

    Args:
        model, max_pages, serving, rank: see `foresee`.
    """

    def __init__(
        self, model: "PreTrainedModel", max_pages: int, serving: Sequence[bool], rank: int
    ) -> None:
        self.model, self.max_pages = model, max_pages
        self._serving, self._serves = serving, not serving or serving[rank]
        self._state = patch_state(model)

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
        counts = torch.ones(rows, dtype=torch.int64)
        counts[0] = longest
        # What one sequence may not hold goes to the next ones.
        rest = tokens - int(counts.sum())
        for i in range(1, rows):
            more = min(rest, max_pages * pool.block_size - 1)
            counts[i] += more
            rest -= more
        num = int(counts.sum())
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
        ops.sample(logits, torch.empty(rows, dtype=torch.int64, device=device))
        if select is not None:
            part = logits[:SLICE].float()
            report(part.clone(), [0] * len(part), [0] * len(part))
            part.sort(dim=1, descending=True, stable=True)
        ops.device_errors(device)  # clears it: the logits of page 0 may be anything
        if common is not None and logits.data_ptr() == common.data_ptr():
            return 0
        return logits[0].nbytes


def other_processes(device: torch.device) -> list[tuple[int, str, int]]:
    """(pid, name, bytes) of the other processes that hold memory of this GPU.

    Empty if the driver does not tell, as in some containers.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        if os.getpid() not in [process.pid for process in processes]:
            return []  # process ids of another name space
        found = []
        for process in processes:
            if process.pid != os.getpid() and process.usedGpuMemory:
                name = pynvml.nvmlSystemGetProcessName(process.pid)
                found.append((process.pid, str(name).rsplit("/", 1)[-1], process.usedGpuMemory))
        return found
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def driver_bytes(device: torch.device) -> int:
    """Bytes of the GPU in use, by the driver's count."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free
