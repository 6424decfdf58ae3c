"""Tickets: what a step's wait tells, also of a GPU that failed."""

import pytest
import torch

from torch_pd.engine.device import DeviceLost, device_lost
from torch_pd.engine.tickets import Tickets


def test_tokens_come_in_the_order_of_their_steps():
    tickets = Tickets(4, torch.device("cpu"))
    found = []
    before = None
    for step in range(5):
        ticket = tickets.begin(2)
        tickets.send(ticket, torch.tensor([0, 0, step, step + 10, 99, 99]))
        if before is not None:
            found.append(tickets.wait(before))
        before = ticket
    assert found == [([step, step + 10], None) for step in range(4)]
    assert tickets.busy > 0
    tickets.rest()
    assert tickets.wait(before) == ([4, 14], None)


def test_a_lost_gpu_is_a_clear_error():
    class Lost:
        def synchronize(self):
            raise RuntimeError("CUDA error: unspecified launch failure\nmore lines")

    tickets = Tickets(4, torch.device("cpu"))
    ticket = tickets.begin(1)
    tickets._cuda, tickets._ended = True, [Lost()] * 3
    with pytest.raises(DeviceLost, match=r"failed during a step.*CUDA error: unspecified.*failure"):
        tickets.wait(ticket)


def test_an_error_of_a_step_is_told_from_a_lost_gpu(monkeypatch):
    gpu, error = torch.device("cuda", 0), RuntimeError("the logits hold NaN")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert device_lost(gpu, error) is None

    def fails(device):
        raise RuntimeError("CUDA error: device-side assert triggered\nmore lines")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    lost = device_lost(gpu, error)
    assert isinstance(lost, DeviceLost)
    assert "CUDA error: device-side assert triggered" in str(lost)
    assert device_lost(gpu, lost) is lost
    assert device_lost(torch.device("cpu"), error) is None
    assert device_lost(gpu, ValueError("no such thing")) is None
