"""Foresees a run without a GPU: memory of each rank, step times, tokens a second, what to choose.

Memory is what the ledger of a started rank would say (engine/footprint.py); throughput that of the
ranks' own schedulers over the cost model (engine/rehearsal.py).
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_pd.config import EngineConfig, as_float
from torch_pd.costs import Costs, Machine, ModelShape, Step
from torch_pd.engine.footprint import CONTEXT_BYTES, dims_of, footprint
from torch_pd.engine.rehearsal import Run, Work, rehearse
from torch_pd.engine.shape import kv_shape_of, read_shape
from torch_pd.sizing import CHUNK_UNIT, GIB, chunk_bytes, lent_bytes, most_pages, pages_of_budget

MODES = ("replicate", "ship", "stream", "auto")
_CLOSE = 1.02
"""A simpler way is taken if it is not slower than the best by more than this."""


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
    owner_memory: dict[str, int] = field(default_factory=dict)
    """Bytes by kind of a rank that holds weights and no pages; ``memory`` is another's then."""


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
    """KV tokens of a rank by tier, beside those of the GPU: host, peer, disk."""
    lenders: int = 0
    """GPUs that hold no weights and run nothing: their memory is lent to the others."""
    param_ranks: int = 0
    """GPUs that hold the weights and no pages."""

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

        work, data_ranks = self.work, self.gpus - self.lenders - self.param_ranks
        roles = f" ({self.lenders} only lend memory)" if self.lenders else ""
        if self.param_ranks:
            roles = f" ({self.param_ranks} for weights, {data_ranks} for KV pages)"
        lines = [
            f"{self.model} on {self.gpus} x {self.machine}, {self.budget / GIB:.1f} GiB of each"
            f"{roles}; "
            f"{work.num_prompts} prompts of {work.input} tokens, {work.output} out",
            "",
            row("", [p.mode for p in plans]),
        ]
        for kind in kinds:
            lines.append(row(f"{kind} GiB", [f"{p.memory[kind] / GIB:.2f}" for p in plans]))
        if self.param_ranks:
            every = [sum(p.owner_memory.values()) / GIB for p in plans]
            lines.append(row("of a rank with weights GiB", [f"{gib:.2f}" for gib in every]))
        lines += [
            row("lacking GiB", [f"{p.missing / GIB:.2f}" if p.missing else "" for p in plans]),
            row("KV tokens, a rank", [f"{p.kv_tokens:,}" for p in plans]),
            row("KV tokens, all", [f"{p.kv_tokens * data_ranks:,}" for p in plans]),
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
        **config: fields of `EngineConfig` that matter to memory and steps. With ``param_ranks``
            weights are "pooled".

    Raises:
        ValueError: nothing fits, with the arithmetic; or a number that cannot be.
    """
    if config.get("param_ranks") is not None:
        config.setdefault("weights", "pooled")
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
    if as_float("gpu_memory", gpu_memory) <= 0:
        raise ValueError(f"gpu_memory must be > 0 GiB, got {gpu_memory}")
    if gpus % settings.weight_replicas:
        raise ValueError(
            f"weight_replicas={settings.weight_replicas} does not divide {gpus} GPUs into pools of "
            "equal size"
        )
    apart = settings.param_ranks is not None and settings.data_ranks is not None
    if (settings.param_ranks is not None) != apart or (
        apart and (settings.peer_kv_gib or settings.weight_replicas > 1)
    ):
        raise ValueError(
            "the planner knows groups in which every rank holds weights and pages, lenders, and "
            "one group of parameter and data ranks apart: plan without param_ranks, or with "
            "data_ranks too and without peer_kv_gib and weight_replicas"
        )
    if apart:
        settings.check_ranks(gpus)
    if isinstance(model, ModelShape):
        name, shape = "model", model
    else:
        name, shape = Path(model).name, read_shape(Path(model), settings.dtype)
    work = Work(num_prompts, input, output)
    budget = int(gpu_memory * GIB * settings.gpu_memory_share)
    lenders = _check_lenders(settings, gpus, budget)
    serving = gpus - lenders
    alone = gpus // settings.weight_replicas == 1 or lenders
    shares = not alone and dims_of(shape) is not None
    modes: tuple[str, ...] = MODES if shares else MODES[:1]
    if apart:
        if not shares:
            raise ValueError(f"the linears of {name} are of a kind that is not shared")
        modes = MODES[1:]
    plans = {
        mode: _plan_mode(mode, shape, machine, settings, serving, budget, work) for mode in modes
    }
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
    if settings.param_ranks is not None:
        speed = f"{fitting[choice].tokens_per_second:,.0f} output tok/s"
        reason = f"the weights are on {len(settings.param_ranks)} GPUs; {speed}"
    if lenders:
        reason = f"the weights are on {serving} GPUs; {lenders} lend their memory"
    tiers = {
        tier: int(nbytes) // shape.kv_token_bytes
        for tier, nbytes in (
            ("host", settings.host_kv_gib * GIB),
            ("peer", _borrowed_bytes(settings, gpus)),
            ("disk", settings.disk_kv_gib * GIB),
        )
        if nbytes
    }
    owners = len(settings.param_ranks or ())
    return Plan(
        name, gpus, budget, work, machine.name, plans, choice, reason, tiers, lenders, owners
    )


def _borrowed_bytes(settings: EngineConfig, gpus: int) -> int:
    """Of the memory of all lenders, what each rank that runs requests has."""
    if settings.data_ranks is None or not settings.peer_kv_gib:
        return 0
    borrowers = len(settings.data_ranks)
    return (gpus - borrowers) * lent_bytes(settings.peer_kv_gib, borrowers)


def _check_lenders(settings: EngineConfig, gpus: int, budget: int) -> int:
    """GPUs that only lend memory.

    Raises:
        ValueError: there is no lender, or it lacks the memory.
    """
    if not settings.peer_kv_gib:
        return 0
    settings.check_ranks(gpus)
    assert settings.data_ranks is not None
    if settings.peer_kv_gib * GIB > budget - CONTEXT_BYTES:
        raise ValueError(
            f"peer_kv_gib={settings.peer_kv_gib:g}: a lender has a budget of {budget / GIB:.2f} - "
            f"context {CONTEXT_BYTES / GIB:.2f} = {(budget - CONTEXT_BYTES) / GIB:.2f} GiB: lower "
            "peer_kv_gib"
        )
    return gpus - len(settings.data_ranks)


def _choose(plans: dict[str, ModePlan], fitting: dict[str, ModePlan]) -> tuple[str, str]:
    """The mode and why; of nearly equal ones the first of MODES but auto before ship and stream."""
    best = max(p.tokens_per_second for p in fitting.values())
    order = [mode for mode in ("replicate", "auto", "ship", "stream") if mode in fitting]
    choice = next(m for m in order if fitting[m].tokens_per_second * _CLOSE >= best)
    speed = fitting[choice].tokens_per_second
    if "replicate" not in plans:
        return choice, ""
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
    ranks = 1 if mode == "replicate" else gpus // settings.weight_replicas
    kv_shape = kv_shape_of(shape, settings)
    longest = min(shape.max_position or 1 << 20, settings.max_model_len or 1 << 20)
    owner: dict[str, int] = {}
    costs = Costs(
        shape,
        machine,
        ranks,
        kv_shape.page_bytes // settings.block_size,
        whole=settings.weight_layout == "layer",
    )
    if settings.param_ranks is not None and settings.data_ranks is not None:
        owner = footprint(mode, shape, settings, ranks, longest)  # of the fullest
        lacking = sum(owner.values()) + 2 * kv_shape.page_bytes - budget
        if lacking > 0:
            return ModePlan(mode, owner, 0, lacking)
        gpus = len(settings.data_ranks)
        shards = len(settings.param_ranks)
        costs = dataclasses.replace(costs, shards=shards, data_ranks=gpus)
    rank = None if not owner or settings.data_ranks is None else settings.data_ranks[0]
    memory = footprint(mode, shape, settings, ranks, longest, rank)
    left = budget - sum(memory.values())
    length = min(longest, work.input + work.input // 2 + work.output)
    least = max(2, -(-length // settings.block_size) + 1) * kv_shape.page_bytes
    most = most_pages(settings.max_num_seqs, longest, settings.block_size) * kv_shape.page_bytes
    if settings.kv_cache_gib is not None:
        most = int(settings.kv_cache_gib * GIB)
    if settings.elastic_kv:
        chunk = chunk_bytes(left, CHUNK_UNIT)
        memory["KV filler"] = chunk
        left = (left - chunk) // chunk * chunk
    left = min(left, most)
    missing = max(0, least - left)
    if missing:
        memory["KV pages"] = least
        memory["unused"] = 0
        return ModePlan(mode, memory, 0, missing, owner_memory=owner)
    pages = pages_of_budget(kv_shape, left, "the plan")
    memory["KV pages"] = pages * kv_shape.page_bytes
    memory["unused"] = budget - sum(memory.values())
    kv_tokens = (pages - 1) * settings.block_size
    groups = settings.weight_replicas if mode != "replicate" else gpus
    share = dataclasses.replace(work, num_prompts=-(-work.num_prompts // groups))
    run = rehearse(costs, mode, settings, kv_tokens, share, longest)
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
        owner,
    )


def step_seconds(costs: Costs, mode: str, step: Step) -> tuple[float, str]:
    """Seconds of a step and how its weights are used."""
    if mode == "replicate":
        return costs.resident(step), "resident"
    ways = {}
    if mode in ("stream", "auto"):
        ways["stream"] = costs.stream(step)
    if mode in ("ship", "auto"):
        ways["ship"] = costs.ship(step)
        if costs.data_ranks is not None and not step.pairs:
            ways["ship"] = min(ways["ship"], costs.halved(step))
    way = min(ways, key=ways.__getitem__)
    return ways[way], way
