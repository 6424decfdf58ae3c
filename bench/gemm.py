"""What other algorithms of cuBLASLt would gain over the choice of torch, per linear and per step.

Every linear of a shape at every number of rows, bfloat16, as torch multiplies it and by each
algorithm that cuBLASLt's heuristic names, with splits of the inner dimension tried on top; then all
linears of a few layers one behind the other. Times are of CUDA graphs over weights that rotate
through more memory than the L2 cache holds. Outputs are compared with float32.

    python bench/gemm.py --json gemm.json
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType

BYTES_PER_S = 3.0e12
FLOPS = 700e12

# [out, in] of one layer's linears, the head last.
SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (24576, 4096),
        "down": (4096, 12288),
        "lm_head": (151936, 4096),
    },
    "32B/4": {
        "qkv": (2560, 5120),
        "o": (5120, 2048),
        "gate_up": (12800, 5120),
        "down": (5120, 6400),
    },
    "32B/2": {
        "qkv": (5120, 5120),
        "o": (5120, 4096),
        "gate_up": (25600, 5120),
        "down": (5120, 12800),
    },
}
ROWS = {
    "8B": [256, 64, 128, 512, 1024, 16, 192, 8192],
    "32B/4": [256, 1024, 512, 64, 2048],
    "32B/2": [256, 512, 1024, 64, 2048],
}
LAYERS = {"8B": 36, "32B/4": 64, "32B/2": 64}
WORKSPACE = 64 << 20
SIDE: list[torch.cuda.Stream] = []
"""The stream of captures."""

Run = Callable[[Tensor, Tensor, Tensor], object]
"""x [rows, in], weight [out, in], y [rows, out]."""


class _Algo(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algo", _Algo),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


CONFIG = ["id", "tile", "split", "reduction", "swizzle", "custom", "stages", "inner", "cluster"]


class Lt:
    """cuBLASLt of the running torch, by its C interface."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libcublasLt.so.13")
        self.lib.cublasLtGetVersion.restype = ctypes.c_size_t
        self.handle = ctypes.c_void_p()
        self.check(self.lib.cublasLtCreate(ctypes.byref(self.handle)))
        self.space = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        self.one, self.zero = ctypes.c_float(1.0), ctypes.c_float(0.0)

    @staticmethod
    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"cuBLASLt status {status}")

    def layout(self, rows: int, cols: int, ld: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        self.check(
            self.lib.cublasLtMatrixLayoutCreate(
                ctypes.byref(layout),
                14,
                ctypes.c_uint64(rows),
                ctypes.c_uint64(cols),
                ctypes.c_int64(ld),
            )
        )
        return layout


class Product:
    """One linear of `rows` rows: y [rows, out] = x [rows, in] @ weight [out, in].T."""

    def __init__(self, lt: Lt, rows: int, out: int, inner: int) -> None:
        self.lt, lib = lt, lt.lib
        self.desc = ctypes.c_void_p()
        lt.check(lib.cublasLtMatmulDescCreate(ctypes.byref(self.desc), 68, 0))
        transposed = ctypes.c_int32(1)
        lt.check(lib.cublasLtMatmulDescSetAttribute(self.desc, 3, ctypes.byref(transposed), 4))
        self.a = lt.layout(inner, out, inner)
        self.b = lt.layout(inner, rows, inner)
        self.d = lt.layout(out, rows, out)
        self.layouts = [self.desc, self.a, self.b, self.d, self.d]

    def heuristics(self, count: int, workspace: int, reductions: int) -> list[_Heuristic]:
        lt, lib = self.lt, self.lt.lib
        pref = ctypes.c_void_p()
        lt.check(lib.cublasLtMatmulPreferenceCreate(ctypes.byref(pref)))
        size, mask = ctypes.c_uint64(workspace), ctypes.c_uint32(reductions)
        lt.check(lib.cublasLtMatmulPreferenceSetAttribute(pref, 1, ctypes.byref(size), 8))
        lt.check(lib.cublasLtMatmulPreferenceSetAttribute(pref, 3, ctypes.byref(mask), 4))
        found, got = (_Heuristic * count)(), ctypes.c_int()
        lt.check(
            lib.cublasLtMatmulAlgoGetHeuristic(
                lt.handle, *self.layouts, pref, count, found, ctypes.byref(got)
            )
        )
        lib.cublasLtMatmulPreferenceDestroy(pref)
        return [found[i] for i in range(got.value) if found[i].state == 0]

    def config(self, algo: _Algo) -> list[int]:
        values = []
        for attribute in range(9):
            value, written = ctypes.c_int64(0), ctypes.c_size_t()
            size = 2 if attribute in (7, 8) else 4
            status = self.lt.lib.cublasLtMatmulAlgoConfigGetAttribute(
                ctypes.byref(algo), attribute, ctypes.byref(value), size, ctypes.byref(written)
            )
            values.append(-1 if status else value.value)
        return values

    def changed(self, algo: _Algo, **values: int) -> _Heuristic | None:
        """The algorithm with other settings, None if cuBLASLt refuses them."""
        lib, other, result = self.lt.lib, _Algo(), _Heuristic()
        ctypes.memmove(ctypes.byref(other), ctypes.byref(algo), ctypes.sizeof(_Algo))
        for name, number in values.items():
            attribute = CONFIG.index(name)
            value = ctypes.c_int64(number)
            size = 2 if attribute in (7, 8) else 4
            if lib.cublasLtMatmulAlgoConfigSetAttribute(
                ctypes.byref(other), attribute, ctypes.byref(value), size
            ):
                return None
        if lib.cublasLtMatmulAlgoCheck(
            self.lt.handle, *self.layouts, ctypes.byref(other), ctypes.byref(result)
        ):
            return None
        ctypes.memmove(ctypes.byref(result.algo), ctypes.byref(other), ctypes.sizeof(_Algo))
        return result if result.state == 0 and result.workspace <= WORKSPACE else None

    def runner(self, algo: _Algo) -> Run:
        lt = self.lt

        def run(x: Tensor, weight: Tensor, y: Tensor) -> None:
            lt.check(
                lt.lib.cublasLtMatmul(
                    lt.handle,
                    self.desc,
                    ctypes.byref(lt.one),
                    ctypes.c_void_p(weight.data_ptr()),
                    self.a,
                    ctypes.c_void_p(x.data_ptr()),
                    self.b,
                    ctypes.byref(lt.zero),
                    ctypes.c_void_p(y.data_ptr()),
                    self.d,
                    ctypes.c_void_p(y.data_ptr()),
                    self.d,
                    ctypes.byref(algo),
                    ctypes.c_void_p(lt.space.data_ptr()),
                    ctypes.c_size_t(WORKSPACE),
                    ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
                )
            )

        return run


def by_torch(x: Tensor, weight: Tensor, y: Tensor) -> None:
    torch.mm(x, weight.t(), out=y)


def by_torch_lt(x: Tensor, weight: Tensor, y: Tensor) -> None:
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch.mm(x, weight.t(), out=y)
    torch.backends.cuda.preferred_blas_library("cublas")


def in_float32(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """torch's choice where partial sums must not be rounded to bfloat16."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.mm(x, weight.t(), out=y)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def in_two(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """gate and up apart."""
    half = weight.shape[0] // 2
    torch.mm(x, weight[:half].t(), out=y[:, :half])
    torch.mm(x, weight[half:].t(), out=y[:, half:])


class Memory:
    """Weights as slices of one large buffer of random numbers."""

    def __init__(self, gib: float) -> None:
        self.buffer = torch.empty(int(gib * (1 << 29)), dtype=torch.bfloat16, device="cuda")
        for part in self.buffer.split(1 << 28):
            part.normal_(0, 0.02)
        self.next = 0

    def weight(self, out: int, inner: int) -> Tensor:
        """The next one behind the last."""
        if self.next + out * inner > self.buffer.numel():
            self.next = 0
        part = self.buffer[self.next : self.next + out * inner]
        self.next += -(-out * inner // 2048) * 2048
        return part.view(out, inner)


def graph_of(body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(SIDE[0]):
        graph.capture_begin(capture_error_mode="relaxed")
        body()
        graph.capture_end()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, times: int = 1) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def in_turn(graphs: Sequence[torch.cuda.CUDAGraph], rounds: int, enough_ms: float) -> list[float]:
    """The median time of each, measured in turn so that clock and heat are the same for all."""
    once = [replay_ms(graph) for graph in graphs]
    times = [max(1, round(enough_ms / ms)) for ms in once]
    samples = [
        [replay_ms(graph, n) for graph, n in zip(graphs, times, strict=True)] for _ in range(rounds)
    ]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


@dataclass
class Choice:
    name: str
    run: Run
    config: list[int]
    workspace: int = 0
    waves: float = 0.0
    rank: int = -1
    """In the heuristic's list; 100: found for another product; 200: split otherwise."""
    us: float = 0.0
    error: float = 0.0
    algo: _Algo = field(default_factory=_Algo)


Pool = dict[tuple[int, ...], tuple[_Heuristic, int]]
"""By configuration: the algorithm and its place in the list that it was first found in."""


def listed(product: Product, depth: int) -> Pool:
    """The algorithms that the heuristic names for a product, for workspaces of several sizes."""
    found: Pool = {}
    for workspace in (WORKSPACE, 1 << 20, 0):
        # 2: partial sums stay in float32; 7: any way of adding them.
        for reductions in (2, 7):
            for rank, result in enumerate(product.heuristics(depth, workspace, reductions)):
                found.setdefault(tuple(product.config(result.algo)), (result, rank))
    return found


def candidates(product: Product, depth: int, pool: Pool) -> list[Choice]:
    """The heuristic's algorithms, and those of the pool that can do this product."""
    found = listed(product, depth)
    for config, (result, _) in pool.items():
        if config not in found:
            other = product.changed(result.algo)
            if other is not None:
                found[config] = other, 100
    return [choice_of(product, result, rank) for result, rank in found.values()]


def choice_of(product: Product, result: _Heuristic, rank: int) -> Choice:
    config = product.config(result.algo)
    choice = Choice("lt", product.runner(result.algo), config, result.workspace, result.waves, rank)
    choice.algo = result.algo
    return choice


def in_splits(product: Product, choices: Sequence[Choice]) -> list[Choice]:
    """The same algorithms with the inner dimension split otherwise."""
    known = {tuple(choice.config) for choice in choices}
    found = []
    for choice in choices:
        for split in (1, 2, 3, 4, 5, 6, 8):
            other = product.changed(choice.algo, split=split, reduction=2 if split > 1 else 0)
            if other is not None and tuple(product.config(other.algo)) not in known:
                found.append(choice_of(product, other, 200))
                known.add(tuple(found[-1].config))
    return found


def measure(
    lt: Lt,
    memory: Memory,
    rows: int,
    out: int,
    inner: int,
    args: argparse.Namespace,
    gate_up: bool,
    pool: Pool,
) -> list[Choice]:
    x = torch.randn(rows, inner, dtype=torch.bfloat16, device="cuda")
    copies = max(2, -(-args.rotate_mib * (1 << 20) // (out * inner * 2)))
    weights = [memory.weight(out, inner) for _ in range(copies)]
    outputs = [torch.empty(rows, out, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    want = (x.float() @ weights[0].float().t()).to(torch.float32)
    scale = want.abs().max().item()

    def graph(choice: Choice) -> torch.cuda.CUDAGraph:
        def body() -> None:
            for i, weight in enumerate(weights):
                choice.run(x, weight, outputs[i % 2])

        return graph_of(body)

    def correct(choice: Choice) -> bool:
        outputs[0].fill_(float("nan"))
        choice.run(x, weights[0], outputs[0])
        choice.error = (outputs[0].float() - want).abs().max().item() / scale
        return choice.error < 0.01

    fixed = [
        Choice("torch", by_torch, []),
        Choice("torch lt", by_torch_lt, []),
        Choice("torch f32", in_float32, []),
    ]
    if gate_up:
        fixed.append(Choice("torch in two", in_two, []))
    for choice in fixed:
        if not correct(choice):
            raise RuntimeError(f"{choice.name}: {choice.error}")
    product = Product(lt, rows, out, inner)
    tried: list[Choice] = []
    fastest = float("inf")

    def attempt(choices: list[Choice]) -> None:
        nonlocal fastest
        for choice in choices:
            try:
                good = correct(choice)
            except RuntimeError as error:
                print(f"   refused {choice.config}: {error}", flush=True)
                continue
            if not good:
                print(f"   wrong {choice.config}: {choice.error:.3g}", flush=True)
                continue
            g = graph(choice)
            choice.us = replay_ms(g) / copies * 1000
            if choice.us < 1.3 * fastest:
                choice.us = min(choice.us, replay_ms(g) / copies * 1000)
            fastest = min(fastest, choice.us)
            tried.append(choice)

    attempt(candidates(product, args.depth, pool))
    tried.sort(key=lambda choice: choice.us)
    attempt(in_splits(product, tried[:8]))
    print(f"   {len(tried)} algorithms", end="")
    tried.sort(key=lambda choice: choice.us)
    first = [choice for choice in tried if choice.rank == 0]
    final = fixed + list({id(c): c for c in tried[:4] + first}.values())
    graphs = [graph(choice) for choice in final]
    enough = 30.0 if rows >= 4096 else 1.5
    for choice, ms in zip(final, in_turn(graphs, 5, enough), strict=True):
        choice.us = ms / copies * 1000
    return fixed + sorted(final[len(fixed) :], key=lambda c: c.us)


def names_of(runs: list[tuple[str, Callable[[], object]]]) -> dict[str, str]:
    """The kernels of each."""
    mark = torch.zeros(1, dtype=torch.float64, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _, run in runs:
            mark.add_(1)
            run()
        torch.cuda.synchronize()
    names: list[list[str]] = []
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        if event.device_type != DeviceType.CUDA:
            continue
        if "elementwise" in event.name:
            names.append([])
        elif names:
            names[-1].append(event.name[:100])
    return {key: " + ".join(kernels) for (key, _), kernels in zip(runs, names, strict=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--budget", type=float, default=50, help="seconds; what is late is left out"
    )
    parser.add_argument("--depth", type=int, default=32, help="algorithms asked for")
    parser.add_argument("--pool", action="store_true", help="each algorithm for each product")
    parser.add_argument("--rotate-mib", type=int, default=400)
    parser.add_argument("--gib", type=float, default=6)
    parser.add_argument("--models", nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int)
    args = parser.parse_args()
    began = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    memory = Memory(args.gib)
    torch.mm(*[torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")] * 2)
    SIDE.append(torch.cuda.Stream())
    with torch.cuda.stream(SIDE[0]):
        # So that workspaces do not come out of a graph's memory.
        for run in (by_torch, by_torch_lt):
            run(*torch.ones(3, 64, 64, dtype=torch.bfloat16, device="cuda"))
    lt = Lt()
    print(
        torch.cuda.get_device_name(),
        torch.__version__,
        "cuBLASLt",
        lt.lib.cublasLtGetVersion(),
        f"ready {time.monotonic() - began:.1f} s",
        flush=True,
    )
    record: list[dict[str, object]] = []
    pool: Pool = {}
    if args.pool:
        for model in args.models:
            for rows in args.rows or ROWS[model]:
                for out, inner in SHAPES[model].values():
                    product = Product(lt, rows, out, inner)
                    for config, (result, rank) in listed(product, args.depth).items():
                        pool.setdefault(config, (result, rank))
        print(f"{len(pool)} algorithms, {time.monotonic() - began:.1f} s", flush=True)
    order = sorted(
        (
            (rank, model, rows)
            for model in args.models
            for rank, rows in enumerate(args.rows or ROWS[model])
        ),
        key=lambda item: item[0],
    )
    named: list[tuple[str, Callable[[], object]]] = []
    for _, model, rows in order:
        if time.monotonic() - began > args.budget:
            print(f"left out: {model} {rows}", flush=True)
            continue
        chosen: dict[str, tuple[Run, Run]] = {}
        for name, (out, inner) in SHAPES[model].items():
            if name == "lm_head" and rows > 1024:
                continue
            choices = measure(lt, memory, rows, out, inner, args, name == "gate_up", pool)
            moved, flops = 2 * (out * inner + rows * (out + inner)), 2 * rows * out * inner
            floor = max(moved / BYTES_PER_S, flops / FLOPS) * 1e6
            base = choices[0].us
            best = min((c for c in choices if c.name == "lt"), key=lambda c: c.us)
            lt_first = next((c.us for c in choices if c.rank == 0), float("nan"))
            others = " ".join(f"{c.name[6:]} {c.us:.1f}" for c in choices[1:] if c.name != "lt")
            print(
                f"{model:5} {rows:5} {name:8} torch {base:7.1f} us {moved / base / 1e3:5.0f} GB/s "
                f"{flops / base / 1e6:4.0f} TF/s {floor / base:4.0%} | best {best.us:7.1f} "
                f"{floor / best.us:4.0%} gain {base / best.us - 1:6.1%} | {others} first "
                f"{lt_first:.1f} | #{best.rank} ws {best.workspace >> 10}K waves {best.waves:.2f} "
                f"{dict(zip(CONFIG, best.config, strict=True))} err {choices[0].error:.1e} "
                f"{best.error:.1e}",
                flush=True,
            )
            chosen[name] = (by_torch, best.run if best.us < base * 0.99 else by_torch)
            x = torch.randn(rows, inner, dtype=torch.bfloat16, device="cuda")
            y = torch.empty(rows, out, dtype=torch.bfloat16, device="cuda")
            weight = memory.weight(out, inner)
            for key, run in (("torch", by_torch), ("best", best.run)):
                named.append(
                    (f"{model} {rows} {name} {key}", lambda r=run, x=x, w=weight, y=y: r(x, w, y))
                )
            record.append(
                {
                    "model": model,
                    "rows": rows,
                    "linear": name,
                    "floor_us": floor,
                    "choices": [
                        {
                            "name": c.name,
                            "us": c.us,
                            "rank": c.rank,
                            "config": c.config,
                            "workspace": c.workspace,
                            "waves": c.waves,
                            "error": c.error,
                        }
                        for c in choices
                    ],
                }
            )
        # Layers one behind the other.
        layers = max(
            2,
            min(
                6,
                int(
                    args.gib
                    * 0.9e9
                    / sum(2 * o * i for n, (o, i) in SHAPES[model].items() if n != "lm_head")
                ),
            ),
        )
        linears = []
        for _ in range(layers):
            for name, (out, inner) in SHAPES[model].items():
                if name != "lm_head":
                    linears.append((name, memory.weight(out, inner)))
        xs = {
            n: torch.randn(rows, i, dtype=torch.bfloat16, device="cuda")
            for n, (_, i) in SHAPES[model].items()
        }
        ys = {
            n: torch.empty(rows, o, dtype=torch.bfloat16, device="cuda")
            for n, (o, _) in SHAPES[model].items()
        }

        def chain(which: int, linears=linears, chosen=chosen, xs=xs, ys=ys) -> torch.cuda.CUDAGraph:
            def body() -> None:
                for name, weight in linears:
                    chosen[name][which](xs[name], weight, ys[name])

            return graph_of(body)

        ms = in_turn([chain(0), chain(1)], 7, 100.0 if rows >= 4096 else 8.0)
        step = [m / layers * LAYERS[model] for m in ms]
        print(
            f"== {model} {rows}: all linears of {LAYERS[model]} layers, ms: torch {step[0]:.2f} "
            f"best {step[1]:.2f} gain {step[0] / step[1] - 1:.1%}   ({time.monotonic() - began:.0f}"
            " s)",
            flush=True,
        )
        record.append({"model": model, "rows": rows, "step_ms": step})
    if args.json:
        args.json.write_text(json.dumps(record))
    names = names_of(named) if time.monotonic() - began < args.budget + 5 else {}
    for key, name in names.items():
        print(key, name)
    if args.json:
        args.json.write_text(json.dumps({"measured": record, "kernels": names}))


if __name__ == "__main__":
    main()
