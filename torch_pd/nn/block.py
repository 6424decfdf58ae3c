"""FusedBlock: a whole decoder layer over packed tokens in a handful of the library's ops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from torch_pd import ops
from torch_pd.nn.attend import attend
from torch_pd.nn.attention import Pass
from torch_pd.nn.linear import MergedLinear, linear

if TYPE_CHECKING:
    from torch_pd.nn.pooled import PooledAttention, PooledMLP


@dataclass
class Norm:
    """An RMSNorm module of the model; its factor is ``offset + weight``."""

    module: nn.Module
    eps: float
    offset: float

    @property
    def weight(self) -> Tensor:
        """[width]."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    def __call__(
        self, x: Tensor, out: Tensor, residual: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """``out = norm(x)``; with a residual, ``residual += scale * x`` and the norm of that."""
        ops.rms_norm(
            x, self.weight, out, self.eps, residual=residual, scale=scale, offset=self.offset
        )
        return out


@dataclass
class Flow:
    """What the fused blocks of a model hand on beside their output in a pass of the engine.

    The output is then the next block's to change. Its last branch may be left out of it; the norm
    that comes next adds it in the same pass over memory.
    """

    on: bool = False
    branch: Tensor | None = None
    scale: float = 1.0
    address: int | None = None
    """Of the output, None if nothing was handed on (on meta every address is 0)."""
    q_factor: tuple[Tensor, Tensor] | None = None
    """Positions of a pass, and what the queries there grow by."""

    def give(self, hidden: Tensor, branch: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Returns ``hidden``, which lacks ``scale * branch`` from here on."""
        self.branch, self.scale, self.address = branch, scale, hidden.data_ptr()
        return hidden

    def gave(self, hidden: Tensor) -> bool:
        """Whether ``hidden`` was handed on, so that it may be changed."""
        return self.address == hidden.data_ptr()

    def take(self, hidden: Tensor) -> Tensor | None:
        """The branch that ``hidden`` lacks, None if it is complete.

        Raises:
            RuntimeError: another tensor than the one that lacks it has come.
        """
        branch, given = self.branch, self.gave(hidden)
        self.clear()
        if branch is not None and not given:
            raise RuntimeError("the model changes hidden states between its layers")
        return branch

    def clear(self) -> None:
        """Nothing was handed on."""
        self.branch, self.address = None, None


class Rotation(NamedTuple):
    """What the positions of the tokens do to queries and keys."""

    cos: Tensor
    """[T, R], as sin."""
    sin: Tensor
    q_factor: Tensor | None = None
    """[T], of the rotated queries."""


@dataclass(frozen=True)
class Growth:
    """Queries grow by a step every ``length`` positions (Ministral 3)."""

    beta: float
    length: float

    def factor(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Of the queries at ``positions [T]``."""
        return (1 + self.beta * torch.log(1 + torch.floor(positions / self.length))).to(dtype)


@dataclass
class FusedAttention:
    """Attention with one matrix for q, k, v; q/k norm, rotation and KV write are one op."""

    running: Pass
    layer: int
    num_heads: int
    head_dim: int
    scale: float
    soft_cap: float
    window: int
    rotary: bool
    qkv: MergedLinear
    o: nn.Linear
    q_norm: Norm | None
    k_norm: Norm | None
    group: int = 0

    def __call__(
        self,
        x: Tensor,
        rotation: Rotation | None,
        into: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """``x [T, hidden]``; returns ``[T, hidden]``: the output,
        or ``into``, to which ``scale`` times the output was added."""
        return _last(self.o, self.attend(self.qkv(x), rotation), into, scale)

    def attend(
        self,
        qkv: Tensor,
        rotation: Rotation | None,
        shard_heads: Sequence[int] | None = None,
        blocked: bool = False,
    ) -> Tensor:
        """Between the linears: ``qkv [T, (H + 2 Hkv) * D]`` to ``[T, H * D]``.

        ``shard_heads`` and ``blocked`` tell how qkv is ordered: see `ops.rope_write_kv`.
        """
        batch, pool = self.running.current()
        pages = batch.groups[self.group]
        cache = pool.layer(self.layer)
        q = qkv.new_empty(qkv.shape[0], self.num_heads, self.head_dim)
        cos, sin, q_factor = rotation if rotation is not None else (None, None, None)
        q_norm, k_norm = self.q_norm, self.k_norm
        ops.rope_write_kv(
            qkv,
            q,
            cache.k,
            cache.v,
            pages.slots,
            cos=cos,
            sin=sin,
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            eps=0.0 if q_norm is None else q_norm.eps,
            norm_offset=0.0 if q_norm is None else q_norm.offset,
            shard_heads=shard_heads,
            blocked=blocked,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )
        if q_factor is not None:
            q.mul_(q_factor[:, None, None])
        out = torch.empty_like(q)
        attend(
            q,
            pool,
            self.layer,
            self.group,
            batch,
            out,
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
        )
        return out.flatten(1)


_CPU_ROWS = 512
"""Tokens that an MLP takes at a time on CPU: its wide intermediate values stay in cache, and in
memory that the allocator keeps (one large block would be fresh, zeroed pages at every call)."""


@dataclass
class FusedMLP:
    """Gated MLP with one matrix for gate and up."""

    gate_up: MergedLinear
    down: nn.Linear
    activation: str

    def __call__(self, x: Tensor, into: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """``x [T, hidden]``; returns ``[T, hidden]``: the output, or ``into``, to which ``scale``
        times the output was added."""
        if x.is_cpu and x.shape[0] > _CPU_ROWS and into is None:
            return torch.cat([self(rows) for rows in x.split(_CPU_ROWS)])
        gate_up = self.gate_up(x)
        hidden = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        ops.gated_act(gate_up, hidden, self.activation)
        return _last(self.down, hidden, into, scale)


def _last(module: nn.Linear, x: Tensor, into: Tensor | None, scale: float) -> Tensor:
    """The last linear of a branch."""
    if into is None:
        return linear(x, module.weight, module.bias)
    return into.addmm_(x, module.weight.t(), alpha=scale)


@dataclass
class ForeignMLP:
    """Hugging Face's own MLP or experts, called in place."""

    module: nn.Module
    reason: str
    """Why it is not a FusedMLP."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, hidden]``; returns ``[T, hidden]``."""
        out = self.module(x.unsqueeze(0))
        # Some expert layers return their router's logits as well.
        return (out[0] if isinstance(out, tuple) else out).flatten(0, 1)


@dataclass
class FusedBlock:
    """One decoder layer: norms before and/or after attention and MLP, added to the residual."""

    attention: "FusedAttention | PooledAttention"
    mlp: "FusedMLP | ForeignMLP | PooledMLP"
    pre_attention: Norm | None
    post_attention: Norm | None
    pre_mlp: Norm | None
    post_mlp: Norm | None
    multiplier: float
    """Of both branches before they are added (Granite)."""
    growth: Growth | None = None

    flow: Flow = field(default_factory=Flow)
    hands_on: bool = False
    """Whoever gets the output asks ``flow`` what it lacks."""
    adds_on: ClassVar[tuple[str, ...]] = ("cuda", "meta")
    """Devices whose GEMMs add to what is there at little cost; meta stands for a GPU."""

    def __call__(self, hidden: Tensor, rotation: Rotation | None) -> Tensor:
        """``hidden [T, C]`` is left as it is, unless it was handed on: others may hold it. Returns
        another ``[T, C]`` or, in a pass of the engine, what was handed on; complete or (`hands_on`,
        in a pass of the engine) without a branch."""
        given = self.flow.gave(hidden)
        x, lacking = self.enter(hidden, self.flow)
        if given and self._adds(self.attention, self.post_attention, hidden):
            assert isinstance(self.attention, FusedAttention)
            residual = self.attention(x, rotation, hidden, self.multiplier)
            x = residual
            if self.pre_mlp is not None:
                x = self.pre_mlp(residual, torch.empty_like(residual))
        else:
            branch = self.attention(x, rotation)
            residual, x = self.between(hidden, branch, lacking)
        if self._adds(self.mlp, self.post_mlp, residual):
            assert isinstance(self.mlp, FusedMLP)
            self.mlp(x, residual, self.multiplier)
            return self.flow.give(residual) if self.hands_on and self.flow.on else residual
        return self.leave(residual, self.mlp(x), self.flow)

    def enter(self, hidden: Tensor, flow: Flow) -> tuple[Tensor, bool]:
        """What attention gets, and whether ``hidden`` lacked a branch, which it has now."""
        branch = flow.take(hidden)
        if branch is None:
            if self.pre_attention is None:
                return hidden, False
            return self.pre_attention(hidden, torch.empty_like(hidden)), False
        if self.pre_attention is None:
            return hidden.add_(branch, alpha=flow.scale), True
        out = torch.empty_like(hidden)
        return self.pre_attention(branch, out, residual=hidden, scale=flow.scale), True

    def between(self, hidden: Tensor, branch: Tensor, lacking: bool) -> tuple[Tensor, Tensor]:
        """After attention, whose result is ``branch``: the residual, and what the MLP gets."""
        if self.post_attention is not None:
            self.post_attention(branch, branch)
        # A fresh branch plays the residual, and hidden is added to it in place.
        update, residual, scale = branch, hidden, self.multiplier
        if not lacking:
            if scale != 1.0:
                branch.mul_(scale)
            update, residual, scale = hidden, branch, 1.0
        if self.pre_mlp is None:
            return residual, residual.add_(update, alpha=scale)
        out = torch.empty_like(update)
        return residual, self.pre_mlp(update, out, residual=residual, scale=scale)

    def leave(self, residual: Tensor, branch: Tensor, flow: Flow) -> Tensor:
        """After the MLP, whose result is ``branch``: the block's output."""
        if self.post_mlp is not None:
            branch = self.post_mlp(branch, torch.empty_like(branch))
        if self.hands_on and flow.on:
            return flow.give(residual, branch, self.multiplier)
        return torch.add(residual, branch, alpha=self.multiplier)

    def _adds(self, part: object, post: Norm | None, residual: Tensor) -> bool:
        """Whether the last GEMM of a branch adds it to the residual, which saves a pass over
        memory. On CPU a norm does that."""
        if post is not None or residual.device.type not in self.adds_on:
            return False
        if isinstance(part, FusedAttention):
            return part.o.bias is None
        return isinstance(part, FusedMLP) and part.down.bias is None

    def q_factor(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """``[T]``, what queries grow by at ``positions [1, T]``; made once in a pass."""
        if self.growth is None:
            return None
        made = self.flow.q_factor
        if made is None or made[0] is not positions:
            self.flow.q_factor = made = positions, self.growth.factor(positions[0], dtype)
        return made[1]

    def merged(self) -> list[MergedLinear]:
        """The merged matrices of the block."""
        attention = [self.attention.qkv] if isinstance(self.attention, FusedAttention) else []
        mlp = [self.mlp.gate_up] if isinstance(self.mlp, FusedMLP) else []
        return attention + mlp


def forward(
    layer: nn.Module,
    hidden_states: Tensor,
    *args,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    position_ids: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """Stands in for a decoder layer's forward. ``hidden_states [1, T, C]``, cos, sin ``[1, T, R]``,
    positions ``[1, T]``.

    The other arguments (mask, cache) say what the batch of the running pass says.
    """
    block: FusedBlock = layer.__dict__["_torch_pd"]
    rotation = None
    if block.attention.rotary:
        assert position_embeddings is not None
        cos, sin = position_embeddings
        factor = None
        if position_ids is not None:
            factor = block.q_factor(position_ids, hidden_states.dtype)
        rotation = Rotation(cos[0], sin[0], factor)
    return block(hidden_states[0], rotation).unsqueeze(0)


@dataclass
class LastNorm:
    """The norm behind the last fused block."""

    norm: Norm
    flow: Flow
    forward: Callable[..., Tensor]
    """The module's own, bound."""


def norm_forward(module: nn.Module, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """Stands in for the forward of the last norm. ``hidden_states [1, T, C]``."""
    last: LastNorm = module.__dict__["_torch_pd"]
    if not last.flow.on:
        return last.forward(hidden_states, *args, **kwargs)
    hidden = hidden_states[0]
    branch = last.flow.take(hidden)
    out = torch.empty_like(hidden)
    if branch is None:
        return last.norm(hidden, out).unsqueeze(0)
    return last.norm(branch, out, residual=hidden, scale=last.flow.scale).unsqueeze(0)


def apply(layer: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
    """Stands in for ``nn.Module._apply`` (to, half, ...), which tears merged storage apart."""
    type(layer)._apply(layer, fn, recurse)
    merge_again(layer)
    return layer


def merge_again(layer: nn.Module, *args) -> None:
    """After the storage of parameters may have been replaced; also a load_state_dict hook."""
    block: FusedBlock = layer.__dict__["_torch_pd"]
    for merged in block.merged():
        merged.merge()
