"""Memory of a GPU: what the engine will need, line by line, before the KV pages are allocated."""

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_pd import ops
from torch_pd.config import EngineConfig
from torch_pd.context import Batch, GroupBatch
from torch_pd.engine.graphs import bucket_sizes, largest_graph
from torch_pd.engine.logprobs import report
from torch_pd.engine.sampler import SLICE
from torch_pd.nn.patch import forward_packed, new_logits, new_pool
from torch_pd.sizing import Ledger, staging_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_LOGPROB_TOKENS = 512
"""Tokens of a step while prompt log-probabilities are wanted: each needs a row of logits."""
MOST_CONTEXT = 2 << 30
"""More than a context and libraries take."""
GRAPH_BYTES = 1 << 20
"""What the driver keeps for one captured step, beside the tensors of the graphs' pool."""


def foresee(
    model: "PreTrainedModel", config: EngineConfig, max_pages: int, device: torch.device
) -> Ledger:
    """The ledger of the model's GPU: the weights are there, the largest steps are run once.

    Args:
        model: patched, on a GPU.
        max_pages: of the longest sequence.
        device: the GPU.
    """
    rows, tokens = config.max_num_seqs, config.max_num_batched_tokens
    weights = storage_bytes(model)
    torch.cuda.empty_cache()
    start = torch.cuda.memory_reserved(device)
    most_rows = max(min(rows, tokens), min(PROMPT_LOGPROB_TOKENS, tokens))
    _largest_step(model, most_rows, tokens, max_pages)
    # With what the allocator rounds up to; it keeps that.
    activations = torch.cuda.memory_reserved(device) - start
    graphs = 0
    if not config.enforce_eager:
        sizes = bucket_sizes(largest_graph(rows))
        torch.cuda.reset_peak_memory_stats(device)
        logits = new_logits(model, sizes[-1])
        shared = 0 if logits is None else logits.nbytes
        before = torch.cuda.memory_allocated(device)
        row = _largest_step(model, sizes[-1], sizes[-1], max_pages, logits)
        peak = torch.cuda.max_memory_allocated(device) - before
        # The captured passes and those that went before them have memory of their own; a graph
        # keeps logits that do not lie in the shared memory.
        graphs = shared + 2 * peak + sum(sizes[:-1]) * row + GRAPH_BYTES * len(sizes)
        del logits
    free, total = torch.cuda.mem_get_info(device)
    others = other_processes(device)
    held = sum(size for _, _, size in others)
    # What the driver counts beside torch's allocator: context, loaded kernels, libraries.
    context = max(0, total - free - torch.cuda.memory_reserved(device) - held)
    named = bool(others) or context <= MOST_CONTEXT
    return Ledger(
        total=total,
        share=config.gpu_memory_share,
        lines={
            "weights": weights,
            "other tensors": max(0, start - weights),
            "activations": activations,
            "graphs": graphs,
            "staging": 2 * staging_bytes(max(tokens, rows), rows, max_pages),
            "context" if named else "context and other processes": context,
            "other processes": held,
        },
        others=tuple(f"{name} (pid {pid})" for pid, name, _ in others),
    )


def storage_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers, shared storage counted once, meta tensors not."""
    tensors = [x for x in (*model.parameters(), *model.buffers()) if not x.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@torch.no_grad()
def _largest_step(
    model: "PreTrainedModel",
    rows: int,
    tokens: int,
    max_pages: int,
    shared: Tensor | None = None,
) -> int:
    """``tokens`` tokens of ``rows`` sequences (one long, the others of one token), all of whose
    logits are looked at; reads page 0 alone and writes nothing. A step that does not only decode
    also does what the host's way of choosing needs for one slice of rows. Returns the bytes of a
    row of logits, 0 if they lie in ``shared``.
    """
    pool = new_pool(model, 2)
    device = pool.device
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
    logits: Tensor = forward_packed(model, pool, batch, ids, ids, select, shared)
    ops.sample(logits, torch.empty(rows, dtype=torch.int64, device=device))
    if select is not None:
        part = logits[:SLICE].float()
        report(part.clone(), [0] * len(part), [0] * len(part))
        part.sort(dim=1, descending=True, stable=True)
    ops.device_errors(device)  # clears it: the logits of page 0 may be anything
    if shared is not None and logits.data_ptr() == shared.data_ptr():
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
