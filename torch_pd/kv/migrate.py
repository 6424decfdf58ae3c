"""Migrator: moves pages between the GPU pool and the pools under it beside the forward pass."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

import torch_pd._runtime as _runtime
from torch_pd import ops
from torch_pd.kv.host import HostPool
from torch_pd.kv.moves import LANES, Moves, Waits

SMALL_PAGE = 64 << 10
"""Bytes under which a kernel moves pages: for copy engines the launch would be the limit."""
SMALL_PEER_PAGE = 1 << 20
"""The same to and from a peer, whose link is faster (docs/benchmarks.md)."""


class Migrator:
    """Executes the batches of a `MoveQueue`, in its order, on one side stream for each lane.

    On the CPU, where the "GPU" pool is host memory too, a thread for each lane copies. Nothing here
    waits for the device but `finish`.

    Args:
        gpu: the pages of the GPU pool as records, uint8 [num_pages, page_bytes].
        host: the pages of the host pool, numbered from 0; None: there are none, but number 0 (never
            handed out) counts as one of the host's.
        peers: of each lender, the pages that this rank has of it, uint8 [n, page_bytes], mapped
            here; numbered on behind the host's.
    """

    def __init__(self, gpu: Tensor, host: HostPool | None, peers: Sequence[Tensor] = ()) -> None:
        page_bytes = gpu.shape[1]
        assert host is None or page_bytes == host.page_bytes, "the pools differ in their pages"
        self.device = gpu.device
        self.gpu = gpu
        self.peers = list(peers)
        first = 1 if host is None else host.num_pages
        segments = []
        if host is not None:
            segments.append((0, host.num_pages, host.address, host.chunk_pages))
        self._firsts = []
        for pages in self.peers:
            assert pages.shape[1] == page_bytes, "the pools differ in their pages"
            segments.append((first, len(pages), pages.data_ptr(), max(1, len(pages))))
            self._firsts.append(first)
            first += len(pages)
        self._lanes = LANES if self.peers else 2
        self.given = [0] * self._lanes
        """By lane, the last tickets that were submitted."""
        cuda = self.device.type == "cuda"
        self._native = _runtime.Migrator(
            device=self.device.index if cuda else -1,
            page_bytes=page_bytes,
            gpu=gpu.data_ptr(),
            gpu_pages=gpu.shape[0],
            segments=segments,
            lanes=self._lanes,
        )
        small = (SMALL_PAGE, SMALL_PAGE, SMALL_PEER_PAGE, SMALL_PEER_PAGE)
        self._streams = {
            lane: torch.cuda.ExternalStream(self._native.stream(lane), device=self.device)
            for lane in range(self._lanes)
            if cuda and page_bytes < small[lane]
        }
        """Of the lanes on which kernels move."""
        self._host_pages = host.device_pages if host is not None and 0 in self._streams else None

    def submit(self, moves: Moves) -> None:
        """Starts a batch, after all that the current stream was given so far."""
        numbers = chain.from_iterable(moves.pairs)  # (less than half of the time of np.array)
        pairs = np.fromiter(numbers, np.int64, 2 * len(moves.pairs)).reshape(-1, 2)
        stream = self._current()
        if moves.lane in self._streams:
            self._native.begin(moves.lane, moves.after, stream)
            with torch.cuda.stream(self._streams[moves.lane]):
                self._copy(moves, pairs)
            ticket = self._native.end(moves.lane)
        else:
            ticket = self._native.submit(moves.lane, pairs, moves.after, stream)
        assert ticket == moves.ticket, f"batch {moves.ticket} was submitted as number {ticket}"
        self.given[moves.lane] = ticket

    def _copy(self, moves: Moves, pairs: np.ndarray) -> None:
        """Moves a batch by kernels, one for each pool that it touches."""
        if moves.lane < 2:
            assert self._host_pages is not None
            pools = [(0, self._host_pages)]
        else:
            pools = list(zip(self._firsts, self.peers, strict=True))
        for first, pages in pools:
            under = pairs[:, int(moves.out)] - first
            mine = (under >= 0) & (under < len(pages))
            rows = pairs[mine]
            if not len(rows):
                continue
            rows[:, int(moves.out)] -= first
            on_gpu = torch.from_numpy(rows).to(self.device, non_blocking=True)
            ops.copy_pages(*((self.gpu, pages) if moves.out else (pages, self.gpu)), on_gpu)

    def wait(self, waits: Waits) -> None:
        """The current stream goes on after these tickets (on the CPU: the caller does)."""
        for lane, ticket in enumerate(waits):
            if ticket:
                self._native.wait(lane, ticket, self._current())

    def done(self) -> list[int]:
        """By lane, the last tickets that are complete."""
        return [self._native.done(lane) for lane in range(self._lanes)]

    def finish(self, waits: Waits) -> None:
        """The host waits until these tickets are complete."""
        for lane, ticket in enumerate(waits):
            if ticket:
                self._native.finish(lane, ticket)

    def _current(self) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream
