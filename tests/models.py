"""Tiny random causal LMs of many architectures: odd sizes, grouped heads, nothing left at zero."""

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 97

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts_per_tok": 2, "num_hidden_layers": 2}


def _with(**changes) -> dict:
    return {**_SIZES, **changes}


def _without(*names: str, **changes) -> dict:
    return {name: value for name, value in _with(**changes).items() if name not in names}


_YARN = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
_YARN |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_PHI_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_PHI_LONG |= {"short_factor": [1.1, 1.3], "long_factor": [2.0, 4.0]}
_PHI_LONG |= {"original_max_position_embeddings": 256}

FUSED = {
    "llama": ("Llama", _with(attention_bias=True, mlp_bias=True, rope_parameters=_YARN)),
    "mistral": ("Mistral", _with(sliding_window=9, head_dim=16)),
    "qwen2": ("Qwen2", _with(tie_word_embeddings=True)),
    "qwen2_window": (
        "Qwen2",
        _with(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", _with(head_dim=16)),
    "smollm3": ("SmolLM3", _with(no_rope_layers=[1, 0, 1])),
    "phi3": ("Phi3", _with(sliding_window=11)),
    "phi3_partial": ("Phi3", _with(rope_parameters=_PHI_LONG)),
    "gemma": ("Gemma", _with(head_dim=16, num_key_value_heads=1)),
    "gemma2": (
        "Gemma2",
        _with(
            head_dim=16,
            sliding_window=6,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
        ),
    ),
    "gemma3": ("Gemma3", _with(head_dim=16, sliding_window=6, query_pre_attn_scalar=20)),
    "vaultgemma": ("VaultGemma", _with(head_dim=16, sliding_window=6, query_pre_attn_scalar=20)),
    "exaone4": (  # its full layers have no positions
        "Exaone4",
        _with(sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2)
        | {"num_hidden_layers": 4},
    ),
    "ministral3": (  # queries grow with the position
        "Ministral3",
        _with(
            head_dim=8,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.5,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    ),
    "olmo2": ("Olmo2", _with()),
    "granite": (
        "Granite",
        _with(
            residual_multiplier=0.3,
            attention_multiplier=0.2,
            embedding_multiplier=3.0,
            logits_scaling=2.0,
        ),
    ),
}
"""Name -> (class prefix, config) of models whose layers are all fused."""

MIXED = {
    "mixtral": ("Mixtral", _with(num_local_experts=4, sliding_window=8, **_MOE)),
    "qwen3_moe": (
        "Qwen3Moe",
        _with(num_experts=5, moe_intermediate_size=24, head_dim=16, norm_topk_prob=True, **_MOE),
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        _with(
            num_experts=4,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=16,
            **_MOE,
        ),
    ),
    "arcee": ("Arcee", _with()),
}
"""Fused attention, Hugging Face's experts or its MLP without a gate."""

GENERAL = {
    "gpt_neox": (
        "GPTNeoX",
        _without("num_key_value_heads", rotary_pct=0.5, use_parallel_residual=True),
    ),
    "opt": (
        "OPT",
        _without("num_key_value_heads", "intermediate_size", ffn_dim=72, word_embed_proj_dim=48),
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": 48,
            "n_layer": 3,
            "n_head": 6,
            "n_positions": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "stablelm": ("StableLm", _with(use_qkv_bias=True, qk_layernorm=True)),
    "cohere": ("Cohere", _with(logit_scale=0.3, use_qk_norm=True)),
    "glm": ("Glm", _with(head_dim=8, partial_rotary_factor=0.5, attention_bias=True)),
    "olmoe_clip": ("Olmoe", _with(num_experts=4, clip_qkv=2.0, **_MOE)),
    "deepseek_v3": (  # keys wider than values
        "DeepseekV3",
        _with(
            num_key_value_heads=6,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            **_MOE,
        ),
    ),
    "gpt_oss": (
        "GptOss",
        _with(num_local_experts=4, sliding_window=8, head_dim=16, **_MOE),
    ),
}
"""Paged attention inside Hugging Face's layers."""

ALL = {**FUSED, **MIXED, **GENERAL}

_CLASSES = {"GPT2": "GPT2LMHeadModel"}
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def make_config(name: str) -> PretrainedConfig:
    """A fresh config. Eager attention is the reference: others leave soft-caps out."""
    prefix, options = ALL[name]
    config = getattr(transformers, _CONFIGS.get(prefix, f"{prefix}Config"))(**options)
    config._attn_implementation = "eager"
    return config


def model_class(name: str) -> type[PreTrainedModel]:
    """The class of a model."""
    prefix, _ = ALL[name]
    return getattr(transformers, _CLASSES.get(prefix, f"{prefix}ForCausalLM"))


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode whose norms, biases and weights are all random."""
    prefix, _ = ALL[name]
    torch.manual_seed(seed)
    model = model_class(name)(make_config(name))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:
                # Norms near 1, biases near 0, both far enough that forgetting one shows.
                centre = 1.0 if "norm" in path or ".ln_" in path else 0.0
                if "bias" in path or "Gemma" in prefix:
                    centre = 0.0
                parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def tokens_of(outputs) -> list[list[list[int]]]:
    """Of every completion of every output."""
    return [[list(choice.token_ids) for choice in output.outputs] for output in outputs]
