"""Foresees a run without a GPU: memory of each rank, step times, tokens a second, what to choose.

Throughput is simulated: one rank's share of the prompts goes through the scheduler's policy
(running sequences first, then admission while KV pages last, the newest preempted) and every step
costs what `torch_pd.costs` says. All ranks are alike, so one stands for all.
"""

import dataclasses
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torch_pd.config import EngineConfig
from torch_pd.costs import Costs, Machine, ModelShape, Step
from torch_pd.sizing import GIB, KVShape, pages_of_budget

MODES = ("replicate", "ship", "stream", "auto")
CONTEXT_BYTES = 600 << 20
"""CUDA context, cuBLAS workspace and the library's own kernels."""
GRAPH_BYTES = 512 << 20
"""Decode graphs up to 1,024 rows."""
NCCL_BYTES = 512 << 20
"""Channels and buffers of one communicator."""
SHIP_ROWS = 1024
"""Rows of a rank in the largest shipped step for which buffers are kept."""
_CLOSE = 1.02
"""A simpler way is taken if it is not slower than the best by more than this."""
_JUMP = 16
"""Decode steps between two looks at the state, if nothing can change."""


@dataclass(frozen=True)
class Work:
    """Prompts of ``input`` tokens (uniform within 50%), ``output`` tokens each."""

    num_prompts: int
    input: int
    output: int


@dataclass(frozen=True)
class Run:
    """What a simulated run did, on one rank."""

    seconds: float
    output_tokens: int
    stream_steps: int
    ship_steps: int
    resident_steps: int
    preemptions: int
    most_running: int


@dataclass(frozen=True)
class ModePlan:
    """One way to run: its memory and, if it fits, its speed."""

    mode: str
    memory: dict[str, int]
    """Bytes of a rank by kind; their sum is the budget."""
    kv_tokens: int
    """Of a rank."""
    missing: int
    """Bytes that are lacking, 0 if it fits."""
    prefill_ms: float = 0.0
    """A step of max_num_batched_tokens prompt tokens."""
    decode_ms: float = 0.0
    """A step in which every sequence that the KV pages hold decodes."""
    decode_rows: int = 0
    tokens_per_second: float = 0.0
    """Output tokens of all ranks."""
    run: Run | None = None


@dataclass(frozen=True)
class Plan:
    """What `plan` found; ``str()`` is a table."""

    model: str
    gpus: int
    budget: int
    work: Work
    machine: str
    modes: dict[str, ModePlan]
    choice: str
    """One of MODES."""
    reason: str
    tiers: dict[str, int] = field(default_factory=dict)
    """KV tokens of a rank by tier, beside those of the GPU: host, disk."""

    @property
    def weights(self) -> str:
        """The value of ``EngineConfig.weights`` for the choice."""
        return "resident" if self.choice == "replicate" else "pooled"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        return dataclasses.asdict(self) | {"weights": self.weights}

    def __str__(self) -> str:
        plans = list(self.modes.values())
        kinds = list(plans[0].memory)

        def row(name: str, cells: list[str]) -> str:
            return f"{name:30}" + "".join(f"{cell:>12}" for cell in cells)

        def fitting(text: Any) -> list[str]:
            return [text(p) if p.run is not None else "-" for p in plans]

        work = self.work
        lines = [
            f"{self.model} on {self.gpus} x {self.machine}, {self.budget / GIB:.1f} GiB of each; "
            f"{work.num_prompts} prompts of {work.input} tokens, {work.output} out",
            "",
            row("", [p.mode for p in plans]),
        ]
        for kind in kinds:
            lines.append(row(f"{kind} GiB", [f"{p.memory[kind] / GIB:.2f}" for p in plans]))
        lines += [
            row("lacking GiB", [f"{p.missing / GIB:.2f}" if p.missing else "" for p in plans]),
            row("KV tokens, a rank", [f"{p.kv_tokens:,}" for p in plans]),
            row("KV tokens, all", [f"{p.kv_tokens * self.gpus:,}" for p in plans]),
            row("prefill step ms", fitting(lambda p: f"{p.prefill_ms:.1f}")),
            row("decode step rows", fitting(lambda p: f"{p.decode_rows}")),
            row("decode step ms", fitting(lambda p: f"{p.decode_ms:.1f}")),
            row("steps streamed", fitting(lambda p: f"{p.run.stream_steps:,}")),
            row("steps shipped", fitting(lambda p: f"{p.run.ship_steps:,}")),
            row("preemptions", fitting(lambda p: f"{p.run.preemptions:,}")),
            row("output tok/s", fitting(lambda p: f"{p.tokens_per_second:,.0f}")),
            *(
                row(f"KV tokens on {tier}, a rank", [f"{tokens:,}"] * len(plans))
                for tier, tokens in self.tiers.items()
            ),
            "",
            f"-> {self.choice}: {self.reason}",
        ]
        return "\n".join(line.rstrip() for line in lines)


def plan(
    model: "str | Path | ModelShape",
    *,
    gpus: int,
    gpu_memory: float = 80.0,
    input: int = 1024,
    output: int = 256,
    num_prompts: int | None = None,
    machine: Machine | None = None,
    **config: Any,
) -> Plan:
    """What each way to place the weights on ``gpus`` GPUs would give; needs no GPU and no weights.

    Args:
        model: a folder with config.json, or its shape.
        gpus: ranks that share the weights.
        gpu_memory: GiB of each GPU.
        input, output: tokens of a prompt (mean; uniform within 50%) and of its answer.
        num_prompts: of the run; default 256 a GPU.
        machine: constants of GPU and links; default H100 with NVLink.
        **config: fields of `EngineConfig` that matter to memory and steps.

    Raises:
        ValueError: nothing fits, with the arithmetic; or a number that cannot be.
    """
    return plan_settings(
        model,
        EngineConfig.from_kwargs(**config),
        gpus=gpus,
        gpu_memory=gpu_memory,
        input=input,
        output=output,
        num_prompts=num_prompts,
        machine=machine,
    )


def plan_settings(
    model: "str | Path | ModelShape",
    settings: EngineConfig,
    *,
    gpus: int,
    gpu_memory: float,
    input: int = 1024,
    output: int = 256,
    num_prompts: int | None = None,
    machine: Machine | None = None,
) -> Plan:
    """`plan` for settings at hand; also what weights="auto" follows, for prompts of usual length.

    Raises:
        ValueError: see `plan`.
    """
    machine = machine or Machine()
    num_prompts = 256 * gpus if num_prompts is None else num_prompts
    for name, value in (
        ("gpus", gpus), ("input", input), ("output", output), ("num_prompts", num_prompts)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if gpu_memory <= 0:
        raise ValueError(f"gpu_memory must be > 0 GiB, got {gpu_memory}")
    if gpus % settings.weight_replicas:
        raise ValueError(
            f"weight_replicas={settings.weight_replicas} does not divide {gpus} GPUs into pools of "
            "equal size"
        )
    if isinstance(model, ModelShape):
        name, shape = "model", model
    else:
        name, shape = Path(model).name, read_shape(Path(model), settings.dtype)
    work = Work(num_prompts, input, output)
    budget = int(gpu_memory * GIB * settings.gpu_memory_share)
    shares = gpus // settings.weight_replicas > 1 and shape.layer_params > 0
    modes = MODES if shares else MODES[:1]
    plans = {mode: _plan_mode(mode, shape, machine, settings, gpus, budget, work) for mode in modes}
    fitting = {mode: p for mode, p in plans.items() if p.run is not None}
    if not fitting:
        best = min(plans.values(), key=lambda p: p.missing)
        lines = " + ".join(f"{kind} {size:,}" for kind, size in best.memory.items() if size > 0)
        raise ValueError(
            f"{name} does not fit on {gpus} x {gpu_memory:g} GiB: {best.mode} needs {lines} bytes, "
            f"{best.missing:,} more than the budget of {budget:,} ({gpu_memory:g} GiB x "
            f"gpu_memory_utilization={settings.gpu_memory_share:g}); use more GPUs, a smaller "
            "max_num_batched_tokens or max_num_seqs, or a higher gpu_memory_utilization"
        )
    choice, reason = _choose(plans, fitting)
    tiers = {
        tier: int(gib * GIB) // shape.kv_token_bytes
        for tier, gib in (("host", settings.host_kv_gib), ("disk", settings.disk_kv_gib))
        if gib
    }
    return Plan(name, gpus, budget, work, machine.name, plans, choice, reason, tiers)


def _choose(plans: dict[str, ModePlan], fitting: dict[str, ModePlan]) -> tuple[str, str]:
    """The mode and why; of nearly equal ones the first of MODES but auto before ship and stream."""
    best = max(p.tokens_per_second for p in fitting.values())
    order = [mode for mode in ("replicate", "auto", "ship", "stream") if mode in fitting]
    choice = next(m for m in order if fitting[m].tokens_per_second * _CLOSE >= best)
    speed = fitting[choice].tokens_per_second
    if len(plans) == 1:
        return choice, "there is one GPU, or the linears are of a kind that is not shared"
    if choice == "replicate":
        others = max(p.tokens_per_second for m, p in fitting.items() if m != "replicate")
        return choice, (
            f"every GPU can hold all weights and still {plans[choice].kv_tokens:,} tokens of KV; "
            f"sharing them would give {others:,.0f} output tok/s, not {speed:,.0f}"
        )
    if "replicate" not in fitting:
        return choice, (
            f"all weights on every GPU would lack {plans['replicate'].missing / GIB:.1f} GiB; "
            f"shared, {speed:,.0f} output tok/s"
        )
    replicate = fitting["replicate"]
    return choice, (
        f"{speed:,.0f} output tok/s, {speed / replicate.tokens_per_second:.2f}x of replicating: "
        f"{plans[choice].kv_tokens / max(1, replicate.kv_tokens):.1f}x the KV tokens"
    )


def _plan_mode(
    mode: str,
    shape: ModelShape,
    machine: Machine,
    settings: EngineConfig,
    gpus: int,
    budget: int,
    work: Work,
) -> ModePlan:
    shards = 1 if mode == "replicate" else gpus // settings.weight_replicas
    kv_shape = kv_shape_of(shape, settings)
    memory = memory_of(mode, shape, settings, shards)
    left = budget - sum(memory.values())
    length = min(shape.max_position or 1 << 60, work.input + work.input // 2 + work.output)
    least = max(2, -(-length // settings.block_size) + 1) * kv_shape.page_bytes
    if settings.kv_cache_gib is not None:
        left = min(left, int(settings.kv_cache_gib * GIB))
    missing = max(0, least - left)
    if missing:
        memory["KV pages"] = least
        memory["unused"] = 0
        return ModePlan(mode, memory, 0, missing)
    pages = pages_of_budget(kv_shape, left, "the plan")
    memory["KV pages"] = pages * kv_shape.page_bytes
    memory["unused"] = budget - sum(memory.values())
    kv_tokens = (pages - 1) * settings.block_size
    kv_token_bytes = kv_shape.page_bytes // settings.block_size
    costs = Costs(shape, machine, shards, kv_token_bytes)
    run = simulate(
        costs, mode, settings, kv_tokens, dataclasses.replace(
            work, num_prompts=-(-work.num_prompts // gpus)
        ),
    )  # fmt: skip
    mean = work.input + work.output / 2
    rows = max(1, min(settings.max_num_seqs, int(kv_tokens / mean), -(-work.num_prompts // gpus)))
    budget_tokens = settings.max_num_batched_tokens
    prompts = max(1, budget_tokens // work.input)
    prefill = Step(budget_tokens, prompts, 0, budget_tokens * min(work.input, budget_tokens) // 2)
    decode = Step(rows, rows, int(rows * mean), graph=not settings.enforce_eager)
    return ModePlan(
        mode,
        memory,
        kv_tokens,
        0,
        step_seconds(costs, mode, prefill)[0] * 1e3,
        step_seconds(costs, mode, decode)[0] * 1e3,
        rows,
        work.num_prompts * work.output / run.seconds,
        run,
    )


def kv_shape_of(shape: ModelShape, settings: EngineConfig) -> KVShape:
    """The KV pages of a model; fp8 and int8 pages hold a float32 scale for each token and head."""
    scaled = settings.kv_cache_dtype != "auto"
    return KVShape(
        shape.num_layers,
        shape.num_kv_heads,
        shape.head_dim,
        1 if scaled else shape.itemsize,
        settings.block_size,
        scaled=scaled,
    )


def default_ring_bytes(shape: ModelShape, shards: int) -> int:
    """What is pulled of two layers (see `weights.ring`)."""
    layer = shape.layer_params // shape.num_layers * shape.itemsize
    return 2 * layer * (shards - 1) // shards


def memory_of(mode: str, shape: ModelShape, settings: EngineConfig, shards: int) -> dict[str, int]:
    """Bytes of a rank by kind, without KV pages."""
    tokens, rows = settings.max_num_batched_tokens, settings.max_num_seqs
    wide = max(shape.qkv_width + shape.num_heads * shape.head_dim, 3 * shape.intermediate)
    activations = tokens * (wide + 3 * shape.hidden) * shape.itemsize
    logits = min(rows, tokens) * shape.vocab * (shape.itemsize + 4)
    pooled = mode != "replicate" and shards > 1
    ring = communication = 0
    if pooled and mode != "ship":
        asked = settings.ring_gib
        ring = default_ring_bytes(shape, shards) if asked is None else int(asked * GIB)
    if pooled and mode != "stream":
        row = 2 * shape.hidden + shape.qkv_width + 3 * shape.intermediate // shards
        communication = NCCL_BYTES + shards * SHIP_ROWS * row * shape.itemsize
    share = -(-shape.pooled_bytes // shards)
    return {
        "resident weights": shape.resident_bytes + (0 if pooled else shape.pooled_bytes),
        "shard": share if pooled else 0,
        "ring": ring,
        "activations": activations + logits,
        "communication": communication,
        "graphs": 0 if settings.enforce_eager or mode == "stream" else GRAPH_BYTES,
        "context": CONTEXT_BYTES,
    }


def step_seconds(costs: Costs, mode: str, step: Step) -> tuple[float, str]:
    """Seconds of a step and how its weights are used."""
    if mode == "replicate":
        return costs.resident(step), "resident"
    ways = {}
    if mode in ("stream", "auto"):
        ways["stream"] = costs.stream(step)
    if mode in ("ship", "auto"):
        ways["ship"] = costs.ship(step)
    way = min(ways, key=ways.__getitem__)
    return ways[way], way


def simulate(costs: Costs, mode: str, settings: EngineConfig, kv_tokens: int, work: Work) -> Run:
    """One rank's run through the scheduler's policy, step by step (see `engine.scheduler`).

    Args:
        kv_tokens: that the pool holds.
        work: prompts of this rank.
    """
    rng = random.Random(0)
    low, high = max(1, work.input - work.input // 2), work.input + work.input // 2
    prompts = [low + (high - low) * (2 * i + 1) // (2 * work.num_prompts)
               for i in range(work.num_prompts)]  # fmt: skip
    rng.shuffle(prompts)
    waiting = [(length, 0) for length in reversed(prompts)]  # tokens to compute, tokens put out
    page = settings.block_size
    known = np.zeros(0, np.int64)  # tokens of each running sequence
    computed = np.zeros(0, np.int64)
    out = np.zeros(0, np.int64)
    seconds, preemptions, most = 0.0, 0, 0
    steps = {"resident": 0, "stream": 0, "ship": 0}

    def used(lengths: np.ndarray) -> int:
        return int((-(-lengths // page)).sum()) * page

    while waiting or len(known):
        while len(known) > 1 and used(known) > kv_tokens:
            waiting.append((int(known[-1]), int(out[-1])))
            known, computed, out = known[:-1], computed[:-1], out[:-1]
            preemptions += 1
        budget = settings.max_num_batched_tokens
        counts = np.minimum(known - computed, budget)
        counts = np.minimum(counts, np.maximum(0, budget - (np.cumsum(counts) - counts)))
        budget -= int(counts.sum())
        held = used(known)
        admitted: list[tuple[int, int, int]] = []
        while waiting and budget > 0 and len(known) + len(admitted) < settings.max_num_seqs:
            length = waiting[-1][0]
            held += -(-length // page) * page
            crowded = len(known) + len(admitted) > 0
            if crowded and held > kv_tokens - kv_tokens // 100:
                break
            admitted.append((*waiting.pop(), min(budget, length)))
            budget -= admitted[-1][2]
        if admitted:
            new = np.array(admitted, np.int64)
            known, out = np.append(known, new[:, 0]), np.append(out, new[:, 1])
            computed = np.append(computed, np.zeros(len(new), np.int64))
            counts = np.append(counts, new[:, 2])
        most = max(most, len(known))
        decoding = (counts == 1) & (computed > 0)
        after = computed + counts
        samples = after == known
        pairs = int(((after * (after + 1) - computed * (computed + 1)) // 2)[~decoding].sum())
        pure = bool(decoding.all())
        times = 1
        if pure:
            # Nothing changes but the lengths until one ends or the pages run out.
            room = max(1, (kv_tokens - held) // max(1, len(known)))
            times = max(1, min(_JUMP, int((work.output - out).min()), room))
        step = Step(
            int(counts.sum()),
            int(samples.sum()),
            int(known[decoding].sum()) + int(decoding.sum()) * (times // 2),
            pairs,
            graph=pure and not settings.enforce_eager and mode != "stream",
        )
        cost, way = step_seconds(costs, mode, step)
        seconds += cost * times
        steps[way] += times
        computed = after + (times - 1)
        known = known + samples * times
        out = out + samples * times
        left = out < work.output
        if not left.all():
            known, computed, out = known[left], computed[left], out[left]
    return Run(
        seconds,
        work.num_prompts * work.output,
        steps["stream"],
        steps["ship"],
        steps["resident"],
        preemptions,
        most,
    )


def read_shape(path: Path, dtype: str = "auto") -> ModelShape:
    """The shape of the model that a folder's config.json describes; builds it without memory.

    Raises:
        ValueError: no model folder, or not a causal LM.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = path.expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(f"{str(path)!r} has no config.json, so it is not a model folder")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{str(path / 'config.json')!r} does not describe a causal LM: {error}"
        ) from error
    stored = config.get_text_config().dtype or config.dtype or torch.bfloat16
    kind = stored if dtype == "auto" else getattr(torch, dtype)
    return shape_of(model, torch.empty(0, dtype=kind).element_size())


def shape_of(model: Any, itemsize: int) -> ModelShape:
    """The shape of a Hugging Face causal LM, on any device ("meta" too)."""
    from torch import nn

    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = bool(head is None or config.tie_word_embeddings)
    linears = expert_params = total = 0
    for name, module in model.named_modules():
        if module in (embedding, head):
            continue
        expert = "expert" in name
        for parameter in module.parameters(recurse=False):
            total += parameter.numel()
            if expert:
                expert_params += parameter.numel()
            elif isinstance(module, nn.Linear) and parameter.dim() == 2:
                linears += parameter.numel()
    heads = config.num_attention_heads
    hidden = config.hidden_size
    experts = next(
        (n for key in ("num_local_experts", "num_experts", "n_routed_experts")
         if (n := getattr(config, key, None))), 0,
    )  # fmt: skip
    per_token = getattr(config, "num_experts_per_tok", None) or 0
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab=embedding.weight.shape[0],
        itemsize=itemsize,
        layer_params=linears,
        expert_params=expert_params,
        expert_share=per_token / experts if experts else 0.0,
        tied=tied,
        other_params=total - linears - expert_params,
        max_position=getattr(config, "max_position_embeddings", 0) or 0,
    )
