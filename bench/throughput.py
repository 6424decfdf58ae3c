"""Throughput of the engine beside transformers on one machine, all in one run.

    python bench/throughput.py [--model FOLDER] [--json FILE]

The work: prompts of 20 to 120 words, a fixed number of output tokens, greedy. The engine's tokens
are compared with transformers'. Prints tokens/s, the ratio to transformers' padded float32
generate (best of several rounds in turn), and the share of the measured GEMM peak that the work's
FLOPs amount to.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import torch_pd
from torch_pd import LLM, SamplingParams, ops

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from smollm2 import prepare

# The opening of "Alice's Adventures in Wonderland" (Lewis Carroll, 1865; public domain).
TEXT = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having
nothing to do: once or twice she had peeped into the book her sister was reading, but it had no
pictures or conversations in it, "and what is the use of a book," thought Alice "without pictures or
conversations?" So she was considering in her own mind (as well as she could, for the hot day made
her feel very sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the
trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close
by her. There was nothing so very remarkable in that; nor did Alice think it so very much out of the
way to hear the Rabbit say to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over
afterwards, it occurred to her that she ought to have wondered at this, but at the time it all
seemed quite natural); but when the Rabbit actually took a watch out of its waistcoat-pocket, and
looked at it, and then hurried on, Alice started to her feet, for it flashed across her mind that
she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it, and
burning with curiosity, she ran across the field after it, and fortunately was just in time to see
it pop down a large rabbit-hole under the hedge."""


def make_prompts(count: int, seed: int = 0) -> list[str]:
    """Passages of 20 to 120 words."""
    rng = random.Random(seed)
    words = TEXT.split()
    prompts = []
    for _ in range(count):
        length = rng.randint(20, 120)
        start = rng.randrange(len(words) - length)
        prompts.append(" ".join(words[start : start + length]))
    return prompts


def gemm_peak() -> float:
    """FLOP/s of a large float32 matrix product on all threads: the limit that shares refer to."""
    a = torch.randn(2048, 2048)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def model_flops(model: torch.nn.Module, tokens: int, sampled: int) -> float:
    """FLOPs of the linears: every token through the blocks, lm_head on sampled rows only."""
    head = model.get_output_embeddings().weight.numel()
    blocks = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    )
    return 2.0 * (blocks * tokens + head * sampled)


def best_of(run: Callable[[], Any], repeats: int = 2) -> tuple[float, Any]:
    """Seconds of the fastest run, and the result; the first one also touches fresh memory."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return min(times), result


def run_padded(folder: Path, prompts: list[str], out: int) -> tuple[float, list[list[int]]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": out, "min_new_tokens": out, "do_sample": False}
    seconds, result = best_of(lambda: model.generate(**batch, **options))
    return seconds, result[:, batch.input_ids.shape[1] :].tolist()


def run_generate_batch(folder: Path, prompts: list[str], out: int) -> tuple[float, list[list[int]]]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="paged|sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = GenerationConfig(
        max_new_tokens=out, min_new_tokens=out, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    inputs = [tokenizer(text).input_ids for text in prompts]
    seconds, result = best_of(
        lambda: model.generate_batch(inputs=inputs, generation_config=config, progress_bar=False)
    )
    # Results are keyed by request; their order of arrival is the order of the prompts.
    ordered = sorted(result.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
    return seconds, [list(output.generated_tokens) for _, output in ordered]


def run_torch_pd(
    folder: Path, prompts: list[str], out: int, dtype: str
) -> tuple[float, list[list[int]]]:
    params = SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True)
    with LLM(folder, dtype=dtype, enable_prefix_caching=False) as llm:
        seconds, outputs = best_of(lambda: llm.generate(prompts, params, use_tqdm=False))
    return seconds, [list(output.outputs[0].token_ids) for output in outputs]


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of sequences whose tokens are all equal."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument(
        "--rounds", type=int, default=2, help="of all engines in turn; the best counts"
    )
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    folder = args.model or prepare()
    prompts = make_prompts(args.num_prompts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt_tokens = sum(len(tokenizer(text).input_ids) for text in prompts)
    output_tokens = args.num_prompts * args.output_len
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    flops = model_flops(model, prompt_tokens + output_tokens - args.num_prompts, output_tokens)
    del model
    peak = gemm_peak()

    engines: dict[str, Callable[[], tuple[float, list[list[int]]]]] = {}
    work = (folder, prompts, args.output_len)
    if not args.skip_peers:
        engines["transformers generate, padded, float32"] = lambda: run_padded(*work)
        engines["transformers generate_batch, float32"] = lambda: run_generate_batch(*work)
    engines["torch_pd, float32"] = lambda: run_torch_pd(*work, "float32")
    engines["torch_pd, bfloat16"] = lambda: run_torch_pd(*work, "bfloat16")
    # In turn, since a shared machine is not equally fast all the time; the best of each counts.
    times: dict[str, list[float]] = {name: [] for name in engines}
    tokens: dict[str, list[list[int]]] = {}
    for _ in range(args.rounds):
        for name, run in engines.items():
            seconds, tokens[name] = run()
            times[name].append(seconds)
            peak = max(peak, gemm_peak())
    first = next(iter(engines))
    rows = [
        {
            "engine": name,
            "seconds": times[name],
            "output_tokens_per_second": output_tokens / min(times[name]),
            "ratio": min(times[first]) / min(times[name]),
            "share_of_gemm_peak": flops / min(times[name]) / peak,
            "equal_sequences": agreement(tokens[name], tokens[first]),
        }
        for name in engines
    ]

    print(
        f"{args.num_prompts} prompts, {prompt_tokens} prompt tokens, {output_tokens} output "
        f"tokens, {torch.get_num_threads()} threads, {ops.cpu_isa()}, "
        f"GEMM peak {peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{'engine':42} {'tok/s':>7} {'ratio':>6} {'of peak':>8} {'equal':>6}")
    for row in rows:
        print(
            f"{row['engine']:42} {row['output_tokens_per_second']:7.1f} {row['ratio']:6.2f} "
            f"{row['share_of_gemm_peak']:8.1%} {row['equal_sequences']:6.0%}"
        )
    if args.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        args.json.write_text(
            json.dumps(
                {
                    "command": " ".join(sys.argv),
                    "cpu": platform.processor() or platform.machine(),
                    "threads": torch.get_num_threads(),
                    "isa": ops.cpu_isa(),
                    "versions": {
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                        "torch_pd": torch_pd.__version__,
                    },
                    "commit": commit,
                    "prompt_tokens": prompt_tokens,
                    "output_tokens": output_tokens,
                    "gemm_peak_flops": peak,
                    "rows": rows,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
