"""Popularity: rank items by how often they were chosen, lately or ever.

Items are numbers in the order in which they were first seen.
"""

from __future__ import annotations

import numpy as np

from trainer.baselines.ranking import Scores, place
from trainer.quality import MISS, Rows

# Counts grow instead of older ones shrinking; past this they are scaled down together.
LARGEST_INCREMENT = 1e100


class Popularity:
    """Rank items by how often they were chosen, each choice worth `decay` times the next one.

    An event costs one pass over the items.
    """

    def __init__(self, decay: float = 1.0) -> None:
        self._growth = 1.0 / decay
        self._increment = 1.0
        self._counts = np.zeros(1024)

    def rank(self, row: int, seen: Rows) -> int:
        """Return the item's rank among all but `seen` (distinct items), or MISS when it is new or seen."""
        if row >= len(self._counts) or self._counts[row] == 0 or row in seen:
            return MISS
        scores = self._counts.copy()
        scores[seen] = -np.inf
        return place(scores, row)

    def add(self, row: int) -> None:
        """Count one choice."""
        if row >= len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(max(row, len(self._counts)))])
        self._counts[row] += self._increment
        self._increment *= self._growth
        if self._increment > LARGEST_INCREMENT:
            self._counts /= self._increment
            self._increment = 1.0

    def score(self, user: int, chosen: Rows, scores: Scores) -> None:
        """Write the score of each item; it is the same for every user."""
        scores[:] = self._counts[: len(scores)]

    def learn(self, user: int, item: int, chosen: Rows) -> None:
        """Count the user's choice."""
        self.add(item)
