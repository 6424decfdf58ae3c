"""Runner: turns a plan of integers into tensors, runs the model and draws tokens.

This is the one place where Python lists become tensors. All arrays of a step go to the device in
one copy; nothing here waits for the device but `Tickets.wait`, so the next step can be prepared and
launched while this one runs. On the CPU the same code has finished when it returns.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from torch_pd import ops
from torch_pd.context import Batch, GroupBatch
from torch_pd.engine.choices import HOST, PLAIN, Choices
from torch_pd.engine.graphs import DecodeGraphs, bucket_sizes, largest_graph
from torch_pd.engine.halving import find_halving
from torch_pd.engine.lockstep import CommonStep
from torch_pd.engine.sampler import SLICE, Sampler, SamplerOutput
from torch_pd.engine.sampling_row import SamplingRow
from torch_pd.engine.scheduler import Plan, Scheduler
from torch_pd.engine.stage import Stage
from torch_pd.engine.staging import Staging
from torch_pd.engine.tickets import Ticket, Tickets
from torch_pd.kv.cache import KVPool
from torch_pd.kv.moves import HOST_BITS
from torch_pd.nn.halves import halve
from torch_pd.nn.patched import forward_packed, patch_state
from torch_pd.nn.pooled import new_logits
from torch_pd.sizing import staging_bytes

logger = logging.getLogger(__name__)

NONE = np.zeros(0, np.int64)


def empty_plan() -> Plan:
    """A step of no sequences."""
    return Plan([], NONE, NONE, NONE, np.zeros(0, bool), sources=NONE, positions=NONE)


@dataclass(slots=True)
class Step:
    """A plan on the device."""

    batch: Batch
    source: Tensor
    """int64 [T], where `Runner.tokens` holds each input token."""
    positions: Tensor
    """int64 [T]."""
    select: Tensor | None
    """int64 [n], rows whose logits are wanted; None: all."""
    settings: Tensor
    """float64 [n, 3], see `ops.sample`."""
    keys: Tensor
    """int64 [n, 4]."""
    moves: Tensor
    """int64 [m, 2], pages to copy first."""


class Runner:
    """Runs the steps of a patched model over one KV pool.

    Args:
        model: a causal LM patched by `torch_pd.patch_model`.
        pool: its KV pages.
        scheduler: whose tables the plans refer to.
        sampler: draws on the CPU.
        max_tokens: of a step.
        serving: for each of the ranks that run every step together (models whose linears are
            shipped) whether it ever has sequences; one without computes a row of padding.
        rank: which of them this is.
        most_tokens: that the pages of a rank with sequences hold; the same on all ranks.
        graphs: `capture` will be called.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        pool: KVPool,
        scheduler: Scheduler,
        sampler: Sampler,
        max_tokens: int,
        serving: Sequence[bool] = (),
        rank: int = 0,
        most_tokens: int = 1 << 60,
        graphs: bool = False,
    ):
        self.model = model
        self.pool = pool
        self.tables = scheduler.tables
        self.sampler = sampler
        self._serving, self._rank = tuple(serving), rank
        self._state = patch_state(model)
        self._most_tokens = most_tokens
        token_bytes = pool.page_bytes // pool.block_size
        self.halving = find_halving(model, self._serving, token_bytes, graphs)
        self.choices = Choices(self.tables, sampler.vocab_size)
        rows, width = self.tables.block_tables.shape
        device = pool.device
        tokens = max(max_tokens, rows)
        capacity = staging_bytes(tokens, rows, width)
        lead = 2 + rows + rows % 2
        self.staging = Staging(8 * lead, capacity, device)
        self.tokens = self.staging.data[: 8 * (lead + tokens)].view(torch.int64)
        """The error flag (2 words), the tokens sampled last, then the step's input ids."""
        self._first_input = lead
        self._block_tables = torch.zeros((rows, width), dtype=torch.int32, device=device)
        """Of the step that a graph runs: graphs hold one width."""
        self._places: Tensor | None = None
        self._entries: np.ndarray | None = None
        self._stage: Stage | None = None
        self.tickets = Tickets(rows, device)
        self.graphs: DecodeGraphs | None = None
        self._logits: Tensor | None = None
        """[rows, vocab] of the step that a graph ran last, where the model can write it there."""
        self.no_graphs = "not captured"
        """Why there are no graphs."""
        self.num_replays = self.num_halved = 0

    def read_places(self, places: Tensor, entries: np.ndarray | None = None) -> None:
        """Block tables may name pages of other pools from now on.

        Args:
            places: see `Batch.places`.
            entries: where the pages under the GPU pool are, see `Carrier.entries`.
        """
        self._places, self._entries = places, entries
        if self.tables.block_tables.shape[1] >= self.pool.num_pages:
            dtype = patch_state(self.model).call.dtype
            self._stage = Stage(self.pool, self.tables.block_tables.shape[1], dtype)

    # Graphs.

    def capture(self) -> None:
        """Captures the decoding steps. A model that cannot be captured (its forward waits for the
        device) runs eagerly, with a warning that says why.

        Raises:
            RuntimeError: it cannot, and other ranks wait for this one.
        """
        sizes = bucket_sizes(largest_graph(len(self._block_tables)))
        self._logits = new_logits(self.model, sizes[-1])
        try:
            self.graphs = DecodeGraphs(sizes, self._prepare_capture, self._halved_sizes(sizes))
        except RuntimeError as error:
            if self._serving:
                raise RuntimeError(
                    f"{error} (shipped steps are not captured with enforce_eager=True)"
                ) from error
            self.no_graphs = str(error).splitlines()[0]
            logger.warning(
                "no CUDA graphs, decoding steps are launched eagerly: %s", self.no_graphs
            )

    def _halved_sizes(self, sizes: Sequence[int]) -> list[int]:
        """Of which half-batches pay with the longest sequences that fit."""
        if self.halving is None:
            return []
        longest = self._block_tables.shape[1] * self.pool.block_size
        most = self._most_tokens
        return [size for size in sizes if self.halving.pays(size, min(size * longest, most))]

    def _prepare_capture(self, size: int, halved: bool) -> Callable[[], Tensor]:
        sizes = self._sizes(size)
        step = self._on_device(empty_plan(), self._own(size))
        self._to_graph(step)
        self._share(sizes, sizes, halved)

        def run() -> Tensor:
            logits = self._forward(step, self._logits)
            self._draw(logits, step)
            return logits

        return run

    def _to_graph(self, step: Step) -> None:
        """Puts the step's block tables where the graphs read them."""
        (group,) = step.batch.groups
        rows, width = group.block_tables.shape
        self._block_tables[:rows, :width].copy_(group.block_tables)
        group.block_tables = self._block_tables[:rows]

    def _sizes(self, size: int) -> list[int]:
        """Rows of each rank in a graph of ``size`` rows."""
        return [size if serves else 1 for serves in self._serving]

    def _own(self, size: int) -> int:
        return self._sizes(size)[self._rank] if self._serving else size

    def _share(self, tokens: Sequence[int], selected: Sequence[int], halved: bool) -> None:
        """Tells the model how many rows each rank brings to its layers and to its head."""
        running = self._state.running
        running.rows = tokens
        running.halves = halve(tokens, self._serving) if halved else None
        running.head_rows = selected if self._state.takes_select else tokens

    # Steps.

    def launch(
        self,
        plan: Plan,
        *,
        extra: np.ndarray = NONE,
        common: CommonStep | None = None,
        streamed: bool = False,
    ) -> Ticket:
        """Starts a step and draws its tokens; does not wait for a GPU.

        Args:
            plan: may be empty in a common step.
            extra: tokens of the plan whose logits the ticket holds behind those that sample.
            common: what all ranks bring, where they run every step together. A rank that has
                nothing computes a row of padding; where all decode, and there are graphs, all pad
                to one size.
            streamed: the weights come through the ring; the step is launched eagerly.

        Returns:
            A ticket for `wait`. Where rows of the plan need the host (`choices.HOST`) or ``extra``
            is given, it holds the logits, and `choose` must come first.
        """
        self.choices.update(plan)
        kind = self.choices.kind_of(plan)
        size = largest = len(plan.seqs) if plan.decodes and not len(extra) else 0
        captured = bool(size)
        if common is not None:
            size, largest = (size if plan.seqs else 1), max(1, *common.tokens)
            captured = common.decoding
        graph, halved = None, False
        if self.graphs is not None and captured and not streamed:
            graph = self.graphs.size_for(largest)
        if streamed:
            self._state.running.mode = "stream"
        elif common is not None:
            self._state.running.mode = "ship"
        if common is not None:
            halved = common.halved
            if self.graphs is not None and graph is not None:
                halved = halved and self.graphs.halves(graph)
            tokens, selected = common.padded(None if graph is None else self._sizes(graph))
            self._share(tokens, selected, halved)
            self.num_halved += self._state.running.halves is not None
        ticket = self.tickets.begin(plan.num_samples)
        with record_function("prepare"):
            step = self._on_device(plan, size if graph is None else self._own(graph), extra)
            if plan.copies:
                self.pool.copy_within(step.moves)
        with record_function("run"):
            if self.graphs is not None and graph is not None:
                self._to_graph(step)
                logits = self.graphs.replay(graph, halved)
                self.num_replays += 1
            else:
                logits = self._forward(step)
        if kind == HOST or len(extra):
            ticket.logits = logits
            return ticket
        with record_function("sample"):
            if kind == PLAIN and logits.is_cuda:
                if graph is None:
                    self._draw(logits, step)
            else:
                drawn = compress(plan.seqs, plan.samples.tolist())
                self._draw_adjusted(logits, step, [seq.data.row for seq in drawn], plan.positions)
            self.tickets.send(ticket, self.tokens)
        return ticket

    def choose(self, ticket: Ticket, rows: Sequence[SamplingRow]) -> SamplerOutput:
        """Draws the tokens of a step that needs the host; all earlier tokens must be appended."""
        assert ticket.logits is not None
        with record_function("sample"):
            output = self.sampler(ticket.logits[: len(rows)], rows)
            self._store(output.token_ids)
            self.tickets.send(ticket, self.tokens)
        ticket.logits = None
        return output

    def wait(self, ticket: Ticket) -> tuple[list[int], str | None]:
        """The tokens of a step, -1 where the logits were bad, and what else its kernels found
        wrong; waits for it. See `Tickets.wait`."""
        return self.tickets.wait(ticket)

    @property
    def pinned(self) -> list[Tensor]:
        """Memory of the host that the device reads and writes."""
        return self.staging.pinned + self.tickets.pinned

    def _forward(self, step: Step, logits: Tensor | None = None) -> Tensor:
        # A row of bad logits drew -1; its request fails, but its next step may be under way.
        input_ids = self.tokens.index_select(0, step.source).clamp_(min=0)
        return forward_packed(
            self.model, self.pool, step.batch, input_ids, step.positions, step.select, logits
        )

    def _draw(self, logits: Tensor, step: Step) -> None:
        """Draws on the GPU, for rows that the settings say all about."""
        tokens = self.tokens[2 : 2 + len(step.settings)]
        logits = logits[:, : self.sampler.vocab_size]
        ops.sample(logits, tokens, step.settings, step.keys)

    def _draw_adjusted(
        self, logits: Tensor, step: Step, rows: list[SamplingRow], positions: np.ndarray
    ) -> None:
        """Draws on the CPU, or rows with adjustments on the GPU."""
        at = positions.tolist()
        if not logits.is_cuda:
            self._store(self.sampler(logits[: len(rows)], rows, at).token_ids)
            return
        vocab = self.sampler.vocab_size
        for start in range(0, len(rows), SLICE):  # bounds the float32 copies
            end = min(start + SLICE, len(rows))
            part = logits[start:end, :vocab]
            adjustments = self.sampler.adjustments(rows[start:end], at[start:end])
            if adjustments is not None:
                part = adjustments.apply(part)
            tokens = self.tokens[2 + start : 2 + end]
            ops.sample(part, tokens, step.settings[start:end], step.keys[start:end])

    def _store(self, token_ids: list[int]) -> None:
        """Puts tokens drawn by the host where the next step looks for them."""
        self.tokens[2 : 2 + len(token_ids)] = torch.tensor(token_ids, dtype=torch.int64)

    def _on_device(self, plan: Plan, size: int, extra: np.ndarray = NONE) -> Step:
        """The tensors of a plan; ``size`` rows, padded, if all of it decodes, else 0."""
        rows, starts, counts = plan.rows, plan.starts, plan.counts
        tables, block_size = self.tables.block_tables, self.pool.block_size
        num = len(rows)
        seq_lens = np.ones(max(size, num), np.int64)
        seq_lens[:num] = starts + counts
        query_start = np.arange(len(seq_lens) + 1)
        select = NONE
        if size:
            # The one input token of each sequence is its newest. Padding attends to page 0.
            ids, positions, slots = np.zeros((3, size), np.int64)
            ids[:num] = self.tables.last_token[rows]
            positions[:num] = starts
            waits, token_rows = plan.sources, rows
            at = np.arange(num)
        else:
            np.cumsum(counts, out=query_start[1:])
            tokens: list[int] = []
            for seq, start, end, source in zip(
                plan.seqs,
                starts.tolist(),
                seq_lens.tolist(),
                plan.sources.tolist(),
                strict=True,
            ):
                tokens += seq.token_ids[start:end] if source < 0 else [0]
            ids = np.array(tokens, np.int64)
            positions = np.arange(len(ids)) + np.repeat(starts - query_start[:-1], counts)
            slots = np.empty_like(ids)
            waits, token_rows = plan.sources, np.repeat(rows, counts)
            at = query_start[:-1]
            select = np.concatenate((query_start[1:][plan.samples] - 1, extra))
        source = self._first_input + np.arange(len(ids))
        source[at] = np.where(waits < 0, source[at], 2 + waits)
        page, offset = np.divmod(positions[: len(token_rows)], block_size)
        slots[: len(token_rows)] = tables[token_rows, page].astype(np.int64) * block_size + offset
        slots[len(token_rows) :] = -1
        width = -(-int(seq_lens.max()) // block_size)
        block_tables = np.zeros((len(seq_lens), width), np.int32)
        block_tables[:num] = tables[rows, :width]
        if plan.in_place and self._entries is not None:
            under = block_tables >= HOST_BITS
            block_tables[under] = self._entries[block_tables[under] - HOST_BITS]
        settings, keys = self.choices.of(plan, size or plan.num_samples)
        moves = np.array(plan.copies, np.int64).reshape(-1, 2)
        # What graphs read comes first: its place depends on the number of rows alone.
        lengths = query_start.astype(np.int32), seq_lens.astype(np.int32)
        arrays = [ids, source, positions, slots, select, settings, keys, *lengths]
        parts = np.zeros((plan.num_staged, 4), np.int32)
        if plan.num_staged:
            parts[:, 1] = counts[-plan.num_staged :]
            parts[:, 3] = seq_lens[num - plan.num_staged : num]
        views = self.staging.put([*arrays, block_tables, moves, parts])
        _, at_source, at_positions, at_slots, at_select, at_settings, at_keys, *rest = views
        at_starts, at_lens, at_tables, at_moves, at_parts = rest
        staged = None
        if plan.num_staged:
            assert self._stage is not None
            staged = self._stage.parts(query_start, counts, seq_lens, at_parts)
        batch = Batch(
            num_tokens=len(ids),
            max_query_len=int(counts.max(initial=1)),
            query_start=at_starts,
            seq_lens=at_lens,
            groups=(GroupBatch(block_tables=at_tables, slots=at_slots),),
            places=self._places if plan.in_place else None,
            staged=staged,
        )
        return Step(
            batch=batch,
            source=at_source,
            positions=at_positions,
            select=None if size else at_select,
            settings=at_settings,
            keys=at_keys,
            moves=at_moves,
        )
