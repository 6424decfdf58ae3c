"""torch_pd: offline-first LLM inference for PyTorch.

P = parameters (kept once per group of GPUs), D = data (the paged KV cache). Importing the package
touches neither CUDA, the network nor the environment.
"""

from torch_pd.config import EngineConfig
from torch_pd.llm import LLM
from torch_pd.nn.patch import patch_model, unpatch_model
from torch_pd.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "patch_model",
    "unpatch_model",
]
