"""Scorer: recommend and score against one whole version of the weights."""

from recsys.scorer.query import Answer, Query, ScoredItem, Status
from recsys.scorer.scorer import Scorer

__all__ = ["Answer", "Query", "ScoredItem", "Scorer", "Status"]
