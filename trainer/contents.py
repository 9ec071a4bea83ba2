"""Contents: what the catalogue says of items, and where an item begins on which there is no feedback yet.

Such an item is cold. Its vector is made of those of items that people chose and that share its categories: the mean
over its categories of the mean of each. It stays so, and is nobody's negative, until the first feedback on the item;
from then on it learns like any other. What is known stands in columns of the item table that servers never see.

Which items share a category is told by an index, so that to make a vector costs what its categories hold. Means are
taken anew, in the order of rows: a sum kept up would depend on how it came about, and differ after a restart.

Shapes: R rows given, K categories kept of an item, C distinct categories, D dimension, P pairs of item and category.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.encoding import to_tensor
from recsys.item_table import STRETCH, ItemTable

# Of an item's categories so many, the first ones, take part in learning.
CATEGORIES_KEPT = 8
CATEGORIES, COLD = "categories", "cold"
# What the trainer's payload holds of an item beside its row, by column.
CONTENT_COLUMNS = (CATEGORIES, COLD)
# A pair of item and category is one number, the row in its lower half and in the upper one the digest's.
UPPER, LOWER = -1 << 32, (1 << 32) - 1
# Cold items follow what their categories have learned each time that the feedback has grown by this.
FOLLOWING_GROWTH = 1.5


class Contents:
    """Keep the columns `categories` (int64 (K), digests, 0 where there is none) and `cold` (int32, 0 or 1) of a table.

    Rows that are given must have an item. `followed` is the clock at which cold items last followed.
    """

    def __init__(self, table: ItemTable) -> None:
        self._table = table
        capacity = len(table.columns["total"])
        table.columns[CATEGORIES] = torch.zeros((capacity, CATEGORIES_KEPT), dtype=torch.int64, device=table.device)
        table.columns[COLD] = torch.zeros(capacity, dtype=torch.int32, device=table.device)
        self.followed = 0
        self.look_again()

    def look_again(self) -> None:
        """Take note that the columns were changed from outside."""
        self._look_for_cold()
        # Made when it is asked for.
        self._pair_P: NDArray[np.int64] | None = None

    def _look_for_cold(self) -> None:
        # Synchronises with the GPU: which rows are cold decides what the host draws.
        self.cold_rows: NDArray[np.int64] = self._table.column(COLD).nonzero()[:, 0].cpu().numpy()

    def write(self, rows: NDArray[np.int64], categories: Iterable[Sequence[str]], new: NDArray[np.int64]) -> None:
        """Set the categories of rows; those that are `new` are cold."""
        digests = np.zeros((len(rows), CATEGORIES_KEPT), np.int64)
        for place, each in enumerate(categories):
            kept = list(dict.fromkeys(each))[:CATEGORIES_KEPT]
            digests[place, : len(kept)] = [_digest(category) for category in kept]
        pair_P = np.delete(self._pairs(), np.searchsorted(self._pairs(), _paired(rows, self.digests(rows))))
        new_P = _paired(rows, digests)
        self._pair_P = np.insert(pair_P, np.searchsorted(pair_P, new_P), new_P)
        device = self._table.device
        self._table.columns[CATEGORIES][to_tensor(rows, device)] = to_tensor(digests, device)
        self._set_cold(new, 1)

    def digests(self, rows_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the digests of the categories of each of these rows, 0 where there is none; (B, K)."""
        found_BK: NDArray[np.int64] = (
            # Synchronises with the GPU: what is watched is the host's.
            self._table.columns[CATEGORIES][to_tensor(rows_B, self._table.device)].cpu().numpy()
        )
        return found_BK

    def cold_among(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of these rows that are cold, ascending."""
        if not len(self.cold_rows):
            return self.cold_rows
        cold_R = self._table.columns[COLD][to_tensor(rows, self._table.device)]
        # Synchronises with the GPU: where there are cold items, whether these are among them decides what follows.
        return np.unique(rows[cold_R.cpu().numpy() != 0])

    def end(self, rows_R: NDArray[np.int64]) -> None:
        """Have rows be cold no longer."""
        if len(rows_R):
            self._set_cold(rows_R, 0)

    def due(self) -> bool:
        """Tell whether so much was learned since they last did that cold items are to follow their categories."""
        clock, followed = self._table.clock, self.followed
        return len(self.cold_rows) > 0 and clock > followed and clock >= FOLLOWING_GROWTH * followed

    def follow(self, rows: NDArray[np.int64]) -> None:
        """Make the vectors of rows of what their categories' items have learned; others stay as they are."""
        table = self._table
        rows_R = to_tensor(rows, table.device)
        categories_RK = table.columns[CATEGORIES][rows_R]
        item_P, kept_P = categories_RK.nonzero(as_tuple=True)
        known_C, place_P = torch.unique(categories_RK[item_P, kept_P], return_inverse=True)
        mean_CD, count_C = self._means(known_C)
        told_P = count_C[place_P] > 0
        mean_RD, count_R = _mean(mean_CD, item_P[told_P], place_P[told_P], len(rows))
        told_R = count_R > 0
        table.columns["vector"][rows_R[told_R]] = mean_RD[told_R]

    def _means(self, known_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean vector of the items of each category that people chose, and how many they are."""
        table, pair_P = self._table, self._pairs()
        # Synchronises with the GPU: the index is the host's.
        digest_C = known_C.cpu().numpy()
        first_C = np.searchsorted(pair_P, digest_C & UPPER)
        end_C = np.searchsorted(pair_P, digest_C | LOWER, side="right")
        found = [pair_P[first:end] for first, end in zip(first_C.tolist(), end_C.tolist(), strict=True)]
        row_P = to_tensor(np.concatenate([pair_P[:0], *found]) & LOWER, table.device)
        place_P = to_tensor(np.repeat(np.arange(len(digest_C)), end_C - first_C), table.device)
        chosen_P = table.columns["total"][row_P] > 0
        row_P, place_P = row_P[chosen_P], place_P[chosen_P]
        # Two digests may share their upper half.
        has_P = (table.columns[CATEGORIES][row_P] == known_C[place_P][:, None]).any(1)
        return _mean(table.columns["vector"], place_P[has_P], row_P[has_P], len(known_C))

    def _pairs(self) -> NDArray[np.int64]:
        """Return the pairs of all items and their categories, ascending."""
        if self._pair_P is None:
            rows = np.arange(self._table.rows)
            self._pair_P = _paired(rows, self.digests(rows))
        return self._pair_P

    def _set_cold(self, rows_R: NDArray[np.int64], cold: int) -> None:
        self._table.columns[COLD][to_tensor(rows_R, self._table.device)] = cold
        self._look_for_cold()


def _digest(category: str) -> int:
    """Give what stands for a category: with 64 bits, two of a million share one once in 37 million catalogues."""
    return int.from_bytes(blake2b(category.encode(), digest_size=8).digest(), "little", signed=True)


def _paired(rows_R: NDArray[np.int64], digests_RK: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pairs of rows and their categories, ascending, each once."""
    place_P, kept_P = digests_RK.nonzero()
    pair_P = np.sort(digests_RK[place_P, kept_P] & UPPER | rows_R[place_P])
    once_P: NDArray[np.int64] = pair_P[np.diff(pair_P, prepend=~pair_P[:1]) != 0]
    return once_P


def _mean(vectors_XD: Tensor, group_P: Tensor, place_P: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean of vectors by group, summed up in the order given, and how many they are."""
    sum_GD = torch.zeros(groups, vectors_XD.shape[1], device=vectors_XD.device)
    for first in range(0, len(group_P), STRETCH):
        here = slice(first, first + STRETCH)
        sum_GD.index_add_(0, group_P[here], vectors_XD[place_P[here]])
    count_G = torch.bincount(group_P, minlength=groups)
    return sum_GD.div_(count_G.clamp_min(1)[:, None]), count_G
