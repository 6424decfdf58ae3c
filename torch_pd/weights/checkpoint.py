"""Checkpoint: the tensors of a folder of safetensors, read slice by slice straight to their place.

Files are read with ``pread`` by several threads: into the target itself where it lies in host
memory as it does in the file, else through a small (on a GPU: pinned) buffer of each thread. So no
tensor is ever held twice, and what is read is counted nowhere but in the target.
"""

import json
import math
import os
import queue
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torch_pd.weights.slices import Slice

CHUNK_BYTES = 8 << 20
"""Of one read, and of a thread's buffers: at this size neither the calls nor the copies wait."""
MAX_THREADS = 8

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """A tensor in its file."""

    file: Path
    offset: int
    """Bytes from the start of the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for one that torch does not know."""


@dataclass(frozen=True)
class _Chunk:
    """Whole rows of a slice, at most CHUNK_BYTES of the file (or one row)."""

    entry: Entry
    row_values: int
    first: int
    """Row of the file's matrix."""
    cols: tuple[int, int]
    target: Tensor


def weight_files(path: Path) -> list[Path]:
    """The weight files of a model folder: those of the index, model.safetensors, or all there are.

    Raises:
        ValueError: none, or one that the index names is missing.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = _indexed_files(index)
    elif (path / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        raise ValueError(
            f"{str(path)!r} has no *.safetensors; convert the checkpoint with save_pretrained, or "
            "use load_format='dummy' for random weights"
        )
    for name in names:
        if not (path / name).is_file():
            why = f"is named in {index.name} but missing" if index.is_file() else "is no file"
            raise ValueError(f"{str(path / name)!r} {why}")
    return [path / name for name in names]


def _indexed_files(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} is no index of safetensors: {error!r}") from error
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"{str(index)!r} is no index of safetensors: {wrong[0]!r} is no file name")
    return sorted(names)


class Checkpoint:
    """The tensors of a model folder. Opening it reads the headers alone.

    Raises:
        ValueError: no weight file, a missing one, or one that is cut off or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        for file in weight_files(path):
            self.entries |= _read_header(file)

    def fill(self, slices: Sequence[Slice]) -> None:
        """Reads the slices into their targets, with dtype conversion where they differ.

        Raises:
            OSError: a file cannot be read.
        """
        chunks: queue.SimpleQueue[_Chunk] = queue.SimpleQueue()
        count = 0
        for item in slices:
            for chunk in self._chunks(item):
                chunks.put(chunk)
                count += 1
        devices = {item.target.device for item in slices if item.target.is_cuda}
        failures: list[BaseException] = []
        ready = [torch.cuda.current_stream(device).record_event() for device in devices]

        def work() -> None:
            try:
                with ExitStack() as stack:
                    reader = _Reader(stack, devices, ready)
                    while not failures:
                        try:
                            chunk = chunks.get_nowait()
                        except queue.Empty:
                            break
                        reader.read(chunk)
                    reader.finish()
            except BaseException as error:
                failures.append(error)

        number = max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)), count))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def equal(self, a: str, b: str) -> bool:
        """Whether two stored tensors are the same bit for bit."""
        one, two = self.entries[a], self.entries[b]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        assert one.dtype is not None
        left = math.prod(one.shape) * one.dtype.itemsize
        with open(one.file, "rb") as first, open(two.file, "rb") as second:
            first.seek(one.offset)
            second.seek(two.offset)
            while left:
                size = min(left, CHUNK_BYTES)
                if first.read(size) != second.read(size):
                    return False
                left -= size
        return True

    def _chunks(self, item: Slice) -> list[_Chunk]:
        entry = self.entries[item.name]
        assert entry.shape == item.shape, item.name
        assert entry.dtype is not None, item.name
        if not item.target.numel():
            return []
        width = entry.shape[-1] if entry.shape else 1
        step = max(1, CHUNK_BYTES // (width * entry.dtype.itemsize))
        return [
            _Chunk(entry, width, item.rows[0] + at, item.cols, item.target[at : at + step])
            for at in range(0, item.target.shape[0], step)
        ]


class _Reader:
    """What one thread holds: open files, two buffers, a stream for each device."""

    def __init__(
        self, stack: ExitStack, devices: set[torch.device], ready: list[torch.cuda.Event]
    ) -> None:
        self.stack = stack
        self.files: dict[Path, int] = {}
        self.buffers: list[Tensor | None] = [None, None]
        self.events: list[torch.cuda.Event | None] = [None, None]
        self.streams = {device: torch.cuda.Stream(device) for device in devices}
        self.turn = 0
        self.pinned = bool(devices)
        if devices:  # a new thread stands on GPU 0, and pinning would start a context there
            stack.enter_context(torch.cuda.device(min(devices, key=str)))
        for stream in self.streams.values():
            for event in ready:  # the targets' memory may still be in use there
                stream.wait_event(event)

    def read(self, chunk: _Chunk) -> None:
        """One chunk to its place; on a device it may still be on its way."""
        entry, target = chunk.entry, chunk.target
        assert entry.dtype is not None
        rows, row_bytes = target.shape[0], chunk.row_values * entry.dtype.itemsize
        offset = entry.offset + chunk.first * row_bytes
        whole = chunk.cols == (0, chunk.row_values)
        if whole and target.is_cpu and target.dtype == entry.dtype and target.is_contiguous():
            self._pread(entry.file, offset, target.view(-1).view(torch.uint8))
            return
        data = self._buffer(rows * row_bytes)
        self._pread(entry.file, offset, data)
        matrix = data.view(entry.dtype).view(rows, chunk.row_values)[:, slice(*chunk.cols)]
        if target.is_cpu:
            target.copy_(matrix)
            return
        if not whole:  # only these columns cross the bus, in one piece
            packed = self._buffer(matrix.numel() * entry.dtype.itemsize)
            matrix = packed.view(entry.dtype).view(matrix.shape).copy_(matrix)
        with torch.cuda.stream(self.streams[target.device]):
            if target.dtype == entry.dtype:
                target.copy_(matrix, non_blocking=True)
            else:
                target.copy_(matrix.to(target.device, non_blocking=True))
            self.events[self.turn] = torch.cuda.current_stream().record_event()

    def finish(self) -> None:
        """Waits for the copies."""
        for stream in self.streams.values():
            stream.synchronize()

    def _buffer(self, nbytes: int) -> Tensor:
        """Bytes that no copy reads any more; the other buffer stays as it is."""
        if self.pinned:  # else nothing is ever on its way, and one buffer does
            self.turn ^= 1
        event, buffer = self.events[self.turn], self.buffers[self.turn]
        if event is not None:
            event.synchronize()
            self.events[self.turn] = None
        if buffer is None or buffer.numel() < nbytes:
            size = max(nbytes, CHUNK_BYTES)
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
            self.buffers[self.turn] = buffer
        return buffer[:nbytes]

    def _pread(self, file: Path, offset: int, data: Tensor) -> None:
        if file not in self.files:
            descriptor = os.open(file, os.O_RDONLY)
            self.stack.callback(os.close, descriptor)
            self.files[file] = descriptor
        view = data.numpy().data
        while view:
            count = os.preadv(self.files[file], [view], offset)
            if not count:
                raise OSError(f"{str(file)!r} ends at byte {offset}, more was expected")
            view, offset = view[count:], offset + count


def _read_header(file: Path) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        safe_open(str(file), framework="pt")  # checks header and sizes, no overlap, no rest
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(file)!r} ({file.stat().st_size:,} bytes) is not a complete safetensors "
            f"file: {error}; fetch or convert it again"
        ) from error
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: Entry(
            file=file,
            offset=8 + length + tensor["data_offsets"][0],
            shape=tuple(tensor["shape"]),
            dtype=_DTYPES.get(tensor["dtype"]),
        )
        for name, tensor in header.items()
    }
