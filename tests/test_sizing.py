"""Arithmetic of memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_pd.sizing import (
    GIB,
    KVShape,
    Ledger,
    cpu_kv_bytes,
    fit_model_len,
    most_pages,
    pages_of_budget,
)

QWEN3_32B = KVShape(num_layers=64, num_kv_heads=8, head_dim=128, itemsize=2, block_size=16)


def test_page_of_qwen3_32b_is_4_mib():
    assert QWEN3_32B.page_bytes == 4 << 20


@given(
    layers=st.integers(1, 100),
    heads=st.sampled_from([1, 2, 4, 5, 8]),
    dim=st.sampled_from([64, 80, 128]),
    scaled=st.booleans(),
)
def test_pages_do_not_lie_on_the_same_banks(layers, heads, dim, scaled):
    shape = KVShape(layers, heads, dim, 1 if scaled else 2, 16, scaled)
    used = layers * 2 * 16 * heads * (dim * shape.itemsize + 4 * scaled)
    assert used == shape.data_bytes + shape.scale_bytes
    assert shape.page_bytes == used + 1024 * (used % (320 << 10) == 0)
    assert ("+ 1,024" in shape.describe()) == (shape.page_bytes > used)


def test_pages_of_80_layers():
    """Llama-3.1-70B and Qwen2.5-72B."""
    shape = KVShape(num_layers=80, num_kv_heads=8, head_dim=128, itemsize=2, block_size=16)
    assert shape.page_bytes == (5 << 20) + 1024


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


def ledger(**changes):
    lines = {"weights": 15 * GIB, "activations": 2 * GIB, "graphs": 0, "other processes": 0}
    return Ledger(total=80 * GIB, share=0.5, lines={**lines, **changes.pop("lines", {})}, **changes)


def test_a_ledger_gives_the_rest_to_the_pages():
    assert ledger().left == 23 * GIB
    ledger().check(23 * GIB, QWEN3_32B)
    table = ledger().table(22 * GIB, "5,632 pages", used=40 * GIB)
    assert "80.00 GiB x 0.5 = 40.00 GiB" in table
    assert "15.00 GiB  weights" in table
    assert "graphs" not in table
    assert "22.00 GiB  KV pages (5,632 pages)" in table
    assert "1.00 GiB  not used" in table
    assert "+1.00 GiB  more than this in use by the driver's count (+2.50% of the budget)" in table


@pytest.mark.parametrize(
    ("given", "setting", "kv_gib", "message"),
    [
        ({}, "kv_cache_gib=30", 30, r"= 23.00 GiB for KV pages, but kv_cache_gib=30 need 30.*"),
        (
            {},
            "kv_cache_gib=30",
            30,
            "give kv_cache_gib=23, or give gpu_memory_utilization=0.588",
        ),
        ({"lines": {"weights": 40 * GIB}}, None, 1 / 128, r"40.00 - activations 2.00 = -2.00 GiB"),
        ({"lines": {"weights": 90 * GIB}}, None, 1 / 128, "use a larger GPU or a smaller model"),
        (
            {"lines": {"other processes": 25 * GIB}, "others": ("python (pid 7)",)},
            None,
            1 / 128,
            r"other processes 25.00 = -2.00 GiB.*utilization=0.526, or end python \(pid 7\)",
        ),
        ({"lines": {"activations": 25 * GIB}}, None, 1 / 128, "lower max_num_batched_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(given, setting, kv_gib, message):
    with pytest.raises(ValueError, match=message):
        ledger(**given).check(int(kv_gib * GIB), QWEN3_32B, setting)


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
