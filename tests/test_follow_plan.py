"""weights="auto": what follows from the plan for the GPUs at hand, which are pretended here."""

import json
from types import SimpleNamespace

import pytest
import torch

from torch_pd.config import EngineConfig
from torch_pd.engine.sharing import follow_plan
from torch_pd.sizing import GIB

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128,
    "num_key_value_heads": 8, "vocab_size": 151936, "dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
LARGE = {"hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64}
SMALL = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}


@pytest.fixture
def world(monkeypatch):
    def pretend(gib):
        properties = SimpleNamespace(total_memory=gib * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return SimpleNamespace(
            size=4,
            device=torch.device("cuda", 0),
            all_gather=lambda value: [value] * 4,
            unlinked=(),
        )

    return pretend


def folder(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("shape", "layers", "gib", "weights"),
    [(LARGE, 64, 60, "pooled"), (LARGE, 64, 80, "pooled"), (SMALL, 28, 80, "resident")],
)
def test_shared_where_the_plan_says_so(tmp_path, world, shape, layers, gib, weights):
    path = folder(tmp_path, **QWEN3, **shape, num_hidden_layers=layers)
    config = EngineConfig(load_format="dummy")
    assert follow_plan(path, config, world(gib)).weights == weights


@pytest.mark.parametrize(("gib", "weights"), [(60, "pooled"), (80, "resident")])
def test_without_links_only_what_does_not_fit_is_shared(tmp_path, world, gib, weights):
    path = folder(tmp_path, **QWEN3, **LARGE, num_hidden_layers=64)
    pretended = world(gib)
    pretended.unlinked = (1,)
    assert follow_plan(path, EngineConfig(load_format="dummy"), pretended).weights == weights


def test_what_fits_in_no_way_is_refused_later(tmp_path, world, caplog):
    path = folder(tmp_path, **QWEN3, **LARGE, num_hidden_layers=64)
    config = follow_plan(path, EngineConfig(load_format="dummy"), world(16))
    assert config.weights == "resident"
    assert "does not fit on 4 x 16 GiB" in caplog.text


def test_a_model_that_cannot_be_shared_is_replicated(tmp_path, world, caplog):
    path = folder(
        tmp_path, architectures=["CohereForCausalLM"], model_type="cohere", hidden_size=8192,
        intermediate_size=22528, num_hidden_layers=40, num_attention_heads=64, vocab_size=256000,
    )  # fmt: skip
    config = follow_plan(path, EngineConfig(load_format="dummy", dtype="bfloat16"), world(76))
    assert config.weights == "resident"
    assert "not fused" in caplog.text


def test_nothing_to_plan(tmp_path, world):
    config = EngineConfig()
    alone = world(80)
    alone.size = 1
    assert follow_plan(tmp_path, config, alone) is config
