"""Reading a model: a folder of safetensors, a GGUF file, random weights, or a module at hand."""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_pd.weights.checkpoint import Checkpoint
from torch_pd.weights.dummy import Dummy
from torch_pd.weights.skeleton import build_skeleton, materialise, stored_tensors
from torch_pd.weights.slices import Slice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: errors say what is wrong."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def resolve_format(path: Path, load_format: str) -> str:
    """Which of safetensors, gguf, dummy applies to ``path``.

    Raises:
        ValueError: the path does not exist, or holds nothing readable; says what is missing.
    """
    if not path.exists():
        hint = f"; `hf download {path}` prints its folder" if len(path.parts) == 2 else ""
        raise ValueError(
            f"model path {str(path)!r} does not exist; give a folder with config.json and "
            f"*.safetensors, or a .gguf file (models are read from disk, not downloaded{hint})"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{str(path)!r} is a file but not a .gguf file; give a model folder")
        if load_format in ("safetensors", "dummy"):
            raise ValueError(
                f"load_format={load_format!r} needs a model folder, {str(path)!r} is a file"
            )
        return "gguf"
    if load_format == "gguf":
        raise ValueError(f"load_format='gguf' needs a .gguf file, {str(path)!r} is a folder")
    if not (path / "config.json").is_file():
        raise ValueError(f"{str(path)!r} has no config.json, so it is not a model folder")
    return "safetensors" if load_format == "auto" else load_format


def read_config(path: Path) -> Any:
    """The Hugging Face config of a model folder; ValueError if it cannot be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the checks of transformers raise what they like
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{str(path)!r} is a model whose code comes with the checkpoint, which is not run "
                "here: load it with transformers and give the module"
            ) from error
        raise ValueError(
            f"{str(path / 'config.json')!r} cannot be read as a model config: {error}"
        ) from error
    _check_quantisation(path, config)
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = "eager"  # pages take its place, so it need not be installed
    return config


def _check_quantisation(path: Path, config: Any) -> None:
    """ValueError for a kind that transformers does not know: it would take the numbers as they
    are."""
    given = getattr(config, "quantization_config", None)
    if not given:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    kinds = [*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"]
    kind = given.get("quant_method") if isinstance(given, dict) else given.quant_method
    if kind is not None and kind not in kinds:
        raise ValueError(
            f"{str(path)!r} is quantised in a way that transformers does not know "
            f"(quant_method={str(kind)!r} in config.json): use the checkpoint that it was made from"
        )


def _load_kwargs(path: Path, load_format: str) -> dict[str, Any]:
    if load_format == "gguf":
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}


def transformers_reason(model: "PreTrainedModel", checkpoint: Checkpoint) -> str | None:
    """Why transformers has to read a checkpoint, or None if it can be read straight to its place.

    Args:
        model: its skeleton.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if getattr(model.config, "quantization_config", None) is not None:
        return "the checkpoint is quantised"
    if get_model_conversion_mapping(model, add_legacy=False):
        return f"tensors of {model.config.model_type} checkpoints are renamed or merged"
    dtype = model.dtype
    kept = model._keep_in_fp32_modules_strict if dtype != torch.float32 else None
    if dtype == torch.float16:
        kept = model._keep_in_fp32_modules or kept
    if kept:
        return f"{', '.join(sorted(kept))} stay in float32"
    expected = stored_tensors(model)
    entries = checkpoint.entries
    unknown = [name for name, entry in entries.items() if entry.dtype is None]
    if unknown:
        return f"{unknown[0]} has a dtype of its own"
    names = {name for _, names in expected.values() for name in names}
    missing = [name for name, (_, names) in expected.items() if not entries.keys() & set(names)]
    if missing and not entries.keys() <= names:
        return f"{missing[0]} is stored under another name, or not at all"
    for _, aliases in expected.values():
        stored = [name for name in aliases if name in entries]
        if any(not checkpoint.equal(stored[0], other) for other in stored[1:]):
            return f"{' and '.join(stored)} differ, though the config ties them"
    return None


def describe_reading(path: Path, model: "PreTrainedModel") -> str:
    """How the weights of a folder or GGUF file are read, in a few words.

    Args:
        model: of that path; its weights do not matter.
    """
    if path.is_file():
        return "read by transformers (a GGUF file)"
    if not any(path.glob("*.safetensors")):
        return "none here; only load_format='dummy' works"
    reason = transformers_reason(model, Checkpoint(path))
    return "read straight to their place" if reason is None else f"read by transformers ({reason})"


def check_tensors(model: "PreTrainedModel", checkpoint: Checkpoint) -> None:
    """Raises ValueError if tensors of the model are missing or misshapen; names them."""
    mismatched, missing = [], []
    for name, (tensor, names) in stored_tensors(model).items():
        stored = next((alias for alias in names if alias in checkpoint.entries), None)
        if stored is None:
            missing.append(name)
        elif checkpoint.entries[stored].shape != tuple(tensor.shape):
            have, want = checkpoint.entries[stored].shape, tensor.shape
            mismatched.append((stored, have, want))
    _refuse_wrong(checkpoint.path, model, mismatched, missing)


def _refuse_wrong(
    path: Path, model: "PreTrainedModel", mismatched: Iterable[tuple], missing: Iterable[str]
) -> None:
    wrong = [
        f"{name} is {list(have)} instead of {list(want)}" for name, have, want in sorted(mismatched)
    ]
    wrong += [f"{name} is missing" for name in sorted(missing)]
    if wrong:
        raise ValueError(
            f"{str(path)!r} does not hold the weights of {type(model).__name__}: "
            f"{'; '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}"
        )


def load_model(
    model: "str | Path | PreTrainedModel",
    *,
    dtype: str,
    load_format: str,
    device: str,
    seed: int,
    budget: int | None = None,
) -> "PreTrainedModel":
    """A causal LM in eval mode on ``device``.

    Safetensors are read straight to the device, dummy weights are made there; what needs
    transformers' own reader (`transformers_reason`, GGUF) takes its way. The log says which.

    Args:
        budget: bytes that the weights of a folder may take on the device; None: not looked at.

    Raises:
        ValueError: see `resolve_format` and `Checkpoint`; weights beyond the budget; a checkpoint
            that lacks tensors of the model or has them in another shape (each is named), or a
            module given together with a dtype or load_format that it does not have.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        if load_format != "auto":
            raise ValueError(f"load_format={load_format!r} given, but the model is loaded already")
        have = next(model.parameters()).dtype
        if dtype != "auto" and have != _DTYPES[dtype]:
            raise ValueError(
                f"dtype={dtype!r} given, but the module is {have}; call model.to({_DTYPES[dtype]})"
            )
        away = [name for name, p in model.named_parameters() if p.is_meta]
        if away:
            raise ValueError(
                f"the module has no values of {away[0]} and {len(away) - 1} more parameters (on "
                "meta, or offloaded): load it whole, or give its folder"
            )
        return model.eval().to(device)
    if not isinstance(model, (str, Path)):
        raise TypeError(
            f"model must be a path or a Hugging Face causal LM, got {type(model).__name__}"
        )

    path = Path(model).expanduser()
    load_format = resolve_format(path, load_format)
    started = time.perf_counter()
    reason: str | None = "a GGUF file"
    if load_format == "gguf":
        torch_dtype = torch.float32 if dtype == "auto" else _DTYPES[dtype]
        loaded = _load_by_transformers(path, load_format, torch_dtype, device)
    else:
        config = read_config(path)
        checkpoint = Checkpoint(path) if load_format == "safetensors" else None
        torch_dtype = resolve_dtype(None if checkpoint is None else config, dtype)
        loaded = build_skeleton(config, torch_dtype)
        _check_budget(loaded, budget)
        reason = None if checkpoint is None else transformers_reason(loaded, checkpoint)
        if reason is not None:
            loaded = _load_by_transformers(path, load_format, torch_dtype, device)
        elif checkpoint is None:
            _make_dummy(loaded, device, seed)
        else:
            _read_directly(loaded, checkpoint, device)
    nbytes = sum(parameter.nbytes for parameter in loaded.parameters())
    logger.info(
        "%s of %s: %.2f GiB in %.2f s, %s",
        "dummy weights" if load_format == "dummy" else "weights",
        path.name,
        nbytes / 2**30,
        time.perf_counter() - started,
        "straight to their place" if reason is None else f"read by transformers ({reason})",
    )
    return loaded


def _check_budget(model: "PreTrainedModel", budget: int | None) -> None:
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    if budget is not None and nbytes > budget:
        raise ValueError(
            f"the weights of {type(model).__name__} take {nbytes / 2**30:.2f} GiB, but the GPU's "
            f"budget (gpu_memory_utilization of its memory) is {budget / 2**30:.2f} GiB: use a "
            "larger GPU, a higher gpu_memory_utilization, or weights='pooled' on several GPUs"
        )


def resolve_dtype(config: Any, dtype: str) -> torch.dtype:
    """The dtype of the weights.

    Args:
        config: of a checkpoint, which "auto" follows; None for dummy weights (bfloat16).
        dtype: of EngineConfig.
    """
    if dtype != "auto":
        return _DTYPES[dtype]
    return torch.bfloat16 if config is None else config.dtype or torch.float32


def _make_dummy(model: "PreTrainedModel", device: str, seed: int) -> None:
    dummy = Dummy(seed)
    dummy.set_vectors(model)
    materialise(model, device)
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() >= 2]
    dummy.fill([Slice.whole(name, parameter) for name, parameter in matrices])


def _read_directly(model: "PreTrainedModel", checkpoint: Checkpoint, device: str) -> None:
    check_tensors(model, checkpoint)
    materialise(model, device)
    checkpoint.fill(
        [
            Slice.whole(next(name for name in names if name in checkpoint.entries), tensor)
            for tensor, names in stored_tensors(model).values()
        ]
    )
    read_generation_config(model, checkpoint.path)


def read_generation_config(model: "PreTrainedModel", path: Path) -> None:
    """Gives the model the generation config beside its weights (end-of-text tokens, ...)."""
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:  # as read_config
            raise ValueError(
                f"{str(path / 'generation_config.json')!r} cannot be read: {error}"
            ) from error


def _load_by_transformers(
    path: Path, load_format: str, dtype: torch.dtype, device: str
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    kwargs = _load_kwargs(path, load_format)
    if load_format != "gguf":
        kwargs["config"] = read_config(path)
    try:
        with _quiet():
            result: Any = AutoModelForCausalLM.from_pretrained(
                **kwargs,
                dtype=dtype,
                device_map=device,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, and refused below
            )
    except Exception as error:  # as read_config
        raise ValueError(f"{str(path)!r} cannot be loaded: {error}") from error
    loaded, report = result
    _refuse_wrong(path, loaded, report["mismatched_keys"], report["missing_keys"])
    return loaded.eval()


def load_tokenizer(model: "str | Path | PreTrainedModel") -> "PreTrainedTokenizerBase | None":
    """The tokenizer beside a model, or None if there is none."""
    if not isinstance(model, (str, Path)):
        return None
    path = Path(model).expanduser()
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    held = [name for name in names if (path / name).is_file()]
    if not (path.suffix == ".gguf" if path.is_file() else held):
        return None
    from transformers import AutoTokenizer

    if path.is_dir() and (path / "config.json").is_file():
        read_config(path)  # as the tokenizer's reader does, with less clear errors
    kwargs = _load_kwargs(path, "gguf" if path.is_file() else "safetensors")
    try:
        return AutoTokenizer.from_pretrained(
            **kwargs, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of as many kinds as there are tokenizers
        raise ValueError(f"the tokenizer of {str(path)!r} cannot be read: {error}") from error
