"""Throughput of the engine beside transformers on one machine, all in one run.

    python bench/throughput.py [--model FOLDER] [--json FILE]

The work: prompts of 20 to 120 words, a fixed number of output tokens, greedy. The engine's tokens
are compared with transformers'. Prints tokens/s, the ratio to transformers' padded float32
generate (best of several rounds in turn, every engine in a process of its own), and the share of
the measured GEMM peak of its dtype that the work's FLOPs amount to. Takes 3 to 6 minutes.
"""

import argparse
import json
import multiprocessing
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

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


def gemm_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest large matrix product on all threads, torch's or ours: the limit that
    shares refer to."""
    a = torch.randn(2048, 2048).to(dtype)
    out = torch.empty_like(a)
    times = []
    for _ in range(6):
        for multiply in (lambda: a @ a, lambda: ops.linear(a, a, None, out)):
            start = time.perf_counter()
            multiply()
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


Generate = Callable[[int], list[list[int]]]
"""Output tokens of all prompts, so many of each."""


@contextmanager
def padded(folder: Path, prompts: list[str]) -> Iterator[Generate]:
    """transformers' generate on the prompts padded to one length, float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True)

    def run(out: int) -> list[list[int]]:
        options = {"max_new_tokens": out, "min_new_tokens": out, "do_sample": False}
        return model.generate(**batch, **options)[:, batch.input_ids.shape[1] :].tolist()

    yield run


@contextmanager
def generate_batch(folder: Path, prompts: list[str]) -> Iterator[Generate]:
    """transformers' continuous batching, float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="paged|sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = [tokenizer(text).input_ids for text in prompts]

    def run(out: int) -> list[list[int]]:
        config = GenerationConfig(
            max_new_tokens=out, min_new_tokens=out, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        result = model.generate_batch(inputs=inputs, generation_config=config, progress_bar=False)
        # Results are keyed by request; the numbers of the requests are in the prompts' order.
        ordered = sorted(result.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
        return [list(output.generated_tokens) for _, output in ordered]

    yield run


@contextmanager
def ours(folder: Path, prompts: list[str], dtype: str) -> Iterator[Generate]:
    """torch_pd's engine."""
    with LLM(folder, dtype=dtype, enable_prefix_caching=False) as llm:

        def run(out: int) -> list[list[int]]:
            params = SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True)
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        yield run


ENGINES: dict[str, tuple[str, Callable[..., AbstractContextManager[Generate]]]] = {
    "transformers generate, padded, float32": ("float32", padded),
    "transformers generate_batch, float32": ("float32", generate_batch),
    "torch_pd, float32": ("float32", partial(ours, dtype="float32")),
    "torch_pd, bfloat16": ("bfloat16", partial(ours, dtype="bfloat16")),
}
WARM_UP_TOKENS = 4


def serve(name: str, folder: Path, prompts: list[str], out: int, pipe: Connection) -> None:
    """Body of an engine's process: a timed run (seconds, tokens) for every message, until None."""
    with ENGINES[name][1](folder, prompts) as run:
        run(WARM_UP_TOKENS)  # fresh memory, lazy set-up
        pipe.send("ready")
        while pipe.recv() is not None:
            start = time.perf_counter()
            tokens = run(out)
            pipe.send((time.perf_counter() - start, tokens))


def measure(
    names: list[str], rounds: int, work: tuple[Path, list[str], int]
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """Seconds of every round and the tokens of the last one, for each engine.

    Every engine has a process of its own, so none runs with another's threads and memory. They run
    in turn, since a shared machine is not equally fast all the time; the others wait meanwhile.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, *work, end), daemon=True))
        processes[-1].start()
        end.close()  # so that a dead process ends the wait for it
        pipes[name].recv()  # ready
    times: dict[str, list[float]] = {name: [] for name in names}
    tokens: dict[str, list[list[int]]] = {}
    for _ in range(rounds):
        for name in names:
            pipes[name].send("run")
            seconds, tokens[name] = pipes[name].recv()
            times[name].append(seconds)
    for name, process in zip(names, processes, strict=True):
        pipes[name].send(None)
        process.join()
    return times, tokens


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of sequences whose tokens are all equal."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of all engines; the best counts")
    parser.add_argument("--skip-peers", action="store_true", help="only torch_pd")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()

    folder = args.model or prepare()
    prompts = make_prompts(args.num_prompts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt_tokens = sum(len(tokenizer(text).input_ids) for text in prompts)
    output_tokens = args.num_prompts * args.output_len
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    flops = model_flops(model, prompt_tokens + output_tokens - args.num_prompts, output_tokens)
    del model

    names = [name for name in ENGINES if not args.skip_peers or name.startswith("torch_pd")]
    peaks = {dtype: gemm_peak(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    times, tokens = measure(names, args.rounds, (folder, prompts, args.output_len))
    peaks = {dtype: max(peak, gemm_peak(getattr(torch, dtype))) for dtype, peak in peaks.items()}
    first = names[0]
    rows = [
        {
            "engine": name,
            "seconds": times[name],
            "output_tokens_per_second": output_tokens / min(times[name]),
            "ratio": min(times[first]) / min(times[name]),
            "share_of_gemm_peak": flops / min(times[name]) / peaks[ENGINES[name][0]],
            "equal_sequences": agreement(tokens[name], tokens[first]),
        }
        for name in names
    ]

    print(
        f"{args.num_prompts} prompts, {prompt_tokens} prompt tokens, {output_tokens} output "
        f"tokens, {torch.get_num_threads()} threads, {ops.cpu_isa()}, GEMM peak "
        + ", ".join(f"{peak / 1e9:.0f} GFLOP/s {dtype}" for dtype, peak in peaks.items())
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
                    "gemm_peak_flops": peaks,
                    "rows": rows,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
