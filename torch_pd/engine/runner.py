"""Runner: turns a plan of integers into tensors and runs the model.

This is the one place where Python lists become tensors.
"""

import numpy as np
import torch
from torch import Tensor

from torch_pd.context import Batch, GroupBatch
from torch_pd.engine.scheduler import Plan, Scheduler
from torch_pd.kv.cache import KVPool
from torch_pd.nn.patch import forward_packed


class Runner:
    """Runs the steps of a patched model over one KV pool.

    Args:
        model: a causal LM patched by `torch_pd.patch_model`.
        pool: its KV pages.
        scheduler: whose tables the plans refer to.
    """

    def __init__(self, model: torch.nn.Module, pool: KVPool, scheduler: Scheduler):
        self.model = model
        self.pool = pool
        self.tables = scheduler.tables

    def run(self, plan: Plan, select: np.ndarray) -> Tensor:
        """Executes a plan; float32 logits [len(select), vocab] of the chosen rows of its tokens."""
        if plan.copies:
            self.pool.copy_within(plan.copies)
        batch, input_ids, positions = self.build(plan)
        logits = forward_packed(
            self.model, self.pool, batch, input_ids, positions, self._tensor(select, np.int64)
        )
        return logits.float()

    def build(self, plan: Plan) -> tuple[Batch, Tensor, Tensor]:
        """The batch, input_ids [num_tokens] and positions [num_tokens] of a plan."""
        rows, starts, counts = plan.rows, plan.starts, plan.counts
        query_start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=query_start[1:])
        seq_lens = starts + counts
        if plan.max_query_len == 1 and plan.samples.all():
            # Decoding: the one input token of each sequence is its newest.
            input_ids, positions, token_rows = self.tables.last_token[rows], starts, rows
        else:
            tokens: list[int] = []
            for seq, start, end in zip(plan.seqs, starts.tolist(), seq_lens.tolist(), strict=True):
                tokens += seq.token_ids[start:end]
            input_ids = np.asarray(tokens, np.int64)
            positions = np.arange(plan.num_tokens) + np.repeat(starts - query_start[:-1], counts)
            token_rows = np.repeat(rows, counts)
        tables, block_size = self.tables.block_tables, self.pool.block_size
        page, offset = np.divmod(positions, block_size)
        slots = tables[token_rows, page].astype(np.int64) * block_size + offset
        num_pages = -(-int(seq_lens.max()) // block_size)
        batch = Batch(
            num_tokens=plan.num_tokens,
            max_query_len=plan.max_query_len,
            query_start=self._tensor(query_start, np.int32),
            seq_lens=self._tensor(seq_lens, np.int32),
            groups=(
                GroupBatch(
                    block_tables=self._tensor(tables[rows, :num_pages], np.int32),
                    slots=self._tensor(slots, np.int64),
                ),
            ),
        )
        return batch, self._tensor(input_ids, np.int64), self._tensor(positions, np.int64)

    def _tensor(self, array: np.ndarray, dtype: type) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype)).to(self.pool.device)
