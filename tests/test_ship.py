"""Shards of several ranks: the exchanges, and models computed on them."""

import itertools
import random

import models
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from reference import relative_error

from torch_pd import patch_model
from torch_pd.nn.halves import halve
from torch_pd.nn.patch import unpatch_model
from torch_pd.nn.patched import describe, forward_packed, new_pool, patch_state
from torch_pd.nn.pooled import new_logits, pool_model
from torch_pd.nn.probe import batch_of
from torch_pd.weights.layout import ModelDims, make_layout
from torch_pd.weights.pool import WeightPool
from torch_pd.weights.ship import Exchange, pack, unpack
from torch_pd.weights.source import Resident

RANKS = 4


def fill(pool: WeightPool, model) -> None:
    """Copies this rank's pieces and all biases out of a whole model."""
    state = dict(model.named_parameters(remove_duplicate=False))
    index, layout = pool.index, pool.layout
    for layer, shard in enumerate(pool.layers):

        def part(*names: str, kind: str = "weight", layer: int = layer):
            found = [
                state.get(f"model.layers.{layer}.{block}.{name}.{kind}")
                for name in names
                for block in ("self_attn", "mlp")
            ]
            found = [tensor.detach() for tensor in found if tensor is not None]
            return torch.cat(found) if found else None

        whole = {
            "qkv": part("q_proj", "k_proj", "v_proj", "qkv_proj"),
            "gate_up": part("gate_proj", "up_proj", "gate_up_proj"),
        }
        dims = layout.dims
        q, kv = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
        starts = {"q": 0, "k": q, "v": q + kv, "gate": 0, "up": dims.intermediate_size}
        for linear, matrix in whole.items():
            for segment in layout.segments(linear, layer, index):
                start, stop = (starts[segment.part] + row for row in segment.rows)
                rows = matrix[start:stop]
                getattr(shard, linear)[segment.at : segment.at + len(rows)] = rows
        for linear, name in (("o", "o_proj"), ("down", "down_proj")):
            start, stop = layout.pieces(linear, layer)[index].cols
            getattr(shard, linear).copy_(part(name)[:, start:stop])
        pool.set_biases(
            layer,
            part("q_proj", "k_proj", "v_proj", "qkv_proj", kind="bias"),
            part("o_proj", kind="bias"),
            part("gate_proj", "up_proj", "gate_up_proj", kind="bias"),
            part("down_proj", kind="bias"),
        )
    start, stop = layout.pieces("lm_head")[index].rows
    pool.lm_head.copy_(model.get_output_embeddings().weight.detach()[start:stop])
    pool.embedding.copy_(model.get_input_embeddings().weight.detach()[start:stop])


def make_pools(model, size: int, device: str = "cpu", **kwargs) -> list[WeightPool]:
    """The pools of all ranks."""
    config = model.config
    call = patch_state(model).call
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    dims = ModelDims(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=call.num_heads,
        num_kv_heads=call.num_kv_heads,
        head_dim=call.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        itemsize=call.dtype.itemsize,
        tied=head.weight is embedding.weight,
    )
    pools = []
    for rank in range(size):
        pool = WeightPool(make_layout(dims, size, rank, **kwargs), rank, call.dtype, device)
        pool.arena.fill_(255)  # NaN
        fill(pool, model)
        pools.append(pool)
    return pools


class Sequences:
    """Random sequences of one rank: a prompt in one pass, then single tokens."""

    def __init__(self, model, lengths: list[int], seed: int) -> None:
        self.model = model
        self.lengths = lengths
        generator = torch.Generator().manual_seed(seed)
        self.ids = [torch.randint(0, models.VOCAB, (n,), generator=generator) for n in lengths]

    def logits(
        self, before=lambda tokens, selected: None, memory: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """All sequences: a pass over all tokens but two each, then two of one token each.

        ``memory`` is of `new_logits`, if any.
        """
        device = self.model.lm_head.weight.device
        pool = new_pool(self.model, 1 + len(self.lengths), 16)
        found = []
        starts = [0] * len(self.lengths)
        for left in (2, 1, 0):
            ends = [length - left for length in self.lengths]
            spans = list(zip(self.ids, starts, ends, strict=True))
            ids = torch.cat([ids[a:b] for ids, a, b in spans])
            positions = torch.cat([torch.arange(a, b) for _, a, b in spans])
            batch = batch_of(starts, ends, device)
            select = batch.query_start[1:].long() - 1
            before(len(ids), len(select))
            ids, positions = ids.to(device), positions.to(device)
            logits = forward_packed(self.model, pool, batch, ids, positions, select, memory)
            found.append(logits.cpu().clone())
            starts = ends
        return found


# --- exchanges ---


def check_exchange(
    exchange: Exchange, seed: int, exact: bool, device="cpu", scale: int = 1
) -> None:
    """All four with random rows and widths (times ``scale``); sums are bitwise if ``exact``."""
    size, rank, columns = exchange.size, exchange.rank, 5 * scale
    dice = random.Random(seed)
    if dice.random() < 0.4:
        rows, widths = [dice.choice((1, 3))] * size, [dice.choice((1, 4))] * size
    else:
        rows = [dice.choice((0, 1, 2, 7)) for _ in range(size)]
        widths = [dice.choice((0, 1, 3, 8)) for _ in range(size)]
        widths[dice.randrange(size)] = 2
    widths = [width * scale for width in widths]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(rows), columns, generator=generator)
    y = torch.randn(sum(rows), sum(widths), generator=generator)
    parts = torch.randn(size, sum(rows), columns, generator=generator)
    x, y, parts = x.to(device), y.to(device), parts.to(device)
    row, width = sum(rows[:rank]), sum(widths[:rank])
    mine, at = slice(row, row + rows[rank]), slice(width, width + widths[rank])

    gathered = exchange.gather(x[mine], rows, widths)
    assert torch.equal(gathered, x if widths[rank] else x[:0])

    packed = exchange.to_tokens(y[:, at], rows, widths)
    assert torch.equal(unpack(packed, rows[rank], widths), y[mine])
    assert torch.equal(pack(y[mine], widths), packed)
    assert torch.equal(exchange.to_owners(y[mine], rows, widths), y[:, at])

    total = exchange.scatter_sum(parts[rank] if widths[rank] else parts[rank, :0], rows, widths)
    owners = [owner for owner in range(size) if widths[owner]]
    want = parts[owners[0], mine].clone()
    for owner in owners[1:]:
        want += parts[owner, mine]
    if exact:
        assert torch.equal(total, want)
    else:
        torch.testing.assert_close(total, want)


# --- models ---


def pooled_model(name: str, pools: list[WeightPool], exchange: Exchange, rank: int, device: str):
    """The model over shards; its own linears hold NaN."""
    model = patch_model(models.build(name).to(device))
    with torch.no_grad():
        for module in model.modules():
            if type(module) is torch.nn.Linear or isinstance(module, torch.nn.Embedding):
                module.weight.fill_(float("nan"))
                if getattr(module, "bias", None) is not None:
                    module.bias.fill_(float("nan"))
    return pool_model(model, pools[rank], exchange, Resident(pools))


def check_model(
    name: str, group, rank: int, device="cpu", error=1e-5, exchange=None, serving=(), **layout
) -> None:
    """Logits of each rank's own sequences: shipped, in halves too if ``serving`` says which ranks'
    rows count, and by the whole matrices of the same split."""
    size = dist.get_world_size(group)
    whole = patch_model(models.build(name).to(device))
    pools = make_pools(whole, size, device, **layout)
    lengths = [[9, 5], [3], [4, 12, 7], [6]][rank]
    want = Sequences(whole, lengths, seed=rank).logits()
    model = pooled_model(name, pools, exchange or Exchange(group), rank, device)
    running = patch_state(model).running
    every = [[9, 5], [3], [4, 12, 7], [6]][:size]
    decoded = [len(each) for each in every]
    passes = itertools.cycle([[sum(x - 2 for x in each) for each in every], decoded, decoded])
    halves = None

    def before(tokens: int, selected: int) -> None:
        running.rows = next(passes)
        running.head_rows = decoded
        running.halves = halves if running.rows is decoded else None
        assert running.rows[rank] == tokens

    memory = new_logits(model, len(lengths))
    if memory is not None:
        memory.fill_(float("nan"))
    got = Sequences(model, lengths, seed=rank).logits(before, memory)
    if name == "llama" and size > 1 and len(lengths) > 1 and not layout:
        assert torch.equal(memory.cpu(), got[-1])
    if serving:
        halves = halve(decoded, serving)
        assert halves is not None
        again = Sequences(model, lengths, seed=rank).logits(before)
        for a, b in zip(got, again, strict=True):
            limit = 0 if device == "cpu" else error
            assert not serving[rank] or relative_error(b, a) <= limit, f"{name} in halves"
    running.mode = "resident"
    resident = Sequences(model, lengths, seed=rank).logits()
    for a, b, c in zip(want, got, resident, strict=True):
        assert relative_error(b, a) < error, f"{name} shipped"
        assert relative_error(c, a) < error, f"{name} resident"


def everything(rank: int) -> None:
    groups = {size: dist.new_group(list(range(size))) for size in range(1, RANKS + 1)}
    for size, group in groups.items():
        if rank < size:
            for seed in range(40):
                whole = seed % 2 == 0
                check_exchange(Exchange(group, whole=whole), seed, exact=not whole)
    for name in models.FUSED:
        # Biases and rotations, soft caps and norms behind branches, multipliers.
        serving = [True] * 4 if name in ("llama", "gemma2", "granite") else ()
        check_model(name, groups[4], rank, serving=serving)
    for size, group in groups.items():
        if size > 1 and rank < size:
            check_model("llama", group, rank)
            owners = [1, 3] if size == 4 else [1]
            apart = [other not in owners for other in range(size)]
            check_model("llama", group, rank, param_ranks=owners, serving=apart)
            if size < 4:
                check_model("olmo2", group, rank, weight_layout="layer")


def test_exchanges_and_models_in_four_processes():
    run_ranks(RANKS, everything)


def test_pooled_modules_are_named_and_taken_back():
    model = models.build("gemma3")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    pools = make_pools(patch_model(model), 2)
    pool_model(model, pools[0], source=Resident(pools))
    paths = {path.name: path.path for path in describe(model)}
    layers = {f"model.layers.{i}" for i in range(3)}
    assert {name for name, path in paths.items() if path == "pooled"} == {
        "model.embed_tokens",
        "lm_head",
        *layers,
    }
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, want)
        unpatch_model(model)
        assert torch.equal(model(ids, use_cache=False).logits, want)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_layers_of_other_kinds_are_refused(name):
    model = patch_model(models.build(name))
    pools = make_pools(patch_model(models.build("llama")), 1)
    with pytest.raises(ValueError, match=r"(h|layers)\.0.*weights='resident'"):
        pool_model(model, pools[0], source=Resident(pools))
