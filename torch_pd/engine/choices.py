"""Choices: how the running sequences are sampled, as numpy rows beside the scheduler's tables."""

import numpy as np

from torch_pd.engine.plan import Plan
from torch_pd.engine.sampling_row import SamplingRow
from torch_pd.engine.tables import Tables

PLAIN, ADJUSTED, HOST = range(3)
"""Kinds of rows: settings say all; logit_bias or min_tokens change some logits first; every token
must be known on the host before the next one is drawn (penalties, logprobs)."""


class Choices:
    """A row for each row of the scheduler's tables, written when its sequence is first met.

    Args:
        tables: of the scheduler.
        vocab_size: tokens that may be chosen.
    """

    def __init__(self, tables: Tables, vocab_size: int):
        rows = len(tables.seq_id)
        self._tables = tables
        self._vocab_size = vocab_size
        self._owner = np.full(rows, -1, np.int64)
        self.settings = np.zeros((rows, 3))
        """float64: temperature, top_p, min_p (`ops.sample`)."""
        self.keys = np.zeros((rows, 4), np.int64)
        """top_k, seed, index; the last column is the step's position."""
        self.kind = np.zeros(rows, np.int8)

    def update(self, plan: Plan) -> None:
        """Fills the rows of sequences that are new in this plan."""
        rows = plan.rows
        for i in np.flatnonzero(self._owner[rows] != self._tables.seq_id[rows]).tolist():
            seq, row = plan.seqs[i], int(rows[i])
            choice: SamplingRow = seq.data.row
            params = choice.params
            self._owner[row] = seq.seq_id
            self.settings[row] = params.temperature, params.top_p, params.min_p
            top_k = params.top_k if 0 < params.top_k < self._vocab_size else 0
            seed = np.array([choice.seed], np.uint64).view(np.int64)[0]
            self.keys[row, :3] = top_k, seed, choice.index
            self.kind[row] = HOST if choice.on_host else ADJUSTED if choice.adjusted else PLAIN

    def kind_of(self, plan: Plan) -> int:
        """The largest kind among the rows that sample."""
        return int(self.kind[plan.rows[plan.samples]].max(initial=PLAIN))

    def of(self, plan: Plan, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Settings and keys of the rows that sample, padded to ``size`` rows."""
        rows = plan.rows[plan.samples]
        settings, keys = np.zeros((size, 3)), np.zeros((size, 4), np.int64)
        settings[: len(rows)] = self.settings[rows]
        keys[: len(rows)] = self.keys[rows]
        keys[: len(rows), 3] = plan.positions
        return settings, keys
