"""Memory of a GPU: what the engine will need, line by line, before the KV pages are allocated."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from torch_pd.config import EngineConfig
from torch_pd.engine.trial import Reserved, Trial, steps_staging, try_steps
from torch_pd.nn.pooled import shared_of
from torch_pd.sizing import Ledger
from torch_pd.weights.ring import Ring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_CONTEXT = 2 << 30
"""More than a context and libraries take."""


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
    shared = shared_of(model)
    before = standing(model)
    mailbox = before.pop("mailbox")
    torch.cuda.empty_cache()
    start = torch.cuda.memory_reserved(device)
    mapped = before["shard"] if shared is not None and shared.weights.mapped else 0
    outside = _outside(device)
    activations, graphs = try_steps(
        Trial(model, max_pages, serving, rank), config, Reserved(device)
    )
    total = torch.cuda.get_device_properties(device).total_memory
    others = other_processes(device)
    held = sum(size for _, _, size in others)
    # What the driver counts beside torch's allocator: context, loaded kernels, libraries.
    grown = max(0, _outside(device) - outside)
    context = max(0, outside - mapped - mailbox - held)
    named = bool(others) or context <= MOST_CONTEXT
    lines = {
        **before,
        "other tensors": max(0, start + mapped - sum(before.values())),
        "activations": activations,
        "graphs": graphs,
        "staging": steps_staging(config, max_pages),
        "context" if named else "context and other processes": context
        + (grown if shared is None else 0),
        # Buffers of the collectives; and kernels that the steps have loaded.
        "communication": 0 if shared is None else grown + mailbox,
        "other processes": held,
    }
    return Ledger(
        total=total,
        share=config.gpu_memory_share,
        lines=lines,
        others=tuple(f"{name} (pid {pid})" for pid, name, _ in others),
    )


def standing(model: "PreTrainedModel") -> dict[str, int]:
    """Bytes by the ledger's lines of what is there before any step has run; and of the mailbox."""
    shared = shared_of(model)
    shard = ring = mailbox = 0
    if shared is not None:
        shard = shared.weights.arena.nbytes
        if isinstance(shared.source, Ring):
            ring = shared.source.nbytes
        if shared.exchange is not None and shared.exchange.mailbox is not None:
            box = shared.exchange.mailbox
            mailbox = box.nbytes(box.size, box.limit)
    return {"weights": storage_bytes(model), "shard": shard, "ring": ring, "mailbox": mailbox}


def _outside(device: torch.device) -> int:
    """Bytes of the GPU in use that torch's allocator does not hold."""
    return driver_bytes(device) - torch.cuda.memory_reserved(device)


def storage_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers, shared storage counted once, meta tensors not."""
    tensors = [x for x in (*model.parameters(), *model.buffers()) if not x.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


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
