"""kv_cache_dtype "fp8" and "int8" on the GPU: beside the CPU, engine with and without graphs."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
from reference import relative_error

from torch_pd import LLM, EngineConfig, SamplingParams, patch_model

KINDS = ("fp8", "int8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(name, dtype, kind):
    """Prefill and a second pass; the same pages are quantised alike, but for values near a tie."""
    plain = models.build(name, dtype)
    ids = torch.randint(0, plain.config.vocab_size, (3, 60))
    with torch.no_grad():
        exact = plain.cuda()(ids.cuda()).logits.cpu()
    found, config = {}, EngineConfig(kv_cache_dtype=kind)
    for device in ("cpu", "cuda"):
        model = patch_model(models.build(name, dtype).to(device), config)
        first = model(ids[:, :59].to(device))
        rest = model(ids[:, 59:].to(device), past_key_values=first.past_key_values)
        found[device] = torch.cat([first.logits, rest.logits], 1).cpu()
    assert relative_error(found["cuda"], exact) < 0.08
    assert relative_error(found["cuda"], found["cpu"]) < 0.05
    assert not torch.equal(found["cuda"], exact)


@pytest.mark.parametrize("kind", KINDS)
def test_engine(kind):
    """Graphs and eager steps give the same tokens, alone and after prefixes were cached."""
    prompts = [
        {"prompt_token_ids": [(7 * i + j) % 60 + 3 for j in range(length)]}
        for i, length in enumerate((140, 20, 97, 64))
    ]
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    found = []
    for eager in (True, False):
        with LLM(
            models.build("llama").cuda(),
            kv_cache_dtype=kind,
            kv_cache_gib=0.01,
            max_num_seqs=8,
            enforce_eager=eager,
        ) as llm:
            for _ in range(2):
                outputs = llm.generate(prompts, params, use_tqdm=False)
                found.append([output.outputs[0].token_ids for output in outputs])
            assert llm.stats()["prefix_pages_hit"] > 0
            assert (llm.stats()["graph_steps"] == 0) == eager
    assert found[0] == found[2]
    assert found[1] == found[3]
