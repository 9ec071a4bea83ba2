"""Contents: what the catalogue says of items, and where an item begins on which there is no feedback yet.

Such an item is cold. Its vector is made of those of items that people chose and that share its categories: the mean
over its categories of the mean of each. It stays so, and is nobody's negative, until the first feedback on the item;
from then on it learns like any other. What is known stands in columns of the item table that servers never see.

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
        # Synchronises with the GPU: which rows are cold decides what the host draws.
        self.cold_rows: NDArray[np.int64] = self._table.column(COLD).nonzero()[:, 0].cpu().numpy()

    def write(self, rows: NDArray[np.int64], categories: Iterable[Sequence[str]], new: NDArray[np.int64]) -> None:
        """Set the categories of rows; those that are `new` are cold."""
        digests = np.zeros((len(rows), CATEGORIES_KEPT), np.int64)
        for place, each in enumerate(categories):
            kept = list(dict.fromkeys(each))[:CATEGORIES_KEPT]
            digests[place, : len(kept)] = [_digest(category) for category in kept]
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
        known_C = torch.unique(categories_RK)
        known_C = known_C[known_C != 0]
        if not len(known_C):
            return
        mean_CD, count_C = self._means(known_C)
        place_RK, has_RK = _find(categories_RK, known_C)
        has_RK &= count_C[place_RK] > 0
        size_R = has_RK.sum(1)
        mean_RD = (mean_CD[place_RK] * has_RK[:, :, None]).sum(1) / size_R.clamp_min(1)[:, None]
        told_R = size_R > 0
        table.columns["vector"][rows_R[told_R]] = mean_RD[told_R]

    def _means(self, known_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean vector of the items of each category that people chose, and how many they are."""
        table = self._table
        sum_CD = torch.zeros(len(known_C), table.columns["vector"].shape[1], device=table.device)
        count_C = torch.zeros(len(known_C), device=table.device)
        for first in range(0, table.rows, STRETCH):
            here = slice(first, min(first + STRETCH, table.rows))
            place_IK, has_IK = _find(table.columns[CATEGORIES][here], known_C)
            has_IK &= (table.columns["total"][here] > 0)[:, None]
            item_P, kept_P = has_IK.nonzero(as_tuple=True)
            place_P = place_IK[item_P, kept_P]
            sum_CD.index_add_(0, place_P, table.columns["vector"][here][item_P])
            count_C.index_add_(0, place_P, torch.ones(len(place_P), device=table.device))
        return sum_CD / count_C.clamp_min(1)[:, None], count_C

    def _set_cold(self, rows_R: NDArray[np.int64], cold: int) -> None:
        self._table.columns[COLD][to_tensor(rows_R, self._table.device)] = cold
        self.look_again()


def _digest(category: str) -> int:
    """Give what stands for a category: with 64 bits, two of a million share one once in 37 million catalogues."""
    return int.from_bytes(blake2b(category.encode(), digest_size=8).digest(), "little", signed=True)


def _find(categories_XK: Tensor, known_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of categories among those known, ascending, and whether they are there at all."""
    place_XK = torch.searchsorted(known_C, categories_XK).clamp_max(len(known_C) - 1)
    return place_XK, known_C[place_XK] == categories_XK
