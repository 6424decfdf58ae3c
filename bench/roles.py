"""Weights on some GPUs, KV pages on the others: memory of each while the load rises and falls.

    python bench/roles.py --param-ranks 0 1 --data-ranks 2 3 [--mode auto] [--svg FILE]

Calls of more and more prompts, then fewer (random weights and prompts, fixed output length). Beside
them a thread reads what the driver says of every GPU's memory, and how many bytes of KV pages are
in use. The KV pools are elastic (``elastic_kv``), without prefix caching, since no prompt comes
twice: the driver's figure is flat on parameter ranks and follows the load on data ranks. With
``--set elastic_kv false`` it is flat on every GPU. Without GPUs it runs on the CPU with ``--shape
tiny`` and has no driver to ask.
"""

import argparse
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import torch
from pool import SHAPES, folder_of

from torch_pd import LLM, SamplingParams

EVERY_S = 0.1
COLOURS = ("#888888", "#bbbbbb", "#c0392b", "#2471a3", "#1e8449", "#9a7d0a", "#6c3483", "#000000")


class Driver:
    """Samples the memory in use of each visible GPU, in a thread."""

    def __init__(self, ranks: int) -> None:
        self.samples: list[tuple[float, list[int]]] = []
        self._stop = threading.Event()
        self._uuids = []
        if torch.cuda.is_available():
            self._uuids = [torch.cuda.get_device_properties(i).uuid for i in range(ranks)]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if not self._uuids:
            return
        import pynvml

        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in self._uuids]
        while not self._stop.wait(EVERY_S):
            used = [int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used) for gpu in gpus]
            self.samples.append((time.perf_counter(), used))
        pynvml.nvmlShutdown()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def plot(path: Path, title: str, lines: dict[str, list[tuple[float, float]]]) -> None:
    """Lines of (seconds, GiB) as an SVG."""
    width, height, left, top = 760, 380, 60, 40
    far = max(x for line in lines.values() for x, _ in line) or 1.0
    high = 10 * (1 + int(max(y for line in lines.values() for _, y in line) // 10))
    step = max(10, high // 80 * 10)

    def at(x: float, y: float) -> str:
        return f"{left + x / far * width:.1f},{top + height - y / high * height:.1f}"

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 190}" '
        f'height="{top + height + 50}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="22" font-size="14">{title}</text>',
    ]
    for tick in range(0, high + 1, step):
        y = top + height - tick / high * height
        out.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    for tick in range(6):
        x, seconds = left + tick / 5 * width, far * tick / 5
        out.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">')
        out.append(f"{seconds:.0f} s</text>")
    out.append(f'<text x="8" y="{top - 8}">GiB</text>')
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(at(x, y) for x, y in line)
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = top + 16 + 20 * i
        out.append(
            f'<path d="M{left + width + 12} {y - 4}h18" stroke="{colour}" stroke-width="3"/>'
        )
        out.append(f'<text x="{left + width + 36}" y="{y}">{name}</text>')
    path.write_text("\n".join([*out, "</svg>"]) + "\n")


def run(llm: LLM, args: argparse.Namespace, began: float) -> tuple[list[dict], list[tuple]]:
    """The calls, one after the other; each one's figures, and (time, KV pages in use and bytes
    mapped of each rank)."""
    dice = random.Random(0)
    vocab = SHAPES[args.shape].vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=args.output, ignore_eos=True)
    calls, kv = [], []

    def look() -> list[int]:
        every = llm.stats()["ranks"]
        mapped = [rank.get("kv_mapped_bytes", 0) for rank in every]
        kv.append((time.perf_counter(), [rank["kv_pages_used"] for rank in every], mapped))
        return kv[-1][1]

    for count in args.load:
        prompts = [[dice.randrange(vocab) for _ in range(args.input)] for _ in range(count)]
        start = time.perf_counter()
        most, tokens, looked = look(), 0, start
        for output in llm.stream(prompts, params):
            tokens += len(output.outputs[0].token_ids) if output.finished else 0
            if time.perf_counter() - looked > EVERY_S:
                looked = time.perf_counter()
                most = [max(pair) for pair in zip(most, look(), strict=True)]
        look()
        seconds = time.perf_counter() - start
        calls.append(
            {"prompts": count, "at_s": start - began, "seconds": seconds,
             "output_tokens_per_s": tokens / seconds, "most_pages": most}
        )  # fmt: skip
    return calls, kv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-32b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--param-ranks", type=int, nargs="+", default=[0])
    parser.add_argument("--data-ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--mode", choices=["auto", "stream", "ship"], default="auto")
    parser.add_argument("--load", type=int, nargs="+", default=[4, 32, 64, 128, 64, 32, 4])
    parser.add_argument("--input", type=int, default=512)
    parser.add_argument("--output", type=int, default=48)
    parser.add_argument("--max-len", type=int, default=2048)
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("FIELD", "JSON"), help="of the LLM"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    ranks = len(args.param_ranks) + len(args.data_ranks)
    folder = folder_of(args.shape, args.layers, args.max_len)
    settings = {"elastic_kv": True, "enable_prefix_caching": False}
    settings |= {name: json.loads(value) for name, value in args.set}
    with LLM(
        folder, load_format="dummy", data_parallel_size=ranks, weights="pooled",
        remote_mode=args.mode, param_ranks=args.param_ranks, data_ranks=args.data_ranks, **settings,
    ) as llm:  # fmt: skip
        began = time.perf_counter()
        driver = Driver(ranks)
        calls, kv = run(llm, args, began)
        driver.close()
        stats = llm.stats()["ranks"]
    dims, size = SHAPES[args.shape], settings.get("block_size", 16)
    layers = args.layers or dims.num_layers
    page = layers * 2 * size * dims.num_kv_heads * dims.head_dim * dims.itemsize
    gib = 1 << 30
    for call in calls:
        call["most_kv_gib"] = [pages * page / gib for pages in call.pop("most_pages")]
        inside = [used for at, used in driver.samples
                  if 0 <= at - began - call["at_s"] <= call["seconds"]]  # fmt: skip
        for name, pick in (("least", min), ("most", max)):
            call[f"driver_{name}_gib"] = [
                pick(column) / gib for column in zip(*inside, strict=True)
            ]
        print("  ".join(f"{name} {shown(value)}" for name, value in call.items()), flush=True)
    for rank, each in enumerate(stats):
        names = [name for name in each if name.startswith(("stream_", "ship_", "graph_", "kv_"))]
        print(f"rank {rank}: {', '.join(f'{name} {each[name]:,.6g}' for name in names)}")
    lines: dict[str, list[tuple[float, float]]] = {}
    for rank in range(ranks):
        kind = "weights" if rank in args.param_ranks else "data"
        if driver.samples:
            lines[f"GPU {rank} ({kind}), driver"] = [
                (at - began, used[rank] / gib) for at, used in driver.samples
            ]
    for rank in range(ranks):
        lines[f"rank {rank}, KV in use"] = [(at - began, p[rank] * page / gib) for at, p, _ in kv]
        if rank in args.data_ranks:
            mapped = [(at - began, m[rank] / gib) for at, _, m in kv]
            lines[f"rank {rank}, KV mapped"] = mapped
    if args.svg:
        names = f"weights on {args.param_ranks}, KV pages on {args.data_ranks}, {args.mode}"
        plot(args.svg, names, lines)
    if args.json:
        record: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "arguments": {k: v for k, v in vars(args).items() if k not in ("json", "svg")},
            "calls": calls,
            "ranks": stats,
            "lines": lines,
        }
        args.json.write_text(json.dumps(record) + "\n")


def shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(f"{each:.2f}" for each in value) + "]"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
