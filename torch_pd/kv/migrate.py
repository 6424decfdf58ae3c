"""Migrator: moves pages between the GPU pool and the host pool beside the forward pass."""

import numpy as np
import torch
from torch import Tensor

import torch_pd._runtime as _runtime
from torch_pd import ops
from torch_pd.kv.host import HostPool
from torch_pd.kv.moves import Moves, Waits

SMALL_PAGE = 64 << 10
"""Bytes under which a kernel moves pages: for copy engines the launch would be the limit."""


class Migrator:
    """Executes the batches of a `MoveQueue`, in its order, on one side stream for each direction.

    On the CPU, where the "GPU" pool is host memory too, a thread for each direction copies. Nothing
    here waits for the device but `finish`.

    Args:
        gpu: the pages of the GPU pool as records, uint8 [num_pages, page_bytes].
        host: the pages of the host pool.
    """

    def __init__(self, gpu: Tensor, host: HostPool) -> None:
        assert gpu.shape[1] == host.page_bytes, "the pools differ in their pages"
        self.device = gpu.device
        self.gpu = gpu
        cuda = self.device.type == "cuda"
        self._native = _runtime.Migrator(
            device=self.device.index if cuda else -1,
            page_bytes=host.page_bytes,
            gpu=gpu.data_ptr(),
            gpu_pages=gpu.shape[0],
            host=host.address,
            host_pages=host.num_pages,
            chunk_pages=host.chunk_pages,
        )
        self._by_kernel = cuda and host.page_bytes < SMALL_PAGE
        if self._by_kernel:
            self._host_pages = host.device_pages
            self._streams = [
                torch.cuda.ExternalStream(self._native.stream(out), device=self.device)
                for out in (False, True)
            ]

    def submit(self, moves: Moves) -> None:
        """Starts a batch, after all that the current stream was given so far."""
        pairs = np.asarray(moves.pairs, np.int64).reshape(-1, 2)
        stream = self._current()
        if self._by_kernel:
            self._native.begin(moves.out, moves.after, stream)
            with torch.cuda.stream(self._streams[moves.out]):
                rows = torch.from_numpy(pairs).to(self.device, non_blocking=True)
                pools = (self.gpu, self._host_pages)
                ops.copy_pages(*(pools if moves.out else pools[::-1]), rows)
            ticket = self._native.end(moves.out)
        else:
            ticket = self._native.submit(moves.out, pairs, moves.after, stream)
        assert ticket == moves.ticket, f"batch {moves.ticket} was submitted as number {ticket}"

    def wait(self, waits: Waits) -> None:
        """The current stream goes on after these tickets (on the CPU: the caller does)."""
        for out, ticket in enumerate(waits):
            if ticket:
                self._native.wait(bool(out), ticket, self._current())

    def done(self) -> list[int]:
        """The last tickets of both directions (in, out) that are complete."""
        return [self._native.done(False), self._native.done(True)]

    def finish(self, waits: Waits) -> None:
        """The host waits until these tickets are complete."""
        for out, ticket in enumerate(waits):
            if ticket:
                self._native.finish(bool(out), ticket)

    def _current(self) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream
