"""Plan: the integers of one step."""

from dataclasses import dataclass, field

import numpy as np

from torch_pd.engine.sequence import Sequence
from torch_pd.kv.moves import NO_WAITS, DiskJob, Moves, Waits


@dataclass(slots=True, eq=False)
class Plan:
    """One step. Entry i of the lists and arrays [num_seqs] belongs to ``seqs[i]``.

    ``seqs[i]`` computes tokens ``starts[i] .. starts[i] + counts[i]`` and, where ``samples[i]``,
    draws its next token from the logits of the last one.
    """

    seqs: list[Sequence]
    rows: np.ndarray
    """int64, rows of the scheduler's tables."""
    starts: np.ndarray
    """int64, tokens whose KV is in the pages already."""
    counts: np.ndarray
    """int64, at least 1."""
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool."""
    sources: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64: where the one input token is still being sampled, its place among the samples of the
    plan before this one; -1 where all input tokens are known."""
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64, output tokens before the one drawn here, those under way included."""
    num_taken_out: int = 0
    """The roster's, when the plan was made."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(from, to) pages to copy whole before the step, in any order."""
    moves: list[Moves] = field(default_factory=list)
    """Between the GPU and the host pool, to be started in this order before the copies."""
    waits: Waits = NO_WAITS
    """Moves that the step's forward pass waits for."""
    jobs: list[DiskJob] = field(default_factory=list)
    """To be started."""
    num_staged: int = 0
    """The last ``num_staged`` sequences compute several tokens each over pages on the host."""
    in_place: bool = False
    """A block table names pages on the host."""
    preempted: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)
    """Ended here, with the reason in ``error``; they are in no other list."""

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return int(self.counts.sum())

    @property
    def max_query_len(self) -> int:
        """The most tokens that one sequence computes; the plan must not be empty."""
        return int(self.counts.max())

    @property
    def decodes(self) -> bool:
        """Every sequence computes one token and samples the next, over GPU pages alone; true of an
        empty plan."""
        return not self.in_place and bool(self.samples.all()) and bool((self.counts == 1).all())

    @property
    def num_samples(self) -> int:
        """Tokens that update expects."""
        return int(np.count_nonzero(self.samples))

    def extend(self, seqs: list[Sequence], starts: list[int], counts: list[int]) -> None:
        """Adds running sequences to the step."""
        self.seqs += seqs
        self.rows = np.append(self.rows, [seq.row for seq in seqs])
        self.starts = np.append(self.starts, starts)
        self.counts = np.append(self.counts, counts)

    def note_places(self) -> None:
        """Notes what the forward pass reads on the host; sequences that compute several tokens over
        such pages go to the end."""
        left = np.fromiter((seq.num_left > 0 for seq in self.seqs), bool, len(self.seqs))
        self.in_place = bool(left.any())
        staged = left & (self.counts > 1)
        self.num_staged = int(staged.sum())
        if self.num_staged:
            order = np.argsort(staged, kind="stable")
            self.seqs = [self.seqs[i] for i in order.tolist()]
            self.rows, self.starts = self.rows[order], self.starts[order]
            self.counts = self.counts[order]
