"""Reading a model: a folder of safetensors, a GGUF file, random weights, or a module at hand."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        raise ValueError(
            f"model path {str(path)!r} does not exist; give a folder with config.json and "
            "*.safetensors, or a .gguf file (models are read from disk, not downloaded)"
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


def check_safetensors(path: Path) -> None:
    """Opens every weight file's header, so that damage is named before anything is loaded.

    Raises:
        ValueError: no weight file, a missing shard, or a file that is cut off or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        raise ValueError(
            f"{str(path)!r} has no *.safetensors; convert the checkpoint with save_pretrained, or "
            "use load_format='dummy' for random weights"
        )
    for name in names:
        file = path / name
        if not file.is_file():
            raise ValueError(f"{str(file)!r} is named in {index.name} but missing")
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{str(file)!r} ({file.stat().st_size:,} bytes) is not a complete safetensors "
                f"file: {error}; fetch or convert it again"
            ) from error


def read_config(path: Path) -> Any:
    """The Hugging Face config of a model folder; ValueError if it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(
            f"{str(path / 'config.json')!r} cannot be read as a model config: {error}"
        ) from error


def _load_kwargs(path: Path, load_format: str) -> dict[str, Any]:
    if load_format == "gguf":
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}


def load_model(
    model: "str | Path | PreTrainedModel", *, dtype: str, load_format: str, device: str, seed: int
) -> "PreTrainedModel":
    """A causal LM in eval mode on ``device``.

    Raises:
        ValueError: see `resolve_format` and `check_safetensors`; also a checkpoint that lacks
            tensors of the model or has them in another shape (each is named), or a module given
            together with a dtype or load_format that it does not have.
    """
    from transformers import AutoModelForCausalLM, PreTrainedModel

    if isinstance(model, PreTrainedModel):
        if load_format != "auto":
            raise ValueError(f"load_format={load_format!r} given, but the model is loaded already")
        have = next(model.parameters()).dtype
        if dtype != "auto" and have != _DTYPES[dtype]:
            raise ValueError(
                f"dtype={dtype!r} given, but the module is {have}; call model.to({_DTYPES[dtype]})"
            )
        return model.eval().to(device)
    if not isinstance(model, (str, Path)):
        raise TypeError(
            f"model must be a path or a Hugging Face causal LM, got {type(model).__name__}"
        )

    path = Path(model).expanduser()
    load_format = resolve_format(path, load_format)
    if load_format == "dummy":
        torch_dtype = _DTYPES["bfloat16" if dtype == "auto" else dtype]
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loaded = AutoModelForCausalLM.from_config(read_config(path), dtype=torch_dtype)
        return loaded.eval()
    if load_format == "safetensors":
        config = read_config(path)
        check_safetensors(path)
        torch_dtype = config.dtype or torch.float32 if dtype == "auto" else _DTYPES[dtype]
    else:
        torch_dtype = torch.float32 if dtype == "auto" else _DTYPES[dtype]
    try:
        with _quiet():
            result: Any = AutoModelForCausalLM.from_pretrained(
                **_load_kwargs(path, load_format),
                dtype=torch_dtype,
                device_map=device,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report, and refused below
            )
    except (RuntimeError, OSError, KeyError, ImportError) as error:
        raise ValueError(f"{str(path)!r} cannot be loaded: {error}") from error
    loaded, report = result
    wrong = [
        f"{name} is {list(have)} instead of {list(want)}"
        for name, have, want in sorted(report["mismatched_keys"])
    ]
    wrong += [f"{name} is missing" for name in sorted(report["missing_keys"])]
    if wrong:
        raise ValueError(
            f"{str(path)!r} does not hold the weights of {type(loaded).__name__}: "
            f"{'; '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}"
        )
    return loaded.eval()


def load_tokenizer(model: "str | Path | PreTrainedModel") -> "PreTrainedTokenizerBase | None":
    """The tokenizer beside a model, or None if there is none."""
    from transformers import AutoTokenizer

    if not isinstance(model, (str, Path)):
        return None
    path = Path(model).expanduser()
    if path.is_file():
        return AutoTokenizer.from_pretrained(**_load_kwargs(path, "gguf"), local_files_only=True)
    if not any(
        (path / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        return None
    return AutoTokenizer.from_pretrained(path, local_files_only=True)
