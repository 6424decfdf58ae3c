"""Shape: what costs and memory depend on, read off a model or its config."""

from pathlib import Path
from typing import Any

from torch_pd.config import EngineConfig
from torch_pd.costs import ModelShape
from torch_pd.sizing import KVShape


def read_shape(path: Path, dtype: str = "auto") -> ModelShape:
    """The shape of the model that a folder's config.json describes; builds it without memory.

    Raises:
        ValueError: no model folder, or not a causal LM.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = path.expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(f"{str(path)!r} has no config.json, so it is not a model folder")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{str(path / 'config.json')!r} does not describe a causal LM: {error}"
        ) from error
    stored = config.get_text_config().dtype or config.dtype or torch.bfloat16
    kind = stored if dtype == "auto" else getattr(torch, dtype)
    return shape_of(model, torch.empty(0, dtype=kind).element_size())


def shape_of(model: Any, itemsize: int) -> ModelShape:
    """The shape of a Hugging Face causal LM, on any device ("meta" too)."""
    from torch import nn

    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = bool(head is None or config.tie_word_embeddings)
    linears = expert_params = total = 0
    for name, module in model.named_modules():
        if module in (embedding, head):
            continue
        expert = "expert" in name
        for parameter in module.parameters(recurse=False):
            total += parameter.numel()
            if expert:
                expert_params += parameter.numel()
            elif isinstance(module, nn.Linear) and parameter.dim() == 2:
                linears += parameter.numel()
    heads = config.num_attention_heads
    hidden = config.hidden_size
    experts = next(
        (n for key in ("num_local_experts", "num_experts", "n_routed_experts")
         if (n := getattr(config, key, None))), 0,
    )  # fmt: skip
    per_token = getattr(config, "num_experts_per_tok", None) or 0
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab=embedding.weight.shape[0],
        itemsize=itemsize,
        layer_params=linears,
        expert_params=expert_params,
        expert_share=per_token / experts if experts else 0.0,
        tied=tied,
        other_params=total - linears - expert_params,
        max_position=getattr(config, "max_position_embeddings", 0) or 0,
    )


def kv_shape_of(shape: ModelShape, settings: EngineConfig) -> KVShape:
    """The KV pages of a model; fp8 and int8 pages hold a float32 scale for each token and head."""
    scaled = settings.kv_cache_dtype != "auto"
    return KVShape(
        shape.num_layers,
        shape.num_kv_heads,
        shape.head_dim,
        1 if scaled else shape.itemsize,
        settings.block_size,
        scaled=scaled,
    )
