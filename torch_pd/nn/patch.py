"""patch_model and unpatch_model: a Hugging Face causal LM over KV pages, in place."""

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torch_pd.config import EngineConfig
from torch_pd.nn import block, generate, linear
from torch_pd.nn.attention import AttentionSlot, Pass
from torch_pd.nn.patched import (
    ModulePath,
    PatchState,
    forward_packed,
    is_patched,
    new_pool,
    patch_state,
    without_autocast,
)
from torch_pd.nn.probe import (
    BLOCK_SIZE,
    LENGTHS,
    Probe,
    ProbedLayer,
    allowed,
    batch_of,
    probe_model,
    refuse,
    tokens,
)
from torch_pd.nn.recognise import NotRecognised, recognise, recognise_norm
from torch_pd.nn.undo import Undo, put


def patch_model(
    model: PreTrainedModel, config: EngineConfig | None = None, *, group: Any = None
) -> PreTrainedModel:
    """Changes a causal LM of transformers in place so that it runs over KV pages; returns it.

    Decoder layers of a known structure become fused blocks, checked against Hugging Face's own
    result on a few tokens; others keep Hugging Face's code and get the attention function alone
    (`describe` tells which and why). ``generate`` and plain calls work on, without gradients and in
    eval mode, which is set here. Parameters, their names and values stay, and may change; numbers
    beside them (an epsilon, a scale of attention) are read here, once. A patched model is
    returned as it is.

    Args:
        model: on any device; on meta nothing is computed and nothing checked.
        config: block_size and kv_cache_dtype count here, for ``generate``.
        group: ranks that share the weights; must be None.

    Raises:
        ValueError: the model cannot run over KV pages; names its class, the module and the reason.
            The model is left as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"patch_model takes a model of transformers, got {type(model).__name__}")
    if config is not None and not isinstance(config, EngineConfig):
        raise TypeError(f"config must be an EngineConfig, got {type(config).__name__}")
    if group is not None:
        raise ValueError(
            f"group={group!r} must be None: a patched model has weights of its own; "
            "LLM(path, data_parallel_size=2, weights='pooled') shares them between ranks"
        )
    if is_patched(model):
        return model
    config = config or EngineConfig()
    undo: list[Undo] = [functools.partial(model.train, model.training)]
    model.eval()
    try:
        with without_autocast(model.device):
            _patch(model, config, undo)
    except BaseException:
        _undo(undo)
        raise
    return model


def _patch(model: PreTrainedModel, config: EngineConfig, undo: list[Undo]) -> None:
    probe = probe_model(model, undo)
    state = PatchState(
        running=Pass(),
        block_size=config.block_size,
        kv_cache_dtype=config.kv_cache_dtype,
        call=probe.layers[0].call,
        num_layers=len(probe.layers),
        forward=_unbound_forward(model),
        signature=inspect.signature(model.forward),
        limit=probe.limit,
        window=min((w for w in (layer.call.window for layer in probe.layers) if w), default=0),
        dtype=model.dtype,
        undo=undo,
    )
    _patch_layers(model, state, probe)
    _let_flow(model, state, probe)
    _patch_rest(model, state)
    if probe.logits is None:
        return
    try:
        _check_logits(model, probe)
    except (ValueError, RuntimeError):
        # Perhaps the model does something between its layers: each completes its output.
        if not _complete_outputs(state, model):
            raise
        _check_logits(model, probe)


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `patch_model`: the model computes what it did before, bit for bit.

    Raises:
        ValueError: the model is not patched.
        TypeError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch_model takes a patched model, got {type(model).__name__}")
    _undo(patch_state(model).undo)
    return model


def _undo(undo: list[Undo]) -> None:
    while undo:
        undo.pop()()


def _bind(function: Callable, module: nn.Module) -> Callable:
    """A bound method, so that a deep copy of the model is bound to the copy."""
    return types.MethodType(function, module)


def _patch_layers(model: PreTrainedModel, state: PatchState, probe: Probe) -> None:
    undo, paths = state.undo, state.paths
    shared = _shared_parameters(model)
    for index, found in enumerate(probe.layers):
        call, layer = found.call, found.layer
        try:
            if layer is None:
                raise NotRecognised("no decoder layer around it")
            if shared & {id(parameter) for parameter in layer.parameters()}:
                raise NotRecognised("its parameters are used elsewhere as well")
            fused = recognise(layer, call, index, state.running, probe.functions)
            undo_layer: list[Undo] = []
            _install(undo_layer, layer, fused)
            fits, remark = _verify(found, fused, probe.running, state.running)
            if not fits:
                _undo(undo_layer)
                raise NotRecognised(remark)
            undo += undo_layer
            state.held.add(layer)
        except NotRecognised as error:
            slot = AttentionSlot(state.running, index, call.window)
            put(undo, call.module, "_torch_pd", slot)
            paths.append(ModulePath(found.attention_name, "attention", ""))
            if layer is not None:
                paths.append(ModulePath(found.layer_name, "huggingface", str(error)))
            continue
        paths.append(ModulePath(found.layer_name, "fused", remark))
        if isinstance(fused.mlp, block.ForeignMLP):
            names = {id(module): name for name, module in layer.named_modules()}
            name = f"{found.layer_name}.{names[id(fused.mlp.module)]}"
            paths.append(ModulePath(name, "huggingface", fused.mlp.reason))


def _let_flow(model: PreTrainedModel, state: PatchState, probe: Probe) -> None:
    """Lets fused blocks hand their last branch on where a fused block or a known norm follows."""
    blocks = [
        found.layer.__dict__.get("_torch_pd") if found.layer is not None else None
        for found in probe.layers
    ]
    for here, following in zip(blocks, [*blocks[1:], None], strict=True):
        if isinstance(here, block.FusedBlock):
            here.flow = state.flow
            here.hands_on = isinstance(following, block.FusedBlock)
    last = blocks[-1]
    if not isinstance(last, block.FusedBlock):
        return
    # The one norm beside the list of layers, such as model.norm beside model.layers.
    parent = model.get_submodule(probe.layers[-1].layer_name.rpartition(".")[0].rpartition(".")[0])
    width = model.get_input_embeddings().get_parameter("weight").shape[1]
    norms = [
        (name, module)
        for name, module in parent.named_children()
        if [tuple(parameter.shape) for parameter in module.parameters()] == [(width,)]
    ]
    if len(norms) != 1:
        return
    (name, module) = norms[0]
    try:
        norm = recognise_norm(name, module)
    except NotRecognised:
        return
    put(state.undo, module, "_torch_pd", block.LastNorm(norm, state.flow, module.forward))
    put(state.undo, module, "forward", _bind(block.norm_forward, module))
    last.hands_on = True
    (path,) = [path for path, other in model.named_modules() if other is module]
    state.paths.append(ModulePath(path, "fused", ""))


def _complete_outputs(state: PatchState, model: nn.Module) -> bool:
    """Undoes `_let_flow` but for the last norm; False if there was nothing to undo."""
    found = [module.__dict__.get("_torch_pd") for module in model.modules()]
    flowing = [fused for fused in found if isinstance(fused, block.FusedBlock) and fused.hands_on]
    for fused in flowing:
        fused.hands_on = False
    return bool(flowing)


def _check_logits(model: PreTrainedModel, probe: Probe) -> None:
    """Both probe sequences in two passes each against transformers, one sequence at a time.

    Finds what no look at a layer does: state that a model carries from token to token besides keys
    and values, positions it counts by itself, masks with a meaning of their own.
    """
    want = probe.logits
    assert want is not None
    if not bool(want.isfinite().all()):
        return
    pool = new_pool(model, 1 + len(LENGTHS), BLOCK_SIZE, "auto")
    middle = [length // 2 + 1 for length in LENGTHS]
    for starts, ends in (([0] * len(LENGTHS), middle), (middle, LENGTHS)):
        ids, positions = tokens(model, starts, ends, probe.starts)
        batch = batch_of(starts, ends, pool.device)
        select = torch.arange(len(ids), device=pool.device)
        got = forward_packed(model, pool, batch, ids, positions, select)
        offsets = [0, *itertools.accumulate(LENGTHS)]
        rows = [
            offset + i
            for offset, start, end in zip(offsets, starts, ends, strict=False)
            for i in range(start, end)
        ]
        off = (got.float() - want[rows].float()).abs().amax(1) / want.float().abs().max()
        # The median: in low precision a token may be sent to another expert.
        if not bool(off.median() <= allowed(model)):
            raise refuse(
                model,
                f"over KV pages its logits are off by {off.median():.1e} of the largest; it "
                "carries more from token to token than the keys and values of its attention, or "
                "counts positions by itself",
            )


def _install(undo: list[Undo], layer: nn.Module, fused: block.FusedBlock) -> None:
    for merged in fused.merged():
        undo.append(merged.split)
    put(undo, layer, "_torch_pd", fused)
    put(undo, layer, "forward", _bind(block.forward, layer))
    put(undo, layer, "_apply", _bind(block.apply, layer))
    hook = layer.register_load_state_dict_post_hook(block.merge_again)
    undo.append(hook.remove)


def _verify(
    found: ProbedLayer, fused: block.FusedBlock, probed: Pass, running: Pass
) -> tuple[bool, str]:
    """Runs the installed block on what the probe saw and compares with Hugging Face's result.

    Returns whether the block may stay, and the reason or a remark.
    """
    assert found.layer is not None
    want = found.output
    if not isinstance(want, Tensor):
        return False, f"the layer returns a {type(want).__name__}"
    if want.is_meta:
        return True, ""
    hidden = found.kwargs["hidden_states"] if "hidden_states" in found.kwargs else found.args[0]
    running.batch, running.pool = probed.batch, probed.pool
    try:
        with torch.no_grad():
            got = found.layer.forward(*found.args, **found.kwargs)
    except RuntimeError as error:
        return False, f"the fused ops refuse it: {error}"
    finally:
        running.batch = running.pool = None
    if not bool(want.isfinite().all()):
        return True, "not checked against transformers: its result is not finite"
    # What the layer adds is compared, within what rounding to the dtype allows.
    exact = want.dtype == torch.float32
    change = (want.float() - hidden.float()).abs().max()
    rounding = torch.finfo(want.dtype).eps * want.float().abs().max()
    allowed = (1e-4 if exact else 5e-2) * change + 4 * rounding
    off = (got.float() - want.float()).abs().max()
    if bool(off <= allowed):
        return True, ""
    return False, f"differs from transformers by {off:.1e} where {allowed:.1e} is allowed"


def _unbound_forward(model: nn.Module) -> Callable[..., Any]:
    own = model.__dict__.get("forward")
    if own is None:
        return type(model).forward
    return lambda _, *args, **kwargs: own(*args, **kwargs)


def _patch_rest(model: PreTrainedModel, state: PatchState) -> None:
    undo, paths = state.undo, state.paths
    head = model.get_output_embeddings()
    names = dict(model.named_modules())
    (head_name,) = [name for name, module in names.items() if module is head]
    plain = type(head) is nn.Linear and linear.in_rows(head.weight)
    if plain and "forward" not in head.__dict__:
        put(undo, head, "_torch_pd", state.running)
        put(undo, head, "forward", _bind(linear.head_forward, head))
        paths.append(ModulePath(head_name, "fused", ""))
    covered = [path.name for path in paths]
    for name in names:
        parent = name.rpartition(".")[0]
        inside = any(f"{name}.".startswith(f"{other}.") for other in covered)
        around = [other for other in covered if f"{other}.".startswith(f"{name}.") or not name]
        near = any(f"{other}.".startswith(f"{parent}.") or not parent for other in covered)
        if not inside and not around and near:
            paths.append(ModulePath(name, "huggingface", ""))
    order = {name: i for i, name in enumerate(names)}
    paths.sort(key=lambda path: order[path.name])
    put(undo, model, "forward", _bind(generate.wrap(model.forward), model))
    put(undo, model, "_prepare_cache_for_generation", _bind(generate.prepare_cache, model))
    put(undo, model, "_torch_pd", state)


def _shared_parameters(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
