"""Flying: the steps that were planned and whose tokens are not known yet, at most two."""

from collections import Counter, deque
from itertools import compress

import numpy as np

from torch_pd.engine.plan import Plan
from torch_pd.engine.roster import Roster
from torch_pd.engine.sequence import Sequence, Status


class Flying:
    """Counts a plan as run as soon as it is made (rule 5 of the scheduler), its samples as tokens.

    Args:
        roster: whose tables it writes.
    """

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.plans: deque[Plan] = deque()

    def launch(self, plan: Plan) -> None:
        """Takes a plan with work."""
        tables, rows = self.roster.tables, plan.rows
        ends = plan.starts + plan.counts
        plan.samples = ends == tables.num_tokens[rows]
        plan.sources = tables.source[rows]
        sampling = rows[plan.samples]
        plan.positions = tables.num_tokens[sampling] - tables.num_prompt[sampling]
        plan.num_taken_out = self.roster.num_taken_out
        tables.num_computed[rows] = ends
        tables.num_tokens[sampling] += 1
        self.plans.append(plan)
        self._find_sources()

    def cancel(self) -> None:
        """Forgets the newest plan: nothing of it counts as computed."""
        plan, tables = self.plans.pop(), self.roster.tables
        alive = _running(plan)
        tables.num_computed[plan.rows[alive]] = plan.starts[alive]
        tables.num_tokens[plan.rows[alive & plan.samples]] -= 1
        self._find_sources()

    def land(self, tokens: np.ndarray) -> None:
        """Records the tokens int64 [num_samples] of the oldest plan, and publishes the pages that
        it filled."""
        plan, tables, pages = self.plans.popleft(), self.roster.tables, self.roster.pages
        size = tables.block_size
        seqs, rows, starts, samples = plan.seqs, plan.rows, plan.starts, plan.samples
        ends = starts + plan.counts
        if self._is_stale(plan):
            alive = _running(plan)
            for seq, token in zip(compress(seqs, samples.tolist()), tokens.tolist(), strict=True):
                if seq.status is Status.WAITING:  # preempted meanwhile: it keeps its token
                    seq.token_ids.append(token)
            tokens = tokens[alive[samples]]
            seqs = list(compress(seqs, alive.tolist()))
            rows, starts, ends, samples = rows[alive], starts[alive], ends[alive], samples[alive]
        if self.roster.allocator.enable_prefix_caching:
            before, after = starts // size, ends // size
            for i in np.flatnonzero(after > before).tolist():
                seq, first, last = seqs[i], int(before[i]), int(after[i])
                digests = seq.page_digests(first, last, size)
                for page, digest in zip(seq.pages[first:last], digests, strict=True):
                    pages.publish(page, digest)
        if not samples.all():
            seqs, rows = list(compress(seqs, samples.tolist())), rows[samples]
        for seq, token in zip(seqs, tokens.tolist(), strict=True):
            seq.token_ids.append(token)
        tables.last_token[rows] = tokens
        if not self.plans:
            tables.source[rows] = -1

    def sampled(self) -> Counter[Sequence]:
        """How many tokens of each sequence are being sampled."""
        return Counter(
            seq for plan in self.plans for seq in compress(plan.seqs, plan.samples.tolist())
        )

    def _is_stale(self, plan: Plan) -> bool:
        """Whether a sequence ended or was preempted since; perhaps none of the plan's, but looking
        would cost more."""
        return plan.num_taken_out != self.roster.num_taken_out

    def _find_sources(self) -> None:
        """Which rows wait for which sample of the newest plan."""
        source = self.roster.tables.source
        source.fill(-1)
        if not self.plans:
            return
        plan = self.plans[-1]
        places = np.arange(plan.num_samples)
        if self._is_stale(plan):
            alive = _running(plan)
            source[plan.rows[plan.samples & alive]] = places[alive[plan.samples]]
        else:
            source[plan.rows[plan.samples]] = places


def _running(plan: Plan) -> np.ndarray:
    """bool [num_seqs]: which of a plan's sequences still run."""
    return np.fromiter((seq.status is Status.RUNNING for seq in plan.seqs), bool, len(plan.seqs))
