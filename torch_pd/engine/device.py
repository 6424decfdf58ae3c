"""Device: which one an engine runs on, how it starts early, and whether it still works."""

import contextlib
import ctypes
import gc
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from torch_pd import ops
from torch_pd.config import EngineConfig


class DeviceLost(RuntimeError):
    """The GPU stopped working; nothing more can run in this process."""


def resolve_device(config: EngineConfig) -> str:
    """ "cuda" or "cpu" for this config on this machine; see `EngineConfig.resolve_device`."""
    gpu = torch.cuda.is_available()
    if gpu and not ops.has_cuda_ops() and config.device == "auto":
        warnings.warn(
            f"a GPU is there, but the CUDA ops of torch_pd are {ops.cuda_status()}; running on "
            "the CPU",
            stacklevel=3,
        )
    return config.resolve_device(gpu and ops.has_cuda_ops())


@contextlib.contextmanager
def warming(device: str) -> Iterator[None]:
    """Meanwhile a thread has the driver make its context of the GPU and load the vendor's linears,
    which takes a second beside imports; waits for it at the end."""
    if device != "cuda":
        yield
        return
    # A new thread starts at device 0, whatever this one has set.
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    with ThreadPoolExecutor(1, "torch_pd-warming") as pool:
        warmed = pool.submit(_warm, torch.device("cuda", index))
        yield
        warmed.result()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's collector of cycles meanwhile: imports and models are a million objects that
    stay, and it would look at them again and again, a fifth of the time of the imports."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _warm(device: torch.device) -> None:
    x = torch.zeros((8, 8), dtype=torch.bfloat16, device=device)
    torch.mm(x, x)


def device_lost(device: torch.device, error: BaseException) -> DeviceLost | None:
    """The error to raise after ``error`` if the GPU failed; None if it works, or is a CPU.

    Waits for what was launched.
    """
    if isinstance(error, DeviceLost):
        return error
    if device.type != "cuda" or not isinstance(error, RuntimeError):
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as found:
        return lost(device, found)
    return None


def lost(device: torch.device, error: RuntimeError) -> DeviceLost:
    """What to say of a GPU of which CUDA says ``error``."""
    return DeviceLost(
        f"the GPU {device} failed during a step, so this process cannot use it any more; start a "
        f"new one (CUDA says: {str(error).splitlines()[0]})"
    )


def keep_forever(pinned: Iterable[Tensor]) -> None:
    """Lets nobody free the pinned memory of a lost GPU: torch's allocator would record an event
    then, which fails in a destructor and so ends the process, be it at its exit."""
    for tensor in pinned:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor))
