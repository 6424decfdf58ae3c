"""LLM over tiers: the same tokens as with one large pool, and who reads whose pages."""

import os
import random

import models
import pytest
import torch
from models import tokens_of

from torch_pd import LLM, SamplingParams, sizing
from torch_pd.kv.moves import Waits

PAGE_GIB = 1 / (1 << 30)
LONG = SamplingParams(temperature=0.0, max_tokens=18, ignore_eos=True, detokenize=False)


def long_prompts() -> list[list[int]]:
    """Two that a pool of a few pages cannot hold, and a small one."""
    rng = random.Random(5)
    return [[rng.randrange(3, models.VOCAB) for _ in range(length)] for length in (140, 20, 97)]


@pytest.fixture(scope="module")
def model():
    return models.build("llama")


@pytest.fixture(scope="module")
def page_bytes(model):
    with LLM(model, kv_cache_gib=0.01, max_model_len=64) as llm:
        return llm.engine.pool.page_bytes


def work(count: int, seed: int) -> tuple[list[dict], list[SamplingParams]]:
    """Requests of a few shared prefixes and own ends, greedy and sampled, one or two outputs."""
    rng = random.Random(seed)
    prefixes = [
        [rng.randrange(3, models.VOCAB) for _ in range(length)] for length in (16, 33, 48, 64)
    ]
    prompts, params = [], []
    for i in range(count):
        own = [rng.randrange(3, models.VOCAB) for _ in range(rng.randint(1, 40))]
        prompts.append({"prompt_token_ids": rng.choice([[], *prefixes]) + own})
        params.append(
            SamplingParams(
                temperature=1.0 if i % 3 else 0.0,
                seed=i,
                max_tokens=rng.randint(1, 30),
                n=2 if i % 6 == 1 else 1,
                ignore_eos=True,
                detokenize=False,
            )
        )
    return prompts, params


def run(model, prompts, params, **config):
    """Tokens and statistics."""
    with LLM(model, max_model_len=160, max_num_batched_tokens=96, **config) as llm:
        outputs = tokens_of(llm.generate(prompts, params, use_tqdm=False))
        llm.engine.scheduler.check()
        return outputs, llm.stats()


@pytest.mark.parametrize("caching", [False, True])
def test_tiny_pools_give_the_same_tokens(model, page_bytes, tmp_path, caching):
    prompts, params = work(60, seed=int(caching))
    expected, _ = run(model, prompts, params, kv_cache_gib=0.05, enable_prefix_caching=caching)
    gib = page_bytes * PAGE_GIB
    config = {
        "kv_cache_gib": 14.5 * gib,
        "host_kv_gib": 24.5 * gib,
        "enable_prefix_caching": caching,
        "max_num_seqs": 8,
    }
    if caching:
        config |= {"disk_kv_gib": 60.5 * gib, "disk_kv_path": str(tmp_path)}
    outputs, stats = run(model, prompts, params, **config)
    assert outputs == expected
    assert stats["moved_out_bytes"] > 0
    assert stats["moved_in_bytes"] > 0
    assert stats["kv_pages"] == 13
    assert stats["host_kv_pages"] == 23
    assert stats["swapped_sequences"] > 0
    assert stats["disk_errors"] == 0
    if caching:
        assert stats["disk_written_bytes"] > 0


def test_float8_pages_swap_with_their_scales(model):
    prompts, params = work(30, seed=7)
    base = {"kv_cache_dtype": "fp8", "max_num_seqs": 8}
    with LLM(model, kv_cache_gib=0.01, max_model_len=64, **base) as llm:
        gib = llm.engine.pool.page_bytes * PAGE_GIB
    expected, _ = run(model, prompts, params, kv_cache_gib=0.05, **base)
    outputs, stats = run(
        model, prompts, params, kv_cache_gib=13.5 * gib, host_kv_gib=24.5 * gib, **base
    )
    assert outputs == expected
    assert stats["moved_in_bytes"] > 0


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_records_with_an_unused_end(model, tmp_path, monkeypatch, kv_cache_dtype):
    prompts, params = work(30, seed=8)
    base = {"kv_cache_dtype": kv_cache_dtype, "max_num_seqs": 8}
    expected, _ = run(model, prompts, params, kv_cache_gib=0.05, **base)
    monkeypatch.setattr(sizing, "SAME_BANKS", 1)  # so every record has one
    with LLM(model, kv_cache_gib=0.01, max_model_len=64, **base) as llm:
        shape = llm.engine.pool.shape
    assert shape.page_bytes == shape.data_bytes + shape.scale_bytes + sizing.PAGE_PAD
    gib = shape.page_bytes * PAGE_GIB
    tiers = {"host_kv_gib": 16.5 * gib, "disk_kv_gib": 60.5 * gib, "disk_kv_path": str(tmp_path)}
    outputs, stats = run(model, prompts, params, kv_cache_gib=13.5 * gib, **tiers, **base)
    assert outputs == expected
    assert stats["moved_in_bytes"] > 0
    assert stats["disk_written_bytes"] > 0


def check_larger_than_the_pool(model, page_bytes):
    """Decoding reads the older pages where they are, prefill gathers them."""
    prompts, gib = long_prompts(), page_bytes * PAGE_GIB
    expected, _ = run(model, prompts, LONG, kv_cache_gib=0.05)
    outputs, stats = run(model, prompts, LONG, kv_cache_gib=5.5 * gib, host_kv_gib=12.5 * gib)
    assert stats["kv_tokens"] == 64
    assert outputs == expected


def test_a_sequence_larger_than_the_gpu_pool(model, page_bytes):
    check_larger_than_the_pool(model, page_bytes)


def test_no_request_reads_a_page_of_another(model, page_bytes):
    """Freed pages are overwritten with NaN wherever they lie; one read of them would spread."""
    prompts, params = work(40, seed=3)
    expected, _ = run(model, prompts, params, kv_cache_gib=0.05)
    gib = page_bytes * PAGE_GIB
    config = {"kv_cache_gib": 12.5 * gib, "host_kv_gib": 20.5 * gib, "max_num_seqs": 6}
    with LLM(model, max_model_len=160, max_num_batched_tokens=96, **config) as llm:
        engine = llm.engine
        carrier, pool = engine.carrier, engine.pool
        engine.overlap = False
        carry = carrier.carry

        def poisoned(plan):
            carry(plan)
            # All moves done: what is blank now is nobody's.
            queue = carrier.tiers.queue
            carrier.migrator.finish(Waits(*(n - 1 for n in queue._next)))
            for page in carrier.tiers.gpu._blank:
                pool.pages[page] = float("nan")
            host = carrier.host.pages.view(torch.float32)
            for page in carrier.tiers.host._blank:
                host[page] = float("nan")

        carrier.carry = poisoned
        assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected


def test_aborts_leave_nothing_behind(model, page_bytes, tmp_path):
    prompts, params = work(50, seed=4)
    gib = page_bytes * PAGE_GIB
    config = {
        "kv_cache_gib": 12.5 * gib,
        "host_kv_gib": 20.5 * gib,
        "disk_kv_gib": 30.5 * gib,
        "disk_kv_path": str(tmp_path),
        "max_num_seqs": 6,
    }
    rng = random.Random(0)
    with LLM(model, max_model_len=160, max_num_batched_tokens=96, **config) as llm:
        engine = llm.engine
        for step, output in enumerate(llm.stream(prompts, params)):
            engine.scheduler.check()
            if not output.finished and rng.random() < 0.2:
                engine.scheduler.check()
            if step == 60:
                break
        assert not engine.has_unfinished
        engine.scheduler.check()
        assert engine.allocator.num_used == 0
        expected, _ = run(model, prompts[:5], params[:5], kv_cache_gib=0.05)
        assert tokens_of(llm.generate(prompts[:5], params[:5], use_tqdm=False)) == expected


def test_faults_of_the_disk_change_no_token(model, page_bytes, tmp_path):
    """The file is cut off and overwritten while the engine runs."""
    prompts, params = work(60, seed=6)
    expected, _ = run(model, prompts, params, kv_cache_gib=0.05)
    gib = page_bytes * PAGE_GIB
    config = {
        "kv_cache_gib": 12.5 * gib,
        "host_kv_gib": 14.5 * gib,
        "disk_kv_gib": 60.5 * gib,
        "disk_kv_path": str(tmp_path),
        "max_num_seqs": 6,
    }
    with LLM(model, max_model_len=160, max_num_batched_tokens=96, **config) as llm:
        disk = llm.engine.carrier.disk
        assert tokens_of(llm.generate(prompts[:30], params[:30], use_tqdm=False)) == expected[:30]
        fd = os.open(f"/proc/self/fd/{disk.fd}", os.O_RDWR)
        os.pwrite(fd, b"\xff" * 8 * page_bytes, 0)
        os.ftruncate(fd, 20 * page_bytes)
        os.fsync(fd)
        os.close(fd)
        assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected


def test_refusals(model):
    with pytest.raises(ValueError, match=r"host_kv_gib=1000000.0: .* GiB are left .*: lower"):
        LLM(model, kv_cache_gib=0.01, host_kv_gib=1e6)
    with pytest.raises(ValueError, match=r"host_kv_gib=1e-09 is 1 bytes, room for 0 pages"):
        LLM(model, kv_cache_gib=0.01, host_kv_gib=1e-9)
    with pytest.raises(ValueError, match="give an existing folder"):
        LLM(model, kv_cache_gib=0.01, host_kv_gib=0.01, disk_kv_gib=0.01, disk_kv_path="/no/folder")
