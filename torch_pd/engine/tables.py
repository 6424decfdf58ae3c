"""Tables: numpy rows of the running sequences, from which a step's tensors are gathered."""

from collections.abc import Iterable, Mapping

import numpy as np

from torch_pd.engine.sequence import Sequence


class Tables:
    """A row for each running sequence, written when it changes and not at every step.

    ``block_tables`` int32 [max_num_seqs, max_pages], 0 behind the last page and in free rows; all
    others are [max_num_seqs], int64, and mean nothing in free rows.

    Args:
        max_num_seqs: rows.
        max_pages: pages of the longest sequence.
        block_size: tokens of a page.
    """

    def __init__(self, max_num_seqs: int, max_pages: int, block_size: int) -> None:
        self.block_size = block_size
        self.block_tables = np.zeros((max_num_seqs, max_pages), np.int32)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        """Tokens known or under way."""
        self.num_computed = np.zeros(max_num_seqs, np.int64)
        """Tokens whose KV is in the pages, or will be after the steps under way."""
        self.last_token = np.zeros(max_num_seqs, np.int64)
        """The newest token known: the input of a decoding step, unless ``source`` names another."""
        self.source = np.full(max_num_seqs, -1, np.int64)
        """Place of the newest token among the samples of the newest step under way; -1: known."""
        self.num_prompt = np.zeros(max_num_seqs, np.int64)
        self.limit = np.zeros(max_num_seqs, np.int64)
        """Tokens at which the sequence ends (max_total_len)."""
        self.expected = np.zeros(max_num_seqs, np.int64)
        """Tokens at which it will probably end, 0 where nobody knows."""
        self.seq_id = np.full(max_num_seqs, -1, np.int64)
        """Whose row it is or was."""
        self.capacity = np.zeros(max_num_seqs, np.int64)
        """Tokens that the pages have room for."""
        self.forked = np.zeros(max_num_seqs, bool)
        """bool: the next page written to may be held by others too."""
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.block_size)

    def take(self, seq: Sequence, pages: list[int], num_computed: int) -> None:
        """Gives the sequence a row (one must be free) and the pages."""
        assert seq.max_total_len is not None
        row = seq.row = self.free_rows.pop()
        seq.pages = pages
        self.block_tables[row, : len(pages)] = pages
        self.num_tokens[row] = len(seq.token_ids)
        self.num_computed[row] = num_computed
        self.last_token[row] = seq.token_ids[-1]
        self.source[row] = -1
        self.num_prompt[row] = seq.num_prompt
        self.limit[row] = seq.max_total_len
        self.expected[row] = seq.expected_len or 0
        self.seq_id[row] = seq.seq_id
        self.capacity[row] = len(pages) * self.block_size
        self.forked[row] = False

    def extend(self, seq: Sequence, pages: list[int]) -> None:
        """Appends pages to the sequence."""
        row = seq.row
        for page in pages:  # nearly always one, so a slice would cost more
            self.block_tables[row, len(seq.pages)] = page
            seq.pages.append(page)
        self.capacity[row] = len(seq.pages) * self.block_size

    def replace(self, seq: Sequence, index: int, page: int) -> None:
        """Puts ``page`` in the place of the sequence's page ``index``."""
        seq.pages[index] = page
        self.block_tables[seq.row, index] = page

    def give_back(self, seq: Sequence) -> list[int]:
        """Frees the row; returns the pages, which the caller frees."""
        pages, seq.pages = seq.pages, []
        self.block_tables[seq.row, : len(pages)] = 0
        self.free_rows.append(seq.row)
        seq.row = -1
        return pages

    def check(self, running: Iterable[Sequence], under_way: Mapping[Sequence, int]) -> None:
        """Raises AssertionError if a row is lost or differs from its sequence.

        Args:
            running: the sequences that have a row.
            under_way: of each, the tokens that are being sampled (absent: none).
        """
        running = list(running)
        rows = sorted([*self.free_rows, *(seq.row for seq in running)])
        assert rows == list(range(len(self.block_tables))), f"rows free or in use: {rows}"
        assert not self.block_tables[sorted(self.free_rows)].any(), "a free row names pages"
        for seq in running:
            row, held = seq.row, len(seq.pages)
            tokens = len(seq.token_ids) + under_way.get(seq, 0)
            table = self.block_tables[row]
            assert table[:held].tolist() == seq.pages, f"row {row} of sequence {seq.seq_id} differs"
            assert not table[held:].any(), f"row {row} names pages behind the last"
            found = (self.num_tokens[row], self.last_token[row], self.capacity[row])
            wanted = (tokens, seq.token_ids[-1], held * self.block_size)
            assert found == wanted, f"row {row}: tokens, last token, capacity {found} != {wanted}"
            known = self.source[row] < 0
            assert known or under_way.get(seq), f"row {row} waits for a token of no step"
            computed = self.num_computed[row]
            assert 0 <= computed < tokens, f"row {row}: {computed} of {tokens} tokens computed"
            assert computed <= self.capacity[row], f"row {row}: {computed} tokens, {held} pages"
