"""Exchange: rows of activations go to the shards of a pool group, and the results come back."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from torch_pd import ops
from torch_pd.weights.mailbox import Mailbox

# torch 2.13 renames them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Exchange:
    """The four exchanges of a shipped step among the ranks of a pool group.

    Every rank calls the same exchanges in the same order with the same ``rows`` and ``widths``:
    tuples over the ranks. ``rows`` are each rank's tokens, ``widths`` the columns that each rank's
    shard yields or takes; a rank of width 0 is no owner. Any of them may be 0, and owners and ranks
    with tokens need not be the same. Nothing waits for the device, and with NCCL all of it can be
    captured in a CUDA graph. Sums are over the owners in the order of their ranks, or in NCCL's.

    Small messages go by the mailbox, if there is one: in one kernel, sums in float32 and in the
    order of the ranks.

    Args:
        group: of torch.distributed; None is the world.
        mailbox: of the same ranks in the same order.
        whole: use one collective among equals (all-gather, reduce-scatter) where all ranks are
            alike. Default: with NCCL. Without it results are the same for any backend.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        mailbox: Mailbox | None = None,
        *,
        whole: bool | None = None,
    ):
        self.group = group
        self.mailbox = mailbox
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        nccl = "nccl" in dist.get_backend(group)
        self._whole = nccl if whole is None else whole
        # Lists need no copy of rows that go to several ranks; gloo takes flat tensors only.
        self._lists = nccl

    def gather(self, x: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """The rows of all ranks, for the owners.

        Args:
            x: ``[rows of me, C]``.

        Returns:
            ``[sum(rows), C]`` in the order of the ranks; ``[0, C]`` where ``widths`` is 0.
        """
        x = x.contiguous()
        if self.size == 1:
            return x
        if box := self._box(x, max(rows) * x.shape[1]):
            return box.gather(x, rows, widths)
        if self._alike(rows) and all(widths):
            out = x.new_empty(sum(rows), x.shape[1])
            _all_gather(out, x, group=self.group)
            return out
        nothing = x[:0]
        sends = [x if width else nothing for width in widths]
        mine = widths[self.rank] > 0
        counts = [row * x.shape[1] if mine else 0 for row in rows]
        return self._swap(sends, counts).view(sum(rows) if mine else 0, x.shape[1])

    def to_tokens(self, y: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """The owners' results for the rows of each rank, sent there.

        Args:
            y: ``[sum(rows), width of me]``.

        Returns:
            ``[rows of me * sum(widths)]``: the blocks ``[rows of me, width]`` of the owners one
            after another; see `unpack`.
        """
        y = y.contiguous()
        if self.size == 1:
            return y.view(-1)
        mine = rows[self.rank]
        if box := self._box(y, max(rows) * max(widths)):
            return box.to_tokens(y, rows, widths)
        if self._alike(rows) and self._alike(widths):
            out = torch.empty_like(y)
            dist.all_to_all_single(out, y, group=self.group)
            return out.view(-1)
        return self._swap(list(y.split(list(rows))), [mine * width for width in widths])

    def to_owners(self, x: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """The way back of `to_tokens`: each owner's columns of all rows.

        Args:
            x: ``[rows of me, sum(widths)]``.

        Returns:
            ``[sum(rows), width of me]``.
        """
        mine = widths[self.rank]
        if self.size == 1:
            return x
        x = x.contiguous()
        if box := self._box(x, max(rows) * max(widths)):
            return box.to_owners(x, rows, widths)
        packed = pack(x, widths)
        if self._alike(rows) and self._alike(widths):
            out = torch.empty_like(packed)
            dist.all_to_all_single(out, packed, group=self.group)
        else:
            sends = list(packed.split([rows[self.rank] * width for width in widths]))
            out = self._swap(sends, [row * mine for row in rows])
        return out.view(sum(rows), mine)

    def scatter_sum(self, y: Tensor, rows: Sequence[int], widths: Sequence[int]) -> Tensor:
        """The sum of the owners' partial results, each row on its own rank.

        Args:
            y: ``[sum(rows), C]``, or ``[0, C]`` where ``widths`` is 0.

        Returns:
            ``[rows of me, C]``, a fresh tensor unless there is one rank only.
        """
        y = y.contiguous()
        if self.size == 1:
            return y
        mine, columns = rows[self.rank], y.shape[1]
        if box := self._box(y, max(rows) * columns):
            return box.scatter_sum(y, rows, widths)
        if self._alike(rows) and all(widths):
            out = y.new_empty(mine, columns)
            _reduce_scatter(out, y, group=self.group)
            return out
        sends = list(y.split(list(rows))) if widths[self.rank] else [y[:0]] * self.size
        counts = [mine * columns if width else 0 for width in widths]
        owners = sum(width > 0 for width in widths)
        parts = self._swap(sends, counts).view(owners, mine, columns)
        total = parts[0]
        for part in parts[1:]:
            total.add_(part)
        return total

    def _box(self, x: Tensor, largest: int) -> Mailbox | None:
        """The mailbox, if messages of at most ``largest`` elements go by it."""
        box = self.mailbox
        return box if box is not None and box.holds(largest * x.itemsize, x.dtype) else None

    def _alike(self, sizes: Sequence[int]) -> bool:
        return self._whole and len(set(sizes)) == 1

    def _swap(self, sends: list[Tensor], counts: list[int]) -> Tensor:
        """Sends tensor i to rank i; what comes from the ranks, of so many elements each, flat."""
        received = sends[0].new_empty(sum(counts))
        if self._lists:
            dist.all_to_all(list(received.split(counts)), sends, group=self.group)
            return received
        sizes = [send.numel() for send in sends]
        flat = torch.cat([send.reshape(-1) for send in sends])
        dist.all_to_all_single(received, flat, counts, sizes, group=self.group)
        return received


def unpack(
    packed: Tensor, num_rows: int, widths: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """``[num_rows, sum(widths)]`` of blocks ``[num_rows, width]`` that lie one after another.

    ``out`` takes the result unless ``packed`` already is it.
    """
    if num_rows == 1 or max(widths) == sum(widths):
        return packed.view(num_rows, sum(widths))
    if out is None:
        out = packed.new_empty(num_rows, sum(widths))
    ops.unpack_shards(packed, out, widths)
    return out


def pack(x: Tensor, widths: Sequence[int]) -> Tensor:
    """``x [T, sum(widths)]`` as blocks ``[T, width]`` one after another, ``[T * sum(widths)]``."""
    if x.shape[0] == 1 or max(widths) == sum(widths):
        return x.reshape(-1)
    out = x.new_empty(x.numel())
    ops.pack_shards(x, out, widths)
    return out
