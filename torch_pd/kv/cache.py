"""KVPool, the tensor of KV pages, and PagedCache, Hugging Face's Cache over such pages."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from torch_pd import ops
from torch_pd.context import Batch, GroupBatch
from torch_pd.kv.pages import PageAllocator
from torch_pd.sizing import KVShape

BYTE_DTYPES = {"fp8": torch.uint8, "int8": torch.int8}
"""Of pages that hold bytes and a scale for each head of a token, by kv_cache_dtype. uint8: float8
of three exponent and four mantissa bits, which torch has no name for (docs/layouts.md)."""


class LayerCache(NamedTuple):
    """What the ops read and write of one layer: views of a pool."""

    k: Tensor
    """[num_pages, block_size, num_kv_heads, head_dim]."""
    v: Tensor
    """As k."""
    k_scale: Tensor | None
    """float32 [num_pages, block_size, num_kv_heads] if the pages are of bytes."""
    v_scale: Tensor | None
    """As k_scale."""


class KVPool:
    """Pages of the keys and values of one KV group: layers that share one shape.

    ``records`` uint8 ``[num_pages, page_bytes]``: a page holds ``block_size`` tokens of all layers,
    contiguous, so it moves as one copy; behind bytes lie the scales. ``pages [num_pages,
    num_layers, 2, block_size, num_kv_heads, head_dim]`` is the data as a view. Page 0 is never
    handed out: block tables are padded with it, and rows of padding read it. The contents of the
    others start undefined. ``records`` may be given, with memory under page 0 at least
    (kv/elastic.py).
    """

    def __init__(
        self,
        num_pages: int,
        num_layers: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        records: Tensor | None = None,
    ) -> None:
        # A pool made under inference_mode could not be written outside of it later.
        self.shape = page_shape(num_layers, num_kv_heads, head_dim, dtype, block_size)
        with torch.inference_mode(False):
            if records is None:
                sizes = (num_pages, self.shape.page_bytes)
                records = torch.empty(sizes, dtype=torch.uint8, device=device)
            self.records = records
            self.records[:1].zero_()
            data = self.records[:, : self.shape.data_bytes].view(dtype)
            heads = (num_layers, 2, block_size, num_kv_heads)
            self.pages = data.unflatten(1, (*heads, head_dim))
            scales = None
            if self.shape.scaled:
                used = self.shape.data_bytes + self.shape.scale_bytes
                behind = self.records[:, self.shape.data_bytes : used].view(torch.float32)
                scales = behind.unflatten(1, heads)
        self._layers = [
            LayerCache(
                self.pages[:, layer, 0],
                self.pages[:, layer, 1],
                None if scales is None else scales[:, layer, 0],
                None if scales is None else scales[:, layer, 1],
            )
            for layer in range(num_layers)
        ]

    @property
    def num_pages(self) -> int:
        """Pages, page 0 included."""
        return self.pages.shape[0]

    @property
    def block_size(self) -> int:
        """Tokens of a page."""
        return self.pages.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self.pages.dtype

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self.pages.device

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.shape.page_bytes

    def layer(self, index: int) -> LayerCache:
        """The views of a layer."""
        return self._layers[index]

    def copy_within(self, moves: Tensor) -> None:
        """Copies whole pages inside the pool: rows (from, to) of ``moves`` int64 [m, 2] on its
        device. No page may be both read and written."""
        ops.copy_pages(self.records, self.records, moves)


def page_shape(
    num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, block_size: int
) -> KVShape:
    """Sizes of a page of keys and values of this dtype; bytes have scales."""
    scaled = dtype in BYTE_DTYPES.values()
    return KVShape(num_layers, num_kv_heads, head_dim, dtype.itemsize, block_size, scaled)


class PagedCache(Cache):
    """Keys and values of a padded batch in KV pages, for ``generate`` of a patched model.

    Only real tokens are stored, compactly: columns that the attention mask leaves out take no
    slot. Beams and repeated sequences share pages; a shared page that is not full is copied before
    it is written. The pool grows by doubling. The pages are written by the patched model alone.

    Args:
        shape: sizes of a page.
        dtype, device: of the keys and values.
    """

    is_compileable = False  # keeps generate from compiling and from building 4-D masks
    _is_user_defined = False  # set where generate was given the cache; generate reads it

    def __init__(self, shape: KVShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.tables: list[list[int]] = []
        """Pages of each sequence."""
        self.lengths: list[int] = []
        """Stored tokens of each sequence."""
        self.columns = torch.empty((0, 0), dtype=torch.bool)
        """[batch, seen]: which columns of the padded input were real tokens."""
        self.pool = self._new_pool(2)
        self.allocator = PageAllocator(2)

    def __repr__(self) -> str:
        return (
            f"PagedCache(batch={len(self.lengths)}, columns={self.get_seq_length()}, "
            f"pages={self.allocator.num_used}, block_size={self.shape.block_size})"
        )

    def _new_pool(self, num_pages: int) -> KVPool:
        shape = self.shape
        sizes = (shape.num_layers, shape.block_size, shape.num_kv_heads, shape.head_dim)
        return KVPool(num_pages, *sizes, self.dtype, self.device)

    def extend(self, mask: Tensor) -> tuple[Batch, Tensor]:
        """Takes pages for new columns and describes the pass that will write them.

        Args:
            mask: bool [batch, new columns] on CPU, True for a real token.

        Returns:
            The batch of the packed tokens (row by row; sequences without a new token left out), and
            their positions int64 [num_tokens], counted over the stored tokens of each sequence.

        Raises:
            ValueError: the batch differs from the one the cache holds, or there is no real token.
        """
        if not self.lengths:
            self.lengths = [0] * mask.shape[0]
            self.tables = [[] for _ in self.lengths]
            self.columns = mask[:, :0]
        if len(self.lengths) != mask.shape[0]:
            raise ValueError(
                f"the cache holds {len(self.lengths)} sequences, the input has {mask.shape[0]}: "
                "give as many rows, or start with no past_key_values"
            )
        counts = mask.sum(1).tolist()
        if not any(counts):
            raise ValueError("the attention mask leaves no token of this input")
        self._reserve(counts)
        self.columns = torch.cat([self.columns, mask], 1)

        rows = [row for row, count in enumerate(counts) if count]
        query_start = [0]
        positions: list[Tensor] = []
        slots: list[Tensor] = []
        block_size = self.shape.block_size
        for row in rows:
            start, self.lengths[row] = self.lengths[row], self.lengths[row] + counts[row]
            query_start.append(query_start[-1] + counts[row])
            position = torch.arange(start, self.lengths[row])
            page = torch.tensor(self.tables[row])[position // block_size]
            positions.append(position)
            slots.append(page * block_size + position % block_size)
        width = max(len(self.tables[row]) for row in rows)
        tables = [self.tables[row] + [0] * (width - len(self.tables[row])) for row in rows]

        def put(values: Sequence, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(self.device)

        group = GroupBatch(put(tables, torch.int32), torch.cat(slots).to(self.device))
        batch = Batch(
            num_tokens=query_start[-1],
            max_query_len=max(counts),
            query_start=put(query_start, torch.int32),
            seq_lens=put([self.lengths[row] for row in rows], torch.int32),
            groups=(group,),
        )
        return batch, torch.cat(positions).to(self.device)

    def _reserve(self, counts: Sequence[int]) -> None:
        """Pages for so many new tokens of each sequence; a shared page to be written is copied."""
        block_size = self.shape.block_size
        wanted = [
            -(-(length + count) // block_size) - len(table)
            for length, count, table in zip(self.lengths, counts, self.tables, strict=True)
        ]
        # At most one page more a row: the copy of a shared last page.
        most = sum(wanted) + sum(count > 0 for count in counts)
        if most > self.allocator.num_free:
            self._grow(self.allocator.num_used + most + 1)
        copies = []
        for row, count in enumerate(counts):
            table = self.tables[row]
            if count and self.lengths[row] % block_size:
                shared = table[-1]
                if self.allocator.refcount(shared) > 1:
                    table[-1] = self.allocator.allocate(1)[0]
                    self.allocator.free([shared])
                    copies.append((shared, table[-1]))
            table += self.allocator.allocate(wanted[row])
        if copies:
            self.pool.copy_within(torch.tensor(copies, dtype=torch.int64, device=self.device))

    def _grow(self, num_pages: int) -> None:
        """A pool of at least so many pages; pages in use move to its front, shares kept."""
        pool = self._new_pool(max(num_pages, 2 * self.pool.num_pages))
        allocator = PageAllocator(pool.num_pages)
        moved: dict[int, int] = {}
        for table in self.tables:
            for i, page in enumerate(table):
                if page in moved:
                    allocator.fork([moved[page]])
                else:
                    moved[page] = allocator.allocate(1)[0]
                table[i] = moved[page]
        moves = torch.tensor(list(moved.items()), dtype=torch.int64, device=self.device)
        ops.copy_pages(self.pool.records, pool.records, moves.reshape(-1, 2))
        self.pool, self.allocator = pool, allocator

    # The parts of Hugging Face's Cache that generate uses.

    def __len__(self) -> int:
        return self.shape.num_layers

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first pass."""
        return len(self.lengths) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether a pass was made."""
        return bool(self.lengths)

    @property
    def is_croppable(self) -> bool:
        """Whether crop undoes a pass without a trace."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """Every layer keeps all its tokens; windows are the attention op's."""
        return [False] * len(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return self.columns.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: grows as needed."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns that a mask would span, and its offset."""
        return self.get_seq_length() + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Always a ValueError: only the ops of a patched model write pages."""
        raise ValueError(
            "a PagedCache is written by a model patched with torch_pd.patch_model, not by update()"
        )

    def reset(self) -> None:
        """Forgets all sequences; the pool stays."""
        for table in self.tables:
            self.allocator.free(table)
        self.tables, self.lengths = [], []
        self.columns = torch.empty((0, 0), dtype=torch.bool)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes a share of what was row ``indices[i]``."""
        rows = indices.tolist()
        for row in rows:
            self.allocator.fork(self.tables[row])
        old = self.tables
        self.tables = [list(old[row]) for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        self.columns = self.columns[rows]
        for table in old:
            self.allocator.free(table)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues row ``beam_idx[i]``. Pages are shared, not copied."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, next to each other."""
        rows = torch.arange(len(self.lengths))
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` columns; a positive number is what to keep."""
        seen = self.get_seq_length()
        keep = seen + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, seen)
        if keep < 0:
            raise ValueError(f"cannot remove {-tokens_to_remove} of {seen} columns")
        removed = self.columns[:, keep:].sum(1).tolist()
        self.columns = self.columns[:, :keep]
        for row, count in enumerate(removed):
            self.lengths[row] -= count
            table = self.tables[row]
            spare = table[-(-self.lengths[row] // self.shape.block_size) :]
            self.allocator.free(spare)
            del table[len(table) - len(spare) :]
