"""Counting methods that the learner is compared with; each ranks the next item before it counts it.

Items are rows in the order in which they were first seen, from 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainer.quality import MISS

Rows = npt.NDArray[np.int64]
# Counts grow instead of older ones shrinking; past this they are scaled down together.
LARGEST_INCREMENT = 1e100


class Popularity:
    """Rank items by how often they were chosen, each choice worth `decay` times the next one."""

    def __init__(self, decay: float = 1.0) -> None:
        self._growth = 1.0 / decay
        self._increment = 1.0
        self._counts = np.zeros(1024)
        self._rows = 1

    def rank(self, row: int, seen: Rows) -> int:
        """Return the item's rank among all but `seen` (distinct rows), or MISS when it is new or seen."""
        if row >= self._rows or self._counts[row] == 0 or row in seen:
            return MISS
        counts, own = self._counts[: self._rows], self._counts[row]
        ahead = int((counts > own).sum() + (counts[:row] == own).sum())
        seen_counts = counts[seen]
        return 1 + ahead - int((seen_counts > own).sum() + ((seen_counts == own) & (seen < row)).sum())

    def add(self, row: int) -> None:
        """Count one choice."""
        self._rows = max(self._rows, row + 1)
        if row >= len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(max(row, len(self._counts)))])
        self._counts[row] += self._increment
        self._increment *= self._growth
        if self._increment > LARGEST_INCREMENT:
            self._counts /= self._increment
            self._increment = 1.0
