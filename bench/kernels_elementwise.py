"""Timings of the paged, elementwise and sampling ops: a section of bench/kernels.py.

Widths of Qwen3-32B in bfloat16: hidden 5120, 64 query and 8 KV heads of 128, intermediate 25600,
pages of 16 tokens and 64 layers (4 MiB), in random order. All times are from graph replay. Calls
rotate over so many buffers that none finds its data in the L2 cache; the "graph" column of the rows
of 64 tokens is the same call on one set of buffers, as after the op that made its input.
"""

import math
from collections.abc import Callable
from itertools import cycle

import torch
from device_timing import Row, graph_us

from torch_pd import ops

HIDDEN, HEADS, KV_HEADS, DIM, INTERMEDIATE = 5120, 64, 8, 128, 25600
BLOCK, LAYERS, PAGES = 16, 64, 640
VOCAB = 151936
ROTATED_BYTES = 256 << 20
CALLS = 32
"""At least so many in a graph, one behind another as in a step: its start takes some 5 us."""
FLOAT8, INT8 = torch.uint8, torch.int8

Make = Callable[[int, int], tuple[Callable[[], None], int]]
"""(tokens, number of the buffer set) to a call and the bytes that it moves."""


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def norm(residual: bool) -> Make:
    def make(tokens: int, _: int):
        x, out, weight = normal(tokens, HIDDEN), normal(tokens, HIDDEN), normal(HIDDEN)
        other = normal(tokens, HIDDEN) if residual else None
        return (
            lambda: ops.rms_norm(x, weight, out, 1e-6, residual=other),
            x.nbytes * (4 if residual else 2),
        )

    return make


def gated(shards: int) -> Make:
    widths = [INTERMEDIATE // shards] * shards if shards > 1 else None

    def make(tokens: int, _: int):
        x, out = normal(tokens, 2 * INTERMEDIATE), normal(tokens, INTERMEDIATE)
        return lambda: ops.gated_act(x, out, "silu", shard_widths=widths), x.nbytes + out.nbytes

    return make


class Pool:
    """One pool for all calls; call number i works on layer i."""

    def __init__(self, dtype: torch.dtype):
        shape = (LAYERS, 2, BLOCK, KV_HEADS, DIM)
        size = math.prod(shape) * dtype.itemsize
        scale_bytes = math.prod(shape[:4]) * 4 if dtype in (FLOAT8, INT8) else 0
        memory = torch.empty(PAGES, size + scale_bytes, dtype=torch.uint8, device="cuda").random_()
        self.data = memory[:, :size].view(dtype).unflatten(1, shape)
        self.scales = None
        if scale_bytes:
            self.scales = memory[:, size:].view(torch.float32).unflatten(1, shape[:4])
        self.order = torch.randperm(PAGES, device="cuda")
        token = DIM * dtype.itemsize + (4 if scale_bytes else 0)
        self.token_bytes = 2 * KV_HEADS * token

    def caches(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data[:, layer % LAYERS, 0], self.data[:, layer % LAYERS, 1]

    def scale_arguments(self, layer: int) -> dict[str, torch.Tensor]:
        if self.scales is None:
            return {}
        scales = self.scales[:, layer % LAYERS]
        return {"k_scale": scales[:, 0], "v_scale": scales[:, 1]}

    def slots(self, tokens: int) -> torch.Tensor:
        """A prompt's slots if there are many tokens, else one token of each of many sequences."""
        if tokens >= BLOCK * 16:
            positions = torch.arange(tokens, device="cuda")
            return self.order[positions // BLOCK] * BLOCK + positions % BLOCK
        return self.order[:tokens] * BLOCK + torch.randint(BLOCK, (tokens,), device="cuda")

    def write(self, tokens: int, layer: int):
        qkv = normal(tokens, HEADS + 2 * KV_HEADS, DIM)
        k, v = qkv[:, HEADS : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]
        slots, (k_cache, v_cache) = self.slots(tokens), self.caches(layer)
        scales = self.scale_arguments(layer)
        source = tokens * 2 * KV_HEADS * DIM * 2
        return (
            lambda: ops.write_kv(k, v, k_cache, v_cache, slots, **scales),
            source + tokens * self.token_bytes,
        )

    def rope(self, tokens: int, layer: int):
        qkv = normal(tokens, (HEADS + 2 * KV_HEADS) * DIM)
        q, cos, sin = normal(tokens, HEADS, DIM), normal(tokens, DIM), normal(tokens, DIM)
        q_norm, k_norm, slots = normal(DIM), normal(DIM), self.slots(tokens)
        k_cache, v_cache = self.caches(layer)
        arguments = {"cos": cos, "sin": sin, "q_norm": q_norm, "k_norm": k_norm}
        arguments |= self.scale_arguments(layer)
        return (
            lambda: ops.rope_write_kv(qkv, q, k_cache, v_cache, slots, **arguments),
            qkv.nbytes + q.nbytes + cos.nbytes + sin.nbytes + tokens * self.token_bytes,
        )

    def gather(self, tokens: int, layer: int):
        """Sequences of 1,024 tokens, or of 16 if there are few."""
        length = 1024 if tokens >= 1024 else BLOCK
        count = tokens // length
        tables = self.order[: tokens // BLOCK].view(count, -1).int()
        lengths = torch.full((count,), length, dtype=torch.int32, device="cuda")
        starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")
        k, v = normal(2, tokens, KV_HEADS, DIM)
        k_cache, v_cache = self.caches(layer)
        scales = self.scale_arguments(layer)
        return (
            lambda: ops.gather_kv(k_cache, v_cache, tables, lengths, starts, k, v, **scales),
            k.nbytes + v.nbytes + tokens * self.token_bytes,
        )

    def copy(self, tokens: int, first: int):
        """Whole pages, one for 128 tokens."""
        count = tokens // 128
        memory = self.data.flatten(1)
        pages = self.order.roll(-2 * count * first)[: 2 * count]
        moves = pages.view(2, count).T.contiguous()
        return lambda: ops.copy_pages(memory, memory, moves), 2 * count * memory[0].nbytes


def timed(name: str, make: Make, tokens: int) -> Row:
    """The op on ``tokens`` tokens; under 1,000 also on one set of buffers."""
    first = make(tokens, 0)
    sets = min(160, max(2, -(-ROTATED_BYTES // first[1])))
    calls = [first[0]] + [make(tokens, i)[0] for i in range(1, sets)]
    turn = cycle(calls)
    count = sets * -(-CALLS // sets)
    row = Row(f"{name} {tokens} tokens", graph_us(lambda: next(turn)(), count), bytes=first[1])
    if tokens < 1000:
        row.graph = graph_us(first[0], 50)
    return row


def elementwise_rows() -> list[Row]:
    pool, fp8, int8 = Pool(torch.bfloat16), Pool(FLOAT8), Pool(INT8)
    makes: dict[str, Make] = {
        "rms_norm": norm(False),
        "rms_norm + residual": norm(True),
        "gated_act": gated(1),
        "gated_act 4 shards": gated(4),
        "rope_write_kv": pool.rope,
        "rope_write_kv fp8": fp8.rope,
        "rope_write_kv int8": int8.rope,
        "write_kv": pool.write,
        "write_kv fp8": fp8.write,
        "write_kv int8": int8.write,
        "gather_kv": pool.gather,
        "gather_kv fp8": fp8.gather,
        "gather_kv int8": int8.gather,
    }
    rows = [timed(name, make, tokens) for tokens in (8192, 64) for name, make in makes.items()]
    for pages in (64, 1):
        row = timed("copy_pages", pool.copy, pages * 128)
        row.name, row.graph = f"copy_pages {pages} x 4 MiB", None
        rows.append(row)
    return rows


# Settings (temperature, top_p, min_p) and top_k of every row.
SAMPLING = {
    "greedy": None,
    "temperature": ([1.0, 1.0, 0.0], 0),
    "min_p 0.05": ([1.0, 1.0, 0.05], 0),
    "top_k 50": ([1.0, 1.0, 0.0], 50),
    "top_p 0.9": ([1.0, 0.9, 0.0], 0),
    "top_k 50, top_p 0.9": ([1.0, 0.9, 0.0], 50),
}


def sampling_row(logits: torch.Tensor, name: str) -> Row:
    count, chosen = len(logits), SAMPLING[name]
    tokens = torch.zeros(count, dtype=torch.int64, device="cuda")
    arguments = ()
    if chosen is not None:
        settings = torch.tensor([chosen[0]] * count, dtype=torch.float64, device="cuda")
        keys = [[chosen[1], 1, 0, i] for i in range(count)]
        arguments = (settings, torch.tensor(keys, device="cuda"))
    us = graph_us(lambda: ops.sample(logits, tokens, *arguments), 4)
    row = Row(f"sample {count} x {VOCAB} {name}", us, bytes=logits.nbytes)
    if chosen is None:
        row.others["torch.argmax"] = graph_us(lambda: logits.argmax(1), 4)
    return row


def sampling_rows() -> list[Row]:
    """Bytes are those of one read of the logits."""
    rows = []
    for count in (1024, 64, 1):
        logits = normal(count, VOCAB) * 3
        rows += [sampling_row(logits, name) for name in SAMPLING]
    return rows
