"""Recognises decoder layers that a FusedBlock can stand for, by structure and by numbers.

Names of children say where to look; what a norm or an activation computes is found out by running
it. Class names play no part.
"""

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from torch_pd.nn.attention import AttentionCall, Pass
from torch_pd.nn.block import ForeignMLP, FusedAttention, FusedBlock, FusedMLP, Growth, Norm
from torch_pd.nn.linear import MergedLinear, in_rows

# Norms of a layer by name -> where they sit: before attention, after it, before the MLP, after it.
_NORM_PLACES = {
    ("input_layernorm", "post_attention_layernorm"): (0, 2),
    ("input_layernorm", "pre_feedforward_layernorm"): (0, 2),
    ("attention_layernorm", "feedforward_layernorm"): (0, 2),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
    ): (0, 1, 3, 2),
    ("post_attention_layernorm", "post_feedforward_layernorm"): (1, 3),
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


_FUNCTIONS = set(
    "__get__ __getitem__ __len__ size dim view view_as reshape flatten unflatten transpose permute "
    "squeeze unsqueeze expand repeat_interleave contiguous clone to type type_as float half "
    "bfloat16 chunk split narrow unbind cat stack add add_ sub rsub neg mul mul_ multiply "
    "dropout".split()
)
"""Of torch, that a layer, an attention or an MLP may call by itself and still be one of ours."""
_GROWTH = {"div", "floor", "log"}
"""Besides, where queries grow with the position."""


class NotRecognised(Exception):
    """Why a layer keeps Hugging Face's forward."""


def recognise(
    layer: nn.Module,
    call: AttentionCall,
    index: int,
    running: Pass,
    functions: Mapping[int, set[str]],
) -> FusedBlock:
    """The fused block of a decoder layer. Merges no weights yet if it fails.

    Args:
        layer: a decoder layer of the model.
        call: what its attention module passed to the attention function when probed.
        index: of the layer in the KV pool.
        running: the pass that the block will read.
        functions: of torch, that each module called itself when probed, by its id.

    Raises:
        NotRecognised: with the reason.
    """
    children = dict(layer.named_children())
    if next(layer.parameters(recurse=False), None) is not None:
        raise NotRecognised("the layer has parameters of its own")
    dtypes = {parameter.dtype for parameter in layer.parameters()}
    if len(dtypes) != 1:
        raise NotRecognised(f"parameters of several dtypes: {sorted(map(str, dtypes))}")
    _check_plain("", layer)
    growth = _growth(call.module)
    if growth is not None and not functions.get(id(call.module), set()) >= _GROWTH:
        growth = None
    _check_functions("the layer", layer, functions)
    _check_functions("attention", call.module, functions, _GROWTH if growth else set())
    norms: dict[str, nn.Module] = {}
    others: dict[str, nn.Module] = {}
    for name, child in children.items():
        if child is call.module or not list(child.parameters()):
            continue
        sizes = [parameter.dim() for parameter in child.parameters()]
        (norms if max(sizes) == 1 else others)[name] = child
    if call.module not in children.values():
        raise NotRecognised("the attention module is not a direct child of the layer")
    places = _NORM_PLACES.get(tuple(sorted(norms)))
    if places is None:
        raise NotRecognised(f"norms of another arrangement: {', '.join(sorted(norms)) or 'none'}")
    if len(others) != 1:
        raise NotRecognised(f"one MLP expected, found {', '.join(sorted(others)) or 'none'}")
    slots: list[Norm | None] = [None] * 4
    for name, place in zip(sorted(norms), places, strict=True):
        slots[place] = recognise_norm(name, norms[name])
    (mlp_module,) = others.values()
    build_attention = _recognise_attention(call, index, running, functions)
    build_mlp = _recognise_mlp(mlp_module, functions)
    multiplier = getattr(layer, "residual_multiplier", 1.0)
    pre_attention, post_attention, pre_mlp, post_mlp = slots
    return FusedBlock(
        attention=build_attention(),
        mlp=build_mlp(),
        pre_attention=pre_attention,
        post_attention=post_attention,
        pre_mlp=pre_mlp,
        post_mlp=post_mlp,
        multiplier=float(multiplier),
        growth=growth,
    )


def foreign_hooks(hooks: Mapping[int, Callable]) -> bool:
    """Whether there are others than Hugging Face's capture of outputs, which idles unless attention
    weights are asked for: refused."""
    return any(h.__module__ != "transformers.utils.output_capturing" for h in hooks.values())


def _check_plain(name: str, module: nn.Module) -> None:
    """A module whose own forward is bypassed must have no hooks and no overridden forward."""
    hooks = foreign_hooks({**module._forward_hooks, **module._forward_pre_hooks})
    if (hooks and name) or "forward" in module.__dict__:
        raise NotRecognised(f"{name or 'the layer'} has hooks or a forward of its own")


def _check_functions(
    name: str, module: nn.Module, functions: Mapping[int, set[str]], more: set[str] | None = None
) -> None:
    """What a few tokens do not show, such as the clamping of large values, shows in the calls."""
    others = functions.get(id(module), set()) - _FUNCTIONS - (more or set())
    if others:
        raise NotRecognised(f"{name} calls {', '.join(sorted(others))}")


def _growth(module: nn.Module) -> Growth | None:
    """How the config of an attention lets its queries grow; whether they do, numbers must show."""
    rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    beta, length = (
        rope.get(name) for name in ("llama_4_scaling_beta", "original_max_position_embeddings")
    )
    return Growth(float(beta), float(length)) if beta and length else None


def _linears(parent: nn.Module, names: Iterable[str]) -> list[nn.Linear] | None:
    """The named children if all are there as plain nn.Linear, biased all or none."""
    found = [parent._modules.get(name) for name in names]
    linears = [module for module in found if type(module) is nn.Linear]
    for module in linears:
        if not in_rows(module.weight):
            kind = type(module.weight.data).__name__
            raise NotRecognised(f"the weights of a linear do not lie row by row in memory ({kind})")
    if len(linears) != len(found) or len({module.bias is None for module in linears}) != 1:
        return None
    return linears


def _check_complete(name: str, parent: nn.Module, parts: list[nn.Module]) -> None:
    known = {id(parameter) for part in parts for parameter in part.parameters()}
    for path, parameter in parent.named_parameters():
        if id(parameter) not in known:
            raise NotRecognised(f"{name} has another parameter, {path}")
    for part in parts:
        _check_plain(f"{name}.{type(part).__name__}", part)


def _recognise_attention(
    call: AttentionCall, index: int, running: Pass, functions: Mapping[int, set[str]]
) -> Callable[[], FusedAttention]:
    module = call.module
    if call.sinks:
        raise NotRecognised("attention has sinks")
    if call.k_dim != call.v_dim:
        raise NotRecognised("keys and values of different width")
    sizes = [heads * call.head_dim for heads in (call.num_heads, *[call.num_kv_heads] * 2)]
    qkv = _linears(module, ("q_proj", "k_proj", "v_proj"))
    if qkv is None:
        qkv, sizes = _linears(module, ("qkv_proj",)), [sum(sizes)]
    out = _linears(module, ("o_proj",))
    if qkv is None or out is None:
        names = ", ".join(name for name, _ in module.named_children())
        raise NotRecognised(f"attention has no q_proj, k_proj, v_proj, o_proj but {names}")
    if [linear.out_features for linear in qkv] != sizes:
        raise NotRecognised("attention projections of another width than its heads")
    q_norm = k_norm = None
    if "q_norm" in module._modules or "k_norm" in module._modules:
        q_norm, k_norm = (
            recognise_norm(name, module._modules.get(name)) for name in ("q_norm", "k_norm")
        )
        if (q_norm.eps, q_norm.offset) != (k_norm.eps, k_norm.offset):
            raise NotRecognised("q_norm and k_norm differ in more than their weights")
        widths = [norm.weight.numel() for norm in (q_norm, k_norm)]
        dim = call.head_dim
        if widths not in ([dim, dim], [call.num_heads * dim, call.num_kv_heads * dim]):
            raise NotRecognised(f"q_norm and k_norm are {widths} wide for heads of {dim}")
    parts = [*qkv, *out, *(norm.module for norm in (q_norm, k_norm) if norm is not None)]
    _check_complete("attention", module, parts)
    _check_plain("attention", module)
    return lambda: FusedAttention(
        running=running,
        layer=index,
        num_heads=call.num_heads,
        head_dim=call.head_dim,
        scale=call.scale,
        soft_cap=call.soft_cap,
        window=call.window,
        # Some layers are left without positions (SmolLM3, EXAONE 4): they do not turn halves.
        rotary="neg" in functions.get(id(module), {"neg"}),
        qkv=MergedLinear(qkv),
        o=out[0],
        q_norm=q_norm,
        k_norm=k_norm,
    )


def _recognise_mlp(
    module: nn.Module, functions: Mapping[int, set[str]]
) -> Callable[[], FusedMLP | ForeignMLP]:
    try:
        _check_functions("it", module, functions)
        return _recognise_gated_mlp(module)
    except NotRecognised as error:
        reason = str(error)
        return lambda: ForeignMLP(module, reason)


def _recognise_gated_mlp(module: nn.Module) -> Callable[[], FusedMLP]:
    gate_up = _linears(module, ("gate_proj", "up_proj")) or _linears(module, ("gate_up_proj",))
    down = _linears(module, ("down_proj",))
    if gate_up is None or down is None:
        names = ", ".join(name for name, _ in module.named_children())
        raise NotRecognised(f"no gate_proj, up_proj, down_proj but {names}")
    functions = [getattr(module, name, None) for name in ("act_fn", "activation_fn", "act")]
    activation = next((_activation_name(f) for f in functions if callable(f)), None)
    if activation is None:
        raise NotRecognised("its activation is neither SiLU nor GELU")
    _check_complete("mlp", module, [*gate_up, *down])
    _check_plain("mlp", module)
    return lambda: FusedMLP(MergedLinear(gate_up), down[0], activation)


def _activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    tails = torch.tensor([-1e3, -50.0, -9.0, 9.0, 50.0, 1e3], dtype=torch.float32)
    x = torch.cat([torch.linspace(-6, 6, 97, dtype=torch.float32), tails])
    with torch.no_grad():
        y = function(x)
    for name, formula in _ACTIVATIONS.items():
        if torch.allclose(y, formula(x), rtol=0, atol=1e-6):
            return name
    return None


def recognise_norm(name: str, module: nn.Module | None) -> Norm:
    """Runs a copy of the norm with random weights to see what it computes."""
    if module is None:
        raise NotRecognised(f"{name} is missing")
    weights = dict(module.named_parameters())
    eps = next(
        (vars(module)[name] for name in ("variance_epsilon", "eps") if name in vars(module)), None
    )
    if list(weights) != ["weight"] or weights["weight"].dim() != 1 or not isinstance(eps, float):
        raise NotRecognised(f"{name} is not an RMSNorm")
    _check_plain(name, module)
    generator = torch.Generator().manual_seed(0)
    width = weights["weight"].shape[0]
    probe: Callable[[Tensor], Tensor]
    probe = copied = copy.deepcopy(module).to_empty(device="cpu").float()
    weight = torch.randn(width, generator=generator, dtype=torch.float32)
    copied.get_parameter("weight").data.copy_(weight)
    # Small rows as well, where eps counts.
    sizes = torch.tensor([[1.0], [30.0], [eps**0.5]], dtype=torch.float32)
    x = torch.randn(3, width, generator=generator, dtype=torch.float32) * sizes
    with torch.no_grad():
        y = probe(x)
    for offset in (0.0, 1.0):
        want = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight)
        if torch.allclose(y, want, rtol=1e-4, atol=1e-5):
            return Norm(module, eps, offset)
    raise NotRecognised(f"{name} is not an RMSNorm")
