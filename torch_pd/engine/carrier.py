"""Carrier: carries out the page moves and disk jobs that plans ask for."""

from typing import Any

import torch

from torch_pd.config import EngineConfig
from torch_pd.engine.plan import Plan
from torch_pd.engine.swapper import SwapCosts
from torch_pd.kv.cache import KVPool
from torch_pd.kv.disk import DiskTier
from torch_pd.kv.host import HostPool
from torch_pd.kv.migrate import Migrator
from torch_pd.kv.pages import PageAllocator
from torch_pd.kv.tiers import Tiers

LINK = {"cuda": 50e9, "cpu": 5e9}
"""Bytes a second of page moves, about."""
FLOPS = {"cuda": 500e12, "cpu": 1e11}
"""Of a prompt's linears, about; both only weigh swapping against computing again."""


def swap_costs(device: str, page_bytes: int, num_params: int) -> SwapCosts:
    """What a move and a token cost on this kind of device."""
    return SwapCosts(2 * page_bytes / LINK[device], 2 * num_params / FLOPS[device])


class Carrier:
    """The host and disk tiers of one engine.

    Args:
        pool: the GPU pool (on the CPU: the main pool).
        allocator: of its pages.
        config: disk_kv_path.
        host_pages: pages of the host pool, page 0 included.
        disk_pages: pages on disk, 0 for none.

    Raises:
        ValueError: the disk lacks the space.
    """

    def __init__(
        self,
        pool: KVPool,
        allocator: PageAllocator,
        config: EngineConfig,
        host_pages: int,
        disk_pages: int,
    ):
        self.page_bytes = pool.page_bytes
        self.tiers = Tiers(allocator, host_pages, disk_pages)
        self.host = HostPool(host_pages, pool.page_bytes, pool.device)
        self.migrator: Migrator | None = Migrator(pool.records, self.host)
        self.disk: DiskTier | None = None
        if disk_pages:
            assert config.disk_kv_path is not None
            self.disk = DiskTier(config.disk_kv_path, disk_pages, self.host)
        places = [[pool.records.data_ptr(), pool.num_pages], [self.host.address, host_pages]]
        self.places = torch.tensor(places, dtype=torch.int64, device=pool.device)
        """int64 [2, 2], what block table entries of the host resolve to."""

    def look(self) -> None:
        """Tells the tiers what has ended since the last call; does not wait."""
        assert self.migrator is not None
        self.tiers.queue.done = self.migrator.done()
        if self.disk is not None and self.disk.num_pending:
            self._report(self.disk, wait=False)
            self.tiers.archive.page_seconds = self.disk.page_seconds

    def carry(self, plan: Plan) -> None:
        """Starts a plan's moves and jobs, before its step is launched on the current stream."""
        assert self.migrator is not None
        for job in plan.jobs:
            assert self.disk is not None
            self.disk.start(job)
        for moves in plan.moves:
            self.migrator.submit(moves)
        self.migrator.wait(plan.waits)

    def wait_for_disk(self) -> None:
        """Waits until a disk job ends, if any is under way."""
        if self.disk is not None and self.disk.num_pending:
            self._report(self.disk, wait=True)

    def _report(self, disk: DiskTier, wait: bool) -> None:
        for job, error in disk.poll(wait):
            self.tiers.archive.ended(job, error)

    def stats(self) -> dict[str, Any]:
        """Pages and bytes of the tiers."""
        tiers, size = self.tiers, self.page_bytes
        archive = tiers.archive
        moved_in, moved_out = tiers.queue.num_moved
        return {
            "host_kv_pages": tiers.host.num_usable,
            "host_kv_pages_used": tiers.host.num_used,
            "host_kv_pages_cached": tiers.host.num_cached,
            "prefix_pages_hit_host": tiers.host.num_hits,
            "prefix_pages_dropped": tiers.num_dropped,
            "moved_in_bytes": moved_in * size,
            "moved_out_bytes": moved_out * size,
            "disk_kv_pages": archive.records.num_records,
            "disk_kv_pages_cached": len(archive.records),
            "disk_read_bytes": archive.num_read * size,
            "disk_written_bytes": archive.num_written * size,
            "disk_errors": archive.num_errors,
            "swapped_bytes_on_disk": archive.num_spilled * size,
        }

    def close(self) -> None:
        """Waits for the moves under way and gives memory and file back."""
        self.migrator = None
        if self.disk is not None:
            self.disk.close()
        self.host.release()
