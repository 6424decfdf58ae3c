"""Times the CUDA ops against this GPU's measured limits, beside FlashInfer if it is installed.

    python bench/kernels.py [--only decode,prefill,pages,elementwise,sampling] [--json FILE]

Attention runs over pools laid out as the engine's: the pages of one layer lie a whole page record
(all layers) apart, in random order. Every call takes another layer, so that no call finds its
keys in the L2 cache. "contiguous": our kernel on pools of one layer each, FlashInfer's own layout;
FlashInfer is timed on both.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from device_timing import Limits, Row, graph_us, median_us

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels_elementwise import elementwise_rows, sampling_rows

from torch_pd import ops
from torch_pd.sizing import KVShape

BLOCK, DIM = 16, 128
BYTES = {torch.uint8: 31 / 4096, torch.int8: 127}
"""Dtypes stored with a float32 scale for each token and head, and their largest values."""
LAYERS_USED = 3
POOL_BYTES = 24 << 30
HAS_FLASHINFER = importlib.util.find_spec("flashinfer") is not None


class Pages:
    """Sequences of ``lens`` tokens in a pool ``[P, L, 2, B, Hkv, D]``, pages in random order."""

    def __init__(
        self,
        lens: list[int],
        kv_heads: int,
        dtype: torch.dtype,
        layers: int = 64,
        padded: bool = True,
    ):
        self.lens, self.kv_heads = lens, kv_heads
        self.counts = [-(-n // BLOCK) for n in lens]
        self.total = sum(self.counts)
        one = 2 * BLOCK * kv_heads * DIM * dtype.itemsize
        scale_bytes = 2 * BLOCK * kv_heads * 4 if dtype in BYTES else 0
        self.layers = max(
            LAYERS_USED, min(layers, POOL_BYTES // (self.total * (one + scale_bytes)))
        )
        record = KVShape(self.layers, kv_heads, DIM, dtype.itemsize, BLOCK, dtype in BYTES)
        self.stride = record.page_bytes if padded else record.data_bytes + record.scale_bytes
        memory = torch.empty(self.total, self.stride, dtype=torch.uint8, device="cuda")
        shape = (self.layers, 2, BLOCK, kv_heads, DIM)
        self.data = memory[:, : one * self.layers].view(dtype).unflatten(1, shape)
        self.scales = None
        if scale_bytes:
            scales = memory[:, record.data_bytes :][:, : record.scale_bytes]
            self.scales = scales.view(torch.float32).unflatten(1, shape[:4])
        for layer in range(LAYERS_USED):
            if self.scales is None:
                self.data[:, layer].normal_()
            else:
                self.data[:, layer].view(torch.uint8).random_()  # any byte is a value
                self.scales[:, layer].uniform_(1 / BYTES[dtype], 4 / BYTES[dtype])
        self.order = torch.randperm(self.total, device="cuda", dtype=torch.int32)
        self.tables = torch.zeros(len(lens), max(self.counts), dtype=torch.int32, device="cuda")
        start = 0
        for s, count in enumerate(self.counts):
            self.tables[s, :count] = self.order[start : start + count]
            start += count
        self.seq_lens = torch.tensor(lens, dtype=torch.int32, device="cuda")

    def nbytes(self) -> int:
        """Bytes of the keys and values (and scales) of one layer."""
        token = 2 * self.kv_heads * (DIM * self.data.element_size() + 4 * (self.scales is not None))
        return sum(self.lens) * token

    def contiguous(self) -> "list[torch.Tensor]":
        """Each layer as a pool ``[P, 2, B, Hkv, D]`` of its own."""
        return [self.data[:, layer].contiguous() for layer in range(LAYERS_USED)]

    def ours(
        self, heads: int, queries: list[int], pools: list[torch.Tensor] | None = None
    ) -> Callable[[], None]:
        """A call on the next of ``pools``, on the next layer of this pool by default."""
        tokens = sum(queries)
        q = torch.randn(tokens, heads, DIM, device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(q)
        starts = torch.tensor([0, *queries]).cumsum(0).int().cuda()
        # Views are made once, as in an engine: making them takes the host longer than a launch.
        views = []
        for layer, pool in enumerate(pools or self.data[:, :LAYERS_USED].unbind(1)):
            scales = {}
            if self.scales is not None:
                scales = {"k_scale": self.scales[:, layer, 0], "v_scale": self.scales[:, layer, 1]}
            views.append((pool[:, 0], pool[:, 1], scales))
        layers = cycle(views)

        def call() -> None:
            k_cache, v_cache, scales = next(layers)
            ops.paged_attention(
                q,
                k_cache,
                v_cache,
                self.tables,
                self.seq_lens,
                starts,
                out,
                DIM**-0.5,
                max(queries),
                **scales,
            )

        return call

    def flashinfer(self, heads: int, queries: list[int], backend: str) -> dict[str, float]:
        """Microseconds of FlashInfer on its own layout and on these views ("strided")."""
        import flashinfer

        space = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        q = torch.randn(sum(queries), heads, DIM, device="cuda", dtype=torch.bfloat16)
        indptr = torch.tensor([0, *self.counts]).cumsum(0).int().cuda()
        last = (self.seq_lens - 1) % BLOCK + 1
        shape = (heads, self.kv_heads, DIM, BLOCK)
        kinds = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        if max(queries) == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                space, "NHD", use_tensor_cores=True, backend=backend
            )
            wrapper.plan(indptr, self.order, last, *shape, **kinds)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend=backend)
            starts = torch.tensor([0, *queries]).cumsum(0).int().cuda()
            wrapper.plan(starts, indptr, self.order, last, *shape, causal=True, **kinds)
        others = {}
        views = self.data[:, :LAYERS_USED].unbind(1)
        for layout, pools in (("", self.contiguous()), (" strided", views)):
            turn = cycle(pools)

            def call(turn=turn) -> torch.Tensor:
                return wrapper.run(q, next(turn))

            others[f"flashinfer {backend}{layout}"] = median_us(call)
            if max(queries) == 1:
                others[f"flashinfer {backend}{layout} graph"] = graph_us(call)
        # It must have read these views as they are: the answers of both layouts are the same.
        torch.testing.assert_close(
            wrapper.run(q, views[0]), wrapper.run(q, views[0].contiguous()), rtol=0, atol=0
        )
        return others


# Query heads, KV heads, sequences, tokens of each.
DECODE = [
    (64, 8, 128, 4096),
    (64, 8, 256, 1024),
    (64, 8, 256, 2048),
    (64, 8, 128, 1024),
    (64, 8, 64, 1024),
    (64, 8, 16, 4096),
    (64, 8, 1, 8192),
    (32, 8, 256, 1024),
]
# Sequences, least and most tokens: cut wherever the slices of a call end.
MIXED = [(64, 300, 2483), (256, 256, 768)]


def decode_rows(peers: bool) -> list[Row]:
    rows = []

    def add(name: str, pages: Pages, heads: int, peer: bool) -> None:
        queries = [1] * len(pages.lens)
        call = pages.ours(heads, queries)
        row = Row(name, median_us(call), bytes=pages.nbytes(), graph=graph_us(call))
        if pages.scales is None:
            call = pages.ours(heads, queries, pages.contiguous())
            row.others["contiguous graph"] = graph_us(call)
        if peer:
            row.others |= pages.flashinfer(heads, queries, "fa2")
        rows.append(row)

    for heads, kv_heads, count, length in DECODE:
        name = f"decode {heads}/{kv_heads} b={count} ctx={length}"
        add(name, Pages([length] * count, kv_heads, torch.bfloat16), heads, peers)
        if count * length >= 128 * 1024:
            for kind, dtype in zip(("fp8", "int8"), BYTES, strict=True):
                add(f"{name} {kind}", Pages([length] * count, kv_heads, dtype), heads, False)
    lens = [512] * 60 + [32768] + [512] * 67
    add("decode 64/8 1 x 32768 + 127 x 512", Pages(lens, 8, torch.bfloat16), 64, peers)
    generator = torch.Generator().manual_seed(0)
    for count, least, most in MIXED:
        lens = torch.randint(least, most + 1, (count,), generator=generator).tolist()
        name = f"decode 64/8 b={count} ctx={least}..{most}"
        add(name, Pages(lens, 8, torch.bfloat16), 64, peers)
        add(f"{name} fp8", Pages(lens, 8, torch.uint8), 64, False)
    return rows


def page_rows() -> list[Row]:
    """Page records of several numbers of layers: with the unused end that some have, without."""
    rows = []
    for layers in (32, 36, 40, 48, 64, 80):
        pages = Pages([1024] * 64, 8, torch.bfloat16, layers)
        call = pages.ours(64, [1] * 64)
        row = Row(f"decode 64/8 b=64 ctx=1024, {layers} layers a page", 0.0, bytes=pages.nbytes())
        row.us = row.graph = graph_us(call)
        packed = Pages([1024] * 64, 8, torch.bfloat16, layers, padded=False)
        row.others["packed graph"] = graph_us(packed.ours(64, [1] * 64))
        rows.append(row)
    return rows


# Query heads, KV heads, sequences, new tokens of each, tokens of each.
PREFILL = [
    (64, 8, 8, 1024, 1024),
    (64, 8, 1, 8192, 8192),
    (64, 8, 1, 2048, 32768),
    (32, 8, 16, 512, 512),
]


def varlen_us(heads: int, count: int, length: int) -> float:
    """torch's attention of packed sequences, without pages, heads expanded."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = torch.randn(3, count * length, heads, DIM, device="cuda", dtype=torch.bfloat16)
    starts = torch.arange(0, count * length + 1, length, device="cuda", dtype=torch.int32)
    return median_us(
        lambda: varlen_attn(q, k, v, starts, starts, length, length, window_size=(-1, 0)), 8
    )


def prefill_rows(peers: bool) -> list[Row]:
    rows = []
    for heads, kv_heads, count, new, length in PREFILL:
        pages = Pages([length] * count, kv_heads, torch.bfloat16)
        queries = [new] * count
        flops = count * 4 * heads * DIM * (new * length - new * new / 2)
        call = pages.ours(heads, queries)
        name = f"prefill {heads}/{kv_heads} {count} x {new} on {length}"
        row = Row(name, median_us(call), flops=flops)
        if new == length:
            row.others["varlen_attn"] = varlen_us(heads, count, length)
        if peers:
            row.others |= pages.flashinfer(heads, queries, "fa3")
        rows.append(row)
    # A mixed step: two chunks beside decoding sequences.
    pages = Pages([512] * 2 + [2048] * 128, 8, torch.bfloat16)
    queries = [512] * 2 + [1] * 128
    row = Row("mixed 64/8 2 x 512 new + 128 decoding at 2048", 0.0, bytes=pages.nbytes())
    row.us = median_us(pages.ours(64, queries))
    rows.append(row)
    return rows


SECTIONS: dict[str, Callable[[bool], list[Row]]] = {
    "decode": decode_rows,
    "prefill": prefill_rows,
    "pages": lambda _: page_rows(),
    "elementwise": lambda _: elementwise_rows(),
    "sampling": lambda _: sampling_rows(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma separated")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--no-peers", action="store_true", help="time nothing but our ops")
    args = parser.parse_args()
    peers = HAS_FLASHINFER and not args.no_peers
    chosen = args.only.split(",")
    for name in chosen:
        if name not in SECTIONS:
            parser.error(f"unknown section {name!r}, there are {', '.join(SECTIONS)}")
    torch.manual_seed(0)
    limits = Limits.measure()
    print(
        f"{limits.device}, torch {torch.__version__}: copy {limits.copy / 1e9:.0f} GB/s, "
        f"bf16 GEMM {limits.gemm / 1e12:.0f} TF/s",
        flush=True,
    )
    rows = []
    for name in chosen:
        for row in SECTIONS[name](peers):
            print(row.line(limits), flush=True)
            rows.append(row)
    errors = ops.describe_errors(ops.device_errors("cuda").tolist())
    if errors is not None:
        raise RuntimeError(errors)
    if args.json:
        record = {"device": limits.device, "torch": torch.__version__, "copy": limits.copy}
        record |= {"gemm": limits.gemm, "rows": [row.record() for row in rows]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
