"""LLM over KV pages in a lender's memory: tokens, leases, and what happens when a lender dies."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import models
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_llm_tiers import PAGE_GIB, tokens_of, work

from torch_pd import LLM, EngineConfig, SamplingParams
from torch_pd.board import GroupError, PeerLost
from torch_pd.kv.moves import Waits
from torch_pd.nn.patch import kv_shape, patch_model

SIZES = {"max_model_len": 160, "max_num_batched_tokens": 96, "max_num_seqs": 8}
PAIR = {"data_parallel_size": 2, "data_ranks": [0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    models.build("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gib() -> float:
    """GiB of a page."""
    return kv_shape(patch_model(models.build("llama")), 16, "auto").page_bytes * PAGE_GIB


def unlimited(folder, prompts, params, **config):
    with LLM(folder, kv_cache_gib=0.05, **SIZES | config) as llm:
        return tokens_of(llm.generate(prompts, params, use_tqdm=False))


@pytest.mark.parametrize(("caching", "host"), [(False, 0), (True, 16)])
def test_tiny_pools_give_the_same_tokens(folder, gib, caching, host):
    """Random requests, swapped to the peer (and the host) all the time."""
    prompts, params = work(60, seed=int(caching))
    peer = 6 if host else 20
    expected = unlimited(folder, prompts, params)
    config = {
        "kv_cache_gib": 14.5 * gib,
        "peer_kv_gib": (peer + 0.5) * gib,
        "host_kv_gib": host and (host + 0.5) * gib,
        "enable_prefix_caching": caching,
    }
    with LLM(folder, **PAIR, **config, **SIZES) as llm:
        assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected
        stats, lender = llm.stats()["ranks"]
    assert lender == {"lent_bytes": int(config["peer_kv_gib"] * (1 << 30))}
    assert stats["kv_pages"] == 13
    assert stats["peer_kv_pages"] == peer
    assert stats["host_kv_pages"] == max(0, host - 1)
    assert stats["swapped_sequences"] > 0
    assert stats["peer_in_bytes"] > 0
    assert (stats["moved_out_bytes"] > stats["peer_out_bytes"]) == bool(host)
    assert (stats["moved_in_bytes"] > stats["peer_in_bytes"]) == bool(host)


LONG = SamplingParams(temperature=0.0, max_tokens=18, ignore_eos=True, detokenize=False)


@pytest.mark.parametrize(
    ("ranks", "data", "host", "dtype"),
    [(2, [0], 0, "auto"), (2, [1], 4, "auto"), (3, [1], 4, "auto"), (2, [0], 4, "fp8")],
)
def test_a_sequence_larger_than_the_gpu_pool(folder, ranks, data, host, dtype):
    """Its older pages lie on one lender or two, and on the host: decoding reads all in place."""
    rng = random.Random(5)
    prompts = [[rng.randrange(3, models.VOCAB) for _ in range(length)] for length in (140, 20, 97)]
    expected = unlimited(folder, prompts, LONG, kv_cache_dtype=dtype)
    gib = kv_shape(patch_model(models.build("llama")), 16, dtype).page_bytes * PAGE_GIB
    lent = (12 if not host else 4) // (ranks - 1)
    config = {
        "data_parallel_size": ranks,
        "data_ranks": data,
        "kv_cache_gib": 5.5 * gib,
        "peer_kv_gib": (lent + 0.5) * gib,
        "host_kv_gib": host and (host + 4.5) * gib,
        "kv_cache_dtype": dtype,
    }
    with LLM(folder, **config, **SIZES) as llm:
        assert tokens_of(llm.generate(prompts, LONG, use_tqdm=False)) == expected
        stats = llm.stats()["ranks"][data[0]]
    assert stats["kv_tokens"] == 64
    assert stats["peer_kv_pages"] == lent * (ranks - 1)
    assert stats["peer_out_bytes"] > 0


def test_ranks_that_hold_weights_lend_memory(folder, gib):
    """Weights on rank 1, pages on rank 0 and, when those run out, in the memory of rank 1."""
    prompts, params = work(24, seed=2)
    expected = unlimited(folder, prompts, params)
    apart = {"weights": "pooled", "remote_mode": "stream", "param_ranks": [1], "data_ranks": [0]}
    config = {"kv_cache_gib": 14.5 * gib, "peer_kv_gib": 20.5 * gib, **apart}
    with LLM(folder, data_parallel_size=2, **config, **SIZES) as llm:
        assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected
        assert llm.stats()["ranks"][0]["peer_in_bytes"] > 0


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:torch_pd")


def poisoned(rank: int, folder, gib: float, prompts, params, expected) -> None:
    """Under a process group of the caller, as with torchrun. Freed pages are overwritten with NaN
    wherever they lie; one read of them would spread."""
    before = mapped()
    config = {"kv_cache_gib": 12.5 * gib, "peer_kv_gib": 10.5 * gib, "host_kv_gib": 10.5 * gib}
    llm = LLM(folder, data_ranks=[0], **config, **SIZES)
    if rank == 0:
        engine = llm.engine
        carrier, pool = engine.carrier, engine.pool
        engine.overlap = False
        carry = carrier.carry
        first = carrier.host.num_pages

        def poisoned_carry(plan) -> None:
            carry(plan)
            queue, under = carrier.tiers.queue, carrier.tiers.host
            carrier.migrator.finish(Waits(*(n - 1 for n in queue._next)))
            for page in carrier.tiers.gpu._blank:
                pool.pages[page] = float("nan")
            host = carrier.host.pages.view(torch.float32)
            for page in under._blank:
                host[page] = float("nan")
            (peer,) = carrier.migrator.peers
            for page in under._near:
                peer.view(torch.float32)[page - first] = float("nan")

        carrier.carry = poisoned_carry
    else:
        with pytest.raises(RuntimeError, match="only lends memory has none"):
            _ = llm.engine
    assert mapped() > before
    assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected
    assert llm.stats()["ranks"][0]["peer_in_bytes"] > 0
    if rank == 0:
        llm.engine.scheduler.check()
        del engine, carrier, pool, carry, poisoned_carry
    llm.shutdown()
    del llm
    assert mapped() == before  # the lent memory is gone


def test_no_request_reads_a_page_of_another(folder, gib):
    prompts, params = work(30, seed=3)
    run_ranks(2, poisoned, folder, gib, prompts, params, unlimited(folder, prompts, params))


def until_the_lender_dies(rank: int, path: list[str], store: str, folder, config, link) -> None:
    sys.path[:] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    llm = LLM(folder, **config, **SIZES)
    prompts, params = work(120, seed=1)
    try:
        for output in llm.stream(prompts, params):
            if output.finished:
                link.send((int(output.request_id.split("-")[1]), tokens_of([output])[0]))
    except PeerLost as error:
        link.send(str(error))
    os._exit(0)


def test_a_lender_that_dies_ends_its_borrower(folder, gib, tmp_path):
    """Whatever was put out until then is right, and the error names the lender."""
    prompts, params = work(120, seed=1)
    expected = unlimited(folder, prompts, params)
    config = {"kv_cache_gib": 12.5 * gib, "peer_kv_gib": 20.5 * gib, "data_ranks": [0]}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    args = (sys.path, str(tmp_path / "store"), folder, config, theirs)
    ranks = [
        context.Process(target=until_the_lender_dies, args=(rank, *args), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    finished = [ours.recv() for _ in range(20)]
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGKILL)
    start = time.monotonic()
    while isinstance(message := ours.recv(), tuple):
        finished.append(message)
    assert time.monotonic() - start < 5
    assert len(finished) < len(prompts)
    for index, tokens in finished:
        assert tokens == expected[index]
    assert message == f"rank 1 (process {ranks[1].pid}) has died or left the group"
    for process in ranks:
        process.join(10)


def test_a_spawned_lender_that_dies(folder, gib):
    prompts, params = work(400, seed=1)
    llm = LLM(folder, **PAIR, kv_cache_gib=12.5 * gib, peer_kv_gib=20.5 * gib, **SIZES)

    def kill_at_first_output() -> None:
        for output in llm.stream(prompts, params):
            if output.finished:
                os.kill(llm.pids[1], signal.SIGKILL)

    with pytest.raises(GroupError, match=r"rank 1 \(process \d+\) was killed by SIGKILL while it"):
        kill_at_first_output()


def test_refusals(folder):
    with pytest.raises(
        ValueError,
        match=r"peer_kv_gib=1000000\.0: rank 1 is to lend 1000000\.00 GiB, but has .* GiB to give "
        r"\(95% of .* GiB of host memory / 2 ranks\): lower peer_kv_gib",
    ):
        LLM(folder, **PAIR, kv_cache_gib=0.01, peer_kv_gib=1e6)
    with pytest.raises(ValueError, match=r"1 bytes of a lender / 1 borrowers .* give at least"):
        LLM(folder, **PAIR, kv_cache_gib=0.01, peer_kv_gib=1e-9)


@pytest.mark.parametrize(
    ("fields", "ranks", "words"),
    [
        ({}, 2, "peer_kv_gib=1.0 needs data_ranks, the ranks that run requests"),
        ({"data_ranks": [0, 0]}, 2, "at least one rank, each once"),
        ({"data_ranks": [0, 1]}, 2, r"all of the 2 ranks, so none is left to lend"),
        ({"data_ranks": [0, 2]}, 2, r"data_ranks=\[0, 2\] has 2, but the ranks are 0..1"),
        ({"data_ranks": [0]}, 1, "take the memory of other ranks, and there is one"),
        ({"data_ranks": [0], "param_ranks": [1]}, 2, "param_ranks=.*weights='pooled'"),
        (
            {"data_ranks": [0], "host_kv_gib": 1, "disk_kv_gib": 1, "disk_kv_path": "/tmp"},
            2,
            "cannot be combined",
        ),
    ],
)
def test_lenders_that_cannot_be(fields, ranks, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig(peer_kv_gib=1, **fields).check_ranks(ranks)
