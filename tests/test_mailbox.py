"""Which matrices the ranks send each other by mapped memory; tests/gpu has the kernel that does."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_pd.weights import mailbox
from torch_pd.weights.mailbox import Mailbox, Matrix


class Wire:
    """Stands in for `ops`: notes the calls of all ranks and then delivers their messages."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def exchange(self, *call) -> None:
        self.calls.append(call)

    def deliver(self) -> list[Tensor]:
        """The results of all ranks."""
        outs = []
        assert len({(call[7], call[8]) for call in self.calls}) == 1, "all are alike"
        for rank, (_, out, _, _, me, _, receives, add, blocks, _) in enumerate(self.calls):
            assert me == rank
            out.zero_() if add else out.fill_(float("nan"))
            for sender, (x, _, _, _, _, sends, *_) in enumerate(self.calls):
                message, place = matrix(x, sends, rank), matrix(out, receives, sender)
                assert message.numel() == place.numel()
                assert message.nbytes <= blocks * self.room
                message = message.reshape(place.shape)
                place.add_(message) if add else place.copy_(message)
            outs.append(out)
        self.calls.clear()
        return outs


def matrix(x: Tensor, values: list[int], rank: int) -> Tensor:
    part = Matrix(*values[4 * rank : 4 * rank + 4])
    assert x.is_contiguous()
    shape, strides = (part.rows, part.columns), (part.stride, 1)
    if part.rows * part.columns == 0:
        return x.new_empty(shape)
    last = part.start + (part.rows - 1) * part.stride + part.columns
    assert last <= x.numel()
    return x.as_strided(shape, strides, x.storage_offset() + part.start)


def boxes(size: int, limit: int) -> list[Mailbox]:
    made = []
    for rank in range(size):
        box = object.__new__(Mailbox)
        box.rank, box.size, box.limit, box.wait_s = rank, size, limit, 1.0
        box._lines = -(-mailbox._lines(limit) // mailbox._BLOCKS)
        box._inbox, box._addresses = torch.empty(0), [0] * size
        made.append(box)
    return made


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(2, 8))
def test_every_rank_gets_its_rows_and_columns(data, size):
    rows = data.draw(st.lists(st.sampled_from([0, 1, 2, 7]), min_size=size, max_size=size))
    widths = data.draw(st.lists(st.sampled_from([0, 1, 3, 8]), min_size=size, max_size=size))
    widths[data.draw(st.integers(0, size - 1))] = 2
    columns = 5
    x = torch.randn(sum(rows), columns)
    y = torch.randn(sum(rows), sum(widths))
    parts = torch.randn(size, sum(rows), columns)
    limit = 4 * max(1, max(rows)) * max(columns, *widths)
    wire, ranks = Wire(), boxes(size, limit)
    wire.room = ranks[0]._lines * mailbox._CARRIED
    mine = [slice(sum(rows[:r]), sum(rows[: r + 1])) for r in range(size)]
    at = [slice(sum(widths[:r]), sum(widths[: r + 1])) for r in range(size)]
    ops, mailbox.ops = mailbox.ops, wire
    try:
        for box in ranks:
            box.gather(x[mine[box.rank]].contiguous(), rows, widths)
        for got, width in zip(wire.deliver(), widths, strict=True):
            assert torch.equal(got, x if width else x[:0])
        for box in ranks:
            box.to_tokens(y[:, at[box.rank]].contiguous(), rows, widths)
        for rank, got in enumerate(wire.deliver()):
            assert got.numel() == y[mine[rank]].numel()
            if got.numel():
                assert torch.equal(got, torch.cat([y[mine[rank], a].reshape(-1) for a in at]))
        for box in ranks:
            box.to_owners(y[mine[box.rank]].contiguous(), rows, widths)
        for rank, got in enumerate(wire.deliver()):
            assert torch.equal(got, y[:, at[rank]])
        for box in ranks:
            part = parts[box.rank] if widths[box.rank] else parts[box.rank, :0]
            box.scatter_sum(part, rows, widths)
        owners = [rank for rank in range(size) if widths[rank]]
        for rank, got in enumerate(wire.deliver()):
            assert torch.equal(got, sum(parts[owner, mine[rank]] for owner in owners) + 0)
    finally:
        mailbox.ops = ops


@given(st.integers(2, 8), st.integers(0, 1 << 25))
def test_an_inbox_holds_its_largest_messages(size, limit):
    lines = -(-mailbox._lines(limit) // mailbox._BLOCKS)
    # As csrc/cuda/exchange.cu counts them.
    room = mailbox._SETS * size * mailbox._BLOCKS * mailbox._LINE
    assert (Mailbox.nbytes(size, limit) - mailbox._HEADER) // room == lines
    assert lines * mailbox._BLOCKS * mailbox._CARRIED >= limit


def open_and_drop(key: str, rank: int) -> int:
    box = Mailbox("cpu", key, rank, 2, limit=1000)
    arena = box._inbox
    assert not arena.any()
    assert len(set(box._addresses)) == 2
    return arena.numel()


def test_inboxes_are_mapped_and_let_go():
    key = uuid.uuid4().hex
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda rank: open_and_drop(key, rank), range(2)))
    assert sizes == [Mailbox.nbytes(2, 1000)] * 2
