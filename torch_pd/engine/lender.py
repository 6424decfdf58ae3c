"""Lender: a rank that runs no requests and holds no weights; other ranks keep KV pages in its
memory."""

from typing import Any

import torch

from torch_pd.config import EngineConfig
from torch_pd.dist import World
from torch_pd.engine.limits import Limits
from torch_pd.engine.memory import driver_bytes
from torch_pd.kv.host import available_memory
from torch_pd.kv.lease import Lease
from torch_pd.sizing import GIB


def lend_or_borrow(config: EngineConfig, world: World) -> Lease:
    """The lease of a rank that has no ledger of its GPU: one on the CPU, or with nothing on its GPU
    but what it lends. Collective.

    Raises:
        ValueError: see `Lease`.
    """
    if world.device.type == "cpu":
        memory = available_memory()
        return Lease(
            config,
            world,
            memory * 95 // 100 // world.size,
            f"95% of {memory / GIB:.2f} GiB of host memory / {world.size} ranks",
        )
    torch.cuda.init()
    total = torch.cuda.get_device_properties(world.device).total_memory
    used, share = driver_bytes(world.device), config.gpu_memory_share
    return Lease(
        config,
        world,
        int(total * share) - used,
        f"gpu_memory_utilization={share:g} of {total / GIB:.2f} GiB - {used / GIB:.2f} in use",
    )


class Lender:
    """In the place of an engine. Collective to make: the others make their engines.

    Raises:
        ValueError: this rank lacks the memory, or a borrower cannot reach it.
    """

    serves = False

    def __init__(self, config: EngineConfig, world: World):
        self.config = config
        self.lease = lend_or_borrow(config, world)
        # What engines agree on; a lender sets no limit.
        world.all_gather(1 << 60)
        world.all_gather(1 << 60)
        limits = [each for each in world.all_gather(None) if each is not None]
        self.limits: Limits = limits[0]
        """Of the ranks that run requests."""

    def stats(self) -> dict[str, Any]:
        """What is lent."""
        return {"lent_bytes": self.lease.nbytes}

    def memory_table(self) -> str:
        """What the memory is for, in a line."""
        borrowers = ", ".join(map(str, self.config.data_ranks or ()))
        return f"memory: {self.lease.nbytes / GIB:.2f} GiB lent to rank {borrowers} for KV pages"

    def shutdown(self) -> None:
        """Ends the loan on this side; borrowers that still read keep the memory alive."""
        self.lease.close()
