"""Scheduler over tiers: the same tokens, whatever moves when, fails on disk or is aborted."""

import random

import pytest
from fake_model import make
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from scheduler_machine import Machine
from tiered_model import TieredModel, make_tiered

from torch_pd.engine.sequence import Status
from torch_pd.engine.swapper import SwapCosts


class TieredMachine(Machine):
    """Random arrivals, forks, aborts and steps over tiny pools."""

    @initialize(
        usable=st.integers(1, 10),
        host=st.integers(1, 12),
        records=st.sampled_from([0, 0, 3, 20]),
        peer=st.integers(0, 5),
        block_size=st.sampled_from([1, 2, 4]),
        seqs=st.integers(1, 5),
        tokens=st.sampled_from([1, 3, 7, 64]),
        caching=st.booleans(),
        overlap=st.booleans(),
        stop_every=st.sampled_from([0, 4, 16]),
        recompute=st.booleans(),
        faults=st.sampled_from([0.0, 0.3]),
        seed=st.integers(0, 1000),
    )
    def start(
        self,
        usable,
        host,
        records,
        peer,
        block_size,
        seqs,
        tokens,
        caching,
        overlap,
        stop_every,
        recompute,
        faults,
        seed,
    ):
        costs = SwapCosts(1.0, 1.0) if recompute else None
        peer = 0 if records else peer
        host -= min(host, peer)  # perhaps nothing is left of it
        scheduler = make_tiered(
            usable, host, records, block_size, seqs, tokens, 40, caching, costs, peer
        )
        self.model = TieredModel(
            scheduler, random.Random(seed), faults, overlap=overlap, stop_every=stop_every
        )
        self.seqs = []

    @rule(
        shared=st.integers(0, 20),
        own=st.integers(0, 6),
        num_output=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        salt=st.integers(0, 1),
        no_lookup=st.sampled_from([False, False, True]),
    )
    def add(self, shared, own, num_output, n, salt, no_lookup):
        prompt = [*range(shared), *(1000 + 10 * salt + i for i in range(own))]
        s = self.scheduler
        if not prompt or len(prompt) > min(s.most_tokens, s.max_model_len - 1):
            with pytest.raises(ValueError, match="token"):
                self.model.add(prompt, num_output)
            return
        seq = self.model.add(prompt, num_output, n, salt, no_prefix_lookup=no_lookup)
        self.seqs.append(seq)

    def teardown(self):
        if not hasattr(self, "model"):
            return
        self.end(4, 50)
        tiers = self.scheduler.tiers
        assert tiers.gpu.num_used == 0
        for _ in range(20):
            self.model.schedule()
            self.model.until([n - 1 for n in tiers.queue._next])
            tiers.queue.done = list(self.model.done)
            while self.model.jobs:
                self.model.end(self.model.jobs.pop())
        if not tiers.archive.busy:
            assert tiers.host.num_used == 0


TestTiers = TieredMachine.TestCase
TestTiers.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, phases=[Phase.generate]
)


def test_swap_instead_of_recompute():
    """Two sequences that outgrow the pool together: the newer one goes to the host and comes back,
    and no token is computed twice."""
    model = TieredModel(make_tiered(6, 6, block_size=2, tokens=16, length=40), random.Random(0))
    first, second = model.add([1, 2, 3, 4], 8), model.add([5, 6, 7, 8], 8)
    computed = 0
    while model.scheduler.has_unfinished:
        computed += model.step().num_tokens
    model.verify(first)
    model.verify(second)
    assert second.num_preemptions >= 1
    assert model.scheduler.swapper.num_swapped == second.num_preemptions
    assert computed == 2 * (4 + 7)
    moved = model.scheduler.tiers.queue.num_moved
    assert moved[0] == moved[1] > 0


def test_recompute_where_that_is_cheaper():
    costs = SwapCosts(page_seconds=1.0, token_seconds=0.1)
    scheduler = make_tiered(6, 6, block_size=2, tokens=16, length=40, costs=costs)
    model = TieredModel(scheduler, random.Random(0))
    first, second = model.add([1, 2, 3, 4], 8), model.add([5, 6, 7, 8], 8)
    model.drain()
    model.verify(first)
    model.verify(second)
    assert second.num_preemptions >= 1
    assert scheduler.swapper.num_swapped == 0
    assert scheduler.tiers.queue.num_moved == [0, 0]


@pytest.mark.parametrize("tokens", [3, 64])
def test_a_sequence_larger_than_the_gpu_pool(tokens):
    scheduler = make_tiered(5, 20, block_size=2, tokens=tokens, length=50)
    model = TieredModel(scheduler, random.Random(1))
    long = model.add(list(range(30)), 18)
    short = model.add([7, 8], 6)
    in_place = staged = 0
    while scheduler.has_unfinished:
        plan = model.step()
        in_place += plan.in_place
        staged += plan.num_staged
    model.verify(long)
    model.verify(short)
    assert in_place > staged > 0
    assert len(long.token_ids) == 48
    scheduler.check()


@pytest.mark.parametrize("faults", [0.0, 0.2])
@pytest.mark.parametrize("caching", [False, True])
def test_swapped_sequences_go_on_to_disk(caching, faults):
    """The host pool is too small for all that give way: without a disk some are computed again."""
    computed = []
    for records in (0, 60):
        scheduler = make_tiered(
            16, 10, records, block_size=2, seqs=8, tokens=32, length=40, caching=caching
        )
        model = TieredModel(scheduler, random.Random(3), faults)
        seqs = [model.add([100 * i, 7], 24) for i in range(8)]
        count = 0
        while scheduler.has_unfinished:
            count += model.step().num_tokens
        for seq in seqs:
            model.verify(seq)
        computed.append(count)
        archive = scheduler.tiers.archive
        assert (archive.num_spilled > 0) is (records > 0)
        assert not scheduler.swapper.away
        scheduler.check()
    assert archive.num_read > 0
    if not faults:
        assert computed[1] < computed[0]


def test_look_ahead_weighs_the_disk_against_computing():
    """A slow disk is asked only for what comes in time."""
    found = {}
    for page_seconds in (0.0, 6.0, 1e9):
        costs = SwapCosts(token_seconds=1.0)
        scheduler = make_tiered(
            8, 20, 60, block_size=2, seqs=2, tokens=64, length=60, caching=True, costs=costs
        )
        scheduler.tiers.archive.page_seconds = page_seconds
        model = TieredModel(scheduler, random.Random(2))
        prefixes = [[100 * i + j for j in range(10)] for i in range(8)]
        for question in range(2):
            seqs = [model.add([*prefix, 1000 + question, 7], 2) for prefix in prefixes]
            model.drain()
            for seq in seqs:
                model.verify(seq)
            for _ in range(40):
                model.step()
        found[page_seconds] = scheduler.tiers.archive.num_read
    assert found[0.0] > found[6.0] > found[1e9] == 0


def test_all_tiers_full_still_fails_with_arithmetic():
    scheduler = make_tiered(2, 2, block_size=2, length=50)
    model = TieredModel(scheduler, random.Random(1))
    seq = model.add(list(range(6)), 18)
    model.drain()
    model.verify(seq)
    assert seq.status is Status.FAILED
    with pytest.raises(
        ValueError, match=r"9 tokens need 9 / 2 = 5 KV pages, .* has 4 \(8 tokens\)"
    ):
        model.add(list(range(9)), 2)


def test_shared_prefix_is_computed_once_over_all_tiers():
    """Prefixes of three times the GPU pool, asked for in turn: the second round computes no prefix
    again; it comes from the host or from disk."""
    for host, records in ((40, 0), (8, 40)):
        scheduler = make_tiered(8, host, records, block_size=2, tokens=64, length=60, caching=True)
        model = TieredModel(scheduler, random.Random(2))
        prefixes = [[100 * i + j for j in range(10)] for i in range(5)]
        rounds = []
        for question in range(2):
            computed = 0
            for prefix in prefixes:
                seq = model.add([*prefix, 1000 + question, 7], 2)
                while scheduler.has_unfinished:
                    computed += model.step().num_tokens
                model.verify(seq)
                for _ in range(12):  # time for moves and jobs
                    model.step()
            rounds.append(computed)
        assert rounds[0] == 5 * (12 + 1)
        # What comes down in one step may outrun the disk.
        assert rounds[1] <= 5 * (2 + 1) + (10 if records else 0)


def test_without_tiers_nothing_changes():
    scheduler = make(4)
    assert scheduler.tiers is None
    assert scheduler.swapper is None
