"""Log-probabilities of chosen tokens and of the best ones beside them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_pd.engine.draw import ranked
from torch_pd.request import Logprob


def report(raw: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[dict[int, Logprob]]:
    """Log-probabilities by the raw logits ``raw [n, V]``: of each row the token of ``tokens``
    first, then the ``counts`` best (-1: all). Ranks count equals by rising id: all are distinct.
    """
    vocab = raw.shape[1]
    counts = [vocab if count == -1 else count for count in counts]
    chosen_ids = torch.tensor(tokens, dtype=torch.int64, device=raw.device)[:, None]
    scale = raw.logsumexp(dim=1, keepdim=True)
    chosen = raw.gather(1, chosen_ids)
    before = torch.arange(vocab, device=raw.device) < chosen_ids
    ranks = 1 + ((raw > chosen) | ((raw == chosen) & before)).sum(dim=1)
    width = max(counts)
    values, ids = _top(raw, width)
    best_ids, best_values = ids.tolist(), (values - scale).tolist()
    result = []
    for i, (value, rank) in enumerate(
        zip((chosen - scale)[:, 0].tolist(), ranks.tolist(), strict=True)
    ):
        entry = {tokens[i]: Logprob(value, rank)}
        for place in range(counts[i]):
            entry.setdefault(best_ids[i][place], Logprob(best_values[i][place], place + 1))
        result.append(entry)
    return result


def _top(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Exactly the first ``count`` of the canonical order (`ranked`), which candidates may tie out
    of; then all is sorted."""
    width = min(x.shape[1], 2 * count + 16)
    values, ids = ranked(x, width)
    if 0 < count < width < x.shape[1] and bool((values[:, count - 1] == values[:, -1]).any()):
        values, ids = ranked(x, x.shape[1])
    return values[:, :count], ids[:, :count]
