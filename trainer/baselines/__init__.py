"""Baselines: known methods that the learner is compared with; each scores the next item before it learns of it.

Users and items are numbers in the order in which they were first seen; `chosen` are a user's earlier choices, oldest
first.
"""

from __future__ import annotations

from typing import Protocol

from trainer.baselines.click_regression import ClickRegression
from trainer.baselines.factors import BiasedFactorisation, IncrementalFactorisation
from trainer.baselines.neighbours import ItemNeighbours, SequentialCooccurrence
from trainer.baselines.popularity import Popularity
from trainer.baselines.ranking import Scores, best, place
from trainer.quality import Rows

__all__ = [
    "BiasedFactorisation",
    "ClickRegression",
    "IncrementalFactorisation",
    "ItemNeighbours",
    "ItemScorer",
    "Popularity",
    "Scores",
    "SequentialCooccurrence",
    "best",
    "place",
]


class ItemScorer(Protocol):
    """Score items for a user, and learn from each choice."""

    def score(self, user: int, chosen: Rows, scores: Scores) -> None:
        """Write the score of each item from 0 to len(scores) - 1, all of which were chosen before."""

    def learn(self, user: int, item: int, chosen: Rows) -> None:
        """Learn that the user, who had `chosen` before, chose the item."""
