"""LLM over tiers on a GPU: pages move by copy engine beside the kernels that use the pool."""

import models
import pytest
from test_llm_tiers import PAGE_GIB, check_larger_than_the_pool, run, work

from torch_pd import LLM
from torch_pd.engine import engine
from torch_pd.engine.swapper import SwapCosts


@pytest.fixture(scope="module")
def model():
    return models.build("llama").cuda()


@pytest.fixture(scope="module")
def page_bytes(model):
    with LLM(model, kv_cache_gib=0.01, max_model_len=64, enforce_eager=True) as llm:
        return llm.engine.pool.page_bytes


@pytest.mark.parametrize("caching", [False, True])
def test_tiny_pools_give_the_same_tokens(model, page_bytes, tmp_path, caching, monkeypatch):
    # Of a model this small, computing again would always be cheaper.
    monkeypatch.setattr(engine, "swap_costs", lambda *args: SwapCosts())
    prompts, params = work(300, seed=int(caching))
    base = {"enable_prefix_caching": caching, "max_num_seqs": 8}
    expected, _ = run(model, prompts, params, kv_cache_gib=0.05, **base)
    gib = page_bytes * PAGE_GIB
    config = {"kv_cache_gib": 14.5 * gib, "host_kv_gib": 24.5 * gib, **base}
    if caching:
        config |= {"disk_kv_gib": 60.5 * gib, "disk_kv_path": str(tmp_path)}
    outputs, stats = run(model, prompts, params, **config)
    assert outputs == expected
    assert stats["swapped_sequences"] > 0
    assert stats["moved_in_bytes"] > 0
    assert stats["graph_steps"] > 0
    assert stats["disk_errors"] == 0


def test_a_sequence_larger_than_the_gpu_pool(model, page_bytes):
    check_larger_than_the_pool(model, page_bytes)
