"""Runs a function in several processes that form a group of torch.distributed."""

import dataclasses
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

# A process is forked from a server that has imported what takes seconds (and has no GPU open).
multiprocessing.set_forkserver_preload(
    ["torch_pd.engine.joined", "transformers.models.llama.modeling_llama"]
)


def run_ranks(size: int, function: Callable, *args, device: str = "cpu") -> None:
    """``function(rank, *args)`` in ``size`` processes; an error in one is raised here.

    On "cuda" every rank has a GPU, current there, and the group is NCCL's. See `take_gpu`.

    The function must be importable: of a test module, not inside another function.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        mp.start_processes(
            _main,
            (size, store, function, args, device, sys.path),
            nprocs=size,
            start_method="forkserver",
        )


def take_gpu(rank: int) -> torch.device:
    """The GPU of a rank, current from here on. More ranks than GPUs share them, in turn.

    NCCL takes two ranks on one GPU if they are on different hosts, and so is told that they are: it
    goes by sockets between them.
    """
    gpus = torch.cuda.device_count()
    os.environ |= {"NCCL_HOSTID": f"torch_pd-{rank // gpus}", "NCCL_SOCKET_IFNAME": "lo"}
    device = torch.device("cuda", rank % gpus)
    torch.cuda.set_device(device)
    return device


def share_gpus() -> None:
    """Lets this rank be one of a world whose ranks share GPUs."""
    from torch_pd import dist as worlds
    from torch_pd.engine import joined, worker
    from torch_pd.roll import Roll

    def world() -> worlds.World:
        # As on the CPU: nobody looks whose GPU is whose.
        here = torch.device("cuda", torch.cuda.current_device())
        return dataclasses.replace(worlds._world(torch.device("cpu")), device=here)

    def connect(rank: int, size: int, device: str, store: dist.Store) -> worlds.World:
        init_group(size, rank, device, store=store)
        return world()

    def join(device: str, roll: Roll) -> worlds.World:
        roll.call(
            dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
        )
        return dataclasses.replace(world(), roll=roll)

    worker.connect = connect
    joined.join_torchrun = join


def init_group(size: int, rank: int, device: str, **where) -> None:
    """The process group of this rank, on its device."""
    here = take_gpu(rank) if device == "cuda" else None
    dist.init_process_group(
        "gloo" if here is None else "nccl", rank=rank, world_size=size, device_id=here, **where
    )


def _main(
    rank: int, size: int, store: Path, function: Callable, args: tuple, device: str, path: list
) -> None:
    sys.path[:] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    init_group(size, rank, device, init_method=f"file://{store}")
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
