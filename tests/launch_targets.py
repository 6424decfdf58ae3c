"""What the processes of tests/test_launch.py do."""

import os
import signal
import time

from torch_pd.board import PeerLost
from torch_pd.launch import Phase, Ranks


def echo(link, rank):
    """Answers until told to stop."""
    link.send(Phase(Ranks.READY))
    link.send(os.getpid())
    while (message := link.recv()) != "stop":
        link.send((rank, message))


def act(link, rank, deeds):
    """One deed of each rank, on its way up, when all are told to."""
    link.send("here")
    while not link.poll():
        pass  # busy, so that it does not look as if it hung
    link.recv()
    deed = deeds.get(rank, "wait")
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
