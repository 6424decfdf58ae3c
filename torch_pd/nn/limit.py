"""Limit: how long a sequence may be for transformers' own arithmetic to be that of each alone."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Limit:
    """The longest sequence that runs as transformers runs it, where that is not all of them."""

    length: int
    reason: str


def find_limit(model: nn.Module) -> Limit | None:
    """Where a rotation begins to depend on the longest sequence of a pass, and so on the others.

    "longrope" rotates all of a sequence by other frequencies once it is longer than its limit,
    "dynamic" by frequencies of its length.
    """
    limits = []
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            rope = module.config.rope_parameters
            rope = rope if layer_type is None else rope[layer_type]
            length = module.config.max_position_embeddings
            if kind == "longrope":
                length = rope["original_max_position_embeddings"]
            limits.append(
                Limit(
                    int(length),
                    f"{name} ({kind}) rotates whole sequences otherwise beyond {length} tokens",
                )
            )
    return min(limits, key=lambda limit: limit.length, default=None)
