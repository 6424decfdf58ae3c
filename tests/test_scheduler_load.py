"""Scheduler: the same tokens, in bounded time, whatever arrives, forks and is aborted."""

import pytest
from fake_model import FakeModel, make
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from scheduler_machine import Machine


class SchedulerMachine(Machine):
    """Random arrivals, forks, aborts and steps under tight limits."""

    @initialize(
        usable=st.integers(1, 14),
        block_size=st.sampled_from([1, 2, 4]),
        seqs=st.integers(1, 5),
        tokens=st.sampled_from([1, 2, 3, 7, 64]),
        caching=st.booleans(),
        overlap=st.booleans(),
        stop_every=st.sampled_from([0, 4, 16]),
    )
    def start(self, usable, block_size, seqs, tokens, caching, overlap, stop_every):
        scheduler = make(usable, block_size, seqs, tokens, 40, caching)
        self.model = FakeModel(scheduler, overlap, stop_every)
        self.seqs = []

    @rule(
        shared=st.integers(0, 12),
        own=st.integers(0, 6),
        num_output=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        salt=st.integers(0, 1),
        no_lookup=st.sampled_from([False, False, True]),
        foreseen=st.none() | st.integers(1, 30),
    )
    def add(self, shared, own, num_output, n, salt, no_lookup, foreseen):
        prompt = [*range(shared), *(1000 + 10 * salt + i for i in range(own))]
        s = self.scheduler
        capacity = s.allocator.num_usable * s.block_size
        if not prompt or len(prompt) > min(capacity, s.max_model_len - 1):
            with pytest.raises(ValueError, match="token"):
                self.model.add(prompt, num_output)
            return
        seq = self.model.add(
            prompt, num_output, n, salt, no_prefix_lookup=no_lookup, expected_len=foreseen
        )
        self.seqs.append(seq)

    def teardown(self):
        if not hasattr(self, "model"):
            return
        self.end(1, 2)  # overlapped, a sequence ends a step later
        self.scheduler.check()
        self.scheduler.allocator.check([])
        assert self.scheduler.allocator.num_used == 0
        assert not self.scheduler.block_tables.any()


SchedulerMachine.TestCase.settings = settings(
    deadline=None, max_examples=150, stateful_step_count=30
)
TestScheduler = SchedulerMachine.TestCase
