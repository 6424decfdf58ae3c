"""LLM and engines whose ranks stream shared weights, alone or in turns with shipping."""

import types

import pytest
import torch
from ranks import run_ranks
from test_pooled_llm import SETTINGS, folder, want, work  # noqa: F401

from torch_pd import LLM, EngineConfig
from torch_pd.dist import join_torchrun
from torch_pd.engine.inflight import Request
from torch_pd.engine.streaming import _check_ring
from torch_pd.engine.work import Call, run
from torch_pd.engine.worker import make_engine

APART = {"param_ranks": [0, 2], "data_ranks": [1, 3]}


def check_apart(llm, work, want, mode) -> None:  # noqa: F811
    """The tokens wanted, of the data ranks alone."""
    for _ in range(2):
        outputs = llm.generate(*work, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == want
    ranks = llm.stats()["ranks"]
    made = [rank["output_tokens"] for rank in ranks]
    assert made[0] == made[2] == 0
    assert made[1] + made[3] == 2 * sum(map(len, want))
    assert [rank["kv_pages"] for rank in ranks][::2] == [1, 1]
    if mode == "stream":
        assert ranks[0]["steps"] == 0


def test_weights_on_some_ranks_and_pages_on_the_others(folder, work, want):  # noqa: F811
    shared = {"data_parallel_size": 4, "weights": "pooled", "remote_mode": "stream"}
    with LLM(folder, **shared, **APART, **SETTINGS) as llm:
        check_apart(llm, work, want, "stream")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"param_ranks": [0, 1], "data_ranks": [1, 2]}, r"share rank 1: keep them apart"),
        ({"param_ranks": [0], "data_ranks": [1]}, r"rank 2 would hold neither"),
        ({"param_ranks": [0], "data_ranks": [1, 2, 3]}, r"data_ranks=.* has 3, but the ranks are"),
        ({"data_ranks": [1, 2]}, r"data_ranks=\[1, 2\] needs param_ranks"),
        ({"param_ranks": [0], "data_ranks": [1, 1]}, r"at least one rank, each once"),
    ],
)
def test_sets_of_ranks_that_cannot_be(folder, sets, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        LLM(folder, data_parallel_size=3, weights="pooled", **sets, **SETTINGS)


def check(llm, work, want, mode) -> None:  # noqa: F811
    prompts, params = work
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == want
    stats = llm.stats()
    if mode == "auto":
        assert stats["stream_steps"] + stats["ship_steps"] > 0
        total = sum(len(p) for p in prompts) + sum(len(tokens) - 1 for tokens in want)
        assert stats["stream_tokens"] + stats["ship_tokens"] == total


def joined(rank: int, folder, work, want, cases) -> None:  # noqa: F811
    """As under torchrun, one LLM after the other."""
    for settings in cases:
        with LLM(folder, weights="pooled", **settings, **SETTINGS) as llm:
            apart = "data_ranks" in settings
            (check_apart if apart else check)(llm, work, want, settings["remote_mode"])


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, [{"remote_mode": "stream", "ring_gib": 0.0003}]),
        (3, [{"remote_mode": "auto", "weight_layout": "layer"}]),
        (4, [{"remote_mode": "auto", "weight_replicas": 2}, {"remote_mode": "ship", **APART}]),
    ],
)
def test_tokens_are_those_of_one_engine(folder, work, want, ranks, cases):  # noqa: F811
    run_ranks(ranks, joined, folder, work, want, cases)


def in_turns(rank: int, path, prompts, params, want) -> None:  # noqa: F811
    """Two steps are shipped, three streamed, and so on; steps are in flight meanwhile."""
    world = join_torchrun("cpu")
    config = EngineConfig(weights="pooled", **SETTINGS)
    engine = make_engine(path, None, config, "cpu", world)
    choice = engine.streaming.choice
    decided = 0

    def decide(tokens, selected, decoding):
        nonlocal decided
        decided += 1
        choice.way = "ship" if decided % 5 < 2 else "stream"
        return choice.way

    choice.decide = decide
    requests = [Request(str(i), None, ids, params[i]) for i, ids in enumerate(prompts)]
    call = Call(1, requests, 0, False)
    world.board.open(call.number, len(requests), 0)
    for outputs in run(engine, world.board, call):
        for output in outputs:
            assert output.outputs[0].token_ids == want[int(output.request_id)]
    stats = engine.stats()
    assert stats["ship_steps"] > 3
    assert stats["stream_steps"] > 3
    engine.shutdown()
    world.all_gather(None)
    world.leave()


def test_streaming_and_shipping_in_turns(folder, work, want):  # noqa: F811
    run_ranks(3, in_turns, folder, *work, want)


def too_small(rank: int, folder) -> None:  # noqa: F811
    with pytest.raises(
        ValueError, match=r"ring_gib=.* is too small for the largest matrix of [0-9,]+ bytes; give"
    ):
        LLM(folder, weights="pooled", ring_gib=0.00005, **SETTINGS)


def test_too_small_a_ring(folder):  # noqa: F811
    run_ranks(2, too_small, folder)


def test_a_ring_needs_streaming():
    world = types.SimpleNamespace(device=torch.device("cpu"), size=2)
    with pytest.raises(ValueError, match=r"ring_gib=1e\+06, but of host memory.* GiB are left"):
        _check_ring(10**6 << 30, world)
    with pytest.raises(ValueError, match=r"ring_gib=1\.0 has no meaning with remote_mode='ship'"):
        EngineConfig(weights="pooled", remote_mode="ship", ring_gib=1)
    with pytest.raises(ValueError, match=r"ring_gib=.*weights='pooled'"):
        EngineConfig(ring_gib=1)
