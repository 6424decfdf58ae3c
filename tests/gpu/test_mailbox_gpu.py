"""Exchanges by mapped memory: results, races, the numbers' end, and a rank that does not come.

Ranks may share a GPU, which then runs them in turn; so three and four ranks are tested on two
GPUs, and all of it on one.
"""

import itertools
import random
import time
import uuid

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_ship import check_exchange, check_model

from torch_pd import ops
from torch_pd.weights import mailbox
from torch_pd.weights.mailbox import Mailbox
from torch_pd.weights.ship import Exchange

pytestmark = pytest.mark.multi_gpu
GPUS = torch.cuda.device_count()


def say(rank: int, *what) -> None:
    if rank == 0:
        print(f"{time.strftime('%X')} mailbox:", *what, flush=True)


def device_of(rank: int) -> str:
    device = f"cuda:{rank % GPUS}"
    torch.cuda.set_device(device)
    return device


def new_exchange(rank: int, key: str, limit: int = 1 << 18, wait_s: float = 20.0) -> Exchange:
    """An exchange by mailbox alone: any other would go over gloo, which has no GPU memory."""
    size = dist.get_world_size()
    box = Mailbox(device_of(rank), key, rank, size, limit, wait_s, timeout_s=60)
    return Exchange(None, box)


def set_numbers(exchange: Exchange, number: int) -> None:
    """As if so many exchanges had been done; garbage in the lines."""
    inbox = exchange.mailbox._inbox
    torch.cuda.synchronize()
    dist.barrier()
    generator = torch.Generator(inbox.device).manual_seed(exchange.rank)
    inbox[mailbox._HEADER :].random_(generator=generator)
    numbers = inbox[: mailbox._HEADER].view(torch.int64)
    numbers[: (mailbox.MOST_RANKS + 1) * mailbox._BLOCKS] = number
    torch.cuda.synchronize()
    dist.barrier()


def exchanges(rank: int, key: str) -> None:
    exchange = new_exchange(rank, key)
    say(rank, "mapped")
    for number in (0, 7, 2**32 - 60, 2**33):
        set_numbers(exchange, number)
        for seed in range(12):
            for scale in (1, 8, 64):
                check_exchange(exchange, seed, True, exchange.mailbox._inbox.device, scale)
        say(rank, f"from number {number}: right")
    large = new_exchange(rank, f"{key}-large", limit=1 << 24)
    for seed in range(3):
        # Up to 9 MB a message, so that a block has many lines one after the other.
        check_exchange(large, seed, True, large.mailbox._inbox.device, 40_000)
    say(rank, "large messages: right")
    assert ops.describe_errors(ops.device_errors("cuda").tolist()) is None


class Chain:
    """Exchanges of several sizes one after the other, with inputs that change in every run and are
    checked on the device."""

    def __init__(self, exchange: Exchange, seed: int, dtype: torch.dtype) -> None:
        self.exchange, self.dice = exchange, random.Random(seed)
        size, device = exchange.size, exchange.mailbox._inbox.device
        self.turn = torch.zeros((), device=device, dtype=torch.int32)
        self.wrong = torch.zeros((), device=device, dtype=torch.int64)
        self.steps = []
        for step in range(6):
            scale = self.dice.choice((1, 8, 40))
            rows = [self.dice.choice((0, 1, 5, 16)) for _ in range(size)]
            widths = [self.dice.choice((0, scale, 3 * scale)) for _ in range(size)]
            rows[step % size], widths[(step + 1) % size] = 3, scale
            x = torch.randint(0, 50, (sum(rows), scale * 13)).to(device, dtype)
            y = torch.randint(0, 50, (sum(rows), sum(widths))).to(device, dtype)
            self.steps.append((rows, widths, x, y))

    def sleep(self, delays: random.Random) -> None:
        if delays.random() < 0.4:
            torch.cuda._sleep(delays.choice((1000, 20_000, 200_000)))

    def __call__(self, delays: random.Random) -> None:
        """``delays`` may differ between the ranks."""
        exchange = self.exchange
        rank, size = exchange.rank, exchange.size
        self.turn.add_(1).remainder_(50)
        for rows, widths, x, y in self.steps:
            x, y = x + self.turn, y + self.turn
            row, width = sum(rows[:rank]), sum(widths[:rank])
            mine, at = slice(row, row + rows[rank]), slice(width, width + widths[rank])
            owners = sum(w > 0 for w in widths)
            self.sleep(delays)
            got = exchange.gather(x[mine].contiguous(), rows, widths)
            self.check(got, x if widths[rank] else x[:0])
            self.sleep(delays)
            packed = exchange.to_tokens(y[:, at].contiguous(), rows, widths)
            starts = [sum(widths[:r]) for r in range(size + 1)]
            blocks = [y[mine, a:b].reshape(-1) for a, b in itertools.pairwise(starts)]
            self.check(packed, torch.cat(blocks))
            self.sleep(delays)
            self.check(exchange.to_owners(y[mine], rows, widths), y[:, at])
            self.sleep(delays)
            part = x if widths[rank] else x[:0]
            self.check(exchange.scatter_sum(part, rows, widths), x[mine] * owners)

    def check(self, got: torch.Tensor, want: torch.Tensor) -> None:
        assert got.shape == want.shape
        self.wrong += (got != want).sum()
        got.fill_(-1)


def races(rank: int, key: str, replays: int) -> None:
    exchange = new_exchange(rank, key)
    delays = random.Random(rank)
    for seed, dtype in enumerate((torch.bfloat16, torch.float32)):
        set_numbers(exchange, 2**32 - 500)
        # All ranks make the same inputs.
        torch.manual_seed(seed)
        chain = Chain(exchange, seed, dtype)
        for _ in range(3):
            chain(delays)
        assert int(chain.wrong) == 0
        say(rank, dtype, "launched one by one: right")
        graphs = []
        for _ in range(4):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                chain(delays)
            graphs.append(graph)
        say(rank, "captured")
        # The ranks replay the same graphs without waiting for each other.
        order = random.Random(seed)
        for _ in range(replays):
            graphs[order.randrange(len(graphs))].replay()
        torch.cuda.synchronize()
        assert int(chain.wrong) == 0
        say(rank, f"{replays} replays: right")
    assert ops.describe_errors(ops.device_errors("cuda").tolist()) is None


def lost(rank: int, key: str) -> None:
    exchange = new_exchange(rank, key, wait_s=0.5)
    size, device = exchange.size, exchange.mailbox._inbox.device
    rows, widths = [4] * size, [8] * size
    x = torch.full((4, 8), float(rank), device=device)
    exchange.gather(x, rows, widths)
    torch.cuda.synchronize()
    assert ops.describe_errors(ops.device_errors(device).tolist()) is None
    dist.barrier()
    if rank != size - 1:
        start = time.perf_counter()
        exchange.gather(x, rows, widths)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        message = ops.describe_errors(ops.device_errors(device).tolist())
        assert message == (
            f"torch_pd::exchange on the device: nothing came in time from the rank: {size - 1}"
        ), message
        assert 0.4 < seconds < 20, seconds
        start = time.perf_counter()
        for _ in range(20):
            exchange.gather(x, rows, widths)
        torch.cuda.synchronize()
        assert time.perf_counter() - start < 2
    say(rank, "a lost rank: found")
    dist.barrier()


def some_models(rank: int, key: str) -> None:
    exchange = new_exchange(rank, key)
    options = {"device": "cuda", "error": 1e-4, "exchange": exchange}
    serving = [True] * exchange.size
    for name in ("llama", "qwen3", "gemma2", "olmo2"):
        check_model(name, None, rank, serving=serving, **options)
    serving[1] = False
    check_model("llama", None, rank, param_ranks=[1], serving=serving, **options)


def everything(rank: int, key: str, replays: int) -> None:
    exchanges(rank, f"{key}-1")
    races(rank, f"{key}-2", replays)
    some_models(rank, f"{key}-3")
    lost(rank, f"{key}-4")


@pytest.mark.parametrize(("ranks", "replays"), [(2, 300), (3, 10), (4, 10)])
def test_ranks(ranks, replays):
    run_ranks(ranks, everything, uuid.uuid4().hex, replays)
