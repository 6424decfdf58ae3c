"""Weights on a GPU: the same bits as on the CPU, whichever way they come."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models

from torch_pd.config import EngineConfig
from torch_pd.nn.pooled_model import load_pooled
from torch_pd.weights import checkpoint
from torch_pd.weights.loader import load_model

# Also chunks far smaller than a tensor, so that the two buffers of a thread take turns.
CHUNKS = [1 << 10, checkpoint.CHUNK_BYTES]


def both(path, dtype, load_format="auto"):
    """The model on the CPU and on the GPU."""
    return [
        load_model(path, dtype=dtype, load_format=load_format, device=device, seed=3)
        for device in ("cpu", "cuda")
    ]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3_partial"])
def test_checkpoint(name, dtype, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk)
    models.build(name).save_pretrained(tmp_path)
    cpu, gpu = both(tmp_path, dtype)
    assert all(p.is_cuda for p in [*gpu.parameters(), *gpu.buffers()])
    for key, value in cpu.state_dict().items():
        assert torch.equal(gpu.state_dict()[key].cpu(), value), key
    buffers = dict(gpu.named_buffers())
    assert all(torch.equal(buffers[key].cpu(), value) for key, value in cpu.named_buffers())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_dummy(name, tmp_path):
    models.make_config(name).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        cpu, gpu = both(tmp_path, dtype, "dummy")
        for key, value in cpu.state_dict().items():
            assert torch.equal(gpu.state_dict()[key].cpu(), value), key


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_pools(name, chunk, load_format, tmp_path, monkeypatch):
    """Row and column shards; the twin's check runs on the GPU."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk)
    models.build(name).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(EngineConfig(), dtype=dtype, load_format=load_format)
        for rank in range(3):
            (one, cpu), (two, gpu) = (
                load_pooled(tmp_path, config, rank, 3, device) for device in ("cpu", "cuda")
            )
            for a, b in zip(cpu.layers, gpu.layers, strict=True):
                for field in dataclasses.fields(a):
                    want, have = getattr(a, field.name), getattr(b, field.name)
                    assert want is None if have is None else torch.equal(have.cpu(), want)
            assert torch.equal(gpu.lm_head.cpu(), cpu.lm_head)
            assert torch.equal(gpu.embedding.cpu(), cpu.embedding)
            for key, value in one.named_parameters():
                own = two.get_parameter(key)
                assert own.is_meta if value.is_meta else torch.equal(own.cpu(), value)


def test_peak_memory_is_the_model(tmp_path):
    """No second copy on the device, of the merged matrices neither."""
    config = models.make_config("qwen3")
    config.update({"hidden_size": 1024, "intermediate_size": 8192, "vocab_size": 8192})
    config.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32", load_format="dummy", device="cuda", seed=0)
    model.save_pretrained(tmp_path)
    nbytes = sum(p.nbytes for p in model.parameters())
    del model
    for load_format in ("auto", "dummy"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        load_model(tmp_path, dtype="float32", load_format=load_format, device="cuda", seed=0)
        grown = torch.cuda.max_memory_allocated() - before
        assert grown < nbytes + (80 << 20 if load_format == "dummy" else 1 << 20)
