"""DiskTier: what is read is what was written, or an error that names the fault."""

import os
import resource

import pytest
import torch

from torch_pd.kv.disk import DiskTier
from torch_pd.kv.host import HostPool
from torch_pd.kv.moves import DiskJob

RECORDS = 6


@pytest.fixture(params=[4096, 5000, 12288])
def host(request):
    pool = HostPool(4, request.param, torch.device("cpu"))
    yield pool
    pool.release()


@pytest.fixture
def disk(host, tmp_path):
    tier = DiskTier(str(tmp_path), RECORDS, host)
    yield tier
    tier.close()


def run(disk: DiskTier, *jobs: DiskJob) -> list[str | None]:
    """Errors of the jobs, in their order."""
    for job in jobs:
        disk.start(job)
    ended = {}
    while disk.num_pending:
        ended |= dict(disk.poll(wait=True))
    return [ended[job] for job in jobs]


def open_again(disk: DiskTier) -> int:
    """The nameless file, without O_DIRECT."""
    return os.open(f"/proc/self/fd/{disk.fd}", os.O_RDWR)


def test_records_come_back(host, disk, tmp_path):
    assert os.listdir(tmp_path) == []  # the file has no name
    patterns = torch.randint(0, 255, (RECORDS, host.page_bytes), dtype=torch.uint8)
    for i, pattern in enumerate(patterns):
        host.pages[1] = pattern
        assert run(disk, DiskJob(True, i, 1)) == [None]
    for i in reversed(range(RECORDS)):
        host.pages[2:] = 0
        assert run(disk, DiskJob(False, i, 3)) == [None]
        assert torch.equal(host.pages[3], patterns[i])
        assert not host.pages[2].any()
    host.pages[1] = patterns[0]
    assert run(disk, DiskJob(True, 4, 1), DiskJob(True, 5, 1)) == [None, None]
    assert run(disk, DiskJob(False, 4, 2), DiskJob(False, 5, 3)) == [None, None]
    assert torch.equal(host.pages[2], host.pages[3])


def test_a_changed_byte_is_found(host, disk):
    host.pages[1] = 7
    assert run(disk, DiskJob(True, 2, 1)) == [None]
    stride = -(-host.page_bytes // 4096) * 4096
    fd = open_again(disk)
    for at in (0, 17, host.page_bytes - 1):
        os.pwrite(fd, b"\x47", 2 * stride + at)
        os.fsync(fd)
        assert "checksum" in run(disk, DiskJob(False, 2, 2))[0]
        os.pwrite(fd, b"\x07", 2 * stride + at)
        os.fsync(fd)
        assert run(disk, DiskJob(False, 2, 2)) == [None]
    os.close(fd)


def test_a_record_does_not_pass_for_another(host, disk):
    """As if the disk had answered from the wrong place."""
    host.pages[1] = 7
    assert run(disk, DiskJob(True, 0, 1)) == [None]
    host.pages[1] = 8
    assert run(disk, DiskJob(True, 1, 1)) == [None]
    stride = -(-host.page_bytes // 4096) * 4096
    fd = open_again(disk)
    os.pwrite(fd, os.pread(fd, stride, 0), stride)
    os.fsync(fd)
    os.close(fd)
    assert "checksum" in run(disk, DiskJob(False, 1, 2))[0]


def test_a_file_that_vanished(host, disk):
    host.pages[1] = 7
    assert run(disk, DiskJob(True, 5, 1)) == [None]
    os.ftruncate(disk.fd, 0)
    assert "ends inside" in run(disk, DiskJob(False, 5, 2))[0]
    os.ftruncate(disk.fd, 5 * -(-host.page_bytes // 4096) * 4096 + 4096)
    assert run(disk, DiskJob(False, 5, 2))[0] is not None


def test_a_full_disk(host, disk):
    """The kernel refuses to write past a limit, as it refuses on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    stride = -(-host.page_bytes // 4096) * 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * stride, hard))
    try:
        errors = run(disk, DiskJob(True, 0, 1), DiskJob(True, 4, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert errors[0] is None
    assert "EFBIG" in errors[1]
    assert run(disk, DiskJob(True, 4, 1)) == [None]


def test_refusals(host, tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        DiskTier(str(tmp_path / "none"), 1, host)
    with pytest.raises(ValueError, match=r"GiB free, .* need .* GiB: lower disk_kv_gib"):
        DiskTier(str(tmp_path), 1 << 40, host)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"cannot make a file"):
        DiskTier(str(file), 1, host)


def test_closing_drops_what_is_queued(host, tmp_path):
    tier = DiskTier(str(tmp_path), RECORDS, host)
    for i in range(RECORDS):
        tier.start(DiskJob(True, i, 1))
    tier.close()
    with pytest.raises(ValueError, match="closed"):
        tier.start(DiskJob(True, 0, 1))
