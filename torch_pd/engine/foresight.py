"""Foresight: the most pages that running sequences will hold at once."""

import numpy as np


def peak_pages(held: np.ndarray, tokens: np.ndarray, left: np.ndarray, block_size: int) -> int:
    """The most pages at once, if every sequence gains a token a step until it ends.

    Args:
        held: int64 [n], pages of each now.
        tokens: int64 [n], tokens of each now.
        left: int64 [n], tokens that each is yet to gain.
    """
    if not len(tokens):
        return 0
    order = np.argsort(left)
    left = left[order]
    # Just before the k-th ends, it and all that end later are there. A started page is half full
    # on average.
    alive = np.arange(len(left), 0, -1)
    present = np.cumsum(tokens[order][::-1])[::-1]
    pages = (present + alive * left) / block_size + alive / 2
    return max(int(held.sum()), int(pages.max()))
