"""FakeModel over all tiers: moves and disk jobs run as late and as oddly as is allowed."""

from fake_model import FakeModel

from torch_pd.engine.scheduler import Scheduler
from torch_pd.engine.swapper import SwapCosts
from torch_pd.kv.moves import HOST_BITS
from torch_pd.kv.pages import PageAllocator
from torch_pd.kv.tiers import Tiers


def make_tiered(
    usable,
    host,
    records=0,
    block_size=4,
    seqs=8,
    tokens=64,
    length=256,
    caching=False,
    costs=None,
    peer=0,
):
    """A scheduler over a GPU pool and a host pool of so many usable pages, and pages of a peer."""
    gpu = PageAllocator(usable + 1, enable_prefix_caching=caching)
    return Scheduler(
        gpu,
        block_size=block_size,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=length,
        tiers=Tiers(gpu, host + 1 + peer, records, host + 1 if peer else None),
        costs=costs or SwapCosts(),
    )


class TieredModel(FakeModel):
    """``random`` decides when moves and jobs run and which jobs fail (a share of ``faults``)."""

    def __init__(self, scheduler, random, faults=0.0, **kwargs):
        super().__init__(scheduler, **kwargs)
        self.random, self.faults = random, faults
        self.lanes = range(len(scheduler.tiers.queue.done))
        self.waiting = [[] for _ in self.lanes]
        self.done = [0 for _ in self.lanes]
        self.records = {}
        self.jobs = []

    # Moves.

    def ready(self, lane):
        queue = self.waiting[lane]
        return bool(queue) and all(
            after <= done for after, done in zip(queue[0].after, self.done, strict=True)
        )

    def advance(self, lane):
        moves = self.waiting[lane].pop(0)
        pairs = list(moves.pairs)
        self.random.shuffle(pairs)
        source, target = (0, HOST_BITS) if moves.out else (HOST_BITS, 0)
        for a, b in pairs:
            self.pages[target | b] = list(self.pages[source | a])
        self.done[lane] = moves.ticket

    def until(self, tickets):
        while any(done < ticket for done, ticket in zip(self.done, tickets, strict=False)):
            able = [lane for lane in self.lanes if self.ready(lane)]
            assert able, "the batches wait for each other"
            self.advance(self.random.choice(able))

    def some(self):
        """Runs a few of the moves and jobs that may run, and tells their ends."""
        tiers = self.scheduler.tiers
        for _ in range(self.random.randint(0, 4)):
            lane = self.random.choice(self.lanes)
            if self.ready(lane):
                self.advance(lane)
        if self.random.random() < 0.7:
            tiers.queue.done = list(self.done)
        self.random.shuffle(self.jobs)
        for _ in range(self.random.randint(0, 3)):
            if self.jobs:
                self.end(self.jobs.pop())

    def end(self, job):
        page = HOST_BITS | job.host_page
        fails = self.random.random() < self.faults
        if job.write:
            self.records[job.record] = None if fails else list(self.pages[page])
        else:
            self.pages[page] = ["torn"] if fails else list(self.records[job.record])
        self.scheduler.tiers.archive.ended(job, "it broke" if fails else None)

    # Steps.

    def schedule(self):
        s = self.scheduler
        self.some()
        plan = s.schedule()
        s.check()
        self.jobs += plan.jobs
        for moves in plan.moves:
            self.waiting[moves.lane].append(moves)
        if not plan.seqs and not plan.failed and s.has_unfinished and not self.under_way:
            # Only the disk may hold everything up.
            assert s.tiers.archive.busy, "no work although some is left"
            self.until([m.ticket for m in ()])
            for lane in self.lanes:
                while self.ready(lane):
                    self.advance(lane)
            s.tiers.queue.done = list(self.done)
            while self.jobs:
                self.end(self.jobs.pop())
        assert plan.num_tokens == plan.counts.sum() <= s.max_num_batched_tokens
        return plan

    def run(self, plan):
        self.some_moves()
        self.until(plan.waits)
        return super().run(plan)

    def some_moves(self):
        for _ in range(self.random.randint(0, 4)):
            lane = self.random.choice(self.lanes)
            if self.ready(lane):
                self.advance(lane)
