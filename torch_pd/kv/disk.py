"""DiskTier: records of KV pages in one file, read and written beside everything else."""

import errno
import logging
import os
import secrets

import torch_pd._runtime as _runtime
from torch_pd.kv.host import HostPool
from torch_pd.kv.moves import DiskJob
from torch_pd.sizing import GIB

logger = logging.getLogger(__name__)

THREADS = 8
"""Transfers under way at once."""
RATE = 2e9
"""Bytes a second of a disk that was not measured yet."""


class DiskTier:
    """Copies pages of the host pool to and from the records of a file, by a pool of threads.

    The file has no name: it goes with the process. Its space is taken at once where the file system
    can do that. O_DIRECT is used where it is supported; otherwise that is logged.

    Args:
        folder: where the file is made.
        num_records: its size in pages.
        host: the pool that pages come from and go to.

    Raises:
        ValueError: the folder does not exist, cannot be written to or lacks the space.
    """

    def __init__(self, folder: str, num_records: int, host: HostPool) -> None:
        self.host = host
        nbytes = num_records * -(-host.page_bytes // 4096) * 4096
        setting = f"disk_kv_path={folder!r}"
        free = free_space(folder)
        if nbytes > free:
            raise ValueError(
                f"{setting} has {free / GIB:.2f} GiB free, {num_records} pages x "
                f"{host.page_bytes:,} bytes need {nbytes / GIB:.2f} GiB: lower disk_kv_gib"
            )
        path = os.path.join(folder, f"torch_pd_kv_{secrets.token_hex(8)}")
        try:
            self._file = _runtime.DiskFile(path, host.page_bytes, num_records, THREADS)
        except OSError as error:
            raise ValueError(
                f"{setting}: cannot make a file of {nbytes / GIB:.2f} GiB ({error})"
            ) from error
        if not self._file.direct:
            logger.warning("%s: no O_DIRECT there, so pages pass through the page cache", setting)
        if not self._file.reserved:
            logger.warning(
                "%s: the file system cannot reserve the file's space, so a full disk shows only "
                "when pages are written",
                setting,
            )
        self._jobs: dict[int, DiskJob] = {}

    @property
    def direct(self) -> bool:
        """Whether transfers bypass the page cache."""
        return self._file.direct

    @property
    def fd(self) -> int:
        """The file's descriptor."""
        return self._file.fd

    @property
    def num_pending(self) -> int:
        """Jobs started whose end `poll` has not told yet."""
        return len(self._jobs)

    @property
    def page_seconds(self) -> float:
        """What a transfer of a page has taken, others beside it; before the first few, a guess."""
        count, seconds = self._file.done
        return seconds / count if count >= 2 * THREADS else self.host.page_bytes / RATE

    def start(self, job: DiskJob) -> None:
        """Starts a job; the host page must stay as it is until `poll` tells its end."""
        address = self.host.address + job.host_page * self.host.page_bytes
        self._jobs[self._file.start(job.write, job.record, address)] = job

    def poll(self, wait: bool = False) -> list[tuple[DiskJob, str | None]]:
        """Jobs that ended since the last call, with what went wrong or None. Does not wait, or
        waits for one to end if any is under way."""
        ended = []
        for ticket, error in self._file.poll(wait):
            ended.append((self._jobs.pop(ticket), _describe(error)))
        return ended

    def close(self) -> None:
        """Ends the threads, dropping what is queued, and the file with them."""
        self._file.close()
        self._jobs.clear()


def free_space(folder: str) -> int:
    """Bytes that files in a folder may still take. ValueError if there is no such folder."""
    try:
        space = os.statvfs(folder)
    except OSError as error:
        raise ValueError(
            f"disk_kv_path={folder!r}: {error.strerror}; give an existing folder"
        ) from error
    return space.f_bavail * space.f_frsize


def _describe(error: int) -> str | None:
    if error == 0:
        return None
    if error == -1:
        return "the file ends inside the record"
    if error == -2:
        return "the record is not what was written (its checksum differs)"
    return f"{os.strerror(error)} ({errno.errorcode.get(error, error)})"
