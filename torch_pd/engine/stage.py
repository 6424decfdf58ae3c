"""Stage: where prefill gathers pages that lie in other pools."""

import numpy as np
import torch
from torch import Tensor

from torch_pd.context import Staged, StagedPart
from torch_pd.kv.cache import KVPool


class Stage:
    """Room on the device for the keys and values of one layer of the longest sequence.

    Args:
        pool: whose layers are gathered.
        max_pages: of a sequence.
        dtype: of the gathered keys and values; fp8 and int8 pages are expanded.
    """

    def __init__(self, pool: KVPool, max_pages: int, dtype: torch.dtype):
        shape = pool.shape
        sizes = (max_pages * shape.block_size, shape.num_kv_heads, shape.head_dim)
        with torch.inference_mode(False):
            self.buffers = (
                torch.empty(sizes, dtype=dtype, device=pool.device),
                torch.empty(sizes, dtype=dtype, device=pool.device),
            )
        self.table = torch.arange(max_pages, dtype=torch.int32, device=pool.device)[None]

    @staticmethod
    def nbytes(pool_page_bytes: int, num_layers: int, max_pages: int) -> int:
        """Bytes for sequences of so many pages."""
        return pool_page_bytes // num_layers * max_pages

    def parts(
        self, query_start: np.ndarray, counts: np.ndarray, seq_lens: np.ndarray, views: Tensor
    ) -> Staged:
        """The batch's last sequences, as many as ``views`` int32 [n, 4] has rows (0, query tokens,
        0, length), on the device."""
        num = len(counts)
        first = num - len(views)
        parts = [
            StagedPart(
                first=int(query_start[i]),
                end=int(query_start[i] + counts[i]),
                length=int(seq_lens[i]),
                query_start=views[i - first, :2],
                key_start=views[i - first, 2:],
            )
            for i in range(first, num)
        ]
        longest = int(counts[:first].max(initial=1))
        return Staged(parts, longest, self.table, self.buffers)
