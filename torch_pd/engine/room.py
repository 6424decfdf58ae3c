"""Room: how many KV pages each tier holds, and so how long a sequence may be."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch_pd.config import EngineConfig
from torch_pd.dist import World
from torch_pd.engine.lender import lend_or_borrow
from torch_pd.engine.memory import foresee
from torch_pd.engine.stage import Stage
from torch_pd.kv.disk import free_space
from torch_pd.kv.elastic import chunk_of
from torch_pd.kv.host import available_memory
from torch_pd.kv.lease import Lease
from torch_pd.nn.patched import device_of, kv_shape, max_length
from torch_pd.sizing import (
    GIB,
    KVShape,
    Ledger,
    cpu_kv_bytes,
    fit_model_len,
    lent_pages,
    most_pages,
    pages_of_budget,
    tier_pages,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Room:
    """What `find_room` found."""

    ledger: Ledger | None
    """Of a GPU's memory."""
    lease: Lease | None
    """What is lent or borrowed."""
    num_pages: int
    """Of this device's pool."""
    host_pages: int
    disk_pages: int
    peers: list[Any]
    """Pages on each peer."""
    max_model_len: int
    chunk: int
    """Bytes that the device's pool maps at once, 0 if it is allocated whole."""

    @property
    def under(self) -> int:
        """Pages under the device's pool that a running sequence can use."""
        return max(0, self.host_pages - 1) + sum(map(len, self.peers))


def find_room(
    model: "PreTrainedModel",
    config: EngineConfig,
    world: World | None,
    serving: Sequence[bool],
    stepping: tuple[list[bool], int],
) -> Room:
    """Shares memory and disk out before anything of it is taken. Collective where there is a world,
    whose shortest max_model_len is everyone's.

    Args:
        model: patched.
        serving: of each rank, whether it runs requests.
        stepping: the ranks in lockstep that do, and the place of this one among them.

    Raises:
        ValueError: there is too little; gives the arithmetic.
    """
    device = device_of(model)
    shape = kv_shape(model, config.block_size, config.kv_cache_dtype)
    ranks, serves = (1, True) if world is None else (world.size, serving[world.rank])
    limit = max_length(model)
    model_max = limit.length if limit is not None else 1 << 30
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    if limit is not None and limit.length < own and config.max_model_len is None:
        logger.warning("max_model_len is at most %d: %s", limit.length, limit.reason)
    most_len_pages = -(-min(model_max, config.max_model_len or model_max) // config.block_size)
    ledger: Ledger | None = None
    lease: Lease | None = None
    if device.type == "cuda":
        ledger = foresee(model, config, most_len_pages, device, *stepping)
    if config.peer_kv_gib:
        assert world is not None
        ledger, lease = _lease(config, world, sum(serving), shape, ledger)
    chunk = 0
    if config.elastic_kv and serves:
        chunk = chunk_of(_kv_budget(config, ledger, ranks)[0], device)
        if ledger is not None:
            ledger = dataclasses.replace(ledger, lines=ledger.lines | {"KV filler": chunk})
    num_pages = _device_pages(config, shape, ledger, ranks, max(1, chunk))
    host_pages = disk_pages = 0
    if serves:
        host_pages, disk_pages = _tiers(config, shape.page_bytes, ranks)
    else:
        num_pages = 2  # nobody's requests
    peers = [] if lease is None else lease.pages(shape.page_bytes)
    room = Room(ledger, lease, num_pages, host_pages, disk_pages, peers, 0, chunk)
    longest = min(most_len_pages, num_pages - 1 + room.under)
    if room.under and longest >= num_pages and config.kv_cache_gib is None:
        # Prefill gathers what lies on the host (engine/stage.py).
        plain = kv_shape(model, config.block_size, "auto")
        stage = Stage.nbytes(plain.page_bytes, plain.num_layers, longest)
        num_pages = max(2, num_pages - -(-stage // shape.page_bytes))
    max_model_len, remark = fit_model_len(
        model_max,
        config.max_model_len,
        num_pages + room.under if serves else 1 << 40,
        config.block_size,
        limit.reason if limit is not None else "",
    )
    if world is not None:
        max_model_len = min(world.all_gather(max_model_len))
    if remark:
        logger.warning(remark)
    if config.kv_cache_gib is None:
        # No more than all rows at full length could ever hold.
        most = most_pages(config.max_num_seqs, max_model_len, config.block_size)
        num_pages = min(num_pages, most)
    return dataclasses.replace(room, num_pages=num_pages, max_model_len=max_model_len)


def _kv_budget(config: EngineConfig, ledger: Ledger | None, ranks: int) -> tuple[int, str]:
    """Bytes for the pages of the device's pool, and what says so."""
    if config.kv_cache_gib is not None:
        return int(config.kv_cache_gib * GIB), f"kv_cache_gib={config.kv_cache_gib}"
    if ledger is not None:
        return ledger.left, "the memory ledger"
    return cpu_kv_bytes(available_memory()) // ranks, "40% of the available memory"


def _device_pages(
    config: EngineConfig, shape: KVShape, ledger: Ledger | None, ranks: int, chunk: int
) -> int:
    """Pages of the device's pool before anything is cut from it; its memory is whole chunks."""
    budget, setting = _kv_budget(config, ledger, ranks)
    if config.kv_cache_gib is not None:
        if ledger is not None:
            ledger.check(-(-budget // chunk) * chunk, shape, setting)
        elif budget > 2 * shape.page_bytes:
            memory, name = available_memory() // ranks, "kv_cache_gib"
            tier_pages(shape.page_bytes, config.kv_cache_gib, memory, name, "host memory")
    elif ledger is not None:
        ledger.check(2 * shape.page_bytes, shape)
        budget = budget // chunk * chunk
    return pages_of_budget(shape, budget, setting)


def _lease(
    config: EngineConfig, world: World, borrowers: int, shape: KVShape, ledger: Ledger | None
) -> tuple[Ledger | None, Lease]:
    """What this rank lends, or borrows, and its ledger with that. Collective."""
    lent_pages(shape.page_bytes, config.peer_kv_gib, world.size - borrowers, borrowers)
    if ledger is None:
        return None, lend_or_borrow(config, world)
    lease = Lease(config, world, ledger.left - 2 * shape.page_bytes, ledger.describe())
    if lease.lends:
        lines = ledger.lines | {"lent KV pages": lease.nbytes}
        ledger = dataclasses.replace(ledger, lines=lines)
    return ledger, lease


def _tiers(config: EngineConfig, page_bytes: int, ranks: int) -> tuple[int, int]:
    """Pages of the host pool and on disk. ValueError if the machine lacks the room."""
    memory = available_memory() // ranks
    host = tier_pages(page_bytes, config.host_kv_gib, memory, "host_kv_gib", "host memory")
    disk = 0
    if config.disk_kv_path is not None:
        free = free_space(config.disk_kv_path) // ranks
        disk = tier_pages(page_bytes, config.disk_kv_gib, free, "disk_kv_gib", "the disk")
    return host, disk
