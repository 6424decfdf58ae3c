"""KV pages in the memory of a second GPU: moves, and whole engines, against one large pool."""

import os

import models
import pytest
import torch
import torch_pd._runtime as _runtime
from device_pools import move_in_order
from models import tokens_of
from ranks import run_ranks
from test_llm_tiers import LONG, PAGE_GIB, long_prompts, work
from test_peer_pages import SIZES, check, folder, large  # noqa: F401

from torch_pd import LLM
from torch_pd.engine.memory import driver_bytes
from torch_pd.kv.host import HostPool
from torch_pd.kv.migrate import Migrator
from torch_pd.kv.moves import MoveQueue
from torch_pd.nn.patch import patch_model
from torch_pd.nn.patched import kv_shape

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
GPU = SIZES | {"device": "cuda"}


@pytest.mark.parametrize("page_bytes", [48, 96 << 10, 1 << 20])
def test_moves_and_kernels_in_order(page_bytes):
    """As on one GPU, with pages of the host and of a peer."""
    pages, lent = 12, 9
    gpu = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8, device="cuda:0")
    host = HostPool(pages, page_bytes, gpu.device)
    host.pages[:] = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8)
    fd = _runtime.PeerBlock(1, lent * page_bytes).to_fd()
    peer = torch.from_dlpack(_runtime.PeerBlock(0, lent * page_bytes, fd).dlpack())
    os.close(fd)
    peer = peer.view(lent, page_bytes).random_(0, 255)
    queue, migrator = MoveQueue(pages, pages + lent, pages), Migrator(gpu, host, [peer])
    move_in_order(gpu, lambda: torch.cat([host.pages, peer.cpu()]), queue, migrator, 80)
    del migrator
    host.release()


def unlimited(folder, prompts, params, **config):  # noqa: F811
    with LLM(folder, kv_cache_gib=0.05, **GPU, **config) as llm:
        return tokens_of(llm.generate(prompts, params, use_tqdm=False))


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


def engines(rank: int, folder, gibs: dict[str, float], cases: dict[str, tuple]) -> None:  # noqa: F811
    """All in the same two processes, which take seconds to start."""
    for dtype in ("auto", "fp8"):
        for host in (0, 4):
            large(folder, gibs[dtype], cases[dtype], 2, rank_of(dtype), host, dtype, "cuda")
    stats = check(
        folder,
        cases["few"],
        device="cuda",
        weights="pooled",
        remote_mode="stream",
        param_ranks=[1],
        data_ranks=[0],
        kv_cache_gib=30.5 * gibs["auto"],
        peer_kv_gib=60.5 * gibs["auto"],
    )
    assert stats["peer_kv_pages"] == 60
    swapping(rank, folder, gibs["auto"], *cases["swap"])


def rank_of(dtype: str) -> int:
    """The one that borrows."""
    return 1 if dtype == "fp8" else 0


def test_tokens_are_those_of_an_unlimited_pool(folder):  # noqa: F811
    cases = {
        name: (*work(count, seed), unlimited(folder, *work(count, seed)))
        for name, count, seed in (("swap", 200, 1), ("few", 40, 2))
    }
    gibs = {}
    for dtype in ("auto", "fp8"):
        expected = unlimited(folder, long_prompts(), LONG, kv_cache_dtype=dtype)
        cases[dtype] = long_prompts(), LONG, expected
        shape = kv_shape(patch_model(models.build("llama")), 16, dtype)
        gibs[dtype] = shape.page_bytes * PAGE_GIB
    run_ranks(2, engines, folder, gibs, cases, device="cuda")
