"""Guarded tensors and pools on the device, the error flag, and moves, for the tests here."""

from collections.abc import Callable

import numpy as np
import reference
import torch
from hypothesis import settings
from hypothesis import strategies as st
from reference import FLOAT8, INT8
from test_moves import random_moves
from torch import Tensor

from torch_pd import ops
from torch_pd.kv.migrate import Migrator
from torch_pd.kv.moves import MoveQueue, Waits

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
LAYER = 1
nan = float("nan")
few = settings(max_examples=80, deadline=None)


def error() -> str | None:
    """The message of the error flag, which is cleared."""
    return ops.describe_errors(ops.device_errors(DEVICE).tolist())


def generators():
    return st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


def framed(*shape: int, dtype: torch.dtype, pad: int) -> tuple[Tensor, Tensor]:
    """A tensor of 7 on the device and a view of it, poisoned with NaN: ``pad`` columns on both
    sides of the last dimension, a row before and one behind."""
    whole = torch.full((shape[0] + 2, *shape[1:-1], shape[-1] + 2 * pad), 7.0, device=DEVICE)
    whole = whole.to(dtype)
    inside = whole[1:-1, ..., pad : shape[-1] + pad]
    inside.fill_(nan)
    return whole, inside


def assert_frame(whole: Tensor, inside: Tensor) -> None:
    inside.fill_(7)
    assert torch.equal(whole, torch.full_like(whole, 7))


# --- pools ---


@st.composite
def pools(draw, dtypes=(*DTYPES, FLOAT8, INT8)):
    return {
        "num_pages": draw(st.integers(3, 7)),  # the first and the last are guards
        "num_layers": 2,
        "block_size": draw(st.sampled_from([16, 32, 64])),
        "num_kv_heads": draw(st.sampled_from([1, 2, 3, 8])),
        "head_dim": draw(st.sampled_from([1, 7, 16, 20, 64, 80, 128, 256])),
        "dtype": draw(st.sampled_from(dtypes)),
        "generator": draw(generators()),
    }


def on_device(pool: reference.Pool, pinned: bool = False) -> reference.Pool:
    """The same pool on the device (or in pinned memory)."""
    memory = pool.memory.pin_memory() if pinned else pool.memory.to(DEVICE)
    return reference._pool_views(memory, pool.data.shape, pool.data.dtype)


def guarded(pool: reference.Pool) -> reference.Pool:
    """The pool without its first and last page; ``memory`` still has them."""
    cut = slice(1, -1)
    if pool.k_scale is None:
        return reference.Pool(pool.memory, pool.data[cut], None, None)
    return reference.Pool(pool.memory, pool.data[cut], pool.k_scale[cut], pool.v_scale[cut])


def random_slots(pool: reference.Pool, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Distinct slots in random order, every fifth or so replaced by padding."""
    count = pool.data.shape[0] * pool.data.shape[3]
    slots = torch.randperm(count, generator=generator)[:num_tokens]
    return slots.masked_fill(torch.rand(slots.shape, generator=generator) < 0.2, -1)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8).cpu(), b.contiguous().view(torch.uint8))


# --- moves ---


def move_in_order(
    gpu: Tensor, under: Callable[[], Tensor], queue: MoveQueue, migrator: Migrator, steps: int
) -> None:
    """Random moves beside kernels that write pages right before they move out and read them right
    after they came in; a slow kernel ahead makes every missing wait visible.

    Args:
        gpu: uint8 [pages, page_bytes].
        under: the pages under it, as a copy on the CPU.
    """
    (pages, page_bytes), want_gpu, want_under = gpu.shape, gpu.cpu(), under()
    rng = np.random.default_rng(page_bytes)
    slow = torch.randn(2048, 2048, device=gpu.device)
    seen = []
    for _ in range(steps):
        random_moves(rng, queue, want_gpu, want_under)
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
    assert torch.equal(under(), want_under)
    queue.done = migrator.done()
    assert not queue.in_flight
