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
from torch_pd.weights.layout import ALIGNMENT, LINEARS, Layout, Piece
from torch_pd.weights.source import Matrix, split_around

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
    largest = max(sizes, default=0)
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


@dataclass(frozen=True)
class RingItem:
    """What is pulled of a matrix of a layer, or of a tile of lm_head's rows.

    A rank's own rows (of o and down: columns) are multiplied where they lie, so they are not in the
    ring: it holds those of the others, one owner's behind another's.
    """

    linear: str
    layer: int
    shape: tuple[int, int]
    """In the ring."""
    own: tuple[int, int] = (0, 0)
    """Rows (or columns, see ``axis``) of the matrix that are left out."""
    axis: int = 0
    """Of ``own``: 0 rows, 1 columns."""
    first_row: int = 0
    """Of the matrix; of a tile."""

    def nbytes(self, itemsize: int) -> int:
        """Bytes in the ring."""
        return self.shape[0] * self.shape[1] * itemsize


def _item(layout: Layout, index: int, linear: str, layer: int, in_place: bool) -> RingItem | None:
    """A matrix of a layer; None: all of it lies here, and is used there."""
    rows, cols = layout.dims.shape(linear)
    piece = layout.pieces(linear, layer)[index]
    if not in_place or not piece.nbytes:
        return RingItem(linear, layer, (rows, cols))
    if piece.shape == (rows, cols):
        return None
    if piece.cols == (0, cols):
        return RingItem(linear, layer, (rows - piece.shape[0], cols), piece.rows)
    return RingItem(linear, layer, (rows, cols - piece.shape[1]), piece.cols, axis=1)


def ring_items(layout: Layout, index: int, in_place: bool = True) -> list[RingItem]:
    """What a step of a rank pulls, in order.

    Args:
        index: of the rank in the group.
        in_place: its own shard is used where it lies, see `Ring`.
    """
    dims = layout.dims
    items = [
        item
        for layer in range(dims.num_layers)
        for linear in LINEARS
        if (item := _item(layout, index, linear, layer, in_place)) is not None
    ]
    # No tile of lm_head is larger than the largest matrix.
    row_bytes = dims.hidden_size * dims.itemsize
    most = max((item.nbytes(dims.itemsize) for item in items), default=dims.vocab_size * row_bytes)
    tile = max(1, most // row_bytes)
    start, stop = layout.pieces("lm_head")[index].rows if in_place else (0, 0)
    for first, last in ((0, start), (stop, dims.vocab_size)):
        for row in range(first, last, tile):
            shape = (min(tile, last - row), dims.hidden_size)
            items.append(RingItem("lm_head", 0, shape, first_row=row))
    return items


def default_ring_bytes(layout: Layout, index: int, in_place: bool = True) -> int:
    """What is pulled of two layers: while one is used the other lands."""
    layers, tiles = [0] * layout.dims.num_layers, [0]
    for item in ring_items(layout, index, in_place):
        size = _aligned(item.nbytes(layout.dims.itemsize))
        if item.linear == "lm_head":
            tiles.append(size)
        else:
            layers[item.layer] += size
    return max(2 * max(layers), *tiles)


def item_copies(
    layout: Layout, item: RingItem, owners: Sequence[int], arenas: Sequence[int], to: int
) -> list[Copy]:
    """The copies that make up an item.

    Args:
        owners: indices in the group, in the order to copy from; who owns ``item.own`` is passed
            over.
        arenas: address of each owner's arena.
        to: address of the item's place.
    """
    first = item.first_row
    left_out = item.own[1] - item.own[0]
    last = first + item.shape[0] + (left_out if item.axis == 0 else 0)
    pieces = layout.pieces(item.linear, item.layer)
    itemsize = layout.dims.itemsize
    pitch = item.shape[1] * itemsize
    copies = []
    for owner in owners:
        piece = pieces[owner]
        cut = piece.cols if item.axis else piece.rows
        start, stop = max(first, piece.rows[0]), min(last, piece.rows[1])
        if start >= stop or piece.pitch == 0 or (left_out and cut == item.own):
            continue
        source = arenas[owner] + piece.offset + (start - piece.rows[0]) * piece.pitch
        behind = left_out and cut[0] >= item.own[1]
        row = start - first - (left_out if behind and item.axis == 0 else 0)
        column = piece.cols[0] - (left_out if behind and item.axis == 1 else 0)
        target = to + row * pitch + column * itemsize
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
        in_place: this rank's shard is multiplied where it lies. False, for measurements: it is
            copied into the ring, between what is pulled.
        streams: side streams that share the copies of an item (GPU).
        rotated: start at the next rank's piece, so that no owner is read by all at once; False is
            for measurements.
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
        in_place: bool = True,
        streams: int = 2,
        rotated: bool = True,
        poison: bool = False,
        delays: Sequence[int] = (),
    ):
        assert len(arenas) == layout.size
        dims = layout.dims
        self.layout = layout
        self.dtype = dtype
        self._arenas = list(arenas)
        self._device = arenas[index].device
        self._items = ring_items(layout, index, in_place)
        self.plan = plan_ring(
            [item.nbytes(dims.itemsize) for item in self._items],
            default_ring_bytes(layout, index, in_place) if nbytes is None else nbytes,
        )
        self._arena = torch.empty(self.plan.nbytes, dtype=torch.uint8, device=self._device)
        self._places: dict[tuple[int, str], int] = {}
        self._matrices: list[Matrix] = []
        owners = [(index + 1 + i) % layout.size for i in range(layout.size)]
        if not rotated:
            owners = list(range(layout.size))
        addresses = [arena.data_ptr() for arena in arenas]
        places = []

        def mine(piece: Piece) -> Tensor:
            data = arenas[index][piece.offset : piece.offset + piece.nbytes]
            return data.view(dtype).view(piece.shape)

        self.pulled_bytes = 0
        """Of one step, from other ranks."""
        for i, (item, offset) in enumerate(zip(self._items, self.plan.offsets, strict=True)):
            size = item.nbytes(dims.itemsize)
            view = self._arena[offset : offset + size].view(dtype).view(item.shape)
            here = None
            if item.own != (0, 0):
                here = mine(layout.pieces(item.linear, item.layer)[index])
            if item.linear != "lm_head":
                self._places[item.layer, item.linear] = i
            self._matrices.append(split_around(view, here, item.own[0], item.axis))
            to = self._arena.data_ptr() + offset
            copies = item_copies(layout, item, owners, addresses, to)
            remote = item_copies(layout, item, [o for o in owners if o != index], addresses, to)
            self.pulled_bytes += sum(copy[4] * copy[5] for copy in remote)
            places.append((to, size, copies))
        self._local = {
            (layer, linear): Matrix((mine(layout.pieces(linear, layer)[index]),))
            for layer in range(dims.num_layers)
            for linear in LINEARS
            if (layer, linear) not in self._places
        }
        """Matrices of which nothing is pulled."""
        self._head = len(self._places)
        head = layout.pieces("lm_head")[index]
        self._own_head = mine(head) if in_place and head.nbytes else None
        self._own_head_row = head.rows[0]
        self._next = 0  # the use that comes next
        self._puller = None
        # On meta there are no bytes: passes are run for the memory that they would take.
        if places and self._device.type != "meta":
            self._puller = _runtime.Puller(
                self._device.index if self._device.type == "cuda" else -1,
                places,
                list(self.plan.gates),
                streams,
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
        if self._puller is not None:
            self._puller.start()

    @property
    def device(self) -> torch.device:
        """Where the ring lies."""
        return self._device

    @property
    def nbytes(self) -> int:
        """Of the ring."""
        return self.plan.nbytes

    def acquire(self, layer: int, linear: str) -> Matrix:
        """See `Source`. One matrix at a time, in the order of use."""
        place = self._places.get((layer, linear))
        return self._local[layer, linear] if place is None else self._acquire(place)

    def peek(self, layer: int, linear: str) -> Matrix:
        """A matrix's place, whatever lies there; for measurements."""
        place = self._places.get((layer, linear))
        return self._local[layer, linear] if place is None else self._matrices[place]

    def release(self, layer: int, linear: str) -> None:
        """See `Source`."""
        place = self._places.get((layer, linear))
        if place is not None:
            self._release(place)

    def head_tiles(self) -> Iterator[Tensor]:
        """See `Source`."""
        row = 0
        for place in range(self._head, len(self._items)):
            if self._own_head is not None and row == self._own_head_row:
                yield self._own_head
                row += len(self._own_head)
            (tile,) = self._acquire(place).parts
            yield tile
            self._release(place)
            row += len(tile)
        if self._own_head is not None and row == self._own_head_row:
            yield self._own_head

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
        if self._puller is not None:
            self._puller.close()
        if self._device.type == "cuda":
            # Kernels may read the arenas (embed), and unmapping waits for nothing.
            torch.cuda.synchronize(self._device)
        self._matrices, self._embedding, self._arenas = [], [], []
        self._local, self._own_head = {}, None
        self._arena = self._arena[:0].clone()

    def _acquire(self, place: int) -> Matrix:
        if self._puller is None:
            return self._matrices[place]
        use = self._next + (place - self._next) % len(self._items)
        stream = self._stream()
        if use > self._next:
            self._puller.skip(use, stream)  # the step before ended early
            self._next = use
        self._puller.acquire(use, stream)
        return self._matrices[place]

    def _release(self, place: int) -> None:
        if self._puller is None:
            return
        assert self._next % len(self._items) == place, "released something that is not in use"
        self._puller.release(self._next, self._stream())
        self._next += 1

    def _stream(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self._device).cuda_stream
