"""One small call that reaches each kernel, against the CPU body; what all ops refuse on a GPU.

Small and fully initialised, so that the sanitizers finish on it:

    compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_every_kernel_gpu.py
    (racecheck and initcheck likewise)
"""

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from device_pools import DEVICE, FLOAT8, INT8, error
from test_ops_contract import CASES, WRITTEN, written
from torch import Tensor

from torch_pd import ops

BF16, F32 = torch.bfloat16, torch.float32


def normal(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(size).to(dtype)


def norm(rows: int, width: int, residual: bool = False) -> dict[str, Any]:
    case = {"x": normal(rows, width), "weight": normal(width), "out": normal(rows, width)}
    return case | {"eps": 1e-6} | ({"residual": normal(rows, width)} if residual else {})


def gated(widths: list[int]) -> dict[str, Any]:
    x, out = normal(3, 2 * sum(widths)), normal(3, sum(widths))
    return {"x": x, "out": out, "activation": "silu", "shard_widths": widths}


def shards(op: str, widths: list[int]) -> dict[str, Any]:
    matrix, blocks = normal(3, sum(widths)), normal(3 * sum(widths))
    x, out = (matrix, blocks) if op == "pack_shards" else (blocks, matrix)
    return {"x": x, "out": out, "widths": widths}


def pool(dtype: torch.dtype, kv_heads: int = 2, dim: int = 128) -> dict[str, Any]:
    """One layer's arguments, views of a pool that is kept whole."""
    made = reference.make_pool(6, 1, 16, kv_heads, dim, dtype)
    return {"pool": made}


def rope(dtype: torch.dtype, tokens: int = 5, dim: int = 128, **more: Any) -> dict[str, Any]:
    heads, kv_heads = 4, 2
    return {
        "qkv": normal(tokens, (heads + 2 * kv_heads) * dim),
        "q": normal(tokens, heads, dim),
        **pool(dtype, kv_heads, dim),
        "slots": torch.randperm(96)[:tokens].where(torch.arange(tokens) != 1, -1),
        "cos": normal(tokens, dim),
        "sin": normal(tokens, dim),
        **more,
    }


def write(dtype: torch.dtype, dim: int = 128) -> dict[str, Any]:
    k, v = normal(2, 5, 2, dim)
    return {"k": k, "v": v, **pool(dtype, 2, dim), "slots": torch.tensor([17, 3, -1, 40, 41])}


def tables(lens: list[int]) -> dict[str, Any]:
    entries = torch.tensor([[1, 3, 5, 0], [2, 4, 0, 0]], dtype=torch.int32)
    return {"block_tables": entries, "seq_lens": torch.tensor(lens, dtype=torch.int32)}


def gather(dtype: torch.dtype, dim: int = 128) -> dict[str, Any]:
    k, v = normal(2, 57, 2, dim)
    starts = torch.tensor([0, 40, 57], dtype=torch.int32)
    return {**pool(dtype, 2, dim), **tables([40, 17]), "kv_start": starts, "k": k, "v": v}


def attention(queries: list[int], dtype: torch.dtype = BF16, dim: int = 128) -> dict[str, Any]:
    tokens, q_dtype = sum(queries), F32 if dtype == F32 else BF16
    return {
        "q": normal(tokens, 4, dim, dtype=q_dtype),
        **pool(dtype, 2, dim),
        **tables([60, 29]),
        "query_start": torch.tensor([0, *queries], dtype=torch.int32).cumsum(0).int(),
        "out": normal(tokens, 4, dim, dtype=q_dtype),
        "scale": dim**-0.5,
        "max_query_len": max(queries),
        "lse": torch.randn(tokens, 4),
    }


def whole(heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    return {"q_norm": normal(heads * dim), "k_norm": normal(kv_heads * dim)}


SMALL: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "rms_norm few rows": ("rms_norm", lambda: norm(3, 5120)),
    "rms_norm many rows": ("rms_norm", lambda: norm(300, 640)),
    "rms_norm many wide rows": ("rms_norm", lambda: norm(300, 5120)),
    "rms_norm residual": ("rms_norm", lambda: norm(300, 5120, residual=True)),
    "rms_norm unaligned": ("rms_norm", lambda: norm(3, 77, residual=True)),
    "gated_act": ("gated_act", lambda: gated([256, 0, 128])),
    "gated_act unaligned": ("gated_act", lambda: gated([5, 7])),
    "pack_shards": ("pack_shards", lambda: shards("pack_shards", [256, 0, 128])),
    "pack_shards unaligned": ("pack_shards", lambda: shards("pack_shards", [5, 7])),
    "unpack_shards": ("unpack_shards", lambda: shards("unpack_shards", [256, 0, 128])),
    "rope": ("rope_write_kv", lambda: rope(BF16)),
    "rope norm": ("rope_write_kv", lambda: rope(BF16, q_norm=normal(128), k_norm=normal(128))),
    "rope many tokens": (
        "rope_write_kv",
        lambda: rope(BF16, tokens=90, q_norm=normal(128), k_norm=normal(128)),
    ),
    "rope blocked": (
        "rope_write_kv",
        lambda: rope(BF16, shard_heads=[1, 0, 1], blocked=True),
    ),
    "rope whole norm": ("rope_write_kv", lambda: rope(BF16, **whole(4, 2, 128))),
    "rope odd width": ("rope_write_kv", lambda: rope(BF16, dim=18, **whole(4, 2, 18))),
    "rope float8": ("rope_write_kv", lambda: rope(FLOAT8)),
    "rope int8": ("rope_write_kv", lambda: rope(INT8)),
    "write_kv": ("write_kv", lambda: write(BF16)),
    "write_kv float8": ("write_kv", lambda: write(FLOAT8)),
    "write_kv float8 odd": ("write_kv", lambda: write(FLOAT8, dim=18)),
    "write_kv int8": ("write_kv", lambda: write(INT8)),
    "write_kv int8 odd": ("write_kv", lambda: write(INT8, dim=18)),
    "gather_kv": ("gather_kv", lambda: gather(BF16)),
    "gather_kv float8": ("gather_kv", lambda: gather(FLOAT8)),
    "gather_kv int8": ("gather_kv", lambda: gather(INT8)),
    "copy_pages": (
        "copy_pages",
        lambda: {
            "src": normal(4, 3, 64),
            "dst": normal(4, 3, 64),
            "moves": torch.tensor([[0, 3], [2, 1]]),
        },
    ),
    "decode": ("paged_attention", lambda: attention([1, 2])),
    "decode float8": ("paged_attention", lambda: attention([1, 2], FLOAT8)),
    "decode int8": ("paged_attention", lambda: attention([1, 2], INT8)),
    "decode wide": ("paged_attention", lambda: attention([1, 1], dim=256)),
    "prefill": ("paged_attention", lambda: attention([60, 29])),
    "prefill mixed": ("paged_attention", lambda: attention([60, 1])),
    "prefill float8": ("paged_attention", lambda: attention([60, 29], FLOAT8)),
    "prefill int8": ("paged_attention", lambda: attention([60, 29], INT8)),
    "prefill general": ("paged_attention", lambda: attention([60, 29], dim=80)),
    "attention plain": ("paged_attention", lambda: attention([3, 29], F32, dim=24)),
    "attention plain int8": ("paged_attention", lambda: attention([3, 29], INT8, dim=24)),
    "merge_attention": (
        "merge_attention",
        lambda: {
            "out": normal(5, 4, 64),
            "lse": torch.randn(5, 4),
            "other": normal(5, 4, 64),
            "other_lse": torch.randn(5, 4),
        },
    ),
}


def arguments(case: dict[str, Any], device: str) -> dict[str, Any]:
    """The case with copies of its tensors on a device; a pool becomes its layer's arguments."""
    case = dict(case)
    made = case.pop("pool", None)
    moved = {k: v.clone().to(device) if isinstance(v, Tensor) else v for k, v in case.items()}
    if made is None:
        return moved
    memory = made.memory.clone().to(device)
    there = reference._pool_views(memory, made.data.shape, made.data.dtype)
    k_cache, v_cache = there.layer(0)
    return moved | {"k_cache": k_cache, "v_cache": v_cache, **there.scales(0)}


@pytest.mark.parametrize("name", SMALL)
def test_kernel_equals_the_cpu_body(name):
    torch.manual_seed(0)
    op, make = SMALL[name]
    case = make()
    expected, actual = arguments(case, "cpu"), arguments(case, DEVICE)
    getattr(ops, op)(**expected)
    getattr(ops, op)(**actual)
    assert error() is None
    for argument in written(op):
        if expected.get(argument) is None:
            continue
        want, got = expected[argument], actual[argument].cpu()
        # float8: one step of four mantissa bits; bfloat16: two roundings.
        allowed = 0.04 if want.dtype == FLOAT8 else 0.02
        if "cache" in argument:
            want, got = reference.values_of(want), reference.values_of(got)
        assert reference.relative_error(got, want) < allowed, argument


DEVICES = [
    (name, argument)
    for name in CASES
    if name not in ("linear", "device_errors")
    for argument, value in CASES[name]().items()
    if isinstance(value, Tensor)
]


@pytest.mark.parametrize(("name", "argument"), DEVICES)
def test_tensors_on_different_devices(name, argument):
    case = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in CASES[name]().items()}
    case[argument] = case[argument].cpu()
    assert len({v.device for v in case.values() if isinstance(v, Tensor)}) == 2
    with pytest.raises(RuntimeError, match=rf"torch_pd::{name}: .* is on (cpu|cuda:\d+) but "):
        getattr(ops, name)(**case)


@pytest.mark.parametrize(("name", "argument"), [w for w in WRITTEN if w in DEVICES])
def test_dtypes_that_no_kernel_takes(name, argument):
    case = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in CASES[name]().items()}
    case[argument] = case[argument].double()
    with pytest.raises(RuntimeError, match=f"torch_pd::{name}: .*float64"):
        getattr(ops, name)(**case)
