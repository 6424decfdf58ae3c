"""Scheduler: each rule of its policy by itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_model import FakeModel, make
from hypothesis import given
from hypothesis import strategies as st

from torch_pd.engine.foresight import peak_pages
from torch_pd.engine.scheduler import Scheduler
from torch_pd.engine.sequence import Sequence, Status
from torch_pd.kv.pages import PageAllocator

ROOT = Path(__file__).parent.parent


def starts_and_counts(plan):
    return list(zip(plan.starts.tolist(), plan.counts.tolist(), strict=True))


# Requests.


def test_importing_the_scheduler_does_not_import_torch():
    code = (
        "import sys, types; package = types.ModuleType('torch_pd'); "
        f"package.__path__ = [{str(ROOT / 'torch_pd')!r}]; sys.modules['torch_pd'] = package; "
        "import torch_pd.engine.scheduler; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prompts_that_cannot_run_are_refused_with_the_arithmetic():
    s = make(usable=5, block_size=4, length=32)
    with pytest.raises(ValueError, match="no tokens"):
        s.add(Sequence("r", []))
    with pytest.raises(ValueError, match=r"32 tokens, but max_model_len=32 .* 32 - 1 = 31"):
        s.add(Sequence("r", range(32)))
    with pytest.raises(ValueError, match=r"21 tokens need 21 / 4 = 6 KV pages.* has 5 \(20 tok"):
        s.add(Sequence("r", range(21)))
    with pytest.raises(ValueError, match="max_total_len=5 leaves no output"):
        s.add(Sequence("r", range(5), max_total_len=5))
    assert not s.has_unfinished
    seq = Sequence("r", range(20), max_total_len=99)
    s.add(seq)
    assert seq.max_total_len == 32
    assert (s.num_waiting, s.num_running) == (1, 0)


@pytest.mark.parametrize(
    "bad", [{"block_size": 0}, {"max_num_seqs": 0}, {"max_num_batched_tokens": 0}]
)
def test_limits_must_be_positive(bad):
    good = {"block_size": 4, "max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 8}
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least 1, got 0"):
        Scheduler(PageAllocator(9), **{**good, **bad})
    with pytest.raises(ValueError, match="max_model_len must be at least 2"):
        Scheduler(PageAllocator(9), **{**good, "max_model_len": 1})


def test_misuse_is_caught():
    s = make(usable=9)
    seq = Sequence("r", [1, 2, 3])
    s.add(seq)
    with pytest.raises(AssertionError, match="added before"):
        s.add(seq)
    plan = s.schedule()
    late = s.schedule()
    with pytest.raises(AssertionError, match="update"):
        s.schedule()
    with pytest.raises(AssertionError, match=r"\(2,\) tokens for 1"):
        s.update(plan, [1, 2])
    with pytest.raises(AssertionError, match="not the plan under way"):
        s.update(late, [1])
    with pytest.raises(ValueError, match="cannot be forked"):
        s.fork(seq, 1)
    s.cancel(late)
    s.update(plan, [7])
    with pytest.raises(AssertionError, match="not the plan under way"):
        s.update(plan, [7])
    s.finish(seq)
    with pytest.raises(AssertionError, match="has ended already"):
        s.finish(seq)
    assert s.abort(seq.seq_id) is None


# Foresight.


@given(
    st.integers(1, 16),
    st.lists(st.tuples(st.integers(1, 99), st.integers(0, 99)), min_size=1, max_size=20),
)
def test_peak_is_that_of_a_run_to_the_end(block_size, sequences):
    tokens, left = np.array(sequences).T
    held = -(-tokens // block_size)
    peak = peak_pages(held, tokens, left, block_size)
    most = max(
        sum(-(-(n + step) // block_size) for n, more in sequences if more >= step)
        for step in range(100)
    )
    # A page that is started counts half.
    assert abs(peak - most) <= len(sequences) / 2 + 1


@pytest.mark.parametrize("known", [True, False])
def test_a_sequence_waits_where_pages_would_run_out_later(known):
    s = make(usable=40, block_size=4, seqs=64, tokens=64)
    s.admission.num_elsewhere = 1000  # more will come, so none of these are the last
    model = FakeModel(s)
    seqs = [model.add(range(8), 16, expected_len=24 if known else None) for _ in range(20)]
    most = 0
    while s.has_unfinished:
        model.step()
        most = max(most, s.num_running)
    assert all(seq.num_output == 16 for seq in seqs)
    if known:
        assert sum(seq.num_preemptions for seq in seqs) == 0
        assert most >= 40 * 4 // 24 - 1
    else:
        assert sum(seq.num_preemptions for seq in seqs) > 0


@pytest.mark.parametrize("last", [True, False])
def test_the_last_sequences_do_not_wait_to_run_on_alone(last):
    # 100 pages hold 16 of 24 tokens: two of the 18 do not fit to the end.
    s = make(usable=100, block_size=4, seqs=64, tokens=256)
    s.admission.num_elsewhere = 0 if last else 1000
    model = FakeModel(s)
    seqs = [model.add(range(8), 16, expected_len=24) for _ in range(18)]
    steps = 0
    while s.has_unfinished:
        model.step()
        steps += 1
    assert all(seq.num_output == 16 for seq in seqs)
    assert (sum(seq.num_preemptions for seq in seqs) > 0) == last
    # Those that give way come back for what they lack; those that wait need all their steps.
    assert steps < 25 if last else steps > 30


def test_who_gave_way_waits_for_its_pages():
    s = make(usable=40, block_size=4, seqs=64, tokens=256)
    model = FakeModel(s)
    seqs = [model.add(range(8), 16, expected_len=24) for _ in range(20)]
    while s.has_unfinished:
        model.step()
    assert max(seq.num_preemptions for seq in seqs) == 1


# Chunks, budget and order.


def test_prompt_is_computed_in_chunks_and_only_the_last_samples():
    model = FakeModel(make(usable=20, tokens=5))
    seq = model.add(range(12), 2)
    plans = [model.step() for _ in range(4)]
    assert [starts_and_counts(p) for p in plans] == [[(0, 5)], [(5, 5)], [(10, 2)], [(12, 1)]]
    assert [p.samples.tolist() for p in plans] == [[False], [False], [True], [True]]
    assert [p.max_query_len for p in plans] == [5, 5, 2, 1]
    assert seq.status is Status.FINISHED
    model.verify(seq)


def test_decodes_go_first_and_prompts_fill_the_rest():
    model = FakeModel(make(usable=50, tokens=8))
    a = model.add(range(3), 9)
    model.step()
    b, c = model.add(range(10), 1), model.add(range(4), 1)
    plan = model.step()
    assert (plan.seqs, plan.counts.tolist()) == ([a, b], [1, 7])
    plan = model.step()
    assert (plan.seqs, plan.counts.tolist()) == ([a, b, c], [1, 3, 4])


def test_nobody_overtakes_a_request_that_does_not_fit_yet():
    model = FakeModel(make(usable=6))
    a = model.add(range(13), 3)  # 4 pages
    b = model.add(range(9), 1)  # 3 pages
    c = model.add(range(2), 1)
    assert model.step().seqs == [a]
    assert model.step().seqs == [a]
    assert (b.status, c.status) == (Status.WAITING, Status.WAITING)
    model.step()
    assert model.step().seqs == [b, c]


def test_max_num_seqs_bounds_the_running():
    model = FakeModel(make(usable=50, seqs=2))
    seqs = [model.add([i, i], 3) for i in range(4)]
    assert model.step().seqs == seqs[:2]
    assert (model.scheduler.num_running, model.scheduler.num_waiting) == (2, 2)
    model.step()
    model.step()
    assert model.step().seqs == seqs[2:]


def test_a_budget_below_the_running_goes_round():
    model = FakeModel(make(usable=50, seqs=5, tokens=2))
    parent = model.add([1, 2], 8, n=5)
    model.step()
    family = [parent, *model.children]
    served = [[family.index(seq) for seq in model.step().seqs] for _ in range(5)]
    assert served == [[0, 1], [2, 3], [0, 4], [1, 2], [3, 4]]
    model.drain()
    for seq in family:
        model.verify(seq)


def test_a_long_prompt_and_decodes_share_a_small_budget():
    model = FakeModel(make(usable=50, seqs=4, tokens=2))
    decoders = [model.add([i], 20) for i in range(2)]
    model.step()
    model.scheduler.max_num_batched_tokens = 3
    late = model.add(range(30), 1)
    model.step()
    model.scheduler.max_num_batched_tokens = 2
    counts = dict.fromkeys([*decoders, late], 0)
    for _ in range(8):
        for seq, count in zip((plan := model.step()).seqs, plan.counts, strict=True):
            counts[seq] += count
    assert list(counts.values()) == [4, 4, 8]  # a step for the decoders, a step for the prompt


# Pages.


def test_the_newest_is_preempted_and_comes_back_first():
    model = FakeModel(make(usable=4))
    a, b = model.add(range(8), 7), model.add(range(8), 2, salt=1)
    c = model.add(range(2), 1, salt=2)
    assert model.step().seqs == [a, b]
    plan = model.step()
    assert (plan.seqs, plan.preempted) == ([a], [b])
    assert (b.status, b.pages, b.row, b.num_preemptions) == (Status.WAITING, [], -1, 1)
    assert len(b.token_ids) == 9
    while a.status is Status.RUNNING:
        model.step()
    plan = model.step()
    assert plan.seqs[:2] == [b, c]
    assert starts_and_counts(plan)[0] == (0, 9)  # prompt and output again
    model.drain()
    for seq in (a, b, c):
        model.verify(seq)


def test_a_sequence_that_needs_a_page_gives_way_to_older_ones():
    model = FakeModel(make(usable=4))
    a, b = model.add(range(5), 6), model.add(range(7), 6)
    model.step()
    model.step()
    plan = model.step()  # b needs a third page, a holds two and needs none
    assert (plan.seqs, plan.preempted) == ([a], [b])
    model.drain()
    model.verify(a)
    model.verify(b)


def test_a_sequence_that_outgrows_the_pool_fails_alone():
    model = FakeModel(make(usable=3))
    a, b = model.add(range(10), 20), model.add(range(2), 3)
    model.drain()
    assert (a.status, b.status) == (Status.FAILED, Status.FINISHED)
    assert "13 tokens need 13 / 4 = 4 KV pages, but the whole pool has 3" in a.error
    model.verify(a)
    model.verify(b)


def test_a_step_that_only_preempts_is_followed_by_the_others_turn():
    model = FakeModel(make(usable=4, tokens=1, seqs=2))
    a, b = model.add([1], 12), model.add([2], 12)
    model.drain()
    for seq in (a, b):
        model.verify(seq)


def test_a_hundredth_of_the_pool_is_kept_for_the_running():
    model = FakeModel(make(usable=200, tokens=2000, length=1000))
    a, b = model.add(range(100), 9), model.add(range(4 * 174), 9)
    c = model.add(range(4), 9)
    assert model.scheduler.admission.watermark == 2
    assert model.step().seqs == [a]  # 25 + 174 + 2 > 200
    model.scheduler.abort(b.seq_id)
    assert model.step().seqs == [a, c]


# Ends.


def test_abort_while_waiting_running_and_in_flight():
    model = FakeModel(make(usable=20, seqs=2))
    a, b, c = (model.add([i, 5, 6], 5) for i in range(3))
    model.step()
    assert model.scheduler.abort(c.seq_id) is c
    assert model.scheduler.abort(a.seq_id) is a
    assert model.scheduler.abort(a.seq_id) is None
    model.step()
    d = model.add([9], 5)
    plan = model.schedule()
    tokens = model.run(plan)
    assert plan.seqs == [b, d]
    model.scheduler.abort(b.seq_id)
    length = len(b.token_ids)
    model.finish_step(plan, tokens)
    assert len(b.token_ids) == length  # its token is dropped, d's is not
    assert d.num_output == 1
    model.drain()
    model.verify(d)
    assert model.scheduler.allocator.num_used == 0


def test_a_cancelled_plan_counts_for_nothing():
    model = FakeModel(make(usable=20))
    a = model.add(range(5), 3, n=2)
    model.step()
    plan = model.schedule()
    model.scheduler.abort(model.children[0].seq_id)
    model.scheduler.cancel(plan)
    model.scheduler.check()
    assert a.num_output == 1
    with pytest.raises(AssertionError, match="not the plan under way"):
        model.scheduler.update(plan, [1, 2])
    again = model.schedule()
    assert (again.seqs, starts_and_counts(again)) == ([a], [(5, 1)])
    model.finish_step(again, model.run(again))
    model.drain()
    model.verify(a)
    assert model.scheduler.allocator.num_used == 0


def test_aborted_waiting_sequences_leave_the_queue():
    s = make(usable=20, seqs=1)
    seqs = [Sequence("r", [1, 2]) for _ in range(100)]
    for seq in seqs:
        s.add(seq)
    for seq in seqs[1:]:
        s.abort(seq.seq_id)
        s.check()
    assert len(s.roster.waiting._heap) <= 2
    assert s.schedule().seqs == seqs[:1]
    assert s.num_waiting == 0


# Forks.


@pytest.mark.parametrize("prompt_len", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("caching", [False, True])
def test_children_share_the_prompt_and_copy_before_they_write(prompt_len, caching):
    model = FakeModel(make(usable=40, caching=caching))
    parent = model.add(range(prompt_len), 6, n=3)
    model.step()
    full, rest = divmod(prompt_len - 1, 4)
    assert model.scheduler.allocator.num_used == len(parent.pages)
    plan = model.step()
    assert plan.counts.tolist() == [1, 1, 1]
    assert plan.starts.tolist() == [prompt_len, prompt_len - 1, prompt_len - 1]
    # The parent writes behind the prompt, so it needs a copy only if that is the same page.
    writers = 3 if prompt_len % 4 else 2
    holders = 3
    assert len(plan.copies) == (min(writers, holders - 1) if rest else 0)
    for child in model.children:
        assert child.pages[:full] == parent.pages[:full]
        assert child.pages[full] != parent.pages[full]
    model.drain()
    family = [parent, *model.children]
    for seq in family:
        model.verify(seq)
    assert len({tuple(seq.token_ids) for seq in family}) == 3


def test_a_child_without_a_row_waits_at_its_parents_place():
    model = FakeModel(make(usable=40, seqs=2))
    parent, later, last = model.add(range(6), 2, n=3), model.add([1], 2), model.add([2], 2)
    model.step()
    first, second = model.children
    assert first.status is Status.WAITING  # later took the second row
    assert not first.pages
    model.step()
    assert model.step().seqs == [first, second]
    assert last.status is Status.WAITING
    model.drain()
    for seq in (parent, later, last, first, second):
        model.verify(seq)


def test_a_parent_that_ends_at_once_leaves_its_pages_to_the_children():
    model = FakeModel(make(usable=10, caching=True))
    parent = model.add(range(8), 1, n=2)
    model.step()
    assert parent.status is Status.FINISHED
    plan = model.step()
    assert (plan.seqs, plan.copies) == (model.children, [])  # the only holder needs no copy
    model.verify(model.children[0])


def test_only_a_parent_with_its_first_token_forks():
    model = FakeModel(make(usable=10, tokens=2))
    seq = model.add(range(3), 3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"output=0.* cannot be forked"):
            model.scheduler.fork(seq, 1)
        model.step()
    assert model.scheduler.fork(seq, 0) == []
    model.step()
    with pytest.raises(ValueError, match=r"running, prompt=3, output=2.* cannot be forked"):
        model.scheduler.fork(seq, 1)
    model.step()
    with pytest.raises(ValueError, match=r"finished, prompt=3, output=3.* cannot be forked"):
        model.scheduler.fork(seq, 1)


# Prefix cache.


def test_a_cached_prefix_is_not_computed_again_but_for_the_last_token():
    model = FakeModel(make(usable=40, caching=True))
    a = model.add(range(12), 5)
    model.drain()
    b, c = model.add(range(12), 1), model.add([*range(10), 77, 78, 79], 1)
    d = model.add(range(12), 1, no_prefix_lookup=True)
    plan = model.step()
    assert starts_and_counts(plan) == [(8, 4), (8, 5), (0, 12)]
    assert (b.num_cached, c.num_cached, d.num_cached) == (8, 8, 0)
    e = model.add([*a.token_ids[:16], 5], 1)  # the output's full page is cached as well
    assert starts_and_counts(model.step()) == [(16, 1)]
    for seq in (a, b, c, d, e):
        model.verify(seq)


def test_a_preempted_sequence_finds_its_own_pages():
    model = FakeModel(make(usable=6, caching=True))
    a, b = model.add(range(8), 9), model.add(range(50, 59), 9)
    model.step()
    while not b.num_preemptions:
        model.step()
    model.scheduler.abort(a.seq_id)
    plan = model.step()
    assert plan.seqs == [b]
    assert plan.starts[0] >= 8
    assert b.num_cached == 0  # of the prompt, at its first admission
    model.drain()
    model.verify(b)


def test_a_blocked_prompt_is_not_looked_up_at_every_step(monkeypatch):
    model = FakeModel(make(usable=8, caching=True))
    model.add(range(17), 6)
    b = model.add(range(100, 117), 1)
    calls = []
    allocator = model.scheduler.allocator
    peek = allocator.peek

    def counted(digests):
        calls.append(digests)
        return peek(digests)

    monkeypatch.setattr(allocator, "peek", counted)
    for _ in range(5):
        model.step()
    # Twice for the first request (to see, to take), once for the other.
    assert (len(calls), b.status) == (3, Status.WAITING)
    model.drain()
    model.verify(b)


# Steps planned ahead.


@pytest.mark.parametrize("prompt_len", [3, 4, 7])
def test_a_parent_whose_next_step_is_under_way_shares_full_pages_only(prompt_len):
    model = FakeModel(make(usable=20, caching=True), overlap=True)
    parent = model.add(range(prompt_len), 4, n=3)
    model.step()
    model.step()  # the parent's second token is under way when the first forks
    full = (prompt_len - 1) // 4
    assert [child.pages for child in model.children] == [parent.pages[:full]] * 2
    model.drain()
    for seq in (parent, *model.children):
        model.verify(seq)


def test_a_token_under_way_is_kept_when_its_sequence_is_preempted():
    model = FakeModel(make(usable=4), overlap=True)
    a, b = model.add(range(8), 7), model.add(range(8), 3, salt=1)
    model.step()
    plan = model.step()
    assert (plan.seqs, plan.preempted) == ([a], [b])
    assert (b.status, len(b.token_ids)) == (Status.WAITING, 9)
    model.drain()
    model.verify(a)
    model.verify(b)
