"""Sequence: one output of one request, its tokens and its pages."""

from collections.abc import Sequence as ListLike
from enum import Enum
from typing import Any

from torch_pd.kv.moves import NO_WAITS
from torch_pd.kv.pages import page_hashes


class Status(Enum):
    """Where a sequence stands."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    ARRIVING = "arriving"  # holds a row and pages, which are being moved in
    FINISHED = "finished"
    FAILED = "failed"


class Sequence:
    """One output of one request: its tokens and its pages.

    Args:
        request_id: the engine's name of the request; the scheduler does not read it.
        token_ids: the prompt; sampled tokens are appended (the list is copied).
        max_total_len: prompt and output tokens at which the engine should finish it; default, and
            at most, max_model_len.
        expected_len: at which it will probably end; None if nobody knows.
        no_prefix_lookup: compute the whole prompt although its pages may be cached, because its
            logits are wanted (prompt_logprobs).
        space: of the digests of its pages: it finds those of its own space alone.
        data: the engine's own (sampling state); the scheduler does not read it.
    """

    __slots__ = (
        "arrival",
        "data",
        "digests",
        "error",
        "expected",
        "expected_len",
        "max_total_len",
        "no_prefix_lookup",
        "num_cached",
        "num_left",
        "num_preemptions",
        "num_prompt",
        "num_saved",
        "order",
        "pages",
        "request_id",
        "row",
        "saved",
        "seq_id",
        "space",
        "status",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        token_ids: ListLike[int],
        *,
        max_total_len: int | None = None,
        expected_len: int | None = None,
        no_prefix_lookup: bool = False,
        space: bytes = b"",
        data: Any = None,
    ) -> None:
        self.request_id = request_id
        self.token_ids = list(token_ids)
        self.num_prompt = len(self.token_ids)
        self.max_total_len = max_total_len
        self.expected_len = expected_len
        self.no_prefix_lookup = no_prefix_lookup
        self.space = space
        self.data = data
        self.seq_id = -1  # given by Scheduler.add and fork
        self.order = (-1, -1)  # (seq_id of the request's first sequence, own seq_id)
        self.status = Status.NEW
        self.row = -1  # of the scheduler's tables, while it runs
        self.pages: list[int] = []
        self.digests: list[bytes] = []  # of its full pages, as far as they were needed
        self.num_cached = 0  # prompt tokens found in the prefix cache
        self.num_preemptions = 0
        # Pages of its first num_saved tokens while it waits, see kv/archive.py.
        self.saved: list[int] = []
        self.num_saved = 0
        self.num_left = 0  # entries of pages, from the first, that lie on the host
        self.arrival = NO_WAITS  # tickets with which its pages have come in
        self.expected = -1  # tokens that it will compute, -1: the disk was not asked for its prefix
        self.error: str | None = None  # why it failed

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.status.value}, prompt={self.num_prompt}, "
            f"output={self.num_output}, pages={self.pages})"
        )

    @property
    def num_output(self) -> int:
        """Tokens sampled and known so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def at_length_limit(self) -> bool:
        """True once it holds max_total_len tokens; the engine finishes it then."""
        return self.max_total_len is not None and len(self.token_ids) >= self.max_total_len

    def page_digests(self, first: int, last: int, block_size: int) -> list[bytes]:
        """Digests of its full pages ``first .. last``, each computed once."""
        done = len(self.digests)
        if last > done:
            tokens = self.token_ids[done * block_size : last * block_size]
            self.digests += page_hashes(
                tokens, block_size, self.digests[-1] if done else self.space
            )
        return self.digests[first:last]
