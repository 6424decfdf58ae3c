"""Ring: whole matrices pulled from all owners' shards just ahead of the layer that needs them.

The drawing is in docs/layouts.md. `plan_ring` decides where everything lies, `Ring` is the
`Source` of a streaming pass, csrc/runtime/puller.cpp makes the copies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import torch_pd._runtime as _runtime
from torch_pd.sizing import GIB
from torch_pd.weights.layout import ALIGNMENT, LINEARS, Layout, ModelDims

Copy = tuple[int, int, int, int, int, int]
"""From, its pitch, to, its pitch, width, rows: bytes."""


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class RingPlan:
    """Places of the items of a ring, in the cyclic order of their use."""

    nbytes: int
    offsets: tuple[int, ...]
    gates: tuple[int, ...]
    """How many uses back bytes of an item's place were last used, 1..number of items: it may be
    filled once that use is released."""


def plan_ring(sizes: Sequence[int], nbytes: int) -> RingPlan:
    """Places items of ``sizes`` bytes one behind the other, from the start again at the end.

    Raises:
        ValueError: the largest item does not fit into ``nbytes``.
    """
    largest = max(sizes)
    if largest > nbytes:
        raise ValueError(
            f"ring_gib={nbytes / GIB:g} ({nbytes:,} bytes) is too small for the largest matrix of "
            f"{largest:,} bytes; give at least {-(-largest * 1000 // GIB) / 1000:.3f}"
        )
    offsets, at = [], 0
    for size in sizes:
        if at + size > nbytes:
            at = 0
        offsets.append(at)
        at += _aligned(size)
    gates = []
    for i, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        for back in range(1, len(sizes) + 1):
            j = (i - back) % len(sizes)
            if offsets[j] < offset + size and offset < offsets[j] + sizes[j]:
                gates.append(back)
                break
        else:
            gates.append(len(sizes))  # an empty item
    return RingPlan(nbytes, tuple(offsets), tuple(gates))


def default_ring_bytes(dims: ModelDims) -> int:
    """Two layers: while one is used the other lands."""
    return 2 * sum(_aligned(_nbytes(dims, linear)) for linear in LINEARS)


def head_tile_rows(dims: ModelDims) -> int:
    """Rows of a tile of lm_head: no larger than the largest matrix of a layer."""
    largest = max(_nbytes(dims, linear) for linear in LINEARS)
    return max(1, min(dims.vocab_size, largest // (dims.hidden_size * dims.itemsize)))


def _nbytes(dims: ModelDims, linear: str) -> int:
    rows, cols = dims.shape(linear)
    return rows * cols * dims.itemsize


@dataclass(frozen=True)
class RingItem:
    """A whole matrix of a layer, or a tile of lm_head's rows."""

    linear: str
    layer: int
    shape: tuple[int, int]
    first_row: int = 0

    def nbytes(self, itemsize: int) -> int:
        """Bytes in the ring."""
        return self.shape[0] * self.shape[1] * itemsize


def ring_items(dims: ModelDims) -> list[RingItem]:
    """What a step uses, in order."""
    items = [
        RingItem(linear, layer, dims.shape(linear))
        for layer in range(dims.num_layers)
        for linear in LINEARS
    ]
    tile = head_tile_rows(dims)
    for start in range(0, dims.vocab_size, tile):
        rows = min(tile, dims.vocab_size - start)
        items.append(RingItem("lm_head", 0, (rows, dims.hidden_size), start))
    return items


def item_copies(
    layout: Layout, item: RingItem, owners: Sequence[int], arenas: Sequence[int], to: int
) -> list[Copy]:
    """The copies that make up an item.

    Args:
        owners: indices in the group, in the order to copy from.
        arenas: address of each owner's arena.
        to: address of the item's place.
    """
    first, last = item.first_row, item.first_row + item.shape[0]
    pieces = layout.pieces(item.linear, item.layer)
    itemsize = layout.dims.itemsize
    pitch = item.shape[1] * itemsize
    copies = []
    for owner in owners:
        piece = pieces[owner]
        start, stop = max(first, piece.rows[0]), min(last, piece.rows[1])
        if start >= stop or piece.pitch == 0:
            continue
        source = arenas[owner] + piece.offset + (start - piece.rows[0]) * piece.pitch
        target = to + (start - first) * pitch + piece.cols[0] * itemsize
        copies.append((source, piece.pitch, target, pitch, piece.pitch, stop - start))
    return copies


class Ring:
    """The source of whole matrices of a rank that streams (see `weights.source.Source`).

    Copies run ahead of use, across the end of a step too: what was fetched stays valid while a
    phase is shipped, since weights do not change. A step may end early; the next one then passes
    over what was left.

    Args:
        layout: of the rank's pool group.
        index: of this rank in the group.
        arenas: every owner's arena as this rank reads it, all of them filled.
        dtype: of the weights.
        nbytes: of the ring; default `default_ring_bytes`.
        streams: side streams that share the copies of an item (GPU).
        rotated: start at the next rank's piece, so that no owner is read by all at once; False is
            for measurements.
        overlap: hint to the driver that copies should leave the SMs alone (cudaMemcpyBatchAsync);
            not measured yet.
        poison, delays: for tests, see csrc/runtime/puller.cpp.

    Raises:
        ValueError: the ring is too small for the largest matrix.
    """

    def __init__(
        self,
        layout: Layout,
        index: int,
        arenas: Sequence[Tensor],
        dtype: torch.dtype,
        nbytes: int | None = None,
        *,
        streams: int = 2,
        rotated: bool = True,
        overlap: bool = False,
        poison: bool = False,
        delays: Sequence[int] = (),
    ):
        assert len(arenas) == layout.size
        dims = layout.dims
        self.layout = layout
        self._arenas = list(arenas)
        self._device = arenas[index].device
        self._items = ring_items(dims)
        self.plan = plan_ring(
            [item.nbytes(dims.itemsize) for item in self._items],
            default_ring_bytes(dims) if nbytes is None else nbytes,
        )
        self._arena = torch.empty(self.plan.nbytes, dtype=torch.uint8, device=self._device)
        self._places: dict[tuple[int, str], int] = {}
        self._views: list[Tensor] = []
        owners = [(index + 1 + i) % layout.size for i in range(layout.size)]
        if not rotated:
            owners = list(range(layout.size))
        addresses = [arena.data_ptr() for arena in arenas]
        places = []
        self.pulled_bytes = 0
        """Of one step, from other ranks."""
        for i, (item, offset) in enumerate(zip(self._items, self.plan.offsets, strict=True)):
            size = item.nbytes(dims.itemsize)
            if item.linear != "lm_head":
                self._places[item.layer, item.linear] = i
            self._views.append(self._arena[offset : offset + size].view(dtype).view(item.shape))
            to = self._arena.data_ptr() + offset
            copies = item_copies(layout, item, owners, addresses, to)
            remote = item_copies(layout, item, [o for o in owners if o != index], addresses, to)
            self.pulled_bytes += sum(copy[4] * copy[5] for copy in remote)
            places.append((to, size, copies))
        self._head = len(self._places)
        self._next = 0  # the use that comes next
        self._puller = _runtime.Puller(
            self._device.index if self._device.type == "cuda" else -1,
            places,
            list(self.plan.gates),
            streams,
            overlap,
            poison,
            list(delays),
        )
        embedding = layout.pieces("embedding")
        self._embedding = [
            (piece.rows, arena[piece.offset : piece.offset + piece.nbytes].view(dtype))
            for piece, arena in zip(embedding, arenas, strict=True)
            if piece.nbytes
        ]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the ring's memory may have had other users
        self._puller.start()

    @property
    def device(self) -> torch.device:
        """Where the ring lies."""
        return self._device

    @property
    def nbytes(self) -> int:
        """Of the ring."""
        return self.plan.nbytes

    def acquire(self, layer: int, linear: str) -> Tensor:
        """See `Source`. One matrix at a time, in the order of use."""
        return self._acquire(self._places[layer, linear])

    def release(self, layer: int, linear: str) -> None:
        """See `Source`."""
        self._release(self._places[layer, linear])

    def head_tiles(self) -> Iterator[Tensor]:
        """See `Source`."""
        for place in range(self._head, len(self._items)):
            yield self._acquire(place)
            self._release(place)

    def embed(self, ids: Tensor) -> Tensor:
        """See `Source`. The rows are read where they lie, on any rank."""
        width = self.layout.dims.hidden_size
        out: Tensor | None = None
        for (start, stop), weight in self._embedding:
            local = ids - start
            rows = weight.view(-1, width)[local.clamp(0, stop - start - 1)]
            if out is None:
                out = rows
            else:
                out = torch.where(((local >= 0) & (local < stop - start))[:, None], rows, out)
        assert out is not None
        return out

    def run_through(self) -> None:
        """Pulls what a step needs and uses none of it; returns when it is done."""
        for place in range(len(self._items)):
            self._acquire(place)
            self._release(place)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Waits for the copies under way, then lets go of the ring and the arenas."""
        self._puller.close()
        if self._device.type == "cuda":
            # Kernels may read the arenas (embed), and unmapping waits for nothing.
            torch.cuda.synchronize(self._device)
        self._views, self._embedding, self._arenas = [], [], []
        self._arena = self._arena[:0].clone()

    def _acquire(self, place: int) -> Tensor:
        use = self._next + (place - self._next) % len(self._items)
        stream = self._stream()
        if use > self._next:
            self._puller.skip(use, stream)  # the step before ended early
            self._next = use
        self._puller.acquire(use, stream)
        return self._views[place]

    def _release(self, place: int) -> None:
        assert self._next % len(self._items) == place, "released something that is not in use"
        self._puller.release(self._next, self._stream())
        self._next += 1

    def _stream(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self._device).cuda_stream
