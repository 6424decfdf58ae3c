"""Speed of the CPU ops `linear` and `paged_attention` against this machine's own limits.

    python bench/cpu_ops.py [--threads N] [--json FILE]

Weights and caches are rotated: a call finds none of its own in the caches. Every figure is the best
of several rounds, since other work on the machine can only slow a round down. GF/s are given beside
the share of the measured float32 GEMM peak; GB/s are bytes of weights, or of keys and values.
"""

import argparse
import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from torch_pd import ops

SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)]
"""(out, in) of SmolLM2-135M's linears."""
ROWS = [1, 8, 32, 512]
# (sequences, context, queries, heads, KV heads, head_dim)
ATTENTION = [
    (32, 150, 1, 9, 3, 64),
    (1, 150, 1, 9, 3, 64),
    (1, 16384, 1, 9, 3, 64),
    (8, 1024, 1, 32, 8, 128),
    (4, 512, 512, 9, 3, 64),
    (1, 2048, 512, 32, 8, 128),
]
DTYPES = [torch.float32, torch.bfloat16]
ROTATED_BYTES = 300 << 20


def best_seconds(call: Callable[[], object], rounds: int = 8, round_seconds: float = 0.03) -> float:
    """Time of one call in the best of ``rounds`` rounds of about ``round_seconds``."""
    start = time.perf_counter()
    call()
    repeats = max(1, min(1000, int(round_seconds / (time.perf_counter() - start))))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats)
    return min(times)


def gemm_peak() -> float:
    a, b = torch.randn(2, 1024, 1024)
    return 2 * 1024**3 / best_seconds(lambda: a @ b)


def bench_linear(peak: float) -> list[dict]:
    print(f"\nlinear{'':14}rows  out x in      GF/s  of peak  weights GB/s  F.linear GF/s")
    results = []
    for dtype, (out_features, width) in itertools.product(DTYPES, SHAPES):
        copies = max(2, ROTATED_BYTES // (out_features * width * dtype.itemsize))
        weights = [torch.randn(out_features, width, dtype=dtype) for _ in range(min(copies, 128))]
        for rows in ROWS:
            x, out = (
                torch.randn(rows, width, dtype=dtype),
                torch.empty(rows, out_features).to(dtype),
            )
            ours, theirs = itertools.cycle(weights), itertools.cycle(weights)
            seconds = best_seconds(lambda x=x, o=out, w=ours: ops.linear(x, next(w), None, o))
            other = best_seconds(lambda x=x, w=theirs: F.linear(x, next(w)), rounds=3)
            flops = 2 * rows * out_features * width
            row = {
                "dtype": str(dtype)[6:],
                "rows": rows,
                "out": out_features,
                "in": width,
                "gflops": flops / seconds / 1e9,
                "of_peak": flops / seconds / peak,
                "gbytes": weights[0].nbytes / seconds / 1e9,
                "torch_gflops": flops / other / 1e9,
            }
            results.append(row)
            print(
                f"  {row['dtype']:16}{rows:6}  {out_features:5} x {width:5}{row['gflops']:8.0f}"
                f"{row['of_peak']:8.0%}{row['gbytes']:13.1f}{row['torch_gflops']:14.0f}",
                flush=True,
            )
    return results


def bench_attention(peak: float) -> list[dict]:
    print(
        f"\npaged_attention{'':6}seqs  context  queries  heads  dim"
        "       us  KV GB/s    GF/s  of peak"
    )
    results = []
    block_size = 16
    for dtype, case in itertools.product(DTYPES, ATTENTION):
        seqs, context, queries, heads, kv_heads, dim = case
        pages = -(-context // block_size)
        kv_bytes = seqs * context * kv_heads * dim * 2 * dtype.itemsize
        layers = max(2, min(30, ROTATED_BYTES // kv_bytes))
        pool = torch.randn(seqs * pages + 1, layers, 2, block_size, kv_heads, dim).to(dtype)
        tables = (1 + torch.randperm(seqs * pages)).int().view(seqs, pages)
        seq_lens = torch.full((seqs,), context, dtype=torch.int32)
        query_start = torch.arange(0, seqs * queries + 1, queries, dtype=torch.int32)
        q = torch.randn(seqs * queries, heads, dim).to(dtype)
        out = torch.empty_like(q)
        views = itertools.cycle([(pool[:, i, 0], pool[:, i, 1]) for i in range(layers)])

        def call(q=q, out=out, views=views, tables=(tables, seq_lens, query_start)) -> None:
            ops.paged_attention(q, *next(views), *tables, out, q.shape[2] ** -0.5, len(q))

        seconds = best_seconds(call)
        flops = 4 * seqs * heads * dim * sum(range(context - queries + 1, context + 1))
        row = dict(
            zip(("seqs", "context", "queries", "heads", "kv_heads", "dim"), case, strict=True)
        )
        row |= {
            "dtype": str(dtype)[6:],
            "us": seconds * 1e6,
            "gbytes": kv_bytes / seconds / 1e9,
            "gflops": flops / seconds / 1e9,
            "of_peak": flops / seconds / peak,
        }
        results.append(row)
        print(
            f"  {row['dtype']:16}{seqs:6}{context:9}{queries:9}{heads:4}/{kv_heads:<3}{dim:4}"
            f"{row['us']:9.0f}{row['gbytes']:9.1f}{row['gflops']:8.0f}{row['of_peak']:8.0%}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peak = gemm_peak()
    print(
        f"{args.threads} threads, {ops.cpu_isa()}, torch {torch.__version__}: "
        f"float32 GEMM peak {peak / 1e9:.0f} GF/s"
    )
    record: dict = {"linear": bench_linear(peak), "paged_attention": bench_attention(peak)}
    if args.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        record |= {
            "command": " ".join(sys.argv),
            "cpu": platform.processor() or platform.machine(),
            "threads": args.threads,
            "isa": ops.cpu_isa(),
            "torch": torch.__version__,
            "commit": commit,
            "gemm_peak": peak,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
