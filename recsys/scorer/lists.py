"""Lists: the best items of a batch of users in columns.

Shapes: B users, M items of each, best first, T bytes of text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart
from recsys.item_rows import Index
from recsys.scorer.query import ScoredItem, ScoredItems
from recsys.scorer.shortlist import HIDDEN

Longs = NDArray[np.int64]


class Named(NamedTuple):
    """Hold rows (B, M) of an item table, 0 where there is none, and where each one's id begins in a text, how long.

    They stay what they are when other items get the rows.
    """

    rows_BM: Longs
    starts_BM: Longs
    lengths_BM: Longs


class Lists(NamedTuple):
    """Hold what a batch of users is recommended, `counts_B` items each; what is behind them says nothing."""

    # Each item's id, and that of the history item that it often follows, where that is why it is here.
    text_T: NDArray[np.uint8]
    items: Named
    because: Named
    scores_BM: NDArray[np.float32]
    # Values of recsys.v1.Source.
    sources_BM: Longs
    counts_B: Longs

    @classmethod
    def of(
        cls,
        index: Index,
        rows_BM: Longs,
        scores_BM: NDArray[np.float32],
        sources_BM: Longs,
        because_BM: Longs,
        wanted_B: Longs,
    ) -> Lists:
        """Name the items as the index does now; those that are hidden, the last of each user, are left out."""
        items, because = _named(index, rows_BM), _named(index, because_BM)
        return cls(index.text_T, items, because, scores_BM, sources_BM, _counts(scores_BM, wanted_B))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RankedItems(ScoredItems):
    """Show the items of one user in the lists of a batch."""

    lists: Lists
    user: int

    @property
    def rows(self) -> Longs:
        """Return their rows of the item table, best first."""
        rows_M: Longs = self.lists.items.rows_BM[self.user, : len(self)]
        return rows_M

    @property
    def sources(self) -> list[int]:
        """Return the recsys.v1.Source of each."""
        sources: list[int] = self.lists.sources_BM[self.user, : len(self)].tolist()
        return sources

    def __len__(self) -> int:
        """Count the items."""
        return int(self.lists.counts_B[self.user])

    def at(self, place: int) -> ScoredItem:
        """Return one item."""
        lists, at = self.lists, (self.user, place)
        item_id, because = (_id(lists.text_T, named, at) for named in (lists.items, lists.because))
        return ScoredItem(item_id, float(lists.scores_BM[at]), int(lists.sources_BM[at]), because or None)


def _id(text_T: NDArray[np.uint8], named: Named, at: tuple[int, int]) -> str:
    start = named.starts_BM[at]
    return text_T[start : start + named.lengths_BM[at]].tobytes().decode()


def _named(index: Index, rows_BM: Longs) -> Named:
    return Named(rows_BM, *_located(index.start_I, index.length_I, rows_BM))


@compiled_apart
def _located(start_I: Longs, length_I: NDArray[np.int32], rows_BM: Longs) -> tuple[Longs, Longs]:
    starts_BM, lengths_BM = np.zeros(rows_BM.shape, np.int64), np.zeros(rows_BM.shape, np.int64)
    for user in range(rows_BM.shape[0]):
        for place in range(rows_BM.shape[1]):
            row = rows_BM[user, place]
            if row:
                starts_BM[user, place], lengths_BM[user, place] = start_I[row], length_I[row]
    return starts_BM, lengths_BM


@compiled_apart
def _counts(scores_BM: NDArray[np.float32], wanted_B: Longs) -> Longs:
    counts_B = np.zeros(len(wanted_B), np.int64)
    for user in range(len(wanted_B)):
        most = min(wanted_B[user], scores_BM.shape[1])
        while counts_B[user] < most and scores_BM[user, counts_B[user]] > np.float32(HIDDEN / 2):
            counts_B[user] += 1
    return counts_B
