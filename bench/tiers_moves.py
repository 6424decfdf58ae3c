"""How fast KV pages move between GPU, host, peer and disk, against limits of the same run.

    python bench/tiers_moves.py [--only moves,decode,disk,peer] [--gib 6] [--folder /tmp]
                                [--json FILE]

Moves are of single pages in random order on both sides, through the Migrator, in batches of 256
MiB. The limit is one pinned copy of 1 GiB, and with a peer (two GPUs) one copy of its pool.
"decode" is a step of linears and attention of an 8B shape in a CUDA graph, alone and while pages
move both ways. "peer" also reads pages where they lie: attention of one layer of that shape, and
the gathering of prefill. The disk is held against dd with blocks of one page.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch_pd._runtime as _runtime

from torch_pd import ops
from torch_pd.kv import migrate
from torch_pd.kv.cache import KVPool
from torch_pd.kv.disk import DiskTier
from torch_pd.kv.host import HostPool
from torch_pd.kv.migrate import Migrator
from torch_pd.kv.moves import DiskJob, MoveQueue, Moves, Waits

GIB = 1 << 30
BATCH_BYTES = 256 << 20
BLOCK = 16
PAGES = {
    "4 MiB (Qwen3-32B)": 4 << 20,
    "2.25 MiB (Qwen3-8B)": 36 * 2 * 16 * 8 * 128 * 2,
    "360 KiB (SmolLM2-135M)": 30 * 2 * 16 * 3 * 64 * 2,
    "128 KiB": 128 << 10,
    "60 KiB": 60 << 10,
    "32 KiB": 32 << 10,
    "16 KiB": 16 << 10,
}


def seconds(work: Callable[[], None], rounds: int = 3) -> float:
    """Best wall time of some rounds; the device is idle before and after."""
    best = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def lent(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] in the second GPU's memory, mapped by the first, as a lease maps it."""
    fd = _runtime.PeerBlock(1, nbytes).to_fd()
    block = _runtime.PeerBlock(0, nbytes, fd)
    os.close(fd)
    return torch.from_dlpack(block.dlpack())


class Link:
    """A GPU's pool, one of the host or of a peer, pages of one size and the traffic between."""

    def __init__(
        self, page_bytes: int, gib: float, by_kernel: bool | None = None, peer: bool = False
    ):
        self.page_bytes = page_bytes
        self.pages = int(gib * GIB) // page_bytes // 2 * 2
        self.gpu = torch.zeros(self.pages, page_bytes, dtype=torch.uint8, device="cuda:0")
        if by_kernel is not None:
            size = page_bytes + 1 if by_kernel else 0
            migrate.SMALL_PAGE = migrate.SMALL_PEER_PAGE = size
        start = time.perf_counter()
        self.host = None if peer else HostPool(self.pages, page_bytes, self.gpu.device)
        peers = [lent(self.pages * page_bytes).view(self.pages, page_bytes)] if peer else []
        self.setup = time.perf_counter() - start
        self.migrator = Migrator(self.gpu, self.host, peers)
        self.first = 1 if peer else 0  # number of the other pool's first page
        self.queue = MoveQueue(self.pages, self.first + self.pages, self.first if peer else None)
        self.batch = max(1, BATCH_BYTES // page_bytes)
        order = torch.randperm(self.pages)
        half = self.pages // 2
        # Out and in never meet on a page.
        self.gpu_order = order.tolist()
        self.host_order = (torch.randperm(self.pages) + self.first).tolist()
        self.half = half

    def close(self) -> None:
        torch.cuda.synchronize()
        del self.migrator
        if self.host is not None:
            self.host.release()

    def submit(self, out: bool, first: int, count: int) -> None:
        """One batch of moves within a direction's half."""
        base = 0 if out else self.half
        for i in range(first, first + count):
            gpu, host = self.gpu_order[base + i], self.host_order[base + i]
            if out:
                self.queue.move_out(gpu, host)
            else:
                self.queue.move_in(host, gpu)

    @property
    def last(self) -> Waits:
        """The tickets of all batches so far."""
        return Waits(*(ticket - 1 for ticket in self.queue._next))

    def flush(self) -> None:
        batches, _ = self.queue.take()
        for moves in batches:
            self.migrator.submit(moves)

    def plan(self, directions: tuple[bool, ...]) -> list[Moves]:
        """Batches that move each direction's half of the pools once."""
        batches = []
        for first in range(0, self.half, self.batch):
            for out in directions:
                self.submit(out, first, min(self.batch, self.half - first))
            batches += self.queue.take()[0]
        return batches

    def rate(self, directions: tuple[bool, ...], rounds: int = 3) -> float:
        """GB/s in all, the best of some rounds; the scheduler's part is not in the time."""
        work = len(directions) * self.half * self.page_bytes
        best = float("inf")
        for _ in range(rounds):
            batches = self.plan(directions)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for moves in batches:
                self.migrator.submit(moves)
            self.migrator.finish(self.last)
            best = min(best, time.perf_counter() - start)
        return work / best / 1e9


def pinned_limits(gib: int = 1) -> dict[str, float]:
    """GB/s of one large pinned copy: in, out, both at once."""
    host = HostPool(2 * gib * 1024, 1 << 20, torch.device("cuda"))
    pages = host.pages
    a, b = (torch.zeros(gib << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    up, down = pages[: gib << 10].view(-1), pages[gib << 10 :].view(-1)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def copies(which: tuple[int, ...]) -> None:
        for i in which:
            with torch.cuda.stream(streams[i]):
                for _ in range(4):
                    if i == 0:
                        a.copy_(up, non_blocking=True)
                    else:
                        down.copy_(b, non_blocking=True)

    size = 4 * gib * GIB / 1e9
    rates = {
        "in": size / seconds(lambda: copies((0,))),
        "out": size / seconds(lambda: copies((1,))),
        "both": 2 * size / seconds(lambda: copies((0, 1))),
    }
    host.release()
    return rates


def bench_moves(gib: float, results: dict) -> None:
    limits = pinned_limits()
    results["pinned_limits_gb_s"] = limits
    print(f"pinned copy: in {limits['in']:.1f}, out {limits['out']:.1f}, both {limits['both']:.1f}")
    print(f"{'scattered pages of':26} {'by':7} {'in':>6} {'out':>6} {'both':>6} GB/s; of the limit")
    rows = results["moves"] = []
    default = migrate.SMALL_PAGE
    for name, page_bytes in PAGES.items():
        ways = (False, True) if page_bytes <= (512 << 10) else (False,)
        for by_kernel in ways:
            size = gib if page_bytes >= (256 << 10) else min(gib, 1.0)
            link = Link(page_bytes, size, by_kernel)
            rates = {
                "in": link.rate((False,)),
                "out": link.rate((True,)),
                "both": link.rate((True, False)),
            }
            shares = {key: rate / limits[key] for key, rate in rates.items()}
            by = "kernel" if by_kernel else "engine"
            rows.append({"page": name, "bytes": page_bytes, "by": by, **rates})
            print(
                f"{name:26} {by:7} {rates['in']:6.1f} {rates['out']:6.1f} {rates['both']:6.1f}"
                f"  {shares['in']:4.0%} {shares['out']:4.0%} {shares['both']:4.0%}"
                f"   pool {size:.0f} GiB ready in {link.setup:.2f} s, bound {link.host.on_gpu_node}"
            )
            link.close()
    migrate.SMALL_PAGE = default


class DecodeStep:
    """Linears and attention of a decoding step of an 8B shape, random weights, in a CUDA graph."""

    def __init__(self, sequences: int = 64, context: int = 2048, layers: int = 36):
        hidden, heads, kv_heads, dim, mlp = 4096, 32, 8, 128, 12288
        make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02  # noqa: E731
        self.weights = [
            (
                make((heads + 2 * kv_heads) * dim, hidden),
                make(hidden, heads * dim),
                make(2 * mlp, hidden),
                make(hidden, mlp),
            )
            for _ in range(layers)
        ]
        count = -(-context // 16)
        pages = sequences * count + 1
        self.pool = KVPool(pages, layers, 16, kv_heads, dim, torch.bfloat16, "cuda")
        self.pool.pages.zero_()
        tables = torch.randperm(pages - 1).add(1).int().view(sequences, count).cuda()
        lens = torch.full((sequences,), context, dtype=torch.int32, device="cuda")
        starts = torch.arange(sequences + 1, dtype=torch.int32, device="cuda")
        x = make(sequences, hidden)

        def step() -> None:
            h = x
            for layer, (qkv, o, gate_up, down) in enumerate(self.weights):
                q = (h @ qkv.T)[:, : heads * dim].contiguous().view(sequences, heads, dim)
                out = torch.empty_like(q)
                k, v, *_ = self.pool.layer(layer)
                ops.paged_attention(q, k, v, tables, lens, starts, out, dim**-0.5, 1)
                h = h + out.flatten(1) @ o.T
                wide = h @ gate_up.T
                act = torch.empty(sequences, mlp, device="cuda", dtype=torch.bfloat16)
                ops.gated_act(wide, act, "silu")
                h = h + act @ down.T

        step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()

    def time(self, repeats: int, between: Callable[[], None] = lambda: None) -> float:
        """Median milliseconds of a step; ``between`` is called before each."""
        events = [
            tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)
        ]
        for start, stop in events:
            between()
            start.record()
            self.graph.replay()
            stop.record()
        torch.cuda.synchronize()
        times = sorted(start.elapsed_time(stop) for start, stop in events)
        return times[len(times) // 2]


def bench_decode(results: dict, peer: bool = False) -> None:
    step = DecodeStep()
    link = Link(4 << 20, 16.0 if peer else 4.0, None, peer)  # more than three batches each way
    step.time(5)
    alone = step.time(40)
    bytes_per_step = int((300e9 if peer else 60e9) * alone / 1e3)
    count = max(1, bytes_per_step // link.page_bytes)
    at = 0
    queued: list[Waits] = []

    def both_ways() -> None:
        nonlocal at
        if at + count > link.half:
            at = 0
        link.submit(True, at, count)
        link.submit(False, at, count)
        at += count
        link.flush()
        # The link stays busy, three batches ahead and no more.
        queued.append(link.last)
        if len(queued) > 3:
            link.migrator.finish(queued.pop(0))

    start = time.perf_counter()
    moved = sum(link.queue.num_moved)
    busy = step.time(120, both_ways)
    rate = (sum(link.queue.num_moved) - moved) * link.page_bytes / (time.perf_counter() - start)
    results["decode_peer" if peer else "decode"] = {
        "alone_ms": alone,
        "busy_ms": busy,
        "moved_gb_s": rate / 1e9,
    }
    print(
        f"decode step of 64 x 2048 tokens (8B shape): alone {alone:.2f} ms, while pages move both "
        f"ways{' (peer)' if peer else ''} {busy:.2f} ms = {busy / alone - 1:+.1%}, with "
        f"{rate / 1e9:.0f} GB/s"
    )
    link.close()


def peer_limits(gib: float) -> dict[str, float]:
    """GB/s of one copy of this size to the second GPU, from it, and of half of it each way."""
    size = int(gib * GIB) // 2 * 2
    there, here = lent(size), torch.zeros(size, dtype=torch.uint8, device="cuda:0")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            there[: size // 2].copy_(here[: size // 2])
        with torch.cuda.stream(streams[1]):
            here[size // 2 :].copy_(there[size // 2 :])

    return {
        "in": size / seconds(lambda: here.copy_(there)) / 1e9,
        "out": size / seconds(lambda: there.copy_(here)) / 1e9,
        "both": size / seconds(both) / 1e9,
    }


def bench_peer(gib: float, results: dict) -> None:
    limits = peer_limits(gib)
    results["peer_limits_gb_s"] = limits
    print(f"peer copy: in {limits['in']:.1f}, out {limits['out']:.1f}, both {limits['both']:.1f}")
    print(f"{'scattered pages of':26} {'by':7} {'in':>6} {'out':>6} {'both':>6} GB/s; of the limit")
    rows = results["peer_moves"] = []
    default = migrate.SMALL_PAGE, migrate.SMALL_PEER_PAGE
    for name, page_bytes in PAGES.items():
        for by_kernel in (False, True):
            size = gib if page_bytes >= (256 << 10) else min(gib, 1.0)
            link = Link(page_bytes, size, by_kernel, peer=True)
            rates = {
                "in": link.rate((False,)),
                "out": link.rate((True,)),
                "both": link.rate((True, False)),
            }
            by = "kernel" if by_kernel else "engine"
            chosen = by_kernel == (page_bytes < default[1])
            rows.append({"page": name, "bytes": page_bytes, "by": by, "chosen": chosen, **rates})
            shares = " ".join(f"{rate / limits[key]:4.0%}" for key, rate in rates.items())
            print(
                f"{name:26} {by:7} {rates['in']:6.1f} {rates['out']:6.1f} {rates['both']:6.1f}  "
                f"{shares}{'  <- chosen' if chosen else ''}",
                flush=True,
            )
            link.close()
    migrate.SMALL_PAGE, migrate.SMALL_PEER_PAGE = default
    bench_in_place(results)
    bench_decode(results, peer=True)


class InPlace:
    """Pages of ``count`` sequences of ``context`` tokens on the GPU, on the second one and on the
    host (places 0, 2 and 1), and what reads one layer of them there."""

    def __init__(self, count: int, context: int):
        self.heads, self.kv_heads, self.dim, self.layers = 32, 8, 128, 8
        pages = count * context // BLOCK + 1
        make = lambda *shape: torch.randn(*shape, device="cuda:0", dtype=torch.bfloat16)  # noqa: E731
        self.pool = KVPool(
            pages, self.layers, BLOCK, self.kv_heads, self.dim, torch.bfloat16, "cuda:0"
        )
        self.pool.pages.normal_()
        self.peer = lent(self.pool.records.numel()).view_as(self.pool.records)
        self.peer.copy_(self.pool.records)
        self.host = HostPool(pages, self.pool.page_bytes, self.pool.device)
        self.host.pages.copy_(self.pool.records.cpu())  # a copy must not cross registered chunks
        addresses = [self.pool.records.data_ptr(), self.host.address, self.peer.data_ptr()]
        self.places = torch.tensor([[address, pages] for address in addresses], device="cuda:0")
        self.tables = (torch.randperm(pages - 1) + 1).int().view(count, -1).cuda()
        self.lens = torch.full((count,), context, dtype=torch.int32, device="cuda:0")
        self.starts = torch.arange(count + 1, dtype=torch.int32, device="cuda:0")
        self.q, self.out = make(count, self.heads, self.dim), make(count, self.heads, self.dim)
        self.k, self.v = (make(count * context, self.kv_heads, self.dim) for _ in range(2))
        self.context = context
        self.nbytes = 2 * self.k.nbytes

    def attend(self, layer: int, place: int) -> None:
        cache = self.pool.layer(layer)
        ops.paged_attention(
            self.q,
            cache.k,
            cache.v,
            self.tables | place << 28,
            self.lens,
            self.starts,
            self.out,
            self.dim**-0.5,
            1,
            places=self.places,
        )

    def gather(self, layer: int, place: int) -> None:
        cache = self.pool.layer(layer)
        ops.gather_kv(
            cache.k,
            cache.v,
            self.tables | place << 28,
            self.lens,
            self.starts * self.context,
            self.k,
            self.v,
            places=self.places,
        )

    def rate(self, work: Callable[[int, int], None], place: int) -> float:
        """GB/s of keys and values; layers take turns, so that no cache holds what is read."""
        rounds = 4 * self.layers if place != 1 else 2

        def layers() -> None:
            for i in range(rounds):
                work(i % self.layers, place)

        work(0, place)
        return rounds * self.nbytes / seconds(layers) / 1e9


def bench_in_place(results: dict) -> None:
    rows = results["in_place"] = []
    for count, context in ((1, 32768), (16, 4096), (64, 2048)):
        case = InPlace(count, context)
        expected = None
        for place, name in ((0, "GPU"), (2, "peer"), (1, "host")):
            attention, gather = case.rate(case.attend, place), case.rate(case.gather, place)
            case.out.fill_(float("nan"))
            case.attend(0, place)
            expected = case.out.clone() if expected is None else expected
            error = ((case.out - expected).abs().max() / expected.abs().max()).item()
            rows.append(
                {
                    "sequences": count,
                    "context": context,
                    "place": name,
                    "attention_gb_s": attention,
                    "gather_gb_s": gather,
                    "error": error,
                }
            )
            print(
                f"{count:3} x {context:5} tokens on the {name:4}: attention {attention:6.0f}, "
                f"gather {gather:6.0f} GB/s, error {error:.1e} against the GPU's pages",
                flush=True,
            )
        torch.cuda.synchronize()
        case.host.release()


def bench_disk(folder: str, results: dict, gib: float = 4.0) -> None:
    rows = results["disk"] = []
    for name, page_bytes in list(PAGES.items())[:3]:
        count = int(gib * GIB) // page_bytes
        host = HostPool(64, page_bytes, torch.device("cpu"))
        host.pages.random_(0, 255)
        disk = DiskTier(folder, count, host)
        rates = {}
        order = torch.randperm(count).tolist()
        for write in (True, False):
            start = time.perf_counter()
            for i, record in enumerate(order):
                disk.start(DiskJob(write, record, i % 64))
                while disk.num_pending >= 48:
                    assert all(error is None for _, error in disk.poll(wait=True))
            while disk.num_pending:
                assert all(error is None for _, error in disk.poll(wait=True))
            rate = count * page_bytes / (time.perf_counter() - start) / 1e9
            rates["write" if write else "read"] = rate
        direct = disk.direct
        disk.close()
        file = Path(folder) / "dd.bin"
        block = -(-page_bytes // 4096) * 4096
        flag = "direct" if direct else "sync"
        dd = {}
        for key, command in (
            ("write", f"dd if=/dev/zero of={file} bs={block} count={count} oflag={flag}"),
            (
                "read",
                f"dd if={file} of=/dev/null bs={block} iflag={'direct' if direct else 'sync'}",
            ),
        ):
            start = time.perf_counter()
            subprocess.run(command.split(), check=True, capture_output=True)
            dd[key] = count * block / (time.perf_counter() - start) / 1e9
        file.unlink()
        host.release()
        rows.append({"page": name, "direct": direct, "dd": dd, **rates})
        print(
            f"disk, {name}, O_DIRECT {direct}: write {rates['write']:.2f} (dd {dd['write']:.2f}), "
            f"read {rates['read']:.2f} (dd {dd['read']:.2f}) GB/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="moves,decode,disk")
    parser.add_argument("--gib", type=float, default=6.0, help="size of each pool")
    parser.add_argument("--folder", default="/tmp", help="for the file of the disk tier")
    parser.add_argument("--json")
    args = parser.parse_args()
    results: dict = {"torch": torch.__version__}
    if torch.cuda.is_available():
        results["device"] = torch.cuda.get_device_name()
    for part in args.only.split(","):
        if part == "moves":
            bench_moves(args.gib, results)
        elif part == "decode":
            bench_decode(results)
        elif part == "disk":
            bench_disk(args.folder, results)
        elif part == "peer":
            bench_peer(args.gib, results)
        else:
            raise SystemExit(f"no part {part!r}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
