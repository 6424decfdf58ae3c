"""EngineConfig: every setting of the engine in one frozen dataclass."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _option(default: Any, help: str, choices: tuple | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine; the command line's flags are derived from these fields.

    Raises:
        ValueError: a value is out of range, or has no meaning where it is set; the message gives
            the value, what is allowed, and what to change.
        TypeError: a value of the wrong type.
    """

    device: str = _option("auto", "where to run", ("auto", "cuda", "cpu"))
    dtype: str = _option(
        "auto",
        "weights and KV cache; auto: the checkpoint's, bfloat16 for dummy",
        ("auto", "float32", "bfloat16", "float16"),
    )
    load_format: str = _option(
        "auto", "how weights are read", ("auto", "safetensors", "gguf", "dummy")
    )
    quantization: str | None = _option(None, "quantised weights (none yet)")
    seed: int = _option(0, "seed of requests that have none of their own")
    max_model_len: int | None = _option(None, "longest sequence in tokens; default the model's")
    block_size: int = _option(16, "tokens of a KV page", (16, 32, 64))
    max_num_seqs: int = _option(1024, "sequences running at once")
    max_num_batched_tokens: int = _option(8192, "tokens of one step")
    enable_prefix_caching: bool = _option(True, "share the KV pages of equal prefixes")
    enforce_eager: bool = _option(False, "no CUDA graphs")
    gpu_memory_utilization: float | None = _option(
        None, "share of the GPU's total memory to use; default 0.9"
    )
    kv_cache_gib: float | None = _option(
        None,
        "GiB of KV pages; default: what is left on a GPU, on CPU the smaller of 4 GiB and 40% of "
        "available memory",
    )
    kv_cache_dtype: str = _option("auto", "precision of KV pages", ("auto", "fp8"))
    host_kv_gib: float = _option(0.0, "GiB of pinned host memory for KV pages")
    disk_kv_gib: float = _option(0.0, "GiB of disk for KV pages")
    disk_kv_path: str | None = _option(None, "folder for KV pages on disk")
    data_parallel_size: int = _option(1, "ranks to spawn")
    weights: str = _option("auto", "where weights live", ("auto", "resident", "pooled"))
    weight_layout: str = _option("shard", "how pooled weights are split", ("shard", "layer"))
    weight_replicas: int = _option(1, "ranks that hold each shard")
    remote_mode: str = _option("auto", "how pooled weights are used", ("auto", "stream", "ship"))
    ring_gib: float | None = _option(None, "GiB of the ring cache of streamed weights")
    param_ranks: tuple[int, ...] | None = _option(None, "ranks that hold weights")
    data_ranks: tuple[int, ...] | None = _option(None, "ranks that hold KV pages")
