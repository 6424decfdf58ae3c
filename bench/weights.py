"""Weights streamed from the shards of all ranks: rates of the pull, and steps beside it.

    torchrun --nproc-per-node 4 bench/weights.py rates linears beside own ablations [--json FILE]

``rates``: GB/s that every rank pulls from its peers at once, by kind of matrix (o and down are 2-D
copies), with nothing beside it. ``beside``: the pull without a pause and GEMMs that do not wait
for it, and what each costs the other. ``kernels``: the same for one kernel without end: GEMMs of
few and many rows, a copy and a read in memory. ``linears``: all linears of one step, streamed
against resident (four layers that are used in turn: a whole copy does not fit beside the shard).
``own``: the same with the rank's own shard copied into the ring or multiplied where it lies.
``ablations``: the same streamed steps with other rings, streams, layouts, a common start, and
ranks out of step. Any number of GPUs; without one all but ``beside`` and ``kernels`` runs on the
CPU, with ``--shape tiny``.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_pd._runtime as _runtime
from pool import SHAPES
from torch import Tensor

from torch_pd.nn.linear import linear_in_parts
from torch_pd.peer import PeerMemory
from torch_pd.weights.layout import LINEARS, Layout, ModelDims, make_layout
from torch_pd.weights.pool import WeightPool
from torch_pd.weights.ring import Ring, RingItem, default_ring_bytes, item_copies, plan_ring
from torch_pd.weights.source import Matrix

WHAT = ("rates", "linears", "beside", "kernels", "own", "ablations", "layouts")
HALVED = ("none", "rows", "all")
COPIES = 4
"""Whole layers kept for the resident steps."""


class Group:
    """The ranks, and what they measure together."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        local = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cuda", local) if self.gpu else torch.device("cpu")
        if self.gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group("gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.results: list[dict[str, Any]] = []
        name = torch.cuda.get_device_name() if self.gpu else "CPU"
        self.name = f"{self.size}x {name}"

    def settle(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()
        dist.barrier()

    def slowest(self, value: float) -> float:
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def seconds(self, call: Callable[[], Any], repeats: int, pause: float = 0.0) -> float:
        """Of one of ``repeats`` calls in a row, on the slowest rank.

        Args:
            pause: seconds that a rank waits for each rank before it.
        """
        call()
        self.settle()
        time.sleep(pause * self.rank)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if self.gpu:
            torch.cuda.synchronize()
        mine = (time.perf_counter() - start) / repeats
        self.settle()
        return self.slowest(mine)

    def show(self, **row: Any) -> None:
        self.results.append(row)
        if self.rank == 0:
            cells = (f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in row.items())
            print("  ".join(cells), flush=True)


class Shards:
    """Random weights, split over the ranks and read by all."""

    def __init__(self, dims: ModelDims, group: Group, key: str, **layout: Any) -> None:
        self.dims, self.group = dims, group
        self.layout: Layout = make_layout(dims, group.size, group.rank, **layout)
        self.memory = PeerMemory(group.device)
        self.index = self.layout.index(group.rank)
        pool = WeightPool(
            self.layout, group.rank, torch.bfloat16, group.device, self.memory.allocate
        )
        values = pool.arena.view(torch.bfloat16)
        for part in values.split(1 << 28):
            part.normal_(0, dims.hidden_size**-0.5)
        del pool, values
        name = f"{key}-{self.layout.ranks[0]}"
        self.arenas = self.memory.connect(name, self.index, self.layout.size)

    def ring(self, **options: Any) -> Ring:
        return Ring(self.layout, self.index, self.arenas, torch.bfloat16, **options)

    def close(self) -> None:
        self.arenas = []
        self.memory.close()
        self.group.settle()


class Whole:
    """A few whole layers that stand for all, in one part each or two halves."""

    def __init__(self, dims: ModelDims, device: torch.device) -> None:
        self.halved = "none"
        """One of HALVED: what is multiplied in halves."""
        self.layers = [
            {
                name: torch.empty(dims.shape(name), dtype=torch.bfloat16, device=device).normal_(
                    0, dims.hidden_size**-0.5
                )
                for name in LINEARS
            }
            for _ in range(min(COPIES, dims.num_layers))
        ]

    def acquire(self, layer: int, name: str) -> Matrix:
        matrix = self.layers[layer % len(self.layers)][name]
        if name in ("qkv", "gate_up") and self.halved != "none":
            return Matrix(matrix.chunk(2))
        if name in ("o", "down") and self.halved == "all":
            return Matrix(self._halves(layer, name), 1)
        return Matrix((matrix,))

    def _halves(self, layer: int, name: str) -> tuple[Tensor, ...]:
        # Each half contiguous, as shards are: the same bytes read as two narrower matrices.
        matrix = self.layers[layer % len(self.layers)][name]
        rows, cols = matrix.shape
        return tuple(half.view(rows, cols // 2) for half in matrix.view(2, -1))

    def release(self, layer: int, name: str) -> None:
        pass


def step(source: Any, dims: ModelDims, x: Tensor) -> Tensor:
    """All linears of the layers; slices stand for attention and activation."""
    q, mlp = dims.num_heads * dims.head_dim, dims.intermediate_size
    for layer in range(dims.num_layers):
        for name, width in (("qkv", q), ("o", 0), ("gate_up", mlp), ("down", 0)):
            x = linear_in_parts(x, source.acquire(layer, name))
            source.release(layer, name)
            if width:
                x = x[:, :width]
    return x


class Pull:
    """A rank's pull of the given matrices of every layer, in the order of a step."""

    def __init__(
        self, shards: Shards, names: Sequence[str], streams: int, rotated: bool = True
    ) -> None:
        group, dims, layout = shards.group, shards.dims, shards.layout
        items = [RingItem(n, at, dims.shape(n)) for at in range(dims.num_layers) for n in names]
        sizes = [item.nbytes(dims.itemsize) for item in items]
        plan = plan_ring(sizes, 4 * max(sizes))
        self.arena = torch.empty(plan.nbytes, dtype=torch.uint8, device=group.device)
        n, me = layout.size, shards.index
        owners = (
            [(me + i) % n for i in range(1, n)] if rotated else [o for o in range(n) if o != me]
        )
        addresses = [other.data_ptr() for other in shards.arenas]
        places, self.nbytes = [], 0
        for item, size, offset in zip(items, sizes, plan.offsets, strict=True):
            to = self.arena.data_ptr() + offset
            copies = item_copies(layout, item, owners, addresses, to)
            self.nbytes += sum(copy[4] * copy[5] for copy in copies)
            places.append((to, size, copies))
        device = group.device.index if group.gpu else -1
        self.puller = _runtime.Puller(device, places, list(plan.gates), streams)
        self.puller.start()
        self.count, self.at = len(items), 0

    def __call__(self) -> None:
        """All of it once; the current stream waits for the pull."""
        gpu = self.arena.is_cuda
        stream = torch.cuda.current_stream().cuda_stream if gpu else 0
        for _ in range(self.count):
            self.puller.acquire(self.at, stream)
            self.puller.release(self.at, stream)
            self.at += 1


def pull_rate(shards: Shards, names: Sequence[str], streams: int, rotated: bool = True) -> float:
    """GB/s of a rank while all pull nothing but the given matrices of every layer."""
    pull = Pull(shards, names, streams, rotated)
    seconds = shards.group.seconds(pull, 3)
    pull.puller.close()
    return pull.nbytes / seconds / 1e9


def beside(shards: Shards, rows: Sequence[int]) -> None:
    """The pull goes on without a pause while a step's GEMMs run over other weights."""
    group, dims = shards.group, shards.dims
    pull, whole = Pull(shards, LINEARS, 2), Whole(dims, group.device)
    side = torch.cuda.Stream()

    def timed(calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Milliseconds at which each has ended on the current stream."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        torch.cuda.synchronize()
        return [events[0].elapsed_time(event) for event in events[1:]]

    for tokens in rows:
        x = torch.randn(tokens, dims.hidden_size, device=group.device).bfloat16()

        def gemms(x: Tensor = x) -> None:
            step(whole, dims, x)

        gemms()
        group.settle()
        alone = timed([gemms])[0]
        pulls = 3 + int(1.5 * alone / (pull.nbytes / 370e6))
        group.settle()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(pulls + 1)]
        with torch.cuda.stream(side):
            events[0].record()
            for event in events[1:]:
                pull()
                event.record()
        both = timed([gemms])[0]
        ends = [events[0].elapsed_time(event) for event in events[1:]]
        inside = max(1, sum(end < both for end in ends))
        rate = pull.nbytes * inside / ends[inside - 1] / 1e6
        group.show(
            what="beside", rows=tokens, gemms_ms=group.slowest(alone),
            gemms_beside_ms=group.slowest(both), gb_s=-group.slowest(-rate),
        )  # fmt: skip
    pull.puller.close()


def kernels(shards: Shards) -> None:
    """One kernel over and over on a side stream while all ranks pull a whole step's matrices."""
    group, ring = shards.group, shards.ring()
    side = torch.cuda.Stream()
    weight = torch.empty(51200, 5120, dtype=torch.bfloat16, device=group.device).normal_(0, 0.01)
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=group.device)
    target, words = torch.empty_like(source), source.view(torch.int32)
    calls: dict[str, Callable[[], Any]] = {
        "copy 1 GiB": lambda: target.copy_(source),
        "read 1 GiB": lambda: words.amax(),
    }
    for rows in (1, 16, 96, 256, 512, 1024, 4096):
        x = torch.randn(rows, 5120, device=group.device).bfloat16()
        y = x.new_empty(rows, 51200)
        calls[f"GEMM, {rows} rows"] = lambda x=x, y=y: torch.mm(x, weight.t(), out=y)
    ring.run_through()
    seconds = group.seconds(ring.run_through, 2)
    group.show(what="kernels", beside="nothing", gb_s=ring.pulled_bytes / seconds / 1e9)
    for name, call in calls.items():
        alone = group.seconds(call, 20) * 1e3
        count = int(2.6 * seconds * 1e3 / alone) + 4
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        group.settle()
        with torch.cuda.stream(side):
            events[0].record()
            for event in events[1:]:
                call()
                event.record()
        start.record()
        ring.run_through()
        end.record()
        torch.cuda.synchronize()
        ms = start.elapsed_time(end)
        ends = [start.elapsed_time(event) for event in events]
        inside = sorted(b - a for a, b in itertools.pairwise(ends) if a > 0 and b < ms)
        group.show(
            what="kernels", beside=name, alone_ms=alone, beside_ms=inside[len(inside) // 2],
            gb_s=ring.pulled_bytes / ms / 1e6,
        )  # fmt: skip
    ring.close()


def own(shards: Shards, rows: Sequence[int]) -> None:
    """The own shard copied or in place; and what the smaller GEMMs cost by themselves."""
    group, dims = shards.group, shards.dims
    for tokens in rows:
        x = torch.randn(tokens, dims.hidden_size, device=group.device).bfloat16()
        whole = Whole(dims, group.device)
        repeats = 2 if tokens > 4096 else 3
        for whole.halved in HALVED:
            seconds = group.seconds(lambda x=x, whole=whole: step(whole, dims, x), repeats)
            group.show(what="resident", halved=whole.halved, rows=tokens, ms=seconds * 1e3)
        del whole
        for in_place in (False, True):
            found = streamed_ms(shards, tokens, in_place=in_place)
            group.show(what="streamed", in_place=in_place, rows=tokens, **found)
        whole = Whole(dims, group.device)
        seconds = group.seconds(lambda x=x, whole=whole: step(whole, dims, x), repeats)
        group.show(what="resident", halved="none", rows=tokens, ms=seconds * 1e3)
        del whole


def rates(shards: Shards) -> None:
    group = shards.group
    for names in (("qkv",), ("o",), ("gate_up",), ("down",), LINEARS):
        for streams in (1, 2):
            group.show(
                what="pull", names="+".join(names), streams=streams,
                gb_s=pull_rate(shards, names, streams),
            )  # fmt: skip
    group.show(
        what="pull", names="all, same start", streams=2,
        gb_s=pull_rate(shards, LINEARS, 2, rotated=False),
    )  # fmt: skip


def streamed_ms(shards: Shards, tokens: int, pause: float = 0.0, **options: Any) -> dict[str, Any]:
    group, dims = shards.group, shards.dims
    ring = shards.ring(**options)
    x = torch.randn(tokens, dims.hidden_size, device=group.device).bfloat16()
    seconds = group.seconds(lambda: step(ring, dims, x), 2 if tokens > 4096 else 4, pause)
    # lm_head is passed over, but pulled.
    result = {"ms": seconds * 1e3, "gb_s": ring.pulled_bytes / seconds / 1e9}
    ring.close()
    return result


def linears(shards: Shards, rows: Sequence[int]) -> None:
    group, dims = shards.group, shards.dims
    for tokens in rows:
        whole = Whole(dims, group.device)
        x = torch.randn(tokens, dims.hidden_size, device=group.device).bfloat16()
        repeats = 2 if tokens > 4096 else 4
        resident = group.seconds(lambda x=x, whole=whole: step(whole, dims, x), repeats) * 1e3
        del whole
        streamed = streamed_ms(shards, tokens)
        group.show(
            what="linears", rows=tokens, resident_ms=resident, streamed_ms=streamed["ms"],
            ratio=streamed["ms"] / resident, gb_s=streamed["gb_s"],
        )  # fmt: skip


def ablations(shards: Shards, rows: Sequence[int]) -> None:
    group = shards.group
    layer = default_ring_bytes(shards.layout, shards.index) // 2
    for tokens in rows:
        for layers in (0.8, 1.0, 1.25, 1.5, 2.0, 3.0):
            found = streamed_ms(shards, tokens, nbytes=int(layer * layers))
            group.show(what="ring", layers=layers, rows=tokens, **found)
        for streams in (1, 2, 3):
            group.show(
                what="streams", streams=streams, rows=tokens,
                **streamed_ms(shards, tokens, streams=streams),
            )  # fmt: skip
        found = streamed_ms(shards, tokens, rotated=False)
        group.show(what="same start", rows=tokens, **found)
        found = streamed_ms(shards, tokens, pause=0.02)
        group.show(what="out of step, 20 ms a rank", rows=tokens, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=WHAT)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-32b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--ablation-rows", type=int, nargs="+", default=[1536, 4096])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    group = Group()
    dims = SHAPES[args.shape]
    if args.layers:
        dims = ModelDims(args.layers, *list(vars(dims).values())[1:])
    if group.rank == 0:
        print(f"{group.name}, torch {torch.__version__}, {args.shape} {dims}", flush=True)
    key = [os.urandom(8).hex()]
    dist.broadcast_object_list(key, src=0)
    with torch.no_grad():
        if set(args.what) - {"layouts"}:
            shards = Shards(dims, group, key[0])
            if "rates" in args.what:
                rates(shards)
            if "beside" in args.what:
                beside(shards, args.rows)
            if "kernels" in args.what:
                kernels(shards)
            if "own" in args.what:
                own(shards, args.rows)
            if "linears" in args.what:
                linears(shards, args.rows)
            if "ablations" in args.what:
                ablations(shards, args.ablation_rows)
            shards.close()
        if "layouts" in args.what:
            replicas = [k for k in (1, 2) if group.size // k > 1 and group.size % k == 0]
            ways: list[dict[str, Any]] = [{"replicas": k} for k in replicas]
            for way in [*ways, {"weight_layout": "layer"}]:
                name = "-".join(map(str, way.values()))
                shards = Shards(dims, group, f"{key[0]}-{name}", **way)
                for tokens in args.ablation_rows:
                    group.show(what="layout", **way, rows=tokens, **streamed_ms(shards, tokens))
                shards.close()
    if args.json and group.rank == 0:
        record = {
            "device": group.name,
            "torch": torch.__version__,
            "shape": args.shape,
            "layers": dims.num_layers,
            "results": group.results,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
