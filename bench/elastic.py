"""Elastic KV pools: what mapping costs, beside a busy GPU and end to end.

    python bench/elastic.py [--only chunks,rates,full,engine] [--shape qwen3-8b] [--json FILE]

``chunks``: milliseconds of the host to map and to unmap chunks, one by one and several at once,
while the GPU is idle and while it has work for a while (does the call wait for it?), and what that
work takes longer. ``rates``: a copy, and decoding attention over pages in random order, in memory
of chunks and in memory allocated whole, in turn. ``full``: what happens when the GPU has no more.
``engine``: a load (random weights and prompts) with a pool allocated whole, one that is mapped
before, and one that grows with the load, all in one process and in turn, after a call of each.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch_pd._runtime as _runtime
from device_timing import median_us
from engine import SHAPES, Load, timed

from torch_pd import LLM, ops
from torch_pd.kv import elastic
from torch_pd.kv.cache import KVPool
from torch_pd.kv.elastic import ElasticPages

MIB = 1 << 20


def milliseconds(call: Any, *args: Any) -> float:
    start = time.perf_counter()
    call(*args)
    return (time.perf_counter() - start) * 1e3


def chunks(record: dict[str, Any]) -> None:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def work(*beside: Any) -> tuple[float, float]:
        """Milliseconds of the GPU for some GEMMs, and of a call that the host makes beside."""
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(100):
            a @ a
        stop.record()
        took = milliseconds(*beside) if beside else 0.0
        stop.synchronize()
        return start.elapsed_time(stop), took

    work()
    for size in (64, 128, 256):
        memory = _runtime.ElasticMemory(0, 4096 * MIB, size * MIB)
        count = memory.chunks
        memory.map(1)
        row: dict[str, Any] = {"chunk_mib": size}
        single = [milliseconds(memory.map, i) for i in range(2, count + 1)]
        row["map_one_ms"] = sorted(single)[len(single) // 2]
        single = [milliseconds(memory.unmap, i) for i in range(count - 1, 0, -1)]
        row["unmap_one_ms"] = sorted(single)[len(single) // 2]
        row["map_1gib_ms"] = milliseconds(memory.map, 1 + 1024 // size)
        row["unmap_1gib_ms"] = milliseconds(memory.unmap, 1)
        row["gemms_ms"] = work()[0]
        row["gemms_beside_map_ms"], row["map_1gib_busy_ms"] = work(memory.map, 1 + 1024 // size)
        row["gemms_beside_unmap_ms"], row["unmap_1gib_busy_ms"] = work(memory.unmap, 1)
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        record.setdefault("chunks", []).append(row)
        del memory
    start = time.perf_counter()
    pages = ElasticPages(16 << 10, 4 * MIB, torch.device("cuda", 0), 64 * MIB)
    record["reserve_64gib_ms"] = (time.perf_counter() - start) * 1e3
    print(f"reserve_64gib_ms {record['reserve_64gib_ms']:.4g}", flush=True)
    pages.close()


def rates(record: dict[str, Any]) -> None:
    device, layers, rows, width = torch.device("cuda", 0), 8, 256, 64
    count, page = rows * width + 1, layers * 2 * 16 * 8 * 128 * 2
    pools = {"whole": KVPool(count, layers, 16, 8, 128, torch.bfloat16, device)}
    for size in (64, 1024):
        pages = ElasticPages(count, page, device, size * MIB)
        pages.grow(count)
        form = (count, layers, 16, 8, 128, torch.bfloat16, device)
        pools[f"chunks of {size} MiB"] = KVPool(*form, pages.records)
    order = torch.randperm(count - 1, device=device) + 1
    tables = order.to(torch.int32).view(rows, width)
    lens = torch.full((rows,), width * 16, dtype=torch.int32, device=device)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
    q, out = torch.randn(2, rows, 32, 128, device=device, dtype=torch.bfloat16)
    for pool in pools.values():
        pool.records.view(torch.bfloat16).normal_()

    def attend(pool: KVPool) -> None:
        for layer in range(layers):
            cache = pool.layer(layer)
            ops.paged_attention(
                q, cache.k, cache.v, tables, lens, starts, out, 128**-0.5, 1
            )  # fmt: skip

    half = count // 2
    for turn in range(3):
        for name, pool in pools.items():
            records = pool.records
            copy = median_us(lambda records=records: records[:half].copy_(records[half : 2 * half]))
            attention = median_us(lambda pool=pool: attend(pool))
            row = {
                "memory": name,
                "copy_gb_s": 2 * half * page / copy / 1e3,
                "attention_gb_s": rows * width * page / attention / 1e3,
            }
            record.setdefault("rates", []).append(row)
            print(turn, "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else v
                  for k, v in row.items()), flush=True)  # fmt: skip


def full(record: dict[str, Any]) -> None:
    pages = ElasticPages(1 << 12, 64 * MIB, torch.device("cuda", 0), 64 * MIB)  # 256 GiB
    pages.grow(16)
    pages.records[:16].fill_(3)
    record["full_ms"] = milliseconds(pages.grow, 1 << 12)
    assert pages.stuck
    assert bool((pages.records[:16] == 3).all())
    print(f"full after {record['full_ms']:.1f} ms: {pages.why_stuck()}", flush=True)
    record["full_unmap_ms"] = milliseconds(pages._memory.unmap, 16)
    assert bool((pages.records[:16] == 3).all())
    print(f"given back in {record['full_unmap_ms']:.1f} ms", flush=True)


def engine(record: dict[str, Any], folder: Path, load: Load, vocab: int, settings: dict) -> None:
    prompts = load.prompts(vocab)
    rows: dict[str, list[dict[str, float]]] = {}
    fields = {"load_format": "dummy", "enable_prefix_caching": False, **settings}
    with LLM(str(folder), **fields) as whole, LLM(str(folder), elastic_kv=True, **fields) as grows:
        pool = grows.engine.elastic
        assert pool is not None
        for llm in (whole, grows):
            timed(llm, prompts, load.out)
        for name in ("whole", "mapped before", "grows") * 3:
            elastic.WINDOW = 64
            if name == "mapped before":
                elastic.WINDOW = 1 << 30
                pool.grow(pool.records.shape[0])
            seconds, change = timed(whole if name == "whole" else grows, prompts, load.out)
            busy, idle = change["device_busy"], change["device_idle"]
            row = {
                "output_tokens_per_s": load.count * load.out / seconds,
                "idle_share": idle / (busy + idle) if busy + idle else 0.0,
            }
            rows.setdefault(name, []).append(row)
            print(name, "  ".join(f"{k} {v:.5g}" for k, v in row.items()), flush=True)
        stats = {k: v for k, v in grows.stats().items() if k.startswith("kv_")}
        print(stats)
        print(grows.engine.memory_table(), flush=True)
    record["engine"] = {"load": str(load), "rows": rows, "stats": stats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="chunks,rates,full,engine")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--load", default="160:512:128", help="prompts:mean length:output")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("FIELD", "JSON"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
    }
    parts = args.only.split(",")
    if "chunks" in parts:
        chunks(record)
    if "rates" in parts:
        rates(record)
    if "full" in parts:
        full(record)
    if "engine" in parts:
        import tempfile

        shape = SHAPES[args.shape]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(shape))
            settings = {"kv_cache_gib": 15.5} | {n: json.loads(value) for n, value in args.set}
            load = Load(*map(int, args.load.split(":")))
            engine(record, Path(folder), load, shape["vocab_size"], settings)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
