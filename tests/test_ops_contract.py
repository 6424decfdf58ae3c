"""What holds for every op: opcheck, torch.compile, errors; and for the package: imports.

A new op needs a case in CASES; `test_every_op_has_a_case` fails until it has one.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from torch_pd import ops

TOKENS, HEADS, KV_HEADS, DIM, PAGES, BLOCK = 5, 4, 2, 8, 4, 16


def randn(*size: int) -> torch.Tensor:
    return torch.randn(size)


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cache() -> dict[str, torch.Tensor]:
    """One layer of a pool: pages with a stride of their own."""
    pool = randn(PAGES, 2, 2, BLOCK, KV_HEADS, DIM)
    return {"k_cache": pool[:, 0, 0], "v_cache": pool[:, 1, 1]}


def tables() -> dict[str, torch.Tensor]:
    return {
        "block_tables": int32([1, 3], [2, 0]),
        "seq_lens": int32(20, 3),
    }


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "write_kv": lambda: {
        "k": randn(TOKENS, KV_HEADS, DIM),
        "v": randn(TOKENS, KV_HEADS, DIM),
        **cache(),
        "slots": torch.tensor([17, 3, -1, 40, 41]),
    },
    "gather_kv": lambda: {
        **cache(),
        **tables(),
        "kv_start": int32(0, 20, 23),
        "k": randn(23, KV_HEADS, DIM),
        "v": randn(23, KV_HEADS, DIM),
    },
    "copy_pages": lambda: {
        "src": randn(PAGES, 2, 6),
        "dst": randn(PAGES, 2, 6),
        "moves": torch.tensor([[0, 3], [2, 1]]),
    },
    "rope_write_kv": lambda: {
        "qkv": randn(TOKENS, (HEADS + 2 * KV_HEADS) * DIM),
        "q": randn(TOKENS, HEADS, DIM),
        **cache(),
        "slots": torch.tensor([17, 3, -1, 40, 41]),
        "cos": randn(TOKENS, DIM),
        "sin": randn(TOKENS, DIM),
        "q_norm": randn(DIM),
        "k_norm": randn(DIM),
        "shard_heads": [0, 1, 1],
    },
    "paged_attention": lambda: {
        "q": randn(TOKENS, HEADS, DIM),
        **cache(),
        **tables(),
        "query_start": int32(0, 3, 5),
        "out": randn(TOKENS, HEADS, DIM),
        "scale": 0.3,
        "max_query_len": 3,
        "window": 9,
        "soft_cap": 20.0,
        "sinks": randn(HEADS),
        "lse": randn(TOKENS, HEADS),
    },
    "merge_attention": lambda: {
        "out": randn(TOKENS, HEADS, DIM),
        "lse": randn(TOKENS, HEADS),
        "other": randn(TOKENS, HEADS, DIM),
        "other_lse": randn(TOKENS, HEADS),
    },
    "rms_norm": lambda: {
        "x": randn(TOKENS, 24),
        "weight": randn(24),
        "out": randn(TOKENS, 24),
        "eps": 1e-6,
        "residual": randn(TOKENS, 24),
        "scale": 0.5,
        "offset": 1.0,
    },
    "gated_act": lambda: {
        "x": randn(TOKENS, 12),
        "out": randn(TOKENS, 6),
        "activation": "gelu_tanh",
        "shard_widths": [2, 4],
    },
    "pack_shards": lambda: {
        "x": randn(TOKENS, 12),
        "out": randn(TOKENS * 12),
        "widths": [4, 0, 7, 1],
    },
    "unpack_shards": lambda: {
        "x": randn(TOKENS * 12),
        "out": randn(TOKENS, 12),
        "widths": [4, 0, 7, 1],
    },
    "linear": lambda: {
        "x": randn(TOKENS, 24),
        "weight": randn(7, 24),
        "bias": randn(7),
        "out": randn(TOKENS, 7),
    },
    "device_errors": lambda: {"like": randn(1), "reset": True},
}
CUDA_ONLY = {"adjust_logits", "exchange", "sample"}
MUTATING = sorted(set(CASES) - {"device_errors"})


def overload(name: str):
    return getattr(torch.ops.torch_pd, name).default


def written(name: str) -> list[str]:
    schema = overload(name)._schema
    return [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]


def call_arguments(name: str, case: dict[str, Any]) -> tuple[list, dict]:
    arguments = overload(name)._schema.arguments
    args = [case[a.name] for a in arguments if not a.kwarg_only]
    return args, {a.name: case[a.name] for a in arguments if a.kwarg_only and a.name in case}


TENSORS = [
    (name, argument)
    for name in MUTATING
    for argument, value in CASES[name]().items()
    if isinstance(value, torch.Tensor)
]
WRITTEN = [(name, argument) for name in MUTATING for argument in written(name)]


# Sizes that the op takes from this argument alone: nothing else could disagree with them.
FREE_SIZES = {
    ("copy_pages", "src", 0),
    ("copy_pages", "dst", 0),
    ("copy_pages", "moves", 0),
    ("gather_kv", "block_tables", 1),
    ("paged_attention", "block_tables", 1),
}


def test_every_op_has_a_case():
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.split("::")[1] for name in names if name.startswith("torch_pd::")}
    assert ours - CUDA_ONLY - {"cpu_isa"} == set(CASES)
    for name in ours & CUDA_ONLY:
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_pd::{name}", "CPU")


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    torch.manual_seed(0)
    args, kwargs = call_arguments(name, CASES[name]())
    torch.library.opcheck(overload(name), args, kwargs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MUTATING)
def test_op_runs_inside_torch_compile(name, backend):
    torch.manual_seed(0)
    op, outputs = getattr(ops, name), written(name)
    case = CASES[name]()
    given_outputs = [argument for argument in outputs if argument in case]

    def run(**case):
        op(**case)
        # Something behind the op must see what it wrote.
        return [case[argument] * 2 for argument in given_outputs]

    def fresh():
        return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in case.items()}

    eager, compiled = fresh(), fresh()
    expected = run(**eager)
    torch.compiler.reset()
    actual = torch.compile(run, fullgraph=True, backend=backend)(**compiled)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    for argument in given_outputs:
        assert torch.equal(compiled[argument], eager[argument])
        assert not torch.equal(compiled[argument], case[argument])


@pytest.mark.parametrize("name", MUTATING)
def test_typed_face_has_the_schema_arguments(name):
    face = inspect.signature(getattr(ops, name))
    schema = overload(name)._schema
    assert list(face.parameters) == [a.name for a in schema.arguments]
    for argument in schema.arguments:
        parameter = face.parameters[argument.name]
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only
        default = argument.default_value if argument.has_default_value() else parameter.empty
        assert parameter.default == default
    with pytest.raises(TypeError, match="no_such_argument"):
        getattr(ops, name)(**CASES[name](), no_such_argument=1)


def expect_refusal(name: str, changed: dict[str, Any]) -> None:
    """The op raises, names itself, and leaves its outputs as they were."""
    outputs = [changed[argument] for argument in written(name) if argument in changed]
    before = [output.clone() for output in outputs]
    with pytest.raises(RuntimeError, match=f"torch_pd::{name}: "):
        getattr(ops, name)(**changed)
    for output, value in zip(outputs, before, strict=True):
        assert output.is_meta or torch.equal(output, value)


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_wrong_rank(name, argument):
    case = CASES[name]()
    for changed in (case[argument][None], case[argument][0]):
        expect_refusal(name, case | {argument: changed})


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_wrong_dtype(name, argument):
    case = CASES[name]()
    for dtype in (torch.float64, torch.int16, torch.bool, torch.complex64):
        expect_refusal(name, case | {argument: case[argument].to(dtype)})


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_wrong_device(name, argument):
    case = CASES[name]()
    expect_refusal(name, case | {argument: case[argument].to("meta")})


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_wrong_size(name, argument):
    case = CASES[name]()
    value = case[argument]
    for d in range(value.dim()):
        if (name, argument, d) in FREE_SIZES:
            continue
        expect_refusal(name, case | {argument: torch.cat([value, value], d)})


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_last_dimension_must_be_contiguous(name, argument):
    case = CASES[name]()
    value = case[argument]
    spread = torch.stack([value, value], -1).flatten(-2)[..., ::2]
    assert spread.stride(-1) == 2
    assert spread.shape == value.shape
    expect_refusal(name, case | {argument: spread})


@pytest.mark.parametrize(("name", "argument"), WRITTEN)
def test_outputs_must_not_be_expanded(name, argument):
    case = CASES[name]()
    if argument not in case:
        return  # float8 scales: tests/test_paged_kv.py
    changed = case | {argument: case[argument][:1].expand_as(case[argument])}
    expect_refusal(name, changed)


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_required_tensors_are_required(name, argument):
    case = CASES[name]()
    schema = overload(name)._schema
    (declared,) = (a for a in schema.arguments if a.name == argument)
    if isinstance(declared.type, torch.OptionalType):
        return
    with pytest.raises(
        RuntimeError, match=f"torch_pd::{name}: {argument} must be a tensor, got None"
    ):
        getattr(ops, name)(**(case | {argument: None}))


@pytest.mark.skipif(ops.has_cuda_ops(), reason="the CUDA bodies are there")
@pytest.mark.parametrize("name", CASES)
def test_cuda_tensors_without_cuda_bodies(name):
    args, kwargs = call_arguments(name, CASES[name]())
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=f"torch_pd::{name}: the CUDA ops are not "):
        overload(name).redispatch(cuda, *args, **kwargs)
