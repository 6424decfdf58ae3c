"""Pure arithmetic of memory: bytes of pages, pages of a budget. No tensors, no devices."""

import math
from dataclasses import dataclass

GIB = 1 << 30
MOST_CHUNK = 64 << 20
"""Bytes that an elastic KV pool maps at once: the more, the longer a step waits for one, the fewer,
the more calls of the driver."""
CHUNK_UNIT = 2 << 20
"""Bytes that a chunk is a multiple of, on every GPU of today."""
SAME_BANKS = 320 << 10
"""Bytes between pages that make attention slow: a layer of all pages is read at once, and on a GPU
with five stacks of memory it then lies on too few of its banks. Measured on an H100 80GB: 14 to 21%
slower at multiples of this, as fast as ever 1 KiB further on (docs/benchmarks.md)."""
PAGE_PAD = 1 << 10
"""Bytes left unused at the end of such pages."""
LENT_ALIGN = 256
"""Bytes, of where a borrower's part of a lender's block begins."""


@dataclass(frozen=True)
class KVShape:
    """The KV pages of one group of layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    block_size: int
    scaled: bool = False
    """Every (token, head) of K and of V has a float32 scale behind the data (docs/layouts.md)."""

    @property
    def data_bytes(self) -> int:
        """Bytes of the keys and values of one page: block_size tokens of all layers."""
        per_token = self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.itemsize
        return per_token * self.block_size

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one page."""
        return self.num_layers * 2 * self.block_size * self.num_kv_heads * 4 * self.scaled

    @property
    def page_bytes(self) -> int:
        """Bytes of one page record: keys and values, then the scales, then what keeps it off
        multiples of `SAME_BANKS`."""
        used = self.data_bytes + self.scale_bytes
        return used if used % SAME_BANKS else used + PAGE_PAD

    def describe(self) -> str:
        """The arithmetic of a page, for error messages."""
        one = f"{self.head_dim} x {self.itemsize}"
        if self.scaled:
            one = f"({one} + 4)"
        pad = self.page_bytes - self.data_bytes - self.scale_bytes
        return (
            f"{self.num_layers} layers x 2 x {self.block_size} tokens x {self.num_kv_heads} KV "
            f"heads x {one} bytes{f' + {pad:,}' if pad else ''} = {self.page_bytes:,} bytes a page"
        )


def _gib_text(nbytes: int) -> str:
    """GiB that are enough for so many bytes, in millionths."""
    return f"{math.ceil(nbytes / GIB * 1e6) / 1e6:g}"


def pages_of_budget(shape: KVShape, budget_bytes: int, setting: str) -> int:
    """Pages that fit into ``budget_bytes``, page 0 (padding) included.

    Raises:
        ValueError: fewer than two pages, so not one token could be kept; gives the arithmetic.
    """
    pages = budget_bytes // shape.page_bytes
    if pages < 2:
        raise ValueError(
            f"{setting} leaves {budget_bytes:,} bytes for KV pages, room for {max(pages, 0)} "
            f"({shape.describe()}); at least 2 are needed (page 0 is padding): give at least "
            f"kv_cache_gib={_gib_text(2 * shape.page_bytes)}"
        )
    return pages


def tier_pages(page_bytes: int, gib: float, available: int, setting: str, what: str) -> int:
    """Pages that ``gib`` GiB of another tier hold, 0 if it is 0.

    Args:
        available: bytes that ``what`` (host memory, a disk) has left.
        setting: the field that asks for it.

    Raises:
        ValueError: not one page, or more than 95% of what is available.
    """
    if not gib:
        return 0
    pages = int(gib * GIB) // page_bytes
    if pages < 2:
        raise ValueError(
            f"{setting}={gib} is {int(gib * GIB):,} bytes, room for {pages} pages of "
            f"{page_bytes:,} bytes; give at least {setting}={_gib_text(2 * page_bytes)}"
        )
    if pages * page_bytes > available * 95 // 100:
        raise ValueError(
            f"{setting}={gib}: {pages} pages x {page_bytes:,} bytes = "
            f"{pages * page_bytes / GIB:.2f} GiB, but of {what} {available / GIB:.2f} GiB are left "
            f"(95% may be taken): lower {setting}"
        )
    return pages


def lent_bytes(gib: float, borrowers: int) -> int:
    """Bytes that each borrower has of a block of ``gib`` GiB."""
    return int(gib * GIB) // borrowers // LENT_ALIGN * LENT_ALIGN


def lent_pages(page_bytes: int, gib: float, lenders: int, borrowers: int) -> int:
    """Pages that a borrower has of all lenders.

    Raises:
        ValueError: not one page of each.
    """
    pages = lent_bytes(gib, borrowers) // page_bytes
    if not pages:
        least = borrowers * (page_bytes + LENT_ALIGN) / GIB
        raise ValueError(
            f"peer_kv_gib={gib}: {int(gib * GIB):,} bytes of a lender / {borrowers} borrowers is "
            f"less than a page of {page_bytes:,} bytes; give at least peer_kv_gib={least:.6f}"
        )
    return lenders * pages


def chunk_bytes(pool_bytes: int, unit: int) -> int:
    """Bytes that an elastic pool of so many maps at once, a multiple of ``unit``."""
    return min(MOST_CHUNK // unit * unit, max(unit, pool_bytes // 256 // unit * unit))


def most_pages(max_num_seqs: int, max_model_len: int, block_size: int) -> int:
    """Pages that ``max_num_seqs`` sequences of full length hold, and page 0."""
    return max_num_seqs * -(-max_model_len // block_size) + 1


def cpu_kv_bytes(available_bytes: int) -> int:
    """Default budget on CPU: the smaller of 4 GiB and 40% of the available memory."""
    return min(4 * GIB, available_bytes * 2 // 5)


def staging_bytes(max_tokens: int, rows: int, max_pages: int) -> int:
    """Bytes of the arrays that the host sends in the largest step."""
    # 5 arrays of tokens; of rows settings, keys, lengths, starts, moves; block tables.
    return 40 * max_tokens + (24 + 32 + 8 + 16 + 16) * (rows + 1) + 4 * rows * max_pages + 256


@dataclass(frozen=True)
class Ledger:
    """What the memory of a GPU is for; the KV pages get what the other lines leave of the budget.

    Args:
        total: bytes of the GPU.
        share: of them that may be used (gpu_memory_utilization).
        lines: bytes by purpose, all but the KV pages.
        others: names of other processes that hold memory.
    """

    total: int
    share: float
    lines: dict[str, int]
    others: tuple[str, ...] = ()

    @property
    def budget(self) -> int:
        """Bytes that may be used in all."""
        return int(self.total * self.share)

    @property
    def left(self) -> int:
        """Bytes for KV pages; may be negative."""
        return self.budget - sum(self.lines.values())

    def describe(self) -> str:
        """Budget and lines, for error messages."""
        lines = " - ".join(f"{name} {size / GIB:.2f}" for name, size in self.lines.items() if size)
        return (
            f"gpu_memory_utilization={self.share:g} of {self.total / GIB:.2f} GiB is a budget of "
            f"{self.budget / GIB:.2f} GiB - {lines}"
        )

    def check(self, kv_bytes: int, shape: KVShape, setting: str | None = None) -> None:
        """Raises ValueError if KV pages of ``kv_bytes`` do not fit; with the arithmetic and what
        would fit. ``setting``: what asked for so much, None if it is the least that works."""
        if kv_bytes <= self.left:
            return
        needed = sum(self.lines.values()) + kv_bytes
        text = (
            f"{self.describe()} = {self.left / GIB:.2f} GiB for KV pages, but "
            f"{setting or 'two pages'} need {kv_bytes / GIB:.4f} GiB ({shape.describe()})"
        )
        remedies = []
        if setting is not None and self.left >= 2 * shape.page_bytes:
            remedies.append(f"give kv_cache_gib={int(self.left / GIB * 1000) / 1000:g}")
        if needed <= self.total * 0.99:
            remedies.append(
                f"give gpu_memory_utilization={-(-1000 * needed // self.total) / 1000:g}"
            )
        if self.others:
            remedies.append(f"end {', '.join(self.others)}")
        if self.lines.get("activations", 0) > self.lines.get("weights", 0) / 10:
            remedies.append("lower max_num_batched_tokens or max_num_seqs")
        remedies.append("use a larger GPU or a smaller model")
        raise ValueError(f"{text}; {', or '.join(remedies)}")

    def table(self, kv_bytes: int, kv_text: str, used: int, unmapped: int = 0) -> str:
        """All lines with the pages, and what the driver counts (``used`` bytes) against them.
        ``unmapped``: bytes of the pages for which there is no memory yet."""
        rows = [*self.lines.items(), (f"KV pages ({kv_text})", kv_bytes)]
        planned = sum(size for _, size in rows)
        head = (
            f"GPU memory: {self.total / GIB:.2f} GiB x {self.share:g} = {self.budget / GIB:.2f} GiB"
        )
        body = [f"  {size / GIB:8.2f} GiB  {name}" for name, size in rows if size]
        rest = self.budget - planned
        if rest > GIB // 100:
            body.append(f"  {rest / GIB:8.2f} GiB  not used (no sequence could fill more pages)")
        residual = used - (planned - unmapped)
        body.append(
            f"  {residual / GIB:+8.2f} GiB  more than this in use by the driver's count "
            f"({residual / self.budget:+.2%} of the budget)"
        )
        return "\n".join([head, *body])


def fit_model_len(
    model_max: int, asked: int | None, num_pages: int, block_size: int, reason: str = ""
) -> tuple[int, str | None]:
    """The longest sequence in tokens, and a remark if the pool forced it below the model's maximum.

    ``num_pages`` are those of the GPU pool and, if there is one, those that the host pool holds;
    ``reason`` says where ``model_max`` comes from.

    Raises:
        ValueError: ``asked`` is beyond the model's maximum or beyond what the pool holds.
    """
    capacity = (num_pages - 1) * block_size
    if asked is not None:
        if asked > model_max:
            raise ValueError(
                f"max_model_len={asked} is beyond the model's maximum of {model_max} tokens"
                + (f" ({reason})" if reason else "")
            )
        if asked > capacity:
            raise ValueError(
                f"max_model_len={asked} does not fit: the KV pool holds {num_pages - 1} pages x "
                f"{block_size} = {capacity} tokens; raise kv_cache_gib, host_kv_gib or "
                "peer_kv_gib, or lower max_model_len"
            )
        return asked, None
    if model_max > capacity:
        return capacity, (
            f"max_model_len is {capacity} (KV pool: {num_pages - 1} pages x {block_size} tokens), "
            f"the model could take {model_max}; raise kv_cache_gib for longer sequences"
        )
    return model_max, None
