"""Pairs: a sparse, growing matrix of weights between items that is added to all the time."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

# A row's entries of the same item are summed when it has this many times those it had when last summed, and these.
GROWTH = 2
LEAST_ENTRIES = 64

Floats = npt.NDArray[np.float64]


class Pairs:
    """Hold a weight for each ordered pair of items that was ever added, 12 bytes each.

    Adding appends, so a row may name an item twice; the entries are summed when there are twice as many as there were.
    """

    def __init__(self) -> None:
        self._items: list[array[int]] = []
        self._weights: list[array[float]] = []
        self._summed: list[int] = []

    def reserve(self, count: int) -> None:
        """Have rows for `count` items."""
        for _ in range(len(self._items), count):
            self._items.append(array("i"))
            self._weights.append(array("d"))
            self._summed.append(LEAST_ENTRIES)

    def add(self, rows: Iterable[int], items: Iterable[int], weights: Iterable[float]) -> None:
        """Add each weight to the entry of its row and item; the rows are reserved."""
        for row, item, weight in zip(rows, items, weights, strict=True):
            entries = self._items[row]
            entries.append(item)
            self._weights[row].append(weight)
            if len(entries) >= GROWTH * self._summed[row]:
                self._sum_up(row)

    def _sum_up(self, row: int) -> None:
        items, places = np.unique(np.frombuffer(self._items[row], np.int32), return_inverse=True)
        weights = np.bincount(places, np.frombuffer(self._weights[row]))
        self._items[row] = array("i", items.tobytes())
        self._weights[row] = array("d", weights.tobytes())
        self._summed[row] = max(LEAST_ENTRIES, len(items))

    def weighted(self, rows: npt.NDArray[np.int64], factors: Floats, size: int) -> Floats:
        """Return the sum of the rows, each times its factor, over the first `size` items: (size)."""
        # Only views of the rows: they must be gone when something is appended to those.
        parts = [np.frombuffer(self._items[row], np.int32) for row in rows.tolist()]
        if not sum(map(len, parts)):
            return np.zeros(size)
        weights = np.concatenate([np.frombuffer(self._weights[row]) for row in rows.tolist()])
        weights *= np.repeat(factors, [len(part) for part in parts])
        total = np.bincount(np.concatenate(parts), weights, size)
        return total.astype(np.float64, copy=False)
