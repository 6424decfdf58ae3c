"""Seconds of steps: against what was measured on four H100, and what must hold for any machine."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import QWEN3_8B, QWEN3_32B

from torch_pd.costs import Costs, Machine, Step
from torch_pd.engine.halving import Halving
from torch_pd.nn.halves import halve

# Linears and collectives of a step only: the layers' matrices, no attention, no sampling.
BARE = Machine(
    memory_bandwidth=Machine.memory_bandwidth, layer_launch_seconds=0.0, step_seconds=0.0
)


def bare_ms(kind: str, tokens: int, graph: bool = False, shards: int = 4, nccl=True) -> float:
    machine = dataclasses.replace(BARE, mailbox_bytes=0) if nccl else BARE
    costs = Costs(QWEN3_32B, machine, shards)
    step = Step(tokens, 0, 0, graph=graph)
    elementwise = costs._rest(step)
    return 1e3 * (getattr(costs, kind)(step) - (0 if kind == "pull" else elementwise))


@pytest.mark.parametrize(
    ("kind", "tokens", "graph", "ms"),
    [
        ("resident", 16, True, 23.1), ("resident", 256, True, 27.9),
        ("resident", 512, True, 47.8), ("resident", 1024, True, 90.8),
        ("resident", 4096, True, 350), ("resident", 8192, True, 732),
        ("stream", 64, False, 141), ("stream", 512, False, 134.4),
        ("stream", 1024, False, 134.9), ("stream", 1536, False, 155),
        ("stream", 2048, False, 202), ("stream", 4096, False, 376),
        ("stream", 8192, False, 764),
        ("ship", 16, True, 10.1), ("ship", 64, True, 15.6),
        ("ship", 128, True, 26.9), ("ship", 256, True, 39.3),
        ("ship", 512, False, 66.2), ("ship", 1024, False, 123.7),
        ("ship", 2048, False, 242), ("ship", 4096, False, 454),
    ],
)  # fmt: skip
def test_measured_steps_of_qwen3_32b(kind, tokens, graph, ms):
    """Within 15%, and 25% where collectives are small."""
    close = 0.25 if kind == "ship" and tokens <= 128 else 0.08
    assert bare_ms(kind, tokens, graph) == pytest.approx(ms, rel=close)


@pytest.mark.parametrize(("tokens", "ms"), [(16, 14.25), (64, 15.92), (128, 18.35), (256, 29.80)])
def test_measured_steps_by_mapped_memory_on_two_gpus(tokens, ms):
    found = bare_ms("ship", tokens, graph=True, shards=2, nccl=False)
    assert found == pytest.approx(ms, rel=0.08)


@pytest.mark.parametrize(
    ("rows", "context", "ms"), [(1, 20, 99.8), (96, 24, 99.8), (96, 1040, 105.9)]
)
def test_measured_streamed_decoding_steps_on_two_gpus(rows, context, ms):
    two = Machine(link_bandwidth=377e9, flops=668e12, weight_bandwidth=2.63e12)
    found = Costs(QWEN3_32B, two, 2).stream(Step(rows, rows, rows * context))
    assert found * 1e3 == pytest.approx(ms, rel=0.04)


@pytest.mark.parametrize(("tokens", "ms"), [(2048, 202.1), (4096, 392.0), (8192, 774.1)])
def test_measured_streamed_steps_on_two_gpus(tokens, ms):
    two = dataclasses.replace(BARE, link_bandwidth=377e9, flops=710e12)
    costs = Costs(QWEN3_32B, two, 2)
    step = Step(tokens, 0, 0)
    assert 1e3 * (costs.stream(step) - costs._rest(step)) == pytest.approx(ms, rel=0.06)


def test_shipping_wins_below_about_1100_tokens():
    assert bare_ms("ship", 900) < bare_ms("stream", 900)
    assert bare_ms("ship", 1300) > bare_ms("stream", 1300)


steps = st.builds(
    Step,
    tokens=st.integers(1, 16384),
    samples=st.integers(0, 1024),
    kv_tokens=st.integers(0, 1 << 20),
    pairs=st.integers(0, 1 << 26),
    graph=st.booleans(),
)


@given(
    steps,
    st.sampled_from(["tokens", "samples", "kv_tokens", "pairs"]),
    st.integers(1, 5000),
    st.sampled_from(["resident", "stream", "ship"]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([QWEN3_8B, QWEN3_32B]),
)
def test_more_work_never_costs_less(step, field, more, kind, shards, shape):
    # More rows make a GEMM less bound by memory, which the pull may gain more by than it costs.
    costs = Costs(shape, Machine(pull_loss=0.0), shards)
    larger = dataclasses.replace(step, **{field: getattr(step, field) + more})
    assert getattr(costs, kind)(step) <= getattr(costs, kind)(larger) * (1 + 1e-9)


@given(steps, st.sampled_from([1, 2, 4, 8]))
def test_streaming_never_beats_resident_nor_the_link(step, shards):
    costs = Costs(QWEN3_32B, Machine(), shards)
    assert costs.stream(step) >= costs.resident(step)
    assert costs.stream(step) >= costs.pull_seconds()


@given(steps)
def test_one_shard_is_resident(step):
    costs = Costs(QWEN3_32B, Machine(), shards=1)
    assert costs.pull_seconds() == 0
    assert costs.stream(step) == costs.resident(step) == costs.ship(step)


def test_measured_constants_replace_defaults():
    assert Machine.from_dict({"link_bandwidth": 1e11}).link_bandwidth == 1e11
    with pytest.raises(TypeError, match="speed"):
        Machine.from_dict({"speed": 1})


@pytest.mark.parametrize(("owners", "data_ranks"), [(1, 1), (1, 2), (2, 2)])
def test_halves_pay_where_attention_takes_as_long_as_the_weights(owners, data_ranks):
    halving = Halving(Costs(QWEN3_32B, Machine(), owners, data_ranks=data_ranks), graph=True)
    reading = QWEN3_32B.layer_params * 2 / Machine.weight_bandwidth / owners
    tokens = reading * Machine.kv_bandwidth / QWEN3_32B.kv_token_bytes  # attended to in that time
    assert not halving.pays(1, 1 << 30)
    assert not halving.pays(32, int(tokens / 2))
    assert halving.pays(128, int(tokens * 1.5))
    # Once they pay they do with longer sequences.
    pays = [halving.pays(64, 64 * length) for length in range(64, 8192, 64)]
    assert pays == sorted(pays)


def test_rows_of_halves():
    assert halve([1, 5, 1, 4], [False, True, True, True]) == ((0, 3, 1, 2), (0, 2, 0, 2))
    assert halve([1, 1], [False, True]) is None
    assert halve([9, 1], [False, True]) is None
