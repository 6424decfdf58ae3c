"""Weights shared by several ranks: what a shipped step costs, and what comes out end to end.

    torchrun --nproc-per-node 4 bench/pool.py linears [--rows 16 64 256 512] [--json FILE]
    torchrun --nproc-per-node 4 bench/pool.py exchanges [--mailbox 0 1048576]
    torchrun --nproc-per-node 4 bench/pool.py step --layers 16 [--context 512]
    torchrun --nproc-per-node 2 bench/pool.py step --param-ranks 0 --halves --layers 16
    python bench/pool.py generate --ranks 4 [--prompts 2048 --input 128 --output 512]
    torchrun --nproc-per-node 4 bench/pool.py profile [--prompts 2048 --layers 16]

``linears``: all linears of one step (no norms, no attention) over shards of random weights, every
rank with the same number of rows: the exchanges with the other ranks and the parts of the linears,
replayed as one CUDA graph. ``exchanges``: the four exchanges alone. ``--mailbox``: bytes of the
largest message that goes by mapped memory, one after the other; 0 is NCCL alone. ``step``: a whole
decoding step of a model but for the draw, all sequences of ``--context`` tokens; with
``--param-ranks`` and ``--halves`` for roles apart, and in half-batches. ``generate``: the LLM with
random weights and prompts, lengths uniform within 50% of the mean; the ranks are spawned, or are
torchrun's. ``profile``: the same, and what the kernels of the last decoding steps take on rank 0.
Without GPUs all else runs on the CPU over gloo; give a small ``--shape``.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3Config

from torch_pd import LLM, SamplingParams
from torch_pd.config import EngineConfig
from torch_pd.context import Batch, GroupBatch
from torch_pd.engine.halving import Halving
from torch_pd.nn.attention import Pass
from torch_pd.nn.halves import halve
from torch_pd.nn.patched import forward_packed, new_pool, patch_state
from torch_pd.nn.pooled import PooledAttention, PooledMLP, Shared, new_logits, pool_model
from torch_pd.nn.pooled_model import load_pooled
from torch_pd.weights.layout import ModelDims, make_layout
from torch_pd.weights.mailbox import LIMIT, Mailbox
from torch_pd.weights.pool import WeightPool
from torch_pd.weights.ship import Exchange

SHAPES = {
    "qwen3-32b": ModelDims(64, 5120, 64, 8, 128, 25600, 151936, 2),
    "llama-70b": ModelDims(80, 8192, 64, 8, 128, 28672, 128256, 2),
    "tiny": ModelDims(2, 64, 8, 4, 8, 256, 512, 2),
}

Boxes = list[Mailbox | None]


class NoAttention:
    """Stands in for a FusedAttention: a shard's queries pass for its attention output."""

    def __init__(self, dims: ModelDims, layer: int) -> None:
        self.layer = layer
        self.num_heads, self.head_dim = dims.num_heads, dims.head_dim
        self._columns = dims.num_heads * dims.head_dim

    def attend(self, qkv: Tensor, rotation: Any, shard_heads: Any, blocked: bool = False) -> Tensor:
        return qkv[:, : self._columns]


class Step:
    """The linears of one step."""

    def __init__(self, dims: ModelDims, exchange: Exchange, device: torch.device) -> None:
        layout = make_layout(dims, exchange.size, exchange.rank)
        weights = WeightPool(layout, exchange.rank, torch.bfloat16, device)
        generator = torch.Generator(device).manual_seed(exchange.rank)
        for shard in weights.layers:
            for matrix in (shard.qkv, shard.o, shard.gate_up, shard.down):
                matrix.normal_(0, dims.hidden_size**-0.5, generator=generator)
        self.running = Pass(mode="ship")
        shared = Shared(self.running, weights, exchange, None)
        self.parts: list[tuple[PooledAttention, PooledMLP]] = []
        for layer, (shard, split) in enumerate(zip(weights.layers, layout.splits, strict=True)):
            fused: Any = NoAttention(dims, layer)
            attention = PooledAttention(fused, shared, shard, split.kv_heads)
            self.parts.append((attention, PooledMLP(shared, layer, shard, split.mlp, "silu")))

    def __call__(self, x: Tensor) -> Tensor:
        for attention, mlp in self.parts:
            x = mlp(attention(x, None))
        return x


class Timer:
    """Milliseconds of a call that all ranks make, the slowest rank's median.

    Several calls in a row are timed at once, as steps follow each other in an engine: the launch of
    a graph of a thousand nodes hides behind the one before.
    """

    CALLS = 4

    def __init__(self, exchange: Exchange, device: torch.device, eager: bool = True) -> None:
        self.exchange, self.device, self.eager = exchange, device, eager

    def __call__(self, call: Callable[[], Any], repeats: int = 10) -> dict[str, float]:
        """On a GPU as a graph and by single launches, elsewhere just run."""
        with torch.no_grad():
            if self.device.type == "cpu":
                return {"eager": self._median(call, repeats)}
            eager = {"eager": self._median(call, repeats)} if self.eager else {}
            call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                call()
            return {"graph": self._median(graph.replay, repeats), **eager}

    def _median(self, call: Callable[[], Any], repeats: int) -> float:
        call()
        times = []
        for _ in range(repeats):
            self._settle()
            start = time.perf_counter()
            for _ in range(self.CALLS):
                call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3 / self.CALLS)
        median = torch.tensor(sorted(times)[repeats // 2], device=self.device)
        dist.all_reduce(median, dist.ReduceOp.MAX, group=self.exchange.group)
        return float(median)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(self.exchange.group)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def linears(
    dims: ModelDims, exchange: Exchange, timer: Timer, rows: list[int], boxes: Boxes
) -> list[dict]:
    step = Step(dims, exchange, timer.device)
    found = []
    for count in rows:
        x = torch.randn(count, dims.hidden_size, device=timer.device).bfloat16()
        step.running.rows = [count] * exchange.size
        for exchange.mailbox in boxes:
            times = timer(lambda x=x: step(x))
            found.append({"what": "linears", "rows": count, **times})
            show(exchange, found[-1])
    return found


def exchanges(
    dims: ModelDims, exchange: Exchange, timer: Timer, rows: list[int], boxes: Boxes
) -> list[dict]:
    size, repeats = exchange.size, 50
    layout = make_layout(dims, size, exchange.rank)
    query = dims.num_heads // dims.num_kv_heads * dims.head_dim
    heads = layout.splits[0].kv_heads
    qkv = [count * (query + 2 * dims.head_dim) for count in heads]
    out = [count * query for count in heads]
    found = []
    for count in rows:
        every = [count] * size

        def new(*shape: int) -> Tensor:
            return torch.ones(*shape, device=timer.device, dtype=torch.bfloat16)

        x, y = new(count, dims.hidden_size), new(count * size, dims.hidden_size)
        part, whole = new(count * size, qkv[exchange.rank]), new(count, sum(out))
        calls = {
            "gather": lambda x=x, every=every: exchange.gather(x, every, qkv),
            "to_tokens": lambda x=part, every=every: exchange.to_tokens(x, every, qkv),
            "to_owners": lambda x=whole, every=every: exchange.to_owners(x, every, out),
            "scatter_sum": lambda x=y, every=every: exchange.scatter_sum(x, every, qkv),
        }
        for name, call in calls.items():

            def many(call=call) -> None:
                for _ in range(repeats):
                    call()

            for exchange.mailbox in boxes:
                times = {key: ms / repeats for key, ms in timer(many, 10).items()}
                found.append({"what": name, "rows": count, **times})
                show(exchange, found[-1])
    return found


def steps(
    args: argparse.Namespace, exchange: Exchange, timer: Timer, rows: list[int], boxes: Boxes
) -> list[dict]:
    apart, device, size = args.param_ranks is not None, timer.device, exchange.size
    config = EngineConfig(load_format="dummy", weights="pooled", param_ranks=args.param_ranks)
    serving = [not apart or rank not in args.param_ranks for rank in range(size)]
    serves = serving[exchange.rank]
    folder = folder_of(args.shape, args.layers, max(args.max_len, *args.context))
    model, weights = load_pooled(folder, config, exchange.rank, size, device)
    pool_model(model, weights, exchange)
    running = patch_state(model).running
    most = max(rows) * -(-max(args.context) // config.block_size) if serves else 1
    pool = new_pool(model, 1 + most, config.block_size)
    for layer in map(pool.layer, range(len(weights.layers))):
        layer.k.normal_()
        layer.v.normal_()
    order = torch.randperm(most, device=device).int() + 1
    logits = new_logits(model, max(rows))
    found = []
    for context, count in itertools.product(args.context, rows):
        own = count if serves else 1
        length = context if serves else 1
        last, offset = divmod(length - 1, config.block_size)
        tables = order[: own * (last + 1)].view(own, last + 1)
        batch = Batch(
            num_tokens=own,
            max_query_len=1,
            query_start=torch.arange(own + 1, device=device, dtype=torch.int32),
            seq_lens=torch.full((own,), length, device=device, dtype=torch.int32),
            groups=(GroupBatch(tables, tables[:, last].long() * config.block_size + offset),),
        )
        ids = torch.randint(SHAPES[args.shape].vocab_size, (own,), device=device)
        at = torch.full((own,), length - 1, device=device)
        running.rows = running.head_rows = [count if each else 1 for each in serving]

        def step(batch: Batch = batch, ids: Tensor = ids, at: Tensor = at) -> Tensor:
            return forward_packed(model, pool, batch, ids, at, None, logits)

        for exchange.mailbox in boxes:
            want = None
            for halved in (False, True) if args.halves else (False,):
                running.halves = halve(running.rows, serving) if halved else None
                row = {"what": "step", "rows": count, "context": context, "halved": halved}
                row |= timer(step)
                result = step().float()
                want = result.clone() if want is None else want
                off = (result - want).abs().max() / want.abs().max() * serves
                dist.all_reduce(off, dist.ReduceOp.MAX, group=exchange.group)
                row["off"] = float(off)
                found.append(row)
                show(exchange, row)
    return found


KINDS = {
    "linears": ("nvjet", "gemm", "gemv", "cutlass", "xmma"),
    "exchanges": ("nccl", "exchange", "Memcpy PtoP", "Memcpy DtoD"),
    "attention": ("decode_kernel", "merge_kernel", "prefill_kernel"),
}
"""Kinds of kernels by parts of their names; all others are elementwise."""


class Profile:
    """Kernels of rank 0 during a run.

    Args:
        steps: so many of the last ones are looked at; a sampling kernel ends each.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        activities = [torch.profiler.ProfilerActivity.CUDA]
        self._profiler = torch.profiler.profile(activities=activities)

    def __enter__(self) -> "Profile":
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)

    def report(self) -> dict[str, Any]:
        """Milliseconds of a step by kind of kernel and by kernel; prints them."""
        events = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in self._profiler.events() or []
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        ends = [end for _, end, name in events if "sample_kernel" in name]
        ends = ends[-self.steps - 1 :]
        first, last, steps = ends[0], ends[-1], len(ends) - 1
        kinds = {**dict.fromkeys(KINDS, 0.0), "elementwise": 0.0}
        kernels: dict[str, list[float]] = {}
        busy, until = 0.0, first
        for start, end, name in events:
            if start < first or end > last:
                continue
            kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), None)
            kinds[kind or "elementwise"] += (end - start) / 1e3 / steps
            entry = kernels.setdefault(name, [0.0, 0])
            entry[0] += (end - start) / 1e3 / steps
            entry[1] += 1 / steps
            busy += max(0.0, end - max(start, until)) / 1e3 / steps
            until = max(until, end)
        wall = (last - first) / 1e3 / steps
        print(f"{steps} steps of {wall:.2f} ms, a kernel runs in {busy:.2f} ms of them")
        print("  " + ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in kinds.items()))
        top = sorted(kernels.items(), key=lambda item: -item[1][0])[:24]
        for name, (ms, count) in top:
            print(f"  {ms:8.3f} ms {count:7.1f} x {ms / count * 1e3:8.1f} us  {name[:110]}")
        return {"step_ms": wall, "busy_ms": busy, **kinds, "kernels": dict(top)}


def folder_of(shape: str, layers: int | None, max_len: int) -> Path:
    """A folder with the config of a shape, for random weights."""
    dims = SHAPES[shape]
    config = Qwen3Config(
        num_hidden_layers=layers or dims.num_layers,
        hidden_size=dims.hidden_size,
        num_attention_heads=dims.num_heads,
        num_key_value_heads=dims.num_kv_heads,
        head_dim=dims.head_dim,
        intermediate_size=dims.intermediate_size,
        vocab_size=dims.vocab_size,
        tie_word_embeddings=dims.tied,
        max_position_embeddings=max_len,
    )
    # One place for all ranks of torchrun, each of which may be the first to write it.
    folder = Path(tempfile.gettempdir()) / f"torch_pd-{shape}-{layers}-{max_len}"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as new:
        config.save_pretrained(new)
        (Path(new) / "config.json").replace(folder / "config.json")
    return folder


def random_prompts(args: argparse.Namespace) -> list[list[int]]:
    """``args.prompts`` of random tokens, lengths uniform within 50% of ``args.input``."""
    dice = random.Random(0)
    spread, vocab = args.input // 2, SHAPES[args.shape].vocab_size
    return [
        [dice.randrange(vocab) for _ in range(args.input + dice.randint(-spread, spread))]
        for _ in range(args.prompts)
    ]


def generate(args: argparse.Namespace) -> list[dict]:
    prompts = random_prompts(args)
    params = SamplingParams(temperature=0.0, max_tokens=args.output, ignore_eos=True)
    ranks = {} if dist.is_torchelastic_launched() else {"data_parallel_size": args.ranks}
    settings = {name: json.loads(value) for name, value in args.set}
    folder = folder_of(args.shape, args.layers, args.max_len)
    start = time.perf_counter()
    with LLM(folder, load_format="dummy", weights="pooled", **ranks, **settings) as llm:
        started = time.perf_counter() - start
        print(f"ready after {started:.1f} s", flush=True)
        found, pays = [], Halving.pays
        for round in range(args.rounds):
            profile = None
            if args.whole and round % 2:
                Halving.pays = lambda self, rows, kv_tokens: False  # type: ignore[method-assign]
            elif args.whole:
                Halving.pays = pays  # type: ignore[method-assign]
            if args.profiled and round == args.rounds - 1 and dist.get_rank() == 0:
                profile = Profile(args.profiled)
            start = time.perf_counter()
            with profile or contextlib.nullcontext():
                outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            each = llm.stats()["ranks"]
            row = {
                "what": "generate",
                "round": round,
                "start_s": started,
                "seconds": seconds,
                "output_tokens_per_s": tokens / seconds,
                "kv_tokens": sum(rank["kv_tokens"] for rank in each),
                "ranks": each,
            }
            found.append(row)
            if dist.is_torchelastic_launched() and dist.get_rank():
                continue
            print(
                f"round {round}: start {started:.1f} s, {tokens:,} tokens in {seconds:.1f} s = "
                f"{tokens / seconds:,.0f} tok/s, {row['kv_tokens']:,} KV tokens",
                flush=True,
            )
            names = ["steps", "graph_steps", "halved_steps", "output_tokens", "preemptions"]
            names += ["device_idle_share", "step_seconds", "kv_tokens"]
            for rank, stats in enumerate(each):
                names += [n for n in stats if n.startswith(("stream_", "ship_")) and n not in names]
                shown = ", ".join(f"{name} {stats[name]:,.6g}" for name in names)
                print(f"  rank {rank}: {shown}", flush=True)
            if profile is not None:
                row["profile"] = profile.report()
        start = time.perf_counter()
    print(f"shut down in {time.perf_counter() - start:.1f} s", flush=True)
    return found


def show(exchange: Exchange, row: dict) -> None:
    row["mailbox"] = exchange.mailbox.limit if exchange.mailbox else 0
    if exchange.rank == 0:
        times = "  ".join(f"{key} {row[key]:9.4f} ms" for key in ("graph", "eager") if key in row)
        if "context" in row:
            times += f"  context {row['context']}{' halves' if row['halved'] else ''}"
            times += f"  off {row['off']:.2g}"
        print(
            f"{row['what']:12} {row['rows']:5} rows a rank  mailbox {row['mailbox']:8}  {times}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ["linears", "exchanges", "step", "generate", "profile"]
    parser.add_argument("what", nargs="+", choices=kinds)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-32b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256, 512])
    parser.add_argument("--ranks", type=int, default=2, help="generate: to spawn")
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--input", type=int, default=128, help="mean prompt length")
    parser.add_argument("--output", type=int, default=512)
    parser.add_argument("--max-len", type=int, default=4096, help="the model's longest sequence")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("FIELD", "JSON"), help="of the LLM"
    )
    parser.add_argument(
        "--mailbox", type=int, nargs="+", default=[0, LIMIT], help="largest message"
    )
    parser.add_argument(
        "--context", type=int, nargs="+", default=[512], help="step: tokens of a sequence"
    )
    parser.add_argument(
        "--param-ranks", type=int, nargs="+", help="step: with the weights; the others have rows"
    )
    parser.add_argument("--halves", action="store_true", help="step: also as two half-batches")
    parser.add_argument(
        "--whole", action="store_true", help="generate, torchrun: every second round without halves"
    )
    parser.add_argument("--no-eager", action="store_true", help="graphs only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.profiled = 16 if "profile" in args.what else 0
    if args.profiled:
        args.rounds = max(2, args.rounds)
    if args.profiled or "generate" in args.what:
        results = generate(args)
        if args.json and not (dist.is_initialized() and dist.get_rank()):
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        return
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    exchange = Exchange(None)
    timer = Timer(exchange, device, not args.no_eager)
    key = [uuid.uuid4().hex]
    dist.broadcast_object_list(key)
    boxes = [
        Mailbox(device, f"{key[0]}-{limit}", exchange.rank, exchange.size, limit) if limit else None
        for limit in (args.mailbox if gpu and exchange.size > 1 else [0])
    ]
    dims = SHAPES[args.shape]
    if args.layers:
        dims = ModelDims(args.layers, *list(vars(dims).values())[1:])
    name = torch.cuda.get_device_name() if gpu else "CPU"
    if exchange.rank == 0:
        print(f"{exchange.size}x {name}, torch {torch.__version__}, {args.shape} {dims}")
    results = []
    for what in args.what:
        if what == "step":
            results += steps(args, exchange, timer, args.rows, boxes)
            continue
        run = linears if what == "linears" else exchanges
        results += run(dims, exchange, timer, args.rows, boxes)
    if args.json and exchange.rank == 0:
        record = {
            "device": f"{exchange.size}x {name}",
            "torch": torch.__version__,
            "shape": args.shape,
            "results": results,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
