"""Roster: the sequences that wait or run, and every way from one of the two to the other."""

from collections import Counter

from torch_pd.engine.running import Running
from torch_pd.engine.sequence import Sequence, Status
from torch_pd.engine.swapper import Swapper
from torch_pd.engine.tables import Tables
from torch_pd.engine.waiting import Waiting
from torch_pd.kv.moves import NO_WAITS, Waits
from torch_pd.kv.pages import PageAllocator
from torch_pd.kv.tiers import Tiers


class Roster:
    """Whoever waits holds nothing; whoever runs or arrives holds a row of the tables and pages.

    Args:
        allocator: of the GPU pages.
        swapper: moves them to the tiers below and back; None if there are none.
        tables: a row for each one that runs.
    """

    def __init__(self, allocator: PageAllocator, swapper: Swapper | None, tables: Tables) -> None:
        self.allocator = allocator
        self.swapper = swapper
        self.tables = tables
        self.pages: PageAllocator | Tiers = allocator if swapper is None else swapper.tiers
        self.seqs: dict[int, Sequence] = {}
        """All, by seq_id."""
        self.running = Running()
        self.waiting = Waiting()
        self.arriving: list[Sequence] = []
        """They run when their pages have come in; in the order of their admission."""
        self.num_taken_out = 0
        """How often one that ran or arrived ended or gave way."""
        self._next_id = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold a row and pages."""
        return len(self.tables.block_tables) - len(self.tables.free_rows)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing yet, or nothing any more."""
        return len(self.seqs) - self.num_running

    def register(self, seq: Sequence, parent: Sequence | None = None) -> None:
        """Numbers a new sequence, which takes the place of its parent's request."""
        seq.seq_id, self._next_id = self._next_id, self._next_id + 1
        seq.order = (seq.seq_id if parent is None else parent.order[0], seq.seq_id)
        self.seqs[seq.seq_id] = seq

    def run(self, seq: Sequence, pages: list[int], computed: int) -> None:
        """Lets a sequence run on pages that hold its first ``computed`` tokens."""
        self.tables.take(seq, pages, computed)
        self.running.add(seq)

    def arrive(self, seq: Sequence, pages: list[int], computed: int) -> None:
        """As `run`, once the moves up to ``seq.arrival`` are done."""
        self.tables.take(seq, pages, computed)
        seq.status = Status.ARRIVING
        self.arriving.append(seq)

    def note_arrivals(self, waited: Waits = NO_WAITS) -> None:
        """Lets the sequences run whose pages have come in, or will have with tickets that the
        step's forward pass waits for."""
        if not self.arriving:
            return
        assert self.swapper is not None
        queue, still = self.swapper.tiers.queue, []
        for seq in self.arriving:
            if queue.has_come(seq.arrival):
                self.running.add(seq)
            elif queue.has_come(seq.arrival, waited):
                queue.compute_on(seq.pages[seq.num_left :])
                self.running.add(seq)
            else:
                still.append(seq)
        self.arriving = still

    def preempt(self) -> Sequence:
        """Lets the newest that runs or arrives give way: to the host where that pays, its pages
        are freed otherwise. It waits at its old place."""
        victim = self.running.seqs[-1]
        if self.arriving:
            newest = max(self.arriving, key=lambda seq: seq.order)
            victim = max(victim, newest, key=lambda seq: seq.order)
        computed = int(self.tables.num_computed[victim.row])
        swaps = self.swapper is not None and self.swapper.pays(victim, computed)
        pages = self._take_out(victim)
        if self.swapper is not None and swaps:
            self.swapper.swap_out(victim, pages, computed)
        else:
            self.pages.free(pages)
        victim.num_left = 0
        victim.num_preemptions += 1
        self.waiting.push(victim)
        return victim

    def end(self, seq: Sequence, status: Status) -> None:
        """Strikes a sequence off; its tokens stay readable."""
        assert self.seqs.get(seq.seq_id) is seq, f"sequence {seq.seq_id} has ended already"
        del self.seqs[seq.seq_id]
        if seq.status is Status.WAITING:
            seq.status = status
            self.waiting.note_ended()
            if seq.saved:
                assert self.swapper is not None
                self.swapper.drop(seq)
        else:
            pages = self._take_out(seq)
            seq.status = status
            self.pages.free(pages)

    def _take_out(self, seq: Sequence) -> list[int]:
        """Takes the row and the pages of a sequence; returns the pages."""
        self.num_taken_out += 1
        if seq.status is Status.ARRIVING:
            self.arriving.remove(seq)
        else:
            self.running.remove(seq)
        return self.tables.give_back(seq)

    def check(self, under_way: Counter[Sequence]) -> None:
        """Raises AssertionError if a page or row is lost or used twice, or a table is wrong.

        Args:
            under_way: how many tokens of each are being sampled.
        """
        running = self.running.check() + self.arriving
        waiting = self.waiting.check()
        if self.swapper is None:
            self.allocator.check([seq.pages for seq in running])
        else:
            saved = [seq.saved for seq in waiting]
            self.swapper.tiers.check(saved, [seq.pages for seq in running])
        self.tables.check(running, under_way)
        ids = sorted(seq.seq_id for seq in running + waiting)
        assert ids == sorted(self.seqs), f"{ids} run or wait, {sorted(self.seqs)} are known"
