"""attend: paged attention of a batch, also over pages that lie in other pools."""

from typing import Any

from torch import Tensor

from torch_pd import ops
from torch_pd.context import Batch
from torch_pd.kv.cache import KVPool


def attend(
    q: Tensor, pool: KVPool, layer: int, group: int, batch: Batch, out: Tensor, **options: Any
) -> None:
    """``ops.paged_attention`` of ``q [T, H, D]`` into ``out`` over the pages of a layer.

    The sequences of ``batch.staged`` have many queries and pages in host memory. Their keys and
    values of this layer are gathered into one buffer first, each byte crossing the link once; the
    kernel would fetch them again for every tile of queries.

    Args:
        options: scale, window, soft_cap, sinks of `ops.paged_attention`.
    """
    cache = pool.layer(layer)
    scales: dict[str, Any] = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    tables = batch.groups[group].block_tables
    lens, starts, staged = batch.seq_lens, batch.query_start, batch.staged
    if staged is None:
        ops.paged_attention(
            q,
            cache.k,
            cache.v,
            tables,
            lens,
            starts,
            out,
            max_query_len=batch.max_query_len,
            places=batch.places,
            **scales,
            **options,
        )
        return
    others, first = len(lens) - len(staged.parts), staged.parts[0].first
    if others:
        ops.paged_attention(
            q[:first],
            cache.k,
            cache.v,
            tables[:others],
            lens[:others],
            starts[: others + 1],
            out[:first],
            max_query_len=staged.max_query_len,
            places=batch.places,
            **scales,
            **options,
        )
    for i, part in enumerate(staged.parts, others):
        pages = -(-part.length // pool.block_size)
        k, v = (x[: pages * pool.block_size] for x in staged.buffers)
        ops.gather_kv(
            cache.k,
            cache.v,
            tables[i : i + 1],
            lens[i : i + 1],
            part.key_start,
            k[: part.length],
            v[: part.length],
            places=batch.places,
            **scales,
        )
        shape = (pages, pool.block_size, *k.shape[1:])
        ops.paged_attention(
            q[part.first : part.end],
            k.view(shape),
            v.view(shape),
            staged.table[:, :pages],
            lens[i : i + 1],
            part.query_start,
            out[part.first : part.end],
            max_query_len=part.end - part.first,
            **options,
        )
