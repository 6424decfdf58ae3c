"""generate and plain calls of patched models against transformers, and the cache behind them."""

from concurrent.futures import ThreadPoolExecutor

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from torch_pd.config import EngineConfig
from torch_pd.kv.cache import PagedCache
from torch_pd.nn.patch import patch_model, unpatch_model
from torch_pd.nn.patched import kv_shape
from torch_pd.sizing import KVShape

NAMES = ["llama", "gemma3", "phi3_partial", "mixtral", "gpt2", "opt", "cohere"]


def padded(lengths=(13, 5, 20), side: str = "left") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        span = slice(-length, None) if side == "left" else slice(0, length)
        ids[row, span] = torch.randint(3, models.VOCAB, (length,), generator=generator)
        mask[row, span] = 1
    return {"input_ids": ids, "attention_mask": mask}


def both(name: str, inputs: dict | None = None, seed: int | None = None, **options):
    """What generate returns before and after patching."""
    model = models.build(name)
    results = []
    for patched in (False, True):
        if patched:
            patch_model(model)
        if seed is not None:
            torch.manual_seed(seed)
        results.append(model.generate(**(inputs or padded()), max_new_tokens=12, **options))
    return results


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name):
    want, got = both(name, do_sample=False)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_beams(name):
    want, got = both(name, num_beams=4, num_return_sequences=3, do_sample=False)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.5, "seed": 0},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3, "seed": 1},
        {"do_sample": True, "num_beams": 3, "seed": 2},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "prefill_chunk_size": 4},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": False, "eos_token_id": list(range(3, 40))},
        {"do_sample": False, "prompt_lookup_num_tokens": 3, "inputs": padded((9,))},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items() if k != "inputs")[:60],
)
def test_modes(options):
    want, got = both("gemma2", **options)
    assert torch.equal(got, want)


def test_assistant():
    model, assistant = models.build("llama"), models.build("llama", seed=0)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    inputs = padded((9,))
    options = {"max_new_tokens": 20, "do_sample": False, "assistant_model": assistant}
    want = model.generate(**inputs, **options)
    patch_model(model)
    assert torch.equal(model.generate(**inputs, **options), want)
    patch_model(assistant)
    assert torch.equal(model.generate(**inputs, **options), want)
    unpatch_model(model)
    assert torch.equal(model.generate(**inputs, **options), want)


def test_threads():
    model = models.build("llama")
    prompts = [padded((n,))["input_ids"] for n in (13, 5, 20, 33)]
    options = {"max_new_tokens": 12, "do_sample": False}
    want = [model.generate(ids, **options).tolist() for ids in prompts]
    patch_model(model)
    with ThreadPoolExecutor(4) as threads:
        got = threads.map(lambda ids: model.generate(ids, **options).tolist(), prompts * 3)
        assert list(got) == want * 3


def test_compiled():
    model = models.build("llama")
    inputs = padded()
    want = model(**inputs).logits[inputs["attention_mask"] == 1]
    graphs = []
    compiled = torch.compile(patch_model(model), backend=lambda graph, _: graphs.append(graph))
    assert close(compiled(**inputs).logits[inputs["attention_mask"] == 1], want)
    assert not graphs  # it runs as it is


@pytest.mark.parametrize("block_size", [16, 64])
def test_scores_and_continuing(block_size):
    model = models.build("qwen3")
    inputs = padded()
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "do_sample": False}
    want = model.generate(**inputs, **options, output_logits=True, output_hidden_states=True)
    patch_model(model, EngineConfig(block_size=block_size))
    got = model.generate(**inputs, **options, output_logits=True, output_hidden_states=True)
    assert torch.equal(got.sequences, want.sequences)
    assert all(close(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    real = inputs["attention_mask"].bool()
    for a, b in zip(got.hidden_states[0], want.hidden_states[0], strict=True):
        assert close(a[real], b[real])
        assert not a[~real].any()
    for a, b in zip(got.hidden_states[1], want.hidden_states[1], strict=True):
        assert close(a, b)
    cache = got.past_key_values
    assert isinstance(cache, PagedCache)
    assert cache.shape.block_size == block_size
    # A second turn on the cache that the first returned.
    ids = torch.cat([got.sequences, torch.full((3, 4), 50)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 10, dtype=torch.int64)], 1)
    more = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    unpatch_model(model)
    assert torch.equal(
        more.sequences, model.generate(ids, attention_mask=mask, **options).sequences
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_plain_calls(name):
    model = models.build(name)
    right = padded(side="right")
    real = right["attention_mask"].bool()
    labels = right["input_ids"].masked_fill(~real, -100)
    with torch.no_grad():
        want = model(**right, labels=labels, output_hidden_states=True)
        full = model(right["input_ids"])
        embeds = model.get_input_embeddings()(right["input_ids"])
    patch_model(model)
    got = model(**right, labels=labels, output_hidden_states=True)
    assert type(got) is type(want)
    assert close(got.logits[real], want.logits[real])
    assert close(got.loss, want.loss)
    assert not got.logits.requires_grad
    assert not got.logits[~real].any()
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert close(a[real], b[real])
    as_tuple = model(**right, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], got.logits)
    # Unpadded; the last columns alone; given columns; embeddings; positions.
    assert close(model(right["input_ids"]).logits, full.logits)
    assert close(model(right["input_ids"], logits_to_keep=2).logits, full.logits[:, -2:])
    keep = torch.tensor([3, 0, 7])
    assert torch.equal(model(**right, logits_to_keep=keep).logits, got.logits[:, keep])
    assert close(
        model(inputs_embeds=embeds, **{k: right[k] for k in ["attention_mask"]}).logits[real],
        want.logits[real],
    )
    positions = torch.arange(20)[None]
    assert close(model(right["input_ids"], position_ids=positions).logits, full.logits)
    assert model(right["input_ids"], use_cache=False).past_key_values is None
    # Piece by piece with the cache.
    cache, parts = None, []
    for piece in right["input_ids"].split([3, 1, 9, 7], 1):
        out = model(piece, past_key_values=cache)
        cache = out.past_key_values
        parts.append(out.logits)
    assert close(torch.cat(parts, 1), full.logits)


def test_positions_of_several_axes():
    """As models that see images have them: equal for text, and only text runs."""
    model = patch_model(models.build("llama"))
    ids = torch.arange(3, 11)[None]
    axes = torch.arange(8).expand(4, 1, 8)
    assert torch.equal(model(ids, position_ids=axes).logits, model(ids).logits)
    axes = axes.clone()
    axes[1, 0, 5] = 2
    with pytest.raises(ValueError, match="differ between their axes"):
        model(ids, position_ids=axes)


def test_errors():
    model = patch_model(models.build("llama"))
    ids = torch.full((2, 4), 5)
    for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=32)):
        with pytest.raises(ValueError, match=f"{type(cache).__name__}.*pages"):
            model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=f"{type(cache).__name__}.*pages"):
            model.generate(ids, past_key_values=cache, max_new_tokens=2)
    other = patch_model(models.build("gemma3"))
    with pytest.raises(ValueError, match="this model needs"):
        model(ids, past_key_values=other(ids).past_key_values)
    for name in ("static", "quantized", "offloaded"):
        with pytest.raises(ValueError, match="cache_implementation"):
            model.generate(ids, cache_implementation=name, max_new_tokens=2)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="4-D"):
        model(ids, attention_mask=torch.ones(2, 1, 4, 4))
    with pytest.raises(ValueError, match="expected \\[2, 4\\]"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="no token"):
        model(ids, attention_mask=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, position_ids=torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="either input_ids or"):
        model()
    with pytest.raises(ValueError, match=r"input_ids is \[4\], expected \[batch, length\]"):
        model(ids[0])
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4]))
    several = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    with pytest.raises(ValueError, match=r"do not go up by one in row 1.*several sequences"):
        model(ids, position_ids=several, use_cache=False)
    model(ids, position_ids=several, use_cache=False, attention_mask=torch.ones(2, 4))
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="2 sequences, the input has 1"):
        model(ids[:1], past_key_values=cache)
    changed = torch.ones(2, 8)
    changed[0, 0] = 0
    with pytest.raises(ValueError, match="differs"):
        model(ids, past_key_values=cache, attention_mask=changed)
    with pytest.raises(ValueError, match="not by update"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    # A call that failed leaves the cache as it was.
    with pytest.raises(IndexError):
        model(torch.full((2, 4), 10**6), past_key_values=cache)
    assert cache.get_seq_length() == 4
    assert cache.lengths == [4, 4]
    gapped = torch.ones(2, 12)
    gapped[1, 4:6] = 0
    windowed = patch_model(models.build("mistral"))
    with pytest.raises(ValueError, match=r"2 columns of padding .* of row 1.* window of 9"):
        windowed(torch.full((2, 12), 5), attention_mask=gapped)
    windowed(torch.full((2, 9), 5), attention_mask=gapped[:, :9])
    model(torch.full((2, 12), 5), attention_mask=gapped)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        patch_model(models.build("gpt2"))(ids, encoder_hidden_states=torch.zeros(2, 4, 48))
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(ids)


SHAPE = KVShape(num_layers=1, num_kv_heads=1, head_dim=2, itemsize=4, block_size=16)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_cache_holds_what_was_written(data):
    """Random extends, reorders and crops against lists; pages exactly accounted for."""
    cache = PagedCache(SHAPE, torch.float32, torch.device("cpu"))
    model: list[list[float]] = []  # the tokens of each row, numbered as they were written
    masks: list[list[bool]] = []
    number = 0.0
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["extend", "extend", "select", "repeat", "crop"]))
        rows = len(model)
        if action == "extend" or not rows:
            rows = rows or data.draw(st.integers(1, 4))
            width = data.draw(st.integers(1, 40))
            bits = st.lists(st.booleans(), min_size=rows * width, max_size=rows * width)
            mask = torch.tensor(data.draw(bits)).view(rows, width)
            mask[data.draw(st.integers(0, rows - 1)), -1] = True
            model, masks = model or [[] for _ in range(rows)], masks or [[] for _ in range(rows)]
            batch, positions = cache.extend(mask)
            new = torch.arange(batch.num_tokens) + number
            number += batch.num_tokens
            slots = batch.groups[0].slots
            assert len(set(slots.tolist())) == len(slots)
            assert slots.min() >= 16
            k = cache.pool.layer(0).k
            k[slots // 16, slots % 16] = new[:, None, None].expand(-1, 1, 2)
            values = iter(new.tolist())
            expected_positions = []
            for row in range(rows):
                count = int(mask[row].sum())
                expected_positions += range(len(model[row]), len(model[row]) + count)
                model[row] = model[row] + [next(values) for _ in range(count)]
                masks[row] = masks[row] + mask[row].tolist()
            assert positions.tolist() == expected_positions
            lengths = [len(model[row]) for row in range(rows) if mask[row].any()]
            assert batch.seq_lens.tolist() == lengths
            assert batch.max_query_len == int(mask.sum(1).max())
        elif action == "select":
            order = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=6))
            cache.reorder_cache(torch.tensor(order))
            model, masks = [list(model[i]) for i in order], [list(masks[i]) for i in order]
        elif action == "repeat" and rows <= 3:
            cache.batch_repeat_interleave(2)
            order = [i for i in range(rows) for _ in range(2)]
            model, masks = [list(model[i]) for i in order], [list(masks[i]) for i in order]
        elif action == "crop":
            n = data.draw(st.integers(0, len(masks[0])))
            cache.crop(-n)
            for row in range(rows):
                gone = sum(masks[row][len(masks[row]) - n :])
                model[row] = model[row][: len(model[row]) - gone]
                masks[row] = masks[row][: len(masks[row]) - n]
        assert cache.lengths == [len(tokens) for tokens in model]
        assert cache.get_seq_length() == len(masks[0])
        assert cache.columns.tolist() == masks
        k = cache.pool.layer(0).k
        for row, tokens in enumerate(model):
            assert len(cache.tables[row]) == -(-len(tokens) // 16)
            stored = [k[page, i, 0, 0].item() for page in cache.tables[row] for i in range(16)]
            assert stored[: len(tokens)] == tokens
        cache.allocator.check(cache.tables)
    cache.reset()
    assert cache.allocator.num_used == 0
    assert cache.get_seq_length() == 0


def test_beams_share_pages():
    model = patch_model(models.build("llama"))
    cache = model(torch.full((1, 40), 5)).past_key_values
    assert isinstance(cache, PagedCache)
    cache.batch_repeat_interleave(4)
    assert cache.allocator.num_used == 3
    model(torch.full((4, 1), 6), past_key_values=cache)
    assert cache.allocator.num_used == 2 + 4  # only the last page, which is written, is copied
    assert cache.shape == kv_shape(model)
    assert repr(cache) == "PagedCache(batch=4, columns=41, pages=6, block_size=16)"
