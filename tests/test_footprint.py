"""The planner's lines of memory: those of started engines, and of torch's allocator."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from shapes import QWEN3_8B, QWEN3_32B
from test_pooled_llm import SETTINGS, folder  # noqa: F401

from torch_pd import EngineConfig
from torch_pd.dist import join_torchrun
from torch_pd.engine.engine import Engine
from torch_pd.engine.footprint import WORKSPACE_BYTES, Blocks, Meter, NoExchange, dims_of, footprint
from torch_pd.engine.memory import standing
from torch_pd.engine.shape import read_shape
from torch_pd.engine.trial import Trial, steps_staging, try_steps
from torch_pd.engine.worker import make_engine
from torch_pd.sizing import GIB
from torch_pd.weights.layout import make_layout
from torch_pd.weights.loader import load_model
from torch_pd.weights.ring import default_ring_bytes
from torch_pd.weights.ship import Exchange

LONGEST = 512


def assert_lines(engine: Engine, mode: str, ranks: int) -> None:
    """Those that need no GPU, and the activations of the same steps run here."""
    config, model = engine.config, engine.model
    found = standing(model)
    shape = read_shape(config_folder(engine), "float32")
    rank = 0 if engine.world is None else engine.world.rank
    foreseen = footprint(mode, shape, config, ranks, LONGEST, rank)
    # The frequencies of the rotation are no parameters.
    assert 0 <= found["weights"] - foreseen["weights"] < 64
    assert found["ring"] == foreseen["ring"]
    assert (found["ring"] > 0) == (mode in ("stream", "auto"))
    assert found["shard"] == foreseen["shard"]
    pages = -(-LONGEST // config.block_size)
    assert foreseen["staging"] == steps_staging(config, pages) >= engine.runner.staging.nbytes
    # A start of at most 2 MiB for what is smaller; the CPU's exchanges make one copy more.
    blocks = Blocks()
    trial = Trial(model, pages, *engine._stepping())
    with Meter(blocks, "cpu"):
        activations, _ = try_steps(trial, config, blocks)
    assert foreseen["activations"] - WORKSPACE_BYTES == pytest.approx(activations, rel=0.2)


def config_folder(engine):
    return Path(engine.model.config._name_or_path)


def check(rank: int, path, mode: str) -> None:
    world = join_torchrun("cpu")
    config = EngineConfig(weights="pooled", remote_mode=mode, **WIDE)
    engine = make_engine(path, None, config, "cpu", world)
    engine.model.config._name_or_path = str(path)
    assert_lines(engine, mode, world.size)
    engine.shutdown()
    world.all_gather(None)
    world.leave()


WIDE = {**SETTINGS, "max_num_batched_tokens": 4096, "max_num_seqs": 64}


def test_lines_of_started_ranks(folder):  # noqa: F811
    run_ranks(2, check, folder, "auto")  # which has what "ship" and "stream" have


def test_lines_of_an_engine_alone(folder):  # noqa: F811
    config = EngineConfig(**{**WIDE, "max_num_batched_tokens": 512})
    model = load_model(
        folder, dtype="float32", load_format="auto", device="cpu", seed=0, budget=None
    )
    model.config._name_or_path = str(folder)
    engine = Engine(model, None, config)
    assert_lines(engine, "replicate", 1)
    engine.shutdown()


@pytest.mark.parametrize(
    ("tokens", "activations", "graphs"), [(8192, 0.97, 0.58), (16384, 1.89, 0.58)]
)
def test_lines_that_were_measured_on_an_h100(tokens, activations, graphs):
    """GiB of the ledger of a started engine (docs/benchmarks.md), Qwen3-8B shape. Activations were
    1.15 and 2.26 there; since then a block lets go of what the MLP does not need."""
    config = EngineConfig(max_num_batched_tokens=tokens, load_format="dummy")
    found = footprint("replicate", QWEN3_8B, config, 1, 40960)
    assert found["weights"] / GIB == pytest.approx(15.26, abs=0.01)
    assert found["activations"] / GIB == pytest.approx(activations, abs=0.02)
    assert found["graphs"] / GIB == pytest.approx(graphs, abs=0.05)  # with fewer graphs then
    assert found["staging"] / GIB == pytest.approx(0.02, abs=0.01)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_ring_is_the_default_of_the_fullest_rank(ranks):
    layout = make_layout(dims_of(QWEN3_32B), ranks)
    found = footprint("stream", QWEN3_32B, EngineConfig(), ranks, 2048)
    assert found["ring"] == default_ring_bytes(layout, 0)
    assert found["shard"] == layout.arena_bytes(0)


def exchange_shapes(rank: int, size: int) -> None:
    real, dry = Exchange(), NoExchange(rank, size)
    for rows, widths in (((4,) * size, (8,) * size), ((3, 1, 2)[:size], (8, 0, 4)[:size])):
        x, y = torch.ones(rows[rank], 6), torch.ones(sum(rows), widths[rank])
        whole, part = torch.ones(rows[rank], sum(widths)), torch.ones(sum(rows), 6)
        if not widths[rank]:
            part = part[:0]
        for name, given_ in (
            ("gather", x), ("to_tokens", y), ("to_owners", whole), ("scatter_sum", part),
        ):  # fmt: skip
            want = getattr(real, name)(given_, rows, widths)
            assert getattr(dry, name)(given_, rows, widths).shape == want.shape, name


def test_nothing_is_exchanged_in_the_same_shapes():
    run_ranks(3, exchange_shapes, 3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from([1, 700, 5000, 1 << 20, 3 << 20, 12 << 20, 33 << 20]),
            st.integers(0, 99),
        ),
        max_size=60,
    )
)
def test_blocks_are_apart_and_come_together_again(actions):
    blocks = Blocks()
    held = {}
    for gives_back, size, pick in actions:
        if gives_back and held:
            number = sorted(held)[pick % len(held)]
            del held[number]
            blocks.free(number)
        else:
            held[blocks.allocate(size)] = size
        used = sorted(blocks.places())
        for (segment, end), (other, start) in zip(
            [(s, e) for s, _, e in used], [(s, b) for s, b, _ in used[1:]], strict=False
        ):
            assert segment != other or end <= start
        assert sum(held.values()) <= blocks.allocated() <= blocks.reserved()
        assert blocks.allocated() <= blocks.peak()
    reserved = blocks.reserved()
    for number in held:
        blocks.free(number)
    assert blocks.allocated() == 0
    assert blocks.reserved() == reserved
    if reserved:
        assert blocks.largest_free() == max(blocks.segments())
