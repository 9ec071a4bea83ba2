"""Scorer: recommend and score against one whole version of the weights."""

from recsys.scorer.explanation import Explanation, explain
from recsys.scorer.lists import Lists, RankedItems
from recsys.scorer.query import Answer, Query, ScoredItem, ScoreParts, Scores, Status
from recsys.scorer.scorer import Scorer

__all__ = [
    "Answer",
    "Explanation",
    "Lists",
    "Query",
    "RankedItems",
    "ScoreParts",
    "ScoredItem",
    "Scorer",
    "Scores",
    "Status",
    "explain",
]
