"""pack_shards and unpack_shards against torch, and their errors."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_pd import ops

nan = float("nan")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(0, 4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_shards(widths, rows, dtype):
    width = sum(widths)
    x = torch.randn(rows, width + 3).to(dtype)[:, 1 : width + 1]
    whole = torch.full((rows * width + 2,), 7.0).to(dtype)
    blocks = whole[1:-1]
    ops.pack_shards(x, blocks, widths)
    assert torch.equal(blocks, reference.ref_pack_shards(x, widths))
    assert whole[[0, -1]].eq(7).all()

    frame = torch.full((rows + 2, width + 2), 7.0).to(dtype)
    back = frame[1:-1, 1:-1]
    back.fill_(nan)
    ops.unpack_shards(blocks, back, widths)
    assert torch.equal(back, x)
    back.fill_(7)
    assert torch.equal(frame, torch.full_like(frame, 7))


BAD_SHARDS = {
    "widths has 2 shards that sum to 5, {matrix} is 6 wide": [2, 3],
    "widths must not be negative, got -1": [7, -1],
    "widths has 65 shards": [6] + [0] * 64,
}


@pytest.mark.parametrize("message", BAD_SHARDS)
def test_shards_errors(message):
    matrix, blocks, widths = torch.zeros(2, 6), torch.zeros(12), BAD_SHARDS[message]
    with pytest.raises(RuntimeError, match="torch_pd::pack_shards: " + message.format(matrix="x")):
        ops.pack_shards(matrix, blocks, widths)
    expected = "torch_pd::unpack_shards: " + message.format(matrix="out")
    with pytest.raises(RuntimeError, match=expected):
        ops.unpack_shards(blocks, matrix, widths)
