"""Everything in this folder needs one GPU and the CUDA build, and is skipped with the reason."""

from pathlib import Path

import pytest
import torch

from torch_pd import ops


def missing() -> str | None:
    """What these tests lack here, None if nothing."""
    if not ops.has_cuda_ops():
        return f"CUDA bodies {ops.cuda_status()}"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no GPU, or no driver for it"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def clean_flag():
    """A test starts with a clean error flag and, unless it reads it itself, leaves one."""
    ops.device_errors("cuda")
    yield
    assert ops.describe_errors(ops.device_errors("cuda").tolist()) is None
