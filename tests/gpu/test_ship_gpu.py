"""Exchanges and shipped models over NCCL, by single launches and in CUDA graphs."""

import pytest
import torch
from ranks import run_ranks
from test_ship import check_exchange, check_model

from torch_pd.weights.ship import Exchange, unpack

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]


def exchanges(rank: int) -> None:
    for seed in range(40):
        whole = seed % 2 == 0
        check_exchange(Exchange(whole=whole), seed, exact=not whole, device="cuda")


def in_a_graph(rank: int) -> None:
    exchange = Exchange()
    for rows, widths in (([4] * exchange.size, [8] * exchange.size), ([3, 5], [16, 0])):
        x = torch.zeros(rows[rank], 8, device="cuda")

        def call(x=x, rows=rows, widths=widths) -> torch.Tensor:
            y = exchange.gather(x, rows, widths)
            part = y.new_zeros(len(y), widths[rank]) if len(y) else y.new_empty(sum(rows), 0)
            if widths[rank]:
                part += y.repeat(1, widths[rank] // 8)
            packed = exchange.to_tokens(part, rows, widths)
            exchange.to_owners(unpack(packed, len(x), widths), rows, widths)
            return exchange.scatter_sum(y * (rank + 1), rows, widths) + packed.sum()

        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = call()
        for value in (1.0, 2.0):
            x.fill_(value)
            graph.replay()
            factor = sum(owner + 1 for owner, width in enumerate(widths) if width)
            want = value * factor + value * rows[rank] * sum(widths)
            assert torch.equal(out, torch.full_like(out, want))


def some_models(rank: int) -> None:
    for name in ("llama", "qwen3", "gemma2", "olmo2"):
        check_model(name, None, rank, "cuda", error=1e-4, serving=[True, True])
    check_model("llama", None, rank, "cuda", error=1e-4, weight_layout="layer")
    check_model("llama", None, rank, "cuda", error=1e-4, param_ranks=[1], serving=[True, False])


@pytest.mark.parametrize("function", [exchanges, in_a_graph, some_models])
def test_two_gpus(function):
    run_ranks(2, function, device="cuda")
