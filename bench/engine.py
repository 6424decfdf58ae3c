"""The engine on one device: tokens per second beside their floor, idle time, losses, start.

    python bench/engine.py [--model FOLDER] [--shape qwen3-8b] [--only throughput,scaling,...]
                           [--json FILE]

First the tokens are checked in the same mode: SmolLM2's (or any model's in --model) against Hugging
Face's generate, without --model those of a small random model. Then random weights of the shape are
timed on random prompts, lengths uniform within 50% of the mean, a fixed number of output tokens,
greedy. Parts: throughput (three loads), scaling (1 to 1,024 sequences at once), profile (the
largest losses of the first load), start (a process of its own, to its first token).

The floor of a load: every FLOP at 750 TF/s, or the weights once a step at 2,830 GB/s where that is
more, plus each decoded token reading its keys and values once. It is that of an H100.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOPS = 750e12
BYTES = 2830e9

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}


@dataclass
class Load:
    """Some prompts of about ``mean`` tokens, ``out`` tokens each."""

    count: int
    mean: int
    out: int

    def prompts(self, vocab: int, seed: int = 0) -> list[list[int]]:
        """Random tokens; the lengths are uniform within half of the mean on both sides."""
        rng = random.Random(seed)
        low, high = self.mean // 2, self.mean * 3 // 2
        lengths = [rng.randint(low, high) for _ in range(self.count)]
        return [[rng.randrange(10, vocab - 10) for _ in range(length)] for length in lengths]

    def __str__(self) -> str:
        return f"{self.count} x {self.mean} in / {self.out} out"


def floor_seconds(shape: dict[str, Any], lengths: list[int], out: int, item: int) -> float:
    """Least seconds for the load (see above); all sequences decode together."""
    width, layers, dim = shape["hidden_size"], shape["num_hidden_layers"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    layer = width * dim * (2 * heads + 2 * kv_heads) + 3 * width * shape["intermediate_size"]
    head = width * shape["vocab_size"]
    prompt = 2 * layers * layer * sum(lengths) + 2 * head * len(lengths)
    prompt += sum(2 * layers * heads * dim * n * n for n in lengths)
    rows = len(lengths)
    step_flops = 2 * (layers * layer + head) * rows
    step_bytes = (layers * layer + head) * item
    kv_token = 2 * layers * kv_heads * dim * item
    read = sum((n + i) * kv_token for n in lengths for i in range(1, out))
    steps = (out - 1) * max(step_flops / FLOPS, step_bytes / BYTES)
    return prompt / FLOPS + steps + read / BYTES


def params(out: int) -> Any:
    from torch_pd import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False)


def timed(llm: Any, prompts: list[list[int]], out: int) -> tuple[float, dict[str, float]]:
    """Seconds of generate, and how its counters changed."""
    before = llm.stats()
    start = time.perf_counter()
    outputs = llm.generate(prompts, params(out), use_tqdm=False)
    seconds = time.perf_counter() - start
    after = llm.stats()
    assert all(len(output.outputs[0].token_ids) == out for output in outputs)
    names = ("steps", "graph_steps", "preemptions", "wasted_rows", "device_idle", "device_busy")
    return seconds, {name: after[name] - before[name] for name in names}


def run_load(llm: Any, shape: dict[str, Any], load: Load, item: int) -> dict[str, Any]:
    """One row of the table."""
    prompts = load.prompts(shape["vocab_size"])
    seconds, change = timed(llm, prompts, load.out)
    tokens = load.count * load.out
    floor = floor_seconds(shape, [len(prompt) for prompt in prompts], load.out, item)
    busy, idle = change["device_busy"], change["device_idle"]
    row = {
        "load": str(load),
        "seconds": seconds,
        "output_tokens_per_second": tokens / seconds,
        "floor_tokens_per_second": tokens / floor,
        "of_floor": floor / seconds,
        "idle_between_steps": idle / (busy + idle),
        **change,
    }
    print(
        f"{row['load']:28} {seconds:7.2f} s {row['output_tokens_per_second']:8.0f} tok/s, floor "
        f"{row['floor_tokens_per_second']:7.0f} ({row['of_floor']:.0%}), idle between steps "
        f"{row['idle_between_steps']:.2%}, {change['steps']} steps ({change['graph_steps']} "
        f"graphs), {change['preemptions']} preemptions",
        flush=True,
    )
    return row


def kind_of(name: str) -> str:
    """The part of the work that a kernel belongs to."""
    lowered = name.lower()
    for kind, words in {
        "linear": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas"),
        "attention": ("attention", "decode_", "prefill", "merge_kernel"),
        "rms_norm": ("rms_norm",),
        "rope_write_kv": ("rope",),
        "gated_act": ("gated_act",),
        "sample": ("sample_kernel",),
        "copies": ("memcpy", "memset"),
    }.items():
        if any(word in lowered for word in words):
            return kind
    return "other"


def profile(llm: Any, shape: dict[str, Any], load: Load) -> dict[str, Any]:
    """Kernel time by kind over a whole load, and the time with no kernel at all."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    prompts = load.prompts(shape["vocab_size"], seed=1)  # none is in the prefix cache
    with torch_profile(activities=[ProfilerActivity.CUDA]) as measured:
        llm.generate(prompts, params(load.out), use_tqdm=False)
        torch.cuda.synchronize()
    spans = []
    for event in measured.events():
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        spans.append((event.time_range.start, event.time_range.end, event.name))
    # A kernel may be in place before the one ahead of it ends: it counts from then on.
    first = min(start for start, _, _ in spans)
    union, last = 0.0, first
    kinds: dict[str, float] = {}
    names: dict[str, float] = {}
    for start, end, name in sorted(spans, key=lambda span: span[1]):
        own = max(0.0, end - max(start, last))
        last = max(last, end)
        union += own
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + own
        names[name[:90]] = names.get(name[:90], 0.0) + own
    whole = last - first
    largest = sorted(names.items(), key=lambda item: -item[1])[:14]
    result = {
        "load": str(load),
        "milliseconds": whole / 1e3,
        "idle_share": 1 - union / whole,
        "share": {k: v / whole for k, v in sorted(kinds.items(), key=lambda x: -x[1])},
        "largest_kernels": {name: part / whole for name, part in largest},
    }
    print(f"profile of {load}: {whole / 1e3:.0f} ms, no kernel {result['idle_share']:.2%}")
    for kind, share in result["share"].items():
        print(f"  {kind:16} {share:7.2%}")
    for name, share in result["largest_kernels"].items():
        print(f"    {share:7.2%} {name}")
    return result


def check_tokens(folder: Path | None, device: str) -> str:
    """Greedy float32 tokens of the engine against Hugging Face's on this device.

    They must agree up to a place where the reference's two best logits lie within 1e-4.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from torch_pd import LLM

    if folder is None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=999,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            initializer_range=0.2,
        )
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.eval().to(device)
    vocab = model.config.vocab_size
    # Of one length, so that the reference is one batch without padding.
    prompts, out = [prompt[:20] for prompt in Load(20, 40, 48).prompts(vocab, seed=1)], 48
    ids = torch.tensor(prompts, device=device)
    options = {"max_new_tokens": out, "do_sample": False}
    model.generation_config.eos_token_id = None  # neither side may stop at one, or avoid it
    reference = model.generate(ids, pad_token_id=0, **options)[:, ids.shape[1] :].tolist()
    with LLM(model, device=device, kv_cache_gib=0.5) as llm:
        found = [
            list(output.outputs[0].token_ids)
            for output in llm.generate(prompts, params(out), use_tqdm=False)
        ]
    equal = 0
    for prompt, ours, theirs in zip(prompts, found, reference, strict=True):
        place = next((i for i in range(out) if ours[i] != theirs[i]), None)
        if place is None:
            equal += 1
            continue
        ids = torch.tensor([prompt + theirs[:place]], device=device)
        best = model(ids).logits[0, -1].topk(2).values
        margin = (best[0] - best[1]).item()
        assert margin < 1e-4, f"token {place} differs though the margin is {margin}"
    text = f"{equal} of {len(prompts)} sequences equal Hugging Face's, the others to a near tie"
    print(f"tokens: {text}", flush=True)
    return text


FIRST_TOKEN = """
import json, sys, time
from torch_pd import LLM, SamplingParams
imported = time.time()
with LLM(sys.argv[1], load_format="dummy", device=sys.argv[2]) as llm:
    ready = time.time()
    llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    print(json.dumps([imported, ready, time.time()]))
"""


def start_time(folder: str, device: str) -> dict[str, float]:
    """Seconds from a process's start to its import, its model and its first token."""
    start = time.time()
    command = [sys.executable, "-c", FIRST_TOKEN, folder, device]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    times = json.loads(output.splitlines()[-1])
    names = ("imported", "ready", "first_token")
    result = {name: t - start for name, t in zip(names, times, strict=True)}
    print("process start: " + ", ".join(f"{k} after {v:.1f} s" for k, v in result.items()))
    return result


PARTS = ("tokens", "start", "throughput", "scaling", "profile")


def main() -> None:
    import torch

    import torch_pd
    from torch_pd import LLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder whose tokens are checked")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma")
    parser.add_argument("--loads", default="256:512:128,1024:128:256,64:8192:64")
    parser.add_argument("--counts", default="1,8,64,256,1024", help="sequences at once")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = args.only.split(",")
    shape = SHAPES[args.shape]
    item = 2
    loads = [Load(*map(int, text.split(":"))) for text in args.loads.split(",")]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, shape {args.shape}")
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "device": name,
        "versions": {"torch": torch.__version__, "torch_pd": torch_pd.__version__},
        "shape": args.shape,
    }
    if "tokens" in parts:
        result["tokens"] = check_tokens(args.model, device)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        if "start" in parts:
            result["start"] = start_time(folder, device)
        if set(parts) & {"throughput", "scaling", "profile"}:
            start = time.perf_counter()
            with LLM(folder, load_format="dummy", device=device) as llm:
                result["ready_seconds"] = time.perf_counter() - start
                print(f"ready in {result['ready_seconds']:.1f} s; {llm.engine.memory_line()}")
                timed(llm, Load(8, 64, 4).prompts(shape["vocab_size"]), 4)
                if "throughput" in parts:
                    result["throughput"] = [run_load(llm, shape, load, item) for load in loads]
                if "scaling" in parts:
                    counts = [int(text) for text in args.counts.split(",")]
                    result["scaling"] = [
                        run_load(llm, shape, Load(count, 128, 64), item) for count in counts
                    ]
                if "profile" in parts and device == "cuda":
                    result["profile"] = profile(llm, shape, loads[0])
                result["stats"] = llm.stats()
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
