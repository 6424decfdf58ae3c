"""World: the ranks of one host that run together, joined under torchrun or spawned by us.

Our code takes no setting from the environment: under torchrun, torch's own ``env://`` does.
"""

import atexit
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from torch_pd.board import Board
from torch_pd.roll import START_TIMEOUT_S, Roll, host_name

_TIMEOUT = timedelta(seconds=START_TIMEOUT_S)


@dataclass(frozen=True)
class World:
    """One rank's view of its group.

    ``group`` carries the tensors of a step (NCCL on GPUs, gloo on the CPU) and ``cpu_group`` what
    is said beside it (gloo), so neither can come between the other's messages.
    """

    rank: int
    size: int
    device: torch.device
    board: Board
    group: dist.ProcessGroup
    cpu_group: dist.ProcessGroup
    unlinked: tuple[int, ...] = ()
    """Ranks whose GPU memory this rank's GPU cannot read directly."""
    roll: Roll | None = None
    """What the others do, under torchrun; where a parent starts the ranks, it watches them."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's (picklable) value, by rank. Collective."""
        self.meet()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def meet(self) -> None:
        """Under torchrun, waits for all ranks, with words if it takes long. Collective.

        Raises:
            GroupError: a rank died or failed, or will not come.
        """
        if self.roll is not None:
            self.roll.meet()

    def leave(self) -> None:
        """Says goodbye on the board. The default process group stays: torchrun's store would not
        bear a second one, and the next world finds it again.
        """
        self.board.leave()
        dist.destroy_process_group(self.cpu_group)


def launched_by_torchrun() -> bool:
    """True in a rank of torchrun, or where the caller has made a process group."""
    return dist.is_available() and (dist.is_initialized() or dist.is_torchelastic_launched())


def free_port_store() -> dist.TCPStore:
    """A store on this host, listening on a port that was free."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def connect(rank: int, size: int, device: str, store: dist.Store) -> World:
    """Joins the group of a store that all ranks share. Collective.

    Args:
        device: "cuda" (GPU number ``rank``) or "cpu".
    """
    here = _take_device(device, rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
        device_id=here if device == "cuda" else None,
    )
    return _world(here)


def join_torchrun(device: str, roll: Roll | None = None) -> World:
    """Joins torchrun's group, or the process group that the caller has made. Collective.

    Args:
        roll: of the ranks, in an act of this one.

    Raises:
        GroupError: a rank does not come.
        ValueError: the ranks are not on one host, two share a GPU, or the port is taken.
    """
    ours = not dist.is_initialized()
    if ours:
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        except dist.DistNetworkError as error:
            raise ValueError(
                f"the ranks cannot meet: {error}. If the port is taken, give torchrun another "
                "--master-port (or --standalone, which picks a free one)"
            ) from error
    else:
        store = dist.distributed_c10d._get_default_store()
        rank, size = dist.get_rank(), dist.get_world_size()
    here = _take_device(device, dist.get_node_local_rank(rank))
    if roll is not None:
        roll.call(store, rank, size)
    if ours:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            # (Keys of a group that the caller has destroyed are still there.)
            store=dist.PrefixStore(f"default_pg/{0 if roll is None else roll.llm}", store),
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
            device_id=here if device == "cuda" else None,
        )
        atexit.register(_end_group)
    elif device == "cuda" and "nccl" not in dist.get_backend():
        raise ValueError(
            f"device='cuda' needs a process group with NCCL, the present one has "
            f"{dist.get_backend()}"
        )
    return _world(here, roll)


def _end_group() -> None:
    """Without this, NCCL warns at exit of what it was left with."""
    if dist.is_initialized():  # (the caller may have ended it)
        dist.destroy_process_group()


def _take_device(device: str, index: int) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    check_gpus(index + 1)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_gpus(ranks: int) -> None:
    """Raises ValueError if there are fewer GPUs than ranks."""
    have = torch.cuda.device_count()
    if ranks > have:
        raise ValueError(
            f"{ranks} ranks need {ranks} GPUs, but {have} {'is' if have == 1 else 'are'} visible; "
            "start fewer ranks"
        )


def _world(device: torch.device, roll: Roll | None = None) -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    cpu_group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    about: list[Any] = [None] * size
    dist.all_gather_object(about, (socket.gethostname(), host_name(), device.type, gpu), cpu_group)
    for other, (name, host, kind, other_gpu) in enumerate(about):
        if host != about[0][1]:
            raise ValueError(
                f"rank {other} runs on {name} and rank 0 on {about[0][0]}: in this version all "
                "ranks run on one host (and in one container)"
            )
        if kind != about[0][2]:
            raise ValueError(
                f"rank {other} runs on {kind} and rank 0 on {about[0][2]}: give all the same device"
            )
        first = next(r for r in range(size) if about[r][3] == other_gpu)
        if gpu is not None and first != other:
            raise ValueError(f"ranks {first} and {other} have the same GPU; give each its own")
    board = Board("", 0, size) if rank == 0 else None
    name = [board.name if board is not None else ""]
    dist.broadcast_object_list(name, src=0, group=cpu_group)
    if board is None:
        board = Board(name[0], rank, size)
    # The creator must live until all have attached, and drops the board's name then.
    board.wait_for_all(START_TIMEOUT_S)
    unlinked = _unlinked([entry[3] for entry in about], rank) if gpu is not None else ()
    return World(rank, size, device, board, group, cpu_group, unlinked, roll)


_P2P_READ = 0
"""NVML's capability index of reads; pynvml's own constant is a tuple in some versions."""


def _unlinked(uuids: list[str], rank: int) -> tuple[int, ...]:
    """Ranks whose GPU (by uuid) the GPU of ``rank`` cannot read directly, by NVML."""
    import pynvml

    pynvml.nvmlInit()
    try:
        gpus = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        return tuple(
            other
            for other, gpu in enumerate(gpus)
            if other != rank
            and pynvml.nvmlDeviceGetP2PStatus(gpus[rank], gpu, _P2P_READ)
            != pynvml.NVML_P2P_STATUS_OK
        )
    finally:
        pynvml.nvmlShutdown()
