"""The constants of `costs.Machine` as this machine shows them: measured once, then kept in a file.

The ranks of a group must choose alike, so all take the values of its first rank.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_pd.costs import Machine
from torch_pd.weights.layout import LINEARS
from torch_pd.weights.ring import Ring

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/torch_pd")
CPU = Machine(
    name="CPU",
    flops=1e11,
    attention_flops=5e10,
    weight_bandwidth=1e10,
    memory_bandwidth=1e10,
    kv_bandwidth=1e10,
    link_bandwidth=5e9,
    contention=1.0,
    pull_loss=0.0,
    mailbox_bytes=0,
    collective_bandwidth=1e9,
    collective_seconds=3e-4,
    collective_ramp=0.0,
    eager_collective_seconds=3e-4,
    layer_launch_seconds=1e-4,
)
"""Where nothing was measured; collectives are gloo's."""
_LOSSES = {"contention", "pull_loss"}
"""Constants of which the largest counts."""


def machine_of(
    ring: Ring | None,
    device: torch.device,
    all_gather: Callable[[Any], Sequence[Any]],
    folder: Path | None = None,
) -> Machine:
    """The constants of the GPUs (or the CPU) of a group. Collective.

    Args:
        ring: of this rank, unused so far; it is run through if nothing is known yet. None: this
            rank streams nothing.
        device: of this rank.
        all_gather: a value of each rank to every rank.
        folder: where what was measured is kept, a file for each kind of GPU, number of ranks and
            size of matrices. Default: `CACHE`; of the CPU nothing is kept.
    """
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else "CPU"
    base = Machine() if gpu else CPU
    rings = all_gather(
        None if ring is None else (ring.nbytes, ring.pulled_bytes, ring.layout.whole)
    )
    nbytes, pulled, whole = next(found for found in rings if found is not None)
    key = f"{name}-{len(rings)}-{nbytes}-{pulled}{'-layers' * whole}".replace(" ", "_")
    if folder is None and gpu:
        folder = CACHE.expanduser()
    path = None if folder is None else folder / f"{key}.json"
    values = all_gather(None if path is None else _read(path, _LOSSES if gpu else set()))[0]
    if values is None:
        mine = {"link_bandwidth": _link(ring, all_gather), **_gemms(device)}
        if gpu:
            mine |= _beside(ring, mine["link_bandwidth"], all_gather)
        every = all_gather(mine)
        # The slowest counts: a step ends with its last rank.
        values = {
            constant: (max if constant in _LOSSES else min)(found[constant] for found in every)
            for constant in mine
        }
        first = all_gather(os.getpid())[0] == os.getpid()
        if first and path is not None:
            _write(path, values)
    return Machine.from_dict({**vars(base), **values, "name": name})


def _link(ring: Ring | None, all_gather: Callable[[Any], Sequence[Any]]) -> float:
    """Bytes a second that this rank pulls while all do; without end if it pulls nothing."""
    seconds = []
    for _ in range(2):
        all_gather(None)  # a common start
        start = time.perf_counter()
        if ring is not None:
            ring.run_through()
        seconds.append(time.perf_counter() - start)
    if ring is None or ring.pulled_bytes == 0:
        return 1e15
    return ring.pulled_bytes / min(seconds)


def _gemms(device: torch.device) -> dict[str, float]:
    """Rates of matrix products of many rows and of few."""
    if device.type != "cuda":
        return {}
    weight = torch.randn(16384, 8192, device=device).bfloat16()
    found = {}
    # Of many rows for as long as a step takes: under load the clock falls, and with it the rate.
    for constant, rows, amount, repeats in (
        ("flops", 4096, 2 * 4096 * weight.numel(), 300),
        ("weight_bandwidth", 16, weight.nbytes, 30),
    ):
        x = torch.randn(rows, 8192, device=device).bfloat16()
        for _ in range(2):  # the first time to warm up
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                torch.nn.functional.linear(x, weight)
            torch.cuda.synchronize(device)
            found[constant] = repeats * amount / (time.perf_counter() - start)
    return found


def _beside(
    ring: Ring | None, link: float, all_gather: Callable[[Any], Sequence[Any]]
) -> dict[str, float]:
    """What pull and linears cost each other, by passes of all ranks through their rings."""
    found = dict.fromkeys(_LOSSES, 0.0)
    for constant, rows in (("contention", 4096), ("pull_loss", 16)):
        if ring is None or ring.pulled_bytes == 0:
            all_gather(None)
            continue
        device = ring.device
        inputs: dict[int, Tensor] = {}
        seconds = {}
        with torch.no_grad():
            for streamed in (False, True):
                _linears(ring, rows, inputs, streamed)  # the first time to warm up
                _settle(device)
                if streamed:
                    all_gather(None)
                start = time.perf_counter()
                _linears(ring, rows, inputs, streamed)
                _settle(device)
                seconds[streamed] = time.perf_counter() - start
        pull = ring.pulled_bytes / link
        if constant == "contention":
            found[constant] = max(0.0, seconds[True] - max(seconds[False], pull)) / pull
        else:
            found[constant] = max(0.0, seconds[True] - pull) / seconds[False]
    return found


def _linears(ring: Ring, rows: int, inputs: dict[int, Tensor], streamed: bool) -> None:
    """A pass's linears; not streamed: over what lies in the ring, without a pull."""
    for layer in range(ring.layout.dims.num_layers):
        for linear in LINEARS:
            width = ring.layout.dims.shape(linear)[1]
            if width not in inputs:
                shape = rows, width
                inputs[width] = torch.randn(shape, dtype=ring.dtype, device=ring.device)
            x, start = inputs[width], 0
            matrix = ring.acquire(layer, linear) if streamed else ring.peek(layer, linear)
            for part in matrix.parts:
                columns = part.shape[1]
                torch.mm(x[:, start : start + columns] if matrix.axis else x, part.t())
                start += columns
            if streamed:
                ring.release(layer, linear)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(path: Path, wanted: set[str]) -> dict[str, float] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        Machine.from_dict(values)
        if not values.keys() >= wanted:
            raise ValueError("some are missing")
    except (ValueError, TypeError) as error:
        logger.warning("%s is not what was measured once (%s); measuring again", path, error)
        return None
    return values


def _write(path: Path, values: dict[str, float]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(values))
        part.replace(path)
    except OSError as error:
        logger.warning("%s cannot be kept (%s): it is measured at every start", path, error)
