"""PromptRows: prompt tokens computed in a step, whose log-probabilities are to be reported."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from torch_pd.engine.inflight import InFlight
from torch_pd.engine.plan import Plan
from torch_pd.engine.sampler import Sampler
from torch_pd.request import Logprob


@dataclass(frozen=True, slots=True)
class PromptRows:
    """``count`` rows of a plan's tokens, from ``first`` on; each tells the prompt's next token."""

    running: InFlight
    first: int
    position: int
    """In the prompt, of the first one."""
    count: int

    @property
    def places(self) -> np.ndarray:
        """int64 [count], the rows among the plan's tokens."""
        return np.arange(self.first, self.first + self.count)

    @property
    def known(self) -> list[dict[int, Logprob] | None]:
        """What was reported of the prompt so far."""
        assert self.running.prompt_logprobs is not None
        return self.running.prompt_logprobs

    def logprobs(self, sampler: Sampler, logits: Tensor) -> list[dict[int, Logprob]]:
        """From the rows' logits [count, vocabulary]."""
        request, start = self.running.request, self.position + 1
        return sampler.prompt_logprobs(
            logits,
            request.prompt_token_ids[start : start + self.count],
            request.params.prompt_logprobs or 0,
        )


def find_rows(plan: Plan, requests: Mapping[str, InFlight]) -> list[PromptRows]:
    """Those of a plan, in the order of its sequences."""
    wanted: list[PromptRows] = []
    ends = np.cumsum(plan.counts)
    for i, seq in enumerate(plan.seqs):
        running = requests[seq.request_id]
        start, count = int(plan.starts[i]), int(plan.counts[i])
        count = min(count, seq.num_prompt - 1 - start)
        known = running.prompt_logprobs
        # A sequence that was preempted computes positions again that were reported already.
        if known is not None and seq.data.index == 0 and start + count >= len(known) > start:
            skip = len(known) - 1 - start
            first = int(ends[i] - plan.counts[i]) + skip
            wanted.append(PromptRows(running, first, start + skip, count - skip))
    return wanted
