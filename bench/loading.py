"""How fast weights reach one GPU, and with how much memory: files, dummy weights, pooled slices.

    python bench/loading.py --folder DIR [--layers N] [--ranks N] [--pooled-layers N] [--json FILE]

Writes a checkpoint of the Qwen3-8B shape with random weights to DIR (N layers; 36 are 16.4 GB),
then loads it several ways, each in turn and checked against the others. Beside them the limits of
the same run: a pinned host buffer to the GPU, and the files read into memory by as many threads.
Pooled loads are those of one rank of several (``--ranks``), of the same files and, without files,
of the Qwen3-32B shape.
"""

import argparse
import functools
import gc
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config

from torch_pd.config import EngineConfig
from torch_pd.nn.patch import patch_model
from torch_pd.nn.pooled_model import load_pooled
from torch_pd.weights.checkpoint import CHUNK_BYTES, MAX_THREADS
from torch_pd.weights.loader import load_model

GIB = 2**30


def qwen3(layers: int, **sizes: int) -> Qwen3Config:
    """A config of the Qwen3-8B shape, with changes."""
    shape = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    return Qwen3Config(**(shape | sizes), num_hidden_layers=layers)


def host_peak() -> int:
    """Bytes of this process at most since `measure` began, pages of mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(name: str, load: Callable[[], Any], nbytes: int | None, rows: list[dict]) -> Any:
    """Runs a load and notes seconds, GB/s, and the growth of host and device memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")
    host, device = host_peak(), torch.cuda.memory_allocated()
    start = time.perf_counter()
    result = load()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if nbytes is None:
        nbytes = torch.cuda.memory_allocated() - device
    row = {
        "name": name,
        "seconds": round(seconds, 3),
        "gb": round(nbytes / 1e9, 2),
        "gb_per_s": round(nbytes / seconds / 1e9, 1),
        "device_peak_gb": round((torch.cuda.max_memory_allocated() - device) / 1e9, 2),
        "host_peak_gb": round((host_peak() - host) / 1e9, 2),
    }
    rows.append(row)
    print(
        f"{name:44} {row['seconds']:8.2f} s {row['gb']:7.2f} GB {row['gb_per_s']:7.1f} GB/s   peak "
        f"device {row['device_peak_gb']:6.2f} host {row['host_peak_gb']:6.2f} GB",
        flush=True,
    )
    return result


def read_files(files: list[Path]) -> None:
    """All bytes into a buffer of each thread, as fast as they come."""
    chunks = [(f, at) for f in files for at in range(0, f.stat().st_size, CHUNK_BYTES)]
    lock = threading.Lock()

    def work() -> None:
        buffer = bytearray(CHUNK_BYTES)
        opened = {file: os.open(file, os.O_RDONLY) for file in files}
        while True:
            with lock:
                if not chunks:
                    break
                file, at = chunks.pop()
            os.preadv(opened[file], [buffer], at)
        for descriptor in opened.values():
            os.close(descriptor)

    threads = [threading.Thread(target=work) for _ in range(MAX_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def drop_cache(files: list[Path]) -> None:
    """Asks the kernel to forget the pages of these files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure_limits(files: list[Path], rows: list[dict]) -> None:
    """What the bus and the page cache give."""
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

    def copy(times: int) -> None:
        for _ in range(times):
            there.copy_(pinned, non_blocking=True)

    copy(1)
    torch.cuda.synchronize()
    measure("limit: pinned 1 GiB to the GPU, 8 times", lambda: copy(8), 8 << 30, rows)
    read_files(files)
    nbytes = sum(file.stat().st_size for file in files)
    name = f"limit: files into memory, {MAX_THREADS} threads"
    measure(name, lambda: read_files(files), nbytes, rows)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models hold the same weights."""
    other = b.state_dict()
    return all(torch.equal(value, other[key]) for key, value in a.state_dict().items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--pooled-layers", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.zeros(1, device="cuda")
    rows: list[dict] = []
    args.folder.mkdir(parents=True, exist_ok=True)
    qwen3(args.layers).save_pretrained(args.folder)

    def load(load_format: str) -> Any:
        return load_model(args.folder, dtype="auto", load_format=load_format, device="cuda", seed=0)

    dummy = measure("dummy, first", lambda: load("dummy"), None, rows)
    files = sorted(args.folder.glob("*.safetensors"))
    if not files:
        dummy.save_pretrained(args.folder, max_shard_size="4GB")
        files = sorted(args.folder.glob("*.safetensors"))
    del dummy
    dummy = measure("dummy", lambda: load("dummy"), None, rows)
    measure_limits(files, rows)
    direct = measure("safetensors", lambda: load("auto"), None, rows)
    assert same(direct, dummy)
    measure("patch_model of that", functools.partial(patch_model, direct), None, rows)
    del direct

    def load_by_transformers() -> Any:
        return AutoModelForCausalLM.from_pretrained(args.folder, dtype="auto", device_map="cuda")

    theirs = measure("transformers from_pretrained", load_by_transformers, None, rows)
    assert same(theirs, dummy)
    del theirs, dummy
    drop_cache(files)
    measure("safetensors, page cache dropped", lambda: load("auto"), None, rows)

    arenas = []
    for load_format in ("auto", "dummy"):
        config = EngineConfig(load_format=load_format)
        _, pool = measure(
            f"pooled, rank 1 of {args.ranks}, {load_format}",
            functools.partial(load_pooled, args.folder, config, 1, args.ranks, "cuda"),
            None,
            rows,
        )
        shard = pool.arena.nbytes
        allowed = (1.2 * shard + pool.embedding.nbytes * args.ranks) / 1e9
        assert rows[-1]["device_peak_gb"] + rows[-1]["host_peak_gb"] < allowed
        arenas.append(pool.arena)
    assert torch.equal(*arenas)
    arenas.clear()
    del pool
    big = qwen3(
        args.pooled_layers,
        hidden_size=5120,
        intermediate_size=25600,
        num_attention_heads=64,
    )
    config = EngineConfig(load_format="dummy")
    measure(
        f"Qwen3-32B shape, dummy, rank 1 of {args.ranks}",
        lambda: load_pooled(big, config, 1, args.ranks, "cuda"),
        None,
        rows,
    )
    if args.json:
        about = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpus": len(os.sched_getaffinity(0)),
            "layers": args.layers,
        }
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
