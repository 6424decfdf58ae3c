"""Peer memory and the ring on GPUs: bytes, order, and an owner that is killed. Two GPUs."""

import multiprocessing
import os
import signal
import sys
import uuid

import pytest
import torch
import torch.multiprocessing as mp
from reference import relative_error

from torch_pd.nn.linear import linear_in_parts
from torch_pd.peer import PeerMemory
from torch_pd.weights.layout import LINEARS, ModelDims, make_layout
from torch_pd.weights.pool import WeightPool
from torch_pd.weights.ring import Ring, ring_items
from torch_pd.weights.source import Resident

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
RANKS = 2
DIMS = ModelDims(
    num_layers=6, hidden_size=1024, num_heads=16, num_kv_heads=8, head_dim=64,
    intermediate_size=2816, vocab_size=9003, itemsize=2,
)  # fmt: skip


def filled(rank: int, device: str, **options) -> WeightPool:
    """The pool of a rank, the same bytes wherever it is made."""
    pool = WeightPool(make_layout(DIMS, RANKS), rank, torch.bfloat16, device, **options)
    words = torch.randn(
        pool.arena.numel() // 2, generator=torch.Generator().manual_seed(rank), dtype=torch.float32
    )
    pool.arena.view(torch.bfloat16).copy_(words)
    return pool


def join(rank: int, key: str) -> tuple[WeightPool, list[torch.Tensor], Resident]:
    device = f"cuda:{rank}"
    torch.cuda.set_device(rank)
    memory = PeerMemory(device)
    pool = filled(rank, device, allocate=memory.allocate)
    arenas = memory.connect(key, rank, RANKS, timeout_s=120)
    for arena in arenas:
        assert arena.device == torch.device(device)
    whole = Resident([filled(other, device) for other in range(RANKS)])
    return pool, arenas, whole


def walk(ring: Ring, whole: Resident, steps: int, before=lambda layer: None) -> None:
    """Steps whose matrices are copied out, launched without a pause; compared at the end."""
    seen = []
    for step in range(steps):
        for layer in range(DIMS.num_layers):
            before(step * DIMS.num_layers + layer)
            for linear in LINEARS:
                seen.append((layer, linear, ring.acquire(layer, linear).join()))
                ring.release(layer, linear)
        seen.append((0, "lm_head", torch.cat([tile.clone() for tile in ring.head_tiles()])))
    (head,) = whole.head_tiles()
    for layer, linear, matrix in seen:
        want = head if linear == "lm_head" else whole.acquire(layer, linear).join()
        assert torch.equal(matrix, want), f"{linear} of layer {layer}"


def stream(rank: int, key: str) -> None:
    pool, arenas, whole = join(rank, key)
    ids = torch.arange(DIMS.vocab_size, device=pool.device)
    for in_place in (True, False):
        items = ring_items(pool.layout, rank, in_place)
        largest = max(item.nbytes(DIMS.itemsize) for item in items)
        for nbytes in (largest, largest * 3 // 2, None):
            for streams in (1, 2, 3):
                ring = Ring(
                    pool.layout, rank, arenas, torch.bfloat16, nbytes,
                    in_place=in_place, streams=streams, poison=True,
                )  # fmt: skip
                assert torch.equal(ring.embed(ids), whole.embed(ids))
                walk(ring, whole, 3)
                ring.close()


def multiply(rank: int, key: str) -> None:
    pool, arenas, whole = join(rank, key)
    halves = Resident([filled(other, pool.device) for other in range(RANKS)], rank)
    ring = Ring(pool.layout, rank, arenas, torch.bfloat16, poison=True)
    for layer in range(DIMS.num_layers):
        for linear in LINEARS:
            matrix = whole.acquire(layer, linear).parts[0]
            x = torch.randn(777, matrix.shape[1], device=pool.device).bfloat16()
            bias = torch.randn(matrix.shape[0], device=pool.device).bfloat16()
            streamed = ring.acquire(layer, linear)
            for with_bias in (None, bias):
                want = torch.nn.functional.linear(x, matrix, with_bias)
                split = linear_in_parts(x, halves.acquire(layer, linear), with_bias)
                # What the allocator gives next: rows that are not written would show.
                torch.full_like(want, float("nan"))
                got = linear_in_parts(x, streamed, with_bias)
                assert torch.equal(got, split), f"{linear} of layer {layer}"
                assert relative_error(got, want) < 2e-2
            ring.release(layer, linear)
    ring.close()


def test_products_are_those_of_resident_parts_bit_for_bit():
    mp.spawn(multiply, (uuid.uuid4().hex,), nprocs=RANKS)


def test_matrices_are_those_of_all_shards():
    mp.spawn(stream, (uuid.uuid4().hex,), nprocs=RANKS)


def owner(path: list[str], key: str) -> None:
    sys.path[:] = path
    torch.cuda.set_device(1)
    memory = PeerMemory("cuda:1")
    filled(1, "cuda:1", allocate=memory.allocate)
    memory.connect(key, 1, RANKS, timeout_s=120)
    signal.pause()


def reader(path: list[str], key: str, pid: int) -> None:
    sys.path[:] = path
    pool, arenas, whole = join(0, key)
    ring = Ring(pool.layout, 0, arenas, torch.bfloat16, poison=True)

    def kill(layer: int) -> None:
        if layer == 9:
            os.kill(pid, signal.SIGKILL)

    # Some copies were issued before the kill, most are after it.
    walk(ring, whole, 20, kill)
    ring.close()


def test_an_owner_that_is_killed_leaves_its_reader_sound():
    context = multiprocessing.get_context("spawn")
    key = uuid.uuid4().hex
    held = context.Process(target=owner, args=(sys.path, key), daemon=True)
    held.start()
    reads = context.Process(target=reader, args=(sys.path, key, held.pid))
    reads.start()
    held.join(150)
    assert held.exitcode == -signal.SIGKILL
    reads.join(150)
    assert reads.exitcode == 0
