"""Tiers: contents follow their digests over GPU, host and disk, in any order and with faults."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_pd.kv.archive import DISK_ERRORS, LOST, RECORD
from torch_pd.kv.moves import HOST_BITS
from torch_pd.kv.pages import PageAllocator
from torch_pd.kv.records import RecordIndex
from torch_pd.kv.tiers import Tiers

GPU, HOST, RECORDS = 7, 6, 4


def digest(name: int, count: int) -> list[bytes]:
    """Digests of a chain of pages."""
    return [f"{name}.{i}".encode() for i in range(count)]


class World:
    """Executes moves and jobs on pages that are just values, as late as allowed."""

    def __init__(self, num_records: int = RECORDS):
        self.gpu = PageAllocator(GPU, enable_prefix_caching=True)
        self.tiers = Tiers(self.gpu, HOST, num_records)
        self.pools = {True: [None] * GPU, False: [None] * HOST}
        self.records = [None] * max(1, num_records)
        self.batches = []
        self.jobs = []
        self.running = {}  # name: (entries, contents)
        self.swapped = {}  # name: (saved, contents)

    def step(self, execute: bool, fault=None):
        """Takes the moves; runs them, and the jobs of earlier steps, now or later."""
        tiers = self.tiers
        batches, waits = tiers.queue.take()
        self.batches += batches
        tiers.archive.end_step()
        if execute or any(waits):
            for moves in self.batches:
                for source, target in moves.pairs:
                    self.pools[not moves.out][target] = self.pools[moves.out][source]
                tiers.queue.done[moves.out] = moves.ticket
            self.batches = []
        if execute:
            jobs, self.jobs = self.jobs, []
            for job in jobs:
                if fault is None and job.write:
                    self.records[job.record] = self.pools[False][job.host_page]
                elif fault is None:
                    self.pools[False][job.host_page] = self.records[job.record]
                else:
                    self.pools[False][job.host_page] = (
                        self.pools[False][job.host_page] if job.write else "torn"
                    )
                tiers.archive.ended(job, fault)
        self.jobs += tiers.archive.jobs
        tiers.archive.jobs.clear()

    def check(self):
        held = [entries for entries, _ in self.running.values()]
        self.tiers.check([saved for saved, _ in self.swapped.values()], held)
        if not self.tiers.queue.in_flight:
            for entries, contents in self.running.values():
                for entry, content in zip(entries, contents, strict=True):
                    pool = self.pools[entry < HOST_BITS]
                    assert pool[entry & (HOST_BITS - 1)] == content
            for saved, contents in self.swapped.values():
                for entry, content in zip(saved, contents, strict=True):
                    if LOST < entry < HOST_BITS:
                        assert self.pools[False][entry] == content
                    elif RECORD <= entry < 2 * RECORD:
                        assert self.records[entry - RECORD] == content

    def start(self, name, full, part):
        """A sequence of ``full`` full pages of a chain and, with ``part``, one of its own."""
        wanted = full + part
        digests = digest(name % 3, full)
        key = (name, self.tiers.queue._next[0])
        if key in self.running or key in self.swapped:
            return
        on_gpu, on_host = self.tiers.find(digests)
        revived = sum(self.gpu.refcount(page) == 0 for page in on_gpu)
        if wanted - len(on_gpu) + revived > self.gpu.num_free:
            return
        pages, hits = self.tiers.take(digests, wanted)
        assert hits == len(on_gpu) + len(on_host)
        self.step(True)  # arrival
        contents = [*digests, *([f"private {key}"] * part)]
        for i in range(full):
            if i < hits:
                assert self.pools[True][pages[i]] == contents[i], "a hit holds something else"
            self.pools[True][pages[i]] = contents[i]
            self.gpu.publish(pages[i], digests[i])
        if part:
            self.pools[True][pages[-1]] = contents[-1]
        self.running[key] = (pages, contents)

    def pick(self, table, index):
        return sorted(table)[index % len(table)] if table else None

    def full(self, contents):
        return [c for c in contents if isinstance(c, bytes)]


actions = st.one_of(
    st.tuples(st.just("start"), st.integers(0, 8), st.integers(0, 4), st.integers(0, 1)),
    st.tuples(st.sampled_from(["end", "out", "back", "drop", "leave"]), st.integers(0, 9)),
    st.tuples(st.sampled_from(["spill", "spill", "recall"]), st.integers(0, 9)),
    st.tuples(st.just("step"), st.booleans(), st.sampled_from([None, None, "fault"])),
    st.tuples(st.just("clean"), st.integers(1, 4)),
    st.tuples(st.just("write"), st.integers(1, 6)),
    st.tuples(st.just("fetch"), st.integers(0, 2), st.integers(1, 4)),
)


@given(st.lists(actions, max_size=80))
@settings(max_examples=500, deadline=None)
def test_contents_survive_all_tiers(script):
    world = World()
    tiers = world.tiers
    for kind, *values in script:
        if kind == "start":
            name, full, part = values
            if full + part:
                world.start(name, full, part)
        elif kind == "end":
            key = world.pick(world.running, values[0])
            if key:
                tiers.free(world.running.pop(key)[0])
        elif kind == "out":
            key = world.pick(world.running, values[0])
            if key:
                entries, contents = world.running[key]
                if tiers.swap_cost(entries, world.full(contents)) is not None:
                    del world.running[key]
                    saved = tiers.swap_out(entries, world.full(contents))
                    world.swapped[key] = (saved, contents)
        elif kind == "back":
            key = world.pick(world.swapped, values[0])
            if key:
                saved, contents = world.swapped[key]
                digests = world.full(contents)
                left = values[0] % 2 if len(saved) > 1 else 0
                found = world.gpu.peek(digests[left:])
                revived = sum(world.gpu.refcount(page) == 0 for page in found)
                room = world.gpu.num_free - revived + len(found) + left
                if len(saved) <= room and LOST not in saved and tiers.archive.recall(saved):
                    del world.swapped[key]
                    entries = tiers.swap_in(saved, digests, len(saved), left)
                    tiers.read_in_place(entries)
                    tiers.queue.compute_on([e for e in entries if e < HOST_BITS])
                    world.running[key] = (entries, contents)
        elif kind == "drop":
            key = world.pick(world.swapped, values[0])
            if key:
                tiers.archive.release(world.swapped.pop(key)[0])
        elif kind in ("spill", "recall"):
            key = world.pick(world.swapped, values[0])
            if key and kind == "spill":
                tiers.archive.spill(world.swapped[key][0], world.full(world.swapped[key][1]))
            elif key:
                tiers.archive.recall(world.swapped[key][0])
        elif kind == "leave":
            key = world.pick(world.running, values[0])
            if key:
                entries, contents = world.running[key]
                for i, entry in enumerate(entries):
                    if entry < HOST_BITS:
                        known = contents[i] if isinstance(contents[i], bytes) else None
                        left = tiers.leave(entry, known)
                        if left is not None:
                            entries[i] = left
                        break
        elif kind == "step":
            world.step(*values)
        elif kind == "clean":
            tiers.clean(*values)
        elif kind == "write":
            tiers.archive.write_ahead(*values)
        elif kind == "fetch":
            tiers.archive.fetch(tiers.on_disk(digest(*values))[1])
        world.check()
    world.step(True)
    world.check()


def test_evicted_prefix_comes_back_from_the_host():
    world = World(0)
    world.start(0, 4, 0)
    key = world.pick(world.running, 0)
    world.tiers.free(world.running.pop(key)[0])
    world.start(1, 4, 0)  # evicts two of the first chain
    assert world.tiers.queue.num_moved == [0, 2]
    on_gpu, on_host = world.tiers.find(digest(0, 4))
    assert (len(on_gpu), len(on_host)) == (2, 2)
    world.tiers.free(world.running.pop(world.pick(world.running, 0))[0])
    world.start(0, 4, 0)
    assert world.tiers.queue.num_moved[0] == 2
    assert world.tiers.num_dropped == 0


def test_clean_copies_are_not_written_twice():
    world = World(0)
    world.start(0, 4, 0)
    world.tiers.free(world.running.pop(world.pick(world.running, 0))[0])
    world.tiers.clean(6)
    world.step(True)
    world.tiers.clean(6)
    world.start(1, 4, 0)
    assert world.tiers.queue.num_moved == [0, 4]


def test_disk_round_trip_and_faults():
    world = World()
    tiers = world.tiers
    world.start(0, 3, 0)
    tiers.free(world.running.pop(world.pick(world.running, 0))[0])
    tiers.clean(6)
    world.step(True)
    for _ in range(3):  # a quarter of the host pool may be on its way
        tiers.archive.write_ahead(5)
        world.step(True)
        world.step(True)
    assert tiers.archive.num_written == 3
    # Everything above the disk is forgotten.
    tiers.gpu.free(tiers.gpu.allocate(6))
    tiers.host.free(tiers.host.allocate(5))
    world.step(True)
    assert tiers.find(digest(0, 3)) == ([], [])
    tiers.archive.fetch(tiers.on_disk(digest(0, 3))[1])
    assert tiers.archive.is_fetching(digest(0, 3))
    for _ in range(4):
        world.step(True)
    assert tiers.archive.num_read == 3
    world.start(0, 3, 0)
    tiers.free(world.running.pop(world.pick(world.running, 0))[0])
    tiers.gpu.free(tiers.gpu.allocate(6))
    tiers.host.free(tiers.host.allocate(5))
    tiers.archive.fetch(tiers.on_disk(digest(0, 3))[1])
    for _ in range(4):
        world.step(True, "it broke")
    assert tiers.archive.num_errors == 3
    assert tiers.find(digest(0, 3)) == ([], [])
    assert not tiers.archive.is_fetching(digest(0, 3))
    tiers.archive.num_errors = DISK_ERRORS
    assert not tiers.archive.works
    world.check()


def test_swap_needs_room():
    world = World(0)
    world.start(0, 0, 1)
    world.start(1, 3, 1)
    _first, second = sorted(world.running)
    tiers = world.tiers
    held = tiers.host.allocate(2)
    entries, contents = world.running[second]
    assert tiers.swap_cost(entries, world.full(contents)) is None
    tiers.host.free(held)
    assert tiers.swap_cost(entries, world.full(contents)) == 4


def test_record_index():
    index = RecordIndex(2)
    a, b = index.allocate(), index.allocate()
    assert index.allocate() is None
    index.put(b"a", a)
    index.put(b"b", b)
    index.pin(b"a")
    assert index.allocate() == b  # a is being read
    assert b"b" not in index
    assert index.allocate() is None
    index.drop(b"a")
    assert b"a" in index  # another reader has it
    index.unpin(b"a")
    index.hold(b)
    index.check(0)
    assert (index.num_held, len(index)) == (1, 1)
    index.give_back(b)
    index.check(0)
    index.drop(b"a")
    assert len(index) == 0
    index.check(0)
    with pytest.raises(AssertionError, match="being written"):
        index.check(1)
