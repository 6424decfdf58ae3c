"""Elastic KV pools: what mapping costs, beside a busy GPU and end to end.

    python bench/elastic.py [--only chunks,full,engine] [--shape qwen3-8b] [--json FILE]

``chunks``: milliseconds of the host to map and to unmap chunks, one by one and several at once,
while the GPU is idle and while it has work for a while (does the call wait for it?), and what that
work takes longer; then the rate of a copy in mapped and in ordinary memory. ``full``: what happens
when the GPU has no more. ``engine``: a load (random weights and prompts) with a pool allocated
whole, one that is mapped before, and one that grows with the load; one call warms up, then the
calls are timed in turn.
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

from torch_pd import LLM
from torch_pd.kv import elastic
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
    pages.grow(1 << 10)
    for name, memory in (
        ("mapped", pages.records[: 1 << 10]),
        ("ordinary", torch.empty((1 << 10, 4 * MIB), dtype=torch.uint8, device="cuda")),
    ):
        half = len(memory) // 2
        us = median_us(lambda memory=memory, half=half: memory[:half].copy_(memory[half:]))
        record[f"copy_{name}_gb_s"] = 2 * half * 4 * MIB / us / 1e3
    for name in ("reserve_64gib_ms", "copy_mapped_gb_s", "copy_ordinary_gb_s"):
        print(f"{name} {record[name]:.4g}", flush=True)


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
    for on in (False, True):
        with LLM(
            str(folder), load_format="dummy", elastic_kv=on, enable_prefix_caching=False,
            **settings,
        ) as llm:  # fmt: skip
            timed(llm, prompts[: max(1, len(prompts) // 4)], load.out)
            pool = llm.engine.elastic
            names = ["whole"] * 3 if pool is None else ["mapped before", "grows"] * 3
            for name in names:
                elastic.WINDOW = 64
                if name == "mapped before":
                    elastic.WINDOW = 1 << 30
                    pool.grow(pool.records.shape[0])
                seconds, change = timed(llm, prompts, load.out)
                busy, idle = change["device_busy"], change["device_idle"]
                row = {
                    "output_tokens_per_s": load.count * load.out / seconds,
                    "idle_share": idle / (busy + idle) if busy + idle else 0.0,
                }
                rows.setdefault(name, []).append(row)
                print(name, "  ".join(f"{k} {v:.5g}" for k, v in row.items()), flush=True)
            if pool is not None:
                record["stats"] = {k: v for k, v in llm.stats().items() if k.startswith("kv_")}
                print(record["stats"])
            print(llm.engine.memory_table(), flush=True)
    record["engine"] = {"load": str(load), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="chunks,full,engine")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--load", default="256:512:128", help="prompts:mean length:output")
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
    if "full" in parts:
        full(record)
    if "engine" in parts:
        import tempfile

        shape = SHAPES[args.shape]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(shape))
            settings = {name: json.loads(value) for name, value in args.set}
            load = Load(*map(int, args.load.split(":")))
            engine(record, Path(folder), load, shape["vocab_size"], settings)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
