"""The engine over KV tiers: swap, shared prefixes, a sequence larger than the GPU pool.

    python bench/tiers.py [--only swap,swap1k,prefix,long,peer] [--small] [--layers N]
                          [--folder /tmp] [--questions N] [--prefix none,gpu,host,disk]
                          [--json FILE]

Qwen3-8B shape (--layers cuts it), random weights, bfloat16, random tokens, greedy. --small takes
the shape of SmolLM2-135M in float32 and much less work, for a CPU, whose main pool plays the
GPU's part. Every line is an engine of its own, one after the other in one process; those of "peer"
take two GPUs, of which one lends its memory to the other.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch_pd import LLM, SamplingParams

GIB = 1 << 30
BLOCK = 16


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


class Bench:
    """Engines of one shape. ``divide`` (1 or more) makes counts and lengths smaller."""

    def __init__(self, shape: dict, layers: int | None, divide: int, results: dict):
        self.shape = dict(shape)
        if layers is not None:
            self.shape["num_hidden_layers"] = layers
        self.divide, self.results = divide, results
        self.dtype = self.shape["torch_dtype"]
        self.folder = tempfile.mkdtemp()
        (Path(self.folder) / "config.json").write_text(
            json.dumps(self.shape | {"max_position_embeddings": 131072})
        )

    def gib_of(self, tokens: int) -> float:
        """GiB of the KV pages of so many tokens, and of page 0."""
        shape = self.shape
        item = {"bfloat16": 2, "float32": 4}[self.dtype]
        token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
        return (-(-tokens // BLOCK) + 1.5) * BLOCK * token * item / GIB

    def tokens(self, rng: random.Random, count: int) -> list[int]:
        """Random tokens."""
        return [rng.randrange(1000, self.shape["vocab_size"]) for _ in range(count)]

    def run(
        self, name: str, prompts: list[list[int]], params: SamplingParams, **config: Any
    ) -> tuple[list[list[int]], dict]:
        """One engine's tokens; prints and keeps its figures."""
        start = time.perf_counter()
        llm = LLM(self.folder, load_format="dummy", dtype=self.dtype, max_num_seqs=256, **config)
        ready = time.perf_counter() - start
        with llm:
            warm = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
            llm.generate([[5] * 40] * 2, warm, use_tqdm=False)
            before = llm.stats()
            start = time.perf_counter()
            outputs = llm.generate(
                [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
            )
            seconds = time.perf_counter() - start
            stats = llm.stats()
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        count = sum(map(len, tokens))
        kept = (
            "steps",
            "preemptions",
            "swapped_sequences",
            "prefix_pages_looked_up",
            "prefix_pages_hit",
            "prefix_pages_hit_host",
            "moved_in_bytes",
            "moved_out_bytes",
            "peer_in_bytes",
            "peer_out_bytes",
            "disk_read_bytes",
            "disk_written_bytes",
            "disk_errors",
            "device_busy",
            "device_idle",
            "kv_tokens",
        )
        row = {
            "name": name,
            "seconds": seconds,
            "ready": ready,
            "output_tok_s": count / seconds,
            "prompt_tok_s": sum(map(len, prompts)) / seconds,
            **{
                key: stats[key] - (before[key] if key != "kv_tokens" else 0)
                for key in kept
                if key in stats
            },
        }
        self.results.setdefault("runs", []).append(row)
        moved = [row.get(f"moved_{way}_bytes", 0) / 1e9 for way in ("in", "out")]
        disk = [row.get(f"disk_{way}_bytes", 0) / 1e9 for way in ("read", "written")]
        idle = row["device_idle"] / max(1e-9, row["device_idle"] + row["device_busy"])
        looked = max(1, row["prefix_pages_looked_up"])
        host_hits = row.get("prefix_pages_hit_host", 0) / looked
        print(
            f"{name:28} {seconds:6.2f} s  out {row['output_tok_s']:7.0f} tok/s  prompt "
            f"{row['prompt_tok_s']:8.0f} tok/s  preempted {row['preemptions']:4} swapped "
            f"{row.get('swapped_sequences', 0):4}  hits gpu {row['prefix_pages_hit'] / looked:4.0%}"
            f" host {host_hits:4.0%}  moved in/out {moved[0]:.1f}/{moved[1]:.1f} GB, disk r/w "
            f"{disk[0]:.1f}/{disk[1]:.1f} GB  steps {row['steps']}  idle {idle:.0%}  "
            f"ready {ready:.1f} s",
            flush=True,
        )
        del llm
        torch.cuda.empty_cache()
        return tokens, row


def equal_share(a: list[list[int]], b: list[list[int]]) -> str:
    same = sum(x == y for x, y in zip(a, b, strict=True))
    return f"{same} of {len(a)} outputs equal"


def bench_swap(bench: Bench, folder: str, count: int, prompt: int, out: int) -> None:
    """Work whose pages come to four times the pool."""
    count, out = count // bench.divide, out // bench.divide
    rng = random.Random(0)
    prompts = [bench.tokens(rng, rng.randint(prompt // 2, prompt * 3 // 2)) for _ in range(count)]
    params = SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False)
    whole = count * (prompt + out)
    base = {"max_model_len": 2048, "enable_prefix_caching": False}
    full, quarter = bench.gib_of(whole), bench.gib_of(whole // 4)
    print(f"swap: {count} prompts of {prompt}, {out} out; pool of {whole} or {whole // 4} tokens")
    unlimited, _ = bench.run("unlimited pool", prompts, params, kv_cache_gib=full, **base)
    again, _ = bench.run("quarter, recompute", prompts, params, kv_cache_gib=quarter, **base)
    swapped, _ = bench.run(
        "quarter, swap", prompts, params, kv_cache_gib=quarter, host_kv_gib=full, **base
    )
    disk = {"host_kv_gib": quarter / 2, "disk_kv_gib": full, "disk_kv_path": folder}
    base["enable_prefix_caching"] = True  # which the disk needs; no two prompts begin alike
    deeper, _ = bench.run(
        "quarter, swap on to disk", prompts, params, kv_cache_gib=quarter, **disk, **base
    )
    for name, tokens in (("recompute", again), ("swap", swapped), ("with a disk", deeper)):
        print(f"  {name}: {equal_share(unlimited, tokens)}")


def bench_prefix(bench: Bench, folder: str, questions: int, lines: list[str]) -> None:
    """64 prefixes of 4096 tokens, four times the GPU pool, asked in random order."""
    count, length = 64 // bench.divide, 4096 // bench.divide
    rng = random.Random(1)
    prefixes = [bench.tokens(rng, length) for _ in range(count)]
    prompts = [prefix + bench.tokens(rng, 32) for prefix in prefixes for _ in range(questions)]
    rng.shuffle(prompts)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    pool, large = bench.gib_of(count * length // 4), bench.gib_of(count * length * 5 // 4)
    base = {"max_model_len": length + 64, "kv_cache_gib": pool}
    disk = {"host_kv_gib": pool, "disk_kv_gib": large, "disk_kv_path": folder}
    kinds: dict[str, tuple[str, dict]] = {
        "none": ("no cache", {"enable_prefix_caching": False}),
        "gpu": ("GPU", {}),
        "host": ("GPU + host", {"host_kv_gib": large}),
        "disk": ("GPU + small host + disk", disk),
    }
    print(f"prefix: {count} x {length} tokens, {questions} questions each, pool of a quarter")
    for line in lines:
        name, config = kinds[line]
        bench.run(name, prompts, params, **base, **config)


def bench_long(bench: Bench, over: str = "host") -> None:
    """One sequence of 128K tokens over a GPU pool of 32K, the rest in host memory or a peer's."""
    total = 131072 // bench.divide**2
    prompt = bench.tokens(random.Random(2), total - 64)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    base = {"max_model_len": total, "enable_prefix_caching": False}
    whole_gib, part_gib = bench.gib_of(total), bench.gib_of(total // 4)
    host = {"host_kv_gib": whole_gib}
    peer = {"data_parallel_size": 2, "data_ranks": [0], "peer_kv_gib": whole_gib}
    part_name, name = ("pool of a quarter", "long") if over == "host" else ("a quarter, peer", over)
    print(f"{name}: one sequence of {total} tokens, {bench.shape['num_hidden_layers']} layers")
    whole, _ = bench.run("whole pool", [prompt], params, kv_cache_gib=whole_gib, **base)
    rest = host if over == "host" else peer
    part, _ = bench.run(part_name, [prompt], params, kv_cache_gib=part_gib, **rest, **base)
    same = next((i for i, (a, b) in enumerate(zip(whole[0], part[0], strict=True)) if a != b), 16)
    bench.results[f"{name}_equal_tokens"] = same
    print(f"  the first {same} of 16 tokens are equal")
    if over == "peer":
        bench.run("a quarter, host", [prompt], params, kv_cache_gib=part_gib, **host, **base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="swap,swap1k,prefix,long")
    parser.add_argument("--small", action="store_true", help="SmolLM2-135M's shape, less work")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--prefix", default="none,gpu,host,disk", help="lines of prefix")
    parser.add_argument("--folder", default="/tmp", help="for the file of the disk tier")
    parser.add_argument("--json")
    args = parser.parse_args()
    results: dict = {"torch": torch.__version__, "command": sys.argv[1:]}
    if torch.cuda.is_available():
        results["device"] = torch.cuda.get_device_name()
    shape, divide = (SMOLLM2_135M, 4) if args.small else (QWEN3_8B, 1)
    bench = Bench(shape, args.layers, divide, results)
    for part in args.only.split(","):
        if part == "swap":
            bench_swap(bench, args.folder, 96, 256, 384)
        elif part == "swap1k":
            bench_swap(bench, args.folder, 64, 1024, 256)
        elif part == "prefix":
            bench_prefix(bench, args.folder, args.questions, args.prefix.split(","))
        elif part == "long":
            bench_long(bench)
        elif part == "peer":
            bench_long(bench, "peer")
        else:
            raise SystemExit(f"no part {part!r}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
