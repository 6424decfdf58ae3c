"""load_model: the same weights as transformers reads, straight to their place; dummy weights."""

import json
import logging

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from torch_pd.nn.patch import patch_model, unpatch_model
from torch_pd.weights import checkpoint as checkpoint_module
from torch_pd.weights.checkpoint import Checkpoint
from torch_pd.weights.dummy import Dummy
from torch_pd.weights.loader import load_model, load_tokenizer, read_config
from torch_pd.weights.skeleton import build_skeleton, materialise
from torch_pd.weights.slices import Slice

IDS = torch.tensor([[5, 9, 33, 2, 71, 8, 90, 14]])
BY_TRANSFORMERS = {
    "mixtral": "renamed or merged",
    "qwen3_moe": "renamed or merged",
    "qwen2_moe": "renamed or merged",
    "gpt_neox": "renamed or merged",
    "olmoe_clip": "renamed or merged",
    "deepseek_v3": "renamed or merged",
}
"""Name -> why it is not read directly."""


def load(path, dtype="auto", load_format="auto", seed=0):
    return load_model(path, dtype=dtype, load_format=load_format, device="cpu", seed=seed)


def way(caplog) -> str:
    """The last line of the loader's log."""
    return [r.getMessage() for r in caplog.records if r.name == "torch_pd.weights.loader"][-1]


@pytest.fixture
def save(tmp_path):
    """Saves a model of models.py, in several files if asked to."""

    def save(name, **options):
        models.build(name).save_pretrained(tmp_path, **options)
        return tmp_path

    return save


@pytest.mark.parametrize("name", models.ALL)
def test_equals_from_pretrained(name, save, caplog):
    caplog.set_level(logging.INFO)
    path = save(name)
    ours = load(path)
    assert BY_TRANSFORMERS.get(name, "straight to their place") in way(caplog)
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    assert not any(t.is_meta for t in [*ours.parameters(), *ours.buffers()])
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(theirs_state)
    assert all(torch.equal(ours_state[key], theirs_state[key]) for key in ours_state)
    buffers = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert torch.equal(buffer, buffers[key]), key
        assert buffer.dtype == buffers[key].dtype
    assert {k: p.requires_grad for k, p in ours.named_parameters()} == {
        k: p.requires_grad for k, p in theirs.named_parameters()
    }
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not ours.training
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_conversion(name, dtype, save, caplog):
    caplog.set_level(logging.INFO)
    path = save(name)
    ours = load(path, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    stays = name == "gpt_oss" and dtype == "float16"
    assert ("stay in float32" if stays else "straight") in way(caplog)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("chunk", [64, 1000, 8 << 20])
def test_several_files_and_small_chunks(chunk, save, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", chunk)
    path = save("llama", max_shard_size="50KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    want = models.build("llama").state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        ours = load(path, str(dtype).removeprefix("torch.")).state_dict()
        assert all(torch.equal(ours[key], want[key].to(dtype)) for key in want)
    assert "straight" in way(caplog)


def test_merged_linears_are_made_in_place(save):
    model = load(save("llama"))
    layer = model.model.layers[1]
    whole = layer.self_attn.q_proj.weight.untyped_storage()
    before = whole.data_ptr(), layer.mlp.up_proj.weight.data_ptr()
    want = model(IDS).logits
    patch_model(model)
    fused = layer._torch_pd
    assert fused.attention.qkv.weight.data_ptr() == before[0]
    assert fused.mlp.gate_up.weight[models._SIZES["intermediate_size"]].data_ptr() == before[1]
    assert fused.attention.qkv.bias.shape == (10 * 8,)
    assert torch.equal(fused.attention.qkv.weight[48:64], layer.self_attn.k_proj.weight)
    unpatch_model(model)
    assert torch.equal(model(IDS).logits, want)
    for parameter in layer.self_attn.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


# Ties.


def test_tied_weights_stay_one(save):
    model = load(save("qwen2"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("same", [True, False])
def test_tied_by_config_but_stored_twice(same, save, caplog):
    caplog.set_level(logging.INFO)
    path = save("qwen2")
    tensors = load_file(path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head if same else head.neg()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = load(path), AutoModelForCausalLM.from_pretrained(path)
    assert ("straight" if same else "lm_head.weight differ") in way(caplog)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == same


def test_only_the_other_name_of_tied_weights_is_stored(save, caplog):
    caplog.set_level(logging.INFO)
    path = save("qwen2")
    tensors = load_file(path / "model.safetensors")
    want = load(path)(IDS).logits
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load(path)(IDS).logits, want)
    assert "straight" in way(caplog)


# Where transformers has to help, and errors.


def test_checkpoint_of_the_inner_model(save, caplog):
    """Names without their prefix: transformers knows how."""
    caplog.set_level(logging.INFO)
    path = save("qwen2")
    want = load(path)(IDS).logits
    tensors = load_file(path / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load(path)(IDS).logits, want)
    assert "stored under another name" in way(caplog)


def test_missing_and_misshapen_tensors_are_named(save):
    path = save("llama")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    whole = tensors.pop(name)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"LlamaForCausalLM: {name} is missing"):
        load(path)
    tensors[name] = whole[:-1].contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} is \[71, 48\] instead of \[72, 48\]"):
        load(path)


def test_damaged_folders(save, tmp_path):
    path = save("llama", max_shard_size="50KB")
    file = sorted(path.glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(data[:-7])
    with pytest.raises(ValueError, match=f"{file.name}.*not a complete safetensors file"):
        load(path)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}' is named in .*index.json but missing"):
        load(path)
    for index in ({"weights": 1}, [], {"weight_map": {"a": 3}}):
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="no index of safetensors"):
            load(path)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", "{", "config.json' cannot be read as a model config"),
        ("config.json", "[1]", "config.json' cannot be read as a model config"),
        ("config.json", {"dtype": "float99"}, "config.json' cannot be read as a model config"),
        ("config.json", {"num_key_value_heads": 0}, "cannot build 'llama'.*ZeroDivisionError"),
        ("config.json", {"pad_token_id": 10**6}, "cannot build 'llama'.*AssertionError"),
        ("generation_config.json", "[]", "generation_config.json' cannot be read"),
        ("config.json", {"num_attention_heads": 5}, "not a multiple of the number of attention"),
        ("config.json", {"hidden_act": "nonesuch"}, "cannot build 'llama' .*KeyError: 'nonesuch'"),
        ("config.json", {"dtype": 5}, "cannot build 'llama' from its config.json"),
        ("generation_config.json", "{", "generation_config.json' cannot be read"),
        ("tokenizer.json", "{", "the tokenizer of .* cannot be read"),
    ],
)
def test_damaged_json(save, file, change, words):
    path = save("llama") / file
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(change)
    read = load_tokenizer if file == "tokenizer.json" else load
    with pytest.raises(ValueError, match=words):
        read(path.parent)


def test_code_and_quantisation_that_nobody_here_knows(save):
    path = save("llama")
    file = path / "config.json"
    config = json.loads(file.read_text())
    for change, words in (
        ({"model_type": "new", "auto_map": {"AutoConfig": "new.Config"}}, "code comes with the"),
        ({"quantization_config": {"quant_method": "new"}}, "quant_method='new'.*was made from"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=words):
            load(path)
    # Code that transformers has an own version of is not needed.
    file.write_text(json.dumps(config | {"auto_map": {"AutoConfig": "new.Config"}}))
    load(path)


def test_a_module_without_values_is_refused(save):
    with pytest.raises(ValueError, match=r"no values of model\.embed_tokens\.weight and"):
        load(models.build("llama").to("meta"))


def test_a_failing_read_ends_the_load(save, monkeypatch):
    path = save("llama")

    def preadv(*args):
        raise OSError("input/output error")

    monkeypatch.setattr(checkpoint_module.os, "preadv", preadv)
    with pytest.raises(OSError, match="input/output error"):
        load(path)


def test_slices_of_rows_and_columns(save):
    path = save("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    whole = load_file(path / "model.safetensors")[name]
    wide = torch.zeros(40, 100)
    target = wide[1:31, 3:23]
    Checkpoint(path).fill([Slice(name, (48, 72), (10, 40), (50, 70), target)])
    assert torch.equal(target, whole[10:40, 50:70])
    target.zero_()
    assert not wide.any()


# Dummy weights.


@pytest.mark.parametrize("name", [*models.FUSED, "gpt_oss", "gpt2", "qwen3_moe"])
def test_dummy(name, tmp_path):
    models.make_config(name).save_pretrained(tmp_path)
    model = load(tmp_path, "float32", "dummy", seed=7)
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        assert parameter.std() > 0.02, key
        if parameter.dim() >= 2:
            std = float(parameter.detach().std() * parameter.shape[-1] ** 0.5)
            assert 0.9 < std < 1.1, key
            assert len(parameter.unique()) > 0.99 * parameter.numel()
        elif "norm" in key and not key.endswith("bias"):
            centre = 0.0 if "emma" in type(model).__name__ else 1.0
            assert abs(parameter.mean() - centre) < 0.2, key
    logits = model(IDS).logits
    assert logits.isfinite().all()
    # Every token counts, so wrong output shows.
    changed = IDS.clone()
    changed[0, 0] = 6
    assert (model(changed).logits[0, -1] - logits[0, -1]).abs().max() > 1e-3
    again = load(tmp_path, "float32", "dummy", seed=7).state_dict()
    other = load(tmp_path, "float32", "dummy", seed=8).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, again[key])
        assert not torch.equal(value, other[key])


def test_dummy_slices_are_those_of_the_whole():
    whole = torch.empty(300, 700, dtype=torch.bfloat16)
    Dummy(3).fill([Slice.whole("a", whole)])
    for rows, cols in (((0, 300), (100, 333)), ((17, 18), (0, 700)), ((5, 290), (699, 700))):
        part = torch.empty(rows[1] - rows[0], cols[1] - cols[0], dtype=torch.bfloat16)
        Dummy(3).fill([Slice("a", (300, 700), rows, cols, part)])
        assert torch.equal(part, whole[slice(*rows), slice(*cols)])
    # Rows and columns are as independent as those of normal noise.
    values = torch.linalg.svdvals(whole.float() * 700**0.5)
    assert values[0] < 1.05 * (300**0.5 + 700**0.5)
    assert values[-1] > 0.9 * (700**0.5 - 300**0.5)


def test_skeleton_needs_no_memory_for_weights(tmp_path):
    """A model far larger than this machine: buffers right, parameters on meta."""
    config = models.make_config("qwen3")
    config.update({"hidden_size": 1 << 13, "intermediate_size": 1 << 17, "num_hidden_layers": 40})
    config.layer_types = ["full_attention"] * 40
    config.save_pretrained(tmp_path)
    model = build_skeleton(read_config(tmp_path), torch.bfloat16)
    assert sum(p.nbytes for p in model.parameters()) > 1 << 37
    assert all(p.is_meta for p in model.parameters())
    small = build_skeleton(models.make_config("qwen3"), torch.bfloat16)
    assert torch.equal(model.model.rotary_emb.inv_freq, small.model.rotary_emb.inv_freq)
    names = ["model.norm.weight"]
    materialise(model, "cpu", names)
    assert [n for n, p in model.named_parameters() if not p.is_meta] == names
