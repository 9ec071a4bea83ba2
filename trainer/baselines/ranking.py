"""Ranking: the one place that decides which rank an item's score gives it, for every method that is compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.quality import MISS, Rows

Scores = npt.NDArray[np.floating[Any]]


def place(scores: Scores, item: int) -> int:
    """Return the item's rank by its score, 1 the best; a tie counts against it only where the other item is older.

    Items that are not ranked have the score -inf; an item whose own score is not finite is a MISS.
    """
    own = scores[item]
    if not np.isfinite(own):
        return MISS
    return 1 + int(np.count_nonzero(scores > own)) + int(np.count_nonzero(scores[:item] == own))


def best(scores: Scores, count: int) -> Rows:
    """Return the `count` items of the highest scores, in no order; fewer where fewer are ranked."""
    if len(scores) <= count:
        found = np.arange(len(scores))
    else:
        found = np.argpartition(scores, len(scores) - count)[-count:]
    return found[scores[found] > -np.inf]
