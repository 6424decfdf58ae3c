"""Several ranks give what one engine gives, and end together: spawned, and under torchrun."""

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from models import tokens_of
from test_launch import gone

from torch_pd import LLM, SamplingParams, launch
from torch_pd.board import Board, GroupError
from torch_pd.config import EngineConfig
from torch_pd.engine import spawned
from torch_pd.engine.joined import Joined, _compare, _Inbox
from torch_pd.engine.work import LOOK_AHEAD
from torch_pd.launch import Ranks
from torch_pd.roll import Roll

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(n=2, temperature=1.0, max_tokens=9, ignore_eos=True)
PROMPTS = [[5 + i, 6, 7 + 3 * i] * (1 + i % 5) for i in range(23)]
SIZES = {"kv_cache_gib": 0.01, "max_model_len": 256, "max_num_batched_tokens": 64}

POOLED = {"weights": "pooled", "remote_mode": "ship"}


def calls(llm):
    """A few calls of all kinds; what came of them."""
    results = [tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False))]
    results.append(tokens_of(llm.generate(PROMPTS[:7], DRAWN, use_tqdm=False)))
    for _ in llm.stream(PROMPTS, GREEDY):
        break  # the rest of the call is dropped on all ranks
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=3 + i, logprobs=1, prompt_logprobs=0)
        for i in range(5)
    ]
    outputs = llm.generate(["One", "Two", "The sea", "A", "Why"], params, use_tqdm=False)
    results.append([(o.prompt, o.outputs[0].text, o.outputs[0].token_ids) for o in outputs])
    assert all(o.outputs[0].logprobs and o.prompt_logprobs for o in outputs)
    results.append([(o.request_id, o.prompt_token_ids) for o in outputs])
    return results


@pytest.fixture(scope="module")
def expected(tiny):
    with LLM(tiny, **SIZES) as llm:
        return calls(llm)


@pytest.fixture(scope="module", autouse=True)
def nothing_left():
    yield
    assert not [thread for thread in threading.enumerate() if "_watch" in thread.name]
    assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def pair(tiny):
    """Two ranks, until a test ends them. One sequence at a time, so that a call takes a while."""
    llm = LLM(tiny, data_parallel_size=2, **SIZES | {"max_num_seqs": 1})
    pids = llm.pids
    yield llm
    llm.shutdown()
    assert gone(pids, within=0)


def test_two_ranks_give_the_same(pair, expected):
    assert calls(pair) == expected
    assert pair.generate([], use_tqdm=False) == []
    grown = {}
    for output in pair.stream(PROMPTS[:3], GREEDY):
        grown.setdefault(output.request_id, []).append(output)
    for index, (_, outputs) in enumerate(sorted(grown.items())):
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        assert lengths == sorted(lengths)
        assert len(lengths) > 3
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert tokens_of(outputs[-1:])[0] == expected[0][index]
    outputs = pair.stream(PROMPTS, GREEDY)
    next(outputs)
    assert pair.stats()["finished_requests"] >= 0
    with pytest.raises(RuntimeError, match="a call is under way"):
        pair.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
    rest = {o.request_id: o for o in outputs if o.finished}
    assert len(rest) == len(PROMPTS)
    with pytest.raises(ValueError, match="prompt 1: the prompt has 300 tokens"):
        pair.generate([[5], [5] * 300], use_tqdm=False)
    with pytest.raises(RuntimeError, match="engines are in the ranks' processes"):
        _ = pair.engine
    stats = pair.stats()
    each = [one["finished_requests"] for one in stats["ranks"]]
    assert len(each) == 2
    assert min(each) > 0
    assert stats["finished_requests"] == sum(each)


def test_a_slow_rank_does_less(pair, expected):
    """No static split: while one rank stands still, the other does the work that is left."""
    before = [one["finished_requests"] for one in pair.stats()["ranks"]]
    os.kill(pair.pids[1], signal.SIGSTOP)
    finished = {}
    for output in pair.stream(PROMPTS, GREEDY):
        if output.finished:
            finished[int(output.request_id.split("-")[1])] = output
        if len(finished) == len(PROMPTS) - 2 * LOOK_AHEAD:
            os.kill(pair.pids[1], signal.SIGCONT)
    assert tokens_of([finished[i] for i in sorted(finished)]) == expected[0]
    after = [one["finished_requests"] for one in pair.stats()["ranks"]]
    assert after[0] - before[0] >= len(PROMPTS) - 2 * LOOK_AHEAD
    assert sum(after) - sum(before) == len(PROMPTS)


def test_ctrl_c_drops_the_call_only(pair, expected):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        pair.generate(PROMPTS * 40, long, use_tqdm=False)
    assert tokens_of(pair.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected[0]
    timer.join()


def kill_at_first_output(llm, killed):
    for output in llm.stream(PROMPTS * 20, GREEDY):
        if output.finished and not killed:
            killed.append(time.monotonic())
            os.kill(llm.pids[1], signal.SIGKILL)


def test_sigkill_while_generating(pair):
    pids, killed = pair.pids, []
    with pytest.raises(GroupError, match=r"rank 1 \(process \d+\) was killed by SIGKILL"):
        kill_at_first_output(pair, killed)
    assert time.monotonic() - killed[0] < 10
    assert gone(pids, within=0)
    for again in (lambda: pair.generate([5]), pair.stats, lambda: pair.pids):
        with pytest.raises(RuntimeError, match=r"has ended, make a new one: rank 1 .* SIGKILL"):
            again()


def test_four_ranks_with_shared_weights_and_a_death_while_shutting_down(tiny, expected):
    llm = LLM(tiny, data_parallel_size=4, **POOLED, **SIZES)
    pids = llm.pids
    assert calls(llm) == expected
    os.kill(pids[0], signal.SIGSTOP)  # so that the others wait for it
    timer = threading.Timer(0.5, os.kill, (pids[0], signal.SIGKILL))
    timer.start()
    llm.shutdown()
    timer.join()
    assert gone(pids, within=0)


def test_ctrl_c_while_a_rank_is_stopped(monkeypatch, caplog):
    monkeypatch.setattr(spawned, "_ABORT_S", 0.3)
    monkeypatch.setattr(launch, "STOPPED_S", 0.1)
    monkeypatch.setattr(
        spawned,
        "Ranks",
        lambda target, args: Ranks("launch_targets:absent_minded", [(rank,) for rank in range(2)]),
    )
    ranks = spawned.Spawned(Path("none"), None, EngineConfig(data_parallel_size=2), "cpu")
    pids = ranks.pids
    os.kill(pids[1], signal.SIGSTOP)

    def interrupt():
        while not caplog.records:  # the warning
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    stopped = rf"rank 1 \(process {pids[1]}\), stopped by a signal,"
    with pytest.raises(
        GroupError, match=f"{stopped} did not leave the call within 0 s of Keyboard"
    ):
        next(ranks.run([], False))
    thread.join()
    assert gone(pids, within=0)
    (record,) = caplog.records
    assert re.match(f"{stopped} does nothing; it goes on after kill -CONT", record.message)


@pytest.mark.parametrize(
    ("fault", "during"), [("graphs", "while loading"), ("step", "while it ran")]
)
def test_a_rank_that_fails_while_the_other_waits_for_it(tiny, monkeypatch, fault, during):
    started = []

    def ranks(target, args):
        started.append(Ranks("launch_targets:faulty", [(*each, fault) for each in args]))
        return started[0]

    monkeypatch.setattr(spawned, "Ranks", ranks)
    with pytest.raises(GroupError, match=f"rank 1 failed {during}: RuntimeError: out of") as info:
        LLM(tiny, data_parallel_size=2, **POOLED, **SIZES).generate(PROMPTS, use_tqdm=False)
    at = float(re.search(r"out of order at ([\d.]+)", str(info.value))[1])
    assert time.monotonic() - at < 10
    assert gone(started[0].pids, within=0)
    if fault == "graphs":
        assert "shipped steps are not captured with enforce_eager=True" in str(info.value)


def test_a_rank_never_waits_to_be_read():
    """In lockstep, rank 0 may wait for the one that sends."""
    here, there = multiprocessing.Pipe()
    inbox = _Inbox({1: here})
    for number in range(3):
        there.send(bytes(1_000_000) + bytes([number]))
    assert [(r, m[-1]) for _ in range(3) for r, m in itertools.islice(inbox.take(30), 1)] == [
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert list(inbox.take(None)) == []
    there.close()
    inbox.finish(Board("", 0, 1).check)
    here.close()


def test_unlike_calls_are_refused():
    first = Board("", 0, 2)
    boards = [first, Board(first.name, 1, 2)]
    ranks = [
        types.SimpleNamespace(_world=types.SimpleNamespace(board=board, rank=rank), _roll=Roll())
        for rank, board in enumerate(boards)
    ]
    for number, what in enumerate(("generate", "stats", "generate"), start=1):
        for rank in ranks:
            Joined._enter(rank, number, what, 3, 7)
    Joined._enter(ranks[1], 4, "shutdown")
    with pytest.raises(ValueError, match=r"ranks 0 and 1 .* not in the same call \(here: stats\)"):
        Joined._enter(ranks[0], 4, "stats")


def test_settings_that_cannot_work(tiny):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=r"rank \d: max_model_len=9999 is beyond the model's"):
        LLM(tiny, data_parallel_size=2, max_model_len=9999)
    with pytest.raises(ValueError, match=r"give a folder or a \.gguf file, not a Llama"):
        LLM(AutoModelForCausalLM.from_pretrained(tiny), data_parallel_size=2)
    with pytest.raises(ValueError, match="does not exist"):
        LLM("/no/such/model", data_parallel_size=2)
    with pytest.raises(
        ValueError, match="seed differs between the ranks: 0 on rank 0, 1 on rank 1"
    ):
        _compare([{"seed": 0}, {"seed": 1}])


# torchrun.

SCRIPT = """
import os, signal, sys, time
from torch import distributed
from torch_pd import LLM
from torch_pd.board import GroupError
from test_group import GREEDY, POOLED, PROMPTS, SIZES, calls, tokens_of

model, task = sys.argv[1:3]
if len(sys.argv) > 3:  # ranks without torchrun: a process group that the caller made
    rank = int(sys.argv[3])
    meet = f"file://{sys.argv[4]}"
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
else:
    rank = int(os.environ["RANK"])
"""
TASKS = {
    "same": """
try:
    LLM(model, data_parallel_size=3, **SIZES)
except ValueError as error:
    print(f"{rank}: {error}")
with LLM(model, **SIZES) as llm:
    print(f"{rank}: results {calls(llm)}")
with LLM(model, **POOLED, **SIZES) as llm:  # a second one finds the same group
    final = [o for o in llm.stream(PROMPTS, GREEDY) if o.finished]
    final.sort(key=lambda o: int(o.request_id.split("-")[1]))
    print(f"{rank}: streamed {tokens_of(final)}")
    print(f"{rank}: ranks {len(llm.stats()['ranks'])}")
from torch_pd import roll
roll.GRACE_S = 0.2
llm = LLM(model, **SIZES)  # without shutdown: a rank that ends harms no other until it is needed
llm.generate(PROMPTS, GREEDY, use_tqdm=False)
if rank == 0:
    time.sleep(2)
    try:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    except GroupError as error:
        print(f"0: {error}")
""",
    "alone": """
from torch_pd import roll
roll._ABSENT_S = 2.0
if rank == 0:
    LLM(model, **SIZES)
""",
    "sigkill": """
def die(*_):
    print("end", time.monotonic(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

with LLM(model, **POOLED, **SIZES) as llm:
    if rank == 1:
        engine, steps = llm.engine, []
        step = engine.step
        def dies():
            steps.append(1)
            if len(steps) == 5:
                if sys.argv[5] == "between":
                    die()
                # Rank 0 waits in a collective then.
                engine.model.model.layers[1].register_forward_pre_hook(die)
            return step()
        engine.step = dies
    try:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    finally:
        print("end", time.monotonic(), flush=True)
""",
}


def script(task, tmp_path):
    """The script of a task, and the environment to run it in."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + TASKS[task])
    here = Path(__file__).parent
    search = os.pathsep.join([str(here), str(here.parent)])
    return str(path), {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}


def torchrun(task, model, tmp_path):
    path, env = script(task, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", path, str(model), task]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def test_torchrun_gives_the_same(tiny, expected, tmp_path):
    result = torchrun("same", tiny, tmp_path)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert f"{rank}: data_parallel_size=3 given, but torchrun started 2 ranks" in result.stdout
        assert f"{rank}: results {expected}" in result.stdout
        assert f"{rank}: streamed {expected[0]}" in result.stdout
        assert f"{rank}: ranks 2" in result.stdout
    assert re.search(
        r"0: rank 1 \(process \d+\) has died or left the group\. rank 0 \(process \d+\) is in "
        r"generate of LLM 4 .*; rank 1 .* \(the last, generate of LLM 4 .* ago\) and has ended its "
        r"script\.",
        result.stdout,
    )


def test_torchrun_with_an_llm_on_one_rank(tiny, tmp_path):
    result = torchrun("alone", tiny, tmp_path)
    assert result.returncode != 0
    assert re.search(
        r"GroupError: making LLM 1, at script.py:\d+ cannot end: rank 1 has ended without making "
        r"it\. .*Under torchrun all ranks make the same LLMs",
        result.stderr,
    )


@pytest.mark.parametrize("when", ["between", "inside"])
def test_sigkill_without_torchrun(tiny, tmp_path, when):
    """No agent ends the other rank: it must notice by itself, between two steps or inside one."""
    path, env = script("sigkill", tmp_path)
    command = [sys.executable, path, str(tiny), "sigkill"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meet"), when],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        # Starting and exiting may take long on a busy machine; what counts lies between.
        said = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGKILL], said
    noticed, died = (float(out.split()[-1]) for out, _ in said)
    assert 0 <= noticed - died < 10
    assert re.search(rf"rank 1 \(process {ranks[1].pid}\) has died", said[0][1]), said
