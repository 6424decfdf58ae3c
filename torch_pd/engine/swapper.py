"""Swapper: how sequences give their GPU pages up to the host pool and get them back."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch_pd.engine.sequence import Sequence
from torch_pd.kv.archive import LOST
from torch_pd.kv.moves import HOST_BITS
from torch_pd.kv.tiers import Tiers


@dataclass(frozen=True)
class SwapCosts:
    """What decides between swapping a sequence and computing it again."""

    page_seconds: float = 0.0
    """To move a page to the host and back."""
    token_seconds: float = 1.0
    """To compute a token of a prompt."""


class Swapper:
    """Moves whole sequences between the tiers; the older pages of a sequence that is larger than
    the GPU pool stay on the host.

    Args:
        tiers: the page pools.
        block_size: tokens of a page.
        costs: of a move and of computing again.
    """

    def __init__(self, tiers: Tiers, block_size: int, costs: SwapCosts) -> None:
        self.tiers = tiers
        self.block_size = block_size
        self.costs = costs
        self.usable = tiers.gpu.num_usable
        self.window = max(1, self.usable // 4)
        """Pages that a step of a sequence larger than the GPU pool may write."""
        self.num_swapped = 0
        """Sequences that gave way to the host pool."""
        self.away: list[Sequence] = []
        """Those that have not come back."""

    def is_large(self, tokens: int) -> bool:
        """Whether so many tokens do not fit the GPU pool."""
        return tokens > self.usable * self.block_size

    def most_tokens(self, start: int) -> int:
        """How many tokens from ``start`` on a step may compute of a large sequence."""
        return self.window * self.block_size - start % self.block_size

    def _digests(self, seq: Sequence, tokens: int) -> list[bytes]:
        """Of the full pages among the first ``tokens``, as far as the tokens are known."""
        if not self.tiers.gpu.enable_prefix_caching:
            return []
        pages = min(tokens, len(seq.token_ids)) // self.block_size
        return seq.page_digests(0, pages, self.block_size)

    # Whole sequences.

    def pays(self, seq: Sequence, computed: int) -> bool:
        """Whether the host pool has room for the sequence and moving it is cheaper than computing
        its first ``computed`` tokens again."""
        used = -(-computed // self.block_size)
        moves = self.tiers.swap_cost(seq.pages[:used], self._digests(seq, computed))
        if moves is None or not used:
            return False
        return moves * self.costs.page_seconds <= computed * self.costs.token_seconds

    def swap_out(self, seq: Sequence, entries: list[int], computed: int) -> None:
        """Gives the entries up for ``seq.saved``, which `swap_in` takes; there must be room."""
        used = -(-computed // self.block_size)
        seq.saved = self.tiers.swap_out(entries[:used], self._digests(seq, computed))
        seq.num_saved = computed
        self.tiers.free(entries[used:])
        self.num_swapped += 1
        self.away.append(seq)

    def swap_in(self, seq: Sequence, reserve: int) -> list[int] | None:
        """Entries for a swapped sequence that is in the host pool (`recall`), its first
        ``num_saved`` tokens in them; None if fewer than ``reserve`` GPU pages would stay free."""
        tokens, start, saved = len(seq.token_ids), seq.num_saved, seq.saved
        left = 0
        if self.is_large(tokens):
            tokens = min(tokens, start + self.most_tokens(start))
            total = -(-tokens // self.block_size)
            left = max(0, min(start // self.block_size, total - self.usable + self.window))
        total = -(-tokens // self.block_size)
        digests = self._digests(seq, start)
        gpu = self.tiers.gpu
        found = gpu.peek(digests[left:])
        revived = sum(gpu.refcount(page) == 0 for page in found)
        wanted = total - left - len(found)
        if not gpu.secure(wanted, revived + reserve, insist=not reserve):
            return None
        entries = self.tiers.swap_in(saved, digests, total, left)
        self.tiers.read_in_place(entries[:left])
        seq.saved, seq.num_saved, seq.num_left = [], 0, left
        self.away.remove(seq)
        return entries

    def drop(self, seq: Sequence) -> None:
        """A swapped sequence ended, or is to be computed again."""
        self.tiers.archive.release(seq.saved)
        seq.saved, seq.num_saved, seq.expected = [], 0, -1
        self.away.remove(seq)

    # Disk.

    def spill(self) -> None:
        """Lets swapped sequences go on to disk while the host pool is nearly full: those that come
        back last, and never the one that comes back next."""
        host, archive = self.tiers.host, self.tiers.archive
        if not archive.works or 4 * host.num_free >= host.num_usable or len(self.away) < 2:
            return
        self.away.sort(key=lambda seq: seq.order)
        for seq in reversed(self.away[1:]):
            if not archive.spill(seq.saved, self._digests(seq, seq.num_saved)):
                break

    def recall(self, seq: Sequence) -> bool:
        """Whether all pages of a swapped sequence are in the host pool; reads what is on disk. One
        whose pages are lost, or find no room, is dropped."""
        archive = self.tiers.archive
        if LOST in seq.saved:
            self.drop(seq)
            return False
        while not archive.recall(seq.saved):
            if archive.busy:
                return False  # what is written makes room, what is read comes
            newest = max(self.away, key=lambda other: other.order)
            self.drop(newest)
            if newest is seq:
                return False
        return True

    def look_ahead(self, seqs: Iterable[tuple[Sequence, list[bytes]]]) -> None:
        """Decides for sequences that are to be admitted next, in order, whether what the disk has
        of their prefixes is read: if it will be there by the time at which it would be computed.

        Args:
            seqs: with the digests of what they may take from the prefix cache.
        """
        archive, seconds = self.tiers.archive, self.costs.token_seconds
        ahead = 0
        for seq, digests in seqs:
            if seq.expected < 0:
                reached, wanted = self.tiers.on_disk(digests)
                computed = ahead + len(wanted) * self.block_size
                if wanted and archive.read_seconds(len(wanted)) <= computed * seconds:
                    archive.fetch(wanted)
                elif wanted:
                    reached = digests.index(wanted[0])
                seq.expected = len(seq.token_ids) - reached * self.block_size
            ahead += seq.expected

    # The older pages of a large one.

    def leave(self, seq: Sequence, wanted: int, first: int) -> list[tuple[int, int]]:
        """Leaves pages of a running sequence on the host, the oldest first, until ``wanted`` GPU
        pages are free; none from page ``first`` on.

        Returns:
            (index, new entry) of what was left; the caller writes them into the block table.
        """
        digests = self._digests(seq, first * self.block_size)
        changes = []
        while self.tiers.gpu.num_free < wanted and seq.num_left < first:
            index = seq.num_left
            page = seq.pages[index]
            assert page < HOST_BITS
            digest = digests[index] if index < len(digests) else None
            entry = self.tiers.leave(page, digest)
            if entry is None:
                break
            changes.append((index, entry))
            seq.num_left += 1
        return changes
