"""The attention function that Hugging Face's layers call, and the window that a mask means."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_pd import ops
from torch_pd.context import Batch
from torch_pd.kv.cache import KVPool
from torch_pd.nn.attend import attend

NAME = "torch_pd"
"""Of the attention function in Hugging Face's AttentionInterface."""

_MAX_WINDOW = 1 << 20
# Arguments that layers hand on and that change nothing here: positions are in q and k already.
_HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_hidden_states",
    "logits_to_keep",
}


@dataclass
class Pass:
    """What the running forward pass reads and writes; these three are None outside of one.

    The rest counts for pooled weights only and stays between passes.
    """

    batch: Batch | None = None
    pool: KVPool | None = None
    logits: Tensor | None = None
    """[rows, vocab] where the head writes its result; None: into a new tensor."""
    mode: str = "resident"
    """ship: linears run on the shards of all ranks, together with them; resident, stream: here."""
    rows: Sequence[int] = ()
    """Shipped: tokens of each rank of the group in this pass."""
    head_rows: Sequence[int] = ()
    """Shipped: rows of each rank whose logits are wanted."""
    halves: tuple[Sequence[int], Sequence[int]] | None = None
    """Shipped: ``rows`` in two half-batches that take turns (nn/halves.py); None: in one."""

    def current(self) -> tuple[Batch, KVPool]:
        """Batch and pool. ValueError outside of a pass of the patched model."""
        if self.batch is None or self.pool is None:
            raise ValueError(
                "an inner module of a patched model was called by itself, without KV pages: call "
                "the model, or torch_pd.unpatch_model(model) first"
            )
        return self.batch, self.pool


@dataclass
class AttentionSlot:
    """Hangs on an attention module that takes the general path."""

    running: Pass
    layer: int
    window: int
    group: int = 0


@dataclass
class AttentionCall:
    """One recorded call of the attention function."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Of a page: the wider one of keys and values."""
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    scale: float
    soft_cap: float
    sinks: bool
    window: int


@dataclass
class Recorder:
    """Hangs on every module of a model while it is probed; collects the attention calls."""

    running: Pass
    new_pool: Callable[[int, int, torch.dtype], KVPool]
    names: dict[int, str]
    """Of the model's modules, by id."""
    calls: list[AttentionCall] = field(default_factory=list)
    inside: list[int | None] = field(default_factory=list)
    """Ids of the modules whose forwards are running, the innermost last."""

    def record(self, call: AttentionCall) -> None:
        """Notes a call. ValueError if its keys and values do not fit into the pages of the rest."""
        self.calls.append(call)
        first, name = self.calls[0], self.names[id(call.module)]
        shapes = [(c.num_kv_heads, c.head_dim, c.dtype) for c in (first, call)]
        if shapes[0] != shapes[1]:
            texts = [f"{heads} heads of {dim} ({dtype})" for heads, dim, dtype in shapes]
            raise ValueError(
                f"{self.names[id(first.module)]} keeps {texts[0]}, {name} {texts[1]}: layers of "
                "several KV shapes are not supported"
            )


@dataclass
class MaskMark:
    """Travels through a probed model in the place of the mask that Hugging Face would build.

    A model that looks into its mask, or computes with it, is refused by what is raised here.
    """

    mask_function: Callable

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"it makes something else of its attention mask (mask.{name})")

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("it makes something else of its attention mask (mask[...])")

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None):
        name = getattr(func, "__name__", str(func))
        # Not a TypeError: torch makes that "unsupported operand types".
        raise ValueError(f"it makes something else of its attention mask ({name})")

    @functools.cached_property
    def window(self) -> int:
        """See `window_of`. Found out where the mask is used: models make masks they do not use."""
        return window_of(self.mask_function)


def make_mark(*args, mask_function: Callable, **kwargs) -> MaskMark:
    """Mask factory of the probe (an entry of Hugging Face's AttentionMaskInterface)."""
    return MaskMark(mask_function)


def window_of(mask_function: Callable) -> int:
    """The sliding window that a mask function (batch, head, q index, kv index) stands for.

    Returns 0 for plain causal attention, else the keys that a query sees, itself included.

    Raises:
        ValueError: the mask is neither, such as a bidirectional or a chunked one.
    """
    zero = torch.tensor(0)

    def visible(q: int, distance: Tensor) -> Tensor:
        try:
            seen = mask_function(zero, zero, torch.tensor(q), q - distance)
        except IndexError as error:
            raise ValueError("its attention mask depends on the tokens of its input") from error
        return torch.as_tensor(seen).expand(distance.shape)

    seen = visible(1 << 30, torch.arange(_MAX_WINDOW))
    window = 0 if bool(seen.all()) else int(seen.int().argmin())
    for q in (0, 3, 100, 5000, _MAX_WINDOW + 12345):
        distance = torch.arange(-8, min(q + 1, _MAX_WINDOW))
        expected = distance >= 0
        if window:
            expected &= distance < window
        if not torch.equal(visible(q, distance), expected) or not expected[8]:
            raise ValueError("its attention mask is neither causal nor a causal sliding window")
    return window


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Paged attention behind Hugging Face's AttentionInterface.

    Args:
        query: [1, num_heads, num_tokens, head_dim], packed tokens of the running batch.
        key, value: [1, num_kv_heads, num_tokens, head_dim]; written into the KV pages. The narrower
            of the two is filled up with zeros there, which change nothing.

    Returns:
        [1, num_tokens, num_heads, width of value] and None (attention weights are never made).

    Raises:
        ValueError: an argument asks for what paged attention does not do.
    """
    slot = getattr(module, "_torch_pd", None)
    if slot is None:
        raise ValueError(
            f"{type(module).__name__} uses attention {NAME!r} but is not patched: load the model "
            "with another attn_implementation and call torch_pd.patch_model(model)"
        )
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise ValueError(f"{type(module).__name__} asks attention for {name}, not supported")
    if dropout:
        raise ValueError(f"{type(module).__name__} asks for attention dropout {dropout}: eval() it")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{type(module).__name__} is not causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    soft_cap = float(softcap or 0.0)
    k_dim, v_dim = key.shape[3], value.shape[3]
    if k_dim != v_dim:
        width = max(k_dim, v_dim)
        query, key, value = (
            nn.functional.pad(x, (0, width - x.shape[3])) for x in (query, key, value)
        )
    if isinstance(slot, Recorder):
        call = AttentionCall(
            module=module,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=key.shape[3],
            k_dim=k_dim,
            v_dim=v_dim,
            dtype=key.dtype,
            scale=scale,
            soft_cap=soft_cap,
            sinks=s_aux is not None,
            window=_probed_window(attention_mask, sliding_window),
        )
        slot.record(call)
        if slot.running.pool is None and not query.is_meta:
            slot.running.pool = slot.new_pool(call.num_kv_heads, call.head_dim, call.dtype)
        layer, window, group = 0, call.window, 0
    else:
        if attention_mask is not None:
            raise ValueError(f"{type(module).__name__} was given a mask; only 2-D masks work")
        layer, window, group = slot.layer, slot.window, slot.group
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not q.is_meta:
        batch, pool = slot.running.current()
        cache, slots = pool.layer(layer), batch.groups[group].slots
        ops.write_kv(k, v, cache.k, cache.v, slots, k_scale=cache.k_scale, v_scale=cache.v_scale)
        attend(
            q,
            pool,
            layer,
            group,
            batch,
            out,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=None if s_aux is None else s_aux.detach().float().contiguous(),
        )
    return out[None, :, :, :v_dim], None


def _probed_window(mask: Any, sliding_window: int | None) -> int:
    """The mask decides, as it does for Hugging Face's default attention (sdpa)."""
    if isinstance(mask, MaskMark):
        return mask.window
    if mask is not None:
        raise ValueError(f"it makes an attention mask of its own ({type(mask).__name__})")
    return int(sliding_window or 0)
