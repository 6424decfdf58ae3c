"""KV pages in the memory of a second GPU: moves, and whole engines, against one large pool."""

import os
import random

import models
import numpy as np
import pytest
import torch
import torch_pd._runtime as _runtime
from ranks import run_ranks
from test_llm_tiers import PAGE_GIB, tokens_of, work
from test_peer_pages import LONG, PAIR, SIZES, folder, gib  # noqa: F401

from torch_pd import LLM
from torch_pd.engine.memory import driver_bytes
from torch_pd.kv.host import HostPool
from torch_pd.kv.migrate import Migrator
from torch_pd.kv.moves import MoveQueue, Waits
from torch_pd.nn.patch import kv_shape, patch_model

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
GPU = {"device": "cuda", **SIZES}


@pytest.mark.parametrize("page_bytes", [48, 96 << 10, 1 << 20])
def test_moves_and_kernels_in_order(page_bytes):
    """As on one GPU, with pages of the host and of a peer: kernels write pages right before they
    move out and read them right after they came in."""
    rng = np.random.default_rng(page_bytes)
    pages, lent = 12, 9
    gpu = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8, device="cuda:0")
    host = HostPool(pages, page_bytes, gpu.device)
    host.pages[:] = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8)
    fd = _runtime.PeerBlock(1, lent * page_bytes).to_fd()
    peer = torch.from_dlpack(_runtime.PeerBlock(0, lent * page_bytes, fd).dlpack())
    os.close(fd)
    peer = peer.view(lent, page_bytes).random_(0, 255)
    want_gpu, want_under = gpu.cpu(), torch.cat([host.pages, peer.cpu()])
    queue, migrator = MoveQueue(pages, pages + lent, pages), Migrator(gpu, host, [peer])
    slow = torch.randn(2048, 2048, device="cuda:0")
    seen = []
    for _ in range(80):
        for _ in range(rng.integers(0, 8)):
            g, h = int(rng.integers(0, pages)), int(rng.integers(0, pages + lent))
            if rng.random() < 0.5:
                queue.move_out(g, h)
                want_under[h] = want_gpu[g]
            else:
                queue.move_in(h, g)
                want_gpu[g] = want_under[h]
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
    assert torch.equal(torch.cat([host.pages, peer.cpu()]), want_under)
    queue.done = migrator.done()
    assert not queue.in_flight
    del migrator
    host.release()


def unlimited(folder, prompts, params, **config):  # noqa: F811
    with LLM(folder, kv_cache_gib=0.05, **GPU, **config) as llm:
        return tokens_of(llm.generate(prompts, params, use_tqdm=False))


@pytest.mark.parametrize("host", [0, 4])
@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_a_sequence_larger_than_the_gpu_pool(folder, host, dtype):  # noqa: F811
    rng = random.Random(5)
    prompts = [[rng.randrange(3, models.VOCAB) for _ in range(length)] for length in (140, 20, 97)]
    expected = unlimited(folder, prompts, LONG, kv_cache_dtype=dtype)
    gib = kv_shape(patch_model(models.build("llama")), 16, dtype).page_bytes * PAGE_GIB  # noqa: F811
    config = {
        "kv_cache_gib": 5.5 * gib,
        "peer_kv_gib": (4.5 if host else 12.5) * gib,
        "host_kv_gib": host and (host + 4.5) * gib,
        "kv_cache_dtype": dtype,
    }
    with LLM(folder, **PAIR, **config, **GPU) as llm:
        assert tokens_of(llm.generate(prompts, LONG, use_tqdm=False)) == expected
        stats = llm.stats()["ranks"][0]
    assert stats["kv_tokens"] == 64
    assert stats["peer_out_bytes"] > 0


def swapping(rank: int, folder, gib: float, prompts, params, expected) -> None:  # noqa: F811
    """Under a process group of the caller, as with torchrun; swapped all the time."""
    from torch_pd.engine import engine
    from torch_pd.engine.swapper import SwapCosts

    # Of a model this small, computing again would always be cheaper.
    engine.swap_costs = lambda *args: SwapCosts()
    torch.zeros(1, device="cuda")
    config = {"kv_cache_gib": 14.5 * gib, "peer_kv_gib": 1, "host_kv_gib": 10.5 * gib}
    before = driver_bytes(torch.device("cuda", rank))
    for caching in (False, True):
        llm = LLM(folder, data_ranks=[0], enable_prefix_caching=caching, **config, **GPU)
        held = driver_bytes(torch.device("cuda", rank)) - before
        assert rank == 0 or held >= 1 << 30
        assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected
        stats = llm.stats()["ranks"][0]
        assert stats["swapped_sequences"] > 0
        assert stats["peer_in_bytes"] > 0
        assert stats["graph_steps"] > 0
        llm.shutdown()
        del llm
    torch.cuda.empty_cache()
    if rank == 1:
        assert driver_bytes(torch.device("cuda", rank)) - before < 512 << 20  # the loan is over
    with pytest.raises(ValueError, match=r"rank 1 is to lend 900\.00 GiB, but has .* in use\)"):
        LLM(folder, data_ranks=[0], **config | {"peer_kv_gib": 900}, **GPU)


def test_tiny_pools_give_the_same_tokens(folder, gib):  # noqa: F811
    prompts, params = work(200, seed=1)
    expected = unlimited(folder, prompts, params)
    run_ranks(2, swapping, folder, gib, prompts, params, expected, device="cuda")


def test_ranks_that_hold_weights_lend_memory(folder, gib):  # noqa: F811
    prompts, params = work(40, seed=2)
    expected = unlimited(folder, prompts, params)
    apart = {"weights": "pooled", "remote_mode": "stream", "param_ranks": [1], "data_ranks": [0]}
    config = {"kv_cache_gib": 30.5 * gib, "peer_kv_gib": 60.5 * gib, **apart}
    with LLM(folder, data_parallel_size=2, **config, **GPU) as llm:
        assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected
        assert llm.stats()["ranks"][0]["peer_kv_pages"] == 60
