"""Queries and answers of the scorer, and what is told of the version that it serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

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
    """One item of an answer."""

    item_id: str
    score: float
    # A value of recsys.v1.Source; of candidates it is not told.
    source: int = 0
    # The history item that this item often follows, where source is SOURCE_TRANSITION.
    because: str | None = None
    known: bool = True
    # By class name, and what the score is made of: for candidates only.
    class_probabilities: Mapping[str, float] = NONE
    parts: ScoreParts | None = None


class ScoredItems(Sequence[ScoredItem]):
    """Make an object of an item only where one is asked for; equal to any sequence of the same items."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have none

    def at(self, place: int) -> ScoredItem:
        """Make the object of the item at a place, counted from 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> ScoredItem: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[ScoredItem]: ...

    def __getitem__(self, place: int | slice) -> ScoredItem | Sequence[ScoredItem]:
        """Return one item, or several."""
        places = range(len(self))[place]
        return self.at(places) if isinstance(places, int) else [self.at(each) for each in places]

    def __eq__(self, other: object) -> bool:
        """Compare items."""
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    def __repr__(self) -> str:
        """Show the items."""
        return repr(list(self))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Scores(ScoredItems):
    """Hold what is said of K candidates in columns."""

    item_ids: Sequence[str]
    known_K: NDArray[np.bool_]
    classes: Sequence[str]
    probabilities_KC: NDArray[np.float64]
    # By the fields of ScoreParts.
    parts_KP: NDArray[np.float64]

    @property
    def scores_K(self) -> NDArray[np.float64]:
        """Return the sums of the parts."""
        sums_K: NDArray[np.float64] = self.parts_KP[:, :-1].sum(1)
        return sums_K

    def __len__(self) -> int:
        """Count the candidates."""
        return len(self.item_ids)

    def at(self, place: int) -> ScoredItem:
        """Return one candidate."""
        return ScoredItem(
            self.item_ids[place],
            float(self.scores_K[place]),
            known=bool(self.known_K[place]),
            class_probabilities=dict(zip(self.classes, self.probabilities_KC[place].tolist(), strict=True)),
            parts=ScoreParts(*self.parts_KP[place].tolist()),
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """Items best first, or the Scores of candidates in the order asked; all computed from one `version`."""

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
