"""Arrivals: number a file's items ahead of the learner, and give them rows as learning comes to them.

So a whole file can be read at once, and still no item has a row, is drawn as a negative or ranked before its time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from recsys.item_rows import ItemRows
from recsys.item_table import ItemTable
from trainer.examples import Examples
from trainer.learner import Learner


class Arrivals:
    """Number items in the order in which they are named; a learner, if any, gives them those rows when reached.

    While some items are not reached, nothing else may give the learner's items rows or take them.
    """

    def __init__(self, learner: Learner | None = None) -> None:
        self._learner = learner
        self._rows = ItemRows()
        if learner is not None:
            self._rows.extend(learner.table.item_ids[1:])
        # Items in the order of their arrival; by row, how many had arrived with it, 0 where the learner had it before.
        self._arrived: list[str] = []
        self._number_I = np.zeros(max(1024, self._rows.end), np.int64)
        self._reached = 0

    def row(self, item_id: str) -> int:
        """Return the item's row, a new one if it has none."""
        row = self._rows.row(item_id)
        if not row:
            ((_, row),) = self._rows.allocate([item_id])
            if row >= len(self._number_I):
                self._number_I = np.concatenate([self._number_I, np.zeros_like(self._number_I)])
            self._arrived.append(item_id)
            self._number_I[row] = len(self._arrived)
        return row

    def reach(self, examples: Examples) -> None:
        """Give rows to the items of these examples and of their histories, and to all that arrived before those."""
        number = int(max(self._number_I[rows].max(initial=0) for rows in (examples.rows_BL, examples.item_B)))
        if self._learner is not None and number > self._reached:
            self._learner.allocate(self._arrived[self._reached : number])
            self._reached = number


def held(
    examples: Examples, seen: Sequence[NDArray[np.int64]], table: ItemTable
) -> tuple[Examples, list[NDArray[np.int64]]]:
    """Leave items out that have no row in the table yet, of histories and of what users have too."""
    gone_BL, gone_B = (_missing(rows, table) for rows in (examples.rows_BL, examples.item_B))
    if gone_BL.any() or gone_B.any():
        examples = examples.without(gone_BL, gone_B)
    return examples, [rows[~_missing(rows, table)] for rows in seen]


def _missing(rows: NDArray[np.integer], table: ItemTable) -> NDArray[np.bool_]:
    missing = rows >= table.rows
    return missing | np.isin(rows, table.free_rows) if len(table.free_rows) else missing
