"""Migrator on a GPU: moves beside kernels, by copy engine and by kernel."""

import pytest
import torch
from device_pools import move_in_order

from torch_pd.kv.host import HostPool
from torch_pd.kv.migrate import Migrator
from torch_pd.kv.moves import MoveQueue


@pytest.mark.parametrize("page_bytes", [48, 16 << 10, 96 << 10, 1 << 20])
def test_moves_and_kernels_in_order(page_bytes):
    pages = 12
    gpu = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8, device="cuda")
    host = HostPool(pages, page_bytes, gpu.device)
    host.pages[:] = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8)
    migrator = Migrator(gpu, host)
    move_in_order(gpu, host.pages.clone, MoveQueue(pages, pages), migrator, 60)
    del migrator
    host.release()
