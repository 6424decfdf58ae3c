"""Worker: what a spawned rank does, on the word of the coordinator (engine/spawned.py)."""

from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from torch_pd.child import Phase
from torch_pd.config import EngineConfig
from torch_pd.dist import World, connect, free_port_store
from torch_pd.engine.device import uncollected
from torch_pd.engine.engine import Engine
from torch_pd.engine.lender import Lender
from torch_pd.engine.sharing import follow_plan, load_shared
from torch_pd.engine.work import Call, pack, run
from torch_pd.launch import Ranks, readable
from torch_pd.weights.loader import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Setup:
    """All that a rank needs to start."""

    rank: int
    size: int
    device: str
    threads: int
    """Of torch on the CPU."""
    model: Path
    tokenizer: "PreTrainedTokenizerBase | Path | None"
    """A path is read by the rank itself."""
    config: EngineConfig


STOP, ABORT, STATS = "stop", "abort", "stats"
"""Messages of the coordinator, beside a `Call` to run."""
ABORTED = "aborted"
"""The answer to each ABORT, from outside of any call; one may come before its call, or after."""


def make_engine(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase | None",
    config: EngineConfig,
    device: str,
    world: World | None,
) -> Engine | Lender:
    """Loads a model and builds the engine on it; collective where there is a world. A rank that
    only lends memory loads nothing.

    ``weights="auto"`` is settled by the plan for the GPUs (`sharing.follow_plan`), unless ranks
    lend memory and no param_ranks are named: those that run requests have all weights then.
    """
    if config.peer_kv_gib and config.weights != "pooled":
        assert world is not None
        assert config.data_ranks is not None
        if world.rank not in config.data_ranks:
            return Lender(config, world)
    elif world is not None and config.weights == "auto":
        config = follow_plan(model, config, world)
    if config.weights == "pooled":
        assert world is not None
        shared, lockstep, streaming = load_shared(model, config, world)
        return Engine(shared, tokenizer, config, world, lockstep, streaming)
    budget = None
    if torch.device(device).type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        budget = int(total * config.gpu_memory_share)
    loaded = load_model(
        model,
        budget=budget,
        dtype=config.dtype,
        load_format=config.load_format,
        device=device,
        seed=config.seed,
    )
    return Engine(loaded, tokenizer, config, world)


def main(link: Connection, setup: Setup) -> None:
    """Starts a rank and serves until it is told to stop."""
    torch.set_num_threads(setup.threads)
    if setup.rank == 0:
        store = free_port_store()
        link.send(store.port)
    else:
        link.send(Phase(Ranks.WAITING))
        store = dist.TCPStore("127.0.0.1", link.recv())
    link.send(Phase(Ranks.WAITING))
    world = connect(setup.rank, setup.size, setup.device, store)
    link.send(Phase("loading"))
    tokenizer = setup.tokenizer
    if isinstance(tokenizer, Path):
        tokenizer = load_tokenizer(tokenizer)
    with uncollected():
        engine = make_engine(setup.model, tokenizer, setup.config, setup.device, world)
    link.send(Phase(Ranks.READY))
    link.send((engine.limits, engine.memory_table()))
    while (message := link.recv()) != STOP:
        if message == STATS:
            link.send(engine.stats())
        elif isinstance(message, Call):
            serve(link, engine, world, message)
        elif message == ABORT:
            link.send(ABORTED)
    engine.shutdown()
    # All leave together, or the first would be missed by the others.
    dist.barrier(world.cpu_group)
    world.leave()
    dist.destroy_process_group()


def serve(link: Connection, engine: Engine | Lender, world: World, call: Call) -> None:
    """Runs a call; sends the outputs of each step, at the end the call's number, or ABORTED."""
    world.board.open(call.number, len(call.requests), 0)
    outputs = run(engine, world.board, call)
    for some in outputs:
        if some:
            link.send(pack(some))
        if readable(link):
            message = link.recv()
            if message == STATS:
                link.send(engine.stats())
                continue
            assert message == ABORT, message
            world.board.drain()
            outputs.close()
            link.send(ABORTED)
            return
    link.send(call.number)
