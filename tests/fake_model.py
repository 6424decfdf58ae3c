"""A model without weights: its next token depends on all tokens that the KV pages give back.

The pages are a dict of token lists, and a sequence is read through its row of the block tables. A
wrong page, table, copy or recompute therefore changes tokens, which must equal those of the
sequence alone.
"""

import zlib

import numpy as np

from torch_pd.engine.scheduler import Scheduler
from torch_pd.engine.sequence import Sequence, Status
from torch_pd.kv.pages import PageAllocator


def next_token(token_ids, salt):
    return zlib.crc32(np.array([salt, *token_ids], np.int32).tobytes()) % 50_000


def alone(prompt, salt, num_output, stop_every=0):
    ids = list(prompt)
    for _ in range(num_output):
        ids.append(next_token(ids, salt))
        if stop_every and ids[-1] % stop_every == 0:
            break
    return ids


def make(usable, block_size=4, seqs=8, tokens=64, length=256, caching=False):
    return Scheduler(
        PageAllocator(usable + 1, enable_prefix_caching=caching),
        block_size=block_size,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=length,
    )


class FakeModel:
    """Runs plans on simulated pages; ``data`` of a sequence is (salt, tokens to sample, forks).

    With ``overlap`` a plan is scheduled and run before the tokens of the one before are told. A
    multiple of ``stop_every`` (0: none) is a stop token.
    """

    def __init__(self, scheduler, overlap=False, stop_every=0):
        self.scheduler = scheduler
        self.stop_every = stop_every
        self.overlap = overlap
        self.under_way = None  # a plan that ran, and its tokens
        self.sampled: list[int] = []  # by the last plan that ran
        self.pages: dict[int, list] = {}
        self.children: list[Sequence] = []
        self.left_out: dict[int, int] = {}

    def add(self, prompt, num_output, n=1, salt=0, **kwargs):
        data = (salt, num_output, n - 1)
        total = len(prompt) + num_output
        seq = Sequence("r", prompt, max_total_len=total, data=data, **kwargs)
        self.scheduler.add(seq)
        return seq

    def schedule(self):
        s = self.scheduler
        before = {seq.seq_id for seq in s.roster.running.seqs}
        plan = s.schedule()
        s.check()
        idle = not plan.seqs and not plan.failed
        assert not idle or not s.has_unfinished or self.under_way, "no work although some is left"
        assert plan.num_tokens == plan.counts.sum() <= s.max_num_batched_tokens
        assert s.num_running <= s.max_num_seqs
        waiting = s.roster.waiting.check()
        running = s.roster.running.seqs
        for seq in plan.preempted:
            assert all(other.order < seq.order for other in running), "gave way to a newer one"
        for seq in running:
            if seq.seq_id not in before:
                assert all(other.order > seq.order for other in waiting), "overtook an older one"
            tokens = int(s.tables.num_tokens[seq.row])
            over = tokens >= seq.max_total_len or tokens > s.most_tokens
            served = seq in plan.seqs or over
            streak = self.left_out[seq.seq_id] = (
                0 if served else self.left_out.get(seq.seq_id, 0) + 1
            )
            assert streak < s.max_num_seqs, "left out twice while others ran twice"
        return plan

    def run(self, plan):
        """The tokens of a plan, read through the block tables."""
        s, size = self.scheduler, self.scheduler.block_size
        for page in s.allocator._blank if s.tiers is None else ():
            self.pages.pop(page, None)  # nobody may read it any more
        sources, targets = {a for a, _ in plan.copies}, [b for _, b in plan.copies]
        assert len(set(targets)) == len(targets)
        assert not sources & set(targets)
        for source, target in plan.copies:
            self.pages[target] = list(self.pages[source])
        written = set()
        for seq, row, start, count, source in zip(
            plan.seqs, plan.rows, plan.starts, plan.counts, plan.sources, strict=True
        ):
            assert row == seq.row
            assert count >= 1
            assert source < 0 or (count == 1 and start == len(seq.token_ids))
            for position in range(start, start + count):
                page = s.block_tables[row, position // size]
                slot = (page, position % size)
                assert page != 0
                assert slot not in written, "two sequences write to one slot"
                written.add(slot)
                token = self.sampled[source] if source >= 0 else seq.token_ids[position]
                held = self.pages.setdefault(page, [None] * size)
                shared = s.allocator.refcount(int(page)) > 1
                assert not shared or held[slot[1]] == token, "changed a shared page"
                held[slot[1]] = token
        tokens = []
        for seq, row, end, samples, source in zip(
            plan.seqs,
            plan.rows,
            plan.starts + plan.counts,
            plan.samples,
            plan.sources,
            strict=True,
        ):
            table = s.block_tables[row, : -(-end // size)]
            seen = [token for page in table for token in self.pages[page]][:end]
            known = len(seq.token_ids)
            assert seen[:known] == seq.token_ids[:end]
            assert samples == (end == known + (source >= 0))
            if samples:
                assert plan.positions[len(tokens)] == end - seq.num_prompt
                tokens.append(next_token(seen, seq.data[0]))
        self.sampled = tokens
        return tokens

    def finish_step(self, plan, tokens):
        s = self.scheduler
        s.update(plan, tokens)
        sampled = [q for q, x in zip(plan.seqs, plan.samples, strict=True) if x]
        for seq in sampled:
            if seq.status not in (Status.RUNNING, Status.WAITING):
                continue  # aborted in flight
            salt, num_output, forks = seq.data
            if seq.status is Status.RUNNING:
                assert s.tables.last_token[seq.row] == seq.token_ids[-1]
            if forks and seq.num_output == 1:
                for i, child in enumerate(s.fork(seq, forks)):
                    child.data = (salt + i + 1, num_output, 0)
                    self.children.append(child)
            stopped = self.stop_every and seq.token_ids[-1] % self.stop_every == 0
            if seq.at_length_limit or stopped:
                s.finish(seq)
        s.check()

    def step(self):
        plan = self.schedule()
        result = plan, self.run(plan)
        if self.overlap:
            result, self.under_way = self.under_way, result if plan.seqs else None
        if result is not None:
            self.finish_step(*result)
        return plan

    def settle(self):
        """Tells the tokens of the plan under way."""
        if self.under_way is not None:
            result, self.under_way = self.under_way, None
            self.finish_step(*result)

    def drain(self, limit=10_000):
        for steps in range(limit):
            if not self.scheduler.has_unfinished:
                self.settle()
                return steps
            self.step()
        raise AssertionError(f"unfinished after {limit} steps")

    def verify(self, seq):
        salt, num_output, _ = seq.data
        expected = alone(seq.token_ids[: seq.num_prompt], salt, num_output, self.stop_every)
        assert seq.token_ids == expected[: len(seq.token_ids)]
        if seq.status is Status.FAILED:
            s = self.scheduler
            assert len(seq.token_ids) == s.most_tokens + 1
            assert f"the whole pool has {s._most_pages}" in seq.error
        elif seq.status is Status.FINISHED:
            assert len(seq.token_ids) == len(expected)
