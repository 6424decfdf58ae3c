"""Seconds of a step with weights resident, streamed or shipped: pure arithmetic, no devices.

The same formulas choose between streaming and shipping while a group runs and foresee a run in
`torch_pd.engine.planner`. Per rank and step, with T tokens and m ranks that share one copy of the
weights:

* resident: GEMMs at the rate of the tensor cores or of reading all weights, whichever is slower,
  then attention and the rest.
* streamed: the same, or the pull of (m - 1) / m of the weights over the link if that is slower.
  Each slows the other down: kernels that are bound by memory the pull, the pull the others.
* shipped: every rank computes 1 / m of each linear for the tokens of all, so it reads 1 / m of the
  weights, and pays six collectives a layer.
* shipped with whole layers dealt to the ranks: the owner of a layer computes it for the tokens of
  all, while the others wait.
* shipped with d data ranks beside m parameter ranks: those compute 1 / m of each linear for the
  tokens of all d, which attend; one kind waits while the other works. In halves (nn/halves.py) both
  work, and the weights are read twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

COLLECTIVES_PER_LAYER = 6
"""Gather, q/k/v to the tokens' rank, attention output to the owners, scatter; gather, scatter."""


@dataclass(frozen=True)
class Machine:
    """What one GPU and its links do. The defaults were measured on H100 80GB HBM3 with NVLink."""

    name: str = "H100 80GB"
    flops: float = 710e12
    """Of large bfloat16 GEMMs, a second; on four runs' cards 666 to 730, for seconds on end."""
    attention_flops: float = 320e12
    """Of prefill attention, a second."""
    weight_bandwidth: float = 2.7e12
    """Bytes a second of GEMMs of few rows."""
    memory_bandwidth: float = 2.97e12
    """Bytes a second, read and written, of copies and elementwise ops."""
    kv_bandwidth: float = 2.45e12
    """Bytes of KV a second that decode attention reads."""
    blend: float = 3.2
    """A GEMM takes (compute**p + reading**p) ** (1/p); p = infinity would be perfect overlap."""
    link_bandwidth: float = 349e9
    """Bytes a second that a rank pulls while all others pull too, from rotated peers, and nothing
    else runs. Four GPUs; two: 377e9."""
    contention: float = 0.2
    """Share of the pull's time that kernels bound by arithmetic take longer beside it."""
    pull_loss: float = 0.55
    """Seconds that the pull takes longer for each second of kernels bound by memory beside it."""
    collective_bandwidth: float = 400e9
    """Bytes a second that a rank receives in large collectives."""
    collective_seconds: float = 12e-6
    """Of a small collective inside a graph."""
    collective_ramp: float = 14e-6
    """More than that, from about 1 MiB on."""
    eager_collective_seconds: float = 50e-6
    """Least time of a collective launched from the host."""
    mailbox_bytes: int = 10 << 20
    """Of the rows of one rank, up to which an exchange goes by mapped memory (weights/mailbox)."""
    mailbox_bandwidth: float = 300e9
    """Bytes a second that a rank receives by it."""
    mailbox_seconds: float = 5.5e-6
    """Of a small exchange by it inside a step's graph, with the gaps between kernels."""
    layer_launch_seconds: float = 80e-6
    """Least time of a layer launched from the host."""
    step_seconds: float = 0.6e-3
    """Of what a step costs besides the model: planning, sampling, hand-over."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Machine":
        """Of measured constants by name; the others keep their defaults (TypeError if unknown)."""
        return replace(cls(), **values)


@dataclass(frozen=True)
class ModelShape:
    """What costs depend on. Parameters are counts; experts stay resident and are not pooled."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    itemsize: int
    layer_params: int
    """Of the linears of all layers that can be pooled: attention and gated MLPs."""
    expert_params: int = 0
    expert_share: float = 0.0
    """Of the experts that a token uses."""
    tied: bool = False
    """The embedding is the lm_head."""
    other_params: int = 0
    """Norms, biases and whatever else every rank holds."""
    max_position: int = 0

    @property
    def head_params(self) -> int:
        """Of the lm_head."""
        return self.vocab * self.hidden

    @property
    def embedding_params(self) -> int:
        """Of the embedding, 0 if it is the lm_head."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def pooled_bytes(self) -> int:
        """Of all that a pool splits: linears, lm_head, embedding."""
        return (self.layer_params + self.head_params + self.embedding_params) * self.itemsize

    @property
    def resident_bytes(self) -> int:
        """Of what every rank holds, pooled or not."""
        return (self.other_params + self.expert_params) * self.itemsize

    @property
    def pulled_bytes(self) -> int:
        """Of a full copy as a streaming step uses it; of the embedding only rows are fetched."""
        return (self.layer_params + self.head_params) * self.itemsize

    @property
    def kv_token_bytes(self) -> int:
        """Of K and V of one token in all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def qkv_width(self) -> int:
        """Columns of the merged q, k, v."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class Step:
    """What one rank does in one step."""

    tokens: int
    """Rows of the linears."""
    samples: int
    """Rows of the lm_head."""
    kv_tokens: int
    """Tokens whose K and V decoding sequences read."""
    pairs: int = 0
    """Query-key pairs of prompt tokens."""
    graph: bool = False
    """Replayed from a CUDA graph: no launches from the host."""


@dataclass(frozen=True)
class Costs:
    """Seconds of steps on a rank of a pool.

    Args:
        shape, machine: of the model and of each GPU.
        shards: ranks that share one copy of the weights (m); 1 has no remote shard.
        kv_token_bytes: of one token's K and V as they are kept (fp8 and int8 pages are half).
        data_ranks: that have tokens where the shards' ranks have none; None: all have both.
        whole: each layer lies on one of the shards' ranks (weight_layout="layer").
    """

    shape: ModelShape
    machine: Machine
    shards: int = 1
    kv_token_bytes: int | None = None
    data_ranks: int | None = None
    whole: bool = False

    def resident(self, step: Step) -> float:
        """Every weight on this GPU."""
        return self._launched(self._linears(step, 1) + self._rest(step), step)

    def pull_seconds(self) -> float:
        """Of pulling all other shards."""
        if self.data_ranks is not None:
            # All of it; a parameter rank sends to several data ranks, or a data rank reads several.
            each = self.machine.link_bandwidth * min(1.0, self.shards / self.data_ranks)
            return self.shape.pulled_bytes / each
        remote = self.shape.pulled_bytes * (self.shards - 1) / self.shards
        return remote / self.machine.link_bandwidth

    def stream(self, step: Step) -> float:
        """Weights pulled through the ring beside the computation; launched from the host."""
        machine, pull = self.machine, self.pull_seconds()
        compute = self._launched(self._linears(step, 1) + self._rest(step), step)
        if pull == 0:
            return compute
        pull += machine.pull_loss * self._bound_by_memory(step) + machine.step_seconds
        return max(pull, compute + machine.contention * self.pull_seconds())

    def _bound_by_memory(self, step: Step) -> float:
        """Seconds of a whole copy's kernels that use all of the memory's bandwidth. Of GEMMs that
        compute about as long as they read it is some."""
        shape, machine = self.shape, self.machine
        seconds = step.kv_tokens * self._kv_token_bytes / machine.kv_bandwidth
        seconds += self._elementwise(step)
        for rows, params in (
            (step.tokens, shape.layer_params),
            (step.samples, shape.head_params),
        ):
            reading = params * shape.itemsize / machine.weight_bandwidth
            computing = 2 * rows * params / machine.flops
            if rows and params:
                seconds += reading / (1 + (computing / reading) ** 2)
        return seconds

    def ship(self, step: Step) -> float:
        """Activations sent to the shards and back; all ranks that have rows have as many as this
        one."""
        compute = self._linears(step, self.shards, self.ranks) + self._rest(step)
        return self._launched(compute, step) + self.exchange_seconds(step)

    def halved(self, step: Step) -> float:
        """`ship` with data ranks apart in two half-batches. By their order of steps a rank attends
        for one half while the MLP of the other is computed, and only then."""
        shape, d, m = self.shape, self.ranks, self.shards
        half = replace(
            step, tokens=-(-step.tokens // 2), samples=0, kv_tokens=-(-step.kv_tokens // 2)
        )
        layers, rest = self._linears(half, m, d), self._rest(half)
        exchanges = self.exchange_seconds(half)
        mlp = 3 * shape.hidden * shape.intermediate * shape.num_layers / shape.layer_params
        seconds = 2 * (max(layers * mlp, rest) + layers * (1 - mlp) + exchanges)
        # One half alone begins, the other alone ends.
        seconds += (layers + rest + exchanges) / shape.num_layers
        seconds += self._linears(replace(step, tokens=0), m, d)  # lm_head
        launches = 0.0 if step.graph else 2 * shape.num_layers * self.machine.layer_launch_seconds
        return max(seconds, launches) + self.machine.step_seconds

    @property
    def ranks(self) -> int:
        """That have tokens."""
        return self.shards if self.data_ranks is None else self.data_ranks

    @property
    def parts(self) -> int:
        """Ranks that compute a layer."""
        return 1 if self.whole else self.shards

    @property
    def shares(self) -> bool:
        """No rank with tokens has all weights."""
        return self.shards > 1 or self.data_ranks is not None

    def exchange_seconds(self, step: Step) -> float:
        """Of all collectives of a shipped step."""
        shape, machine, m, parts = self.shape, self.machine, self.shards, self.parts
        out_width = shape.num_heads * shape.head_dim
        if self.data_ranks is not None:
            # Received in a layer: all rows by each shard's rank, twice whole and once what is its
            # part of the heads; by a data rank two partial sums of each shard, and q, k, v.
            d = self.data_ranks
            width = 2 * (d + parts) * shape.hidden + shape.qkv_width + out_width * d / parts
        elif m == 1:
            return 0.0
        else:
            # Received by a rank, a layer: two gathers and two scatters of rows [hidden] of the
            # m - 1 others, and (m - 1) / m of its own rows' q, k, v and attention outputs.
            width = 4 * (m - 1) * shape.hidden + (shape.qkv_width + out_width) * (m - 1) / parts
        each = step.tokens * shape.itemsize * width / COLLECTIVES_PER_LAYER
        if step.tokens * shape.hidden * shape.itemsize <= machine.mailbox_bytes:
            seconds = machine.mailbox_seconds + each / machine.mailbox_bandwidth
        else:
            seconds = (
                machine.collective_seconds
                + machine.collective_ramp * each / (each + (1 << 20))
                + each / machine.collective_bandwidth
            )
        if not step.graph:
            seconds = max(seconds, machine.eager_collective_seconds)
        return COLLECTIVES_PER_LAYER * shape.num_layers * seconds

    def _matmul(self, rows: float, params: float, read: float) -> float:
        """``rows`` times a matrix of ``params`` whose part of ``read`` parameters is read."""
        machine = self.machine
        if rows == 0 or params == 0:
            return 0.0
        compute = 2 * rows * params / machine.flops
        reading = read * self.shape.itemsize / machine.weight_bandwidth
        high, low = max(compute, reading), min(compute, reading)
        return high * (1 + (low / high) ** machine.blend) ** (1 / machine.blend)

    def _linears(self, step: Step, shards: int, ranks: int = 1) -> float:
        shape = self.shape
        rows = ranks / shards  # of each rank's tokens, that pass through 1 / shards of the weights
        parts = min(shards, self.parts)  # of a layer
        tokens = step.tokens * ranks / parts
        seconds = self._matmul(tokens, shape.layer_params, shape.layer_params / parts)
        seconds += self._matmul(step.samples * rows, shape.head_params, shape.head_params / shards)
        used = min(1.0, step.tokens * shape.expert_share)
        active = shape.expert_params * shape.expert_share
        return seconds + self._matmul(step.tokens, active, shape.expert_params * used)

    def _rest(self, step: Step) -> float:
        """Attention and elementwise ops."""
        shape, machine = self.shape, self.machine
        per_pair = 4 * shape.num_heads * shape.head_dim * shape.num_layers
        return (
            step.pairs * per_pair / machine.attention_flops
            + step.kv_tokens * self._kv_token_bytes / machine.kv_bandwidth
            + self._elementwise(step)
        )

    def _elementwise(self, step: Step) -> float:
        shape = self.shape
        width = 8 * shape.hidden + 2 * shape.qkv_width + 3 * shape.intermediate
        nbytes = step.tokens * width * shape.itemsize * shape.num_layers
        return nbytes / self.machine.memory_bandwidth

    @property
    def _kv_token_bytes(self) -> int:
        return self.kv_token_bytes or self.shape.kv_token_bytes

    def _launched(self, seconds: float, step: Step) -> float:
        """The device's time, or the host's if it cannot launch as fast."""
        launch = 0.0 if step.graph else self.shape.num_layers * self.machine.layer_launch_seconds
        return max(seconds, launch) + self.machine.step_seconds
