"""torch_pd: offline-first LLM inference for PyTorch.

P = parameters (kept once per group of GPUs), D = data (the paged KV cache). Importing the package
registers the ops (``torch.ops.torch_pd``); it touches neither CUDA, network nor environment.
"""

import importlib
from typing import TYPE_CHECKING, Any

from torch_pd import ops
from torch_pd.config import EngineConfig
from torch_pd.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from torch_pd.engine.planner import plan
    from torch_pd.llm import LLM
    from torch_pd.nn.patch import patch_model, unpatch_model

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "ops",
    "patch_model",
    "plan",
    "unpatch_model",
]

# These import transformers, which takes seconds that `torch-pd --help` should not cost.
_LAZY = {
    "LLM": "torch_pd.llm",
    "patch_model": "torch_pd.nn.patch",
    "plan": "torch_pd.engine.planner",
    "unpatch_model": "torch_pd.nn.patch",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
