"""Skeleton: a model without weights, and the storage that its weights are to be put into."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one input that the fused blocks use as one matrix: stored together from the start."""


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside keep their parameters on meta. Buffers are computed as ever: many (the
    frequencies of a rotation) are in no checkpoint, and on meta their values would be lost."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # a tied one keeps its identity
            # Its memory was never written, and goes before the next one is made.
            value = nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)
            module._parameters[name] = value
            marked.enter_context(left_alone([value]))

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
    try:
        with contextlib.ExitStack() as marked:
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextlib.contextmanager
def left_alone(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Meanwhile transformers does not initialise these parameters: on meta each takes it a
    millisecond, for nothing."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in parameters:
            del parameter._is_hf_initialized  # type: ignore[attr-defined]


def build_skeleton(config: Any, dtype: torch.dtype) -> "PreTrainedModel":
    """The causal LM of a Hugging Face config, in eval mode: parameters on meta, buffers real.

    Raises:
        ValueError: transformers has none of this config, or cannot build it.
    """
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        named = (
            f" (architectures: {', '.join(config.architectures)})" if config.architectures else ""
        )
        raise ValueError(
            f"{config.model_type!r}{named} is no causal language model of transformers: "
            f"AutoModelForCausalLM does not know {type(config).__name__}"
        )
    try:
        with _parameters_on_meta():
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except Exception as error:  # sizes that cannot be fail anywhere in the constructors
        raise ValueError(
            f"transformers cannot build {config.model_type!r} from its config.json: "
            f"{type(error).__name__}: {error}"
        ) from error


def materialise(
    model: "PreTrainedModel", device: torch.device | str, names: Sequence[str] | None = None
) -> None:
    """Gives parameters on meta uninitialised memory on ``device``; moves the others and all buffers
    there.

    Parameters that several modules share stay shared. Linears that are used as one matrix (q, k, v;
    gate, up) lie behind each other in one storage, so that `MergedLinear` copies nothing.

    Args:
        names: of the parameters that may leave meta; None: all.
    """
    made: dict[int, nn.Parameter] = {}
    wanted = None if names is None else set(names)

    def make(parameters: list[nn.Parameter]) -> None:
        first = parameters[0]
        rows = [p.shape[0] if p.dim() else 1 for p in parameters]
        shape = (sum(rows), *first.shape[1:]) if first.dim() else ()
        storage = torch.empty(shape, dtype=first.dtype, device=device)
        parts = storage.split(rows) if first.dim() else (storage,)
        for parameter, part in zip(parameters, parts, strict=True):
            made[id(parameter)] = nn.Parameter(part, parameter.requires_grad)

    for name, module in model.named_modules():
        for group in _merged_parameters(name, module, wanted):
            if not any(id(parameter) in made for parameter in group):
                make(group)
        for own, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)
                continue
            if wanted is not None and _full_name(name, own) not in wanted:
                continue
            if id(parameter) not in made:
                make([parameter])
            module._parameters[own] = made[id(parameter)]
        for own, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[own] = buffer.to(device)


def _merged_parameters(
    parent: str, module: nn.Module, wanted: set[str] | None
) -> Iterator[list[nn.Parameter]]:
    """Weights, and biases, of children that belong together."""
    for names in _MERGED:
        children = [module._modules.get(name) for name in names]
        if not all(type(child) is nn.Linear for child in children):
            continue
        for own in ("weight", "bias"):
            found = [child._parameters[own] for child in children if child is not None]
            full = [_full_name(parent, f"{name}.{own}") for name in names]
            if any(p is None or not p.is_meta for p in found):
                continue
            if wanted is not None and not wanted.issuperset(full):
                continue
            parameters = [p for p in found if p is not None]
            if len({(p.dtype, p.shape[1:]) for p in parameters}) == 1:
                yield parameters


def _full_name(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def stored_tensors(model: "PreTrainedModel") -> dict[str, tuple[Tensor, list[str]]]:
    """What a checkpoint of the model holds: name -> the tensor and all its names (ties)."""
    by_id: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_id.setdefault(id(tensor), (tensor, []))[1].append(name)
    return {names[0]: (tensor, names) for tensor, names in by_id.values()}
