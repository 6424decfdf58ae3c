"""Loading a model whose weights a group of ranks shares: this rank's slices, nothing else."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from torch_pd.config import EngineConfig
from torch_pd.nn.block import FusedBlock
from torch_pd.nn.patch import patch_model
from torch_pd.nn.pooled import cannot_pool
from torch_pd.nn.twin import check_twin, fused_blocks, fused_parts
from torch_pd.weights.checkpoint import Checkpoint
from torch_pd.weights.dummy import Dummy
from torch_pd.weights.layout import ModelDims, make_layout
from torch_pd.weights.loader import (
    check_tensors,
    read_config,
    read_generation_config,
    resolve_dtype,
    resolve_format,
    transformers_reason,
)
from torch_pd.weights.pool import Allocate, WeightPool
from torch_pd.weights.skeleton import build_skeleton, materialise, stored_tensors
from torch_pd.weights.slices import Filler, Slice

logger = logging.getLogger(__name__)


def load_pooled(
    model: str | Path | PretrainedConfig,
    config: EngineConfig,
    rank: int,
    size: int,
    device: torch.device | str,
    allocate: Allocate | None = None,
) -> tuple[PreTrainedModel, WeightPool]:
    """A patched model without its linears, and this rank's part of them.

    The model's structure is checked by numbers on a twin: a model of the same config with one layer
    of each kind, random weights and a small vocabulary. Then the rank reads (or, for
    load_format="dummy", makes) its own slices, straight to the arena. At no time does it hold more
    than its arena, the resident tensors (norms, biases), and the twin or a few buffers of 8 MiB.

    Args:
        model: a folder of safetensors; with load_format="dummy" one with a config.json, or a
            config of transformers.
        config: dtype, load_format, seed, weight_layout, weight_replicas, param_ranks, block_size.
        rank, size: in the world.
        allocate: gives the arena, see `WeightPool`.

    Returns:
        The model: norms and biases real on ``device``, linears, embedding and head on meta; it runs
        once `pool_model` has been applied. And the pool, filled.

    Raises:
        ValueError: the model cannot be pooled (a module that is not fused is named, with the
            reason) or not be split over these ranks; or see `load_model`.
    """
    started = time.perf_counter()
    if isinstance(model, PretrainedConfig):
        if config.load_format != "dummy":
            raise ValueError("a config without a checkpoint needs load_format='dummy'")
        path, hf_config, load_format = None, model, "dummy"
    else:
        path = Path(model).expanduser()
        load_format = resolve_format(path, config.load_format)
        if load_format == "gguf":
            raise ValueError(
                f"{str(path)!r} is a GGUF file, whose weights cannot be shared between ranks; "
                "convert it to a folder of safetensors, or use weights='resident'"
            )
        hf_config = read_config(path)
    filler: Filler
    checkpoint = None
    if load_format == "dummy":
        filler = Dummy(config.seed)
        loaded = build_skeleton(hf_config, resolve_dtype(None, config.dtype))
    else:
        assert path is not None
        filler = checkpoint = Checkpoint(path)
        loaded = build_skeleton(hf_config, resolve_dtype(hf_config, config.dtype))
        reason = transformers_reason(loaded, checkpoint)
        if reason is not None:
            raise cannot_pool(loaded, reason)
        check_tensors(loaded, checkpoint)

    # Probing on meta may replace buffers (the frequencies of a dynamic rotation) by ones on meta.
    buffers = [(module, dict(module._buffers)) for module in loaded.modules()]
    blocks = fused_blocks(patch_model(loaded, config))
    for module, kept in buffers:
        module._buffers.update(kept)
    check_twin(loaded, blocks, device)
    layout = make_layout(
        _dims(loaded, blocks),
        size,
        rank,
        weight_layout=config.weight_layout,
        replicas=config.weight_replicas,
        param_ranks=config.param_ranks,
    )
    names = _Names(loaded, checkpoint)
    pooled = _pooled_parameters(loaded, blocks)
    resident = [
        (name, parameter)
        for name, parameter in loaded.named_parameters()
        if id(parameter) not in pooled
    ]
    if isinstance(filler, Dummy):
        filler.set_vectors(loaded)
    materialise(loaded, device, [name for name, _ in resident])
    filler.fill(
        [
            Slice.whole(names.stored(name), loaded.get_parameter(name))
            for name, old in resident
            if checkpoint is not None or old.dim() >= 2
        ]
    )
    pool = WeightPool(layout, rank, loaded.dtype, device, allocate)
    filler.fill(_slices(loaded, blocks, pool, names))
    for layer, block in enumerate(blocks):
        for merged in block.merged():
            merged.merge()  # takes up the biases that are real now
        attention, mlp = fused_parts(block)
        biases = [attention.qkv.bias, attention.o.bias, mlp.gate_up.bias, mlp.down.bias]
        pool.set_biases(layer, *(None if bias is None else bias.detach() for bias in biases))
    if path is not None and checkpoint is not None:
        read_generation_config(loaded, path)
    logger.info(
        "rank %d of %d: %.2f GiB of weights in %.2f s",
        rank,
        size,
        pool.arena.numel() / 2**30,
        time.perf_counter() - started,
    )
    return loaded, pool


def _dims(model: PreTrainedModel, blocks: list[FusedBlock]) -> ModelDims:
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    for module, kind in ((head, nn.Linear), (embedding, nn.Embedding)):
        if not isinstance(module, kind):
            raise cannot_pool(model, f"it has a {type(module).__name__}, not a {kind.__name__}")
    sizes = []
    for block in blocks:
        attention, mlp = fused_parts(block)
        rows = sum(linear.out_features for linear in attention.qkv.linears)
        kv_heads = (rows // attention.head_dim - attention.num_heads) // 2
        sizes.append((attention.num_heads, kv_heads, attention.head_dim, mlp.down.in_features))
    if len(set(sizes)) > 1:
        odd = next(layer for layer, size in enumerate(sizes) if size != sizes[0])
        raise cannot_pool(
            model,
            f"layer {odd} has other sizes than layer 0 (heads, KV heads, head size, MLP columns: "
            f"{sizes[odd]} instead of {sizes[0]})",
        )
    num_heads, num_kv_heads, head_dim, intermediate = sizes[0]
    if embedding.weight.shape != head.weight.shape:
        raise cannot_pool(
            model,
            f"embedding {list(embedding.weight.shape)} and head {list(head.weight.shape)} differ",
        )
    return ModelDims(
        num_layers=len(blocks),
        hidden_size=head.in_features,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=head.out_features,
        itemsize=model.dtype.itemsize,
        tied=head.weight is embedding.weight,
    )


class _Names:
    """Of modules and parameters. Of several names of a parameter the one that it is stored by
    counts, or the first for dummy weights."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint | None) -> None:
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.aliases: dict[str, str] = {}
        for _, names in stored_tensors(model).values():
            held = names if checkpoint is None else [n for n in names if n in checkpoint.entries]
            self.aliases |= dict.fromkeys(names, held[0])

    def stored(self, name: str) -> str:
        """The name to read a parameter by."""
        return self.aliases.get(name, name)

    def weight(self, module: nn.Module) -> str:
        """The name to read a module's weight by."""
        return self.stored(f"{self.modules[id(module)]}.weight")


def _linears(block: FusedBlock) -> dict[str, list[nn.Linear]]:
    attention, mlp = fused_parts(block)
    return {
        "qkv": attention.qkv.linears,
        "o": [attention.o],
        "gate_up": mlp.gate_up.linears,
        "down": [mlp.down],
    }


def _pooled_parameters(model: PreTrainedModel, blocks: list[FusedBlock]) -> set[int]:
    """Ids of what goes to the pool."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for block in blocks:
        for linears in _linears(block).values():
            modules += linears
    return {id(module.weight) for module in modules}


def _slices(
    model: PreTrainedModel, blocks: list[FusedBlock], pool: WeightPool, names: _Names
) -> list[Slice]:
    """What this rank reads into its arena."""
    layout, me = pool.layout, pool.index
    slices = []

    def add(module: nn.Module, rows: tuple[int, int], cols: tuple[int, int], target: Any) -> None:
        if target.numel():
            shape = tuple(module.get_parameter("weight").shape)
            slices.append(Slice(names.weight(module), shape, rows, cols, target))

    for layer, block in enumerate(blocks):
        linears, shard = _linears(block), pool.layers[layer]
        for linear in ("qkv", "gate_up"):
            places = _parts(linear, linears[linear], layout.dims)
            for segment in layout.segments(linear, layer, me):
                module, first = places[segment.part]
                start, stop = segment.rows
                target = getattr(shard, linear)[segment.at : segment.at + stop - start]
                add(module, (first + start, first + stop), (0, target.shape[1]), target)
        for linear in ("o", "down"):
            piece = layout.pieces(linear, layer)[me]
            add(linears[linear][0], piece.rows, piece.cols, getattr(shard, linear))
    heads = [(model.get_output_embeddings(), "lm_head")]
    if not layout.dims.tied:
        heads.append((model.get_input_embeddings(), "embedding"))
    for module, linear in heads:
        piece = layout.pieces(linear)[me]
        add(module, piece.rows, piece.cols, getattr(pool, linear))
    return slices


def _parts(
    linear: str, linears: list[nn.Linear], dims: ModelDims
) -> dict[str, tuple[nn.Linear, int]]:
    """Where q, k, v or gate, up lie: the module, and the first row in it."""
    sizes = dims.part_rows(linear)
    if len(linears) > 1:
        return {part: (module, 0) for part, module in zip(sizes, linears, strict=True)}
    places, first = {}, 0
    for part, rows in sizes.items():
        places[part] = (linears[0], first)
        first += rows
    return places
