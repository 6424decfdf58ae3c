"""Runs a function in several processes that form a gloo group."""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(size: int, function: Callable, *args) -> None:
    """``function(rank, *args)`` in ``size`` processes; an error in one is raised here.

    The function must be importable: of a test module, not inside another function.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        mp.spawn(_main, (size, store, function, args, sys.path), nprocs=size)


def _main(rank: int, size: int, store: Path, function: Callable, args: tuple, path: list) -> None:
    sys.path[:] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
