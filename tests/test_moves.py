"""MoveQueue: whatever interleaving its tickets allow, pages hold what the order of calls says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_pd import ops
from torch_pd.kv.host import HostPool
from torch_pd.kv.migrate import Migrator
from torch_pd.kv.moves import HOST_BITS, MoveQueue, Waits

GPU, HOST = 5, 4

actions = st.one_of(
    st.tuples(st.sampled_from(["out", "in"]), st.integers(0, GPU - 1), st.integers(0, HOST - 1)),
    st.tuples(st.just("compute"), st.integers(0, GPU - 1), st.just(0)),
    st.tuples(st.just("read"), st.just(0), st.integers(0, HOST - 1)),
    st.tuples(st.just("step"), st.just(0), st.just(0)),
    st.tuples(st.just("poll"), st.just(0), st.just(0)),
)


class Device:
    """Executes batches as late and in as odd an order as the tickets and streams allow."""

    def __init__(self, queue: MoveQueue, random):
        self.queue, self.random = queue, random
        self.pools = {True: list(range(GPU)), False: [100 + i for i in range(HOST)]}
        self.waiting = {True: [], False: []}
        self.done = [0, 0]

    def ready(self, out: bool) -> bool:
        queue = self.waiting[out]
        return bool(queue) and queue[0].after <= self.done[not out]

    def advance(self, out: bool) -> None:
        moves = self.waiting[out].pop(0)
        pairs = list(moves.pairs)
        self.random.shuffle(pairs)
        for source, target in pairs:
            self.pools[not out][target] = self.pools[out][source]
        assert moves.ticket == self.done[out] + 1
        self.done[out] = moves.ticket

    def some(self) -> None:
        for _ in range(self.random.randint(0, 3)):
            out = self.random.random() < 0.5
            if self.ready(out):
                self.advance(out)

    def until(self, tickets) -> None:
        while any(self.done[d] < ticket for d, ticket in enumerate(tickets)):
            behind = [d for d in (False, True) if self.ready(d)]
            assert behind, "the batches wait for each other"
            self.advance(self.random.choice(behind))


@given(st.lists(actions, max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=400, deadline=None)
def test_any_order_that_the_tickets_allow_gives_the_same_pages(script, random):
    queue = MoveQueue(GPU, HOST)
    device = Device(queue, random)
    gpu, host = list(range(GPU)), [100 + i for i in range(HOST)]  # as if all happened at once
    stamp, touched, read = 1000, [], []
    for kind, page, host_page in [*script, ("step", 0, 0)]:
        if kind == "out":
            queue.move_out(page, host_page)
            host[host_page] = gpu[page]
        elif kind == "in":
            queue.move_in(host_page, page)
            gpu[page] = host[host_page]
        elif kind == "compute":
            queue.compute_on([page])
            touched.append(page)
        elif kind == "read":
            queue.read_in_place(host_page)
            read.append(host_page)
        elif kind == "poll":
            queue.done = list(device.done)
        else:
            batches, waits = queue.take()
            for moves in batches:
                device.waiting[moves.out].append(moves)
            device.some()
            device.until(waits)
            for host_page in read:
                assert device.pools[False][host_page] == host[host_page]
            for page in touched:
                # The forward pass: reads what it should, then writes.
                assert device.pools[True][page] == gpu[page]
                stamp += 1
                device.pools[True][page] = gpu[page] = stamp
            # Batches wait for the passes before them, and this pass has run; the moves that it did
            # not wait for go on beside it and later ones.
            touched, read = [], []
    device.until([n - 1 for n in queue._next])
    assert device.pools[True] == gpu
    assert device.pools[False] == host
    queue.done = list(device.done)
    assert not queue.in_flight
    assert queue.arrival(range(GPU)) == 0
    assert all(queue.has_left(h) for h in range(HOST))


def test_moves_that_do_not_meet_form_one_batch_each_way():
    queue = MoveQueue(8, 8)
    for i in range(4):
        queue.move_out(i, i)
        queue.move_in(4 + i, 4 + i)
    queue.compute_on([1])
    assert queue.in_flight
    batches, waits = queue.take()
    assert sorted((m.out, m.ticket, m.after, len(m.pairs)) for m in batches) == [
        (False, 1, 0, 4),
        (True, 1, 0, 4),
    ]
    assert waits == (0, 1)
    assert queue.take() == ([], (0, 0))
    assert queue.arrival([4]) == 1
    assert queue.arrival([0]) == 0


def test_host_bits_are_the_ops():
    assert HOST_BITS == 1 << ops.PLACE_SHIFT


@pytest.mark.parametrize("page_bytes", [48, 4096, 12288])
def test_migrator_on_the_cpu(page_bytes):
    """Random moves over two pools of patterns, with waits only where the queue says so."""
    rng = np.random.default_rng(page_bytes)
    pages = 16
    gpu = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8)
    host = HostPool(pages, page_bytes, torch.device("cpu"))
    host.pages[:] = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8)
    want_gpu, want_host = gpu.clone(), host.pages.clone()
    queue, migrator = MoveQueue(pages, pages), Migrator(gpu, host)
    for _ in range(100):
        for _ in range(rng.integers(0, 6)):
            g, h = rng.integers(0, pages, 2).tolist()
            if rng.random() < 0.5:
                queue.move_out(g, h)
                want_host[h] = want_gpu[g]
            else:
                queue.move_in(h, g)
                want_gpu[g] = want_host[h]
        page = int(rng.integers(pages))
        queue.compute_on([page])
        batches, waits = queue.take()
        for moves in batches:
            migrator.submit(moves)
        migrator.wait(waits)
        assert torch.equal(gpu[page], want_gpu[page])
        gpu[page] = want_gpu[page] = int(rng.integers(255))
        queue.done = migrator.done()
    migrator.finish(Waits(*(n - 1 for n in queue._next)))
    assert torch.equal(gpu, want_gpu)
    assert torch.equal(host.pages, want_host)
    queue.done = migrator.done()
    assert not queue.in_flight
    del migrator
    host.release()


def test_migrator_refuses_pages_beyond_the_pools():
    host = HostPool(2, 4096, torch.device("cpu"))
    migrator = Migrator(torch.zeros(2, 4096, dtype=torch.uint8), host)
    queue = MoveQueue(9, 9)
    queue.move_out(1, 2)
    with pytest.raises(ValueError, match="does not exist"):
        migrator.submit(queue.take()[0][0])
