"""Explanation: what one item's score for one user is made of, and what each history entry does to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from recsys.scorer.query import Answer, Query, ScoredItem
from recsys.store.v1.log_pb2 import HistoryEntry


@dataclass(frozen=True, slots=True)
class Explanation:
    """Hold a scored item with its parts, and the entries that the score depends on, oldest first."""

    version: int
    item: ScoredItem
    # Each with the score less the score without it.
    influences: Sequence[tuple[HistoryEntry, float]]


class Answers(Protocol):
    """Answer a batch of queries from one version, as Scorer does."""

    def answer(self, queries: list[Query]) -> list[Answer]:
        """Return an answer for each, in order."""


def explain(
    scorer: Answers, history: Sequence[HistoryEntry], item_id: str, context: Mapping[str, str], length: int
) -> Explanation:
    """Score an item with the whole history and without each of its last `length` entries, all in one batch.

    Without one of these the next older entry takes part, as it would had the user never left the other. The differences
    are exact; as entries work together they do not sum to the score.
    """
    recent = range(max(0, len(history) - length), len(history))
    shortened = [[*history[:place], *history[place + 1 :]] for place in recent]
    queries = [Query(history=each, candidates=[item_id], context=context) for each in [history, *shortened]]
    whole, *without = scorer.answer(queries)
    (item,) = whole.items
    differences = [item.score - answer.items[0].score for answer in without]
    return Explanation(whole.version, item, list(zip(history[recent.start :], differences, strict=True)))
