"""The examples of several ranks run, and say the same."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def lines(*command):
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if not line.startswith("rank ")]


@pytest.mark.usefixtures("smollm2")
def test_spawn_and_torchrun():
    texts = lines(EXAMPLES / "spawn.py", "2")
    assert len(texts) == 16
    assert texts[3].startswith("'One thing to know about the number 3 is")
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert lines(*run, EXAMPLES / "torchrun.py") == texts
