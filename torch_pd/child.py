"""Child: what a process that `launch` starts does, and the messages that only `launch` reads."""

import ctypes
import importlib
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

from torch_pd.board import GroupError

_USUAL = (ValueError, TypeError, ImportError)
"""Errors that tell the user what to change; they keep their type on the way to the parent."""
BOOT = """
import os, sys
from multiprocessing.connection import Connection
link = Connection(int(sys.argv[1]))
sys.path[:] = link.recv()
from torch_pd.child import run_child
run_child(link, int(sys.argv[2]))
"""
"""What it runs: its arguments are the number of its end of the connection and the parent."""


def run_child(link: Connection, parent: int) -> None:
    """What a child does: calls the target that the parent names, reports an error if it raises."""
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_pdeathsig = 1
    if libc.prctl(pr_set_pdeathsig, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    target, args = link.recv()
    module, name = target.split(":")
    try:
        getattr(importlib.import_module(module), name)(link, *args)
    except BaseException as error:
        secondary = isinstance(error, GroupError)
        kind = next((usual for usual in _USUAL if isinstance(error, usual)), None)
        text = f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        fault = Fault(text, trace, kind, str(error), secondary, time.monotonic())
        try:
            link.send(fault)
        except OSError:  # the parent is gone; there is nobody to tell
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # No clean-up: it could wait for ranks that are stuck in a collective without this one.
        os._exit(1)


@dataclass(frozen=True)
class Fault:
    """A child's last message: the error that ended it."""

    text: str
    trace: str
    kind: type[Exception] | None
    message: str
    secondary: bool
    """It only reports that another rank is gone."""
    time: float


class Phase(str):
    """A child's message while it starts: what it does now. See `Ranks.WAITING`."""
