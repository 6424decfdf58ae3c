"""EngineConfig: what is refused, and how it is said."""

import ast
import dataclasses
import inspect
import re
import types

import pytest

import torch_pd.config
import torch_pd.request
from torch_pd.config import EngineConfig


def test_defaults() -> None:
    config = EngineConfig()
    assert (config.block_size, config.max_num_seqs, config.max_num_batched_tokens) == (
        16,
        1024,
        8192,
    )
    assert config.gpu_memory_utilization is None
    assert config.gpu_memory_share == 0.9
    assert all(f.metadata["help"] for f in dataclasses.fields(config))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("block_size", 10, "block_size must be one of 16, 32, 64; got 10"),
        ("device", "tpu", "device must be one of 'auto', 'cuda', 'cpu'; got 'tpu'"),
        ("dtype", "float8", "'bfloat16'"),
        ("load_format", "pickle", "'safetensors'"),
        ("max_model_len", 0, "max_model_len must be >= 1, got 0"),
        ("max_num_seqs", 0, "in [1, 1048576]"),
        ("max_num_seqs", 10**12, "in [1, 1048576], got 1000000000000"),
        ("max_num_batched_tokens", -5, "in [1, 1048576]"),
        ("gpu_memory_utilization", 0.0, "gpu_memory_utilization must be in (0, 1], got 0.0"),
        ("gpu_memory_utilization", 1.01, "(0, 1]"),
        ("gpu_memory_utilization", float("nan"), "finite"),
        ("kv_cache_gib", 0, "kv_cache_gib must be in (0, 1048576]"),
        ("kv_cache_gib", float("inf"), "finite"),
        ("host_kv_gib", -1, "in [0, 1048576]"),
        ("host_kv_gib", 10**400, "finite"),
        ("seed", -1, "seed must be in [0"),
        ("data_parallel_size", 0, "in [1, 16]"),
        ("data_parallel_size", 17, "in [1, 16]"),
        ("param_ranks", [0, -1], "param_ranks must be >= 0, got -1"),
    ],
)
def test_value_out_of_range(field: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        EngineConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", True),
        ("max_num_seqs", 8.0),
        ("max_num_seqs", "8"),
        ("max_num_seqs", None),
        ("block_size", 16.0),
        ("enforce_eager", 1),
        ("gpu_memory_utilization", True),
        ("gpu_memory_utilization", "0.9"),
        ("dtype", None),
        ("device", 0),
        ("quantization", 4),
        ("param_ranks", 3),
        ("param_ranks", [True]),
    ],
)
def test_wrong_type(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=field):
        EngineConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "only"),
    [
        ("quantization", "fp8", "(only None is)"),
    ],
)
def test_not_available_yet(field: str, value: object, only: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}=") as error:
        EngineConfig(**{field: value})
    assert f"is not available in this version {only}" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"disk_kv_gib": 1}, "set disk_kv_path"),
        ({"disk_kv_path": "/tmp", "host_kv_gib": 1}, "set disk_kv_gib"),
        ({"disk_kv_path": "/tmp", "disk_kv_gib": 1}, "set host_kv_gib"),
        (
            {
                "disk_kv_path": "/tmp",
                "disk_kv_gib": 1,
                "host_kv_gib": 1,
                "enable_prefix_caching": False,
            },
            "enable_prefix_caching",
        ),
    ],
)
def test_tiers_that_do_not_fit_together(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EngineConfig(**fields)


def test_numbers_are_stored_as_annotated() -> None:
    config = EngineConfig(kv_cache_gib=2, gpu_memory_utilization=1)
    assert isinstance(config.kv_cache_gib, float)
    assert isinstance(config.gpu_memory_utilization, float)


def test_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(TypeError, match="'max_num_seq'; did you mean 'max_num_seqs'"):
        EngineConfig.from_kwargs(max_num_seq=4)
    with pytest.raises(TypeError, match=r"'tensor_parallel_size'; .*weights='pooled'"):
        EngineConfig.from_kwargs(tensor_parallel_size=2)
    with pytest.raises(TypeError, match="'zzz'; valid names: device, dtype"):
        EngineConfig.from_kwargs(zzz=4)
    assert EngineConfig.from_kwargs(max_num_seqs=4) == EngineConfig(max_num_seqs=4)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().block_size = 32  # type: ignore[misc]


def test_device() -> None:
    assert EngineConfig().resolve_device(True) == "cuda"
    assert EngineConfig().resolve_device(False) == "cpu"
    assert EngineConfig(device="cpu").resolve_device(True) == "cpu"
    assert EngineConfig(device="cuda").resolve_device(True) == "cuda"
    with pytest.raises(ValueError, match="device='cuda' is not available"):
        EngineConfig(device="cuda").resolve_device(False)


def test_gpu_memory_utilization_has_no_meaning_on_cpu() -> None:
    with pytest.raises(ValueError, match=r"no meaning on the CPU.*kv_cache_gib"):
        EngineConfig(device="cpu", gpu_memory_utilization=0.5)
    auto = EngineConfig(gpu_memory_utilization=0.5)
    assert auto.resolve_device(True) == "cuda"
    with pytest.raises(ValueError, match="no meaning on the CPU"):
        auto.resolve_device(False)


@pytest.mark.parametrize("module", [torch_pd.config, torch_pd.request])
def test_plain_data_modules_import_no_torch(module: types.ModuleType) -> None:
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("torch.") for alias in node.names)
            assert "torch" not in [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.module.split(".")[0] != "torch"
