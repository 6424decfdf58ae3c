"""LLM over KV pages in a lender's memory: tokens, leases, and what happens when a lender dies."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import models
import pytest
import torch
import torch.distributed as dist
from models import tokens_of
from ranks import run_ranks
from test_llm_tiers import LONG, PAGE_GIB, long_prompts, work

from torch_pd import LLM, EngineConfig
from torch_pd.board import GroupError, PeerLost
from torch_pd.kv.moves import Waits
from torch_pd.nn.patch import patch_model
from torch_pd.nn.patched import kv_shape
from torch_pd.sizing import GIB, lent_pages

SIZES = {
    "device": "cpu",
    "max_model_len": 160,
    "max_num_batched_tokens": 96,
    "max_num_seqs": 8,
}
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


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:torch_pd")


def check(folder, case, **config) -> dict:
    """The tokens of a case are those of an unlimited pool; returns the borrower's statistics."""
    prompts, params, expected = case
    with LLM(folder, **SIZES | config) as llm:
        assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected
        return llm.stats()["ranks"][config["data_ranks"][0]]


def swapping(folder, gib: float, case, caching: bool, host: int) -> None:
    """Random requests, swapped to the peer (and the host) all the time."""
    peer = 6 if host else 20
    stats = check(
        folder,
        case,
        data_ranks=[0],
        kv_cache_gib=14.5 * gib,
        peer_kv_gib=(peer + 0.5) * gib,
        host_kv_gib=host and (host + 0.5) * gib,
        enable_prefix_caching=caching,
    )
    assert stats["kv_pages"] == 13
    assert stats["peer_kv_pages"] == peer
    assert stats["host_kv_pages"] == max(0, host - 1)
    assert stats["swapped_sequences"] > 0
    assert stats["peer_in_bytes"] > 0
    assert (stats["moved_out_bytes"] > stats["peer_out_bytes"]) == bool(host)
    assert (stats["moved_in_bytes"] > stats["peer_in_bytes"]) == bool(host)


def large(
    folder, gib: float, case, ranks: int, data: int, host: int, dtype: str, device: str = "cpu"
) -> None:
    """Older pages lie on one lender or two, and on the host: decoding reads all in place."""
    lent = (12 if not host else 4) // (ranks - 1)
    stats = check(
        folder,
        case,
        data_ranks=[data],
        kv_cache_gib=5.5 * gib,
        peer_kv_gib=(lent + 0.5) * gib,
        host_kv_gib=host and (host + 4.5) * gib,
        elastic_kv=host > 0,  # the borrower's own pages; what is lent is there all along
        kv_cache_dtype=dtype,
        device=device,
    )
    assert stats["kv_tokens"] == 64
    assert stats["peer_kv_pages"] == lent * (ranks - 1)
    assert stats["peer_out_bytes"] > 0


def poisoned(rank: int, folder, gib: float, case) -> None:
    """Freed pages are overwritten with NaN wherever they lie; one read of them would spread."""
    prompts, params, expected = case
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
    borrower, lender = llm.stats()["ranks"]
    assert borrower["peer_in_bytes"] > 0
    assert lender == {"lent_bytes": int(config["peer_kv_gib"] * (1 << 30))}
    if rank == 0:
        llm.engine.scheduler.check()
        del engine, carrier, pool, carry, poisoned_carry
    llm.shutdown()
    del llm
    assert mapped() == before  # the lent memory is gone


def two_ranks(rank: int, folder, gibs: dict[str, float], cases: dict[str, tuple]) -> None:
    """All in the same two processes, which take seconds to start; as under torchrun."""
    gib = gibs["auto"]
    swapping(folder, gib, cases["swap"], caching=False, host=0)
    swapping(folder, gib, cases["swap"], caching=True, host=16)
    large(folder, gib, cases["large auto"], 2, data=0, host=0, dtype="auto")
    large(folder, gib, cases["large auto"], 2, data=1, host=4, dtype="auto")
    large(folder, gibs["fp8"], cases["large fp8"], 2, data=0, host=4, dtype="fp8")
    # Weights on rank 1, pages on rank 0 and, when those run out, in the memory of rank 1.
    stats = check(
        folder,
        cases["few"],
        weights="pooled",
        remote_mode="stream",
        param_ranks=[1],
        data_ranks=[0],
        kv_cache_gib=14.5 * gib,
        peer_kv_gib=20.5 * gib,
    )
    assert stats["peer_in_bytes"] > 0
    poisoned(rank, folder, gib, cases["few"])


def three_ranks(rank: int, folder, gib: float, case) -> None:
    large(folder, gib, case, 3, data=1, host=4, dtype="auto")


def test_tokens_are_those_of_an_unlimited_pool(folder, gib):
    cases = {
        name: (*work(count, seed), unlimited(folder, *work(count, seed)))
        for name, count, seed in (("swap", 40, 0), ("few", 24, 2))
    }
    gibs = {}
    for dtype in ("auto", "fp8"):
        expected = unlimited(folder, long_prompts(), LONG, kv_cache_dtype=dtype)
        cases[f"large {dtype}"] = long_prompts(), LONG, expected
        shape = kv_shape(patch_model(models.build("llama")), 16, dtype)
        gibs[dtype] = shape.page_bytes * PAGE_GIB
    run_ranks(2, two_ranks, folder, gibs, cases)
    run_ranks(3, three_ranks, folder, gib, cases["large auto"])


def until_the_lender_dies(rank: int, path: list[str], store: str, folder, config, link) -> None:
    sys.path[:] = path
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    llm = LLM(folder, **config, **SIZES)
    prompts, params = work(80, seed=1)
    try:
        for output in llm.stream(prompts, params):
            if output.finished:
                link.send((int(output.request_id.split("-")[1]), tokens_of([output])[0]))
    except PeerLost as error:
        link.send(str(error))
    os._exit(0)


def test_a_lender_that_dies_ends_its_borrower(folder, gib, tmp_path):
    """Whatever was put out until then is right, and the error names the lender."""
    prompts, params = work(80, seed=1)
    expected = unlimited(folder, prompts, params)
    config = {"kv_cache_gib": 12.5 * gib, "peer_kv_gib": 20.5 * gib, "data_ranks": [0]}
    context = multiprocessing.get_context("forkserver")
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
    assert time.monotonic() - start < 10
    assert len(finished) < len(prompts)
    for index, tokens in finished:
        assert tokens == expected[index]
    assert message.startswith(f"rank 1 (process {ranks[1].pid}) has died or left the group")
    assert "rank 0 (process " in message
    assert "is in stream of LLM 1 (its call 1, at test_peer_pages.py:" in message
    for process in ranks:
        process.join(10)


def test_a_spawned_lender_that_dies(folder, gib):
    prompts, params = work(80, seed=1)
    llm = LLM(folder, **PAIR, kv_cache_gib=12.5 * gib, peer_kv_gib=20.5 * gib, **SIZES)

    def kill_at_first_output() -> None:
        for output in llm.stream(prompts, params):
            if output.finished:
                os.kill(llm.pids[1], signal.SIGKILL)

    with pytest.raises(GroupError, match=r"rank 1 \(process \d+\) was killed by SIGKILL while it"):
        kill_at_first_output()


def lacking(rank: int, folder) -> None:
    with pytest.raises(
        ValueError,
        match=r"peer_kv_gib=1000000\.0: rank 1 is to lend 1000000\.00 GiB, but has .* GiB to give "
        r"\(95% of .* GiB of host memory / 2 ranks\): lower peer_kv_gib",
    ):
        LLM(folder, data_ranks=[0], kv_cache_gib=0.01, peer_kv_gib=1e6)


def test_a_lender_that_lacks_the_memory(folder):
    run_ranks(2, lacking, folder)


def test_less_than_a_page_is_refused():
    assert lent_pages(4096, 1.0, lenders=2, borrowers=3) == 2 * (GIB // 3 // 4096)
    with pytest.raises(ValueError, match=r"1 bytes of a lender / 3 borrowers .* give at least"):
        lent_pages(4096, 1e-9, lenders=2, borrowers=3)


@pytest.mark.parametrize(
    ("fields", "ranks", "words"),
    [
        ({}, 2, "peer_kv_gib=1.0 needs data_ranks, the ranks that run requests"),
        ({"data_ranks": [0, 0]}, 2, "at least one rank, each once"),
        ({"data_ranks": [0, 1]}, 2, r"all of the 2 ranks, so none is left to lend"),
        ({"data_ranks": [0, 2]}, 2, r"data_ranks=\[0, 2\] has 2, but the ranks are 0..1"),
        ({"data_ranks": [0]}, 8, "7 ranks lend, and block tables can name 6"),
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
