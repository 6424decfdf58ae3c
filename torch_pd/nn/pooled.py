"""Decoder blocks, embedding and head over weights that a group of ranks shares."""

import types
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from torch_pd import ops
from torch_pd.nn import patched
from torch_pd.nn.attention import Pass
from torch_pd.nn.block import FusedAttention, FusedBlock, FusedMLP, Rotation
from torch_pd.nn.halves import Halves, PooledBlock
from torch_pd.nn.linear import linear, linear_in_parts
from torch_pd.nn.patched import patch_state
from torch_pd.nn.probe import put
from torch_pd.weights.pool import LayerShard, WeightPool
from torch_pd.weights.ship import Exchange, unpack
from torch_pd.weights.source import Source


@dataclass
class Shared:
    """What the pooled parts of one model have in common; `Pass.mode` says which of the two a pass
    uses."""

    running: Pass
    weights: WeightPool
    exchange: Exchange | None
    """To run a pass together with the group (ship). None: this rank never does."""
    source: Source | None
    """To run a pass alone (resident, stream). None: this rank never does."""

    def shipping(self) -> Exchange | None:
        """The exchange if the running pass is shipped."""
        if self.running.mode != "ship":
            return None
        assert self.exchange is not None, "a shipped pass needs an exchange"
        return self.exchange

    def alone(self) -> Source:
        """The source of whole matrices of a pass that is not shipped."""
        assert self.source is not None, f"a pass in mode {self.running.mode!r} needs a source"
        return self.source

    def whole(self, layer: int, name: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """A linear of a layer by its whole matrix."""
        source = self.alone()
        y = linear_in_parts(x, source.acquire(layer, name), bias)
        source.release(layer, name)
        return y


Steps = Generator[None, None, Tensor]
"""A shipped part of a layer. It stops after each exchange and after what the weights' owners
compute, and returns its result; whoever runs several in turn does so in one order on all ranks."""


def finish(steps: Steps) -> Tensor:
    """Runs what is left of them."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@dataclass
class PooledAttention:
    """FusedAttention whose linears run on the shards' owners; keys and values stay here."""

    fused: FusedAttention
    shared: Shared
    shard: LayerShard
    kv_heads: Sequence[int]
    """Of each rank's shard."""

    def __post_init__(self) -> None:
        fused = self.fused
        groups = sum(self.kv_heads)
        query = fused.num_heads // groups * fused.head_dim
        self.out_widths = [heads * query for heads in self.kv_heads]
        self.qkv_widths = [heads * (query + 2 * fused.head_dim) for heads in self.kv_heads]

    @property
    def rotary(self) -> bool:
        """Whether it needs cos and sin."""
        return self.fused.rotary

    def __call__(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """``x [T, hidden]``; returns ``[T, hidden]``."""
        fused, shard, shared = self.fused, self.shard, self.shared
        exchange = shared.shipping()
        if exchange is None:
            qkv = shared.whole(fused.layer, "qkv", x, shard.full_qkv_bias)
            out = fused.attend(qkv, rotation, shard_heads=self.kv_heads)
            return shared.whole(fused.layer, "o", out, shard.o_bias)
        return finish(self.steps(exchange, x, rotation))

    def steps(self, exchange: Exchange, x: Tensor, rotation: Rotation | None) -> Steps:
        """The same with all ranks, in steps."""
        fused, shard, rows = self.fused, self.shard, self.shared.running.rows
        owner = self.kv_heads[exchange.rank] > 0
        gathered = exchange.gather(x, rows, self.qkv_widths)
        yield
        part = x.new_empty(sum(rows), 0)
        if owner:
            part = linear(gathered, shard.qkv, shard.qkv_bias)
        yield
        qkv = exchange.to_tokens(part, rows, self.qkv_widths)
        yield
        qkv = qkv.view(x.shape[0], sum(self.qkv_widths))
        out = fused.attend(qkv, rotation, shard_heads=self.kv_heads, blocked=True)
        part = exchange.to_owners(out, rows, self.out_widths)
        yield
        part = linear(part, shard.o) if owner else gathered
        yield
        y = exchange.scatter_sum(part, rows, self.out_widths)
        yield
        return y if shard.o_bias is None else y.add_(shard.o_bias)


@dataclass
class PooledMLP:
    """FusedMLP whose columns are split over the shards' owners."""

    shared: Shared
    layer: int
    shard: LayerShard
    widths: Sequence[int]
    """Columns of each rank's shard."""
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        """``x [T, hidden]``; returns ``[T, hidden]``."""
        shard, shared = self.shard, self.shared
        exchange = shared.shipping()
        if exchange is None:
            gate_up = shared.whole(self.layer, "gate_up", x, shard.full_gate_up_bias)
            hidden = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
            ops.gated_act(gate_up, hidden, self.activation, shard_widths=self.widths)
            return shared.whole(self.layer, "down", hidden, shard.down_bias)
        return finish(self.steps(exchange, x))

    def steps(self, exchange: Exchange, x: Tensor) -> Steps:
        """The same with all ranks, in steps."""
        shard, rows = self.shard, self.shared.running.rows
        part = exchange.gather(x, rows, self.widths)
        yield
        if self.widths[exchange.rank] > 0:
            gate_up = linear(part, shard.gate_up, shard.gate_up_bias)
            hidden = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
            ops.gated_act(gate_up, hidden, self.activation)
            part = linear(hidden, shard.down)
        yield
        y = exchange.scatter_sum(part, rows, self.widths)
        yield
        return y if shard.down_bias is None else y.add_(shard.down_bias)


@dataclass
class PooledEmbedding:
    """The embedding, each rank holding some rows of the vocabulary."""

    shared: Shared
    vocab: Sequence[int]
    """Rows of each rank."""
    factor: Tensor | None
    """Of all rows; None is 1."""

    def __call__(self, ids: Tensor) -> Tensor:
        """``ids [T]``; returns ``[T, hidden]``, exactly as the module would."""
        rows = self.look_up(ids)
        return rows if self.factor is None else rows * self.factor

    def look_up(self, ids: Tensor) -> Tensor:
        """The rows of the embedding."""
        exchange = self.shared.shipping()
        if exchange is None:
            return self.shared.alone().embed(ids)
        rows, weight = self.shared.running.rows, self.shared.weights.embedding
        every = exchange.gather(ids[:, None], rows, self.vocab)[:, 0]
        mine = self.vocab[exchange.rank]
        part = weight.new_empty(0, weight.shape[1])
        if mine:
            local = every - sum(self.vocab[: exchange.rank])
            part = nn.functional.embedding(local.clamp(0, mine - 1), weight)
            # One owner has the row, all others add zeros.
            part.masked_fill_(((local < 0) | (local >= mine))[:, None], 0)
        return exchange.scatter_sum(part, rows, self.vocab)


@dataclass
class PooledHead:
    """lm_head, each rank holding some rows of the vocabulary; logits come home whole."""

    shared: Shared
    vocab: Sequence[int]
    """Rows of each rank."""
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """``x [S, hidden]``; returns logits ``[S, vocabulary]``, in `Pass.logits` if that is given
        and they have to be put together."""
        exchange, out = self.shared.shipping(), self.shared.running.logits
        if out is not None:
            out = out[: x.shape[0]]
        if exchange is None:
            tiles = [linear(x, tile) for tile in self.shared.alone().head_tiles()]
            logits = tiles[0] if len(tiles) == 1 else torch.cat(tiles, 1, out=out)
        else:
            rows = self.shared.running.head_rows
            part = exchange.gather(x, rows, self.vocab)
            part = (
                linear(part, self.shared.weights.lm_head)
                if self.vocab[exchange.rank]
                else part.new_empty(sum(rows), 0)
            )
            packed = exchange.to_tokens(part, rows, self.vocab)
            logits = unpack(packed, x.shape[0], self.vocab, out)
            if out is not None and logits is not out:
                # One rank has the whole head. Every graph would keep a tensor of its own.
                logits = out.copy_(logits)
        return logits if self.bias is None else logits + self.bias


def new_logits(model: nn.Module, rows: int) -> Tensor | None:
    """Memory for the logits of passes that may share it, None if the model's head is not one that
    can write there."""
    shared = shared_of(model)
    if shared is None:
        return patched.new_logits(model, rows)
    head: Any = cast(PreTrainedModel, model).get_output_embeddings()
    if head.bias is not None:
        return None
    weights = shared.weights
    vocab = weights.layout.dims.vocab_size
    return torch.empty((rows, vocab), dtype=weights.dtype, device=weights.device)


def shared_of(model: nn.Module) -> Shared | None:
    """What the pooled parts of a model have in common, None if it holds its own weights."""
    find: Any = model.get_output_embeddings
    head = find()
    pooled = None if head is None else head.__dict__.get("_torch_pd")
    return pooled.shared if isinstance(pooled, PooledHead) else None


def pool_model(
    model: PreTrainedModel,
    weights: WeightPool,
    exchange: Exchange | None = None,
    source: Source | None = None,
) -> PreTrainedModel:
    """Lets a patched model compute with shared weights; its own linears are not used any more.

    ``unpatch_model`` takes this back too.

    Args:
        model: patched; what the pool does not hold (norms, biases) is on its device.
        weights: this rank's part.
        exchange: among the ranks of the weights' group, to run passes of mode "ship".
        source: whole matrices, to run passes of the other modes.

    Raises:
        ValueError: a layer is not fused, or a module is of an unknown kind; named, with the reason.
    """
    state = patch_state(model)
    shared = Shared(state.running, weights, exchange, source)
    halves = None
    if exchange is not None:
        halves = Halves(state.running, exchange, len(weights.layers) - 1)
    names = {id(module): name for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    changes: list[tuple[nn.Module, str, object]] = []
    for path in state.paths:
        fused = modules[path.name].__dict__.get("_torch_pd")
        if isinstance(fused, FusedBlock):
            block = _pooled_block(path.name, fused, shared, halves)
            changes.append((modules[path.name], "_torch_pd", block))
    if len(changes) != len(weights.layers):
        plain = next((path for path in state.paths if path.path == "attention"), None)
        what = f"{plain.name}: {plain.reason}" if plain else f"only {len(changes)} layers are fused"
        raise cannot_pool(model, what)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        name = names[id(embedding)]
        raise cannot_pool(model, f"{name} is a {type(embedding).__name__}, not an nn.Embedding")
    if type(head) is not nn.Linear:
        raise cannot_pool(model, f"{names[id(head)]} is a {type(head).__name__}, not an nn.Linear")
    vocab = weights.split[0].vocab
    factor = _factor(embedding, weights) if type(embedding) is not nn.Embedding else None
    bias = None if head.bias is None else head.bias.detach()
    changes += [
        (embedding, "_torch_pd", PooledEmbedding(shared, vocab, factor)),
        (embedding, "forward", types.MethodType(_embedding_forward, embedding)),
        (head, "_torch_pd", PooledHead(shared, vocab, bias)),
        (head, "forward", types.MethodType(_head_forward, head)),
    ]
    # The model's own list of undos ends with what was done first.
    for module, attribute, value in changes:
        put(state.undo, module, attribute, value)
    pooled = {names[id(module)] for module, _, _ in changes}
    state.paths[:] = [
        replace(path, path="pooled") if path.name in pooled else path for path in state.paths
    ]
    state.running.mode = "resident" if exchange is None else "ship"
    return model


def _pooled_block(
    name: str, fused: FusedBlock, shared: Shared, halves: Halves | None
) -> PooledBlock:
    attention, mlp = fused.attention, fused.mlp
    assert isinstance(attention, FusedAttention), f"{name} is pooled already"
    if not isinstance(mlp, FusedMLP):
        raise ValueError(
            f"{name}: its MLP cannot be shared between ranks "
            f"({getattr(mlp, 'reason', 'of another kind')}); use weights='resident'"
        )
    layer = attention.layer
    shard, split = shared.weights.layers[layer], shared.weights.split[layer]
    own = {
        "attention": PooledAttention(attention, shared, shard, split.kv_heads),
        "mlp": PooledMLP(shared, layer, shard, split.mlp, mlp.activation),
    }
    return PooledBlock(**{**vars(fused), **own}, halves=halves)


def cannot_pool(model: nn.Module, reason: str) -> ValueError:
    """The error for a model whose weights are not of the kinds that are shared."""
    return ValueError(
        f"the weights of {type(model).__name__} cannot be shared between ranks: {reason}; use "
        "weights='resident'"
    )


def _factor(embedding: nn.Embedding, weights: WeightPool) -> Tensor:
    """What an embedding of another class multiplies its rows with (Gemma 3), found by running it.

    Raises:
        ValueError: it does something else.
    """
    size = max(embedding.padding_idx or 0, 1) + 1
    like = weights.embedding
    ids = torch.arange(2, device=like.device)

    def run(value: float) -> Tensor:
        rows = like.new_full((size, 8), value)
        return functional_call(embedding, {"weight": rows}, ids)

    one = run(1.0)
    factor = one[0, 0].clone()
    if not (torch.equal(one, factor.expand_as(one)) and torch.equal(run(2.0), one * 2)):
        raise ValueError(
            f"{type(embedding).__name__} does more than scale the rows of an embedding: its "
            "weights cannot be shared between ranks; use weights='resident'"
        )
    return factor


def _embedding_forward(module: nn.Module, ids: Tensor) -> Tensor:
    """Stands in for an embedding's forward. ``ids [1, T]``; returns ``[1, T, hidden]``."""
    return module.__dict__["_torch_pd"](ids[0])[None]


def _head_forward(module: nn.Module, x: Tensor) -> Tensor:
    """Stands in for the output head's forward. ``x [1, S, hidden]``; returns ``[1, S, V]``."""
    return module.__dict__["_torch_pd"](x[0])[None]
