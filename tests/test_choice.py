"""Streaming or shipping: what is cheaper, the same on every rank, without flutter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import QWEN3_32B
from test_ring import DIMS, filled_pools, make_ring

from torch_pd.costs import Costs, Machine, Step
from torch_pd.weights.choice import MARGIN, Choice
from torch_pd.weights.machine import _beside, machine_of


def choice(mode="auto", shards=4):
    return Choice(Costs(QWEN3_32B, Machine(), shards), mode, graph_rows=1024)


def test_prompts_stream_and_decoding_ships():
    made = choice()
    assert made.decide([8192] * 4, [8] * 4, False) == "stream"
    assert made.decide([150] * 4, [150] * 4, True) == "ship"
    assert made.decide([4096] * 4, [150] * 4, False) == "stream"


def test_one_rank_with_a_prompt_is_helped_by_the_others():
    """Streamed, three ranks would wait for one; shipped, all share its linears."""
    made = choice()
    assert made.decide([8192] * 4, [8] * 4, False) == "stream"
    assert made.decide([8192, 150, 150, 150], [150] * 4, False) == "ship"


def test_whole_layers_are_shipped_for_few_tokens_only():
    """Their owners compute them for all ranks, one after the other."""
    whole = Choice(Costs(QWEN3_32B, Machine(), 4, whole=True), graph_rows=1024)
    assert choice().decide([700] * 4, [64] * 4, False) == "ship"
    assert whole.decide([700] * 4, [64] * 4, False) == "stream"
    assert whole.decide([64] * 4, [64] * 4, True) == "ship"
    # With one rank's tokens alone it is as fast as they are computed on one GPU.
    step = Step(4096, 0, 0)
    one = Costs(QWEN3_32B, Machine(), 4, data_ranks=1, whole=True).ship(step)
    assert one == pytest.approx(Costs(QWEN3_32B, Machine()).resident(step), rel=0.25)


steps = st.lists(
    st.tuples(st.lists(st.integers(0, 8192), min_size=4, max_size=4), st.booleans()), min_size=1
).filter(lambda found: all(max(tokens) for tokens, _ in found))


@given(steps)
def test_ranks_agree_and_nobody_pays_more_than_the_margin(found):
    ranks = [choice() for _ in range(4)]
    for tokens, decoding in found:
        selected = [min(n, 256) for n in tokens]
        ways = {rank.decide(tokens, selected, decoding) for rank in ranks}
        assert len(ways) == 1
        stream, ship = ranks[0].seconds(tokens, selected, decoding)
        paid, other = (stream, ship) if ways == {"stream"} else (ship, stream)
        assert paid <= other * MARGIN


@pytest.mark.parametrize("mode", ["stream", "ship"])
def test_a_forced_mode(mode):
    made = choice(mode)
    for tokens in (1, 8192):
        assert made.decide([tokens] * 4, [1] * 4, tokens == 1) == mode


def test_no_flutter_where_both_cost_the_same():
    made = choice()
    edge = next(
        n for n in range(1, 4096) if choice().seconds([n] * 4, [0] * 4, False)[0]
        <= choice().seconds([n] * 4, [0] * 4, False)[1]
    )  # fmt: skip
    for way, rows in (("ship", 16), ("stream", 8192)):
        assert made.decide([rows] * 4, [0] * 4, rows == 16) == way
        for n in (edge - 8, edge + 8, edge - 4, edge + 4):
            assert made.decide([n] * 4, [0] * 4, False) == way


def test_constants_are_measured_once(tmp_path):
    pools = filled_pools(DIMS, 1)
    alone = lambda value: [value]  # noqa: E731
    ring = make_ring(pools, 0)
    machine = machine_of(ring, ring.device, alone, tmp_path)
    assert machine.name == "CPU"
    assert machine.link_bandwidth > 123
    (path,) = tmp_path.iterdir()
    path.write_text('{"link_bandwidth": 123.0}')
    assert machine_of(ring, ring.device, alone, tmp_path).link_bandwidth == 123
    path.write_text('{"speed": 1}')
    assert machine_of(ring, ring.device, alone, tmp_path).link_bandwidth > 123
    ring.close()


def test_what_pull_and_linears_cost_each_other():
    """Measured on GPUs alone; here only that the passes run, and leave the ring in order."""
    ring = make_ring(filled_pools(DIMS, 3), 1)
    met = []
    found = _beside(ring, 1e9, lambda value: met.append(value) or [value])
    assert set(found) == {"contention", "pull_loss"}
    assert all(value >= 0 for value in found.values())
    ring.run_through()
    ring.close()
    assert _beside(None, 1e9, met.append) == {"contention": 0.0, "pull_loss": 0.0}
    assert len(met) == 4  # every rank meets the others as often


def test_report():
    made = choice()
    made.decide([8192] * 4, [8] * 4, False)
    made.count(8192)
    made.decide([10] * 4, [10] * 4, True)
    made.count(10)
    made.count(10)
    report = made.report()
    assert (report["stream_steps"], report["stream_tokens"]) == (1, 8192)
    assert (report["ship_steps"], report["ship_tokens"]) == (2, 20)
    assert report["stream_seconds"] >= 0
