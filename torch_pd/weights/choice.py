"""Choice: whether the next step of a pool group is streamed or shipped.

The ranks vote for every step (`engine.lockstep`), so each knows what all bring, computes the same
two costs and comes to the same answer. A phase goes on until the other way is cheaper by more than
`MARGIN`: the costs are estimates, and what the ring has fetched ahead is of use only to a
streamed step.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch_pd.costs import Costs, Step

MARGIN = 1.05


@dataclass
class Used:
    """What was done in one way, on one rank."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Choice:
    """Decides for all ranks alike; a rank that only streams or only ships needs none.

    Args:
        costs: of the group; the same on every rank.
        mode: "auto", or "stream" or "ship" for every step.
        graph_rows: largest number of decoding rows of a rank that is replayed from a graph.
    """

    def __init__(self, costs: Costs, mode: str = "auto", graph_rows: int = 0) -> None:
        assert mode in ("auto", "stream", "ship")
        self.costs = costs
        self.mode = mode
        self.graph_rows = graph_rows
        self.way = "ship" if mode == "auto" else mode
        """Of the last step."""
        self.used = {"stream": Used(), "ship": Used()}
        self._since = time.perf_counter()

    def decide(self, tokens: Sequence[int], selected: Sequence[int], decoding: bool) -> str:
        """ "stream" or "ship" for the next step.

        Args:
            tokens, selected: rows of the layers and of lm_head that each rank brings.
            decoding: no rank computes a prompt.
        """
        if self.mode != "auto":
            self.way = self.mode
        else:
            stream, ship = self.seconds(tokens, selected, decoding)
            # What a step costs the way of the phase, and the other way.
            stays, turns = (stream, ship) if self.way == "stream" else (ship, stream)
            if turns * MARGIN < stays:
                self.way = "ship" if self.way == "stream" else "stream"
        return self.way

    def seconds(
        self, tokens: Sequence[int], selected: Sequence[int], decoding: bool
    ) -> tuple[float, float]:
        """Seconds of the step streamed and shipped, until the last rank has ended it.

        Attention costs the same either way and is left out.
        """
        most, rows = max(tokens), max(selected)
        stream = self.costs.stream(Step(most, rows, 0))
        graph = decoding and most <= self.graph_rows
        # Shipped, the linears of all rows are shared evenly; the exchanges wait for the most.
        ranks = min(self.costs.ranks, len(tokens))
        mean = Step(-(-sum(tokens) // ranks), -(-sum(selected) // ranks), 0, graph=graph)
        return stream, self.costs.ship(mean)

    def count(self, tokens: int) -> None:
        """Notes that the step decided last brought ``tokens`` rows of this rank; its seconds are
        those since the call before."""
        now = time.perf_counter()
        used = self.used[self.way]
        used.steps += tokens > 0
        used.tokens += tokens
        used.seconds += now - self._since
        self._since = now

    def rest(self) -> None:
        """Time until the next step counts for neither way."""
        self._since = time.perf_counter()

    def report(self) -> dict[str, float]:
        """Steps, tokens and seconds of both ways, for `Engine.stats`."""
        found: dict[str, float] = {}
        for way, used in self.used.items():
            found[f"{way}_steps"] = used.steps
            found[f"{way}_tokens"] = used.tokens
            found[f"{way}_seconds"] = used.seconds
        return found
