"""KV pools whose memory is mapped on demand: contents, accounting, and the engine's tokens."""

import gc
import itertools
import logging
import re

import pytest
import torch
import torch_pd._runtime as _runtime
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from models import tokens_of
from ranks import run_ranks
from test_llm_tiers import PAGE_GIB, work

from torch_pd import LLM, SamplingParams
from torch_pd.kv import elastic
from torch_pd.kv.elastic import AGE, AT_ONCE, WINDOW, ElasticPages
from torch_pd.kv.pages import OutOfPages, PageAllocator
from torch_pd.sizing import GIB, MOST_CHUNK, Ledger, chunk_bytes

CPU = torch.device("cpu")
UNIT = _runtime.chunk_unit(-1)


class Scarce:
    """An ElasticMemory of a machine that has memory for ``room`` chunks now."""

    def __init__(self, memory: _runtime.ElasticMemory, room: int) -> None:
        self._memory, self.room = memory, room

    def __getattr__(self, name):
        return getattr(self._memory, name)

    def map(self, chunks: int) -> int:
        return self._memory.map(max(self.mapped, min(chunks, self.room)))


def resident(pages: ElasticPages) -> int:
    """Bytes of the pool that the kernel holds memory for."""
    first = pages.records.data_ptr()
    with open("/proc/self/smaps") as file:
        text = file.read()
    total = 0
    for low, high, kib in re.findall(
        r"^(\w+)-(\w+) [^\n]*\n(?:\w+:[^\n]*\n)*?Rss: +(\d+)", text, re.M
    ):
        if first <= int(low, 16) < first + pages.nbytes or int(low, 16) <= first < int(high, 16):
            total += int(kib) * 1024
    return total


def test_memory_grows_and_shrinks_under_fixed_addresses():
    chunk = 256 * UNIT
    pages = ElasticPages(64, chunk // 4, CPU, chunk)
    records = pages.records
    assert pages.num_pages == 4
    assert pages.mapped_bytes == chunk
    assert resident(pages) <= chunk
    pages.grow(64)
    records.fill_(7)
    assert resident(pages) >= 16 * chunk
    allocator = PageAllocator(64, backing=pages)
    held = allocator.allocate(9)
    pages.rest(allocator)
    assert pages.num_pages == 12
    assert pages.mapped_bytes == 3 * chunk
    assert pages.most_bytes == 16 * chunk
    assert resident(pages) <= 4 * chunk
    assert (records[:12] == 7).all()
    assert not records[12:].any()  # reads as zero, and takes no memory for it
    assert resident(pages) <= 4 * chunk
    allocator.free(held)
    del pages, allocator
    gc.collect()
    assert records[1, 0] == 7  # the tensor keeps the memory


@pytest.mark.parametrize("size", [0, 1, UNIT - 1, UNIT + 1])
def test_chunks_are_whole_units(size):
    with pytest.raises(ValueError, match="chunks of whole units"):
        _runtime.ElasticMemory(-1, 10 * UNIT, size)
    assert chunk_bytes(size, UNIT) == UNIT


def test_chunk_sizes():
    assert chunk_bytes(GIB, 2 << 20) == 4 << 20
    assert chunk_bytes(60 * GIB, 2 << 20) == MOST_CHUNK
    assert chunk_bytes(-5, 2 << 20) == 2 << 20


def test_lowest_pages_first_and_a_cached_prefix_after_all_that_can_be_mapped():
    pages = ElasticPages(12, UNIT, CPU, UNIT)
    allocator = PageAllocator(12, enable_prefix_caching=True, backing=pages)
    held = allocator.allocate(4)
    assert held == [1, 2, 3, 4]
    assert pages.num_pages == 5
    allocator.publish(2, b"two")
    allocator.free([2, 3])
    assert allocator.allocate(2) == [3, 5]
    assert allocator.peek([b"two"]) == [2]
    assert allocator.allocate(6) == [6, 7, 8, 9, 10, 11]
    assert allocator.num_free == 1
    assert allocator.allocate(1) == [2]
    assert allocator.num_cached == 0
    with pytest.raises(OutOfPages):
        allocator.allocate(1)


def test_a_pool_that_cannot_grow_is_full_as_it_is(caplog, monkeypatch):
    pages = ElasticPages(12, UNIT, CPU, UNIT)
    pages._memory = Scarce(pages._memory, room=5)
    allocator = PageAllocator(12, enable_prefix_caching=True, backing=pages)
    now = itertools.count(100.0, 0.001)
    monkeypatch.setattr(elastic.time, "monotonic", lambda: next(now))
    (page,) = allocator.allocate(1)
    allocator.publish(page, b"x")
    allocator.free([page])
    with caplog.at_level(logging.WARNING):
        assert not allocator.secure(5)
        assert allocator.num_free == 4
        assert allocator.num_blank == 3
        with pytest.raises(OutOfPages, match="6 pages wanted, 4 of 11 are free"):
            allocator.allocate(6)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "the KV pool cannot grow: 0.00 of 0.00 GiB are mapped"
    ]
    assert allocator.allocate(4) == [2, 3, 4, page]  # the cached one was evicted
    assert allocator.secure(0)
    pages._memory.room = 8
    assert not allocator.secure(1)  # not tried again so soon
    assert pages.num_failures == 1
    assert allocator.secure(1, insist=True)
    assert allocator.num_free == 7
    assert not allocator.secure(7)
    assert allocator.num_free == 3
    pages._memory.room = 12
    now = itertools.count(200.0)
    pages.step(allocator)
    assert allocator.num_free == 7
    allocator.check([[2, 3, 4, page]])


def test_a_window_gives_back_what_was_not_held_and_old_prefixes():
    pages = ElasticPages(400, UNIT, CPU, UNIT)
    allocator = PageAllocator(400, enable_prefix_caching=True, backing=pages)

    def steps(n):
        for _ in range(n):
            pages.step(allocator)

    first = allocator.allocate(20)
    rest = allocator.allocate(300)
    for page in rest[-2:]:
        allocator.publish(page, bytes([page % 256]))
    allocator.free(rest)
    assert pages.num_pages == 321
    steps(WINDOW)
    assert pages.num_pages == 321  # so many were held in this window
    steps(WINDOW)
    assert pages.num_pages == 321  # the last ones are cached
    assert allocator.lookup([bytes([rest[-1] % 256])]) == [rest[-1]]
    allocator.free([rest[-1]])
    steps(WINDOW)
    assert allocator.num_cached == 2
    steps((AGE - 1) * WINDOW)
    assert allocator.num_cached == 1
    steps(3 * WINDOW)
    assert allocator.num_cached == 0
    assert pages.num_pages == 20 + 1 + 5 + 1
    steps(WINDOW)
    assert pages.mapped_bytes == pages.num_pages * UNIT
    # A part at a time; what is wanted again meanwhile is not mapped anew.
    more = allocator.allocate(200)
    allocator.free(more)
    steps(2 * WINDOW)
    assert pages.num_pages == 27
    mapped = pages._mapped()
    assert mapped == 221
    steps(1)
    assert pages._mapped() == mapped - AT_ONCE
    assert allocator.allocate(100) == more[:100]
    assert pages.num_pages == pages._memory.mapped == mapped - AT_ONCE
    allocator.check([first, more[:100]])


@settings(max_examples=30, stateful_step_count=30, deadline=None)
class PoolMachine(RuleBasedStateMachine):
    """Sequences of pages with contents of their own, on a machine whose memory comes and goes."""

    @initialize(
        num_pages=st.integers(3, 60),
        # Pages smaller and larger than chunks, and across their borders.
        page_bytes=st.sampled_from([UNIT // 4, UNIT, 3 * UNIT // 2, 5 * UNIT]),
        caching=st.booleans(),
    )
    def setup(self, num_pages, page_bytes, caching):
        self.pages = ElasticPages(num_pages, page_bytes, CPU, UNIT)
        self.memory = self.pages._memory = Scarce(self.pages._memory, 1 << 30)
        self.allocator = PageAllocator(num_pages, enable_prefix_caching=caching, backing=self.pages)
        self.records = self.pages.records
        self.address = self.records.data_ptr()
        self.tables: list[list[int]] = []
        self.contents: dict[int, int] = {}
        self.cached: dict[bytes, int] = {}
        self.count = 0

    def _write(self, page):
        self.count += 1
        self.contents[page] = self.count % 255 + 1
        self.records[page].fill_(self.contents[page])

    @rule(n=st.integers(0, 12))
    def allocate(self, n):
        free = self.allocator.num_free
        try:
            table = self.allocator.allocate(n)
        except OutOfPages:
            assert n > free or self.pages.stuck
            return
        assert all(page < self.pages.num_pages for page in table)
        for page in table:
            self._write(page)
        self.tables.append(table)

    @rule(data=st.data())
    def free(self, data):
        if self.tables:
            table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
            self.allocator.free(table)

    @rule(data=st.data())
    def publish(self, data):
        held = [page for table in self.tables for page in table]
        if held:
            page = data.draw(st.sampled_from(held))
            digest = b"%d" % page + bytes([self.contents[page]])
            if page not in self.allocator._digest_of and self.allocator.publish(page, digest):
                self.cached[digest] = self.contents[page]

    @rule(data=st.data())
    def revive(self, data):
        if self.cached:
            digest = data.draw(st.sampled_from(sorted(self.cached)))
            found = self.allocator.lookup([digest])
            if found:
                assert (self.records[found[0]] == self.cached[digest]).all()
                self.contents[found[0]] = self.cached[digest]
                self.tables.append(found)

    @rule(steps=st.sampled_from([1, 3, WINDOW, AGE * WINDOW]))
    def step(self, steps):
        for _ in range(steps):
            self.pages.step(self.allocator)

    @rule()
    def rest(self):
        self.pages.rest(self.allocator)
        wanted = self.pages._chunks(max(2, self.allocator.last_used() + 1))
        assert self.pages._mapped() <= wanted + self.pages._chunks(1)

    @rule(room=st.sampled_from([0, 1, 5, 20, 1 << 30]))
    def memory_changes(self, room):
        self.memory.room = room
        self.pages._retry_at = 0.0

    @invariant()
    def sound(self):
        self.allocator.check(self.tables)
        assert self.records.data_ptr() == self.address
        assert self.pages.mapped_bytes == self.memory.mapped * UNIT  # (waits)
        assert self.pages.num_pages <= self.pages._pages(self.memory.mapped)
        for table in self.tables:
            for page in table:
                assert (self.records[page] == self.contents[page]).all(), page
        flat = self.records.view(-1)
        assert not flat[self.memory.mapped * UNIT :].any()


TestPoolMachine = PoolMachine.TestCase


# --- the engine ---


@pytest.fixture(scope="module")
def model():
    import models

    return models.build("llama")


@pytest.fixture(scope="module")
def gib(model):
    """GiB of a page."""
    with LLM(model, kv_cache_gib=0.01, max_model_len=64) as llm:
        return llm.engine.pool.page_bytes * PAGE_GIB


def run(model, prompts, params, calls=1, **config):
    """Tokens, what is mapped after each call, and statistics."""
    found, mapped = [], []
    with LLM(model, max_model_len=160, max_num_batched_tokens=96, **config) as llm:
        for _ in range(calls):
            found.append(tokens_of(llm.generate(prompts, params, use_tqdm=False)))
            mapped.append(llm.stats().get("kv_mapped_bytes"))
        llm.engine.scheduler.check()
        return found, mapped, llm.stats()


@pytest.mark.parametrize("caching", [False, True])
def test_tokens_are_those_of_a_pool_allocated_whole(model, gib, caching, monkeypatch):
    monkeypatch.setattr(elastic, "WINDOW", 5)
    prompts, params = work(12, seed=int(caching))
    config = {"kv_cache_gib": 60.5 * gib, "max_num_seqs": 8, "enable_prefix_caching": caching}
    expected, _, before = run(model, prompts, params, 2, **config)
    found, mapped, stats = run(model, prompts, params, 2, elastic_kv=True, **config)
    assert found == expected
    assert (stats["steps"], stats["preemptions"]) == (before["steps"], before["preemptions"])
    assert mapped[1] <= stats["kv_mapped_bytes_most"] <= 61 * gib * GIB + UNIT
    if not caching:
        assert mapped[1] <= 2 * gib * GIB + UNIT
    else:
        assert stats["prefix_pages_hit"] > 0


def test_with_tiers(model, gib, tmp_path, monkeypatch):
    monkeypatch.setattr(elastic, "WINDOW", 5)
    prompts, params = work(16, seed=1)
    expected, _, _ = run(model, prompts, params, kv_cache_gib=0.05)
    found, _, stats = run(
        model, prompts, params, elastic_kv=True, kv_cache_gib=14.5 * gib, host_kv_gib=24.5 * gib,
        max_num_seqs=8, disk_kv_gib=60.5 * gib, disk_kv_path=str(tmp_path),
    )  # fmt: skip
    assert found == expected
    assert stats["moved_in_bytes"] > 0
    assert stats["kv_mapped_bytes_most"] > 0


def two_ranks(rank: int, tiny, config, prompts, params, expected) -> None:
    for more in (
        {},
        {"weights": "pooled", "remote_mode": "auto", "param_ranks": [0], "data_ranks": [1]},
    ):
        with LLM(tiny, elastic_kv=True, **config, **more) as llm:
            assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected, more
            for other, stats in enumerate(llm.stats()["ranks"]):
                holds = not more.get("data_ranks") or other in more["data_ranks"]
                assert ("kv_mapped_bytes" in stats) == holds
                if holds:
                    assert stats["kv_mapped_bytes"] < stats["kv_mapped_bytes_most"]


def test_two_ranks(tiny):
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = [[5 + i, 6, 7 + 3 * i] * (1 + i % 9) for i in range(23)]
    config = {"kv_cache_gib": 0.01, "max_model_len": 256, "max_num_batched_tokens": 64}
    with LLM(tiny, **config) as llm:
        expected = tokens_of(llm.generate(prompts, params, use_tqdm=False))
    run_ranks(2, two_ranks, tiny, config, prompts, params, expected)


def scarce(monkeypatch, room):
    """Engines made from here on find memory for ``room`` chunks, which the list's entry changes."""
    left = [room]
    made = ElasticPages.__init__

    def init(self, *args):
        made(self, *args)
        self._memory = Scarce(self._memory, 0)
        type(self._memory).room = property(lambda _: left[0], lambda *_: None)

    monkeypatch.setattr(ElasticPages, "__init__", init)
    return left


@pytest.mark.parametrize("host", [0, 24.5])
def test_less_memory_than_planned_lets_sequences_give_way(model, gib, monkeypatch, caplog, host):
    monkeypatch.setattr(elastic, "RETRY_S", 0.001)
    prompts, params = work(12, seed=3)
    config = {"kv_cache_gib": 60.5 * gib, "max_num_seqs": 8}
    expected, _, _ = run(model, prompts, params, **config)
    scarce(monkeypatch, int(20 * gib * GIB) // UNIT)
    found, _, stats = run(model, prompts, params, elastic_kv=True, host_kv_gib=host * gib, **config)
    assert found == expected
    assert stats["kv_growth_failures"] > 0
    assert stats["preemptions"] > 0
    assert [r.levelname for r in caplog.records].count("WARNING") == 1


def test_no_memory_for_a_single_sequence_is_an_error_and_the_engine_goes_on(
    model, gib, monkeypatch
):
    prompts = [[5 + i % 90 for i in range(100)]]
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, detokenize=False)
    config = {"kv_cache_gib": 60.5 * gib, "max_model_len": 160}
    with LLM(model, **config) as llm:
        expected = tokens_of(llm.generate(prompts, params, use_tqdm=False))
    left = scarce(monkeypatch, int(5 * gib * GIB) // UNIT)
    with LLM(model, elastic_kv=True, **config) as llm:
        with pytest.raises(RuntimeError, match="a sequence of 100 tokens: the KV pool cannot grow"):
            llm.generate(prompts, params, use_tqdm=False)
        left[0] = 1 << 20
        assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected


def test_the_ledger_counts_what_is_mapped():
    ledger = Ledger(100 * GIB, 0.9, {"weights": 10 * GIB, "KV filler": MOST_CHUNK})
    text = ledger.table(60 * GIB, "mapped on demand", 12 * GIB + MOST_CHUNK, 58 * GIB)
    assert "+0.00 GiB  more than this in use" in text
    assert "60.00 GiB  KV pages (mapped on demand)" in text
