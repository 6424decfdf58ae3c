"""Shapes of models by arithmetic, for tests of costs and plans."""

from torch_pd.costs import ModelShape


def dense(
    layers: int, hidden: int, wide: int, heads: int, kv_heads: int, vocab: int, *, head_dim=128
) -> ModelShape:
    """A decoder with a gated MLP, bfloat16."""
    attention = hidden * (2 * heads + 2 * kv_heads) * head_dim
    return ModelShape(
        num_layers=layers,
        hidden=hidden,
        intermediate=wide,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        itemsize=2,
        layer_params=layers * (attention + 3 * hidden * wide),
        max_position=40960,
    )


QWEN3_32B = dense(64, 5120, 25600, 64, 8, 151936)
QWEN3_8B = dense(36, 4096, 12288, 32, 8, 151936)
