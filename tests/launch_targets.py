"""What the processes of tests/test_launch.py do."""

import os
import signal
import time
from dataclasses import dataclass

from torch_pd.board import PeerLost
from torch_pd.child import Phase
from torch_pd.launch import Ranks


def echo(link, rank):
    """Answers until told to stop."""
    link.send(Phase(Ranks.READY))
    link.send(os.getpid())
    while (message := link.recv()) != "stop":
        link.send((rank, message))


def act(link, rank, deeds, first, mark):
    """One deed of each rank, on its way up, when all are told to; the others follow the first,
    which makes the file ``mark``, at once."""
    link.send("here")
    while not link.poll():
        pass  # busy, so that it does not look as if it hung
    link.recv()
    if rank == first:
        open(mark, "x").close()
    deed = deeds.get(rank, "wait")
    while deed != "wait" and not os.path.exists(mark):
        pass
    if deed in ("wait", "stop"):
        link.send(Phase(Ranks.WAITING))
    if deed == "hang":
        link.send(Phase("loading"))
    if deed == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if deed == "raise":
        raise ValueError("no such flavour")
    if deed == "break":
        raise RuntimeError("out of order")
    if deed == "notice":
        time.sleep(0.02)
        raise PeerLost(1, 4711)
    if deed == "abort":
        time.sleep(0.02)
        os.abort()
    if deed == "exit":
        os._exit(3)
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(60)


def deaf(link, rank):
    """Does not stop when told to."""
    link.send(Phase(Ranks.READY))
    link.send(os.getpid())
    while True:
        time.sleep(60)


@dataclass(frozen=True)
class Few:
    """As `Limits`, without its imports."""

    kv_tokens: int = 1


def absent_minded(link, rank):
    """Stands in for a worker without a model; rank 1 never leaves a call."""
    if rank == 0:
        link.send(0)  # the port
    else:
        link.recv()
    link.send(Phase(Ranks.READY))
    link.send((Few(), "no memory"))
    while (message := link.recv()) != "stop":
        if message == "abort" and rank == 0:
            link.send("aborted")


def halved(link, setup):
    """A worker whose decoding steps run in halves where they can."""
    import torch
    from ranks import share_gpus

    from torch_pd.engine import worker
    from torch_pd.engine.halving import Halving

    Halving.pays = lambda self, rows, kv_tokens: rows >= 2
    if setup.device == "cuda" and setup.size > torch.cuda.device_count():
        share_gpus()
    worker.main(link, setup)


def faulty(link, setup, fault):
    """A worker of which rank 1 fails while the others wait for it in a collective."""
    from torch_pd.engine import engine, runner, worker

    def fail(*_):
        raise RuntimeError(f"out of order at {time.monotonic()}")

    class Graphs:
        """As if on GPUs: rank 1 cannot capture its graphs."""

        def __init__(self, sizes, prepare, halved):
            (fail if setup.rank == 1 else prepare(sizes[0], False))()

    class Captures(runner.Runner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.capture()

    class Breaks(runner.Runner):
        def __init__(self, model, *args, **kwargs):
            super().__init__(model, *args, **kwargs)
            if setup.rank == 1:
                model.model.layers[1].register_forward_pre_hook(fail)

    runner.DecodeGraphs = Graphs
    engine.Runner = {"graphs": Captures, "step": Breaks}[fault]
    worker.main(link, setup)
