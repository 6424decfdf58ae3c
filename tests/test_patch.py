"""patch_model: logits, paths, restoring, refusals. Reference: transformers' own forward."""

import copy
import pickle
import random

import accelerate
import models
import pytest
import torch
import transformers
from torch import nn

from torch_pd.config import EngineConfig
from torch_pd.context import Batch, GroupBatch
from torch_pd.kv.cache import KVPool
from torch_pd.nn.attention import window_of
from torch_pd.nn.block import FusedBlock
from torch_pd.nn.linear import MergedLinear
from torch_pd.nn.patch import patch_model, unpatch_model
from torch_pd.nn.patched import describe, forward_packed, is_patched, kv_shape, max_length, new_pool
from torch_pd.nn.probe import batch_of

LENGTHS = (33, 1, 20, 9)  # beyond every window of models.py


class Packed:
    """Feeds sequences chunk by chunk through forward_packed, as the engine does."""

    def __init__(self, model, prompts: list[torch.Tensor], block_size: int = 16):
        self.model, self.prompts, self.block_size = model, prompts, block_size
        pages = [-(-len(prompt) // block_size) for prompt in prompts]
        self.pool: KVPool = new_pool(model, 1 + sum(pages), block_size)
        self.pool.pages.fill_(float("nan"))
        ids = list(range(1, 1 + sum(pages)))
        random.Random(0).shuffle(ids)
        self.tables = [[ids.pop() for _ in range(n)] for n in pages]
        self.done = [0] * len(prompts)

    def step(self, counts: list[int]) -> list[torch.Tensor]:
        """Logits [counts[i], vocab] of each sequence's next counts[i] tokens."""
        rows = [i for i, count in enumerate(counts) if count]
        width = max(len(self.tables[i]) for i in rows)
        starts, tokens, positions, slots = [0], [], [], []
        for i in rows:
            span = range(self.done[i], self.done[i] + counts[i])
            self.done[i] = span.stop
            starts.append(starts[-1] + len(span))
            tokens.append(self.prompts[i][span.start : span.stop])
            positions += span
            slots += [
                self.tables[i][p // self.block_size] * self.block_size + p % self.block_size
                for p in span
            ]
        tables = [self.tables[i] + [0] * (width - len(self.tables[i])) for i in rows]
        batch = Batch(
            num_tokens=starts[-1],
            max_query_len=max(counts),
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor([self.done[i] for i in rows], dtype=torch.int32),
            groups=(GroupBatch(torch.tensor(tables, dtype=torch.int32), torch.tensor(slots)),),
        )
        out = forward_packed(
            self.model,
            self.pool,
            batch,
            torch.cat(tokens),
            torch.tensor(positions),
            torch.arange(starts[-1]),
        )
        parts = iter(out.split([counts[i] for i in rows]))
        return [next(parts) if count else out[:0] for count in counts]

    def run(self, chunk: int) -> list[torch.Tensor]:
        """All logits of each sequence; sequence i joins at step i, so steps mix lengths."""
        logits: list[list[torch.Tensor]] = [[] for _ in self.prompts]
        step = 0
        while any(done < len(prompt) for done, prompt in zip(self.done, self.prompts, strict=True)):
            counts = [
                min(chunk, len(prompt) - self.done[i]) if i <= step else 0
                for i, prompt in enumerate(self.prompts)
            ]
            for i, part in enumerate(self.step(counts)):
                logits[i].append(part)
            step += 1
        return [torch.cat(parts) for parts in logits]


def make_prompts(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, models.VOCAB, (n,), generator=generator) for n in LENGTHS]


@torch.no_grad()
def reference(model, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(prompt[None], use_cache=False).logits[0] for prompt in prompts]


def error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Relative to the largest logit; inf if a number is not finite."""
    a, b = torch.cat(got).double(), torch.cat(want).double()
    return float((a - b).abs().max() / b.abs().max()) if a.isfinite().all() else float("inf")


def paths(model) -> dict[str, str]:
    return {path.name: path.path for path in describe(model)}


@pytest.mark.parametrize("name", models.ALL)
def test_logits(name):
    model = models.build(name)
    prompts = make_prompts()
    want = reference(model, prompts)
    patch_model(model)
    for chunk in (1, 7, 64):
        got = Packed(model, prompts, 32 if chunk == 7 else 16).run(chunk)
        assert error(got, want) < 1e-4, chunk
    # A padded batch in one plain call.
    length = max(LENGTHS)
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    logits = model(ids, attention_mask=mask).logits
    assert not logits[mask == 0].any()
    assert error([logits[row][mask[row] == 1] for row in range(len(prompts))], want) < 1e-4


@pytest.mark.parametrize("name", models.ALL)
def test_paths(name):
    model = patch_model(models.build(name))
    got = paths(model)
    layers = [n for n in got if n.split(".")[-1].isdigit()]
    assert len(layers) == model.config.num_hidden_layers
    attention = [n for n, path in got.items() if path == "attention"]
    if name in models.GENERAL:
        assert {got[n] for n in layers} == {"huggingface"}
        assert len(attention) == len(layers)
        assert all(p.reason for p in describe(model) if p.name in layers)
    else:
        assert {got[n] for n in layers} == {"fused"}
        assert not attention
        mlps = [n for n, path in got.items() if n.endswith(".mlp")]
        assert len(mlps) == (len(layers) if name in models.MIXED else 0)
    (head,) = [n for n in got if n.endswith("lm_head")]
    assert got[head] == "fused"
    # Every parameter of the model lies under exactly one layer, attention, MLP or listed module.
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        assert any(parameter.startswith(f"{n}.") for n in got), parameter


@pytest.mark.parametrize("name", models.ALL)
def test_unpatch_restores(name):
    model = models.build(name)
    prompts = make_prompts()[:1]
    want = reference(model, prompts)
    keys, values = list(model.state_dict()), copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    config = model.config
    assert patch_model(model) is model
    assert list(model.state_dict()) == keys
    assert all(torch.equal(model.state_dict()[key], values[key]) for key in keys)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    state = model._torch_pd
    assert patch_model(model) is model
    assert model._torch_pd is state
    assert unpatch_model(model) is model
    assert not is_patched(model)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert model.config is config
    assert config._attn_implementation == "eager"
    assert list(model.state_dict()) == keys
    assert all(torch.equal(model.state_dict()[key], values[key]) for key in keys)
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert all(torch.equal(a, b) for a, b in zip(reference(model, prompts), want, strict=True))
    assert error([patch_model(model)(prompts[0][None]).logits[0]], want) < 1e-4  # and again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*models.FUSED, "mixtral", "gpt2"])
def test_half_precision(name, dtype):
    exact = models.build(name)
    prompts = make_prompts()
    want = reference(exact, prompts)
    model = models.build(name).to(dtype)
    with torch.no_grad():
        theirs = error([logits.float() for logits in reference(model, prompts)], want)
    patch_model(model)
    assert name not in models.FUSED or "attention" not in paths(model).values()
    got = Packed(model, prompts).run(7)
    assert got[0].dtype == dtype
    # No further from float32 than transformers in the same precision, some noise allowed.
    assert error(got, want) < 1.5 * theirs + 0.01


def test_logits_in_float32_of_a_model_in_bfloat16():
    model = models.build("mixtral", torch.bfloat16)
    head = type(model.lm_head)

    class Upcasting(head):
        def forward(self, x):
            return super().forward(x).float()

    model.lm_head.__class__ = Upcasting
    assert model(make_prompts()[0][None]).logits.dtype == torch.float32
    patch_model(model)


def test_merged_projections_are_stored_once():
    model = patch_model(models.build("llama"))
    attention = model.model.layers[0].self_attn
    storages = {
        p.weight.untyped_storage().data_ptr()
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert len(storages) == 1
    merged = model.model.layers[0]._torch_pd.attention.qkv.weight
    assert merged.untyped_storage().data_ptr() in storages


def test_storage_changes_while_patched():
    prompts = make_prompts()
    model = patch_model(models.build("llama"))
    for seed, assign in ((1, False), (2, True), (3, False)):
        other = models.build("llama", seed=seed)
        want = reference(other, prompts)
        model.load_state_dict(other.state_dict(), assign=assign)
        assert error(Packed(model, prompts).run(64), want) < 1e-4
    model.to(torch.bfloat16).to(torch.float32)
    want = reference(other.to(torch.bfloat16).to(torch.float32), prompts)
    assert error(Packed(model, prompts).run(64), want) < 1e-4


def test_changes_of_a_patched_model_that_it_follows_or_refuses():
    ids = torch.tensor([[3, 4, 5]])
    model = patch_model(models.build("llama"))
    attention = model.model.layers[0].self_attn
    for weight in (attention.q_proj.weight, attention.k_proj.weight):
        weight.data = weight.data * 1.5
    got = model(ids).logits
    half = model.half()(ids).logits
    assert half.dtype == torch.float16
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="was set to 'sdpa'"):
        model(ids)
    unpatch_model(model)
    assert (model.float()(ids).logits - got).abs().max() < 1e-2
    patch_model(model)
    attention.q_proj = torch.nn.Linear(*reversed(attention.q_proj.weight.shape))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj was replaced after patch"):
        model(ids)
    with pytest.raises(TypeError, match="got NoneType"):
        unpatch_model(None)


def test_weights_of_a_patched_model_that_are_put_back():
    """An average of weights, say, put in for a while: where they lie is not enough to tell."""
    ids = torch.tensor([[3, 4, 5]])
    model = patch_model(models.build("llama"))
    want = model(ids).logits
    layer = model.model.layers[0]
    kept = {name: parameter.data for name, parameter in layer.named_parameters()}
    other = models.build("llama", seed=1).model.layers[0]
    layer.load_state_dict(other.state_dict(), assign=True)
    for name, value in kept.items():
        layer.get_parameter(name).data = value
    assert torch.equal(model(ids).logits, want)


def test_biases_of_a_patched_model_that_are_taken_out():
    ids = torch.tensor([[3, 4, 5]])
    model = patch_model(models.build("llama"))
    before = model(ids).logits
    for name in "qkv":
        getattr(model.model.layers[0].self_attn, f"{name}_proj").bias = None
    got = model(ids).logits
    unpatch_model(model)
    want = model(ids).logits
    assert (want - got).abs().max() < 1e-4 * want.abs().max() < (want - before).abs().max()


def test_a_model_that_is_as_it_was_is_not_looked_through(monkeypatch):
    """A plain call asks at every token."""
    ids = torch.tensor([[3, 4, 5]])
    model = patch_model(models.build("llama"))
    want = model(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(MergedLinear, "mend", None)
        assert torch.equal(model(ids).logits, want)
    layers = model.model.layers
    layers[2].self_attn.k_proj.weight.data = torch.zeros_like(layers[2].self_attn.k_proj.weight)
    assert not torch.equal(model(ids).logits, want)


def test_hooks_that_nothing_would_call_are_refused():
    ids = torch.tensor([[3, 4, 5]])
    model = models.build("mixtral")
    layer = model.model.layers[1]
    calls = []
    patch_model(model)
    for module in (model.model.norm, layer, layer.mlp, layer.mlp.gate):  # these are called
        module.register_forward_hook(lambda *_: calls.append(1))
    model(ids)
    assert len(calls) == 4
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        hook = getattr(layer.self_attn, register)(lambda *_: None)
        with pytest.raises(
            ValueError, match=r"layers\.1\.self_attn got a forward hook after patch"
        ):
            model(ids)
        hook.remove()
    model(ids)
    layer.self_attn.register_forward_hook(lambda *_: calls.append("attention"))
    patch_model(unpatch_model(model))
    calls.clear()
    model(ids)
    assert sorted(map(str, calls)) == ["1"] * 4 + ["attention"]


def test_parametrized_weights_are_refused():
    model = patch_model(models.build("llama"))
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.k_proj)
    with pytest.raises(ValueError, match="the weight of a fused layer is no Parameter"):
        model(torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_default_dtype_and_autocast_change_nothing(name):
    ids = make_prompts()[0][None]
    model = models.build(name)
    want = patch_model(model)(ids).logits
    here = paths(model)
    unpatch_model(model)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got = patch_model(model)(ids).logits
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
    assert paths(model) == here


def test_offloaded_weights_are_refused():
    model = accelerate.cpu_offload(models.build("llama"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="accelerate keeps its weights elsewhere"):
        patch_model(model)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_weights_that_do_not_lie_row_by_row_are_not_fused():
    """Such as quantised ones, which are tensors of a class of their own."""
    model = models.build("llama")
    first, second, _ = model.model.layers
    for module in (model.lm_head, first.self_attn.o_proj):
        module.weight = nn.Parameter(module.weight.data.t().contiguous().t())
    second.mlp.up_proj.weight = nn.Parameter(second.mlp.up_proj.weight.data.to_sparse_csr())
    prompts = make_prompts()
    want = reference(model, prompts)
    patch_model(model)
    reasons = {path.name: path.reason for path in describe(model)}
    assert "row by row in memory" in reasons["model.layers.0"]
    assert "row by row in memory" in reasons["model.layers.1.mlp"]
    here = paths(model)
    assert (here["lm_head"], here["model.layers.2"]) == ("huggingface", "fused")
    assert error(Packed(model, prompts).run(7), want) < 1e-4


def test_deep_copy_is_patched_by_itself():
    prompts = make_prompts()
    model = patch_model(models.build("qwen3"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    want = reference(models.build("qwen3"), prompts)
    assert error(Packed(twin, prompts).run(64), want) < 1e-4
    twin_logits = twin(prompts[0][None]).logits[0]
    assert error([twin_logits], want[:1]) < 1e-4
    unpatch_model(twin)
    assert is_patched(model)
    assert not is_patched(twin)
    assert error(reference(twin, prompts), want) == 0


def test_other_models_of_the_same_config_are_left_alone():
    config = models.make_config("llama")
    one, two = (models.model_class("llama")(config).eval() for _ in range(2))
    prompts = make_prompts()
    want = reference(two, prompts)
    patch_model(one)
    assert config._attn_implementation == "eager"
    assert error(reference(two, prompts), want) == 0


def test_layers_that_compute_something_else_are_not_fused():
    model = models.build("llama")
    prompts = make_prompts()

    class Scaled(type(model.model.layers[1].mlp)):
        def forward(self, x):
            return 1.01 * super().forward(x)

    model.model.layers[1].mlp.__class__ = Scaled
    want = reference(model, prompts)
    patch_model(model)
    got = {path.name: path for path in describe(model)}
    assert got["model.layers.0"].path == "fused"
    assert got["model.layers.1"].path == "huggingface"
    assert "differs from transformers" in got["model.layers.1"].reason
    assert got["model.layers.1.self_attn"].path == "attention"
    assert error(Packed(model, prompts).run(7), want) < 1e-4
    projection = model.model.layers[1].self_attn.q_proj.weight
    assert projection.untyped_storage().nbytes() == projection.nbytes  # nothing left merged


def test_models_that_mix_tokens_elsewhere_are_refused():
    model = models.build("llama")
    mlp = model.model.layers[1].mlp

    class Mixing(type(mlp)):
        def forward(self, x):
            return super().forward(x) + x.cumsum(1)

    mlp.__class__ = Mixing
    with pytest.raises(ValueError, match="carries more from token to token"):
        patch_model(model)
    assert not is_patched(model)
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_unusual_layers_are_not_fused():
    model = models.build("llama")
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    model.model.layers[1].mlp.down_proj = model.model.layers[2].mlp.down_proj
    patch_model(model)
    reasons = {path.name: path.reason for path in describe(model)}
    assert "hooks" in reasons["model.layers.0"]
    assert "used elsewhere" in reasons["model.layers.1"]
    assert "used elsewhere" in reasons["model.layers.2"]


@pytest.mark.parametrize("name", models.ALL)
def test_meta(name):
    """Without weights the same paths are found, so info needs no checkpoint."""
    with torch.device("meta"):
        model = models.model_class(name)(models.make_config(name))
    patch_model(model)
    if name == "glm":  # only numbers show that its rotation is interleaved
        return
    assert paths(model) == paths(patch_model(models.build(name)))


def test_kv_shape():
    model = patch_model(models.build("qwen3"), EngineConfig(block_size=32))
    shape = kv_shape(model)
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.block_size) == (
        3,
        2,
        16,
        32,
    )
    pool = new_pool(model, 4)
    assert pool.page_bytes == shape.page_bytes == pool.pages[0].nbytes
    assert pool.num_pages == 4
    k, v, *scales = pool.layer(2)
    assert scales == [None, None]
    assert k.shape == v.shape == (4, 32, 2, 16)
    pool.pages.copy_(torch.arange(pool.pages.numel()).view(pool.pages.shape))
    assert torch.equal(v, pool.pages[:, 2, 1])
    before = pool.pages.clone()
    pool.copy_within(torch.tensor([[1, 3]]))
    assert torch.equal(pool.pages[3], before[1])
    assert torch.equal(pool.pages[:3], before[:3])


# Refusals.

REFUSED = {
    "Falcon": ({"num_attention_heads": 4}, "self_attention.*AttentionInterface"),
    "GPTJ": (
        {"n_embd": 48, "n_layer": 2, "n_head": 6, "rotary_dim": 4},
        "attn.*AttentionInterface",
    ),
    "Bloom": ({"hidden_size": 48, "n_layer": 2, "n_head": 6}, "self_attention.*AttentionInterface"),
    "Mpt": ({"d_model": 48, "n_layers": 2, "n_heads": 6}, "attn.*AttentionInterface"),
    "Mamba": ({"num_hidden_layers": 2}, "attention"),
    "Jamba": ({"num_hidden_layers": 8, "num_experts": 2, "use_mamba_kernels": False}, "attention"),
    "Lfm2": (
        {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
        "layer_types has conv",
    ),
    "BertLMHeadModel": ({"num_hidden_layers": 2, "num_attention_heads": 6}, "causal"),
    "BertForMaskedLM": ({"num_hidden_layers": 2, "num_attention_heads": 6}, "causal"),
    "T5ForConditionalGeneration": ({"d_model": 48, "num_layers": 2, "d_kv": 8}, "encoder-decoder"),
    "BartForConditionalGeneration": ({"d_model": 48, "encoder_layers": 1}, "encoder-decoder"),
    "LlamaModel": ({"num_hidden_layers": 2, "num_attention_heads": 6}, "head"),
    "Gemma4": (
        {
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size_per_layer_input": 97,
        },
        "layers of several KV shapes",
    ),
    "Roberta": (
        {"num_hidden_layers": 2, "num_attention_heads": 6, "is_decoder": True},
        "given the positions 0, 1, 2",
    ),
    "Bart": (
        {"d_model": 48, "decoder_layers": 3, "encoder_layers": 1},
        "counts positions by itself",
    ),
    "Doge": (
        {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2},
        r"something else of its attention mask \(mask\.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, reason = REFUSED[name]
    prefix = next((p for p in ("Bert", "T5", "Bart", "Llama") if name.startswith(p)), name)
    kind = "Gemma4TextConfig" if name == "Gemma4" else f"{prefix}Config"
    config = getattr(transformers, kind)(
        **{"vocab_size": 97, "hidden_size": 48, "intermediate_size": 72, **options}
    )
    cls = getattr(transformers, name, None) or getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    model = cls(config)
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=f"cannot patch {cls.__name__}.*{reason}"):
        patch_model(model)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert model.config is config
    assert model.training


def test_a_cache_that_forgets_what_the_mask_shows_is_refused():
    """transformers' cache makes windows of config.sliding_window alone, whatever the masks are."""
    config = models.make_config("llama")
    config.sliding_window = 8
    with pytest.raises(ValueError, match=r"cache keeps 8 tokens for model\.layers\.0\.self_attn"):
        patch_model(models.model_class("llama")(config))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotations_that_depend_on_the_length_of_others(kind):
    """Up to the length where transformers would rotate whole sequences otherwise."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.1, 1.3, 1.2, 1.0], "long_factor": [2.0, 4.0, 3.0, 5.0]}
        rope["original_max_position_embeddings"] = 40
    config = models.make_config("llama")
    config.rope_parameters = rope
    config.max_position_embeddings = 40 if kind == "dynamic" else 64
    torch.manual_seed(0)
    model = models.model_class("llama")(config).eval()
    prompts = make_prompts()
    want = reference(model, prompts)
    patch_model(model)
    assert max_length(model).length == 40
    assert error(Packed(model, prompts).run(7), want) < 1e-4
    ids = prompts[0][None]
    model.generate(ids, max_new_tokens=7, min_new_tokens=7)
    with pytest.raises(ValueError, match=f"41 tokens is too long.*rotary_emb.*{kind}.*40 tokens"):
        model.generate(ids, max_new_tokens=9, min_new_tokens=9)
    with pytest.raises(ValueError, match="too long"):
        model(ids[:, :2], position_ids=torch.tensor([[39, 40]]))


def test_errors():
    model = models.build("llama")
    with pytest.raises(ValueError, match="group"):
        patch_model(model, group=object())
    with pytest.raises(TypeError, match="Linear"):
        patch_model(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="config must be an EngineConfig, got dict"):
        patch_model(model, {"block_size": 16})
    for function in (unpatch_model, describe, kv_shape):
        with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
            function(model)
    patch_model(model)
    with pytest.raises(ValueError, match="inner module"):
        model.model(torch.tensor([[3, 4]]))
    stranger = models.build("llama")
    stranger.config._attn_implementation = "torch_pd"
    with pytest.raises(ValueError, match="not patched"):
        stranger(torch.tensor([[3, 4]]))


def test_window_of():
    masks = transformers.masking_utils
    assert window_of(masks.causal_mask_function) == 0
    assert window_of(masks.sliding_window_causal_mask_function(100)) == 100
    assert window_of(masks.sliding_window_causal_mask_function(1)) == 1
    for other in (
        masks.bidirectional_mask_function,
        masks.chunked_causal_mask_function(100, torch.zeros(1, dtype=torch.int64)),
        masks.or_masks(masks.causal_mask_function, lambda b, h, q, k: k < 4),
    ):
        with pytest.raises(ValueError, match="neither causal nor"):
            window_of(other)


# Branches handed on from block to block.


@pytest.mark.parametrize("adds_on", [(), ("cpu",)])
@pytest.mark.parametrize("name", models.FUSED)
def test_every_block_hands_its_last_branch_on(name, adds_on, monkeypatch):
    monkeypatch.setattr(FusedBlock, "adds_on", adds_on)
    model = patch_model(models.build(name))
    blocks = [layer.__dict__["_torch_pd"] for layer in model.get_decoder().layers]
    assert all(block.hands_on for block in blocks)
    pool = new_pool(model, 2, 16)
    ids = torch.arange(3, 12)
    batch = batch_of([0], [9], pool.device)
    found = forward_packed(model, pool, batch, ids, torch.arange(9), None)
    plain = model(ids[None]).logits[0]  # completes every output
    assert (found - plain).abs().max() < 1e-5 * plain.abs().max()
    assert not blocks[0].flow.on


def test_a_model_that_acts_between_its_layers_gets_complete_outputs():
    model = models.build("llama")

    class Doubling(torch.nn.ModuleList):
        def __getitem__(self, index):
            layers = super().__getitem__(index)
            return [x for layer in layers for x in (layer, lambda h, **_: h * 1.0)]

    want = models.build("llama")(torch.arange(3, 12)[None]).logits
    model.model.layers.__class__ = Doubling
    patch_model(model)
    blocks = [module.__dict__.get("_torch_pd") for module in model.modules()]
    blocks = [block for block in blocks if isinstance(block, FusedBlock)]
    assert len(blocks) == 3
    assert not any(block.hands_on for block in blocks)
    got = model(torch.arange(3, 12)[None]).logits
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
