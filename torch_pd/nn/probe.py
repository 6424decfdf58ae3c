"""Probing a model: one small forward pass that records how its layers call attention."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from torch_pd.context import Batch, GroupBatch
from torch_pd.kv.cache import KVPool
from torch_pd.nn.attention import (
    NAME,
    AttentionCall,
    Pass,
    Recorder,
    attention_forward,
    make_mark,
)
from torch_pd.nn.limit import Limit, find_limit
from torch_pd.nn.undo import Undo, put

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PROBE = f"{NAME}_probe"
LENGTHS = (9, 6)
"""Tokens of the two probe sequences."""
BLOCK_SIZE = 16
"""Of the probe's pool; a probe sequence fits into one page."""


@dataclass
class ProbedLayer:
    """One attention call of the probe, the layer around it, and what went in and out of that."""

    call: AttentionCall
    attention_name: str
    layer: nn.Module | None
    layer_name: str
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None


@dataclass
class Probe:
    """What the probe saw. On meta the outputs hold no numbers."""

    layers: list[ProbedLayer]
    running: Pass
    logits: Tensor | None = None
    """[num_tokens, vocab] of the probe sequences, one at a time through transformers' own code."""
    functions: dict[int, set[str]] = field(default_factory=dict)
    """Of torch, that the forward of a module called itself, by the module's id."""
    limit: Limit | None = None
    starts: Sequence[int] = (0, 0)
    """First positions of the probe sequences."""


def refuse(model: nn.Module, reason: str) -> ValueError:
    """The error for a model that cannot be patched."""
    return ValueError(
        f"torch_pd cannot patch {type(model).__name__}: {reason}; run it with transformers instead"
    )


def probe_model(model: PreTrainedModel, undo: list[Undo]) -> Probe:
    """Switches the model to the paged attention function and records one small pass.

    The model gets configs of its own (others may share the object), with the attention function's
    name in them; ``undo`` receives what takes that back.

    Raises:
        ValueError: the model is no causal LM whose layers all call the attention function once.
    """
    config = model.config.get_text_config(decoder=True)
    _check_kind(model, config)
    AttentionInterface.register(NAME, attention_forward)
    AttentionInterface.register(_PROBE, _probed_attention)
    AttentionMaskInterface.register(_PROBE, make_mark)
    configs = _own_configs(model, undo)
    limit = find_limit(model)
    firsts = _first_positions(config, limit)
    on_meta = _embedding(model).is_meta
    experts = [own._experts_implementation_internal for own in configs]
    if on_meta:
        for own in configs:  # the default way through the experts reads the routing's numbers
            own._experts_implementation_internal = "batched_mm"
    try:
        # Eager attention is the reference: sdpa leaves soft-caps out.
        logits = None if on_meta else _reference(model, configs, firsts)
        _set_attention(configs, _PROBE)
        probe = _record(model, firsts)
        probe.logits, probe.limit, probe.starts = logits, limit, firsts
    finally:
        for own, implementation in zip(configs, experts, strict=True):
            own._experts_implementation_internal = implementation
    _set_attention(configs, NAME)
    _check_layers(model, config, probe)
    return probe


def _set_attention(configs: list[PretrainedConfig], name: str) -> None:
    for config in configs:
        config._attn_implementation_internal = name


def allowed(model: nn.Module) -> float:
    """How far logits may be off, as a part of the largest: what rounding may do.

    The dtype of the logits does not tell: some models return float32 of what is less.
    """
    exact = {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return 1e-3 if exact else 0.1


def _first_positions(config: PretrainedConfig, limit: Limit | None) -> Sequence[int]:
    """The second probe sequence lies as far back as a position can be: what depends on positions
    shows there."""
    longest = getattr(config, "max_position_embeddings", None) or 0
    if limit is not None:
        longest = min(longest, limit.length)
    return 0, max(0, longest - LENGTHS[1])


def _reference(
    model: PreTrainedModel, configs: list[PretrainedConfig], firsts: Sequence[int]
) -> Tensor:
    _set_attention(configs, "eager")
    rows = []
    with torch.no_grad(), _explained(model, "its forward pass with eager attention failed"):
        for row, length in enumerate(LENGTHS):
            starts, ends = [0] * len(LENGTHS), [0] * len(LENGTHS)
            ends[row] = length
            rows.append(_run(model, starts, ends, firsts))
        ids, _ = tokens(model, [0, 0], [LENGTHS[0], 0], firsts)
        plain = model(input_ids=ids[None], use_cache=False).logits[0]
    off = (plain.float() - rows[0].float()).abs().max() / rows[0].float().abs().max()
    if bool(off > allowed(model)):
        raise refuse(
            model,
            "transformers computes something else when it is given the positions 0, 1, 2, ... and "
            f"a mask of ones than without (off by {off:.1e} of the largest logit)",
        )
    return torch.cat(rows)


@contextmanager
def _explained(model: nn.Module, what: str) -> Iterator[None]:
    """Errors of a model's own code become the reason for the refusal."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise refuse(model, f"{what}: {e}") from e


def _check_kind(model: PreTrainedModel, config: PretrainedConfig) -> None:
    if model.config.is_encoder_decoder:
        raise refuse(model, "it is an encoder-decoder model (config.is_encoder_decoder)")
    head = model.get_output_embeddings()
    if head is None or not model.can_generate():
        raise refuse(model, "it is no causal language model with an output head")
    if _embedding(model).is_meta and any(hasattr(part, "_hf_hook") for part in model.modules()):
        raise refuse(model, "accelerate keeps its weights elsewhere (offloading): load it whole")
    if not model._can_set_attn_implementation():
        named = [(name, type(module).__name__) for name, module in model.named_modules()]
        where = next((f"{name} ({kind})" for name, kind in named if "Attention" in kind), "it")
        raise refuse(model, f"{where} does not call attention through AttentionInterface")
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if kinds:
        raise refuse(
            model,
            f"config.layer_types has {', '.join(sorted(kinds))}; only "
            f"{' and '.join(sorted(_LAYER_TYPES))} keep their state in KV pages alone",
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise refuse(
            model,
            f"its last {config.num_kv_shared_layers} layers use the keys and values of others "
            "(config.num_kv_shared_layers)",
        )


def _own_configs(model: PreTrainedModel, undo: list[Undo]) -> list[PretrainedConfig]:
    """Gives every module of the model a copy of its config; equal objects stay equal objects."""
    copies: dict[int, PretrainedConfig] = {}

    def own(config: PretrainedConfig) -> PretrainedConfig:
        if id(config) not in copies:
            copies[id(config)] = copied = copy.copy(config)
            for name, value in vars(copied).items():
                if isinstance(value, PretrainedConfig):
                    vars(copied)[name] = own(value)
        return copies[id(config)]

    for module in model.modules():
        old = module.__dict__.get("config")
        if isinstance(old, PretrainedConfig):
            put(undo, module, "config", own(old))
    return list(copies.values())


@dataclass
class _Watch(TorchFunctionMode):
    """Notes which functions of torch the forward of each module calls by itself.

    And lets code that asks ``if tensor:`` (lengths against a limit) pass on meta.
    """

    inside: list[int | None]
    functions: dict[int, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        module = self.inside[-1] if self.inside else None
        if module is not None:
            self.functions.setdefault(module, set()).add(getattr(func, "__name__", str(func)))
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


def _probed_attention(module: nn.Module, *args, **kwargs) -> tuple[Tensor, None]:
    """`attention_forward` of the probe, whose own calls of torch are not the module's."""
    recorder = module.__dict__.get("_torch_pd")
    inside = recorder.inside if isinstance(recorder, Recorder) else []
    inside.append(None)
    try:
        return attention_forward(module, *args, **kwargs)
    finally:
        inside.pop()


def _record(model: PreTrainedModel, firsts: Sequence[int]) -> Probe:
    device = _embedding(model).device
    running = Pass(batch=batch_of([0] * len(LENGTHS), LENGTHS, device))

    def new_pool(
        num_kv_heads: int, head_dim: int, dtype: torch.dtype, num_layers: int = 1
    ) -> KVPool:
        return KVPool(
            1 + len(LENGTHS), num_layers, BLOCK_SIZE, num_kv_heads, head_dim, dtype, device
        )

    names = {id(module): name for name, module in model.named_modules()}
    recorder = Recorder(running, new_pool, names)
    watch = _Watch(recorder.inside)
    by_module: dict[int, ProbedLayer] = {}
    layers: list[ProbedLayer] = []
    hooks = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        by_module[id(module)].args, by_module[id(module)].kwargs = args, kwargs

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        by_module[id(module)].output = output

    def enter(module: nn.Module, args: tuple) -> None:
        recorder.inside.append(id(module))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        recorder.inside.pop()

    modules = list(model.modules())
    for module in modules:
        module.__dict__["_torch_pd"] = recorder
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    # The layers are known only after attention was called, so all candidates are watched.
    for parent in modules:
        if isinstance(parent, nn.ModuleList):
            for layer in parent:
                by_module[id(layer)] = ProbedLayer(None, "", layer, "")  # type: ignore[arg-type]
                hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                hooks.append(layer.register_forward_hook(after))
    what = "its forward pass over pages failed"
    if device.type == "meta":
        what = (
            "its forward pass was to be looked at before its weights are loaded (as info and "
            "weights='pooled' do; others load them first), but needs numbers"
        )
    try:
        with (
            torch.no_grad(),
            watch,
            _explained(model, what),
        ):
            _run(model, [0] * len(LENGTHS), LENGTHS, firsts)
    finally:
        for hook in hooks:
            hook.remove()
        for module in modules:
            del module.__dict__["_torch_pd"]

    for call in recorder.calls:
        name = names[id(call.module)]
        around = _layer_around(model, name)
        found = by_module[id(model.get_submodule(around))] if around else None
        layers.append(
            ProbedLayer(
                call,
                name,
                found.layer if found else None,
                around or "",
                found.args if found else (),
                found.kwargs if found else {},
                found.output if found else None,
            )
        )
    if running.pool is not None:
        first = recorder.calls[0]
        running.pool = new_pool(first.num_kv_heads, first.head_dim, first.dtype, len(layers))
    return Probe(layers, running, functions=watch.functions)


def _layer_around(model: nn.Module, name: str) -> str | None:
    """The outermost ancestor of a module that is an element of a ModuleList."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return None


def _embedding(model: PreTrainedModel) -> Tensor:
    """[vocab, width]."""
    return model.get_input_embeddings().get_parameter("weight")


def _run(
    model: PreTrainedModel, starts: Sequence[int], ends: Sequence[int], firsts: Sequence[int]
) -> Tensor:
    """Plain forward over those tokens of the two sequences, packed; logits [num_tokens, vocab]."""
    device = _embedding(model).device
    ids, positions = tokens(model, starts, ends, firsts)
    ones = torch.ones(1, len(ids), dtype=torch.int64, device=device)
    # The mask of ones keeps Hugging Face from looking for packed sequences in the positions.
    output = model(
        input_ids=ids[None], position_ids=positions[None], attention_mask=ones, use_cache=False
    )
    return output.logits[0]


def tokens(
    model: PreTrainedModel, starts: Sequence[int], ends: Sequence[int], firsts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Ids and positions of tokens ``starts[i]:ends[i]`` of probe sequence i, packed."""
    places = torch.cat([torch.arange(a, b) for a, b in zip(starts, ends, strict=True)])
    rows = torch.tensor([b - a for a, b in zip(starts, ends, strict=True)])
    row = torch.arange(len(rows)).repeat_interleave(rows)
    weight = _embedding(model)
    ids = (places * 7 + row * 31 + 3) % weight.shape[0]
    positions = places + torch.tensor(firsts)[row]
    return ids.to(weight.device), positions.to(weight.device)


def batch_of(starts: Sequence[int], ends: Sequence[int], device: torch.device) -> Batch:
    """The pass over those tokens; sequence i has page ``i + 1``."""
    counts = [b - a for a, b in zip(starts, ends, strict=True)]
    slots = [
        page * BLOCK_SIZE + torch.arange(a, b)
        for page, (a, b) in enumerate(zip(starts, ends, strict=True), start=1)
    ]
    tables = torch.arange(1, len(counts) + 1, dtype=torch.int32)[:, None]
    return Batch(
        num_tokens=sum(counts),
        max_query_len=max(counts),
        query_start=torch.tensor([0, *counts]).cumsum(0).int().to(device),
        seq_lens=torch.tensor(list(ends), dtype=torch.int32, device=device),
        groups=(GroupBatch(tables.to(device), torch.cat(slots).to(device)),),
    )


def _check_layers(model: PreTrainedModel, config: PretrainedConfig, probe: Probe) -> None:
    calls = [layer.call for layer in probe.layers]
    if not calls:
        raise refuse(model, "none of its modules calls causal attention")
    modules = [id(call.module) for call in calls]
    if len(set(modules)) != len(modules):
        twice = next(p for p in probe.layers if modules.count(id(p.call.module)) > 1)
        raise refuse(model, f"{twice.attention_name} calls attention more than once a pass")
    # The decoder of an encoder-decoder, alone, has another count than its config's first.
    expected = getattr(config, "decoder_layers", None) or config.num_hidden_layers
    if len(calls) != expected:
        raise refuse(
            model,
            f"only {len(calls)} of its {expected} layers call attention "
            f"({', '.join(layer.attention_name for layer in probe.layers[:3])}, ...)",
        )
    with _explained(model, "transformers makes no cache for it"):
        cache = DynamicCache(config=model.config)
    for layer, cached in zip(probe.layers, cache.layers, strict=False):
        window = getattr(cached, "sliding_window", None) or 0
        if window != layer.call.window:
            raise refuse(
                model,
                f"transformers' cache keeps {window or 'all'} tokens for "
                f"{layer.attention_name}, whose mask shows {layer.call.window or 'all'}: its "
                "result with a cache is another than without",
            )
