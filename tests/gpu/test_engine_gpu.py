"""The engine on a GPU: CUDA graphs, overlapped steps, and the tokens of the CPU."""

import itertools
import random
import subprocess
import sys

import models
import numpy as np
import pytest
import torch
from device_pools import DEVICE
from models import tokens_of
from transformers import Qwen3Config, Qwen3ForCausalLM

from torch_pd import LLM, SamplingParams, patch_model
from torch_pd.engine.sampler import Sampler
from torch_pd.engine.sampling_row import SamplingRow
from torch_pd.nn.patched import forward_packed, new_pool
from torch_pd.nn.probe import BLOCK_SIZE, LENGTHS, batch_of, tokens

VOCAB = 1003


def qwen3(dtype, **changes):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.1,
        **changes,
    )
    return Qwen3ForCausalLM(config).to(dtype).eval()


def prompts_of(count, longest, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def params_of(rng, n=1):
    drawn = {"temperature": rng.choice([0.0, 0.8]), "ignore_eos": rng.random() < 0.5}
    drawn |= {"max_tokens": rng.randint(1, 40), "stop_token_ids": rng.sample(range(VOCAB), 40)}
    drawn |= {"top_p": rng.choice([1.0, 0.9]), "top_k": rng.choice([0, 20]), "seed": 3}
    extra = rng.randrange(5)
    if extra == 1:
        drawn |= {"repetition_penalty": 1.2}
    if extra == 2:
        drawn |= {"logprobs": 2}
    if extra == 3:
        drawn |= {"logit_bias": {7: 2.0}, "min_tokens": min(5, drawn["max_tokens"])}
    return SamplingParams(**drawn)


@pytest.mark.parametrize("rows", [1, 3, 24, 33])
def test_graph_replay_equals_eager_bitwise(rows):
    with LLM(qwen3(torch.bfloat16), device="cuda", kv_cache_gib=0.2, max_num_seqs=48) as llm:
        engine = llm.engine
        runner, scheduler = engine.runner, engine.scheduler
        assert runner.graphs is not None, runner.no_graphs
        engine.overlap = False
        params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, detokenize=False)
        for request in llm._parse(prompts_of(rows, 90), params):
            engine.add(request)
        for _ in range(3):
            engine.step()
        plan = scheduler.schedule()
        assert plan.samples.all()
        runner.choices.update(plan)
        size = runner.graphs.size_for(rows)
        step = runner._on_device(plan, size)
        eager = runner._forward(step).clone()
        runner._to_graph(step)
        replayed = runner.graphs.replay(size)
        assert eager.isfinite().all()
        assert torch.equal(eager[:rows], replayed[:rows])
        scheduler.cancel(plan)


def test_greedy_float32_tokens_are_those_of_the_cpu():
    prompts = prompts_of(12, 200)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=1)
    plain = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with LLM(qwen3(torch.float32), device="cpu", kv_cache_gib=0.2) as llm:
        reference = llm.generate(prompts, params, use_tqdm=False)
    with LLM(qwen3(torch.float32), device="cuda", kv_cache_gib=0.2, max_num_seqs=16) as llm:
        found = tokens_of(llm.generate(prompts, plain, use_tqdm=False))
        assert llm.stats()["graph_steps"] > 0
    for output, (ours,) in zip(reference, found, strict=True):
        theirs = list(output.outputs[0].token_ids)
        if ours != theirs:
            place = next(i for i in range(len(ours)) if ours[i] != theirs[i])
            best = sorted(x.logprob for x in output.outputs[0].logprobs[place].values())
            assert best[-1] - best[0] < 1e-3, f"token {place} differs"


@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 40, "max_num_seqs": 5}])
def test_overlapped_steps_and_graphs_change_no_token(config):
    """Float32, so that other batch sizes do not round to other tokens (nearly always)."""
    prompts, rng = prompts_of(16, 120, seed=2), random.Random(0)
    params = [params_of(rng) for _ in prompts]
    found = []
    for overlap, eager in itertools.product((False, True), (False, True)):
        with LLM(
            qwen3(torch.float32), device="cuda", kv_cache_gib=0.03, enforce_eager=eager, **config
        ) as llm:
            llm.engine.overlap = overlap
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found.append(tokens_of(outputs))
            stats = llm.stats()
            assert (stats["graph_steps"] > 0) != eager
            assert stats["kv_pages_used"] == 0
    same = [sum(a == b for a, b in zip(found[0], other, strict=True)) for other in found[1:]]
    assert min(same) >= len(prompts) - 1, same


def test_the_sampler_of_the_gpu_draws_what_the_cpu_draws():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(70, VOCAB, generator=generator)
    rng = random.Random(1)
    rows = []
    for i in range(70):
        row = SamplingRow(params_of(rng), [3, 4, 5, 5], seed=i, index=i % 3)
        for token in (5, 9, 9):
            row.append(token)
        rows.append(row)
    sampler = Sampler(VOCAB, [2])
    here = sampler(logits.clone(), rows)
    there = sampler(logits.to(DEVICE), rows)
    assert here.token_ids == there.token_ids
    for a, b in zip(here.logprobs, there.logprobs, strict=True):
        assert (a and a.keys()) == (b and b.keys())


@pytest.mark.parametrize("name", [*models.FUSED, *models.MIXED, *models.GENERAL])
def test_bfloat16_logits_are_float32_ones_but_for_rounding(name):
    """Of every architecture, a prefill and a second chunk, against the float32 pass on the CPU."""

    def logits(model):
        patch_model(model)
        pool = new_pool(model, 1 + len(LENGTHS), BLOCK_SIZE)
        parts = []
        middle = [length // 2 for length in LENGTHS]
        for starts, ends in (([0] * len(LENGTHS), middle), (middle, LENGTHS)):
            ids, positions = tokens(model, starts, ends, [0] * len(LENGTHS))
            batch = batch_of(starts, ends, pool.device)
            parts.append(forward_packed(model, pool, batch, ids, positions, None).float().cpu())
        return torch.cat(parts)

    want = logits(models.build(name))
    exact = logits(models.build(name).to(DEVICE))
    scale = want.abs().max()
    assert (exact - want).abs().max() / scale < 1e-3
    got = logits(models.build(name).to(DEVICE, torch.bfloat16))
    # A token may be sent to another expert; else a few roundings of 2^-8 add up.
    off = (got - want).abs().amax(1) / scale
    assert off.median() < 0.05
    if name not in {**models.MIXED, "gpt_oss": None}:
        assert off.max() < 0.15


def test_bad_logits_and_bad_slots_are_errors_not_garbage():
    model = qwen3(torch.bfloat16)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with LLM(model, device="cuda", kv_cache_gib=0.1, max_num_seqs=8) as llm:
        expected = tokens_of(llm.generate([[5, 6]], params, use_tqdm=False))
        weight = model.model.norm.weight.data
        kept = weight.clone()
        weight.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="hold NaN or infinity"):
            llm.generate([[7, 8], [9]], params, use_tqdm=False)
        weight.copy_(kept)
        assert tokens_of(llm.generate([[5, 6]], params, use_tqdm=False)) == expected
        tables = llm.engine.scheduler.block_tables
        page = llm.engine.pool.num_pages + 5
        on_device = llm.engine.runner._on_device

        def broken(plan, *args):
            tables[plan.rows, 0] = page
            return on_device(plan, *args)

        llm.engine.runner._on_device = broken
        with pytest.raises(RuntimeError, match=r"on the device: a .* beyond|slot outside"):
            llm.generate([[7, 8]], params, use_tqdm=False)


def test_a_table_of_any_width_costs_the_same_results():
    """Graphs hold one width of block tables, the largest."""
    prompts = np.random.default_rng(0).integers(3, VOCAB, (4, 50)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    found = []
    for length in (128, 2048):
        with LLM(
            qwen3(torch.float32), device="cuda", kv_cache_gib=0.2, max_model_len=length
        ) as llm:
            found.append(tokens_of(llm.generate(prompts, params, use_tqdm=False)))
    assert found[0] == found[1]


LOSE_THE_GPU = """
import sys, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from torch_pd import LLM, SamplingParams
from torch_pd.engine.device import DeviceLost

config = Qwen3Config(
    vocab_size=999, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
)
model = Qwen3ForCausalLM(config).to(torch.bfloat16)
tiers = {"host_kv_gib": 0.1} if sys.argv[1] == "tiers" else {}
llm = LLM(model, device="cuda", kv_cache_gib=0.1, max_num_seqs=8, **tiers)
launch, steps = llm.engine.runner.launch, []

def launch_and_break(*args, **kwargs):
    steps.append(1)
    if len(steps) == 5:  # an index out of range ends the context, as a fault of the GPU does
        torch.zeros(4, device="cuda")[torch.tensor([99], device="cuda")]
    return launch(*args, **kwargs)

llm.engine.runner.launch = launch_and_break
params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
for _ in range(2):  # and the next call says so as well
    try:
        with llm:
            llm.generate([[5, 6, 7], [8, 9]], params, use_tqdm=False)
    except (DeviceLost, RuntimeError) as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize("kind", ["plain", "tiers"])
def test_a_gpu_lost_in_a_step_is_one_clear_error(kind):
    command = [sys.executable, "-c", LOSE_THE_GPU, kind]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90)
    lost, ended = result.stdout.splitlines()
    assert lost.startswith("DeviceLost the GPU cuda:0 failed during a step"), result.stderr
    assert "device-side assert" in lost
    assert ended.startswith("RuntimeError this LLM has been shut down")
    assert result.returncode == 0, result.stderr


def test_memory_of_another_process_is_named():
    holder = "import torch; x = torch.zeros(3 << 28, device='cuda'); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        total = torch.cuda.mem_get_info()[1]
        share = 3 * 2**30 / total
        # In a container the driver does not tell whose the memory is.
        expected = r"other processes \d+\.\d\d = .*(end python|use a larger GPU)"
        with pytest.raises(ValueError, match=expected):
            LLM(qwen3(torch.bfloat16), device="cuda", gpu_memory_utilization=share)
        other.communicate("\n")
