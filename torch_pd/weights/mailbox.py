"""Mailbox: messages between the GPUs of a group, each exchange one kernel over mapped memory."""

import itertools
import logging
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_pd import ops
from torch_pd.dist import World
from torch_pd.peer import TIMEOUT_S, PeerMemory

logger = logging.getLogger(__name__)

LIMIT = 10 << 20
"""Bytes of the largest message that goes this way by default, the largest measured (1,024 rows of
Qwen3-32B between two GPUs): NCCL takes 1.4 to 1.9 times as long there, and up to five times with
smaller ones (docs/benchmarks.md)."""
WAIT_S = 120.0
"""How long a kernel waits for a peer. The ranks start a step within milliseconds of each other, but
one may still pin host memory when the others run their first."""
MOST_RANKS = 8
_BLOCKS = 128
# As in csrc/cuda/exchange.cu: lines of 128 bytes that carry 112, two sets of them.
_HEADER, _LINE, _CARRIED, _SETS = 16384, 128, 112, 2
_LINES_AT_ONCE = 64


class Matrix(NamedTuple):
    """``[rows, columns]`` inside a contiguous tensor; all in elements."""

    start: int
    rows: int
    columns: int
    stride: int


NOTHING = Matrix(0, 0, 0, 0)


class Mailbox:
    """Inboxes of all ranks of a group on one host, mapped by each. Collective to make.

    What the others write for this rank lies in its own inbox. Exchanges run on the current stream,
    can be captured in CUDA graphs, and need no barrier between them (csrc/cuda/exchange.cu). All
    ranks must run the same ones in the same order. It lets go of all memory when the last reference
    to it goes; graphs that hold its exchanges must not be replayed any more.

    Args:
        device: this rank's GPU, which can write the memory of the others'.
        key: the same on all ranks, and no other group's on this host.
        rank, size: of the group.
        limit: bytes of the largest message.
        wait_s: until a rank that does not come is given up (`ops.describe_errors`).

    Raises:
        TimeoutError: a rank did not come.
    """

    def __init__(
        self,
        device: torch.device | str,
        key: str,
        rank: int,
        size: int,
        limit: int = LIMIT,
        wait_s: float = WAIT_S,
        timeout_s: float = TIMEOUT_S,
    ):
        assert 2 <= size <= MOST_RANKS
        self.rank, self.size, self.limit, self.wait_s = rank, size, limit, wait_s
        self._memory = PeerMemory(device)
        self._lines = -(-_lines(limit) // _BLOCKS)
        # Zeros before any peer can write: `connect` waits for the device.
        self._inbox = self._memory.allocate(self.nbytes(size, limit)).zero_()
        arenas = self._memory.connect(key, rank, size, timeout_s)
        self._addresses = [arena.data_ptr() for arena in arenas]
        # Unmapping waits for nothing, and a step may still be running.
        weakref.finalize(self, _settle, self._memory.device).atexit = False

    @staticmethod
    def nbytes(size: int, limit: int = LIMIT) -> int:
        """Bytes of one rank's inbox."""
        return _HEADER + _SETS * size * _BLOCKS * -(-_lines(limit) // _BLOCKS) * _LINE

    def holds(self, nbytes: int, dtype: torch.dtype) -> bool:
        """Whether messages of at most so many bytes can go this way."""
        return nbytes <= self.limit and dtype.itemsize in (2, 4, 8)

    def gather(self, x: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """As `Exchange.gather`; ``x`` is contiguous, here and below."""
        columns, owner = x.shape[1], widths[self.rank] > 0
        sends = [Matrix(0, x.shape[0], columns, columns) if width else NOTHING for width in widths]
        receives = [
            Matrix(at * columns, row, columns, columns) if owner else NOTHING
            for at, row in _spans(rows)
        ]
        out = x.new_empty(sum(rows) if owner else 0, columns)
        return self._exchange(x, out, sends, receives, max(rows) * columns)

    def to_tokens(self, y: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """As `Exchange.to_tokens`."""
        mine, width = rows[self.rank], widths[self.rank]
        sends = [Matrix(at * width, row, width, width) for at, row in _spans(rows)]
        receives = [Matrix(at * mine, mine, columns, columns) for at, columns in _spans(widths)]
        out = y.new_empty(mine * sum(widths))
        return self._exchange(y, out, sends, receives, max(rows) * max(widths))

    def to_owners(self, x: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """As `Exchange.to_owners`."""
        mine, width = rows[self.rank], widths[self.rank]
        sends = [Matrix(at, mine, columns, x.shape[1]) for at, columns in _spans(widths)]
        receives = [Matrix(at * width, row, width, width) for at, row in _spans(rows)]
        out = x.new_empty(sum(rows), width)
        return self._exchange(x, out, sends, receives, max(rows) * max(widths))

    def scatter_sum(self, y: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """As `Exchange.scatter_sum`, in float32 and in the order of the ranks."""
        mine, columns, owner = rows[self.rank], y.shape[1], widths[self.rank] > 0
        sends = [
            Matrix(at * columns, row, columns, columns) if owner else NOTHING
            for at, row in _spans(rows)
        ]
        receives = [Matrix(0, mine, columns, columns) if width else NOTHING for width in widths]
        out = y.new_empty(mine, columns)
        return self._exchange(y, out, sends, receives, max(rows) * columns, add=True)

    def _exchange(
        self,
        x: Tensor,
        out: Tensor,
        sends: list[Matrix],
        receives: list[Matrix],
        largest: int,
        add: bool = False,
    ) -> Tensor:
        """``largest``: elements of the largest message between any two ranks, which all know."""
        lines = _lines(largest * x.itemsize)
        blocks = max(1, min(_BLOCKS, -(-lines // _LINES_AT_ONCE)), -(-lines // self._lines))
        ops.exchange(
            x,
            out,
            self._inbox,
            self._addresses,
            self.rank,
            [value for matrix in sends for value in matrix],
            [value for matrix in receives for value in matrix],
            add,
            blocks,
            self.wait_s,
        )
        return out


def open_mailbox(world: World, ranks: Sequence[int], key: str) -> Mailbox | None:
    """The mailbox of the ranks that share one copy of the weights. Collective in the world.

    Args:
        ranks: of the group.
        key: of the group, see `Mailbox`.

    Returns:
        None on the CPU, or if a GPU of the world cannot reach another of its group: the log says
        so.
    """
    if world.device.type != "cuda":
        return None
    unlinked = [other for other in world.unlinked if other in ranks]
    if len(ranks) > MOST_RANKS:
        logger.warning("exchanges go over NCCL alone: more than %d ranks share weights", MOST_RANKS)
        return None
    if any(world.all_gather(unlinked)):
        logger.warning(
            "exchanges go over NCCL alone: not all GPUs can reach each other directly (see "
            "torch-pd info)"
        )
        return None
    box = Mailbox(world.device, key, ranks.index(world.rank), len(ranks))
    logger.info("exchanges: up to %d KiB a message by mapped memory, else NCCL", LIMIT >> 10)
    return box


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _lines(nbytes: int) -> int:
    return -(-nbytes // _CARRIED)


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Start and size of each."""
    return list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))
