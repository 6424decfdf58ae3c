"""LLM over weights that spawned ranks share, one GPU each: shipped, streamed and chosen."""

import pytest
import torch
from test_pooled_llm import SETTINGS, check_halves, folder, work  # noqa: F401

from torch_pd import LLM

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
RANKS = 2


def tokens_of(llm: LLM, work) -> list[list[int]]:  # noqa: F811
    return [output.outputs[0].token_ids for output in llm.generate(*work, use_tqdm=False)]


@pytest.fixture(scope="module")
def want(folder, work):  # noqa: F811
    with LLM(folder, device="cuda", **SETTINGS) as llm:
        return tokens_of(llm, work)


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "resident"},
        {"remote_mode": "ship"},
        {"remote_mode": "ship", "enforce_eager": True},
        {"remote_mode": "ship", "weight_layout": "layer"},
        {"remote_mode": "ship", "param_ranks": [1]},
        {"remote_mode": "ship", "weight_replicas": 2},
        {"remote_mode": "stream"},
        {"remote_mode": "stream", "param_ranks": [0], "data_ranks": [1]},
        {"remote_mode": "auto"},
        {"remote_mode": "auto", "param_ranks": [1], "data_ranks": [0]},
    ],
    ids=str,
)
def test_tokens_are_those_of_one_engine(folder, work, want, settings):  # noqa: F811
    shared = {"device": "cuda", "data_parallel_size": RANKS, "weights": "pooled"}
    with LLM(folder, **{**shared, **settings, **SETTINGS}) as llm:
        # Shipped sums are rounded otherwise: greedy tokens stand that here, drawn ones need not.
        exact = settings.get("remote_mode") == "stream" or "weights" in settings
        _, params = work
        for _ in range(2):
            for got, wanted, each in zip(tokens_of(llm, work), want, params, strict=True):
                assert len(got) == len(wanted)
                assert got == wanted or (each.temperature > 0 and not exact)
        stats = llm.stats()
        replays = sum(rank["graph_steps"] for rank in stats["ranks"])
        eager = settings.get("enforce_eager") or settings.get("remote_mode") in ("stream", "auto")
        assert eager or replays > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"param_ranks": [1], "data_ranks": [0], "remote_mode": "ship"},
        {"param_ranks": [0], "data_ranks": [1], "remote_mode": "ship", "enforce_eager": True},
        {"param_ranks": [0], "data_ranks": [1], "remote_mode": "auto"},
    ],
    ids=str,
)
def test_tokens_in_halves_are_those_of_one_engine(monkeypatch, folder, work, want, settings):  # noqa: F811
    check_halves(monkeypatch, folder, work, want, RANKS, "cuda", **settings)
