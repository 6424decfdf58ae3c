"""Runs a function in several processes that form a group of torch.distributed."""

import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# On the CPU a process is forked from a server that has imported what takes seconds.
multiprocessing.set_forkserver_preload(
    ["torch_pd.engine.joined", "transformers.models.llama.modeling_llama"]
)


def run_ranks(size: int, function: Callable, *args, device: str = "cpu") -> None:
    """``function(rank, *args)`` in ``size`` processes; an error in one is raised here.

    On "cuda" every rank has its own GPU, current there, and the group is NCCL's.

    The function must be importable: of a test module, not inside another function.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        mp.start_processes(
            _main,
            (size, store, function, args, device, sys.path),
            nprocs=size,
            start_method="forkserver" if device == "cpu" else "spawn",
        )


def _main(
    rank: int, size: int, store: Path, function: Callable, args: tuple, device: str, path: list
) -> None:
    sys.path[:] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        device_id=torch.device(device, rank) if device == "cuda" else None,
    )
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
