"""The ring: its plan by properties, the copies against the whole matrices, and a state machine with
slow copies in which every freed byte is poisoned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from torch_pd.nn.linear import linear_in_parts
from torch_pd.weights.layout import LINEARS, ModelDims, make_layout
from torch_pd.weights.pool import WeightPool
from torch_pd.weights.ring import Ring, plan_ring, ring_items
from torch_pd.weights.source import Matrix, Resident

DIMS = ModelDims(
    num_layers=3, hidden_size=32, num_heads=6, num_kv_heads=3, head_dim=8,
    intermediate_size=72, vocab_size=203, itemsize=4,
)  # fmt: skip
TIED = ModelDims(2, 16, 4, 2, 8, 40, 90, 4, tied=True)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(0, 20000))
def test_no_place_is_filled_before_its_bytes_are_released(sizes, spare):
    """Every use is filled as early as its gate allows; then nothing unread may lie there."""
    nbytes = max(sizes) + spare
    plan = plan_ring(sizes, nbytes)
    n = len(sizes)
    for i in range(n):
        assert plan.offsets[i] % 256 == 0
        assert plan.offsets[i] + sizes[i] <= nbytes
        assert 1 <= plan.gates[i] <= n
    written_by: dict[int, int] = {}  # start of a place -> last use that filled it
    for use in range(3 * n):
        i = use % n
        start, stop = plan.offsets[i], plan.offsets[i] + sizes[i]
        oldest_held = use - plan.gates[i] + 1  # all before are released
        for j, other in written_by.items():
            if other >= max(0, oldest_held):
                assert plan.offsets[j] >= stop or plan.offsets[j] + sizes[j] <= start
        written_by[i] = use


def test_a_ring_of_two_layers_lets_a_whole_layer_run_ahead():
    sizes = [300, 200, 1000, 500] * 4
    assert plan_ring(sizes, 2 * (512 + 256 + 1024 + 512)).gates == (8,) * 16


def test_too_small_a_ring():
    with pytest.raises(ValueError, match=r"too small for the largest matrix of 1,073,741,825"):
        plan_ring([10, (1 << 30) + 1], 1 << 30)


def filled_pools(dims, size, **layout):
    layout = make_layout(dims, size, **layout)
    generator = torch.Generator().manual_seed(0)
    pools = [WeightPool(layout, rank, torch.float32, "cpu") for rank in range(size)]
    for pool in pools:
        pool.arena.view(torch.float32).normal_(generator=generator)
    return pools


def make_ring(pools, index, **options):
    arenas = [pool.arena for pool in pools]
    return Ring(pools[0].layout, index, arenas, torch.float32, **options)


def smallest(layout, index, in_place=True):
    items = ring_items(layout, index, in_place)
    return max((item.nbytes(layout.dims.itemsize) for item in items), default=0)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dims", [DIMS, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "layout",
    [{}, {"weight_layout": "layer"}, {"param_ranks": [0, 1]}],
    ids=["shard", "layer", "param_ranks"],
)
def test_matrices_are_those_of_all_shards(size, dims, layout, in_place):
    if "param_ranks" in layout and size < 4:
        pytest.skip("no rank would be left without weights")
    if layout.get("weight_layout") == "layer" and size > dims.num_layers:
        size = dims.num_layers
    pools = filled_pools(dims, size, **layout)
    whole = Resident(pools)
    ids = torch.arange(dims.vocab_size)
    for index in range(size):
        nbytes = smallest(pools[0].layout, index, in_place) + 1000
        ring = make_ring(pools, index, in_place=in_place, poison=True, nbytes=nbytes)
        for _ in range(2):
            assert torch.equal(ring.embed(ids), whole.embed(ids))
            for layer in range(dims.num_layers):
                for linear in LINEARS:
                    matrix = ring.acquire(layer, linear)
                    assert torch.equal(matrix.join(), whole.acquire(layer, linear).join())
                    ring.release(layer, linear)
            tiles = [tile.clone() for tile in ring.head_tiles()]
            assert torch.equal(torch.cat(tiles), torch.cat(list(whole.head_tiles())))
        remote = sum(pool.layout.arena_bytes(pool.index) for pool in pools if pool.index != index)
        if not layout and dims is TIED:
            # All of the other arenas, but for what aligns the pieces.
            assert remote - 256 * 4 * len(LINEARS) * 4 <= ring.pulled_bytes <= remote
        ring.close()
        ring.close()


@pytest.mark.parametrize("layout", [{}, {"weight_layout": "layer"}], ids=["shard", "layer"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_products_are_those_of_resident_parts_bit_for_bit(size, layout):
    pools = filled_pools(DIMS, size, **layout)
    whole = Resident(pools)
    for index in range(size):
        resident = Resident(pools, index)
        ring = make_ring(pools, index, poison=True)
        for layer in range(DIMS.num_layers):
            for linear in LINEARS:
                (matrix,) = whole.acquire(layer, linear).parts
                x, bias = torch.randn(9, matrix.shape[1]), torch.randn(matrix.shape[0])
                streamed, parts = ring.acquire(layer, linear), resident.acquire(layer, linear)
                for added in (None, bias):
                    got = linear_in_parts(x, streamed, added)
                    assert torch.equal(got, linear_in_parts(x, parts, added))
                    want = linear_in_parts(x, Matrix((matrix,)), added)
                    torch.testing.assert_close(got, want)
                    if linear in ("qkv", "gate_up"):
                        # A column of the product depends on its row of the matrix alone.
                        assert torch.equal(got, want)
                ring.release(layer, linear)
        ring.close()


class SlowRing(RuleBasedStateMachine):
    """A rank that streams: holds matrices for a while, ends steps early, with slow copies."""

    @initialize(
        size=st.sampled_from([1, 2, 3]),
        index=st.integers(0, 2),
        in_place=st.booleans(),
        spare=st.integers(0, 40000),
        delays=st.lists(st.sampled_from([0, 0, 50, 300]), min_size=1, max_size=7),
    )
    def begin(self, size, index, in_place, spare, delays):
        pools = filled_pools(DIMS, size)
        self.whole = Resident(pools)
        self.head = torch.cat(list(self.whole.head_tiles()))
        index %= size
        nbytes = smallest(pools[0].layout, index, in_place) + spare
        self.ring = make_ring(
            pools, index, in_place=in_place, nbytes=nbytes, poison=True, delays=delays
        )
        self.order = [(layer, linear) for layer in range(DIMS.num_layers) for linear in LINEARS]
        self.next = 0
        self.held = None

    @precondition(lambda self: self.held is None and self.next < len(self.order))
    @rule()
    def acquire(self):
        self.held = self.ring.acquire(*self.order[self.next])
        assert torch.equal(self.held.join(), self.whole.acquire(*self.order[self.next]).join())

    @precondition(lambda self: self.held is not None)
    @rule()
    def release(self):
        """What was held is whole until the end, however far the copies ran ahead."""
        assert torch.equal(self.held.join(), self.whole.acquire(*self.order[self.next]).join())
        self.ring.release(*self.order[self.next])
        self.held = None
        self.next += 1

    @precondition(lambda self: self.held is None and self.next == len(self.order))
    @rule(tiles=st.integers(0, 9))
    def finish(self, tiles):
        """The head, or the first of its tiles only."""
        start = 0
        for tile, _ in zip(self.ring.head_tiles(), range(tiles), strict=False):
            assert torch.equal(tile, self.head[start : start + len(tile)])
            start += len(tile)
        self.next = 0

    @precondition(lambda self: self.held is None)
    @rule()
    def end_early(self):
        self.next = 0

    @rule(ids=st.lists(st.integers(0, DIMS.vocab_size - 1), max_size=5))
    def embed(self, ids):
        ids = torch.tensor(ids, dtype=torch.int64)
        assert torch.equal(self.ring.embed(ids), self.whole.embed(ids))

    def teardown(self):
        if hasattr(self, "ring"):
            self.ring.close()


TestSlowRing = SlowRing.TestCase
TestSlowRing.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_order_of_use_is_kept():
    ring = make_ring(filled_pools(DIMS, 2), 0)
    ring.acquire(0, "qkv")
    with pytest.raises(AssertionError, match="not in use"):
        ring.release(0, "o")
    ring.close()
    with pytest.raises(RuntimeError, match="closed"):
        ring.acquire(0, "qkv")
