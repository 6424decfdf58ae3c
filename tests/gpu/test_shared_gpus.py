"""Engines of three and four ranks on two GPUs: ranks share a GPU, which runs them in turn.

So everything that counts ranks is tested where there are not as many GPUs: who owns what, who reads
whom, collectives and graphs of unequal parts, votes. Speeds are not: a step takes as long as the
turns of its exchanges, and other tests on the same GPUs at the same time make these much longer.
"""

import functools
import time
from pathlib import Path

import models as models_of
import pytest
import torch
from ranks import run_ranks, share_gpus
from test_llm_tiers import PAGE_GIB
from test_llm_tiers import tokens_of as tiered_tokens_of
from test_llm_tiers import work as tiered_work
from test_peer_pages import LONG, SIZES, check, large, long_prompts
from test_pooled_llm import check_halves, folder, make_work  # noqa: F401
from transformers import Qwen2Config, Qwen2ForCausalLM

from torch_pd import LLM
from torch_pd.engine import sharing, spawned
from torch_pd.engine.halving import Halving
from torch_pd.nn.patch import patch_model
from torch_pd.nn.patched import kv_shape
from torch_pd.weights import mailbox
from torch_pd.weights.choice import Choice

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
DEVICE = "cuda"
SETTINGS = {"max_num_seqs": 3, "max_num_batched_tokens": 64, "kv_cache_gib": 0.01}
MIXED = 8 << 10
"""Bytes: decoding steps go by mailbox, prompts by NCCL."""


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A random Qwen2 with biases, whose heads, layers and columns do not divide among its ranks."""
    path = tmp_path_factory.mktemp("untied")
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=523,
        hidden_size=64,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def work():
    return make_work(12, 12)


def tokens_of(llm: LLM, work) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(*work, use_tqdm=False)]


@pytest.fixture(scope="module")
def models(folder, untied, work):  # noqa: F811
    """By name the folder and the tokens wanted."""
    found = {}
    for name, path in (("tied", folder), ("untied", untied)):
        with LLM(path, device=DEVICE, **SETTINGS) as llm:
            found[name] = path, tokens_of(llm, work)
    return found


def in_turn(choice: Choice, tokens, selected, decoding) -> str:
    """Stands in for `Choice.decide`: of such small models it would choose one way for all steps."""
    choice.turn = getattr(choice, "turn", 0) + 1
    choice.way = ("stream", "ship", "ship")[choice.turn % 3]
    return choice.way


def engines(rank: int, device: str, models, work, cases: list[dict]) -> None:
    """One LLM after the other in the same processes, as under torchrun."""
    if device == "cuda":
        share_gpus()
    Choice.decide, Halving.pays = in_turn, lambda halving, rows, kv_tokens: rows >= 2
    opened, box = sharing.open_mailbox, mailbox.Mailbox
    for case in cases:
        start = time.perf_counter()
        settings = dict(case)
        (path, want), limit = models[settings.pop("model", "tied")], settings.pop("limit", None)
        sharing.open_mailbox = opened if limit != 0 else lambda *_: None
        mailbox.Mailbox = functools.partial(box, limit=limit) if limit else box
        with LLM(path, device=device, **{"weights": "pooled", **settings}, **SETTINGS) as llm:
            exact = settings.get("remote_mode") == "stream" or "weights" in settings
            for _ in range(2):
                for got, wanted, each in zip(tokens_of(llm, work), want, work[1], strict=True):
                    # Shipped sums are rounded otherwise: greedy tokens stand that here.
                    assert len(got) == len(wanted)
                    assert got == wanted or (each.temperature > 0 and not exact), case
            stats = llm.stats()
            graphs = sum(each.get("graph_steps", 0) for each in stats["ranks"])
            if device == "cuda" and settings.get("remote_mode") in ("ship", "auto"):
                assert (graphs > 0) != settings.get("enforce_eager", False), case
            if settings.get("remote_mode") == "auto":
                assert stats["stream_steps"] > 0 < stats["ship_steps"], case
            if "data_ranks" in settings and settings["remote_mode"] != "stream":
                assert 0 < stats["halved_steps"] < stats["steps"], case
        if rank == 0:
            print(f"{time.perf_counter() - start:.1f} s {case}", flush=True)


SHIP, STREAM, AUTO = ({"remote_mode": mode} for mode in ("ship", "stream", "auto"))
UNTIED, LAYER, NCCL = {"model": "untied"}, {"weight_layout": "layer"}, {"limit": 0}
HALF = {"param_ranks": [0, 1], "data_ranks": [2, 3]}


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (
            4,
            [
                SHIP,
                SHIP | UNTIED | LAYER,
                SHIP | UNTIED | {"param_ranks": [3, 1, 2]},
                SHIP | HALF,
                SHIP | {"weight_replicas": 2},
                {"weights": "resident"},
                STREAM,
                STREAM | UNTIED | LAYER | {"ring_gib": 0.0004},
                STREAM | UNTIED | {"param_ranks": [1, 2], "data_ranks": [3, 0]},
                STREAM | {"param_ranks": [3], "data_ranks": [0, 1, 2]},
                STREAM | {"weight_replicas": 2},
                AUTO,
                AUTO | UNTIED | HALF,
            ],
        ),
        (
            4,
            [
                SHIP | {"limit": MIXED},
                SHIP | NCCL | {"enforce_eager": True},
                SHIP | NCCL,
                SHIP | NCCL | UNTIED | {"weight_replicas": 2},
                AUTO | NCCL | UNTIED | HALF,
            ],
        ),
        (
            3,
            [
                SHIP,
                SHIP | LAYER,
                SHIP | NCCL | UNTIED,
                SHIP | {"param_ranks": [2, 0], "data_ranks": [1]},
                SHIP | NCCL | UNTIED | {"param_ranks": [1], "data_ranks": [0, 2]},
                STREAM | UNTIED | LAYER,
                AUTO,
            ],
        ),
    ],
    ids=["four", "four by NCCL", "three"],
)
def test_tokens_are_those_of_one_engine(models, work, ranks, cases):
    run_ranks(ranks, engines, DEVICE, models, work, cases, device=DEVICE)


def test_spawned_ranks_and_a_kill(monkeypatch, models, work):
    monkeypatch.setattr(spawned, "check_gpus", lambda ranks: None)
    path, want = models["tied"]
    check_halves(monkeypatch, path, work, want, 4, DEVICE, 1, **SHIP, **HALF)


def borrowers(rank: int, device: str, path: Path, gib: float, cases: dict[str, tuple]) -> None:
    """Pages of a rank on three others; then two ranks that stream and borrow from the owners."""
    if device == "cuda":
        share_gpus()
    for data, host in ((0, 0), (2, 4)):
        large(path, gib, cases["large"], 4, data, host, "auto", device)
    stats = check(
        path,
        cases["few"],
        device=device,
        weights="pooled",
        remote_mode="stream",
        param_ranks=[3, 1],
        data_ranks=[2, 0],
        kv_cache_gib=14.5 * gib,
        peer_kv_gib=20.5 * gib,
    )
    assert stats["peer_kv_pages"] == 20


def test_pages_on_several_lenders(tmp_path):
    llama = models_of.build("llama")
    llama.save_pretrained(tmp_path)
    gib = kv_shape(patch_model(llama), 16, "auto").page_bytes * PAGE_GIB
    cases = {}
    for name, (prompts, params) in {
        "large": (long_prompts(), LONG),
        "few": tiered_work(24, seed=2),
    }.items():
        with LLM(tmp_path, kv_cache_gib=0.05, **SIZES | {"device": DEVICE}) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            cases[name] = prompts, params, tiered_tokens_of(outputs)
    run_ranks(4, borrowers, DEVICE, tmp_path, gib, cases, device=DEVICE)
