"""Dummy: random weights of which any part can be made by itself, the same on every device.

A value depends on the seed, the tensor's name and its place in the tensor alone, so ranks that make
their own slices hold together what one process alone would hold.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from torch_pd.weights.skeleton import left_alone, materialise
from torch_pd.weights.slices import Slice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Elements made at once: on a GPU enough to be worth a launch; on the CPU what a cache holds, and
# just too few for torch to wake its threads.
_GPU_CHUNK, _CPU_CHUNK = 1 << 22, (1 << 15) - 1
# Multipliers of a well-known 32-bit mixer ("lowbias32"), as signed numbers.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_NOISE = 0.1


class Dummy:
    """Uniform values with a standard deviation of ``1 / sqrt(columns)``: a linear keeps the size
    of its input, so nothing vanishes or explodes on the way through a model.

    Args:
        seed: equal seeds, equal weights.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fill(self, slices: Sequence[Slice]) -> None:
        """Writes the slices' targets."""
        for item in slices:
            width = item.shape[-1] if item.shape else 1
            self.values(item, 1 / math.sqrt(max(width, 1)))

    @torch.no_grad()
    def values(self, item: Slice, std: float) -> None:
        """Values around 0 with this standard deviation."""
        target = item.target
        if not target.numel():
            return
        key = hashlib.blake2b(f"{self.seed}/{item.name}".encode(), digest_size=16).digest()
        row_key, col_key = np.frombuffer(key, np.uint64)
        device = target.device
        rows = torch.from_numpy(_mixed(item.rows, row_key)).to(device)
        cols = torch.from_numpy(_mixed(item.cols, col_key)).to(device)
        scale = std * math.sqrt(3) / 2**31
        step = max(1, (_CPU_CHUNK if target.is_cpu else _GPU_CHUNK) // len(cols))
        for at in range(0, len(rows), step):
            x = rows[at : at + step, None] + cols
            x *= _FIRST
            x ^= (x >> 15) & 0x1FFFF
            x *= _SECOND
            target[at : at + step] = x.to(torch.float32).mul_(scale)

    def set_vectors(self, model: "PreTrainedModel") -> None:
        """Makes the parameters of one dimension or none of a skeleton real, on the CPU: as
        transformers starts them (norms at one or at their neutral value, biases at zero), and some
        noise."""
        names = [name for name, parameter in model.named_parameters() if parameter.dim() < 2]
        materialise(model, "cpu", names)
        vectors = {name: model.get_parameter(name) for name in names}
        others = [parameter for parameter in model.parameters() if parameter.is_meta]
        with left_alone(others), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            for vector in vectors.values():
                vector.zero_()  # the ones that transformers leaves alone
            for module in model.modules():
                module.__dict__.pop("_is_hf_initialized", None)
            model.initialize_weights()
        for name, vector in vectors.items():
            noise = torch.empty(vector.shape, dtype=torch.float32)
            self.values(Slice.whole(name, noise), _NOISE)
            vector.data.add_(noise)


def _mixed(span: tuple[int, int], key: np.uint64) -> np.ndarray:
    """A random int32 for each index of a span (splitmix64)."""
    with np.errstate(over="ignore"):
        x = np.arange(*span, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32).view(np.int32)
