"""Typed faces of ``torch.ops.torch_pd.*``: shapes, meanings, fakes.

Letters in shapes: ``T`` tokens, ``H`` query heads, ``Hkv`` KV heads, ``D`` head_dim, ``P`` pages,
``B`` block_size, ``S`` sequences. A layer's ``k_cache, v_cache [P, B, Hkv, D]`` are strided views
of a pool (any page stride, last dimension contiguous). Slots are int64 ``page * B + offset`` with
-1 as padding; block table entries are int32 ``place << 28 | page`` (docs/layouts.md).

Every op checks shapes, dtypes, strides and devices and raises RuntimeError naming the op and both
values. On CPU the values inside index tensors are checked as well.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLACE_SHIFT = 28
"""A block table entry is ``place << PLACE_SHIFT | page``; place 0 is the pool given to the op."""

_FOLDER = Path(__file__).parent
_LIBRARY = _FOLDER / "libtorch_pd.so"
_CUDA_LIBRARY = _FOLDER / "libtorch_pd_cuda.so"

if not _LIBRARY.exists():
    raise ImportError(
        f"{_LIBRARY} is missing: build it with "
        "'pip install --no-build-isolation -e .' in the source tree of torch_pd"
    )
torch.ops.load_library(_LIBRARY)
if _CUDA_LIBRARY.exists() and torch.version.cuda is not None:
    torch.ops.load_library(_CUDA_LIBRARY)

_ops = torch.ops.torch_pd


def has_cuda_ops() -> bool:
    """True if the CUDA bodies are built and this torch can use them. Does not touch a GPU."""
    return _CUDA_LIBRARY.exists() and torch.version.cuda is not None


def cuda_status() -> str:
    """One line on the CUDA bodies: built and usable, or what to do."""
    if torch.version.cuda is None:
        return "not usable: this torch is a CPU build"
    if not _CUDA_LIBRARY.exists():
        return (
            "not built: install CUDA's nvcc, then TORCH_PD_CUDA=ON pip install "
            "--no-build-isolation --no-deps -e ."
        )
    return "built"


def cpu_isa() -> str:
    """The instruction set of the CPU bodies: base, avx2, avx512 or avx512bf16."""
    return _ops.cpu_isa()


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Scatters ``k, v [T, Hkv, D]`` into ``slots [T]`` of one layer of the pool.

    Two tokens must not name one slot (-1, padding, excepted). An int8 or a uint8 cache (of float8,
    docs/layouts.md) needs ``k_scale, v_scale`` float32 ``[P, B, Hkv]``, which are written too.
    """
    _ops.write_kv(k, v, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)


def gather_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    kv_start: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    places: Tensor | None = None,
) -> None:
    """Copies the pages of sequences into contiguous ``k, v [sum(seq_lens), Hkv, D]``.

    ``block_tables [S, max_pages]`` and ``seq_lens [S]`` int32; ``kv_start [S + 1]`` int32 is the
    cumulative sum of ``seq_lens`` with a leading 0.
    """
    _ops.gather_kv(
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        kv_start,
        k,
        v,
        k_scale=k_scale,
        v_scale=v_scale,
        places=places,
    )


def copy_pages(src: Tensor, dst: Tensor, moves: Tensor) -> None:
    """Copies whole pages: ``moves [M, 2]`` int64 rows are (page of src, page of dst).

    ``src, dst [pages, ...]`` are pools of one dtype and page shape; they may be the same pool if no
    page is both read and written. No page may be written twice.
    """
    _ops.copy_pages(src, dst, moves)


def rope_write_kv(
    qkv: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    shard_heads: Sequence[int] | None = None,
    blocked: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Optional q/k RMSNorm, rotary embedding and KV write in one pass over the merged projection.

    ``qkv [T, (H + 2 Hkv) * D]`` holds q, k, v heads, in blocks ``q0 k0 v0 q1 k1 v1 ...`` if
    ``shard_heads`` (KV heads of each shard) is given. If ``blocked`` too, qkv is contiguous and the
    columns of each shard are a contiguous block ``[T, columns]``, one behind the other: what an
    exchange with the shards receives. ``q [T, H, D]`` is the output; k and v go to ``slots [T]``
    (-1: q only). ``cos, sin [T, R]`` as Hugging Face makes them (half rotation over
    the first R dimensions; float32 or qkv's dtype); None rotates nothing. ``q_norm, k_norm``:
    ``[D]`` normalises each head, ``[H * D]`` and ``[Hkv * D]`` all heads at once; the factor is
    ``norm_offset + weight``. Arithmetic is float32.
    """
    _ops.rope_write_kv(
        qkv,
        q,
        k_cache,
        v_cache,
        slots,
        cos=cos,
        sin=sin,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        norm_offset=norm_offset,
        shard_heads=shard_heads,
        blocked=blocked,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    out: Tensor,
    scale: float,
    max_query_len: int,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    places: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Causal attention of packed queries ``q [T, H, D]`` over paged keys and values into ``out``.

    Sequence i owns queries ``query_start[i]:query_start[i + 1]``; they are the last ones of its
    ``seq_lens[i]`` tokens, all of which are in the cache already. ``window`` 0 is none, else a
    query sees keys less than ``window`` back. ``soft_cap`` 0 is none, else scores become
    ``soft_cap * tanh(score / soft_cap)``. ``sinks`` float32 ``[H]`` join the softmax without a
    value. ``places`` int64 ``[N, 2]`` (base address, pages) resolves block table entries of other
    pools; row 0 is this pool. ``lse`` float32 ``[T, H]`` receives the natural log-sum-exp of the
    scaled scores (sinks included). Rows of a sequence with no queries are not touched.
    ``max_query_len`` bounds any sequence's number of queries and may choose the kernel.
    """
    _ops.paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start,
        out,
        scale,
        max_query_len,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        places=places,
        lse=lse,
    )


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Folds a partial result over other keys into ``out [T, H, D]``, ``lse [T, H]`` float32.

    Rows with an lse of -inf saw no key and carry no weight.
    """
    _ops.merge_attention(out, lse, other, other_lse)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    scale: float = 1.0,
    offset: float = 0.0,
) -> None:
    """``out = x / rms(x) * (offset + weight)`` over the rows of ``x [T, C]``; float32 inside.

    With ``residual [T, C]``: first ``residual += scale * x`` in place, rounded to its dtype, then
    the norm of that. ``out`` may be ``x``.
    """
    _ops.rms_norm(x, weight, out, eps, residual=residual, scale=scale, offset=offset)


def gated_act(
    x: Tensor, out: Tensor, activation: str, *, shard_widths: Sequence[int] | None = None
) -> None:
    """``out [T, W] = act(gate) * up`` of ``x [T, 2 W]`` = gate, up.

    ``shard_widths`` gives the blocks of ``gate0 up0 gate1 up1 ...``. ``activation`` is silu, gelu
    (exact) or gelu_tanh.
    """
    _ops.gated_act(x, out, activation, shard_widths=shard_widths)


def pack_shards(x: Tensor, out: Tensor, widths: Sequence[int]) -> None:
    """Columns of ``x [T, W]`` to blocks ``[T, widths[s]]``, one behind the other in ``out``.

    ``out [T * W]`` is contiguous; ``widths`` sum to W and may be unequal or 0 (at most 64). The
    blocks are what an exchange with the shards sends.
    """
    _ops.pack_shards(x, out, widths)


def unpack_shards(x: Tensor, out: Tensor, widths: Sequence[int]) -> None:
    """The inverse of `pack_shards`: blocks ``x [T * W]`` to columns of ``out [T, W]``."""
    _ops.unpack_shards(x, out, widths)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out [M, N] = x [M, K] @ weight [N, K].T + bias [N]``, float32 accumulation, CPU only.

    A row of ``out`` depends on its row of ``x`` alone, bit for bit, whatever M is: batching does
    not change a result. Where the CPU has a dot product of bfloat16, it takes subnormal values of
    bfloat16 as zero.
    """
    _ops.linear(x, weight, bias, out)


def adjust_logits(logits: Tensor, entries: Tensor, bias: Tensor, penalties: Tensor) -> None:
    """Biases and penalties of single tokens, in place: ``logits [n, V]``, CUDA only.

    ``entries`` int32 ``[E, 3]`` are rows (row of logits, token, count); ``bias`` float32 ``[E]`` is
    added first; then, if count >= 0, ``penalties`` float32 ``[n, 3]`` apply: repetition (divides a
    positive logit, multiplies another), frequency times count, presence if count > 0. Row -1 is
    padding. No (row, token) may occur twice. Rounded to the dtype of ``logits``: give float32.
    """
    _ops.adjust_logits(logits, entries, bias, penalties)


def sample(
    logits: Tensor, tokens: Tensor, settings: Tensor | None = None, keys: Tensor | None = None
) -> None:
    """Chooses ``tokens`` int64 ``[n]`` from ``logits [n, V]``, V at most 2^20, CUDA only.

    ``settings`` float64 ``[n, 3]`` holds temperature, top_p, min_p; ``keys`` int64 ``[n, 4]`` holds
    top_k (0: off), and seed, index and position of the uniform number (`engine.draw.uniforms`).
    Temperature under 1e-5, top_k 1, or no settings: the best token, of equals the lowest id. Else
    min_p, top_k, top_p in that order (top_k and top_p keep of equals the lowest ids), and the
    inverse CDF over what they leave in the order of token ids. A row depends on nothing beside it
    and is the same in every run. A row that holds NaN or infinity, or nothing but -infinity, gives
    -1 and raises the error flag (`device_errors`).
    """
    _ops.sample(logits, tokens, settings, keys)


def exchange(
    x: Tensor,
    out: Tensor,
    inbox: Tensor,
    inboxes: Sequence[int],
    rank: int,
    sends: Sequence[int],
    receives: Sequence[int],
    add: bool,
    blocks: int,
    timeout_s: float,
) -> None:
    """A message from every rank to every other, through inboxes that all map; CUDA only.

    Collective: all ranks call it in the same order with the same ``blocks``, sizes of messages that
    agree, and nothing else in their inboxes. Works in CUDA graphs. `weights.mailbox` makes the
    inboxes.

    ``sends`` has four numbers for each rank, the matrix in contiguous ``x`` that it gets: first
    element, rows, columns, row stride; all 0 if it gets nothing. ``receives`` says the same of the
    matrices in contiguous ``out``. The rank's message to itself is copied. With ``add`` the sum of
    the messages is written, in float32 and in the order of the ranks: all matrices received are
    the same one. If nothing comes from a rank for ``timeout_s``, the error flag is raised
    (`device_errors`), ``out`` is garbage, and this and all later exchanges end at once.

    Args:
        inbox: uint8, this rank's.
        inboxes: the address of each rank's inbox, as this process maps it.
        blocks: thread blocks, at most 128.
    """
    _ops.exchange(x, out, inbox, inboxes, rank, sends, receives, add, blocks, timeout_s)


_ERROR_OPS = (
    "?",
    "paged_attention",
    "write_kv",
    "gather_kv",
    "copy_pages",
    "rope_write_kv",
    "sample",
    "adjust_logits",
    "exchange",
)
_ERRORS = (
    "an unknown error",
    "a block table entry of a page beyond its pool",
    "a block table entry of a place beyond the table of places",
    "a length or start outside its tables or tensors",
    "a slot outside the pool",
    "a move from or to a page outside its pool",
    "a row of logits that holds NaN or infinity, or allows no token",
    "a token id or row outside the logits",
    "nothing came in time from the rank",
)


def device_errors(device: torch.device | str, reset: bool = True) -> Tensor:
    """What the kernels on ``device`` found wrong in the values of tensors: int32 ``[4]`` there.

    CUDA kernels cannot raise: they drop such an access and count it. The row holds the count, the
    op and error, and the value of the first one, low and high half; `describe_errors` reads it once
    it is on the host. ``reset`` starts anew. All zeros on CPU, where ops raise. Does not wait.
    """
    return _ops.device_errors(torch.empty(0, device=device), reset)


def describe_errors(row: Sequence[int]) -> str | None:
    """The message of a fetched row of `device_errors`, None if it counts no error."""
    count, code, low, high = row
    if count == 0:
        return None
    op, error = code & 0xFF, code >> 8
    name = _ERROR_OPS[op] if op < len(_ERROR_OPS) else _ERROR_OPS[0]
    what = _ERRORS[error] if error < len(_ERRORS) else _ERRORS[0]
    value = (high << 32) | (low & 0xFFFFFFFF)
    more = "" if count == 1 else f" (and {count - 1} more errors)"
    return f"torch_pd::{name} on the device: {what}: {value}{more}"


def _register_fake(name: str) -> None:
    """The fake of an op that returns nothing and writes into its arguments.

    Meta tensors end here as well: a call that mixes them with real ones would do nothing.
    """

    def fake(*args: Any, **kwargs: Any) -> None:
        values = (*args, *kwargs.values())
        devices = {str(value.device) for value in values if isinstance(value, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(
                f"torch_pd::{name}: tensors must be on one device, got {sorted(devices)}"
            )

    torch.library.register_fake(f"torch_pd::{name}", fake)


_MUTATING = (
    "write_kv",
    "gather_kv",
    "copy_pages",
    "rope_write_kv",
    "paged_attention",
    "merge_attention",
    "rms_norm",
    "gated_act",
    "pack_shards",
    "unpack_shards",
    "linear",
    "adjust_logits",
    "sample",
    "exchange",
)
for _name in _MUTATING:
    _register_fake(_name)


@torch.library.register_fake("torch_pd::device_errors")
def _device_errors_fake(like: Tensor, reset: bool) -> Tensor:
    return like.new_empty([4], dtype=torch.int32)


def _refuse_cuda(name: str) -> None:
    """Without the CUDA bodies a call with CUDA tensors says what to do."""

    def body(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"torch_pd::{name}: the CUDA ops are {cuda_status()}")

    torch.library.impl(f"torch_pd::{name}", "CUDA", body)


if not has_cuda_ops():
    for _name in (*_MUTATING, "device_errors"):
        _refuse_cuda(_name)
