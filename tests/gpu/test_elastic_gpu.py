"""KV pools whose memory is mapped on demand, on a GPU: what the driver counts, graphs, wrong pages.

compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_elastic_gpu.py -k pages
"""

import gc

import models
import pytest
import torch
import torch_pd._runtime as _runtime
from device_pools import DEVICE, error
from models import tokens_of
from test_elastic import PAGE_GIB, scarce
from test_engine_gpu import prompts_of, qwen3
from test_llm_tiers import run, work

from torch_pd import LLM, SamplingParams, ops
from torch_pd.engine import engine
from torch_pd.engine.swapper import SwapCosts
from torch_pd.kv import elastic
from torch_pd.kv.cache import KVPool
from torch_pd.kv.elastic import ElasticPages, chunk_of
from torch_pd.kv.pages import PageAllocator
from torch_pd.sizing import GIB

CUDA = torch.device("cuda", 0)


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(0)[0]


def test_the_driver_counts_what_is_mapped_and_nothing_more():
    """Other processes may use the GPU too, so within some GiB."""
    before = free_bytes()
    pages = ElasticPages(8 << 10, 1 << 20, CUDA, chunk_of(8 * GIB, CUDA))  # 8 GiB
    records = pages.records
    assert before - free_bytes() < 4 * GIB
    pages.grow(8 << 10)
    assert before - free_bytes() > 6 * GIB
    records[1:].fill_(5)
    allocator = PageAllocator(8 << 10, backing=pages)
    held = allocator.allocate(1000)
    pages.rest(allocator)
    assert pages.mapped_bytes == 1024 << 20
    assert before - free_bytes() < 5 * GIB
    assert bool((records[1 : 1 + len(held)] == 5).all())
    assert not bool(records[2000].any())
    del pages, allocator, records
    gc.collect()
    assert before - free_bytes() < 4 * GIB


def test_pages_across_chunks_and_wrong_pages():
    """Contents stay through growing and shrinking; what lies above reads as the filler."""
    unit = _runtime.chunk_unit(0)
    layers, heads, dim = 3, 2, 128
    page_bytes = layers * 2 * 16 * heads * dim * 2
    count = 8 * unit // page_bytes + 1
    pages = ElasticPages(count, page_bytes, CUDA, unit)
    pool = KVPool(count, layers, 16, heads, dim, torch.bfloat16, CUDA, pages.records)
    allocator = PageAllocator(count, backing=pages)
    held = allocator.allocate(count * 3 // 4)
    cache = pool.layer(1)
    numbers = torch.arange(count, device=DEVICE)
    slots = (
        torch.tensor(held, device=DEVICE)[:, None] * 16 + torch.arange(16, device=DEVICE)
    ).view(-1)
    k = numbers[held].repeat_interleave(16)[:, None, None].expand(-1, heads, dim).bfloat16()
    ops.write_kv(k.contiguous(), k.contiguous(), cache.k, cache.v, slots)
    allocator.free(held[count // 4 :])
    pages.rest(allocator)
    assert pages.num_pages < count // 2
    assert torch.equal(
        pool.pages[1 : count // 4, 1, 0, 0, 0, 0], numbers[1 : count // 4].bfloat16()
    )
    # Attention and gather over pages that have no memory: the filler.
    tables = torch.tensor([[count - 2], [count // 2], [1]], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([16, 16, 16], dtype=torch.int32, device=DEVICE)
    starts = torch.arange(4, dtype=torch.int32, device=DEVICE)
    q, out = torch.randn(2, 3, 2 * heads, dim, device=DEVICE, dtype=torch.bfloat16)
    ops.paged_attention(q, cache.k, cache.v, tables, lens, starts, out, dim**-0.5, 1)
    assert error() is None
    assert not bool(out[:2].any())
    torch.testing.assert_close(out[2], torch.ones_like(out[2]))
    # Writing there spoils nothing of what is held.
    bad = torch.tensor([(count - 2) * 16], device=DEVICE)
    one = torch.full((1, heads, dim), 9.0, device=DEVICE, dtype=torch.bfloat16)
    ops.write_kv(one, one, cache.k, cache.v, bad)
    assert error() is None
    assert torch.equal(
        pool.pages[1 : count // 4, 1, 0, 0, 0, 0], numbers[1 : count // 4].bfloat16()
    )
    ops.write_kv(one, one, cache.k, cache.v, bad + 32)
    assert error() is not None  # behind the pool
    # Growing again: new memory, the old contents.
    more = allocator.allocate(count // 2)
    moves = torch.tensor([[1, more[-1]]], device=DEVICE)
    pool.copy_within(moves)
    assert torch.equal(pool.records[more[-1]], pool.records[1])
    torch.cuda.synchronize()


def greedy(length):
    return SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_a_pool_allocated_whole_and_graphs_replay(dtype, monkeypatch):
    monkeypatch.setattr(elastic, "WINDOW", 10)
    prompts = prompts_of(40, 900, seed=7)
    found, mapped = [], []
    for on in (False, True):
        with LLM(
            qwen3(dtype), device="cuda", kv_cache_gib=0.5, max_num_seqs=48, elastic_kv=on,
            enable_prefix_caching=False,
        ) as llm:  # fmt: skip
            tokens = []
            for count in (2, 40, 2):
                outputs = llm.generate(prompts[:count], greedy(40), use_tqdm=False)
                tokens.append(tokens_of(outputs))
                mapped.append(llm.stats().get("kv_mapped_bytes_most"))
            found.append(tokens)
            assert llm.stats()["graph_steps"] > 0
            if on:
                assert llm.stats()["kv_mapped_bytes"] < 16 << 20
    assert found[0] == found[1]
    assert mapped[:3] == [None] * 3
    assert mapped[3] < mapped[4] / 4
    assert mapped[5] == mapped[4]


def test_graphs_replay_while_memory_comes_and_goes(monkeypatch):
    """One long sequence runs on while others make the pool grow and let it shrink."""
    monkeypatch.setattr(elastic, "WINDOW", 4)
    prompts = prompts_of(30, 400, seed=9)
    params = [greedy(300)] + [greedy(3 + 2 * i) for i in range(1, 30)]
    found = []
    for on in (False, True):
        with LLM(
            qwen3(torch.float32), device="cuda", kv_cache_gib=0.5, max_num_seqs=16, elastic_kv=on,
            enable_prefix_caching=False,
        ) as llm:  # fmt: skip
            seen = set()
            tokens = {}
            for output in llm.stream(prompts, params):
                tokens[output.request_id] = list(output.outputs[0].token_ids)
                seen.add(llm.stats().get("kv_mapped_bytes"))
            found.append(tokens)
    assert found[0] == found[1]
    assert len(seen) > 3


def test_with_tiers(monkeypatch):
    monkeypatch.setattr(engine, "swap_costs", lambda *args: SwapCosts())
    monkeypatch.setattr(elastic, "WINDOW", 5)
    model = models.build("llama").cuda()
    with LLM(model, kv_cache_gib=0.01, max_model_len=64, enforce_eager=True) as llm:
        gib = llm.engine.pool.page_bytes * PAGE_GIB
    prompts, params = work(200, seed=1)
    base = {"max_num_seqs": 8}
    expected, _ = run(model, prompts, params, kv_cache_gib=0.05, **base)
    config = {"kv_cache_gib": 14.5 * gib, "host_kv_gib": 24.5 * gib, **base}
    found, stats = run(model, prompts, params, elastic_kv=True, **config)
    assert found == expected
    assert stats["swapped_sequences"] > 0


def test_less_memory_than_planned(monkeypatch):
    monkeypatch.setattr(elastic, "RETRY_S", 0.001)
    prompts, model = prompts_of(40, 900, seed=7), qwen3(torch.float32)
    config = {"device": "cuda", "kv_cache_gib": 0.5, "max_num_seqs": 48}
    with LLM(model, **config) as llm:
        expected = tokens_of(llm.generate(prompts, greedy(40), use_tqdm=False))
    scarce(monkeypatch, 12)
    with LLM(qwen3(torch.float32), elastic_kv=True, **config) as llm:
        assert tokens_of(llm.generate(prompts, greedy(40), use_tqdm=False)) == expected
        assert llm.stats()["kv_growth_failures"] > 0


def test_the_ledger_agrees_with_the_driver():
    with LLM(qwen3(torch.bfloat16), device="cuda", kv_cache_gib=8.0, elastic_kv=True) as llm:
        table = llm.engine.memory_table()
        print(table)
        assert "mapped on demand" in table
        assert "KV filler" in table
