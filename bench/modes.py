"""One load shipped, streamed and by choice, in one engine, beside what the planner foresaw.

    torchrun --nproc-per-node 4 bench/modes.py [--prompts 1024 --input 1024 --output 256] [--json F]

Random weights and prompts, lengths uniform within 50% of the mean, fixed output length. The ranks
vote in every mode, and streamed steps read the same ring; remote_mode="stream" by itself would do
without the votes. ``--plan-only --ranks 4`` prints what the planner foresees, and needs no GPU.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pool import SHAPES, folder_of, random_prompts

from torch_pd import LLM, SamplingParams, plan

MODES = ("ship", "stream", "auto")


def foreseen(args: argparse.Namespace, ranks: int, **more: Any) -> Any:
    return plan(
        folder_of(args.shape, args.layers, args.max_len), gpus=ranks, gpu_memory=args.gpu_memory,
        input=args.input, output=args.output, num_prompts=args.prompts, load_format="dummy", **more,
    )  # fmt: skip


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    prompts = random_prompts(args)
    params = SamplingParams(temperature=0.0, max_tokens=args.output, ignore_eos=True)
    settings = {name: json.loads(value) for name, value in args.set}
    folder = folder_of(args.shape, args.layers, args.max_len)
    start = time.perf_counter()
    found = []
    with LLM(
        folder, load_format="dummy", weights="pooled", enable_prefix_caching=False, **settings
    ) as llm:
        engine = llm._runs.engine
        choice, first = engine.streaming.choice, dist.get_rank() == 0
        machine = choice.costs.machine
        if first:
            print(f"ready after {time.perf_counter() - start:.1f} s; {machine}", flush=True)
            print(engine.memory_table(), flush=True)
        ranks = dist.get_world_size()
        plans = {"default": foreseen(args, ranks, **settings)}
        plans["measured"] = foreseen(args, ranks, machine=machine, **settings)
        llm.generate(prompts[:8], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
        for mode in args.modes:
            choice.mode = mode
            before = llm.stats()["ranks"]
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            ran = [
                {
                    name: each[name] - was[name]
                    for name in each
                    if isinstance(each[name], int | float)
                }
                for each, was in zip(llm.stats()["ranks"], before, strict=True)
            ]
            row = {"mode": mode, "seconds": seconds, "output_tokens_per_s": tokens / seconds}
            row |= {f"planned_{k}": p.modes[mode].tokens_per_second for k, p in plans.items()}
            row["kv_tokens"] = [rank["kv_tokens"] for rank in before]
            row["planned_kv_tokens"] = plans["default"].modes["auto"].kv_tokens
            names = [n for n in ran[0] if n.startswith(("stream_", "ship_"))]
            names += ["steps", "graph_steps", "preemptions", "device_idle", "step_seconds"]
            row["ranks"] = [{name: each[name] for name in names} for each in ran]
            found.append(row)
            if first:
                print(
                    "  ".join(f"{name} {shown(value)}" for name, value in row.items()), flush=True
                )
    return found


def shown(value: Any) -> str:
    if isinstance(value, list):
        return "\n    " + "\n    ".join(map(shown, value))
    if isinstance(value, dict):
        return "  ".join(f"{name} {shown(each)}" for name, each in value.items())
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-32b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--input", type=int, default=1024, help="mean prompt length")
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--max-len", type=int, default=2048, help="the model's longest sequence")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--gpu-memory", type=float, default=79.1, help="GiB, for the plan")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--ranks", type=int, default=2, help="of the plan alone")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("FIELD", "JSON"), help="of the LLM"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.plan_only:
        print(foreseen(args, args.ranks, **{name: json.loads(v) for name, v in args.set}))
        return
    found = run(args)
    if args.json and dist.get_rank() == 0:
        record = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "arguments": {name: value for name, value in vars(args).items() if name != "json"},
            "results": found,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
