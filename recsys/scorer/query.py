"""Queries and answers of the scorer, and what is told of the version that it serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from recsys.catalog import CategoryFilter
from recsys.store.v1.log_pb2 import HistoryEntry

NONE: Mapping[str, float] = MappingProxyType({})


@dataclass(slots=True)
class Query:
    """Ask for the best `count` items, or for the scores of `candidates` when they are given."""

    # Everything kept of the user's history, oldest first: as it is stored, a serialized History, or its entries.
    history: Sequence[HistoryEntry] | bytes = b""
    count: int = 10
    exclude: frozenset[str] = frozenset()
    allow_seen: bool = False
    filter: CategoryFilter | None = None
    context: Mapping[str, str] = field(default_factory=dict)
    candidates: Sequence[str] | None = None
    # Whether to tell what the candidates' scores are made of.
    parts: bool = False


@dataclass(frozen=True, slots=True)
class ScoreParts:
    """What a score is the sum of, `content` apart."""

    network: float
    standing: float
    transitions: float
    # The weighted log of the expected worth of feedback.
    worth: float
    # Of `network`, what the item's categories gave: all until feedback on the item was learned, then nothing.
    content: float


class ScoredItem(NamedTuple):
    """One item of an answer; `source` is a value of recsys.v1.Source."""

    item_id: str
    score: float
    source: int
    # The history item that this item often follows, where source is SOURCE_TRANSITION.
    because: str | None = None
    known: bool = True
    # By class name; filled for candidates only.
    class_probabilities: Mapping[str, float] = NONE
    # Filled for candidates whose query asks for it.
    parts: ScoreParts | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Items best first (candidates: in the order asked), all computed from one `version`."""

    version: int
    items: Sequence[ScoredItem]


@dataclass(frozen=True, slots=True)
class Status:
    """What is being served; all zero before the first version."""

    version: int = 0
    committed_ms: int = 0
    applied_ms: int = 0
    items: int = 0
    feedback_learned: int = 0
