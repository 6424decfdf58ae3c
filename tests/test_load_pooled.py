"""load_pooled: the shards of all ranks are the model together, and each rank reads only its own."""

import subprocess
import sys
import textwrap
import weakref

import models
import pytest
import torch
from reference import relative_error
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from torch_pd.config import EngineConfig
from torch_pd.nn import twin
from torch_pd.nn.patched import describe, forward_packed, new_pool
from torch_pd.nn.pooled import pool_model
from torch_pd.nn.pooled_model import load_pooled
from torch_pd.nn.probe import batch_of
from torch_pd.weights.checkpoint import Checkpoint
from torch_pd.weights.layout import LINEARS
from torch_pd.weights.loader import load_model
from torch_pd.weights.skeleton import build_skeleton
from torch_pd.weights.source import Resident


def config(**changes) -> EngineConfig:
    return EngineConfig(weights="pooled", **changes)


def load_all(path, size, **changes):
    """Models and pools of all ranks, one after the other."""
    return [load_pooled(path, config(**changes), rank, size, "cpu") for rank in range(size)]


def whole(pools, linear, layer=0):
    """A matrix put together by the piece table."""
    layout = pools[0].layout
    matrix = torch.full(layout.dims.shape(linear), float("nan"), dtype=pools[0].dtype)
    for piece, pool in zip(layout.pieces(linear, layer), pools, strict=True):
        matrix[slice(*piece.rows), slice(*piece.cols)] = pool.view(piece)
    return matrix


def parts(pools, linear, layer, merged):
    """A merged matrix (or its bias) in the order of a checkpoint: q, k, v or gate, up."""
    layout, blocks, at = pools[0].layout, {}, 0
    for owner in range(layout.size):
        for segment in layout.segments(linear, layer, owner):
            rows = segment.rows[1] - segment.rows[0]
            blocks.setdefault(segment.part, []).append(merged[at : at + rows])
            at += rows
    return torch.cat([torch.cat(rows) for rows in blocks.values()])


def stored(layer: nn.Module, names, own="weight"):
    """Parameters of the reference's modules with these names, one behind the other."""
    found = [m for n, m in layer.named_modules() if n.split(".")[-1] in names]
    tensors = [getattr(module, own) for module in found]
    return None if tensors[0] is None else torch.cat(list(tensors))


def assert_is_the_model(models_, pools, reference):
    """Every linear, bias and resident tensor, bit for bit."""
    for layer, module in enumerate(reference.model.layers):
        rebuilt = {linear: whole(pools, linear, layer) for linear in LINEARS}
        for linear, names in (
            ("qkv", ("q_proj", "k_proj", "v_proj", "qkv_proj")),
            ("gate_up", ("gate_proj", "up_proj", "gate_up_proj")),
        ):
            assert torch.equal(parts(pools, linear, layer, rebuilt[linear]), stored(module, names))
            bias = stored(module, names, "bias")
            for pool in pools:
                shard = pool.layers[layer]
                full, mine = (getattr(shard, f"{k}{linear}_bias") for k in ("full_", ""))
                if bias is None:
                    assert full is None
                    assert mine is None
                    continue
                assert torch.equal(parts(pools, linear, layer, full), bias)
                assert mine.shape[0] == getattr(shard, linear).shape[0]
        for linear, name in (("o", "o_proj"), ("down", "down_proj")):
            assert torch.equal(rebuilt[linear], stored(module, [name]))
            bias = stored(module, [name], "bias")
            for pool in pools:
                ours = getattr(pool.layers[layer], f"{linear}_bias")
                assert ours is None if bias is None else torch.equal(ours, bias)
    assert torch.equal(whole(pools, "lm_head"), reference.lm_head.weight)
    assert torch.equal(whole(pools, "embedding"), reference.model.embed_tokens.weight)
    buffers = dict(reference.named_buffers())
    for model, pool in zip(models_, pools, strict=True):
        assert (pool.lm_head is pool.embedding) == pool.layout.dims.tied
        own = {n: p for n, p in model.named_parameters() if not p.is_meta}
        assert all(torch.equal(p, reference.get_parameter(n)) for n, p in own.items())
        assert all(p.is_meta == (p.dim() == 2) for p in model.parameters())
        assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
        assert model.generation_config.to_dict() == reference.generation_config.to_dict()
        assert {p.path for p in describe(model) if "layers." in p.name} == {"fused"}


def assert_same_linears(one, two):
    for a, b in zip(one.layers, two.layers, strict=True):
        assert all(torch.equal(getattr(a, linear), getattr(b, linear)) for linear in LINEARS)
    assert torch.equal(one.lm_head, two.lm_head)
    assert torch.equal(one.embedding, two.embedding)


@pytest.mark.parametrize("name", models.FUSED)
def test_shards_are_the_checkpoint(name, tmp_path):
    models.build(name).save_pretrained(tmp_path, max_shard_size="60KB")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    size = 3 if name in ("llama", "phi3") else 2
    assert_is_the_model(*zip(*load_all(tmp_path, size), strict=True), reference)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {}),
        (3, {"weight_layout": "layer"}),
        (4, {"weight_replicas": 2}),
        (3, {"param_ranks": (0, 2)}),
        (2, {"dtype": "bfloat16"}),
    ],
)
def test_layouts(size, changes, tmp_path):
    models.build("llama").save_pretrained(tmp_path)
    dtype = getattr(torch, changes.get("dtype", "float32"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    loaded, pools = zip(*load_all(tmp_path, size, **changes), strict=True)
    width = size // changes.get("weight_replicas", 1)
    for first in range(0, size, width):
        group = slice(first, first + width)
        assert pools[first].layout.ranks == tuple(range(first, first + width))
        assert_is_the_model(loaded[group], pools[group], reference)
    assert pools[0].dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("name", models.FUSED)
def test_a_loaded_model_computes_with_its_shards(name, tmp_path):
    """The structure that was found on meta, run over the joined shards, is transformers' model."""
    models.build(name).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    loaded = load_all(tmp_path, 3)
    model = loaded[0][0]
    pool_model(model, loaded[0][1], source=Resident([pool for _, pool in loaded]))
    lengths = [33, 1, 20]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, models.VOCAB, (n,), generator=generator) for n in lengths]
    batch = batch_of([0, 0, 0], [16, 1, 16], torch.device("cpu"))
    pages = new_pool(model, 4)
    ids = torch.cat([prompt[:16] for prompt in prompts])
    positions = torch.cat([torch.arange(min(n, 16)) for n in lengths])
    got = forward_packed(model, pages, batch, ids, positions, torch.arange(33))
    want = torch.cat([reference(prompt[None, :16]).logits[0] for prompt in prompts])
    assert relative_error(got, want) < 1e-4


def test_smollm2_on_four_ranks(smollm2):
    """Three head groups on four ranks, tied embeddings."""
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    loaded, pools = zip(*load_all(smollm2, 4, dtype="bfloat16"), strict=True)
    assert pools[0].split[0].kv_heads == (1, 1, 1, 0)
    assert pools[3].layers[0].qkv.shape == (0, 576)
    assert_is_the_model(loaded, pools, reference)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3", "phi3"])
def test_dummy_ranks_hold_what_one_process_would(name, tmp_path):
    models.make_config(name).save_pretrained(tmp_path)
    reference = load_model(tmp_path, dtype="auto", load_format="dummy", device="cpu", seed=5)
    loaded = load_all(tmp_path, 3, load_format="dummy", seed=5)
    assert loaded[0][1].dtype == torch.bfloat16
    assert_is_the_model(*zip(*loaded, strict=True), reference)
    made = load_pooled(models.make_config(name), config(load_format="dummy", seed=5), 1, 3, "cpu")
    assert_same_linears(made[1], loaded[1][1])


def test_given_memory_is_used(tmp_path):
    models.build("llama").save_pretrained(tmp_path)
    given = []

    def allocate(nbytes):
        given.append(torch.zeros(nbytes + 512, dtype=torch.uint8))
        return given[0]

    _, pool = load_pooled(tmp_path, config(), 1, 2, "cpu", allocate)
    _, other = load_pooled(tmp_path, config(), 1, 2, "cpu")
    assert pool.arena is given[0]
    assert len(given) == 1
    assert_same_linears(pool, other)


PEAK = """
import sys
import torch
from transformers import Qwen3Config
from torch_pd.config import EngineConfig
from torch_pd.nn.pooled_model import load_pooled

def peak():  # bytes this process has had at most
    status = dict(l.split(":", 1) for l in open("/proc/self/status").read().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024

path, small, size = sys.argv[1:]
torch.set_num_threads(1)
config = EngineConfig()
load_pooled(small, config, 1, 2, "cpu")  # what is imported and allocated once
open("/proc/self/clear_refs", "w").write("5")  # the high water mark starts again
before = peak()
_, pool = load_pooled(path, config, 1, int(size), "cpu")
print(peak() - before, pool.arena.nbytes)
"""


def test_peak_memory_is_little_more_than_the_shard(tmp_path):
    """At most 1.2 x the shard and one tensor: nothing else is ever held."""
    options = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 20000,
    }
    for name in ("small", "large"):
        made = models.make_config("qwen3")
        made.update(options if name == "large" else {})
        made.layer_types = ["full_attention"] * made.num_hidden_layers
        made.save_pretrained(tmp_path / name)
        model = load_model(
            tmp_path / name, dtype="float32", load_format="dummy", device="cpu", seed=0
        )
        model.save_pretrained(tmp_path / name, max_shard_size="150MB")
    total = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    assert total > 500 << 20
    del model
    command = [sys.executable, "-c", textwrap.dedent(PEAK), tmp_path / "large", tmp_path / "small"]
    result = subprocess.run([*command, "3"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    grown, shard = map(int, result.stdout.split())
    assert shard < 0.36 * total  # three of eight head groups, a third of the rest
    assert grown < 1.2 * shard + largest


def test_the_twin_is_gone_before_the_arena_comes(tmp_path, monkeypatch):
    models.build("gemma3").save_pretrained(tmp_path)
    twins = []

    def build(*args):
        model = build_skeleton(*args)
        twins.append(weakref.ref(model))
        return model

    def allocate(nbytes):
        assert [made() for made in twins] == [None]
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(twin, "build_skeleton", build)
    load_pooled(tmp_path, config(), 1, 2, "cpu", allocate)


# What cannot be pooled.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "arcee",
            r"ArceeForCausalLM cannot be shared .*layers\.0\.mlp is not fused \(no gate_proj",
        ),
        ("mixtral", "renamed or merged"),
        ("stablelm", r"layers\.0 is not fused"),
        ("gpt2", r"h\.0 is not fused"),
    ],
)
def test_refused_models(name, message, tmp_path):
    models.build(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*; use weights='resident'"):
        load_pooled(tmp_path, config(), 0, 2, "cpu")


def test_the_twin_finds_what_meta_cannot_show(tmp_path):
    """GLM rotates neighbours, which no name and no shape tells."""
    models.build("glm").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0 is not fused .*(norms|differs|no q_proj)"):
        load_pooled(tmp_path, config(), 0, 2, "cpu")


def test_errors(tmp_path, smollm2):
    models.build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weight_replicas=2 does not divide 3 ranks"):
        load_pooled(tmp_path, config(weight_replicas=2), 0, 3, "cpu")
    with pytest.raises(ValueError, match="cannot deal 3 layers to 4 owners"):
        load_pooled(tmp_path, config(weight_layout="layer"), 0, 4, "cpu")
    with pytest.raises(ValueError, match="needs load_format='dummy'"):
        load_pooled(models.make_config("llama"), config(), 0, 2, "cpu")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.2.self_attn.k_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.k_proj\.weight is missing"):
        load_pooled(tmp_path, config(), 0, 2, "cpu")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="GGUF file, whose weights cannot be shared"):
        load_pooled(tmp_path / "a.gguf", config(), 0, 2, "cpu")


def test_reads_only_its_own_bytes(tmp_path, monkeypatch):
    """Nothing is asked for beyond the arena and the vectors."""
    models.build("llama").save_pretrained(tmp_path)
    seen = []
    fill = Checkpoint.fill

    def watch(self, slices):
        seen.extend(slices)
        fill(self, slices)

    monkeypatch.setattr(Checkpoint, "fill", watch)
    _, pool = load_pooled(tmp_path, config(), 1, 3, "cpu")
    matrices = [item for item in seen if len(item.shape) == 2]
    assert sum(item.target.nbytes for item in matrices) <= pool.arena.nbytes
    assert all(item.target.nbytes for item in matrices)
