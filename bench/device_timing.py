"""Timing of single ops on one GPU and the limits of that GPU, measured in the same run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import perf_counter

import torch


def settle(call: Callable[[], object], seconds: float = 0.1) -> None:
    """Calls until the GPU is at speed: for some tens of milliseconds after large buffers were
    filled its memory is a seventh slower."""
    start = perf_counter()
    while perf_counter() - start < seconds:
        call()
        torch.cuda.synchronize()


def median_us(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call in microseconds, by device events around each call."""
    settle(call)
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return sorted(times)[len(times) // 2]


def graph_us(call: Callable[[], object], calls: int = 10, repeats: int = 10) -> float:
    """Median time of one call in microseconds inside a CUDA graph of ``calls`` of them."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return median_us(graph.replay, repeats) / calls


@dataclass
class Limits:
    """What this GPU reaches: bytes read and written per second, operations per second."""

    device: str
    copy: float
    gemm: float

    @classmethod
    def measure(cls) -> "Limits":
        source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / median_us(lambda: target.copy_(source)) * 1e6
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        gemm = 2 * 8192**3 / median_us(lambda: a @ b, 10) * 1e6
        return cls(torch.cuda.get_device_name(), copy, gemm)


@dataclass
class Row:
    """One line of the table: exactly one of ``bytes`` and ``flops`` is the work of a call."""

    name: str
    us: float
    bytes: float = 0.0
    flops: float = 0.0
    graph: float | None = None
    """Microseconds in graph replay."""
    others: dict[str, float] = field(default_factory=dict)
    """Microseconds of other implementations of the same call; "... graph": in graph replay."""

    def rate(self, us: float) -> str:
        if self.flops:
            return f"{self.flops / us / 1e6:6.0f} TF/s"
        return f"{self.bytes / us / 1e3:6.0f} GB/s"

    def line(self, limits: Limits) -> str:
        limit = self.flops / limits.gemm if self.flops else self.bytes / limits.copy
        text = (
            f"{self.name:44} {self.us:9.1f} us {self.rate(self.us)} {limit * 1e8 / self.us:4.0f}%"
        )
        if self.graph is not None:
            text += f"  graph {self.graph:8.1f} us {self.rate(self.graph)}"
        for name, us in self.others.items():
            ours = self.graph if name.endswith("graph") and self.graph else self.us
            text += f"  | {name} {us:.1f} us, {us / ours:.2f}x"
        return text

    def record(self) -> dict:
        return asdict(self)
