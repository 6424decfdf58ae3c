"""Admission: when a waiting sequence may run, and on which pages."""

import numpy as np

from torch_pd.engine.foresight import peak_pages
from torch_pd.engine.plan import Plan
from torch_pd.engine.roster import Roster
from torch_pd.engine.sequence import Sequence

LOOK_AHEAD = 16
"""Waiting sequences for which the disk is read."""
STEP_TOKENS = 256
"""Prompt tokens that take as long as a step of few sequences: one that only reads the weights."""


class Admission:
    """Rule 3 of the scheduler, and rule 7 for those that come back.

    Args:
        roster: the sequences and their rows.
    """

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.allocator = roster.allocator
        self.swapper = roster.swapper
        self.watermark = self.allocator.num_usable // 100
        """Pages left to those that run already."""
        self.num_elsewhere = 0
        """Sequences that wait outside of this scheduler and may come to it."""
        self._blocked: tuple[Sequence | None, int] = None, 0  # did not fit into so many free pages

    def admit(self, plan: Plan, budget: int) -> None:
        """Adds waiting sequences to the plan, as far as rows, pages and ``budget`` tokens last."""
        roster, tables = self.roster, self.roster.tables
        seqs: list[Sequence] = []
        starts: list[int] = []
        counts: list[int] = []
        ends = -1  # pages of the running sequences, were all at their ends; once it is asked for
        while budget > 0 and tables.free_rows:
            seq = roster.waiting.first()
            if seq is None:
                break
            end = tables.pages_for(max(seq.expected_len or 0, len(seq.token_ids)))
            if seq.expected_len is not None and self.swapper is None and roster.num_running:
                if ends < 0:
                    ends = self._pages_at_ends()
                if (
                    ends + end > self.allocator.num_usable
                    and not self._pages_last(seq)
                    and not self._would_trail(seq)
                ):
                    break
            room = self._back(seq) if seq.saved else None
            if room is None and not seq.saved:
                room = self._first_pages(seq)
            if room is None:
                break
            pages, start = room
            roster.waiting.pop()
            if seq.num_preemptions == 0:
                seq.num_cached = start
            if self.swapper is not None:
                seq.arrival = self.swapper.tiers.queue.arrival(pages[seq.num_left :])
                if any(seq.arrival):
                    roster.arrive(seq, pages, start)
                    continue
            roster.run(seq, pages, start)
            if ends >= 0:
                ends += end
            seqs.append(seq)
            starts.append(start)
            counts.append(
                min(budget, len(seq.token_ids) - start, len(pages) * tables.block_size - start)
            )
            budget -= counts[-1]
        if seqs:
            plan.extend(seqs, starts, counts)

    def look_ahead(self) -> None:
        """Asks the disk for the prefixes of those that are admitted next."""
        swapper = self.swapper
        if swapper is None or not swapper.tiers.archive.works:
            return
        if not self.allocator.enable_prefix_caching:
            return
        near = self.roster.waiting.next(LOOK_AHEAD)
        swapper.look_ahead((seq, self._wanted_prefix(seq)) for seq in near if not seq.saved)

    # Whether the pool will do.

    def _pages_at_ends(self) -> int:
        rows, tables = self.roster.running.rows, self.roster.tables
        ends = np.maximum(tables.num_tokens[rows], tables.expected[rows])
        return int((-(-ends // tables.block_size)).sum())

    def _pages_last(self, seq: Sequence) -> bool:
        """Whether the pool will do if a waiting sequence runs beside the others."""
        assert seq.expected_len is not None
        rows, tables = self.roster.running.rows, self.roster.tables
        tokens = np.append(tables.num_tokens[rows], len(seq.token_ids))
        held = -(-tokens // tables.block_size)
        left = np.maximum(np.append(tables.expected[rows], seq.expected_len) - tokens, 0)
        shared = max(0, int(held[:-1].sum()) - self.allocator.num_used)
        peak = peak_pages(held, tokens, left, tables.block_size)
        return peak - shared <= self.allocator.num_usable

    def _would_trail(self, seq: Sequence) -> bool:
        """Whether the last that wait had better run now, though some then give way and are computed
        again, than that they run alone when all others have ended.

        A step of few sequences takes its time however few they are: each step that the last ones
        run alone is lost but for their own tokens.
        """
        if seq.num_preemptions:
            return False
        rows, tables = self.roster.running.rows, self.roster.tables
        waiting = self.roster.num_waiting + self.num_elsewhere
        if waiting >= STEP_TOKENS or not len(rows):
            return False
        assert seq.expected_len is not None
        left = np.maximum(tables.expected[rows] - tables.num_tokens[rows], 0)
        # At the earliest they start when the first one ends.
        steps = int(left.min()) + seq.expected_len - len(seq.token_ids) - int(left.max())
        return (STEP_TOKENS - waiting) * steps > waiting * seq.expected_len

    # Its pages.

    def _did_not_fit(self, seq: Sequence) -> bool:
        """Whether it was tried before with as many free pages; spares looking up a long prompt at
        every step."""
        return self._blocked[0] is seq and self.allocator.num_free <= self._blocked[1]

    def _note_blocked(self, seq: Sequence) -> None:
        """A sequence did not fit.

        Raises:
            RuntimeError: nothing else holds pages, and the pool cannot grow.
        """
        if not self.roster.num_running:
            backing = self.allocator.backing
            assert backing is not None, "a sequence that fits the pool alone must be admitted"
            raise RuntimeError(f"a sequence of {len(seq.token_ids)} tokens: {backing.why_stuck()}")
        self._blocked = (seq, self.allocator.num_free)

    def _first_pages(self, seq: Sequence) -> tuple[list[int], int] | None:
        """Pages for all tokens of a waiting sequence, and how many tokens are cached in them.

        None if too few pages are free; nothing is taken then.
        """
        tables = self.roster.tables
        crowded = self.roster.num_running > 0
        if crowded and self._did_not_fit(seq):
            return None
        digests = self._wanted_prefix(seq)
        total = tables.pages_for(len(seq.token_ids))
        if self.swapper is not None and self.swapper.is_large(len(seq.token_ids)):
            total = -1  # the rest is taken chunk by chunk
        if self.swapper is None:
            found, hits = self.allocator.peek(digests), 0
        else:
            if self.swapper.tiers.archive.is_fetching(digests):
                return None
            found, on_host = self.swapper.tiers.find(digests)
            hits = len(on_host)
        hits += len(found)
        if total < 0:
            assert self.swapper is not None
            total = hits + self.swapper.window
        revived = sum(self.allocator.refcount(page) == 0 for page in found)
        missing = total - len(found)
        spare = revived + (self.watermark if crowded else 0)
        if not self.allocator.secure(missing, spare, insist=not crowded):
            self._note_blocked(seq)
            return None
        if self.swapper is not None:
            pages, _ = self.swapper.tiers.take(digests, total)
        else:
            pages = self.allocator.lookup(digests) + self.allocator.allocate(missing)
        return pages, hits * tables.block_size

    def _wanted_prefix(self, seq: Sequence) -> list[bytes]:
        """Digests of the pages that a waiting sequence may take from the prefix cache."""
        if not self.allocator.enable_prefix_caching or seq.no_prefix_lookup:
            return []
        # Never the whole sequence: the last token must be computed for its logits.
        tokens, size = len(seq.token_ids), self.roster.tables.block_size
        digests = seq.page_digests(0, (tokens - 1) // size, size)
        if self.swapper is not None and self.swapper.is_large(tokens):
            digests = digests[: self.allocator.num_usable - self.swapper.window]
        return digests

    def _back(self, seq: Sequence) -> tuple[list[int], int] | None:
        """Pages of a sequence that was swapped out, and how many tokens are in them; None if too
        few are free, or it is not in the host pool, or (nothing is saved any more) it has to be
        computed again.

        Every second running sequence keeps room for a page more, lest a next step swap it out.
        """
        assert self.swapper is not None
        if not self.swapper.recall(seq):
            return None
        running, start = self.roster.num_running, seq.num_saved
        if running and self._did_not_fit(seq):
            return None
        pages = self.swapper.swap_in(seq, self.watermark + running // 2 if running else 0)
        if pages is None:
            self._note_blocked(seq)
            return None
        return pages, start
