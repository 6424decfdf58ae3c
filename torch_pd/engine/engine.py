"""Engine: requests in, tokens out. Ties scheduler, runner, sampler and detokenizer together."""

import dataclasses
import logging
import time
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.profiler import record_function

from torch_pd.config import EngineConfig
from torch_pd.dist import World
from torch_pd.engine.carrier import Carrier, swap_costs
from torch_pd.engine.device import device_lost, keep_forever
from torch_pd.engine.inflight import InFlight, Request
from torch_pd.engine.limits import Limits
from torch_pd.engine.lockstep import Lockstep
from torch_pd.engine.prompt_rows import PromptRows, find_rows
from torch_pd.engine.report import Report, memory_line, memory_table
from torch_pd.engine.requests import Requests, eos_token_ids
from torch_pd.engine.room import find_room
from torch_pd.engine.runner import NONE, Runner
from torch_pd.engine.sampler import Sampler
from torch_pd.engine.sampling_row import bad_logits
from torch_pd.engine.scheduler import Plan, Scheduler
from torch_pd.engine.streaming import Streaming
from torch_pd.engine.tickets import Ticket
from torch_pd.engine.trial import PROMPT_LOGPROB_TOKENS
from torch_pd.engine.watch import Watch
from torch_pd.kv.elastic import ElasticPages
from torch_pd.kv.pages import PageAllocator
from torch_pd.nn.patch import patch_model, unpatch_model
from torch_pd.nn.patched import device_of, is_patched, kv_shape, new_pool, patch_state
from torch_pd.request import Logprob, RequestOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class UnderWay:
    """A step that was launched and whose tokens were not looked at yet."""

    plan: Plan
    ticket: Ticket
    prompt_rows: list[PromptRows]


class Engine:
    """Continuous batching over one model and one pool of KV pages.

    Args:
        model: a causal LM on its device; patched in place if it is not yet.
        tokenizer: for text and stop strings; None if only token ids are used.
        config: settings.
        world: the ranks beside this one; they share the CPU's memory, and the shortest of their
            max_model_len is everyone's.
        lockstep: by what ranks with shared weights agree on each step; their engines must step
            alike, with requests or without, until `group_idle`.
        streaming: where steps may be streamed; those that are need no other rank.

    Raises:
        ValueError: memory does not suffice or a setting contradicts the model.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None",
        config: EngineConfig,
        world: World | None = None,
        lockstep: Lockstep | None = None,
        streaming: Streaming | None = None,
    ):
        self.config = config
        self.world = world
        ranks = range(1 if world is None else world.size)
        self.serving = [config.data_ranks is None or rank in config.data_ranks for rank in ranks]
        """Of each rank, whether it holds KV pages and so runs requests."""
        self.serves = self.serving[0 if world is None else world.rank]
        self.lockstep = lockstep
        self.streaming = streaming
        self.group_idle = True
        """In lockstep: no rank had a request when they last voted."""
        self.tokenizer = tokenizer
        self.model = model
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self._lost = False  # the GPU failed
        before = is_patched(model)
        state = patch_state(patch_model(model, config))
        self._patched_here = not before or state.engines > 0
        state.engines += self._patched_here
        try:
            if before:
                state.follow(model)
            self._set_up(model)
        except BaseException:
            self._unpatch(model)
            raise

    def _set_up(self, model: "PreTrainedModel") -> None:
        config = self.config
        device = device_of(model)
        room = find_room(model, config, self.world, self.serving, self._stepping())
        self.ledger, self.lease = room.ledger, room.lease
        self.max_model_len = room.max_model_len
        num_pages, form = room.num_pages, (config.block_size, config.kv_cache_dtype)
        self.elastic: ElasticPages | None = None
        if room.chunk:
            page_bytes = kv_shape(model, *form).page_bytes
            self.elastic = ElasticPages(num_pages, page_bytes, device, room.chunk)
        records = None if self.elastic is None else self.elastic.records
        self.pool = new_pool(model, num_pages, *form, records)
        self.allocator = PageAllocator(
            num_pages,
            enable_prefix_caching=config.enable_prefix_caching,
            backing=self.elastic,
        )
        self.carrier: Carrier | None = None
        costs = None
        if room.under:
            self.carrier = Carrier(
                self.pool, self.allocator, config, room.host_pages, room.disk_pages, room.peers
            )
            num_params = sum(parameter.numel() for parameter in model.parameters())
            if self.elastic is not None:
                self.elastic.queue = self.carrier.tiers.queue
            costs = swap_costs(device.type, self.pool.page_bytes, num_params, not room.host_pages)
        self.scheduler = Scheduler(
            self.allocator,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            tiers=None if self.carrier is None else self.carrier.tiers,
            costs=costs,
        )
        self._kv_tokens = self.scheduler.most_tokens
        if self.world is not None:
            self._kv_tokens = min(
                self.world.all_gather(self._kv_tokens if self.serves else 1 << 60)
            )
        self.eos_token_ids = eos_token_ids(model, self.tokenizer, self.vocab_size)
        self.sampler = Sampler(self.vocab_size, self.eos_token_ids)
        self.runner = Runner(
            model,
            self.pool,
            self.scheduler,
            self.sampler,
            config.max_num_batched_tokens,
            *self._stepping(),
            most_tokens=self._kv_tokens,
            graphs=device.type == "cuda" and not config.enforce_eager,
        )
        if self.carrier is not None:
            self.runner.read_places(self.carrier.places, self.carrier.entries)
        self.overlap = True
        """Steps are launched before the tokens of the last one are known; results are the same."""
        self._under_way: UnderWay | None = None
        if config.enforce_eager:
            self.runner.no_graphs = "enforce_eager=True"
        elif self.streaming is not None and self.lockstep is None:
            self.runner.no_graphs = "streamed steps are launched eagerly"
        elif device.type == "cuda":
            self.runner.capture()
            if self.streaming is not None and self.runner.graphs is not None:
                assert self.streaming.choice is not None
                self.streaming.choice.graph_rows = self.runner.graphs.sizes[-1]
        self.report = Report()
        self.requests = Requests(
            self.scheduler,
            self.max_model_len,
            self.tokenizer,
            config.seed,
            self.eos_token_ids,
            self.report.counts,
        )
        self.report.begin(self)
        self._spaces = 0
        shared = self.lockstep is not None or self.streaming is not None
        self._watch = None if shared else Watch(model)  # nobody has shared weights at hand
        if self.ledger is not None:
            logger.info("%s", self.memory_table())
        if self.lease is not None and self.world is not None:
            self.world.all_gather(self.limits)  # for those that only lend

    def _stepping(self) -> tuple[list[bool], int]:
        """Of the ranks in lockstep, which serve; and the place of this one among them."""
        if self.lockstep is None:
            return [], 0
        if all(self.serving):
            return [True] * self.lockstep.ranks, 0
        assert self.world is not None
        return self.serving, self.world.rank

    # Requests.

    @property
    def limits(self) -> Limits:
        """Which requests can run here."""
        return Limits(
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            kv_tokens=self._kv_tokens,
            has_tokenizer=self.tokenizer is not None,
        )

    def add(self, request: Request, *, stream: bool = False) -> None:
        """Queues a checked request.

        Args:
            request: its request_id must not be in use.
            stream: report it from `step` whenever it grew, not only when it finished.
        """
        if not self.requests:
            if self._watch is not None and self._watch.changed(self.runner.graphs is not None):
                self.reset_prefix_cache()
            self.report.begin(self)
        self.requests.add(request, stream)

    def reset_prefix_cache(self) -> None:
        """Requests from now on find no prefix of earlier ones: other weights may have made it."""
        self._spaces += 1
        self.requests.space = self._spaces.to_bytes(8, "little")

    def abort(self, request_id: str) -> None:
        """Drops a request with all its outputs; does nothing if it has finished."""
        self.requests.abort(request_id)

    @property
    def has_unfinished(self) -> bool:
        """True while a request waits or runs."""
        return bool(self.requests)

    # Steps.

    def step(self) -> list[RequestOutput]:
        """Launches one step and takes in the one before; outputs of requests that finished and of
        streamed ones that grew.

        Raises:
            RuntimeError: the step failed (logits with NaN, ...). Every request is dropped then, and
                the engine can go on with new ones.
            DeviceLost: the GPU failed; only `shutdown` works from here on.
        """
        start = time.perf_counter()
        try:
            grown = self._step()
        except BaseException as error:
            self._drop_all()
            lost = device_lost(self.pool.device, error)
            if lost is None:
                raise
            self._lost = True
            keep_forever(self.runner.pinned)
            if lost is error:
                raise
            raise lost from error
        self.report.note_step(self, time.perf_counter() - start)
        outputs = []
        for running in grown:
            finished = running.unfinished == 0
            if finished or running.stream:
                outputs.append(running.report())
            if finished:
                self.report.counts["finished_requests"] += 1
                self.requests.forget(running)
        if not self.requests and (self.lockstep is None or self.group_idle):
            # In lockstep, waiting for a step here would keep the others waiting.
            self._drain()
            if self.elastic is not None:
                if self.carrier is not None:
                    self.carrier.finish()
                self.elastic.rest(self.allocator)
            self.scheduler.check()
        return outputs

    def _step(self) -> list[InFlight]:
        """Launches a step, then looks at the tokens of the one launched before it.

        So the host prepares a step while the device runs the last one. A step that needs the host
        for its choice (`choices.HOST`, prompt_logprobs) is waited for at once.
        """
        scheduler, budget = self.scheduler, self.config.max_num_batched_tokens
        if self.requests.num_prompt_logprobs:
            budget = min(budget, PROMPT_LOGPROB_TOKENS)
        scheduler.max_num_batched_tokens = budget
        if self.lockstep is not None:
            scheduler.admits = self.lockstep.admits(scheduler.num_running)
        with record_function("schedule"):
            if self.carrier is not None:
                self.carrier.look()
            plan = scheduler.schedule()
            if self.carrier is not None:
                self.carrier.carry(plan)
        # max_model_len never exceeds the pool, so a sequence cannot outgrow it.
        assert not plan.failed, plan.failed[0].error
        self.report.counts["preemptions"] += len(plan.preempted)
        grown: dict[str, InFlight] = {}
        launched = common = None
        wanted = find_rows(plan, self.requests.by_id) if self.requests.num_prompt_logprobs else []
        extra = np.concatenate([NONE, *(rows.places for rows in wanted)])
        if self.lockstep is not None:
            halving = self.runner.halving
            common = self.lockstep.agree(
                plan.num_tokens,
                plan.num_samples + len(extra),
                decoding=plan.decodes and not len(extra),
                busy=bool(self.requests),
                halved=halving is not None and plan.decodes and halving.wants(plan),
            )
            self.group_idle = common is None
            assert common is not None or not plan.seqs
        streamed = False
        if self.streaming is not None and (common is not None or self.lockstep is None):
            streamed = self.streaming.streams(common)
            if self.streaming.choice is not None:
                self.streaming.choice.count(plan.num_tokens)
        if plan.seqs or (common is not None and not streamed):
            self.report.counts["steps"] += 1
            ticket = self.runner.launch(
                plan, extra=extra, common=None if streamed else common, streamed=streamed
            )
            launched = UnderWay(plan, ticket, wanted)
        before, self._under_way = self._under_way, launched
        if before is not None:
            self._settle(before, grown)
        if launched is not None and (launched.ticket.logits is not None or not self.overlap):
            self.report.counts["synchronous_steps"] += launched.ticket.logits is not None
            self._under_way = None
            self._settle(launched, grown)
        if self.elastic is not None:
            self.elastic.step(self.allocator)
        if not plan.seqs and self._under_way is None:
            self.runner.tickets.rest()
            if self.streaming is not None and self.streaming.choice is not None:
                self.streaming.choice.rest()
            if self.carrier is not None and self.lockstep is None:
                self.carrier.wait_for_disk()
        return list(grown.values())

    def _settle(self, step: UnderWay, grown: dict[str, InFlight]) -> None:
        """Takes in the tokens of a launched step; what grew goes into ``grown``."""
        plan = step.plan
        sampled = list(compress(plan.seqs, plan.samples.tolist()))
        logprobs: list[dict[int, Logprob] | None] = [None] * len(sampled)
        if step.ticket.logits is not None:
            at = plan.num_samples
            for rows in step.prompt_rows:
                found = rows.logprobs(self.sampler, step.ticket.logits[at : at + rows.count])
                rows.known.extend(self.requests.named(entry) for entry in found)
                at += rows.count
            choosing = [seq.data.row for seq in sampled]
            logprobs = self.runner.choose(step.ticket, choosing).logprobs
        tokens, error = self.runner.wait(step.ticket)
        if -1 in tokens:
            raise RuntimeError(bad_logits(sampled[tokens.index(-1)].data.row))
        if error is not None:
            raise RuntimeError(error)
        self.scheduler.update(plan, tokens)
        for sequence, token, entry in zip(sampled, tokens, logprobs, strict=True):
            running = self.requests.advance(sequence, token, entry)
            if running is not None:
                grown[sequence.request_id] = running

    def _drain(self) -> None:
        """Waits for a step whose requests have all gone."""
        step, self._under_way = self._under_way, None
        if step is not None:
            self._settle(step, {})
        self.runner.tickets.rest()

    def _drop_all(self) -> None:
        """After a failed step: forgets what is under way and every request."""
        self._under_way = None
        self.runner.tickets.rest()
        self.scheduler.cancel_all()
        for request_id in list(self.requests.by_id):
            self.abort(request_id)

    # Observation.

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what runs now; see `Report.stats`."""
        return self.report.stats(self)

    def memory_line(self) -> str:
        """Weights and KV pages in one line."""
        return memory_line(self)

    def memory_table(self) -> str:
        """On a GPU the whole ledger against the driver's count, else `memory_line`."""
        return memory_table(self)

    def _unpatch(self, model: "PreTrainedModel") -> None:
        """Restores the model if no caller has patched it and no other engine runs it."""
        if self._patched_here and is_patched(model):
            state = patch_state(model)
            state.engines -= 1
            if not state.engines:
                unpatch_model(model)

    def shutdown(self) -> None:
        """Drops all requests, frees the pages, restores a model that was patched here."""
        self._drop_all()
        if not self._lost:
            self._unpatch(self.model)
        if self.lockstep is not None:
            self.lockstep.leave()
        if self.streaming is not None:
            self.streaming.close()
        if self.carrier is not None:
            if self.pool.device.type == "cuda" and not self._lost:
                torch.cuda.synchronize(self.pool.device)  # kernels may read pages in place
            self.carrier.close()
        device = self.pool.device
        if self.lease is not None and not self._lost:
            self.carrier = None  # its tensors would keep the memory
            self.lease.close()
        del self.runner, self.pool, self.model, self._watch
        if self.elastic is not None:
            self.elastic.close()
        if device.type == "cuda" and not self._lost:
            # The next engine, of this process or another, counts what the driver says is free.
            torch.cuda.empty_cache()
