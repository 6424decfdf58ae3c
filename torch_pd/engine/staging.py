"""Staging: the arrays of one step as views of one device buffer, filled by one copy."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGN = 16
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


class Staging:
    """One device buffer for what the host tells a step, and pinned memory to write it in.

    Offsets follow from the shapes alone, so equal shapes give views of equal addresses, which
    captured graphs may hold. Two pinned buffers take turns: the host writes one while the other is
    still being copied. On the CPU the host writes the buffer itself.

    Args:
        lead: bytes before the staged arrays that belong to the caller; a multiple of 16.
        capacity: bytes of the arrays of the largest step.
        device: where the views lie.
    """

    def __init__(self, lead: int, capacity: int, device: torch.device) -> None:
        assert lead % _ALIGN == 0
        self.lead = lead
        self.data = torch.zeros(lead + capacity, dtype=torch.uint8, device=device)
        self._cuda = device.type == "cuda"
        self._turn = 0
        if self._cuda:
            self._hosts = [
                torch.empty(capacity, dtype=torch.uint8, pin_memory=True) for _ in range(2)
            ]
            self._copied = [torch.cuda.Event() for _ in range(2)]
        else:
            self._hosts = [self.data[lead:]]

    @property
    def pinned(self) -> list[Tensor]:
        """Memory of the host that the device reads (on the CPU the buffer itself)."""
        return self._hosts

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.data.nbytes

    def put(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """Copies the arrays to the device, in stream order; views of them there, in their shapes.

        The views are those of the next call as well: their readers must be in the stream before it.
        """
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end += -(-array.nbytes // _ALIGN) * _ALIGN
        host = self._hosts[self._turn]
        assert end <= len(host), f"a step of {end} bytes, room for {len(host)}"
        if self._cuda:
            self._copied[self._turn].synchronize()  # of two steps ago: done long since
        memory = host.numpy()
        for array, offset in zip(arrays, offsets, strict=True):
            flat = memory[offset : offset + array.nbytes].view(array.dtype)
            np.copyto(flat.reshape(array.shape), array)
        if self._cuda:
            self.data[self.lead : self.lead + end].copy_(host[:end], non_blocking=True)
            self._copied[self._turn].record()
            self._turn ^= 1
        return [
            self.data[self.lead + offset : self.lead + offset + array.nbytes]
            .view(_DTYPES[array.dtype])
            .view(array.shape)
            for array, offset in zip(arrays, offsets, strict=True)
        ]
