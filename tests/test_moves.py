"""MoveQueue: whatever interleaving its tickets allow, pages hold what the order of calls says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_pd import ops
from torch_pd.kv.host import HostPool
from torch_pd.kv.migrate import Migrator
from torch_pd.kv.moves import HOST_BITS, NO_WAITS, MoveQueue, Waits

GPU, HOST = 5, 4
PEERS = [None, 2, 0]  # the first page of HOST on a peer

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
        self.lanes = range(len(queue.done))
        self.waiting = [[] for _ in self.lanes]
        self.done = [0 for _ in self.lanes]

    def ready(self, lane: int) -> bool:
        queue = self.waiting[lane]
        return bool(queue) and all(
            after <= done for after, done in zip(queue[0].after, self.done, strict=True)
        )

    def advance(self, lane: int) -> None:
        moves = self.waiting[lane].pop(0)
        pairs = list(moves.pairs)
        self.random.shuffle(pairs)
        for source, target in pairs:
            self.pools[not moves.out][target] = self.pools[moves.out][source]
        assert moves.ticket == self.done[lane] + 1
        self.done[lane] = moves.ticket

    def some(self) -> None:
        for _ in range(self.random.randint(0, 3)):
            lane = self.random.choice(self.lanes)
            if self.ready(lane):
                self.advance(lane)

    def until(self, tickets) -> None:
        while any(d < ticket for d, ticket in zip(self.done, tickets, strict=False)):
            behind = [lane for lane in self.lanes if self.ready(lane)]
            assert behind, "the batches wait for each other"
            self.advance(self.random.choice(behind))


@given(st.lists(actions, max_size=60), st.randoms(use_true_random=False), st.sampled_from(PEERS))
@settings(max_examples=800, deadline=None)
def test_any_order_that_the_tickets_allow_gives_the_same_pages(script, random, first_peer):
    queue = MoveQueue(GPU, HOST, first_peer)
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
                device.waiting[moves.lane].append(moves)
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
    assert not any(queue.arrival(range(GPU)))
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
        (False, 1, (0, 0), 4),
        (True, 1, (0, 0), 4),
    ]
    assert waits == Waits(to_host=1)
    assert queue.take() == ([], NO_WAITS)
    assert queue.arrival([4]) == Waits(from_host=1)
    assert queue.arrival([0]) == NO_WAITS


def test_pages_of_a_peer_have_lanes_of_their_own():
    queue = MoveQueue(8, 8, first_peer=4)
    for page in (3, 4, 5):
        queue.move_in(page, page)
    queue.move_out(6, 6)
    queue.compute_on([3, 6])
    batches, waits = queue.take()
    assert [(m.lane, m.pairs) for m in batches] == [
        (0, [(3, 3)]),
        (2, [(4, 4), (5, 5)]),
        (3, [(6, 6)]),
    ]
    assert waits == Waits(from_host=1, to_peer=1)
    both, near = queue.arrival([3, 4]), queue.arrival([4, 5])
    assert (both, near) == (Waits(from_host=1, from_peer=1), Waits(from_peer=1))
    queue.done = [0, 0, 1, 0]
    assert queue.has_come(near)
    assert not queue.has_come(both)
    assert queue.has_come(both, Waits(from_host=1))
    assert not queue.has_left(6)
    assert queue.is_idle(4)


def test_host_bits_are_the_ops():
    assert HOST_BITS == 1 << ops.PLACE_SHIFT


def random_moves(rng, queue: MoveQueue, gpu: torch.Tensor, under: torch.Tensor) -> None:
    """Asks for a few moves between pages of the GPU and under it, and makes them right away."""
    for _ in range(rng.integers(0, 8)):
        g, h = int(rng.integers(0, len(gpu))), int(rng.integers(0, len(under)))
        if rng.random() < 0.5:
            queue.move_out(g, h)
            under[h] = gpu[g]
        else:
            queue.move_in(h, g)
            gpu[g] = under[h]


@pytest.mark.parametrize("page_bytes", [48, 4096, 12288])
@pytest.mark.parametrize("lent", [[], [5], [3, 4]])
def test_migrator_on_the_cpu(page_bytes, lent):
    """Random moves over pools of patterns, with waits only where the queue says so."""
    rng = np.random.default_rng(page_bytes)
    pages = 16
    gpu = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8)
    host = HostPool(pages, page_bytes, torch.device("cpu"))
    host.pages[:] = torch.randint(0, 255, (pages, page_bytes), dtype=torch.uint8)
    peers = [torch.randint(0, 255, (count, page_bytes), dtype=torch.uint8) for count in lent]
    want_gpu, want_host = gpu.clone(), torch.cat([host.pages, *peers])
    under = len(want_host)
    queue = MoveQueue(pages, under, pages if lent else None)
    migrator = Migrator(gpu, host, peers)
    for _ in range(100):
        random_moves(rng, queue, want_gpu, want_host)
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
    assert torch.equal(torch.cat([host.pages, *peers]), want_host)
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
