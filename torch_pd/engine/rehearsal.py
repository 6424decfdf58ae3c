"""Rehearsal: a run of the ranks that share one copy of the weights, without a model.

Every rank's own `Scheduler` plans each step over its pool of pages, the ranks take requests, start
new ones and choose between streaming and shipping as they do in a real run, and a step lasts as
long as `torch_pd.costs` says. Only the tokens are missing.
"""

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from torch_pd.config import EngineConfig
from torch_pd.costs import Costs, Step
from torch_pd.engine.graphs import bucket_sizes, largest_graph
from torch_pd.engine.halving import Halving
from torch_pd.engine.lockstep import CommonStep, Gate
from torch_pd.engine.plan import Plan
from torch_pd.engine.scheduler import Scheduler
from torch_pd.engine.sequence import Sequence
from torch_pd.engine.work import LOOK_AHEAD
from torch_pd.kv.pages import PageAllocator
from torch_pd.weights.choice import Choice

MOST_RANKS = 4
"""Ranks that are rehearsed; of a larger group they stand for all."""


@dataclass(frozen=True)
class Work:
    """Prompts of ``input`` tokens (uniform within 50%), ``output`` tokens each."""

    num_prompts: int
    input: int
    output: int

    def prompts(self) -> list[int]:
        """Their lengths, in random order."""
        low, high = max(1, self.input - self.input // 2), self.input + self.input // 2
        n = self.num_prompts
        lengths = [low + (high - low) * (2 * i + 1) // (2 * n) for i in range(n)]
        random.Random(0).shuffle(lengths)
        return lengths


@dataclass
class Run:
    """What a rehearsed group of ranks did."""

    seconds: float = 0.0
    output_tokens: int = 0
    stream_steps: int = 0
    ship_steps: int = 0
    resident_steps: int = 0
    preemptions: int = 0
    most_running: int = 0
    """Sequences of a rank."""
    mode_seconds: dict[str, float] = field(default_factory=dict)
    """Of steps that only decode ("stream decode", ...) and of the others ("stream")."""

    @property
    def steps(self) -> int:
        """Of every kind."""
        return self.stream_steps + self.ship_steps + self.resident_steps


class _Rank:
    """One rank's scheduler and what it takes from the queue."""

    def __init__(self, config: EngineConfig, kv_tokens: int, longest: int) -> None:
        self._config, self.gate = config, Gate()
        # No more than all rows could fill: the allocator keeps a list of all pages.
        pages = min(
            kv_tokens // config.block_size,
            (config.max_num_seqs + 1) * (-(-longest // config.block_size) + 1),
        )
        self.scheduler = Scheduler(
            PageAllocator(pages + 1),
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=longest,
        )
        self._lengths: deque[int] = deque(maxlen=max(LOOK_AHEAD, config.max_num_seqs))

    @property
    def pending(self) -> int:
        """Requests that it works on."""
        return self.scheduler.num_running + self.scheduler.num_waiting

    def take(self, queue: deque[int], output: int, every: list["_Rank"]) -> None:
        """As `work.run` takes from the board: what the next step can start, and no more than its
        share."""
        config, waiting = self._config, self.scheduler.num_waiting
        tokens = sum(list(self._lengths)[-waiting:]) if waiting else 0
        pending, total = self.pending, len(queue) + sum(rank.pending for rank in every)
        while (
            queue
            and tokens < config.max_num_batched_tokens
            and (pending < config.max_num_seqs or waiting < LOOK_AHEAD)
            and pending * len(every) < total
        ):
            length = queue.popleft()
            self._lengths.append(length)
            tokens, waiting, pending = tokens + length, waiting + 1, pending + 1
            end = length + output
            self.scheduler.add(Sequence("", [0] * length, max_total_len=end, expected_len=end))

    def settle(self, plan: Plan) -> None:
        """The step has run."""
        self.scheduler.update(plan, np.zeros(plan.num_samples, np.int64))
        tables = self.scheduler.tables
        rows = plan.rows
        ended = tables.num_tokens[rows] >= tables.limit[rows]
        for i in np.flatnonzero(ended).tolist():
            self.scheduler.finish(plan.seqs[i])


def rehearse(
    costs: Costs, mode: str, config: EngineConfig, kv_tokens: int, work: Work, longest: int
) -> Run:
    """The work of one group, which shares one copy of the weights.

    Args:
        costs: of the group.
        mode: "ship" or "auto": the ranks run each step together. "stream", "replicate": every rank
            on its own, so one is rehearsed, with its share.
        kv_tokens: that the pool of a rank holds.
        work: of the group.
        longest: tokens of the longest sequence that is allowed.
    """
    together = mode in ("ship", "auto") and costs.shares
    ranks = min(costs.ranks, MOST_RANKS) if together else 1
    if ranks < costs.ranks:
        work = Work(-(-work.num_prompts * ranks // costs.ranks), work.input, work.output)
    prompts = work.prompts()
    longest = min(longest, max(prompts) + work.output)
    every = [_Rank(config, kv_tokens, longest) for _ in range(ranks)]
    queue = deque(min(length, longest - 1) for length in prompts)
    largest = 0
    if not config.enforce_eager and mode != "stream":
        largest = largest_graph(config.max_num_seqs)
    sizes = bucket_sizes(largest) if largest else []
    choice = Choice(costs, "auto" if mode == "auto" else "ship", largest) if together else None
    run = Run(output_tokens=work.num_prompts * work.output)
    while queue or any(rank.scheduler.has_unfinished for rank in every):
        plans = []
        for rank in every:
            rank.take(queue, work.output, every)
            scheduler = rank.scheduler
            scheduler.admission.num_elsewhere = len(queue)
            if together:
                scheduler.admits = rank.gate.opens(scheduler.num_running)
            plans.append(scheduler.schedule())
            run.preemptions += len(plans[-1].preempted)
            run.most_running = max(run.most_running, scheduler.num_running)
        common = CommonStep(
            tuple(plan.num_tokens for plan in plans),
            tuple(plan.num_samples for plan in plans),
            all(plan.decodes for plan in plans),
        )
        way = "resident" if mode == "replicate" or not costs.shares else "stream"
        if choice is not None:
            way = choice.decide(common.tokens, common.selected, common.decoding)
        seconds = _seconds(costs, way, common, plans, sizes)
        run.seconds += seconds
        kind = f"{way} decode" if common.decoding else way
        run.mode_seconds[kind] = run.mode_seconds.get(kind, 0.0) + seconds
        setattr(run, f"{way}_steps", getattr(run, f"{way}_steps") + 1)
        for rank, plan in zip(every, plans, strict=True):
            rank.gate.note(not common.decoding)
            rank.settle(plan)
    return run


def _seconds(
    costs: Costs, way: str, common: CommonStep, plans: list[Plan], sizes: list[int]
) -> float:
    """Of a step, until its last rank has ended it."""
    size = None
    if common.decoding and way != "stream":
        size = next((size for size in sizes if size >= max(common.tokens)), None)
    tokens, selected = common.padded(None if size is None else [size] * len(plans))
    steps = [
        Step(n, m, *_attention(plan), graph=size is not None)
        for n, m, plan in zip(tokens, selected, plans, strict=True)
    ]
    if way != "ship":
        return max((costs.stream if way == "stream" else costs.resident)(step) for step in steps)
    # The linears of all rows are shared evenly; attention is each rank's own.
    mean = Step(
        -(-sum(tokens) // len(plans)),
        -(-sum(selected) // len(plans)),
        max(step.kv_tokens for step in steps),
        max(step.pairs for step in steps),
        graph=size is not None,
    )
    if common.decoding and costs.data_ranks is not None:
        halving = Halving(costs, mean.graph)
        if any(halving.wants(plan) for plan in plans):
            return costs.halved(mean)
    return costs.ship(mean)


def _attention(plan: Plan) -> tuple[int, int]:
    """Tokens whose keys and values decoding sequences read, and pairs of prompt tokens."""
    ends = plan.starts + plan.counts
    decoding = (plan.counts == 1) & (plan.starts > 0)
    pairs = (ends * (ends + 1) - plan.starts * (plan.starts + 1)) // 2
    return int(ends[decoding].sum()), int(pairs[~decoding].sum())
