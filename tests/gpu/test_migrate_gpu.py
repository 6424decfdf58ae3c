"""Migrator on a GPU: moves beside kernels, by copy engine and by kernel."""

import numpy as np
import pytest
import torch

from torch_pd.kv.host import HostPool
from torch_pd.kv.migrate import Migrator
from torch_pd.kv.moves import MoveQueue, Waits


@pytest.mark.parametrize("page_bytes", [48, 16 << 10, 96 << 10, 1 << 20])
def test_moves_and_kernels_in_order(page_bytes):
    """Kernels write pages right before they move out and read them right after they came in; a
    slow kernel ahead makes every missing wait visible."""
    rng = np.random.default_rng(page_bytes)
    pages = 12
    gpu = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8, device="cuda")
    host = HostPool(pages, page_bytes, gpu.device)
    host.pages[:] = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8)
    want_gpu, want_host = gpu.cpu(), host.pages.clone()
    queue, migrator = MoveQueue(pages, pages), Migrator(gpu, host)
    slow = torch.randn(2048, 2048, device="cuda")
    seen = []
    for _ in range(60):
        for _ in range(rng.integers(0, 8)):
            g, h = rng.integers(0, pages, 2).tolist()
            if rng.random() < 0.5:
                queue.move_out(g, h)
                want_host[h] = want_gpu[g]
            else:
                queue.move_in(h, g)
                want_gpu[g] = want_host[h]
        read, written = rng.choice(pages, 2, replace=False).tolist()
        queue.compute_on([read, written])
        batches, waits = queue.take()
        for moves in batches:
            migrator.submit(moves)
        migrator.wait(waits)
        seen.append((gpu[read].clone(), want_gpu[read].clone()))
        for _ in range(3):
            slow = (slow @ slow).clamp_(-1, 1)
        value = int(rng.integers(255))
        gpu[written].fill_(value)
        want_gpu[written] = value
        if rng.random() < 0.3:
            queue.done = migrator.done()
    migrator.finish(Waits(*(n - 1 for n in queue._next)))
    torch.cuda.synchronize()
    for found, wanted in seen:
        assert torch.equal(found.cpu(), wanted)
    assert torch.equal(gpu.cpu(), want_gpu)
    assert torch.equal(host.pages, want_host)
    queue.done = migrator.done()
    assert not queue.in_flight
    del migrator
    host.release()
