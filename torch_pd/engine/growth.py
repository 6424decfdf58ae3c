"""Growth: the pages that a running sequence needs as it goes on."""

from torch_pd.engine.roster import Roster
from torch_pd.engine.sequence import Sequence
from torch_pd.engine.swapper import Swapper
from torch_pd.kv.moves import HOST_BITS


class Growth:
    """Takes pages from the pool, without asking another sequence to give way.

    Args:
        roster: the sequences and their rows.
    """

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.allocator = roster.allocator
        self.swapper = roster.swapper

    def grow(self, seq: Sequence, start: int, end: int, copies: list[tuple[int, int]]) -> bool:
        """Gets the pages that computing tokens ``start .. end`` needs; False if too few are free.

        Args:
            copies: (from, to) of a page that others hold too is appended.
        """
        tables = self.roster.tables
        held, first = len(seq.pages), start // tables.block_size
        missing = max(0, tables.pages_for(end) - held)
        assert held + missing <= tables.block_tables.shape[1], (
            f"sequence {seq.seq_id} is past max_model_len, at {end} tokens: finish it"
        )
        copy = False
        if tables.forked[seq.row] and first < held:
            page = seq.pages[first]
            copy = page >= HOST_BITS or self.allocator.refcount(page) > 1
        if not self.allocator.secure(missing + copy):
            if self.swapper is not None and self.swapper.is_large(end):
                self._leave(self.swapper, seq, missing + copy, first)
            if not self.allocator.secure(missing + copy):
                return False
        tables.forked[seq.row] = False
        if copy:
            # It keeps a holder, so no copy of this plan overwrites it: the holders are a parent and
            # its children, neighbours in the order, and later takers preempt only newer ones.
            (new,) = self._allocate(1)
            if page >= HOST_BITS:  # a parent larger than the GPU pool left it there
                assert self.swapper is not None
                self.swapper.tiers.bring(page, new)
                seq.num_left = first
            else:
                copies.append((page, new))
                self.allocator.free([page])
            tables.replace(seq, first, new)
        tables.extend(seq, self._allocate(missing))
        return True

    def _allocate(self, n: int) -> list[int]:
        """Pages that the step writes to."""
        pages = self.allocator.allocate(n)
        if self.swapper is not None:
            self.swapper.tiers.queue.compute_on(pages)
        return pages

    def _leave(self, swapper: Swapper, seq: Sequence, wanted: int, first: int) -> None:
        """Makes room in the GPU pool with older pages of a sequence that is larger."""
        for _ in range(len(self.roster.seqs)):
            for index, entry in swapper.leave(seq, wanted, first):
                self.roster.tables.replace(seq, index, entry)
            if self.allocator.num_free >= wanted or seq.num_left == first:
                break
            # The host pool is full: the newest one swapped out is computed again.
            if not swapper.away:
                break
            swapper.drop(max(swapper.away, key=lambda other: other.order))
