"""Ranks of torchrun that do not do the same: certain ends are errors that name all ranks, waits are
told, and neither is a false alarm."""

import contextlib
import dataclasses
import functools
import gc
import logging
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from torch_pd import LLM, SamplingParams, record, roll
from torch_pd.board import GroupError
from torch_pd.record import Place, Record, State, process_state, stuck

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
PROMPTS = [[5 + i, 6, 7] for i in range(6)]
SIZES = {"kv_cache_gib": 0.002, "max_model_len": 64}


def state(acting=(), made=2, sole=True, **llms: Place) -> State:
    places = {int(name[1:]): place for name, place in llms.items()}
    return State(4711, 1, made, sole, places, list(acting))


CROSSED = (
    state([1], l1=Place(2, 1), l2=Place(0, 0)),
    state([2], l1=Place(1, 1), l2=Place(1, 0)),
)


def test_what_is_certain():
    mine, other = CROSSED
    assert stuck(mine, other, 1) == "is in another call"
    assert stuck(other, mine, 2) == "is in another call"
    # Another thread may come.
    assert stuck(mine, dataclasses.replace(other, sole=False), 1) is None
    assert stuck(dataclasses.replace(mine, sole=False), other, 1) is None
    # The other has only to leave a call that this rank has left: it will come.
    assert stuck(state([1], l1=Place(2, 1), l2=Place(1, 1)), other, 1) is None
    # It has left this one.
    assert stuck(mine, state([2], l1=Place(2, 2), l2=Place(1, 0)), 1) is None
    # It does something else, or is in the same call, or makes its second LLM while the first is
    # wanted.
    assert stuck(mine, state([], l1=Place(1, 1), l2=Place(0, 0)), 1) is None
    assert stuck(mine, state([1], l1=Place(2, 1), l2=Place(0, 0)), 1) is None
    first = state([1], made=1, l1=Place(1, 0))
    assert stuck(first, state([2], l1=Place(0, 0), l2=Place(0)), 1) == "is in another call"
    # In the loop over a stream of LLM 1 it calls LLM 2, and has not left the stream.
    looping = state([1, 2], l1=Place(2, 1), l2=Place(1, 0))
    assert stuck(mine, looping, 1) == "is in another call"
    assert stuck(looping, mine, 2) == "is in another call"
    assert stuck(mine, looping, 1, looping=1) == "is in another call"
    # It has not called it yet, and this rank is ahead.
    ahead = state([2], l1=Place(1, 1), l2=Place(1, 0))
    looping = state([1], l1=Place(2, 1), l2=Place(0, 0))
    assert stuck(ahead, looping, 2) == "is in another call"
    assert stuck(ahead, looping, 2, looping=1) is None
    # This rank has lost the LLM that the other is in a call of: it will learn of that.
    ahead.llms[1].end = "has failed"
    assert stuck(ahead, looping, 2) is None
    # The LLM is gone: now, or so long ago that it was forgotten.
    gone = state([], l1=Place(1, 1, end="has let go of it"), l2=Place(0, 0))
    assert stuck(mine, gone, 1) == "has let go of it"
    assert stuck(mine, state([], made=30), 1) is None


def test_what_is_said_of_a_rank():
    mine, other = CROSSED
    mine.llms[1].what, mine.llms[1].where = "generate", "script.py:7"
    said = mine.describe(3)
    assert re.fullmatch(
        r"rank 3 \(process 4711\) is in generate of LLM 1 \(its call 2, at script.py:7\) for \d+ s",
        said,
    )
    other.acting.clear()
    other.llms[2] = Place(0, 0, "making", since=time.monotonic() - 5, end="has failed")
    assert "is in no call (the last, making LLM 2, ended 5 s ago) and has failed" in other.describe(
        0
    )


def write_for_ever(link) -> None:
    own = record.ThisProcess()
    link.send((os.getpid(), own.fd))
    for made in range(1 << 40):
        own.record.write(State(os.getpid(), 0, made, llms={1: Place(what="x" * (made % 3000))}))


def test_a_record_is_whole_even_if_its_process_dies():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=write_for_ever, args=(theirs,), daemon=True)
    process.start()
    pid, fd = ours.recv()
    with open(f"/proc/{pid}/fd/{fd}", "rb") as file:
        other = Record(file.fileno())
    made = [other.read().made for _ in range(3000)]
    assert made == sorted(made)
    assert made[-1] > made[0]
    assert process_state(pid)[0] != "X"
    process.kill()
    process.join()
    assert process_state(pid)[0] == "X"
    assert other.read().made >= made[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=128,
        )
    ).save_pretrained(path)
    return path


def generate(llm, prompts=PROMPTS):
    return llm.generate(prompts, GREEDY, use_tqdm=False)


def refused(words: str, make, kind=GroupError) -> None:
    """Raises within seconds, and says what both ranks do."""
    start = time.monotonic()
    with pytest.raises(kind, match=words) as info:
        make()
    assert time.monotonic() - start < 10
    for rank in range(2):
        assert re.search(rf"rank {rank} \(process \d+\) (is|has) ", str(info.value)), info.value
    assert "Under torchrun all ranks make the same" in str(info.value)


def after(seconds: float, act) -> None:
    """Interrupts this thread with it."""
    signal.signal(signal.SIGALRM, act)
    signal.setitimer(signal.ITIMER_REAL, seconds)


class Ranks:
    """What two ranks do differently; after each of these they go on together."""

    def __init__(self, rank: int, folder: Path):
        self.rank, self.folder = rank, folder
        self.said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda entry: self.said.append(entry.getMessage())
        logging.getLogger("torch_pd.roll").addHandler(handler)
        self.pids = [None, None]
        dist.all_gather_object(self.pids, os.getpid())

    def make(self, **settings):
        return LLM(self.folder, **SIZES, **settings)

    def crossed(self, **settings):
        llms = [self.make(**settings) for _ in range(2)]
        generate(llms[0])
        refused("cannot end: rank . (is|was) in another call", lambda: generate(llms[self.rank]))

    def different_numbers_of_llms(self):
        one = self.make()
        refused("(is|was) in another call", self.make if self.rank else lambda: generate(one))

    def in_the_loop_over_a_stream(self):
        """Only rank 0 gets outputs while the stream lasts."""
        one, two = self.make(), self.make()
        with (
            contextlib.suppress(GroupError)
            if self.rank
            else pytest.raises(GroupError, match=r"rank 1 (is|was) in another call")
        ):
            [generate(two) for _ in one.stream(PROMPTS, GREEDY)]

    def let_go(self):
        llm = self.make()
        if self.rank:
            del llm
        else:
            refused("has let go of it without shutdown", lambda: generate(llm))

    def given_up(self):
        """Ctrl-C on the rank that was first to make it."""
        if self.rank:
            after(0.3, signal.default_int_handler)
            with pytest.raises(KeyboardInterrupt):
                self.make()
        dist.barrier()
        if not self.rank:
            refused("making LLM .* rank 1 has failed .KeyboardInterrupt", self.make)

    def different_prompts(self):
        llm = self.make()
        with pytest.raises((ValueError, GroupError), match="different prompts or parameters"):
            generate(llm, PROMPTS[self.rank :])

    def late_and_stopped(self):
        """Ranks that come late, are stopped, or take their time in a loop are waited for."""
        self.said.clear()
        if self.rank:
            time.sleep(1)
        llm = self.make()
        for late in range(2):
            if self.rank == late:
                time.sleep(0.7)
            generate(llm)
        if self.rank == 0:
            os.kill(self.pids[1], signal.SIGSTOP)
            after(1, lambda *_: os.kill(self.pids[1], signal.SIGCONT))
        else:
            time.sleep(0.2)
        generate(llm)
        for index, _ in enumerate(llm.stream(PROMPTS, GREEDY)):
            if index == 0 and self.rank == 0:
                time.sleep(0.7)
        if self.rank:
            time.sleep(1)
        llm.shutdown()
        said = "\n".join(self.said)
        if self.rank == 0:
            assert re.search(r"making LLM \d+, at test_roll.py:\d+: rank 1 is awaited", said)
            assert "it is waited for 600 s at most" in said
            assert f"it goes on after kill -CONT {self.pids[1]}" in said
            assert re.search("shutdown of LLM .*: rank 1 is awaited for 0 s now. rank 1", said)
            assert "while its process lives it is waited for" in said
        else:
            assert re.search(r"generate of LLM .*: rank 0 is awaited .* is in no call", said)
            assert "is in the loop over the outputs of a stream" in said


def two_ranks(rank: int, folder: Path) -> None:
    roll.LOOK_S, roll.WARN_S = 0.1, (0.2, 0.4)
    ranks = Ranks(rank, folder)
    ranks.late_and_stopped()
    assert len(ranks.said) < 40
    for unlike in (
        ranks.crossed,
        functools.partial(ranks.crossed, weights="pooled", remote_mode="ship"),
        ranks.different_numbers_of_llms,
        ranks.in_the_loop_over_a_stream,
        ranks.let_go,
        ranks.given_up,
        ranks.different_prompts,
    ):
        unlike()
        dist.barrier()
    with ranks.make() as llm:
        assert len(generate(llm)) == len(PROMPTS)
    del llm
    gc.collect()
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.islink(link)]
    assert sum("torch_pd_record" in name for name in names) == 2, names  # the own one and its map


def test_two_ranks_that_do_not_do_the_same(folder):
    run_ranks(2, two_ranks, folder)
