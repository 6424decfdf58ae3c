"""Python time of one scheduler step: schedule() + update() + finish() of the ended ones.

    python bench/scheduler.py [--running 1000] [--waiting 10000] [--steps 400] [--json FILE]

Three loads, all with every row busy and the rest waiting:
  decode   all sequences decode, none ends; the queue is blocked by max_num_seqs
  churn    outputs of 200 tokens on average, their lengths foreseen, so some sequences end and are
           replaced in each step
  blocked  as decode, with free rows: the oldest waiting prompt does not fit into the pages left

CPU time of the process (time.process_time), so other processes on the machine count little.
"""

import argparse
import json
import platform
import random
import statistics
import time

import numpy as np

from torch_pd.engine.scheduler import Scheduler
from torch_pd.engine.sequence import Sequence
from torch_pd.kv.pages import PageAllocator

BLOCK_SIZE = 16


def build(load: str, caching: bool, running: int, waiting: int, steps: int) -> Scheduler:
    """A scheduler whose ``running`` sequences have their first token."""
    rng = random.Random(0)
    prompts = [rng.randrange(50, 200) for _ in range(running + waiting)]
    usable = sum(-(-(n + steps + 64) // BLOCK_SIZE) for n in prompts[:running]) + running
    long = usable * BLOCK_SIZE * 9 // 10  # of the prompt that does not fit while the others run
    scheduler = Scheduler(
        PageAllocator(usable + 1, enable_prefix_caching=caching),
        block_size=BLOCK_SIZE,
        max_num_seqs=running + (1 if load == "blocked" else 0),
        max_num_batched_tokens=8192,
        max_model_len=long + 1,
    )
    for i, n in enumerate(prompts):
        output = rng.randrange(50, 350) if load == "churn" else 10**6
        length = long if load == "blocked" and i == running else n
        ids = [rng.randrange(50_000) for _ in range(length)]
        limit = min(n + output, long + 1)
        expected = limit if load == "churn" else None
        scheduler.add(Sequence(str(i), ids, max_total_len=limit, expected_len=expected))
    while True:
        plan = scheduler.schedule()
        scheduler.update(plan, np.zeros(plan.num_samples, np.int64))
        if scheduler.num_running == running and plan.num_samples == running:
            return scheduler


def measure(scheduler: Scheduler, steps: int) -> tuple[list[float], int]:
    """Seconds of each step, and how many sequences ended."""
    seconds, ended = [], 0
    for step in range(steps):
        start = time.process_time()
        plan = scheduler.schedule()
        spent = time.process_time() - start
        tokens = np.full(plan.num_samples, step, np.int64)  # the sampler's part
        start = time.process_time()
        scheduler.update(plan, tokens)
        spent += time.process_time() - start
        over = [seq for seq in plan.seqs if seq.at_length_limit]  # the engine's part
        ended += len(over)
        start = time.process_time()
        for seq in over:
            scheduler.finish(seq)
        seconds.append(spent + time.process_time() - start)
    scheduler.check()
    return seconds, ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=1000)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    print(f"{args.running} running, {args.waiting} waiting, block_size {BLOCK_SIZE}; us a step")
    print(f"{'load':8} {'caching':8} {'median':>8} {'p99':>8} {'ended/step':>11}")
    results = []
    for load in ("decode", "churn", "blocked"):
        for caching in (False, True):
            scheduler = build(load, caching, args.running, args.waiting, args.steps)
            seconds, ended = measure(scheduler, args.steps)
            median = statistics.median(seconds) * 1e6
            p99 = float(np.percentile(seconds, 99)) * 1e6
            rate = ended / args.steps
            print(f"{load:8} {caching!s:8} {median:8.0f} {p99:8.0f} {rate:11.2f}")
            results.append(
                {
                    "load": load,
                    "prefix_caching": caching,
                    "median_us": median,
                    "p99_us": p99,
                    "ended_per_step": rate,
                }
            )
    if args.json:
        figures = {**vars(args), "python": platform.python_version(), "results": results}
        del figures["json"]
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
