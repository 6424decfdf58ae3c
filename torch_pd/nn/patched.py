"""PatchState: what hangs on a patched model, and what the model is asked for through it."""

import contextlib
import copy
import dataclasses
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torch_pd.context import Batch
from torch_pd.kv.cache import BYTE_DTYPES, KVPool, page_shape
from torch_pd.nn import block
from torch_pd.nn.attention import NAME, AttentionCall, Pass
from torch_pd.nn.held import Held
from torch_pd.nn.limit import Limit
from torch_pd.nn.undo import Undo
from torch_pd.sizing import KVShape


@dataclass(frozen=True)
class ModulePath:
    """How one module of a patched model runs."""

    name: str
    """Of the module inside the model."""
    path: str
    """fused: the library's ops; pooled: those over shared weights; attention: paged attention in
    Hugging Face's code; huggingface."""
    reason: str
    """Why it is not fused, or a remark; may be empty."""


@dataclass
class PatchState:
    """Everything that hangs on a patched model, as ``model._torch_pd``."""

    running: Pass
    block_size: int
    kv_cache_dtype: str
    """EngineConfig's; as block_size for plain calls, an engine has its own."""
    call: AttentionCall
    """Of the first layer; all agree in heads and widths."""
    num_layers: int
    forward: Callable[..., Any]
    """Hugging Face's own forward of the model, unbound."""
    signature: inspect.Signature
    """Of that forward, without self."""
    limit: Limit | None = None
    """Of sequences, below the model's own maximum."""
    window: int = 0
    """The smallest sliding window of any layer, 0 if there is none."""
    dtype: torch.dtype = torch.float32
    """Of the model."""
    held: Held = field(default_factory=Held)
    """What the fused blocks hold on to."""
    configs: tuple[Any, Any] = (None, None)
    """The model's config, and the part of it that is the decoder's."""
    engines: int = 0
    """Engines that run the model, if one of them has patched it: the last one unpatches it."""
    lock: Any = field(default_factory=threading.RLock)
    """Held through a pass: another thread's waits, since passes leave notes on the model."""
    flow: block.Flow = field(default_factory=block.Flow)
    paths: list[ModulePath] = field(default_factory=list)
    undo: list[Undo] = field(default_factory=list)

    @property
    def takes_select(self) -> bool:
        """Whether the forward has logits_to_keep."""
        return "logits_to_keep" in self.signature.parameters

    def follow(self, model: PreTrainedModel) -> None:
        """Keeps up with what was done to the model since it was patched (``half``, new Parameters).

        Raises:
            ValueError: it cannot, since a module or the attention function was replaced, or a hook
                was set on a module that is not called.
        """
        replaced = self.held.replaced()
        if replaced is not None:
            parent, name = replaced
            raise ValueError(
                f"{_path(model, parent)}.{name} was replaced after patch_model, which would go "
                "unnoticed: call torch_pd.unpatch_model before, and patch_model again after such a "
                "change"
            )
        hooked = self.held.hooked()
        if hooked is not None:
            raise ValueError(
                f"{_path(model, hooked)} got a forward hook after patch_model, which nothing would "
                "call: call torch_pd.unpatch_model before, and patch_model again after it (the "
                "layer then keeps transformers' code)"
            )
        config: Any = model.config
        if config is not self.configs[0]:  # finding the second takes 10 us
            self.configs = config, config.get_text_config(decoder=True)
        used = self.configs[1]._attn_implementation
        if used != NAME:
            raise ValueError(
                f"the attention of a patched model was set to {used!r}; torch_pd.unpatch_model "
                "gives the original back"
            )
        self.held.mend()
        if model.dtype != self.dtype:
            if self.call.dtype == self.dtype:
                self.call = dataclasses.replace(self.call, dtype=model.dtype)
            self.dtype = model.dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> "PatchState":
        copied = memo[id(self)] = object.__new__(PatchState)
        copied.lock = threading.RLock()  # locks cannot be copied
        for name, value in self.__dict__.items():
            if name != "lock":
                copied.__dict__[name] = copy.deepcopy(value, memo)
        return copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a model patched by torch_pd cannot be pickled: call torch_pd.unpatch_model before, or "
            "use save_pretrained"
        )

    def kv_dtype(self, kv_cache_dtype: str | None = None) -> torch.dtype:
        """Of the keys and values in the pages."""
        return BYTE_DTYPES.get(kv_cache_dtype or self.kv_cache_dtype, self.call.dtype)

    def shape(self, block_size: int | None = None, kv_cache_dtype: str | None = None) -> KVShape:
        """A page of the model's KV cache."""
        call, dtype = self.call, self.kv_dtype(kv_cache_dtype)
        size = block_size or self.block_size
        return page_shape(self.num_layers, call.num_kv_heads, call.head_dim, dtype, size)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Pages, and what writes to them, are of the model's own dtype."""
    kind = device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _path(model: nn.Module, module: nn.Module) -> str:
    """The name of a module inside a model."""
    names = {id(other): path for path, other in model.named_modules()}
    return names.get(id(module), type(module).__name__)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_model` has been applied."""
    return isinstance(model.__dict__.get("_torch_pd"), PatchState)


def patch_state(model: nn.Module) -> PatchState:
    """What hangs on a patched model. ValueError if it is not patched."""
    if not is_patched(model):
        raise ValueError(f"{type(model).__name__} is not patched: call torch_pd.patch_model(model)")
    return model.__dict__["_torch_pd"]


def describe(model: nn.Module) -> list[ModulePath]:
    """The path that each module of a patched model takes."""
    return list(patch_state(model).paths)


def kv_shape(
    model: nn.Module, block_size: int | None = None, kv_cache_dtype: str | None = None
) -> KVShape:
    """Sizes of a KV page of a patched model; None is what it was patched with."""
    return patch_state(model).shape(block_size, kv_cache_dtype)


def new_pool(
    model: PreTrainedModel,
    num_pages: int,
    block_size: int | None = None,
    kv_cache_dtype: str | None = None,
    records: Tensor | None = None,
) -> KVPool:
    """KV pages for a patched model, on its device; None is what it was patched with. ``records``:
    the memory, see `KVPool`."""
    state = patch_state(model)
    shape = state.shape(block_size, kv_cache_dtype)
    sizes = (shape.num_layers, shape.block_size, shape.num_kv_heads, shape.head_dim)
    dtype = state.kv_dtype(kv_cache_dtype)
    return KVPool(num_pages, *sizes, dtype, device_of(model), records)


def run(
    state: PatchState,
    model: nn.Module,
    pool: KVPool,
    batch: Batch,
    positions: Tensor,
    select: Tensor | None,
    **inputs,
) -> Any:
    """Hugging Face's forward over the packed tokens of a batch.

    Args:
        positions: int64 [num_tokens].
        select: int64 rows whose logits are wanted; None is all.
        inputs: input_ids [1, num_tokens] or inputs_embeds, and switches of the forward.

    Returns:
        Its output object, logits [1, len(select), vocab].
    """
    if select is not None and state.takes_select:
        inputs["logits_to_keep"] = select
    running = state.running
    with state.lock, without_autocast(positions.device):
        running.batch, running.pool = batch, pool
        try:
            output = state.forward(
                model, **inputs, position_ids=positions[None], use_cache=False, return_dict=True
            )
        finally:
            running.batch = running.pool = None
    if select is not None and not state.takes_select:
        output.logits = output.logits[:, select]
    return output


@torch.no_grad()
def forward_packed(
    model: nn.Module,
    pool: KVPool,
    batch: Batch,
    input_ids: Tensor,
    positions: Tensor,
    select: Tensor | None,
    logits: Tensor | None = None,
) -> Tensor:
    """One pass of a patched model over packed tokens: the engine's entry.

    Args:
        pool: whose pages the batch names; written at the batch's slots.
        input_ids, positions: int64 [num_tokens].
        select: int64 rows whose logits are wanted; None is all.
        logits: of `new_logits`, for the head to write to.

    Returns:
        Logits [len(select), vocab] in the model's dtype; a part of ``logits`` if that was given and
        the model does nothing more to them.
    """
    state = patch_state(model)
    assert input_ids.shape[0] == positions.shape[0] == batch.num_tokens
    ids = input_ids[None]
    with state.lock:
        state.flow.on = True
        state.running.logits = logits
        try:
            output = run(state, model, pool, batch, positions, select, input_ids=ids)
        finally:
            state.flow.on = False
            state.flow.q_factor = None
            state.flow.clear()
            state.running.logits = None
    return output.logits[0]


def new_logits(model: nn.Module, rows: int) -> Tensor | None:
    """Memory for the logits of passes that may share it, None if the model's head is not one that
    can write there."""
    head: Any = cast(PreTrainedModel, model).get_output_embeddings()
    fused = isinstance(head.__dict__.get("_torch_pd"), Pass)
    if not fused or head.bias is not None or head.weight.device != device_of(model):
        return None
    return head.weight.new_empty((rows, head.weight.shape[0]))


def max_length(model: nn.Module) -> Limit | None:
    """The longest sequence that a patched model takes; None if it names none."""
    state = patch_state(model)
    config: Any = cast(PreTrainedModel, model).config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    own = Limit(int(longest), "max_position_embeddings") if longest else None
    return min(filter(None, (own, state.limit)), key=lambda limit: limit.length, default=None)


def device_of(model: nn.Module) -> torch.device:
    """Where a model runs: as its parameters, but for those on meta (their values are pooled)."""
    devices = [parameter.device for parameter in model.parameters()]
    return next((device for device in devices if device.type != "meta"), devices[0])
