"""Processes of a group: started together, ended together, and blamed rightly."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from torch_pd import launch
from torch_pd.board import GroupError
from torch_pd.launch import Ranks

START_S = 120
"""A limit for hangs alone: a process may take long to start on a busy machine."""


def gone(pids, within=5.0):
    """True once none of the processes is there (zombies are not)."""
    end = time.monotonic() + within
    while any(launch._state(pid)[0] not in "XZ" for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def start(target, *args, size=2):
    return Ranks(f"launch_targets:{target}", [(rank, *args) for rank in range(size)])


def outcome(ranks):
    with pytest.raises(Exception, match="rank") as info:
        ranks.receive(START_S)
    assert gone(ranks.pids, within=0)
    for again in (lambda: ranks.receive(1), ranks.check):
        with pytest.raises(type(info.value), match=re.escape(str(info.value))):
            again()
    ranks.kill()
    return info.value


def test_messages_and_an_end_in_peace():
    ranks = start("echo", size=3)
    try:
        hello = dict(ranks.receive(START_S) for _ in range(3))
        assert [hello[rank] for rank in range(3)] == ranks.pids
        for rank in range(3):
            ranks.send("x" * 3_000_000, rank)
        assert sorted(ranks.receive(START_S)[1][0] for _ in range(3)) == [0, 1, 2]
        with pytest.raises(TimeoutError, match="no message"):
            ranks.receive(0.01)
    finally:
        ranks.close("stop")
    assert gone(ranks.pids, within=0)
    assert ranks.failure is None
    with pytest.raises(GroupError, match="shut down"):
        ranks.receive(1)
    ranks.close("stop")


@pytest.mark.parametrize(
    ("deeds", "first", "kind", "message"),
    [
        # The first cause is named, not those that fall over it.
        ({0: "notice", 1: "kill"}, 1, GroupError, r"rank 1 \(process \d+\) was killed by SIGKILL"),
        ({0: "abort", 1: "raise"}, 1, ValueError, "^rank 1: no such flavour$"),
        (
            {0: "exit", 1: "break"},
            0,
            GroupError,
            r"rank 0 \(process \d+\) exited with code 3 while starting",
        ),
        (
            {1: "break"},
            1,
            GroupError,
            r"rank 1 failed while starting: RuntimeError: out of order\n",
        ),
        (
            {1: "stop"},
            1,
            GroupError,
            r"rank 1 \(process \d+\) hung on start, while waiting: it has",
        ),
    ],
)
def test_a_start_that_fails(deeds, first, kind, message, monkeypatch, tmp_path):
    ranks = start("act", deeds, first, str(tmp_path / "mark"))
    for _ in range(2):
        ranks.receive(START_S)
    monkeypatch.setattr(launch, "HANG_S", 0.5)
    ranks.send("go")
    error = outcome(ranks)
    assert type(error) is kind
    assert re.search(message, str(error)), error


def test_death_of_an_idle_rank_ends_the_others():
    ranks = start("echo")
    pids = ranks.pids
    for _ in range(2):
        ranks.receive(START_S)
    os.kill(pids[1], signal.SIGKILL)
    assert gone(pids)
    with pytest.raises(GroupError, match=r"rank 1 .* was killed by SIGKILL while it ran"):
        ranks.send("hello")
    ranks.kill()


def test_a_rank_that_does_not_stop_is_killed(monkeypatch):
    monkeypatch.setattr(launch, "_STOP_S", 0.2)
    ranks = start("deaf")
    for _ in range(2):
        ranks.receive(START_S)
    ranks.close("stop")
    assert gone(ranks.pids, within=0)


PARENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from torch_pd.launch import Ranks
ranks = Ranks("launch_targets:echo", [(0,), (1,)])
if sys.argv[2] == "ready":
    ranks.receive(120), ranks.receive(120)
print(*ranks.pids, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("when", ["ready", "starting"])
def test_ranks_die_with_their_parent(when):
    command = [sys.executable, "-c", PARENT, os.path.dirname(__file__), when]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.communicate()
    assert gone(pids, within=30)  # once they have got as far as to ask for it
