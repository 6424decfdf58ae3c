"""Memory that ranks read in each other's processes, and models streamed from it."""

import multiprocessing
import os
import signal
import sys
import uuid
from pathlib import Path

import models
import pytest
import torch
from ranks import run_ranks
from test_ring import DIMS, filled_pools
from test_ship import Sequences, make_pools

from torch_pd import patch_model
from torch_pd.nn.patched import patch_state
from torch_pd.nn.pooled import pool_model
from torch_pd.peer import PeerMemory, check_links
from torch_pd.weights.layout import LINEARS
from torch_pd.weights.ring import Ring
from torch_pd.weights.source import Resident

RANKS = 4


def shared_arenas(arena: torch.Tensor, key: str, rank: int, size: int) -> list[torch.Tensor]:
    memory = PeerMemory("cpu")
    memory.allocate(arena.numel()).copy_(arena)
    return memory.connect(key, rank, size)


def check_streamed(name: str, key: str, rank: int, size: int, **layout) -> None:
    """Streamed logits are, bit for bit, those of the same parts kept here."""
    model = patch_model(models.build(name))
    pools = make_pools(model, size, **layout)
    arenas = shared_arenas(pools[rank].arena, f"{key}-{name}-{size}", rank, size)
    sizes = [arena.numel() for arena in arenas]
    assert sizes == [pool.layout.arena_bytes(pool.index) for pool in pools]
    lengths = [[9, 5], [3], [4, 12, 7], [6]][rank]
    pool_model(model, pools[rank], source=Resident(pools, rank))
    want = Sequences(model, lengths, seed=rank).logits()
    model = patch_model(models.build(name))
    ring = Ring(pools[0].layout, rank, arenas, pools[0].dtype, poison=True, delays=[0, 20, 100])
    pool_model(model, pools[rank], source=ring)
    patch_state(model).running.mode = "stream"
    got = Sequences(model, lengths, seed=rank).logits()
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b), f"{name} streamed"
    ring.close()


def everything(rank: int, key: str) -> None:
    blocks = []
    for turn in range(2):
        mine = torch.full((rank * 1000,), 16 * turn + rank, dtype=torch.uint8)
        blocks.append(shared_arenas(mine, f"{key}-{turn}", rank, RANKS))
    for turn, arenas in enumerate(blocks):
        for other, arena in enumerate(arenas):
            assert arena.numel() == 1000 * other
            assert (arena == 16 * turn + other).all()
    for size in (1, 2, 4):
        if rank < size:
            check_streamed("llama", key, rank, size)
    check_streamed("gemma3", key, rank, RANKS)
    check_streamed("llama", f"{key}-apart", rank, RANKS, param_ranks=[1, 2])
    if rank < 3:
        check_streamed("olmo2", f"{key}-layer", rank, 3, weight_layout="layer")


def test_streamed_models_in_processes():
    before = set(os.listdir("/dev/shm"))
    key = uuid.uuid4().hex
    run_ranks(RANKS, everything, key)
    # Other programs may have made files meanwhile.
    new = set(os.listdir("/dev/shm")) - before
    assert not [name for name in new if key in name or "torch_pd" in name]


def owner(path: list[str], key: str) -> None:
    sys.path[:] = path
    (_, pool) = filled_pools(DIMS, 2)
    shared_arenas(pool.arena, key, 1, 2)
    signal.pause()


def test_an_owner_that_is_killed_leaves_its_reader_sound():
    """The reader is in the middle of pulling; what it pulls stays right."""
    key = uuid.uuid4().hex
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=owner, args=(sys.path, key), daemon=True)
    process.start()
    pools = filled_pools(DIMS, 2)
    arenas = shared_arenas(pools[0].arena, key, 0, 2)
    assert process.pid is not None
    mapped = Path("/proc/self/maps").read_text().count("memfd:torch_pd")
    assert mapped >= 2
    ring = Ring(pools[0].layout, 0, arenas, torch.float32, delays=[500])
    whole = Resident(pools)
    for step in range(2):
        for layer in range(DIMS.num_layers):
            if step == 0 and layer == 1:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            for linear in LINEARS:
                got = ring.acquire(layer, linear)
                assert torch.equal(got.join(), whole.acquire(layer, linear).join())
                del got
                ring.release(layer, linear)
    ring.close()
    del ring, arenas
    # The killed owner's block is gone with its last reader; one of this rank's own may remain
    # while other tests' objects live.
    assert Path("/proc/self/maps").read_text().count("memfd:torch_pd") <= mapped - 2


def test_a_peer_that_never_comes():
    memory = PeerMemory("cpu")
    memory.allocate(10)
    with pytest.raises(TimeoutError, match="rank 1 did not offer its memory"):
        memory.connect(uuid.uuid4().hex, 0, 2, timeout_s=0.1)
    memory.close()
    memory.close()


def test_a_missing_link_is_refused():
    check_links((), [0, 1, 2, 3], 0)
    check_links((5,), [0, 1, 2, 3], 0)
    with pytest.raises(ValueError, match=r"missing peer link: .* rank 0 .* rank 2, 3 .*'ship'"):
        check_links((2, 3, 5), [0, 1, 2, 3], 0)
