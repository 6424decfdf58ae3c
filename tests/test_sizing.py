"""Arithmetic of memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_pd.sizing import (
    GIB,
    KVShape,
    cpu_kv_bytes,
    fit_model_len,
    gpu_kv_bytes,
    most_pages,
    pages_of_budget,
)

QWEN3_32B = KVShape(num_layers=64, num_kv_heads=8, head_dim=128, itemsize=2, block_size=16)


def test_page_of_qwen3_32b_is_4_mib():
    assert QWEN3_32B.page_bytes == 4 << 20


@given(budget=st.integers(-(1 << 30), 1 << 40))
def test_pages_fill_the_budget(budget):
    if budget < 2 * QWEN3_32B.page_bytes:
        with pytest.raises(ValueError, match=r"kv_cache_gib=1 leaves .* 4,194,304 bytes a page"):
            pages_of_budget(QWEN3_32B, budget, "kv_cache_gib=1")
    else:
        pages = pages_of_budget(QWEN3_32B, budget, "kv_cache_gib=1")
        assert pages * QWEN3_32B.page_bytes <= budget < (pages + 1) * QWEN3_32B.page_bytes


def test_default_budgets():
    assert cpu_kv_bytes(100 * GIB) == 4 * GIB
    assert cpu_kv_bytes(5 * GIB) == 2 * GIB
    assert gpu_kv_bytes(free_bytes=60 * GIB, total_bytes=100 * GIB, share=0.9) == 48 * GIB


def test_model_len():
    assert fit_model_len(4096, None, 1025, 16) == (4096, None)
    assert fit_model_len(4096, 100, 1025, 16) == (100, None)
    length, remark = fit_model_len(4096, None, 11, 16)
    assert length == 160
    assert "160" in remark
    assert "4096" in remark
    with pytest.raises(ValueError, match="beyond the model's maximum of 4096"):
        fit_model_len(4096, 4097, 1025, 16)
    with pytest.raises(ValueError, match="10 pages x 16 = 160 tokens"):
        fit_model_len(4096, 161, 11, 16)


@given(st.integers(1, 100), st.integers(1, 1000), st.sampled_from([16, 32, 64]))
def test_most_pages_hold_all_rows(rows, length, block_size):
    pages = most_pages(rows, length, block_size)
    assert (pages - 1) * block_size >= rows * length
    assert (pages - 1) * block_size < rows * (length + block_size)
