"""EngineConfig: every setting of the engine in one frozen dataclass."""

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str, choices: tuple | None = None, bounds: str | None = None) -> Any:
    """A dataclass field with its help line, its allowed values, and its range as in "(0, 1]"."""
    return field(default=default, metadata={"help": help, "choices": choices, "bounds": bounds})


def check_names(
    kind: str, valid: Iterable[str], given: Iterable[str], elsewhere: Mapping[str, str]
) -> None:
    """Raises TypeError naming the first of ``given`` that is not ``valid``, and what to give.

    Args:
        elsewhere: names that other libraries have, and what stands for them here.
    """
    valid = list(valid)
    for name in given:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, n=1, cutoff=0.7)
            hint = f"did you mean {close[0]!r}?" if close else f"valid names: {', '.join(valid)}"
            raise TypeError(f"{kind} has no field {name!r}; {elsewhere.get(name, hint)}")


def as_int(name: str, value: Any) -> int:
    """``value`` as an int (NumPy integers included); TypeError for anything else, bool too."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:  # no int, or a tensor of several elements
            pass
    raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")


def as_float(name: str, value: Any) -> float:
    """``value`` as a float; TypeError for no number (bool too), ValueError if not finite."""
    if isinstance(value, bool) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    try:
        result = float(value)
    except OverflowError:  # a large int
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return result


def check_fields(settings: Any) -> None:
    """Checks the fields of a dataclass made with `option` against annotation, choices and bounds,
    and stores integers and floats as such (1 given for a float becomes 1.0).

    Fields whose annotation holds something else than int, float, bool, str, a tuple of int or None
    are left to the caller.

    Raises:
        TypeError, ValueError: naming the field, the value and what is allowed.
    """
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        kinds = _kinds(f.type)
        if kinds is None or (value is None and type(None) in kinds):
            continue
        if bool in kinds:
            if not isinstance(value, bool):
                raise TypeError(f"{f.name} must be True or False, got {value!r}")
        elif float in kinds:
            value = as_float(f.name, value)
        elif int in kinds:
            value = as_int(f.name, value)
        elif tuple in kinds:
            if not isinstance(value, list | tuple):
                raise TypeError(f"{f.name} must be a list of ints, got {value!r}")
            value = tuple(as_int(f"{f.name}[{i}]", item) for i, item in enumerate(value))
        elif not isinstance(value, str):
            raise TypeError(f"{f.name} must be a str, got {value!r} ({type(value).__name__})")
        choices, bounds = f.metadata["choices"], f.metadata["bounds"]
        if choices is not None and value not in choices:
            allowed = ", ".join(map(repr, choices))
            raise ValueError(f"{f.name} must be one of {allowed}; got {value!r}")
        if bounds is not None:
            for item in value if isinstance(value, tuple) else (value,):
                _check_bounds(f.name, item, bounds)
        object.__setattr__(settings, f.name, value)


def _kinds(annotation: Any) -> set[type] | None:
    members = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    kinds = {typing.get_origin(member) or member for member in members}
    return kinds if kinds <= {int, float, bool, str, tuple, type(None)} else None


def _check_bounds(name: str, value: float, bounds: str) -> None:
    low, high = (math.inf if part == "inf" else int(part) for part in bounds[1:-1].split(", "))
    above = value > low or (value == low and bounds[0] == "[")
    below = value < high or (value == high and bounds[-1] == "]")
    if not (above and below):
        if high == math.inf:
            allowed = f"{'>=' if bounds[0] == '[' else '>'} {low}"
        else:
            allowed = f"in {bounds}"
        raise ValueError(f"{name} must be {allowed}, got {value}")


_AVAILABLE: Mapping[str, tuple] = {
    "quantization": (None,),
}
"""Fields of which only these values are built so far; a row goes when its feature comes."""


_SHARED = "several GPUs share one copy of the weights with data_parallel_size=N, weights='pooled'"
_FROM_DISK = "leave it out: models are read from disk, as they are there"
_ALWAYS = "leave it out: prompts are always computed in pieces of max_num_batched_tokens"
_ELSEWHERE = {
    "tensor_parallel_size": _SHARED,
    "pipeline_parallel_size": _SHARED,
    "enable_chunked_prefill": _ALWAYS,
    "swap_space": "host memory for KV pages is host_kv_gib",
    "cpu_offload_gb": "weights stay on GPUs; host memory for KV pages is host_kv_gib",
    "trust_remote_code": "leave it out: code that comes with a checkpoint is never run (give LLM a "
    "module that you loaded instead of its path)",
    "enable_lora": "adapters must be merged into the weights first",
    "speculative_config": "leave it out: there is no speculative decoding here",
    "max_seq_len_to_capture": "leave it out: graphs serve every length",
    "max_logprobs": "leave it out: any number may be asked for",
    "disable_log_stats": "leave it out: see LLM.stats() and the log",
    "generation_config": "leave it out: its end-of-text tokens count, its sampling does not",
    "revision": _FROM_DISK,
    "download_dir": _FROM_DISK,
    "torch_dtype": "did you mean 'dtype'?",
    "device_map": "did you mean 'device'?",
}
"""Settings of vLLM and transformers, and what stands for them here."""

MOST_LENDERS = 6
"""Places of block tables (docs/layouts.md) beside the GPU's own and the host's."""
_POOLED_ONLY = {
    "weight_layout",
    "weight_replicas",
    "remote_mode",
    "ring_gib",
    "param_ranks",
    "data_ranks",
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; the command line's flags are derived from these fields.

    Names are vLLM's where the meaning is vLLM's. Sizes in GiB are 2**30 bytes.

    Raises:
        ValueError: a value is out of range, has no meaning where it is set, or is not available in
            this version; the message gives the value and what is allowed.
        TypeError: a value of the wrong type (`from_kwargs` also: an unknown name).
    """

    device: str = option("auto", "where to run", ("auto", "cuda", "cpu"))
    dtype: str = option(
        "auto",
        "weights and KV cache; auto: the checkpoint's, bfloat16 for dummy",
        ("auto", "float32", "bfloat16", "float16"),
    )
    load_format: str = option(
        "auto", "how weights are read", ("auto", "safetensors", "gguf", "dummy")
    )
    quantization: str | None = option(None, "quantised weights (none yet)")
    seed: int = option(
        0, "seed of requests that have none of their own", bounds="[0, 18446744073709551615]"
    )
    max_model_len: int | None = option(
        None, "longest sequence in tokens; default the model's", bounds="[1, inf)"
    )
    block_size: int = option(16, "tokens of a KV page", (16, 32, 64))
    max_num_seqs: int = option(1024, "sequences running at once", bounds="[1, 1048576]")
    max_num_batched_tokens: int = option(8192, "tokens of one step", bounds="[1, 1048576]")
    enable_prefix_caching: bool = option(True, "share the KV pages of equal prefixes")
    enforce_eager: bool = option(False, "no CUDA graphs")
    gpu_memory_utilization: float | None = option(
        None, "share of the GPU's total memory to use; default 0.9", bounds="(0, 1]"
    )
    kv_cache_gib: float | None = option(
        None,
        "GiB of KV pages; default: what is left on a GPU, on CPU the smaller of 4 GiB and 40% of "
        "available memory",
        bounds="(0, 1048576]",
    )
    kv_cache_dtype: str = option("auto", "precision of KV pages", ("auto", "fp8", "int8"))
    elastic_kv: bool = option(
        False, "map the memory of KV pages when it is needed and give it back when it is not"
    )
    host_kv_gib: float = option(
        0.0,
        "GiB of pinned host memory for KV pages: swapped sequences, prefixes, and the older pages "
        "of sequences larger than the GPU's pool",
        bounds="[0, 1048576]",
    )
    peer_kv_gib: float = option(
        0.0,
        "GiB of GPU memory that each rank outside data_ranks lends to those inside for KV pages",
        bounds="[0, 1048576]",
    )
    disk_kv_gib: float = option(
        0.0, "GiB of disk for the KV pages of prefixes and swapped sequences", bounds="[0, 1048576]"
    )
    disk_kv_path: str | None = option(None, "folder for KV pages on disk")
    data_parallel_size: int = option(
        1, "ranks to start: a GPU each, or a share of the CPU's cores", bounds="[1, 16]"
    )
    weights: str = option("auto", "where weights live", ("auto", "resident", "pooled"))
    weight_layout: str = option("shard", "how pooled weights are split", ("shard", "layer"))
    weight_replicas: int = option(1, "ranks that hold each shard", bounds="[1, inf)")
    remote_mode: str = option("auto", "how pooled weights are used", ("auto", "stream", "ship"))
    ring_gib: float | None = option(
        None, "GiB of the ring cache of streamed weights; default two layers", bounds="(0, 1048576]"
    )
    param_ranks: tuple[int, ...] | None = option(
        None, "ranks that hold weights; default all", bounds="[0, inf)"
    )
    data_ranks: tuple[int, ...] | None = option(
        None, "ranks that hold KV pages and run requests; default all", bounds="[0, inf)"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name, available in _AVAILABLE.items():
            value = getattr(self, name)
            if value not in available:
                only = " and ".join(map(repr, available))
                raise ValueError(
                    f"{name}={value!r} is not available in this version "
                    f"(only {only} {'is' if len(available) == 1 else 'are'})"
                )
        if self.weights == "pooled":
            self._check_pooled()
            self._check_data_ranks()
        else:
            self._check_not_pooled()
        if self.peer_kv_gib:
            self._check_lenders()
        if self.device == "cpu":
            self._check_cpu()
        self._check_tiers()

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> "EngineConfig":
        """The config of these fields; an unknown name is a TypeError with the closest field."""
        check_names(cls.__name__, (f.name for f in dataclasses.fields(cls)), kwargs, _ELSEWHERE)
        return cls(**kwargs)

    def resolve_device(self, cuda_available: bool) -> str:
        """The device to run on, "cuda" or "cpu"; "auto" takes the GPU if there is one.

        Args:
            cuda_available: a GPU is there and the CUDA ops are built (the caller looks, so
                that this module needs no torch).

        Raises:
            ValueError: "cuda" is asked for but not available, or a field that only a GPU gives
                meaning to is set and the device is the CPU.
        """
        if self.device == "cuda" and not cuda_available:
            raise ValueError(
                "device='cuda' is not available: it needs an NVIDIA GPU, a CUDA build of torch and "
                "of torch_pd; use device='cpu' or 'auto'"
            )
        if self.device == "cuda" or (self.device == "auto" and cuda_available):
            return "cuda"
        self._check_cpu()
        return "cpu"

    def check_ranks(self, ranks: int) -> None:
        """Raises ValueError for a field that has no meaning with so many ranks."""
        if ranks == 1 and self.weights == "pooled":
            raise ValueError(
                "weights='pooled' splits the weights over several ranks, and there is one; give "
                "data_parallel_size=2 or more, or weights='resident'"
            )
        if self.data_ranks is None:
            return
        if ranks == 1:
            raise ValueError(
                f"peer_kv_gib={self.peer_kv_gib} and data_ranks={list(self.data_ranks)} take the "
                "memory of other ranks, and there is one; give data_parallel_size=2 or more, or "
                "host_kv_gib"
            )
        for name, named in (
            ("param_ranks", self.param_ranks or ()),
            ("data_ranks", self.data_ranks),
        ):
            outside = [rank for rank in named if rank >= ranks]
            if outside:
                raise ValueError(
                    f"{name}={list(named)} has {outside[0]}, but the ranks are 0..{ranks - 1}"
                )
        if self.param_ranks is None:
            if len(self.data_ranks) == ranks:
                raise ValueError(
                    f"peer_kv_gib={self.peer_kv_gib}: data_ranks={list(self.data_ranks)} are all "
                    f"of the {ranks} ranks, so none is left to lend memory; leave one out"
                )
            self._check_places(ranks - len(self.data_ranks))
            return  # the ranks outside data_ranks lend memory and do nothing else
        idle = sorted(set(range(ranks)) - {*self.param_ranks, *self.data_ranks})
        if idle:
            raise ValueError(
                f"rank {', '.join(map(str, idle))} would hold neither weights nor KV pages: add it "
                f"to param_ranks={list(self.param_ranks)} or data_ranks={list(self.data_ranks)}, "
                "or start fewer ranks"
            )
        if self.peer_kv_gib:
            self._check_places(ranks - len(self.data_ranks))

    @staticmethod
    def _check_places(lenders: int) -> None:
        if lenders > MOST_LENDERS:
            raise ValueError(
                f"{lenders} ranks lend, and block tables can name {MOST_LENDERS}: name more "
                "data_ranks, or start fewer ranks"
            )

    @property
    def gpu_memory_share(self) -> float:
        """gpu_memory_utilization with its default filled in."""
        return 0.9 if self.gpu_memory_utilization is None else self.gpu_memory_utilization

    def _check_not_pooled(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "data_ranks" and self.peer_kv_gib:
                continue  # the others lend
            if f.name in _POOLED_ONLY and value != f.default:
                raise ValueError(
                    f"{f.name}={value!r} has no meaning with weights={self.weights!r}; leave it "
                    "out, or give weights='pooled'"
                )

    def _check_pooled(self) -> None:
        if self.ring_gib is not None and self.remote_mode == "ship":
            raise ValueError(
                f"ring_gib={self.ring_gib} has no meaning with remote_mode='ship', which streams "
                "nothing; leave it out, or give remote_mode='auto' or 'stream'"
            )

    def _check_data_ranks(self) -> None:
        data, params = self.data_ranks, self.param_ranks
        if data is None:
            return
        if params is None:
            raise ValueError(
                f"data_ranks={list(data)} needs param_ranks, the ranks that hold the weights; "
                "without both, every rank holds weights and KV pages"
            )
        self._check_each_once(data)
        both = sorted(set(data) & set(params))
        if both:
            raise ValueError(
                f"param_ranks={list(params)} and data_ranks={list(data)} share rank "
                f"{', '.join(map(str, both))}: keep them apart, or leave data_ranks out so that "
                "every rank holds KV pages"
            )
        if self.weight_replicas != 1:
            raise ValueError(
                f"weight_replicas={self.weight_replicas} cannot be combined with data_ranks; give 1"
            )

    def _check_each_once(self, data: tuple[int, ...]) -> None:
        if not data or len(set(data)) != len(data):
            raise ValueError(f"data_ranks={list(data)} must name at least one rank, each once")

    def _check_lenders(self) -> None:
        size, data = self.peer_kv_gib, self.data_ranks
        if data is None:
            raise ValueError(
                f"peer_kv_gib={size} needs data_ranks, the ranks that run requests: the others "
                "lend them memory"
            )
        self._check_each_once(data)
        if self.disk_kv_gib:
            raise ValueError(
                f"peer_kv_gib={size} and disk_kv_gib={self.disk_kv_gib} cannot be combined in this "
                "version: give one of them (peer_kv_gib goes with host_kv_gib)"
            )

    def _check_tiers(self) -> None:
        size, path = self.disk_kv_gib, self.disk_kv_path
        if bool(size) != (path is not None):
            missing = "disk_kv_path (a folder)" if size else "disk_kv_gib (its size)"
            raise ValueError(
                f"disk_kv_gib={size} and disk_kv_path={path!r} go together: set {missing}"
            )
        if size and not self.host_kv_gib:
            raise ValueError(
                f"disk_kv_gib={size} needs host memory that pages pass through: set host_kv_gib"
            )
        if size and not self.enable_prefix_caching:
            raise ValueError(
                f"disk_kv_gib={size} has no meaning without enable_prefix_caching: the disk keeps "
                "the pages of prefixes"
            )

    def _check_cpu(self) -> None:
        if self.gpu_memory_utilization is not None:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} has no meaning on the CPU; "
                "leave it out, and set kv_cache_gib to size the KV cache"
            )
