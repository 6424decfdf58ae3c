"""Scheduler: which tokens of which sequences run in the next step, on which KV pages.

Integers only, no torch. The whole policy:

1. The order is arrival: the request's, and among the outputs of one request the fork's.
2. Running sequences come first, oldest first: one token each while decoding, else the next chunk of
   the prompt, as far as max_num_batched_tokens goes. Where it does not reach, the next step begins
   with the first sequence left out, so all take turns.
3. Then waiting sequences are admitted, oldest first and none overtaking, while tokens, rows
   (max_num_seqs) and pages last. Pages for all known tokens are taken at admission, what the prefix
   cache holds is not computed again, and 1% of the pool is left to those that run already. One
   whose length is foreseen (expected_len) waits if the pool would run out before enough of the
   others end; not with tiers, where giving way costs little, nor if it is among the last and would
   run on alone for long.
4. A sequence that needs a page when none is free preempts the newest running one, itself if that is
   the newest; so none ever gives way to a newer one and the oldest always goes on. The preempted
   one gives up its pages, waits at its old place (before all later arrivals) and later computes
   prompt and output again. A sequence that outgrows the whole pool fails.
5. A step may be planned before the tokens of the one under way are known: a sequence counts as
   computed and one token longer from schedule() on, and the plan says where its input token will
   come from. One that ends with a token under way (a stop token) so costs a wasted row; one at its
   length limit is not planned again. Only sequences whose tokens are all known are admitted.
6. ``fork`` (n > 1) shares the prompt's pages. A child computes the last prompt token again and so
   draws its own first token; whoever writes to a page that others hold too gets a copy first
   (``Plan.copies``). A child without a row waits without pages, as if it were preempted.
7. With tiers under the pool (`Tiers`), whoever gives way goes to the host pool where that is
   cheaper than computing it again, some steps ahead of need, and comes back in its place. A
   sequence whose pages have to be moved in holds them at once but runs when they have come
   (``arriving``); only if there is nothing else to do does the step wait for them. One that is
   larger than the pool leaves its oldest pages on the host. While the host pool is nearly full,
   those that come back last go on to disk. What the disk has of the prefixes of waiting sequences
   is read if it comes by the time at which it would be computed.
"""

from collections.abc import Sequence as ListLike
from itertools import compress

import numpy as np

from torch_pd.engine.admission import Admission
from torch_pd.engine.flying import Flying
from torch_pd.engine.growth import Growth
from torch_pd.engine.plan import Plan
from torch_pd.engine.roster import Roster
from torch_pd.engine.sequence import Sequence, Status
from torch_pd.engine.swapper import SwapCosts, Swapper
from torch_pd.engine.tables import Tables
from torch_pd.kv.pages import PageAllocator
from torch_pd.kv.tiers import Tiers

STEPS_AHEAD = 4
"""Decoding steps for which pages are kept free by swapping."""


class Scheduler:
    """Continuous batching with chunked prefill over one page pool.

    The caller repeats: ``plan = schedule()``, run it, ``update(plan, tokens)``, then ``fork`` and
    ``finish`` as the tokens ask. It may schedule one plan more before it updates the last one;
    plans are run and updated in their order. ``add`` and ``abort`` may come at any time between
    these calls. A sequence at its length limit (`Sequence.at_length_limit`) must be finished.

    ``tables`` has a row for each running sequence, from which the runner gathers its tensors.

    Args:
        allocator: the pool; prefix caching is on if it is on there.
        block_size: tokens of a page.
        max_num_seqs: sequences running at once.
        max_num_batched_tokens: tokens of one step; may be under max_num_seqs.
        max_model_len: longest sequence in tokens, output included.
        tiers: the tiers under the pool (rule 7), None if there are none.
        costs: what decides between swapping and computing again; default: always swap.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        tiers: Tiers | None = None,
        costs: SwapCosts | None = None,
    ) -> None:
        for name, value, least in (
            ("block_size", block_size, 1),
            ("max_num_seqs", max_num_seqs, 1),
            ("max_num_batched_tokens", max_num_batched_tokens, 1),
            ("max_model_len", max_model_len, 2),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.allocator = allocator
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.admits = True
        """False: waiting sequences stay there as long as any runs."""
        self.tiers = tiers
        self.swapper = None
        most_pages = allocator.num_usable
        if tiers is not None:
            assert tiers.gpu is allocator
            self.swapper = Swapper(tiers, block_size, costs or SwapCosts())
            most_pages += tiers.host.num_usable
        self._most_pages = most_pages
        self._gpu_tokens = allocator.num_usable * block_size
        self.most_tokens = most_pages * block_size
        # What a step may take is copied down ahead of it.
        self._ahead = min(-(-max_num_batched_tokens // block_size), allocator.num_usable // 8)

        self.tables = Tables(max_num_seqs, -(-max_model_len // block_size), block_size)
        self.block_tables = self.tables.block_tables
        self.roster = Roster(allocator, self.swapper, self.tables)
        self.admission = Admission(self.roster)
        self._growth = Growth(self.roster)
        self._flying = Flying(self.roster)

    @property
    def num_running(self) -> int:
        """Sequences that hold a row and pages."""
        return self.roster.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing yet, or nothing any more."""
        return self.roster.num_waiting

    @property
    def has_unfinished(self) -> bool:
        """True while a sequence waits or runs; then schedule() returns work or failures."""
        return bool(self.roster.seqs)

    def add(self, seq: Sequence) -> int:
        """Queues a new sequence; returns its seq_id.

        Raises:
            ValueError: the prompt is empty, leaves no room for an output token (max_model_len,
                max_total_len), or would not fit the pool even alone.
        """
        assert seq.status is Status.NEW, f"sequence {seq.seq_id} was added before"
        n = seq.num_prompt
        if n == 0:
            raise ValueError("the prompt has no tokens; give at least one")
        if n > self.max_model_len - 1:
            raise ValueError(
                f"the prompt has {n} tokens, but max_model_len={self.max_model_len} allows "
                f"{self.max_model_len} - 1 = {self.max_model_len - 1} before the first output "
                "token: shorten the prompt or raise max_model_len"
            )
        pages, usable = self.tables.pages_for(n), self._most_pages
        if pages > usable:
            raise ValueError(
                f"the prompt's {n} tokens need {n} / {self.block_size} = {pages} KV pages, but the "
                f"whole pool has {usable} ({self.most_tokens} tokens): shorten the prompt "
                "or give the KV cache more memory"
            )
        limit = self.max_model_len if seq.max_total_len is None else seq.max_total_len
        if limit <= n:
            raise ValueError(f"max_total_len={limit} leaves no output token after {n} of prompt")
        seq.max_total_len = min(limit, self.max_model_len)
        self.roster.register(seq)
        self.roster.waiting.push(seq)
        return seq.seq_id

    def fork(self, parent: Sequence, n: int) -> list[Sequence]:
        """``n`` more outputs of the parent's prompt, running (as far as rows last) or waiting.

        To be called between the update() that gave the parent its first token and finish(). The
        children hold the prompt only; ``data`` is the parent's, for the engine to replace.

        Raises:
            ValueError: the parent has ended, or has not just sampled its first token.
        """
        live = parent.status in (Status.RUNNING, Status.WAITING)
        if not live or parent.num_output != 1:
            raise ValueError(
                f"{parent} cannot be forked: it must have just sampled its first token"
            )
        # All but the last prompt token are taken over: the child needs that one's logits. A parent
        # that the next plan preempted has nothing to share; one whose next step is under way writes
        # behind the prompt, so only the pages before are shared.
        computed = parent.num_prompt - 1
        ahead = parent.row >= 0 and self.tables.num_computed[parent.row] > parent.num_prompt
        if ahead:
            computed -= computed % self.block_size
        shared = parent.pages[: self.tables.pages_for(computed)]
        runs = parent.status is Status.RUNNING
        prompt = parent.token_ids[: parent.num_prompt]
        children = []
        for _ in range(n):
            child = Sequence(
                parent.request_id,
                prompt,
                max_total_len=parent.max_total_len,
                expected_len=parent.expected_len,
                space=parent.space,
            )
            child.data = parent.data
            child.digests = parent.digests[: parent.num_prompt // self.block_size]
            child.num_cached = parent.num_cached
            self.roster.register(child, parent)
            if runs and self.tables.free_rows:
                self.roster.pages.fork(shared)
                child.num_left = min(parent.num_left, len(shared))
                self.roster.run(child, list(shared), computed)
                if not ahead:
                    self.tables.forked[child.row] = self.tables.forked[parent.row] = True
            else:
                self.roster.waiting.push(child)
            children.append(child)
        return children

    def finish(self, seq: Sequence) -> None:
        """Ends a sequence that waits or runs and returns its pages; its tokens stay readable."""
        self.roster.end(seq, Status.FINISHED)

    def abort(self, seq_id: int) -> Sequence | None:
        """Ends a sequence, also one in the step under way; None if it has ended already."""
        seq = self.roster.seqs.get(seq_id)
        if seq is not None:
            self.finish(seq)
        return seq

    def schedule(self) -> Plan:
        """The next step. Without a step under way it holds work or failures whenever a sequence
        waits or runs; with one it may be empty, because all that is left waits for its tokens.

        Pages are taken, block tables written and tokens counted here; update() tells their values.
        """
        assert len(self._flying.plans) < 2, "update() the oldest plan first"
        self.roster.note_arrivals()
        early = self._make_room()
        self.admission.look_ahead()
        plan = self._plan(admit=not early)
        plan.preempted[:0] = early
        arriving = self.roster.arriving
        if not plan.seqs and arriving and not self._flying.plans:
            # Nothing else to do: the forward pass itself waits for the first ones.
            # (What comes from a peer is there before what comes from the host.)
            self.roster.note_arrivals(min(seq.arrival for seq in arriving))
            again = self._plan()
            again.preempted[:0], again.failed[:0] = plan.preempted, plan.failed
            plan = again
        if plan.seqs:
            if self.max_model_len > self._gpu_tokens:
                plan.note_places()
            self._flying.launch(plan)
        if self.tiers is not None:
            self._hand_over(self.tiers, plan)
        return plan

    def cancel(self, plan: Plan) -> None:
        """Forgets the newest plan, which could not be run: nothing of it counts as computed.

        Its copies may not have been made, so the caller then ends its sequences.
        """
        if plan.seqs:
            newest = self._flying.plans[-1] if self._flying.plans else None
            assert plan is newest, "this is not the plan under way"
            self._flying.cancel()

    def cancel_all(self) -> None:
        """Forgets all plans under way; the caller then ends all sequences."""
        while self._flying.plans:
            self._flying.cancel()

    def update(self, plan: Plan, sampled_tokens: ListLike[int] | np.ndarray) -> None:
        """Records the tokens that a plan sampled.

        Args:
            plan: the oldest one of schedule() that was not updated yet.
            sampled_tokens: [plan.num_samples], in the order of ``seqs`` where ``samples``. Those
                of sequences that ended meanwhile are dropped.
        """
        tokens = np.asarray(sampled_tokens, np.int64)
        assert tokens.shape == (plan.num_samples,), f"{tokens.shape} tokens for {plan.num_samples}"
        if plan.seqs:
            oldest = self._flying.plans[0] if self._flying.plans else None
            assert plan is oldest, "this is not the plan under way"
            self._flying.land(tokens)

    def _plan(self, admit: bool = True) -> Plan:
        """Which sequences run on which pages."""
        plan = self._plan_running()
        while plan.preempted and not plan.seqs and self.roster.running.seqs:
            # The only ones whose turn it was gave way, so it is the others' turn at once.
            again = self._plan_running()
            stuck = not again.preempted
            again.preempted[:0], again.failed[:0] = plan.preempted, plan.failed
            plan = again
            if stuck:
                break
        if admit and not plan.preempted and (self.admits or not self.roster.running.seqs):
            self.admission.admit(plan, self.max_num_batched_tokens - plan.num_tokens)
        return plan

    def _plan_running(self) -> Plan:
        """Rules 2 and 4: shares the tokens out, finds pages, preempts."""
        running, tables = self.roster.running.seqs, self.tables
        rows = self.roster.running.rows
        outgrown = (tables.num_tokens[rows] > self.most_tokens) & (tables.source[rows] < 0)
        failed = [self._fail(seq) for seq in list(compress(running, outgrown.tolist()))]
        rows = self.roster.running.rows
        starts, tokens = tables.num_computed[rows], tables.num_tokens[rows]
        # One at a limit ends as soon as its last token is known.
        over = (tokens >= tables.limit[rows]) | (tokens > self.most_tokens)
        wanted = np.where(over, 0, tokens - starts)
        if self.swapper is not None and bool((tokens > self._gpu_tokens).any()):
            for i in np.flatnonzero(tokens > self._gpu_tokens).tolist():
                wanted[i] = min(wanted[i], self.swapper.most_tokens(int(starts[i])))
        counts = self.roster.running.share(wanted, self.max_num_batched_tokens)
        ends = starts + counts
        copies: list[tuple[int, int]] = []
        preempted: list[Sequence] = []
        # Few sequences need a page or a copy in a step; only those cost a turn in Python.
        short = (ends > tables.capacity[rows]) | tables.forked[rows]
        for i in np.flatnonzero(short & (counts > 0)).tolist():
            if i >= len(running):
                break  # preempted, and so is all behind it
            seq, start, end = running[i], int(starts[i]), int(ends[i])
            while not self._growth.grow(seq, start, end, copies):
                preempted.append(self.roster.preempt())
                if preempted[-1] is seq:
                    break
        if preempted:
            rows, starts, counts = (a[: len(running)] for a in (rows, starts, counts))
        seqs = list(running)
        served = counts > 0
        if not served.all():
            seqs = list(compress(seqs, served.tolist()))
            rows, starts, counts = rows[served], starts[served], counts[served]
        plan = Plan(seqs, rows, starts, counts)
        plan.copies, plan.preempted, plan.failed = copies, preempted, failed
        return plan

    def _fail(self, seq: Sequence) -> Sequence:
        tokens, usable = len(seq.token_ids), self._most_pages
        seq.error = (
            f"the sequence's {tokens} tokens need {tokens} / {self.block_size} = "
            f"{self.tables.pages_for(tokens)} KV pages, but the whole pool has {usable}: "
            "ask for fewer tokens or give the KV cache more memory"
        )
        self.roster.end(seq, Status.FAILED)
        return seq

    # Tiers (rule 7).

    def _make_room(self) -> list[Sequence]:
        """Lets the newest sequences go to the host some steps before pages run out, so that their
        moves run beside a step and not ahead of one."""
        gone: list[Sequence] = []
        if self.swapper is None:
            return gone
        running = self.roster.running.seqs
        while len(running) > 1 and not self.roster.arriving:
            wanted = len(running) * STEPS_AHEAD // self.block_size
            victim = running[-1]
            computed = int(self.tables.num_computed[victim.row])
            if self.allocator.num_free >= wanted or not self.swapper.pays(victim, computed):
                break
            gone.append(self.roster.preempt())
        return gone

    def _hand_over(self, tiers: Tiers, plan: Plan) -> None:
        """Puts the step's moves and jobs into the plan."""
        assert self.swapper is not None
        archive = tiers.archive
        tiers.clean(self._ahead)
        self.swapper.spill()
        archive.write_ahead(tiers.host.num_usable // 2)  # the disk is slow: well ahead
        plan.moves, plan.waits = tiers.queue.take()
        archive.end_step()
        plan.jobs, archive.jobs = archive.jobs, []

    def check(self) -> None:
        """Raises AssertionError if a page or row is lost or used twice, or a table is wrong."""
        self.roster.check(self._flying.sampled())
