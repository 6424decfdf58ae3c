"""Tickets: sampled tokens on their way to the host."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_pd import ops
from torch_pd.engine.device import lost

SLOTS = 3
"""Steps whose results or times are still looked at: one running, one launched, one just done."""


@dataclass(slots=True)
class Ticket:
    """One launched step."""

    count: int
    """Tokens that it samples."""
    slot: int
    logits: Tensor | None = None
    """[n, vocab] while the host has to draw."""
    started: float = 0.0
    ended: float = 0.0
    """Seconds of the host's clock, on the CPU only."""


class Tickets:
    """Pinned memory for results and the events of the last steps.

    Args:
        rows: tokens of the largest step.
        device: where they are sampled.
    """

    def __init__(self, rows: int, device: torch.device):
        self._device = device
        self._cuda = device.type == "cuda"
        self._turn = 0
        self._results = [
            torch.zeros(2 + rows, dtype=torch.int64, pin_memory=self._cuda) for _ in range(SLOTS)
        ]
        self._last: Ticket | None = None
        self.busy = 0.0
        """Seconds that steps took on the device."""
        self.idle = 0.0
        """Seconds that the device waited between two steps for the host."""
        if self._cuda:
            self._started = [torch.cuda.Event(enable_timing=True) for _ in range(SLOTS)]
            self._ended = [torch.cuda.Event(enable_timing=True) for _ in range(SLOTS)]

    @property
    def pinned(self) -> list[Tensor]:
        """Memory of the host that the device writes to."""
        return self._results

    def begin(self, count: int) -> Ticket:
        """A ticket for a step that is launched after this call; at most two may be under way."""
        ticket = Ticket(count, self._turn)
        self._turn = (self._turn + 1) % SLOTS
        if self._cuda:
            self._started[ticket.slot].record()
        else:
            ticket.started = time.perf_counter()
        return ticket

    def send(self, ticket: Ticket, tokens: Tensor) -> None:
        """Starts the copy to the host of ``tokens``: 2 words for the error flag, then the tokens,
        int64 on the device."""
        if self._cuda:
            tokens[:2].view(torch.int32).copy_(ops.device_errors(self._device))
        size = 2 + ticket.count
        self._results[ticket.slot][:size].copy_(tokens[:size], non_blocking=True)
        if self._cuda:
            self._ended[ticket.slot].record()
        else:
            ticket.ended = time.perf_counter()

    def wait(self, ticket: Ticket) -> tuple[list[int], str | None]:
        """Waits for the step: its tokens, and what its kernels found wrong.

        Raises:
            DeviceLost: the GPU failed.
        """
        if self._cuda:
            try:
                self._ended[ticket.slot].synchronize()
            except RuntimeError as error:
                raise lost(self._device, error) from error
        self._count_time(ticket)
        words = self._results[ticket.slot]
        found = ops.describe_errors(words[:2].view(torch.int32).tolist())
        return words[2 : 2 + ticket.count].tolist(), found

    def _count_time(self, ticket: Ticket) -> None:
        last, self._last = self._last, ticket
        if self._cuda:
            start, end = self._started[ticket.slot], self._ended[ticket.slot]
            self.busy += start.elapsed_time(end) / 1e3
            if last is not None:
                self.idle += max(0.0, self._ended[last.slot].elapsed_time(start) / 1e3)
        else:
            self.busy += ticket.ended - ticket.started
            if last is not None:
                self.idle += max(0.0, ticket.started - last.ended)

    def rest(self) -> None:
        """Nothing is left to run: the time until the next step is nobody's loss."""
        self._last = None
