"""Plain torch references of the ops, in float64 unless said otherwise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PLACE_SHIFT = 28
PAGE_MASK = (1 << PLACE_SHIFT) - 1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Largest error allowed, relative to the largest value of the reference, by dtype of the result."""


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output full of NaN: what an op leaves unwritten shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|; NaN anywhere in ``a`` gives NaN, which fails every ``<``."""
    if b.numel() == 0:
        return 0.0
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)).item()


def ref_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [M, K] @ weight [N, K].T + bias [N]``."""
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


# --- paged KV and fused ops ---


FLOAT8, INT8 = torch.uint8, torch.int8
BYTES = {FLOAT8: 31 / 4096, INT8: 127}
"""Dtypes of caches that have scales, and their largest values."""


def values_of(x: Tensor) -> Tensor:
    """What a cache holds, but for scales: float32 of bytes, anything else as it is."""
    if x.dtype == INT8:
        return x.float()
    if x.dtype != FLOAT8:
        return x
    bits = x.to(torch.int16)
    return ((bits & 0x80) << 8 | (bits & 0x7F) << 6).view(torch.float16).float()


def as_bytes(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values, none above the largest of ``dtype``, rounded: int8 ties to even, float8 ties
    away from zero."""
    if dtype == INT8:
        return x.round().to(INT8)
    step = torch.exp2(x.abs().clamp_min(2.0**-14).log2().floor() - 4)
    step = torch.where(x.abs() >= 32 * step, 2 * step, step)  # log2 is not exact
    step = torch.where(x.abs() < 16 * step, step / 2, step).clamp_min(2.0**-18)
    cut = ((x.abs() / step * 2).floor() + 1).div(2).floor() * step
    bits = cut.copysign(x).half().view(torch.int16)
    return (bits >> 8 & 0x80 | bits >> 6 & 0x7F).to(FLOAT8)


@dataclass
class Pool:
    """A KV pool ``[P, L, 2, B, Hkv, D]`` (bytes: scales behind the data) full of guard values."""

    memory: Tensor
    """uint8 [P, bytes of a page record]: all that a faulty write inside the pool could change."""
    data: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    """float32 [P, L, B, Hkv], of bytes only."""

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's ``k_cache, v_cache [P, B, Hkv, D]``."""
        return self.data[:, layer, 0], self.data[:, layer, 1]

    def scales(self, layer: int) -> dict[str, Tensor]:
        """One layer's ``k_scale, v_scale [P, B, Hkv]`` as keyword arguments, empty without."""
        if self.k_scale is None:
            return {}
        return {"k_scale": self.k_scale[:, layer], "v_scale": self.v_scale[:, layer]}

    def clone(self) -> "Pool":
        return _pool_views(self.memory.clone(), self.data.shape, self.data.dtype)


def _pool_views(memory: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Pool:
    size = math.prod(shape[1:]) * dtype.itemsize
    data = memory[:, :size].view(dtype).unflatten(1, tuple(shape[1:]))
    if dtype not in BYTES:
        return Pool(memory, data, None, None)
    scales = memory[:, size:].view(torch.float32).unflatten(1, tuple(shape[1:5]))
    return Pool(memory, data, scales[:, :, 0], scales[:, :, 1])


def make_pool(
    num_pages: int,
    num_layers: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> Pool:
    """A pool of normally distributed values; scales are positive."""
    shape = (num_pages, num_layers, 2, block_size, num_kv_heads, head_dim)
    size = math.prod(shape[1:]) * dtype.itemsize
    if dtype in BYTES:
        size += math.prod(shape[1:5]) * 4
    pool = _pool_views(torch.zeros(num_pages, size, dtype=torch.uint8), shape, dtype)
    values = torch.randn(shape, generator=generator)
    if dtype in BYTES:
        values = as_bytes((values / 6).clamp(-1, 1) * BYTES[dtype], dtype)
    pool.data.copy_(values)
    for scale in (pool.k_scale, pool.v_scale):
        if scale is not None:
            scale.copy_(torch.rand(scale.shape, generator=generator) + 0.1)
    return pool


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x [..., D]`` as bytes and its scales float32 ``[...]``: amax over the largest value of the
    dtype, 1 where that is not a normal number."""
    scale = x.float().abs().amax(-1) / BYTES[dtype]
    scale = torch.where(scale < 2.0**-126, 1.0, scale)
    return as_bytes(x.float() * (1 / scale)[..., None], dtype), scale


def ref_write_kv(k: Tensor, v: Tensor, pool: Pool, layer: int, slots: Tensor) -> None:
    block_size = pool.data.shape[3]
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, token = divmod(slot, block_size)
        for which, x, scale in ((0, k[t], pool.k_scale), (1, v[t], pool.v_scale)):
            if scale is not None:
                x, scale[page, layer, token] = quantize(x, pool.data.dtype)
            pool.data[page, layer, which, token] = x


def ref_gather_kv(
    pools: Sequence[Pool], layer: int, block_tables: Tensor, seq_lens: Tensor
) -> tuple[Tensor, Tensor]:
    """``k, v float32 [sum(seq_lens), Hkv, D]``; ``pools[place]`` resolves the entries."""
    out = []
    block_size = pools[0].data.shape[3]
    for table, length in zip(block_tables.tolist(), seq_lens.tolist(), strict=True):
        for position in range(length):
            entry = table[position // block_size]
            pool, page = pools[entry >> PLACE_SHIFT], entry & PAGE_MASK
            token = position % block_size
            pair = values_of(pool.data[page, layer, :, token]).float()
            if pool.k_scale is not None:
                scale = torch.stack(
                    [pool.k_scale[page, layer, token], pool.v_scale[page, layer, token]]
                )
                pair = pair * scale[..., None]
            out.append(pair)
    if not out:
        empty = torch.empty(0, *pools[0].data.shape[4:])
        return empty, empty
    stacked = torch.stack(out)
    return stacked[:, 0], stacked[:, 1]


def ref_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """float64 norm and the new residual (in its dtype) that it was computed from."""
    if residual is not None:
        residual = (residual.float() + scale * x.float()).to(x.dtype)
        x = residual
    wide = x.double()
    norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return norm * (offset + weight.double()), residual


def ref_activation(x: Tensor, name: str) -> Tensor:
    """float64, accurate in the tails as well."""
    x = x.double()
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "gelu":
        return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))
    assert name == "gelu_tanh"
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def split_shards(x: Tensor, widths: Sequence[Sequence[int]]) -> list[Tensor]:
    """Merged columns ``a0 b0 .. a1 b1 ..`` -> ``[a, b, ..]``; ``widths[s]`` of shard s."""
    parts: list[list[Tensor]] = [[] for _ in widths[0]]
    start = 0
    for shard in widths:
        for part, width in zip(parts, shard, strict=True):
            part.append(x[:, start : start + width])
            start += width
    assert start == x.shape[1]
    return [torch.cat(part, 1) for part in parts]


def ref_pack_shards(x: Tensor, widths: Sequence[int]) -> Tensor:
    """Columns of ``x [T, W]`` as blocks ``[T, widths[s]]`` behind each other, ``[T * W]``."""
    return torch.cat([part.flatten() for part in x.split(list(widths), 1)])


def ref_rope(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    shard_heads: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[T, H, D]``, k, v ``[T, Hkv, D]`` in float64, before any rounding."""
    group, dim = num_heads // num_kv_heads, qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    shards = [num_kv_heads] if shard_heads is None else shard_heads
    parts = split_shards(qkv.double(), [(n * group * dim, n * dim, n * dim) for n in shards])
    q, k, v = (part.unflatten(1, (-1, dim)) for part in parts)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        if weight.numel() == dim:
            return ref_rms_norm(x, weight, eps, offset=norm_offset)[0]
        return ref_rms_norm(x.flatten(1), weight, eps, offset=norm_offset)[0].view_as(x)

    def rotate(x: Tensor) -> Tensor:
        width = cos.shape[1]
        part = x[..., :width]
        half = torch.cat([-part[..., width // 2 :], part[..., : width // 2]], -1)
        turned = part * cos.double()[:, None] + half * sin.double()[:, None]
        return torch.cat([turned, x[..., width:]], -1)

    if q_norm is not None:
        q, k = norm(q, q_norm), norm(k, k_norm)
    if cos is not None:
        q, k = rotate(q), rotate(k)
    return q, k, v


def assert_rounded(actual: Tensor, expected: Tensor, float32_error: float = 2e-6) -> None:
    """``actual`` is ``expected`` (float64) up to one rounding and float32 arithmetic.

    ``float32_error`` is relative to the largest magnitude of the row.
    """
    assert not actual.isnan().any()
    half_step = torch.finfo(actual.dtype).eps / 2
    # Below the smallest normal number steps do not shrink any more.
    tiny = torch.finfo(actual.dtype).smallest_normal * half_step * 2
    largest = expected.abs().amax(-1, keepdim=True) if expected.numel() else expected
    allowed = expected.abs() * half_step + largest * float32_error + tiny
    worst = ((actual.double() - expected).abs() - allowed).max() if expected.numel() else -1
    assert worst <= 0, f"off by {worst} more than allowed"


def assert_rope_written(
    pool: Pool, before: Pool, layer: int, slots: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype
) -> None:
    """``pool``, whose memory is used up here, is ``before`` but for the keys and values of
    `ref_rope` in a layer's slots; ``dtype`` is what the op was given them in."""
    written = slots >= 0
    page, token = slots[written] // pool.data.shape[3], slots[written] % pool.data.shape[3]
    k_cache, v_cache = pool.layer(layer)
    if pool.k_scale is None:
        assert_rounded(k_cache[page, token], k[written], 4e-6)
        assert torch.equal(v_cache[page, token], v[written].to(dtype))
    else:
        v_bytes, v_scale = quantize(v[written], v_cache.dtype)
        assert torch.equal(v_cache[page, token].view(torch.uint8), v_bytes.view(torch.uint8))
        assert torch.equal(pool.scales(layer)["v_scale"][page, token], v_scale)
        scale = pool.scales(layer)["k_scale"][page, token]
        largest = k[written].abs().amax(-1)
        assert ((scale - largest / BYTES[v_cache.dtype]).abs() <= scale * 1e-5).all()
        restored = values_of(k_cache[page, token]).double() * scale[..., None]
        if v_cache.dtype == INT8:
            allowed = largest[..., None].expand_as(k[written]) * 0.501 / 127
        else:
            # Half a step of four mantissa bits, or of the smallest one.
            allowed = k[written].abs() * (2**-5 + 1e-5)
            allowed += largest[..., None] * (1.01 * 2**-19 / BYTES[FLOAT8] + 1e-5)
        assert ((restored - k[written]).abs() <= allowed).all()
    # Everything else in the pool is as it was.
    for cache, old in zip(pool.layer(layer), before.layer(layer), strict=True):
        cache[page, token] = old[page, token]
    for name, scale in pool.scales(layer).items():
        scale[page, token] = before.scales(layer)[name][page, token]
    assert torch.equal(pool.memory, before.memory)


def ref_paged_attention(
    q: Tensor,
    caches: list[tuple[Tensor, Tensor]],
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [T, H, D]`` over ``caches``, the (K, V) of every place.

    Returns out ``[T, H, Dv]`` and lse ``[T, H]``; rows of no sequence stay NaN.
    """
    heads = q.shape[1]
    block_size, kv_heads = caches[0][0].shape[1:3]
    out = poisoned(q.shape[0], heads, caches[0][1].shape[3], dtype=torch.float64)
    lse = poisoned(q.shape[0], heads, dtype=torch.float64)
    for s, length in enumerate(seq_lens.tolist()):
        begin, end = query_start[s].item(), query_start[s + 1].item()
        if begin == end:
            continue
        entries = block_tables[s, : -(-length // block_size)].tolist()
        k, v = (
            torch.cat([caches[e >> PLACE_SHIFT][i][e & PAGE_MASK] for e in entries])[:length]
            .double()
            .repeat_interleave(heads // kv_heads, 1)
            for i in (0, 1)
        )
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].double(), k) * scale
        if soft_cap:
            scores = soft_cap * (scores / soft_cap).tanh()
        age = torch.arange(length - (end - begin), length)[:, None] - torch.arange(length)
        hidden = age < 0
        if window:
            hidden |= age >= window
        scores.masked_fill_(hidden, -torch.inf)
        if sinks is not None:
            column = sinks.double()[:, None, None].expand(-1, end - begin, 1)
            scores = torch.cat([scores, column], 2)
        lse[begin:end] = scores.logsumexp(2).T
        weights = scores.softmax(2)[:, :, :length]
        if window:  # what is behind every window may be anything
            v = torch.where((hidden.all(0))[:, None, None], 0, v)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v)
    return out, lse
