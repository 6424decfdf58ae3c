"""The twin of a model on meta: small, with numbers, to check what fused blocks compute."""

import copy
import gc

import torch
from transformers import PreTrainedModel

from torch_pd.nn.block import FusedAttention, FusedBlock, FusedMLP, Norm
from torch_pd.nn.patch import patch_model
from torch_pd.nn.patched import describe
from torch_pd.nn.pooled import cannot_pool
from torch_pd.weights.dummy import Dummy
from torch_pd.weights.skeleton import build_skeleton, materialise
from torch_pd.weights.slices import Slice

_VOCAB = 128
_INTERMEDIATE = 256


def fused_blocks(model: PreTrainedModel) -> list[FusedBlock]:
    """The block of every layer of a patched model, in order.

    Raises:
        ValueError: one is not fused throughout; named, with the reason.
    """
    found = []
    modules = dict(model.named_modules())
    for path in describe(model):
        block = modules[path.name].__dict__.get("_torch_pd")
        if isinstance(block, FusedBlock):
            found.append(block)
        elif path.path == "huggingface" and path.reason:  # a layer, or the MLP of one
            raise cannot_pool(model, f"{path.name} is not fused ({path.reason})")
    return sorted(found, key=lambda block: fused_parts(block)[0].layer)


def fused_parts(block: FusedBlock) -> tuple[FusedAttention, FusedMLP]:
    """Attention and MLP of a block of `fused_blocks`."""
    attention, mlp = block.attention, block.mlp
    assert isinstance(attention, FusedAttention)
    assert isinstance(mlp, FusedMLP)
    return attention, mlp


def _norm_kind(norm: Norm | None) -> tuple | None:
    return None if norm is None else (norm.eps, norm.offset)


def _kind(block: FusedBlock) -> tuple:
    """All that tells one layer's computation from another's, but for widths and weights."""
    attention, mlp = fused_parts(block)
    return (
        attention.scale,
        attention.soft_cap,
        attention.window,
        attention.rotary,
        _norm_kind(attention.q_norm),
        _norm_kind(attention.k_norm),
        mlp.activation,
        *(
            (len(merged.linears), merged.linears[0].bias is None)
            for merged in (attention.qkv, mlp.gate_up)
        ),
        *(linear.bias is None for linear in (attention.o, mlp.down)),
        *map(_norm_kind, (block.pre_attention, block.post_attention)),
        *map(_norm_kind, (block.pre_mlp, block.post_mlp)),
        block.multiplier,
        block.growth,
    )


def check_twin(
    model: PreTrainedModel, blocks: list[FusedBlock], device: torch.device | str
) -> None:
    """Runs `patch_model`'s checks, which need numbers, on a model of one layer of each kind.

    The twin has random float32 weights, a small vocabulary and narrow MLPs, all else is as in the
    model: it takes about the memory of its attention.

    Args:
        model: patched, on meta.
        blocks: its own.
        device: for the twin.

    Raises:
        ValueError: the twin's layers are not fused, or differ from the model's.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None) or [""] * len(blocks)
    kinds = list(zip(types, map(_kind, blocks), strict=True))
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == len(blocks):
            setattr(text, name, [value[layer] for layer in chosen])
    text.num_hidden_layers = len(chosen)
    text.vocab_size = min(text.vocab_size, _VOCAB)
    text.intermediate_size = min(text.intermediate_size, _INTERMEDIATE)
    if text.pad_token_id is not None:
        text.pad_token_id = 0
    twin = build_skeleton(config, torch.float32)
    dummy = Dummy(0)
    dummy.set_vectors(twin)
    materialise(twin, device)
    dummy.fill([Slice.whole(n, p) for n, p in twin.named_parameters() if p.dim() >= 2])
    found = [_kind(block) for block in fused_blocks(patch_model(twin))]
    if found != [kinds[layer][1] for layer in chosen]:
        raise cannot_pool(
            model, f"a model of its layers {chosen} alone computes something else than they do"
        )
    # A patched model refers to itself: without this it would stay until some later collection.
    del twin
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # the arena may need the memory
