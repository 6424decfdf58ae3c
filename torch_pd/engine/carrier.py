"""Carrier: carries out the page moves and disk jobs that plans ask for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_pd.config import EngineConfig
from torch_pd.engine.plan import Plan
from torch_pd.engine.swapper import SwapCosts
from torch_pd.kv.cache import KVPool
from torch_pd.kv.disk import DiskTier
from torch_pd.kv.host import HostPool
from torch_pd.kv.migrate import Migrator
from torch_pd.kv.moves import HOST, Waits
from torch_pd.kv.pages import PageAllocator
from torch_pd.kv.tiers import Tiers

LINK = {"cuda": 50e9, "cpu": 5e9}
"""Bytes a second of page moves, about."""
PEER_LINK = {"cuda": 350e9, "cpu": 5e9}
"""The same to and from a peer."""
FLOPS = {"cuda": 500e12, "cpu": 1e11}
"""Of a prompt's linears, about; both only weigh swapping against computing again."""


def swap_costs(device: str, page_bytes: int, num_params: int, peers_only: bool) -> SwapCosts:
    """What a move and a token cost on this kind of device; a move to or from the host, unless there
    are only peers to move to."""
    link = (PEER_LINK if peers_only else LINK)[device]
    return SwapCosts(2 * page_bytes / link, 2 * num_params / FLOPS[device])


class Carrier:
    """The tiers of one engine: host, peers and disk.

    Args:
        pool: the GPU pool (on the CPU: the main pool).
        allocator: of its pages.
        config: disk_kv_path.
        host_pages: pages of the host pool, page 0 included; 0 for none.
        disk_pages: pages on disk, 0 for none.
        peers: pages of each lender's memory, see `Lease.pages`.

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
        peers: Sequence[Tensor] = (),
    ):
        self.page_bytes = pool.page_bytes
        first_peer = max(1, host_pages)  # page 0 is never handed out, host or no host
        counts = [len(pages) for pages in peers]
        self.tiers = Tiers(
            allocator, first_peer + sum(counts), disk_pages, first_peer if peers else None
        )
        self.host: HostPool | None = None
        if host_pages:
            self.host = HostPool(host_pages, pool.page_bytes, pool.device)
        self.migrator: Migrator | None = Migrator(pool.records, self.host, peers)
        self.disk: DiskTier | None = None
        if disk_pages:
            assert config.disk_kv_path is not None
            assert self.host is not None
            self.disk = DiskTier(config.disk_kv_path, disk_pages, self.host)
        host = [0, 0] if self.host is None else [self.host.address, host_pages]
        places = [[pool.records.data_ptr(), pool.num_pages], host]
        places += [[pages.data_ptr(), len(pages)] for pages in peers]
        self.places = torch.tensor(places, dtype=torch.int64, device=pool.device)
        """int64 [2 + lenders, 2], what entries of block tables resolve to: a row a place."""
        self.entries: np.ndarray | None = None
        """int32 [pages under the GPU pool]: place and index of each, None if all are the host's."""
        if peers:
            indices = [np.arange(first_peer), *map(np.arange, counts)]
            on = [place << 28 | index for place, index in enumerate(indices, HOST)]
            self.entries = np.concatenate(on).astype(np.int32)

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

    def finish(self) -> None:
        """Waits for the moves under way."""
        assert self.migrator is not None
        self.migrator.finish(Waits(*self.migrator.given))
        self.look()

    def wait_for_disk(self) -> None:
        """Waits until a disk job ends, if any is under way."""
        if self.disk is not None and self.disk.num_pending:
            self._report(self.disk, wait=True)

    def _report(self, disk: DiskTier, wait: bool) -> None:
        for job, error in disk.poll(wait):
            self.tiers.archive.ended(job, error)

    def stats(self) -> dict[str, Any]:
        """Pages and bytes of the tiers. What is moved and what is cached counts the host's and the
        peers' pages."""
        tiers, size = self.tiers, self.page_bytes
        archive = tiers.archive
        moved = tiers.queue.num_moved
        peer_pages = tiers.host.num_pages - tiers.host.first_near
        peer = {}
        if peer_pages:
            peer = {
                "peer_kv_pages": peer_pages,
                "peer_kv_pages_used": tiers.host.num_near_used,
                "peer_in_bytes": moved[2] * size,
                "peer_out_bytes": moved[3] * size,
            }
        return {
            "host_kv_pages": tiers.host.num_usable - peer_pages,
            "host_kv_pages_used": tiers.host.num_used - peer.get("peer_kv_pages_used", 0),
            "host_kv_pages_cached": tiers.host.num_cached,
            **peer,
            "prefix_pages_hit_host": tiers.host.num_hits,
            "prefix_pages_dropped": tiers.num_dropped,
            "moved_in_bytes": sum(moved[::2]) * size,
            "moved_out_bytes": sum(moved[1::2]) * size,
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
        if self.host is not None:
            self.host.release()
