"""Report: what an engine has done so far, and what its memory is for."""

import logging
import time
from typing import TYPE_CHECKING, Any

from torch_pd.engine.memory import driver_bytes, storage_bytes
from torch_pd.sizing import GIB

if TYPE_CHECKING:
    from torch_pd.engine.engine import Engine

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0
"""Between two lines of the log while requests run."""


class Report:
    """Counters of one engine. It is handed to each method, so that nothing keeps it alive."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(
            (
                "steps",
                "synchronous_steps",
                "prompt_tokens",
                "output_tokens",
                "wasted_rows",
                "preemptions",
                "finished_requests",
            ),
            0,
        )
        self._seconds = 0.0
        self._logged = time.perf_counter()
        self._logged_stats: dict[str, Any] = {}

    def stats(self, engine: "Engine") -> dict[str, Any]:
        """Counters since the start, and what runs now.

        ``synchronous_steps`` were waited for because a row needed the host (penalties, logprobs,
        prompt_logprobs); ``wasted_rows`` were computed for sequences that had ended;
        ``graph_steps`` replayed a CUDA graph; ``halved_steps`` ran as two half-batches;
        ``device_busy`` and ``device_idle`` are the seconds
        that the device spent in steps and waiting between two of them. Where weights may be
        streamed or shipped: steps, tokens and seconds of either.
        """
        allocator, scheduler, tickets = engine.allocator, engine.scheduler, engine.runner.tickets
        between = tickets.busy + tickets.idle
        choice = None if engine.streaming is None else engine.streaming.choice
        return {
            **self.counts,
            "graph_steps": engine.runner.num_replays,
            "halved_steps": engine.runner.num_halved,
            "step_seconds": self._seconds,
            "device_busy": tickets.busy,
            "device_idle": tickets.idle,
            "device_idle_share": tickets.idle / between if between else 0.0,
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "kv_pages": allocator.num_usable,
            "kv_pages_used": allocator.num_used,
            "kv_tokens": allocator.num_usable * engine.config.block_size,
            "prefix_pages_looked_up": allocator.num_lookups,
            "prefix_pages_hit": allocator.num_hits,
            **(engine.elastic.stats() if engine.elastic is not None else {}),
            **(choice.report() if choice is not None else {}),
            **_tier_stats(engine),
        }

    def begin(self, engine: "Engine") -> None:
        """The next line of the log tells what is done from here on."""
        self._logged, self._logged_stats = time.perf_counter(), self.stats(engine)

    def note_step(self, engine: "Engine", seconds: float) -> None:
        """A step of the host has taken so long; logs a line if it is time for one."""
        self._seconds += seconds
        now = time.perf_counter()
        if now - self._logged >= LOG_SECONDS:
            self._log(engine, now)

    def _log(self, engine: "Engine", now: float) -> None:
        """One line on what was done since the last one."""
        stats, before, seconds = self.stats(engine), self._logged_stats, now - self._logged
        self._logged, self._logged_stats = now, stats
        change = {
            name: stats[name] - before[name]
            for name in ("prompt_tokens", "output_tokens", "preemptions")
        }
        busy, idle = (stats[name] - before[name] for name in ("device_busy", "device_idle"))
        logger.info(
            "%.0f prompt tok/s, %.0f output tok/s, %d running, %d waiting, KV %.1f%% used, %d "
            "preemptions, device idle %.1f%%",
            change["prompt_tokens"] / seconds,
            change["output_tokens"] / seconds,
            stats["running"],
            stats["waiting"],
            100 * stats["kv_pages_used"] / stats["kv_pages"],
            change["preemptions"],
            100 * idle / (busy + idle) if busy + idle else 0.0,
        )


def _tier_stats(engine: "Engine") -> dict[str, Any]:
    if engine.carrier is None:
        return {}
    swapper = engine.scheduler.swapper
    assert swapper is not None
    return {**engine.carrier.stats(), "swapped_sequences": swapper.num_swapped}


def memory_line(engine: "Engine") -> str:
    """Weights and KV pages in one line."""
    pool = engine.pool
    return (
        f"memory: weights {storage_bytes(engine.model) / GIB:.2f} GiB, KV pool "
        f"{pool.num_pages * pool.page_bytes / GIB:.2f} GiB = {_kv_text(engine)}"
    )


def memory_table(engine: "Engine") -> str:
    """On a GPU the whole ledger against the driver's count, else `memory_line`."""
    if engine.ledger is None:
        return memory_line(engine)
    pool = engine.pool
    kv_bytes, used = pool.num_pages * pool.page_bytes, driver_bytes(pool.device)
    unmapped = 0
    if engine.elastic is not None:
        kv_bytes = engine.elastic.nbytes
        unmapped = kv_bytes - engine.elastic.mapped_bytes
    return engine.ledger.table(kv_bytes, _kv_text(engine), used, unmapped)


def _kv_text(engine: "Engine") -> str:
    pages, block_size = engine.allocator.num_usable, engine.pool.block_size
    text = f"{pages} pages x {block_size} tokens = {pages * block_size:,} tokens"
    if engine.elastic is not None:
        text += f", mapped on demand, {engine.elastic.mapped_bytes / GIB:.2f} GiB now"
    return text
