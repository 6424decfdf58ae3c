"""LLM over weights that spawned ranks share, against one engine that holds all of them."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from torch_pd import LLM, SamplingParams
from torch_pd.board import GroupError
from torch_pd.engine import spawned
from torch_pd.launch import Ranks

SETTINGS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_gib": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama whose three KV heads do not divide among two or four ranks."""
    path = tmp_path_factory.mktemp("pooled")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=509,
        hidden_size=48,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def make_work(count: int, most: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and parameters of very different lengths, a third of them sampled; up to ``most``
    tokens come out."""
    torch.manual_seed(1)
    lengths, outputs = torch.randint(1, 60, (count,)), torch.randint(1, most, (count,))
    prompts = [torch.randint(3, 500, (int(n),)).tolist() for n in lengths]
    params = [
        SamplingParams(max_tokens=int(m), temperature=float(i % 3 == 0), ignore_eos=True, seed=i)
        for i, m in enumerate(outputs)
    ]
    return prompts, params


@pytest.fixture(scope="module")
def work():
    return make_work(24, 40)


@pytest.fixture(scope="module")
def want(folder, work):
    with LLM(folder, **SETTINGS) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(*work, use_tqdm=False)]


def check(llm, work, want, width) -> None:
    """Two calls give the tokens wanted; groups of ``width`` ranks step together."""
    for _ in range(2):
        outputs = llm.generate(*work, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == want
    steps = [rank["steps"] for rank in llm.stats()["ranks"]]
    for first in range(0, len(steps), width):
        assert len(set(steps[first : first + width])) == 1, steps


def test_tokens_are_those_of_one_engine(folder, work, want):
    shared = {"data_parallel_size": 4, "weights": "pooled", "remote_mode": "ship"}
    with LLM(folder, **shared, weight_replicas=2, **SETTINGS) as llm:
        # Leaving a call drops it on all ranks, whatever step they are in.
        for output in llm.stream(*work):
            assert not output.finished or output.request_id
            break
        check(llm, work, want, 2)


def joined(rank: int, folder, work, want, cases) -> None:
    """As under torchrun, one LLM after the other."""
    for settings in cases:
        with LLM(folder, weights="pooled", remote_mode="ship", **settings, **SETTINGS) as llm:
            check(llm, work, want, len(llm.stats()["ranks"]))


@pytest.mark.parametrize(
    ("ranks", "cases"), [(2, [{}]), (3, [{"weight_layout": "layer"}, {"param_ranks": [2, 0]}])]
)
def test_tokens_of_joined_ranks_are_those_of_one_engine(folder, work, want, ranks, cases):
    run_ranks(ranks, joined, folder, work, want, cases)


def check_halves(monkeypatch, folder, work, want, ranks, device="cpu", killed=None, **settings):
    """Tokens of an LLM with roles apart whose decoding steps run in halves wherever they can.
    ``killed``: the rank that dies in such a step in the end."""
    monkeypatch.setattr(spawned, "Ranks", lambda _, args: Ranks("launch_targets:halved", args))
    settings = {"data_parallel_size": ranks, "weights": "pooled", "device": device, **settings}
    with LLM(folder, **settings, **SETTINGS) as llm:
        # So few that some ranks run dry before others.
        prompts, params = (each[:12] for each in work)
        for _ in llm.stream(prompts, params):
            break
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for output, wanted, each in zip(outputs, want, params, strict=False):
            # Shipped sums round otherwise on GPUs, which may move a token that is drawn.
            drawn = device == "cuda" and each.temperature > 0
            assert output.outputs[0].token_ids == wanted or drawn
        for stats in llm.stats()["ranks"]:
            assert stats["halved_steps"] < stats["steps"]
            assert stats["halved_steps"] > 0 or settings["remote_mode"] == "auto"
        if killed is None:
            return
        died = []

        def kill():
            for output in llm.stream(prompts * 5, params * 5):
                if output.finished and not died:
                    died.append(time.monotonic())
                    os.kill(llm.pids[killed], signal.SIGKILL)

        with pytest.raises(GroupError, match=rf"rank {killed} \(process \d+\) was killed by SIG"):
            kill()
        assert time.monotonic() - died[0] < 10


@pytest.mark.parametrize(
    ("ranks", "param_ranks", "data_ranks", "killed"),
    [(3, [0], [1, 2], 0), (3, [0, 2], [1], None)],
)
def test_tokens_in_halves_are_those_of_one_engine(
    monkeypatch, folder, work, want, ranks, param_ranks, data_ranks, killed
):
    roles = {"param_ranks": param_ranks, "data_ranks": data_ranks, "remote_mode": "ship"}
    check_halves(monkeypatch, folder, work, want, ranks, killed=killed, **roles)


def test_a_folder_is_needed(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="give a folder"):
        LLM(model, data_parallel_size=2, weights="pooled")


def test_fields_of_pooled_weights_alone():
    for setting in ({"weight_layout": "layer"}, {"param_ranks": [0]}, {"remote_mode": "ship"}):
        (name,) = setting
        with pytest.raises(ValueError, match=f"{name}=.*weights='pooled'"):
            LLM("model", data_parallel_size=2, **setting)
