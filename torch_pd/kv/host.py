"""HostPool: KV pages in host memory, place 1 of block tables."""

import ctypes
import math
import os
from pathlib import Path

import torch
from torch import Tensor

import torch_pd._runtime as _runtime
from torch_pd.sizing import GIB

CHUNK = GIB
"""About how much is registered with CUDA in one call."""
THREADS = 16


class HostPool:
    """Pages in host memory with the layout of a GPU pool's pages: place 1.

    The memory is touched here, in parallel; for a GPU it is placed on the GPU's NUMA node and
    registered, so that copy engines and kernels reach it.

    Args:
        num_pages: pages, page 0 (never handed out, as in every pool) included.
        page_bytes: bytes of a page record.
        device: of the GPU pool; on the CPU nothing is registered.
    """

    def __init__(self, num_pages: int, page_bytes: int, device: torch.device) -> None:
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.device = device
        # Chunks hold whole pages and whole 4 KiB blocks: no copy crosses the border of two.
        step = 4096 // math.gcd(4096, page_bytes)
        self.chunk_pages = max(1, CHUNK // (page_bytes * step)) * step
        index = -1
        node = -1
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            node = _runtime.numa_node(index)
        threads = min(THREADS, len(os.sched_getaffinity(0)))
        self._memory = _runtime.HostMemory(
            nbytes=num_pages * page_bytes,
            chunk_bytes=self.chunk_pages * page_bytes,
            device=index,
            node=node,
            threads=threads,
        )

    @property
    def address(self) -> int:
        """Of page 0."""
        return self._memory.address

    @property
    def on_gpu_node(self) -> bool:
        """Whether the memory was asked to lie on the GPU's NUMA node (False: unknown or denied)."""
        return self._memory.bound

    @property
    def pages(self) -> Tensor:
        """uint8 [num_pages, page_bytes], a CPU view; valid until `release`."""
        memory = (ctypes.c_char * self._memory.nbytes).from_address(self.address)
        return torch.frombuffer(memory, dtype=torch.uint8).view(self.num_pages, self.page_bytes)

    @property
    def device_pages(self) -> Tensor:
        """The same pages as a tensor that the GPU's kernels take."""
        view = torch.as_tensor(_DeviceView(self), device=self.device)
        assert view.data_ptr() == self.address, "registered memory has another address on the GPU"
        return view

    def release(self) -> None:
        """Gives the memory back; nothing may use it any more."""
        self._memory.release()


class _DeviceView:
    """What torch needs to make a CUDA tensor of registered memory."""

    def __init__(self, pool: HostPool) -> None:
        self.pool = pool  # the tensor keeps this object

    @property
    def __cuda_array_interface__(self) -> dict:
        return {
            "shape": (self.pool.num_pages, self.pool.page_bytes),
            "typestr": "|u1",
            "data": (self.pool.address, False),
            "version": 3,
        }


def available_memory() -> int:
    """Bytes of host memory that can be taken without swapping: the kernel's estimate, or what the
    process's memory cgroup leaves if that is less."""
    available = None
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    if available is None:
        raise RuntimeError("/proc/meminfo has no MemAvailable; set kv_cache_gib")
    return int(min(available, _cgroup_available()))


def _cgroup_available() -> float:
    """What the process's cgroup (version 2) leaves, its file cache counted as free."""
    try:
        line = Path("/proc/self/cgroup").read_text().splitlines()[-1]
        folder = Path(f"/sys/fs/cgroup{line.removeprefix('0::')}")
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
    except (FileNotFoundError, IndexError):  # no cgroups of version 2, or the root of them
        return math.inf
    if not limit.isdigit():  # "max"
        return math.inf
    cache = int(stat["active_file"]) + int(stat["inactive_file"])
    return max(0, int(limit) - used + cache)
