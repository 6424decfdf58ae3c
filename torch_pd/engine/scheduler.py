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
   others end; not with tiers, where giving way costs little.
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

from collections import Counter, deque
from collections.abc import Sequence as ListLike
from itertools import compress

import numpy as np

from torch_pd.engine.foresight import peak_pages
from torch_pd.engine.plan import Plan
from torch_pd.engine.running import Running
from torch_pd.engine.sequence import Sequence, Status
from torch_pd.engine.swapper import SwapCosts, Swapper
from torch_pd.engine.tables import Tables
from torch_pd.engine.waiting import Waiting
from torch_pd.kv.moves import HOST_BITS
from torch_pd.kv.pages import PageAllocator
from torch_pd.kv.tiers import Tiers

STEPS_AHEAD = 4
"""Decoding steps for which pages are kept free by swapping."""
LOOK_AHEAD = 16
"""Waiting sequences for which the disk is read."""


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
        self.watermark = allocator.num_usable // 100
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

        self.tables = Tables(max_num_seqs, self._pages_for(max_model_len), block_size)
        self.block_tables = self.tables.block_tables

        self._seqs: dict[int, Sequence] = {}  # all that wait or run
        self._next_id = 0
        self._running = Running()
        self._waiting = Waiting()
        self._arriving: list[Sequence] = []  # in the order of their tickets
        self._blocked: tuple[Sequence | None, int] = None, 0  # did not fit into so many free pages
        self._flying: deque[Plan] = deque()  # between schedule and update, at most two

    @property
    def num_running(self) -> int:
        """Sequences that hold a row and pages."""
        return self.max_num_seqs - len(self.tables.free_rows)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing yet, or nothing any more."""
        return len(self._seqs) - self.num_running

    @property
    def has_unfinished(self) -> bool:
        """True while a sequence waits or runs; then schedule() returns work or failures."""
        return bool(self._seqs)

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
        pages, usable = self._pages_for(n), self._most_pages
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
        self._register(seq, arrival=self._next_id)
        self._waiting.push(seq)
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
        shared = parent.pages[: self._pages_for(computed)]
        runs = parent.status is Status.RUNNING
        prompt = parent.token_ids[: parent.num_prompt]
        children = []
        for _ in range(n):
            child = Sequence(
                parent.request_id,
                prompt,
                max_total_len=parent.max_total_len,
                expected_len=parent.expected_len,
            )
            child.data = parent.data
            child.digests = parent.digests[: parent.num_prompt // self.block_size]
            child.num_cached = parent.num_cached
            self._register(child, arrival=parent.order[0])
            if runs and self.tables.free_rows:
                (self.tiers or self.allocator).fork(shared)
                child.num_left = min(parent.num_left, len(shared))
                self._run(child, list(shared), computed)
                if not ahead:
                    self.tables.forked[child.row] = self.tables.forked[parent.row] = True
            else:
                self._waiting.push(child)
            children.append(child)
        return children

    def finish(self, seq: Sequence) -> None:
        """Ends a sequence that waits or runs and returns its pages; its tokens stay readable."""
        self._end(seq, Status.FINISHED)

    def abort(self, seq_id: int) -> Sequence | None:
        """Ends a sequence, also one in the step under way; None if it has ended already."""
        seq = self._seqs.get(seq_id)
        if seq is not None:
            self.finish(seq)
        return seq

    def schedule(self) -> Plan:
        """The next step. Without a step under way it holds work or failures whenever a sequence
        waits or runs; with one it may be empty, because all that is left waits for its tokens.

        Pages are taken, block tables written and tokens counted here; update() tells their values.
        """
        assert len(self._flying) < 2, "update() the oldest plan first"
        self._note_arrivals()
        early = self._make_room()
        self._look_ahead()
        plan = self._plan(admit=not early)
        plan.preempted[:0] = early
        if not plan.seqs and self._arriving and not self._flying:
            # Nothing else to do: the forward pass itself waits for the first ones.
            self._note_arrivals(self._arriving[0].arrival)
            again = self._plan()
            again.preempted[:0], again.failed[:0] = plan.preempted, plan.failed
            plan = again
        if plan.seqs:
            if self.tiers is not None:
                self._note_places(plan)
            self._launch(plan)
        if self.tiers is not None:
            self._hand_over(self.tiers, plan)
        return plan

    def _plan(self, admit: bool = True) -> Plan:
        """Which sequences run on which pages."""
        plan = self._plan_running()
        while plan.preempted and not plan.seqs and self._running.seqs:
            # The only ones whose turn it was gave way, so it is the others' turn at once.
            again = self._plan_running()
            stuck = not again.preempted
            again.preempted[:0], again.failed[:0] = plan.preempted, plan.failed
            plan = again
            if stuck:
                break
        if admit and not plan.preempted and (self.admits or not self._running.seqs):
            self._admit(plan)
        return plan

    def _launch(self, plan: Plan) -> None:
        """Rule 5: counts the plan as run, its samples as tokens."""
        tables, rows = self.tables, plan.rows
        ends = plan.starts + plan.counts
        plan.samples = ends == tables.num_tokens[rows]
        plan.sources = tables.source[rows]
        sampling = rows[plan.samples]
        plan.positions = tables.num_tokens[sampling] - tables.num_prompt[sampling]
        tables.num_computed[rows] = ends
        tables.num_tokens[sampling] += 1
        self._flying.append(plan)
        self._find_sources()

    def _find_sources(self) -> None:
        """Which rows wait for which sample of the newest plan under way."""
        source = self.tables.source
        source.fill(-1)
        if not self._flying:
            return
        plan = self._flying[-1]
        places = np.arange(plan.num_samples)
        if plan.stale:
            alive = np.fromiter((s.status is Status.RUNNING for s in plan.seqs), bool)
            source[plan.rows[plan.samples & alive]] = places[alive[plan.samples]]
        else:
            source[plan.rows[plan.samples]] = places

    def cancel(self, plan: Plan) -> None:
        """Forgets the newest plan, which could not be run: nothing of it counts as computed.

        Its copies may not have been made, so the caller then ends its sequences.
        """
        newest = self._flying[-1] if self._flying else None
        assert plan is newest or not plan.seqs, "this is not the plan under way"
        if plan.seqs:
            self._flying.pop()
            alive = np.fromiter((s.status is Status.RUNNING for s in plan.seqs), bool)
            self.tables.num_computed[plan.rows[alive]] = plan.starts[alive]
            self.tables.num_tokens[plan.rows[alive & plan.samples]] -= 1
            self._find_sources()

    def cancel_all(self) -> None:
        """Forgets all plans under way; the caller then ends all sequences."""
        while self._flying:
            self.cancel(self._flying[-1])

    def update(self, plan: Plan, sampled_tokens: ListLike[int] | np.ndarray) -> None:
        """Records the tokens that a plan sampled.

        Args:
            plan: the oldest one of schedule() that was not updated yet.
            sampled_tokens: [plan.num_samples], in the order of ``seqs`` where ``samples``. Those
                of sequences that ended meanwhile are dropped.
        """
        tokens = np.asarray(sampled_tokens, np.int64)
        assert tokens.shape == (plan.num_samples,), f"{tokens.shape} tokens for {plan.num_samples}"
        if not plan.seqs:
            return
        oldest = self._flying[0] if self._flying else None
        assert plan is oldest, "this is not the plan under way"
        self._flying.popleft()
        seqs, rows, starts, samples = plan.seqs, plan.rows, plan.starts, plan.samples
        ends = starts + plan.counts
        if plan.stale:
            alive = np.fromiter((s.status is Status.RUNNING for s in seqs), bool, len(seqs))
            for seq, token in zip(compress(seqs, samples.tolist()), tokens.tolist(), strict=True):
                if seq.status is Status.WAITING:  # preempted meanwhile: it keeps its token
                    seq.token_ids.append(token)
            tokens = tokens[alive[samples]]
            seqs = list(compress(seqs, alive.tolist()))
            rows, starts, ends, samples = rows[alive], starts[alive], ends[alive], samples[alive]
        if self.allocator.enable_prefix_caching:
            before, after = starts // self.block_size, ends // self.block_size
            for i in np.flatnonzero(after > before).tolist():
                seq, first, last = seqs[i], int(before[i]), int(after[i])
                digests = seq.page_digests(first, last, self.block_size)
                for page, digest in zip(seq.pages[first:last], digests, strict=True):
                    (self.tiers or self.allocator).publish(page, digest)
        if not samples.all():
            seqs, rows = list(compress(seqs, samples.tolist())), rows[samples]
        for seq, token in zip(seqs, tokens.tolist(), strict=True):
            seq.token_ids.append(token)
        self.tables.last_token[rows] = tokens
        if not self._flying:
            self.tables.source[rows] = -1

    def _plan_running(self) -> Plan:
        """Rules 2 and 4: shares the tokens out, finds pages, preempts."""
        running, tables = self._running.seqs, self.tables
        rows = self._running.rows
        outgrown = (tables.num_tokens[rows] > self.most_tokens) & (tables.source[rows] < 0)
        failed = [self._fail(seq) for seq in list(compress(running, outgrown.tolist()))]
        rows = self._running.rows
        starts, tokens = tables.num_computed[rows], tables.num_tokens[rows]
        # One at a limit ends as soon as its last token is known.
        over = (tokens >= tables.limit[rows]) | (tokens > self.most_tokens)
        wanted = np.where(over, 0, tokens - starts)
        if self.swapper is not None and bool((tokens > self._gpu_tokens).any()):
            for i in np.flatnonzero(tokens > self._gpu_tokens).tolist():
                wanted[i] = min(wanted[i], self.swapper.most_tokens(int(starts[i])))
        counts = self._running.share(wanted, self.max_num_batched_tokens)
        ends = starts + counts
        copies: list[tuple[int, int]] = []
        preempted: list[Sequence] = []
        # Few sequences need a page or a copy in a step; only those cost a turn in Python.
        short = (ends > tables.capacity[rows]) | tables.forked[rows]
        for i in np.flatnonzero(short & (counts > 0)).tolist():
            if i >= len(running):
                break  # preempted, and so is all behind it
            seq, start, end = running[i], int(starts[i]), int(ends[i])
            while not self._grow(seq, start, end, copies):
                preempted.append(self._preempt())
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

    def _preempt(self) -> Sequence:
        """Chooses the sequence that gives way, takes its pages and queues it again."""
        victim = self._running.seqs[-1]
        if self._arriving:
            newest = max(self._arriving, key=lambda seq: seq.order)
            victim = max(victim, newest, key=lambda seq: seq.order)
        computed = int(self.tables.num_computed[victim.row])
        swaps = self.swapper is not None and self.swapper.pays(victim, computed)
        pages = self._take_row(victim)
        if self.swapper is not None and swaps:
            self.swapper.swap_out(victim, pages, computed)
        else:
            (self.tiers or self.allocator).free(pages)
        victim.num_left = 0
        victim.num_preemptions += 1
        self._waiting.push(victim)
        return victim

    def _grow(self, seq: Sequence, start: int, end: int, copies: list[tuple[int, int]]) -> bool:
        """Gets the pages that computing tokens start .. end needs; False if too few are free."""
        held, first = len(seq.pages), start // self.block_size
        missing = max(0, self._pages_for(end) - held)
        assert held + missing <= self.block_tables.shape[1], (
            f"sequence {seq.seq_id} is past max_model_len={self.max_model_len}: finish it"
        )
        copy = False
        if self.tables.forked[seq.row] and first < held:
            page = seq.pages[first]
            copy = page >= HOST_BITS or self.allocator.refcount(page) > 1
        if missing + copy > self.allocator.num_free:
            if self.swapper is not None and self.swapper.is_large(end):
                self._leave(self.swapper, seq, missing + copy, first)
            if missing + copy > self.allocator.num_free:
                return False
        self.tables.forked[seq.row] = False
        if copy:
            # It keeps a holder, so no copy of this plan overwrites it: the holders are a parent and
            # its children, neighbours in the order, and later takers preempt only newer ones.
            (new,) = self._allocate(1)
            if page >= HOST_BITS:  # a parent larger than the GPU pool left it there
                assert self.tiers is not None
                self.tiers.bring(page, new)
                seq.num_left = first
            else:
                copies.append((page, new))
                self.allocator.free([page])
            self.tables.replace(seq, first, new)
        self.tables.extend(seq, self._allocate(missing))
        return True

    def _allocate(self, n: int) -> list[int]:
        """Pages that the step writes to."""
        pages = self.allocator.allocate(n)
        if self.tiers is not None:
            self.tiers.queue.compute_on(pages)
        return pages

    def _leave(self, swapper: Swapper, seq: Sequence, wanted: int, first: int) -> None:
        """Rule 7: makes room in the GPU pool with older pages of a sequence that is larger."""
        for _ in range(len(self._seqs)):
            for index, entry in swapper.leave(seq, wanted, first):
                self.tables.replace(seq, index, entry)
            if self.allocator.num_free >= wanted or seq.num_left == first:
                break
            # The host pool is full: the newest one swapped out is computed again.
            if not swapper.away:
                break
            swapper.drop(max(swapper.away, key=lambda other: other.order))

    def _admit(self, plan: Plan) -> None:
        """Rule 3: adds waiting sequences to the plan."""
        seqs: list[Sequence] = []
        starts: list[int] = []
        counts: list[int] = []
        budget = self.max_num_batched_tokens - plan.num_tokens
        ends = -1  # pages of the running sequences, were all at their ends; once it is asked for
        while budget > 0 and self.tables.free_rows:
            seq = self._waiting.first()
            if seq is None:
                break
            end = self._pages_for(max(seq.expected_len or 0, len(seq.token_ids)))
            if seq.expected_len is not None and self.swapper is None and self.num_running:
                if ends < 0:
                    ends = self._pages_at_ends()
                if ends + end > self.allocator.num_usable and not self._pages_last(seq):
                    break
            room = self._back(seq) if seq.saved else None
            if room is None and not seq.saved:
                room = self._first_pages(seq)
            if room is None:
                break
            pages, start = room
            self._waiting.pop()
            if seq.num_preemptions == 0:
                seq.num_cached = start
            if self.tiers is not None:
                seq.arrival = self.tiers.queue.arrival(pages[seq.num_left :])
                if seq.arrival:
                    self.tables.take(seq, pages, start)
                    seq.status = Status.ARRIVING
                    self._arriving.append(seq)
                    continue
            self._run(seq, pages, start)
            if ends >= 0:
                ends += end
            seqs.append(seq)
            starts.append(start)
            counts.append(
                min(budget, len(seq.token_ids) - start, len(pages) * self.block_size - start)
            )
            budget -= counts[-1]
        if seqs:
            plan.extend(seqs, starts, counts)

    def _pages_at_ends(self) -> int:
        rows, tables = self._running.rows, self.tables
        ends = np.maximum(tables.num_tokens[rows], tables.expected[rows])
        return int((-(-ends // self.block_size)).sum())

    def _pages_last(self, seq: Sequence) -> bool:
        """Rule 3: whether the pool will do if a waiting sequence runs beside the others."""
        assert seq.expected_len is not None
        rows, tables = self._running.rows, self.tables
        tokens = np.append(tables.num_tokens[rows], len(seq.token_ids))
        held = -(-tokens // self.block_size)
        left = np.maximum(np.append(tables.expected[rows], seq.expected_len) - tokens, 0)
        shared = max(0, int(held[:-1].sum()) - self.allocator.num_used)
        peak = peak_pages(held, tokens, left, self.block_size)
        return peak - shared <= self.allocator.num_usable

    def _first_pages(self, seq: Sequence) -> tuple[list[int], int] | None:
        """Pages for all tokens of a waiting sequence, and how many tokens are cached in them.

        None if too few pages are free; nothing is taken then.
        """
        free = self.allocator.num_free
        crowded = self.num_running > 0
        if crowded and self._blocked[0] is seq and free <= self._blocked[1]:
            return None  # spares looking up a long prompt at every step
        digests = self._wanted_prefix(seq)
        total = self._pages_for(len(seq.token_ids))
        if self.swapper is not None and self.swapper.is_large(len(seq.token_ids)):
            total = -1  # the rest is taken chunk by chunk
        if self.tiers is None:
            found, hits = self.allocator.peek(digests), 0
        else:
            if self.tiers.archive.is_fetching(digests):
                return None
            found, on_host = self.tiers.find(digests)
            hits = len(on_host)
        hits += len(found)
        if total < 0:
            assert self.swapper is not None
            total = hits + self.swapper.window
        revived = sum(self.allocator.refcount(page) == 0 for page in found)
        missing = total - len(found)
        if missing + revived + (self.watermark if crowded else 0) > free:
            assert crowded, "a sequence that fits the pool alone must be admitted when it is empty"
            self._blocked = (seq, free)
            return None
        if self.tiers is not None:
            pages, _ = self.tiers.take(digests, total)
        else:
            pages = self.allocator.lookup(digests) + self.allocator.allocate(missing)
        return pages, hits * self.block_size

    def _wanted_prefix(self, seq: Sequence) -> list[bytes]:
        """Digests of the pages that a waiting sequence may take from the prefix cache."""
        if not self.allocator.enable_prefix_caching or seq.no_prefix_lookup:
            return []
        # Never the whole sequence: the last token must be computed for its logits.
        tokens = len(seq.token_ids)
        digests = seq.page_digests(0, (tokens - 1) // self.block_size, self.block_size)
        if self.swapper is not None and self.swapper.is_large(tokens):
            digests = digests[: self.allocator.num_usable - self.swapper.window]
        return digests

    def _back(self, seq: Sequence) -> tuple[list[int], int] | None:
        """Rule 7: pages of a sequence that was swapped out, and how many tokens are in them; None
        if too few are free, or it is not in the host pool, or (nothing is saved any more) it has to
        be computed again.

        Every second running sequence keeps room for a page more, lest a next step swap it out.
        """
        assert self.swapper is not None
        if not self.swapper.recall(seq):
            return None
        free, crowded, start = self.allocator.num_free, self.num_running > 0, seq.num_saved
        if crowded and self._blocked[0] is seq and free <= self._blocked[1]:
            return None
        pages = self.swapper.swap_in(seq, self.watermark + self.num_running // 2 if crowded else 0)
        if pages is None:
            assert crowded, "a sequence that fits the pool alone must be admitted when it is empty"
            self._blocked = (seq, free)
            return None
        return pages, start

    # Tiers (rule 7).

    def _make_room(self) -> list[Sequence]:
        """Lets the newest sequences go to the host some steps before pages run out, so that their
        moves run beside a step and not ahead of one."""
        gone: list[Sequence] = []
        if self.swapper is None:
            return gone
        running = self._running.seqs
        while len(running) > 1 and not self._arriving:
            wanted = len(running) * STEPS_AHEAD // self.block_size
            victim = running[-1]
            computed = int(self.tables.num_computed[victim.row])
            if self.allocator.num_free >= wanted or not self.swapper.pays(victim, computed):
                break
            gone.append(self._preempt())
        return gone

    def _look_ahead(self) -> None:
        """Asks the disk for the prefixes of those that are admitted next."""
        swapper = self.swapper
        if swapper is None or not swapper.tiers.archive.works:
            return
        if not self.allocator.enable_prefix_caching:
            return
        near = self._waiting.next(LOOK_AHEAD)
        swapper.look_ahead((seq, self._wanted_prefix(seq)) for seq in near if not seq.saved)

    def _note_arrivals(self, ticket: int = 0) -> None:
        """Lets the sequences run whose pages have come in, or will have with a ticket that the
        step's forward pass waits for."""
        if not self._arriving:
            return
        assert self.tiers is not None
        queue, still = self.tiers.queue, []
        for seq in self._arriving:
            if seq.arrival <= queue.done[False]:
                self._running.add(seq)
            elif seq.arrival <= ticket:
                queue.compute_on(seq.pages[seq.num_left :])
                self._running.add(seq)
            else:
                still.append(seq)
        self._arriving = still

    def _note_places(self, plan: Plan) -> None:
        """What the plan's forward pass reads on the host; those that compute several tokens over
        such pages go to the end."""
        if self.max_model_len <= self._gpu_tokens:
            return  # none is larger than the GPU pool
        left = np.fromiter((seq.num_left > 0 for seq in plan.seqs), bool, len(plan.seqs))
        plan.in_place = bool(left.any())
        staged = left & (plan.counts > 1)
        plan.num_staged = int(staged.sum())
        if plan.num_staged:
            order = np.argsort(staged, kind="stable")
            plan.seqs = [plan.seqs[i] for i in order.tolist()]
            plan.rows, plan.starts = plan.rows[order], plan.starts[order]
            plan.counts = plan.counts[order]

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

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _register(self, seq: Sequence, arrival: int) -> None:
        seq.seq_id, self._next_id = self._next_id, self._next_id + 1
        seq.order = (arrival, seq.seq_id)
        self._seqs[seq.seq_id] = seq

    def _run(self, seq: Sequence, pages: list[int], computed: int) -> None:
        self.tables.take(seq, pages, computed)
        self._running.add(seq)

    def _take_row(self, seq: Sequence) -> list[int]:
        """Takes the row and the pages of a sequence that ends or gives way; returns the pages."""
        for plan in self._flying:
            plan.stale = True  # perhaps it holds the sequence: looking would cost more
        if seq.status is Status.ARRIVING:
            self._arriving.remove(seq)
        else:
            self._running.remove(seq)
        return self.tables.give_back(seq)

    def _fail(self, seq: Sequence) -> Sequence:
        tokens, usable = len(seq.token_ids), self._most_pages
        seq.error = (
            f"the sequence's {tokens} tokens need {tokens} / {self.block_size} = "
            f"{self._pages_for(tokens)} KV pages, but the whole pool has {usable}: "
            "ask for fewer tokens or give the KV cache more memory"
        )
        self._end(seq, Status.FAILED)
        return seq

    def _end(self, seq: Sequence, status: Status) -> None:
        assert self._seqs.get(seq.seq_id) is seq, f"sequence {seq.seq_id} has ended already"
        del self._seqs[seq.seq_id]
        if seq.status is Status.WAITING:
            seq.status = status
            self._waiting.note_ended()
            if seq.saved:
                assert self.swapper is not None
                self.swapper.drop(seq)
        else:
            pages = self._take_row(seq)
            seq.status = status
            (self.tiers or self.allocator).free(pages)

    def check(self) -> None:
        """Raises AssertionError if a page or row is lost or used twice, or a table is wrong."""
        running = self._running.check()
        running = running + self._arriving
        waiting = self._waiting.check()
        if self.tiers is None:
            self.allocator.check([seq.pages for seq in running])
        else:
            self.tiers.check([seq.saved for seq in waiting], [seq.pages for seq in running])
        under_way = Counter(
            seq for plan in self._flying for seq in compress(plan.seqs, plan.samples.tolist())
        )
        self.tables.check(running, under_way)
        ids = sorted(seq.seq_id for seq in running + waiting)
        assert ids == sorted(self._seqs), f"{ids} run or wait, {sorted(self._seqs)} are known"
