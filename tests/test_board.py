"""The board: votes as a state machine, with threads and with processes that come late or die."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import torch_pd
from torch_pd.board import Board, Commit, PeerFailed, PeerLost


def boards(world):
    first = Board("", 0, world)
    return [first] + [Board(first.name, rank, world) for rank in range(1, world)]


class Votes(RuleBasedStateMachine):
    """Ranks vote, withdraw and read in any order, against a plain model of the rule."""

    @initialize(world=st.integers(1, 5))
    def start(self, world):
        self.boards = boards(world)
        self.votes = {}  # rank -> (rows, flags) of the epoch being voted on
        self.unread = {}  # rank -> the commit it has not read yet
        self.epoch = 0
        self.late = set()

    def idle(self):
        return [b for b in self.boards if b.rank not in self.votes and b.rank not in self.unread]

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), rows=st.integers(0, 1 << 40), flags=st.integers(0, (1 << 64) - 1))
    def ready(self, data, rows, flags):
        board = data.draw(st.sampled_from(self.idle()))
        board.ready(rows, flags)
        self.votes[board.rank] = rows, flags
        if len(self.votes) == len(self.boards):
            self.epoch += 1
            combined = 0
            for _, given_flags in self.votes.values():
                combined |= given_flags
            rows = tuple(self.votes[r][0] for r in range(len(self.boards)))
            self.unread = dict.fromkeys(self.votes, Commit(self.epoch, rows, combined))
            self.votes = {}

    @precondition(lambda self: self.votes or self.unread)
    @rule(data=st.data())
    def withdraw(self, data):
        rank = data.draw(st.sampled_from(sorted({*self.votes, *self.unread})))
        assert self.boards[rank].withdraw() == (rank in self.votes)
        self.votes.pop(rank, None)

    @precondition(lambda self: self.votes or self.unread)
    @rule(data=st.data(), waits=st.booleans())
    def read(self, data, waits):
        rank = data.draw(st.sampled_from(sorted({*self.votes, *self.unread})))
        if rank in self.unread:
            commit = self.boards[rank].wait(1) if waits else self.boards[rank].poll()
            assert commit == self.unread.pop(rank)
            assert commit.bucket == max(commit.rows)
        else:
            assert self.boards[rank].poll() is None
            with pytest.raises(TimeoutError):
                self.boards[rank].wait(0)

    @invariant()
    def nobody_is_missed(self):
        for board in getattr(self, "boards", ()):
            board.check()


TestVotes = Votes.TestCase
TestVotes.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@settings(max_examples=15, deadline=None)
@given(world=st.integers(2, 4), steps=st.integers(1, 40), seed=st.integers(0, 1 << 32))
def test_threads_agree_under_random_delays_and_withdrawals(world, steps, seed):
    """Each thread is a rank: it votes, sometimes withdraws and votes with other rows."""
    group = boards(world)
    seen = [[] for _ in group]

    def rank(board):
        rng = random.Random(seed * 31 + board.rank)
        while len(seen[board.rank]) < steps:
            board.ready(rng.randrange(1000), 1 << board.rank)
            while rng.random() < 0.4 and board.withdraw():
                if rng.random() < 0.2:
                    time.sleep(rng.random() * 2e-3)
                board.ready(rng.randrange(1000), 1 << board.rank)
            seen[board.rank].append(board.wait(30))

    threads = [threading.Thread(target=rank, args=(board,)) for board in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(commits == seen[0] for commits in seen)
    assert [commit.epoch for commit in seen[0]] == list(range(1, steps + 1))
    assert all(commit.flags == (1 << world) - 1 for commit in seen[0])


# The queue.


@settings(max_examples=50, deadline=None)
@given(
    world=st.integers(1, 5),
    total=st.integers(0, 60),
    moves=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.booleans()), max_size=60),
)
def test_queue_gives_every_number_once_and_no_more_than_the_share(world, total, moves):
    group = boards(world)
    for board in group:
        assert board.open(1, total, 7) is None
    running = [0] * world
    given_out = []
    for rank, want, finishes in moves:
        rank %= world
        if finishes and running[rank]:
            running[rank] -= 1
            group[rank].set_running(running[rank])
        left = total - len(given_out)
        share = -(-(left + sum(running)) // world)
        taken = group[rank].take(want)
        assert len(taken) == max(0, min(want, left, share - running[rank]))
        given_out += taken
        running[rank] += len(taken)
        assert group[rank].running == sum(running)
        assert group[0].left == total - len(given_out)
    # Whoever is idle gets something while there is something: the queue always empties.
    while len(given_out) < total:
        for board in group:
            board.set_running(0)
        given_out += group[0].take(1)
    assert given_out == list(range(total))


def test_queue_between_threads():
    group = boards(4)
    taken = [[] for _ in group]

    def rank(board):
        board.open(1, 3000, 0)
        while board.left:
            board.set_running(0)
            taken[board.rank] += board.take(5)

    threads = [threading.Thread(target=rank, args=(board,)) for board in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for numbers in taken for number in numbers) == list(range(3000))


def test_a_late_rank_finds_the_call_over_and_joins_the_next():
    fast, late = boards(2)
    fast.open(1, 3, 5)
    while fast.left:
        fast.take(3)
        fast.set_running(0)
    fast.open(2, 4, 6)
    assert late.open(1, 3, 5) is None
    assert late.left == 0
    assert len(late.take(9)) == 0
    assert late.open(2, 4, 6) is None
    assert late.take(9) == range(2)
    fast.drain()
    assert late.left == 0
    for call in (0x700000, 0xE00000, 0xFFFFFF, 0x1000000, 0x1000001):  # numbers wrap
        fast.open(call, 2, 0)
        assert fast.left == 2
        assert fast.take(1) == range(1)


def test_a_different_call_is_seen():
    a, b = boards(2)
    assert a.open(1, 3, 5) is None
    assert b.open(1, 3, 6) == 0
    assert a.open(2, 3, 5) is None
    assert b.open(2, 4, 5) == 0


# Failures.


def test_wrong_use_is_refused():
    board = Board("", 0, 2)
    for name, rank, world, message in (
        (board.name, 0, 2, f"rank 0 of {board.name} is taken by process {os.getpid()}"),
        (board.name, 1, 3, "not a board of 3 ranks"),
        ("/dev/null", 1, 2, "/dev/null is not a board"),
        ("", 2, 2, r"rank must be in \[0, 2\), got 2"),
        ("", 0, 17, "1 to 16 ranks, got 17"),
        ("", 0, 0, "1 to 16 ranks, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Board(name, rank, world)
    with pytest.raises(OSError, match="board"):
        Board("/proc/self/fd/987654", 1, 2)
    with pytest.raises(TimeoutError, match="rank 1 "):
        board.wait_for_all(0.01)
    board.ready(1)
    for act in (lambda: board.ready(1), board._board.commit):
        with pytest.raises(RuntimeError):
            act()
    assert board.withdraw()
    for act in (board.withdraw, board.poll, lambda: board.wait(0)):
        with pytest.raises(RuntimeError):
            act()


def test_a_failure_ends_the_vote():
    a, b = boards(2)
    a.ready(1)
    b.fail("out of paper")
    with pytest.raises(PeerFailed, match="rank 1 failed: out of paper") as info:
        a.wait(10)
    assert info.value.rank == 1
    b.check()  # its own failure is no news
    b.ready(1)
    assert b.poll() is None
    with pytest.raises(PeerFailed):
        a.check()


# Without the package's own imports (torch): the processes start in a tenth of a second.
BARE = f"""
import sys, types
sys.modules["torch_pd"] = types.ModuleType("torch_pd")
sys.modules["torch_pd"].__path__ = {list(torch_pd.__path__)!r}
from torch_pd.board import Board, PeerLost
"""
RANK = (
    BARE
    + """
import random, time
name, rank, world, steps, seed, fate = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
rng = random.Random(seed)
time.sleep(rng.random() * 0.2)  # starts differ
board = Board(name, rank, world)
board.wait_for_all(30)
if fate == "guarded":
    board.guard(0.1)
    print("stands", flush=True)
    time.sleep(60)
try:
    for step in range(steps):
        board.ready(step + rank, 1)
        while rng.random() < 0.3 and board.withdraw():
            time.sleep(rng.random() * 1e-3)
            board.ready(step + rank, 1)
        commit = board.wait(30)
        assert commit.rows == tuple(step + r for r in range(world)), commit
        if fate == "dies" and step == steps // 2:
            print("half", flush=True)
            time.sleep(60)
    print("done", flush=True)
except PeerLost as error:
    print("lost", error.rank, flush=True)
"""
)


def start(board, rank, steps, fate="lives"):
    command = [sys.executable, "-c", RANK, board.name]
    command += [str(n) for n in (rank, board.world, steps, rank)] + [fate]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_late_starts_delays_and_a_death():
    board = Board("", 0, 3)
    others = [start(board, 1, 60), start(board, 2, 120, "dies")]
    board.wait_for_all(60)
    assert not os.path.exists(board.name)  # only the ranks' mappings hold it now
    for step in range(60):
        board.ready(step)
        assert board.wait(60).rows == (step, step + 1, step + 2)
    # Rank 1 has run dry, and said nothing: it is missed at the next vote.
    assert others[0].communicate(timeout=30)[0] == "done\n"
    board.ready(60)
    with pytest.raises(PeerLost) as info:
        board.wait(10)
    assert info.value.rank == 1
    with pytest.raises(PeerLost):
        board.check()
    others[1].kill()
    others[1].communicate(timeout=30)


def test_sigkill_between_votes_is_noticed_by_all():
    board = Board("", 0, 3)
    others = [start(board, 1, 40), start(board, 2, 20, "dies")]
    board.wait_for_all(60)
    lost = None
    for step in range(40):
        board.ready(step)
        if step == 11:
            assert others[1].stdout.readline() == "half\n"
            others[1].send_signal(signal.SIGKILL)  # a zombie from now on: nobody waits for it yet
        try:
            board.wait(60)
        except PeerLost as error:
            lost = error.rank
            break
    assert (lost, step) == (2, 11)
    assert others[0].communicate(timeout=30)[0] == "lost 2\n"
    others[1].communicate(timeout=30)


@pytest.mark.parametrize("leaves", [False, True])
def test_guard_ends_a_process_whose_peer_is_gone(leaves):
    source = BARE + "b = Board('', 0, 2); print(b.name, flush=True); b.wait_for_all(30); "
    source += "sys.stdin.readline(); b.leave() if sys.argv[1] == 'True' else None"
    command = [sys.executable, "-c", source, str(leaves)]
    pipe = subprocess.PIPE
    first = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    name = first.stdout.readline().strip()
    command = [sys.executable, "-c", RANK, name, "1", "2", "0", "0", "guarded"]
    second = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    assert second.stdout.readline() == "stands\n"
    first.communicate("\n", timeout=30)
    if leaves:
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.6)
        second.kill()
        second.communicate()
        return
    _, errors = second.communicate(timeout=30)
    assert second.returncode == 1
    assert "torch_pd: rank 0 (process" in errors
    assert "has died; rank 1 ends too" in errors
