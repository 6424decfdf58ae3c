"""ElasticPages: the memory of a KV pool, mapped as pages are taken and given back later.

The pool is a range of addresses that stays, so graphs, kernels and views need not know. Pages are
handed out lowest first (`PageAllocator`); memory is mapped under them from page 0 up, in chunks,
before they are handed out, and unmapped from the top:

* While steps run, once in `WINDOW` of them: down to a quarter and a chunk above the highest page
  that was held in that time.
* When no request is left: down to the highest page that is in use.

A cached prefix is in use. But one above that mark that nobody has asked for in `AGE` windows is
evicted (with tiers: goes to the host), so that the memory follows the load with prefix caching too.

Where memory cannot be mapped, because somebody else has taken it, the pool is full as it is:
sequences wait or give way as ever, and growing is tried again every `RETRY_S`.
"""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

import torch_pd._runtime as _runtime
from torch_pd.kv.moves import MoveQueue
from torch_pd.kv.pages import PageAllocator
from torch_pd.sizing import GIB, chunk_bytes

logger = logging.getLogger(__name__)

WINDOW = 64
"""Steps after which it is looked at what could be given back."""
AGE = 8
"""Windows after which a cached prefix need not be kept."""
AT_ONCE = 8
"""Chunks given back beside a step; about 0.3 ms each on an H100."""
RETRY_S = 1.0
"""Seconds between two attempts to grow, after one has failed."""


class ElasticPages:
    """Memory for ``num_pages`` pages, of which as many have it as are asked for; a `Backing`.

    Args:
        num_pages: of the whole pool, page 0 included.
        page_bytes: bytes of a page record.
        device: of the pool.
        chunk: bytes that are mapped at once, see `chunk_of`.

    Raises:
        RuntimeError: there is no memory for two pages.
    """

    def __init__(self, num_pages: int, page_bytes: int, device: torch.device, chunk: int) -> None:
        self._all, self._page_bytes, self._device = num_pages, page_bytes, device
        self.chunk = chunk
        self._memory: Any = _runtime.ElasticMemory(_index(device), num_pages * page_bytes, chunk)
        self._cuda = device.type == "cuda"
        self.num_pages = 0
        """Pages that may be handed out: those that have memory and are not about to lose it."""
        self.stuck = False
        self.queue: MoveQueue | None = None
        """Of moves that read and write the pages."""
        self.most_bytes = 0
        """The most that were mapped."""
        self.num_failures = 0
        """How often the pool could not grow."""
        self._retry_at = 0.0
        self._steps = self._held = 0
        self._leaving: torch.cuda.Event | None = None  # recorded when num_pages was lowered
        # Unmapping takes longer than mapping (3 ms for a GiB), and nobody need wait for it.
        self._thread = ThreadPoolExecutor(1, "unmap", self._enter)
        self._unmapping: Future[int] | None = None
        self.grow(2)
        if self.num_pages < 2:
            raise RuntimeError(f"no memory for the first two KV pages of {page_bytes:,} bytes")

    @property
    def records(self) -> Tensor:
        """uint8 [num_pages, page_bytes], all of the pool; the tensor keeps the memory."""
        with torch.inference_mode(False):
            flat: Tensor = torch.from_dlpack(self._memory.dlpack())
            return flat.view(self._all, self._page_bytes)

    def _enter(self) -> None:
        """The thread's GPU is the pool's. Else it would be the first one, and going back to that
        after a call would make a context there, half a GiB of another rank's memory."""
        if self._cuda:
            torch.cuda.set_device(self._device)

    def _mapped(self) -> int:
        """Chunks mapped; waits for those that are on their way out."""
        if self._unmapping is not None:
            self._unmapping.result()
            self._unmapping = None
        count: int = self._memory.mapped
        return count

    @property
    def mapped_bytes(self) -> int:
        """Bytes of pages that the device holds memory for, whole chunks."""
        return self._mapped() * self.chunk

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool, whole chunks."""
        return self._memory.chunks * self.chunk

    def _chunks(self, num_pages: int) -> int:
        return -(-num_pages * self._page_bytes // self.chunk)

    def _pages(self, chunks: int) -> int:
        return min(self._all, chunks * self.chunk // self._page_bytes)

    # Growing.

    def grow(self, num_pages: int, insist: bool = False) -> None:
        """See `Backing.grow`."""
        # What was to be given back and is still there is taken first.
        self._leaving = None
        mapped = self._mapped()
        self.num_pages = self._pages(mapped)
        wanted = self._chunks(num_pages)
        if wanted <= mapped:
            return
        now = time.monotonic()
        if self.stuck and now < self._retry_at and not insist:
            return
        mapped = self._memory.map(wanted)
        self.num_pages = self._pages(mapped)
        self.most_bytes = max(self.most_bytes, self.mapped_bytes)
        self.stuck = mapped < wanted
        if self.stuck:
            self._retry_at = now + RETRY_S
            self.num_failures += 1
            if self.num_failures == 1:
                again = f"It goes on with what it has and tries again every {RETRY_S:g} s"
                logger.warning("%s. %s", self.why_stuck(), again)

    def why_stuck(self) -> str:
        """What there is and what there is not, in words."""
        free = ""
        if self._cuda:
            free = f"{torch.cuda.mem_get_info(self._device)[0] / GIB:.2f} GiB of it are free; "
        return (
            f"the KV pool cannot grow: {self.mapped_bytes / GIB:.2f} of {self.nbytes / GIB:.2f} "
            f"GiB are mapped, and {self._device} has no memory for {self.chunk / GIB:.3f} GiB more "
            f"({free}somebody else has taken what was planned for KV pages)"
        )

    # Giving back.

    def step(self, allocator: PageAllocator) -> None:
        """After a step was launched on the current stream: gives back what has not been used for
        a while. Waits for nothing."""
        if self.stuck and time.monotonic() >= self._retry_at:
            self.grow(min(self._all, self.num_pages + 1))
        if self.num_pages < self._pages(self._mapped()):
            self._unmap(AT_ONCE)
        self._steps += 1
        if self._steps >= WINDOW:
            self._end_window(allocator)

    def rest(self, allocator: PageAllocator) -> None:
        """No request is left: waits for the current stream and gives back what is not in use."""
        self._lower(allocator.last_used() + 1)
        if self._leaving is not None:
            self._leaving.synchronize()
        self._unmap(self._mapped())
        self._new_window(allocator)

    def _new_window(self, allocator: PageAllocator) -> None:
        self._steps = 0
        self._held = allocator.last_used(cached=False)
        allocator.highest = 0

    def _end_window(self, allocator: PageAllocator) -> None:
        allocator.clock += 1
        slack = max(1, self._pages(1))
        used = allocator.num_used
        if self.num_pages <= used + used // 4 + slack:
            # Nothing to be had, whichever pages they are; not worth looking.
            self._steps, self._held = 0, self.num_pages - 1
            allocator.highest = 0
            return
        most = max(self._held, allocator.highest)
        mark = most + 1 + most // 4 + slack
        if mark < self.num_pages:
            allocator.evict_old(mark, allocator.clock - AGE)
            self._lower(max(mark, allocator.last_used() + 1))
        self._new_window(allocator)

    def _lower(self, num_pages: int) -> None:
        """Hands out no page from ``num_pages`` on any more, as far as that frees whole chunks."""
        least = self._pages(self._chunks(max(2, num_pages)))
        if least < self.num_pages:
            self.num_pages = least
            if self._cuda:
                self._leaving = torch.cuda.Event()
                self._leaving.record(torch.cuda.current_stream(self._device))

    def _unmap(self, most: int) -> None:
        """Starts to give back what is no longer handed out, at most so many chunks, once the steps
        that were launched before and the moves have ended."""
        if self._leaving is not None and not self._leaving.query():
            return
        if self.queue is not None and not self.queue.is_quiet(self.num_pages):
            return
        keep, mapped = self._chunks(self.num_pages), self._mapped()
        if keep < mapped:
            self._unmapping = self._thread.submit(self._memory.unmap, max(keep, mapped - most))
            self.stuck = False

    def close(self) -> None:
        """Lets go of the memory; the tensors of it keep it as long as they live."""
        self._thread.shutdown()
        self._unmapping = self._memory = None

    def stats(self) -> dict[str, int]:
        """Bytes mapped now and at most, and how often growing failed."""
        return {
            "kv_mapped_bytes": self.mapped_bytes,
            "kv_mapped_bytes_most": self.most_bytes,
            "kv_growth_failures": self.num_failures,
        }


def chunk_of(pool_bytes: int, device: torch.device) -> int:
    """Bytes that a pool of about this size maps at once."""
    return chunk_bytes(pool_bytes, _runtime.chunk_unit(_index(device)))


def _index(device: torch.device) -> int:
    """The GPU's number, -1 for the CPU."""
    if device.type != "cuda":
        return -1
    return torch.cuda.current_device() if device.index is None else device.index
