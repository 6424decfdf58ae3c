"""Votes for common steps, between threads."""

import random
import threading

import pytest

from torch_pd.board import Board
from torch_pd.engine.lockstep import CommonStep, Lockstep


def vote(ranks, votes):
    """What each rank's `agree` gives; ``votes`` holds (tokens, selected, decoding, busy)."""
    found = [None] * len(ranks)

    def run(rank):
        tokens, selected, decoding, busy = votes[rank]
        one = ranks[rank]
        lockstep = one if isinstance(one, Lockstep) else Lockstep(one, one)
        found[rank] = lockstep.agree(tokens, selected, decoding=decoding, busy=busy)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.fixture
def boards():
    first = Board("", 0, 3)
    return [first, *(Board(first.name, rank, 3) for rank in (1, 2))]


def test_a_step_is_what_the_ranks_bring(boards):
    decode, idle = (5, 5, True, True), (0, 0, True, False)
    prefill = (8192, 1, False, True)
    assert vote(boards, [decode, idle, decode]) == CommonStep((5, 0, 5), (5, 0, 5), True)
    assert vote(boards, [decode, prefill, idle]) == CommonStep((5, 8192, 0), (5, 1, 0), False)
    assert vote(boards, [idle] * 3) is None


def test_one_rank_that_asks_for_halves_gets_them_for_all(boards):
    def step(*votes):
        found = []
        threads = [
            threading.Thread(
                target=lambda board=board, halved=halved, decoding=decoding: found.append(
                    Lockstep(board, board).agree(2, 2, decoding=decoding, busy=True, halved=halved)
                )
            )
            for board, (halved, decoding) in zip(boards, votes, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0] == found[1] == found[2]
        return found[0].halved

    assert not step((False, True), (False, True), (False, True))
    assert step((False, True), (True, True), (False, True))
    assert not step((False, True), (True, True), (False, False))  # one reads a prompt


def test_requests_that_wait_keep_all_ranks_going(boards):
    idle = (0, 0, True, False)
    boards[1].open(1, 2, 0)
    assert vote(boards, [idle] * 3) == CommonStep((0,) * 3, (0,) * 3, True)
    assert boards[1].take(2) == range(1)
    boards[1].drain()
    assert vote(boards, [idle] * 3) is None


def test_a_rank_without_work_computes_padding():
    step = CommonStep((8, 0, 3), (1, 0, 3), False)
    assert step.padded(None) == ((8, 1, 3), (1, 1, 3))
    assert step.padded([4, 1, 4]) == ((4, 1, 4), (4, 1, 4))


def test_many_votes_in_a_row(boards):
    dice = random.Random(0)
    for _ in range(30):
        votes = [(dice.randrange(1 << 20), dice.randrange(9), True, True) for _ in boards]
        step = vote(boards, votes)
        assert step.tokens == tuple(each[0] for each in votes)
        assert step.selected == tuple(each[1] for each in votes)


def test_ranks_start_sequences_in_the_same_steps(boards):
    lockstep = [Lockstep(board, board) for board in boards]
    decode, prefill = (40, 40, True, True), (99, 1, False, True)

    def step(*votes):
        vote(lockstep, votes)

    def admit(running=40):
        return [one.admits(running) for one in lockstep]

    assert admit() == [True] * 3
    step(prefill, decode, decode)
    assert admit() == [True] * 3  # one reads a prompt: the others may as well
    step(decode, decode, decode)
    for _ in range(6):
        assert admit() == [False] * 3
        step(decode, decode, decode)
    assert admit() == [True] * 3  # the eighth
    step(decode, decode, decode)
    assert admit(37) == [False] * 3
    assert lockstep[1].admits(35)  # an eighth of its rows is free
    assert not lockstep[1].admits(35)
