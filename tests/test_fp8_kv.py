"""kv_cache_dtype "fp8", "int8": page records with scales, through engine, generate, both paths."""

import dataclasses
import math
from pathlib import Path

import models
import pytest
import torch
from reference import relative_error

from torch_pd import LLM, EngineConfig, SamplingParams, patch_model, unpatch_model
from torch_pd.kv.cache import BYTE_DTYPES, KVPool
from torch_pd.nn.patched import describe, kv_shape

FP8 = EngineConfig(kv_cache_dtype="fp8")
PASSAGES = Path(__file__).parent / "data" / "passages.txt"


def test_page_record():
    """Data, then the scales, in one record: 3 pages, 2 layers, 16 tokens, 4 heads of 8."""
    pool = KVPool(3, 2, 16, 4, 8, BYTE_DTYPES["fp8"], "cpu")
    data = 2 * 2 * 16 * 4 * 8
    assert pool.page_bytes == data + 4 * 2 * 2 * 16 * 4 == pool.records.shape[1]
    assert "x (8 x 1 + 4) bytes" in pool.shape.describe()
    base = pool.records.data_ptr()
    for index in range(2):
        layer = pool.layer(index)
        assert layer.k_scale is not None
        assert layer.v_scale is not None
        assert layer.k.shape == layer.v.shape == (3, 16, 4, 8)
        assert layer.k_scale.shape == layer.v_scale.shape == (3, 16, 4)
        for which, (values, scales) in enumerate(
            ((layer.k, layer.k_scale), (layer.v, layer.v_scale))
        ):
            part = 2 * index + which
            assert values.data_ptr() == base + part * 16 * 4 * 8
            assert scales.data_ptr() == base + data + part * 4 * 16 * 4
            assert values.stride(0) == 4 * scales.stride(0) == pool.page_bytes
    assert not pool.records[0].any()


def test_copies_take_the_scales_along():
    pool = KVPool(4, 1, 16, 2, 8, BYTE_DTYPES["fp8"], "cpu")
    pool.records.copy_(torch.randint(0, 255, pool.records.shape))
    before = pool.records.clone()
    pool.copy_within(torch.tensor([[1, 3]]))
    assert torch.equal(pool.records[3], before[1])
    assert torch.equal(pool.records[:3], before[:3])


@pytest.mark.parametrize(("name", "path"), [("qwen3", "fused"), ("gpt_neox", "attention")])
def test_logits(name, path):
    """Close to unquantised ones, in two passes; not equal, or nothing would be quantised."""
    model = models.build(name)
    ids = torch.randint(0, model.config.vocab_size, (2, 40))
    with torch.no_grad():
        want = model(ids).logits
    patch_model(model, FP8)
    assert path in {item.path for item in describe(model)}
    plain = kv_shape(model, kv_cache_dtype="auto")
    shape = kv_shape(model)
    assert plain == dataclasses.replace(shape, itemsize=4, scaled=False)
    assert shape.page_bytes == plain.page_bytes // 4 * (shape.head_dim + 4) // shape.head_dim
    first = model(ids[:, :25])
    rest = model(ids[:, 25:], past_key_values=first.past_key_values)
    got = torch.cat([first.logits, rest.logits], 1)
    assert 1e-4 < relative_error(got, want) < 0.08
    unpatch_model(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("name", ["qwen3", "gpt_neox"])
def test_int8_rounds_less(name):
    model = models.build(name)
    ids = torch.randint(0, model.config.vocab_size, (2, 40))
    with torch.no_grad():
        want = model(ids).logits
    off = {}
    for kind in ("fp8", "int8"):
        patch_model(model, EngineConfig(kv_cache_dtype=kind))
        assert kv_shape(model).scaled
        off[kind] = relative_error(model(ids).logits, want)
        unpatch_model(model)
    assert 1e-4 < off["int8"] < off["fp8"] < 0.08


@pytest.fixture(scope="module", params=["fp8", "int8"])
def llm(tiny, request):
    with LLM(tiny, kv_cache_gib=0.01, kv_cache_dtype=request.param) as llm:
        yield llm


GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PROMPTS = [[1, 2, 3], list(range(100, 170)), [5] * 33, list(range(100, 164))]


def tokens_of(outputs):
    return [list(choice.token_ids) for output in outputs for choice in output.outputs]


def test_same_tokens_whatever_the_batch(llm):
    """Alone, together, and with prefixes that are found in the cache."""
    together = tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    hits = llm.stats()["prefix_pages_hit"]
    assert [tokens_of(llm.generate([p], GREEDY, use_tqdm=False))[0] for p in PROMPTS] == together
    assert llm.stats()["prefix_pages_hit"] > hits


def test_forks(llm):
    params = SamplingParams(temperature=0.8, n=3, seed=4, max_tokens=20, ignore_eos=True)
    found = tokens_of(llm.generate([PROMPTS[2]], params, use_tqdm=False))
    assert len({tuple(tokens) for tokens in found}) == 3
    again = llm.generate([PROMPTS[0], PROMPTS[2]], params, use_tqdm=False)
    assert tokens_of(again[1:]) == found


def test_more_tokens_in_the_same_memory(llm, tiny):
    """Two layers of two heads of 8: 12 instead of 32 bytes a head and token."""
    with LLM(tiny, kv_cache_gib=0.01) as plain:
        ratio = llm.stats()["kv_tokens"] / plain.stats()["kv_tokens"]
    assert ratio == pytest.approx(32 / 12, rel=0.01)


def test_pages_in_host_memory():
    """Records move with their scales: swapped, read in place, and gathered for prefill."""
    model = models.build("llama")
    prompts = [
        {"prompt_token_ids": [(7 * i + j) % 60 + 3 for j in range(length)]}
        for i, length in enumerate((140, 20, 97, 60))
    ]
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    config = {"kv_cache_dtype": "fp8", "max_model_len": 160, "max_num_batched_tokens": 96}
    with LLM(model, kv_cache_gib=0.01, **config) as llm:
        want = tokens_of(llm.generate(prompts, params, use_tqdm=False))
        gib = llm.engine.pool.page_bytes / (1 << 30)
    with LLM(model, kv_cache_gib=7.5 * gib, host_kv_gib=30.5 * gib, **config) as llm:
        assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == want
        assert llm.stats()["moved_out_bytes"] > 0


def test_generate(llm, tiny):
    """Hugging Face's generate on the pages: the engine's tokens; beams share and copy pages."""
    from transformers import AutoModelForCausalLM

    want = tokens_of(llm.generate(PROMPTS[1:2], GREEDY, use_tqdm=False))
    config = EngineConfig(kv_cache_dtype=llm.config.kv_cache_dtype)
    model = patch_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    ids = torch.tensor(PROMPTS[1:2])
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    assert model.generate(ids, **options)[:, ids.shape[1] :].tolist() == want
    assert model.generate(ids, **options, num_beams=3).shape == (1, ids.shape[1] + 20)


def test_perplexity(smollm2):
    """Rounding keys and values to 4 bits of mantissa hardly matters for what the model predicts."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    text = PASSAGES.read_text()
    perplexity = {}
    for kind in ("auto", "fp8"):
        with LLM(
            smollm2, dtype="bfloat16", kv_cache_dtype=kind, max_model_len=2048, max_num_seqs=1
        ) as llm:
            (output,) = llm.generate([text], params, use_tqdm=False)
        found = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        perplexity[kind] = math.exp(-sum(found) / len(found))
    assert 10 < perplexity["auto"] < 25
    # One token of the text differs by 30%, so 1,200 of them tell a change to about 1%.
    assert abs(perplexity["fp8"] / perplexity["auto"] - 1) < 0.02, perplexity
