"""PeerMemory: a block of memory on each rank that the other ranks of the host read in place.

On GPUs it is CUDA's virtual memory (csrc/runtime/peer_memory.cpp), on the CPU an anonymous file
(memfd); both are file descriptors, passed over a Unix socket without a name in the file system. So
nothing has to be removed afterwards, and every mapping keeps the memory alive: a rank that dies in
the middle of a copy leaves its peers with sound bytes, and the last one frees them.
"""

import json
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence

import torch
from torch import Tensor

import torch_pd._runtime as _runtime

TIMEOUT_S = 600.0
"""How long a rank waits for its peers; loading a large model may take long on one of them."""
_RETRY_S = 0.01
_HEADER_BYTES = 256


def check_links(unlinked: Sequence[int], ranks: Sequence[int], rank: int) -> None:
    """Raises ValueError if the GPU of ``rank`` cannot read one of ``ranks`` (`World.unlinked`)."""
    missing = [other for other in unlinked if other in ranks]
    if missing:
        raise ValueError(
            f"a missing peer link: the GPU of rank {rank} cannot read the GPU of rank "
            f"{', '.join(map(str, missing))} directly (NVML reports no peer access), so its "
            "weights cannot be streamed; use remote_mode='ship' or weights='resident', or choose "
            "GPUs that are linked"
        )


class PeerMemory:
    """One rank's block and, after `connect`, views of all ranks' blocks.

    Args:
        device: "cpu" or a GPU; where the block lies and from where the others are read.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.arena = torch.empty(0, dtype=torch.uint8, device=self.device)
        """uint8: this rank's block."""
        self.arenas: list[Tensor] = []
        """uint8 of every rank, in order; valid while this object or a tensor of it lives."""
        self._fd = -1

    def allocate(self, nbytes: int) -> Tensor:
        """The block, ``[nbytes]`` of uint8, to be made once. On the CPU it is zero at first.

        Raises:
            RuntimeError: the GPU has not so much memory left.
        """
        assert self.arena.numel() == 0, "the block was made already"
        if nbytes == 0:
            return self.arena
        if self.device.type == "cuda":
            block = _runtime.PeerBlock(_index(self.device), nbytes)
            self._fd = block.to_fd()
            self.arena = torch.from_dlpack(block.dlpack())
        else:
            self._fd = os.memfd_create("torch_pd")
            os.ftruncate(self._fd, nbytes)
            self.arena = _map_file(self._fd, nbytes)
        return self.arena

    def connect(self, key: str, rank: int, size: int, timeout_s: float = TIMEOUT_S) -> list[Tensor]:
        """Maps the other ranks' blocks; returns `arenas`. Collective.

        A rank calls this once its block holds what it should: whoever returns has the blocks of
        ranks that were ready.

        Args:
            key: the same on all ranks, and no other group's on this host.
            rank, size: of the group.

        Raises:
            TimeoutError: a rank did not come.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        deadline = time.monotonic() + timeout_s
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(_address(key, rank))
            listener.listen(size)
            server = threading.Thread(target=self._serve, args=(listener, size - 1, deadline))
            server.start()
            try:
                self.arenas = [
                    self.arena if other == rank else self._fetch(key, other, deadline)
                    for other in range(size)
                ]
            finally:
                server.join()
        self._close_fd()
        return self.arenas

    def close(self) -> None:
        """Drops the views; memory goes when the last tensor of it does. Twice is fine.

        Waits for the GPU: unmapping waits for nothing, and kernels may still read.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._close_fd()
        self.arenas = []
        self.arena = self.arena[:0].clone()

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _serve(self, listener: socket.socket, count: int, deadline: float) -> None:
        """Hands the descriptor to ``count`` peers."""
        header = json.dumps({"nbytes": self.arena.numel()}).encode().ljust(_HEADER_BYTES)
        while count and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                return  # whoever did not come is told so by its own deadline
            with connection:
                if not _same_user(connection):
                    continue
                fds = [self._fd] if self._fd >= 0 else []
                socket.send_fds(connection, [header], fds)
            count -= 1

    def _fetch(self, key: str, other: int, deadline: float) -> Tensor:
        while True:
            with socket.socket(socket.AF_UNIX) as connection:
                try:
                    connection.settimeout(max(_RETRY_S, deadline - time.monotonic()))
                    connection.connect(_address(key, other))
                    if not _same_user(connection):
                        raise ConnectionRefusedError("another user's process")
                    header, fds, _, _ = socket.recv_fds(connection, _HEADER_BYTES, 1)
                    if not header:
                        raise ConnectionResetError("closed")
                except (ConnectionError, TimeoutError) as error:
                    if time.monotonic() > deadline:
                        raise TimeoutError(
                            f"rank {other} did not offer its memory in time ({error})"
                        ) from error
                    time.sleep(_RETRY_S)
                    continue
            nbytes = json.loads(header)["nbytes"]
            if not fds:
                return torch.empty(0, dtype=torch.uint8, device=self.device)
            try:
                if self.device.type == "cuda":
                    block = _runtime.PeerBlock(_index(self.device), nbytes, fds[0])
                    return torch.from_dlpack(block.dlpack())
                return _map_file(fds[0], nbytes)
            finally:
                os.close(fds[0])


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _map_file(fd: int, nbytes: int) -> Tensor:
    # The tensor holds the mapping, which needs no descriptor.
    return torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)


def _address(key: str, rank: int) -> str:
    # The leading zero byte: Linux's abstract names, which go with the socket.
    return f"\0torch_pd-{key}-{rank}"


def _same_user(connection: socket.socket) -> bool:
    """Abstract names have no permissions, so the other end is asked for."""
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return struct.unpack("3i", credentials)[1] == os.getuid()
