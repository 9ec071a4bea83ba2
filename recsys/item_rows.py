"""ItemRows: which row of the item table is which item's; rows that items have left are given to the next new ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

PADDING_ROW = 0


class ItemRows:
    """Hold the item of each row, and find rows by item; row 0 is never an item's.

    `item_ids` are by row, "" where a row is free; `free_rows` are ascending; `revision` is another whenever an
    item gets or loses a row.
    """

    revision = 0

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all items and rows."""
        self.revision += 1
        self.item_ids: list[str] = [""]
        self.free_rows: NDArray[np.int64] = np.empty(0, np.int64)
        self._index = {}

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._index)

    @property
    def end(self) -> int:
        """Return the number of rows, padding and free ones included: row numbers lie below it."""
        return len(self.item_ids)

    def row(self, item_id: str) -> int:
        """Return the item's row, or 0 when it has none."""
        return self._index.get(item_id, PADDING_ROW)

    def look_up(self, item_ids: Iterable[str]) -> list[int]:
        """Return each item's row, 0 where it has none."""
        found = self._index.get
        return [found(item_id, PADDING_ROW) for item_id in item_ids]

    def used(self, number_N: NDArray[np.int64], without: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """Return the rows of the items with these numbers, counted from 1 in the order of rows.

        Items whose rows, ascending, are given in `without` are not counted.
        """
        skipped = self.free_rows
        if without is not None and len(without):
            # Both are sorted already: to join them costs the more the longer they are.
            skipped = np.union1d(skipped, without) if len(skipped) else without
        # Before the k-th row that is skipped stand as many items as its row less k.
        before = skipped - np.arange(len(skipped))
        return number_N + np.searchsorted(before, number_N, side="right")

    def allocate(self, item_ids: Iterable[str]) -> list[tuple[str, int]]:
        """Give a row to each item that has none, in the order given, free ones first; return those with their rows."""
        new = [item_id for item_id in dict.fromkeys(item_ids) if item_id not in self._index]
        self.revision += bool(new)
        reused, self.free_rows = self.free_rows[: len(new)], self.free_rows[len(new) :]
        rows = [*reused.tolist(), *range(self.end, self.end + len(new) - len(reused))]
        for item_id, row in zip(new, reused.tolist(), strict=False):
            self.item_ids[row] = item_id
        self.item_ids.extend(new[len(reused) :])
        found = list(zip(new, rows, strict=True))
        self._index.update(found)
        return found

    def extend(self, item_ids: Sequence[str]) -> None:
        """Give the next rows to these items, "" to leave one free.

        Raises:
            ValueError: when an item has a row already or is named twice; nothing is changed then.
        """
        new = dict(zip(item_ids, range(self.end, self.end + len(item_ids)), strict=True))
        free = item_ids.count("")
        new.pop("", None)
        if len(new) + free != len(item_ids) or not self._index.keys().isdisjoint(new):
            raise ValueError("a new item already has a row")
        self.revision += bool(item_ids)
        if free:
            behind = [self.end + place for place, item_id in enumerate(item_ids) if not item_id]
            self.free_rows = np.concatenate([self.free_rows, np.array(behind, np.int64)])
        if self._index:
            self._index.update(new)
        else:
            self._index = new
        self.item_ids.extend(item_ids)

    def assign(self, rows: Sequence[int] | NDArray[np.integer], item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Give rows, ascending, to items, whoever had them, "" to leave one free; return those that changed hands.

        Raises:
            ValueError: when new rows do not continue those there are, or an item has another row already or is named
                twice; nothing is changed then.
        """
        # Arrays: as Python's numbers the rows of a whole table take more than the ids.
        row_R = np.asarray(rows, np.int64)
        inside = int(np.searchsorted(row_R, self.end))
        if not np.array_equal(row_R[inside:], np.arange(self.end, self.end + len(row_R) - inside)):
            raise ValueError(f"new rows {row_R[inside:][:3].tolist()}... do not continue {self.end} rows")
        held = row_R[:inside].tolist()
        changed = [place for place, row in enumerate(held) if self.item_ids[row] != item_ids[place]]
        if changed:
            self._pass_on([held[place] for place in changed], [item_ids[place] for place in changed], item_ids[inside:])
        self.extend(item_ids[inside:])
        return np.concatenate([row_R[changed], row_R[inside:]])

    def _pass_on(self, rows: Sequence[int], item_ids: Sequence[str], others: Sequence[str]) -> None:
        """Give rows to other items than theirs; `others` are new too, and get rows next."""
        leaving = {self.item_ids[row] for row in rows}
        arriving = [item_id for item_id in (*item_ids, *others) if item_id]
        if len(set(arriving)) < len(arriving) or any(each in self._index and each not in leaving for each in arriving):
            raise ValueError("a new item already has a row")
        self.revision += 1
        for row in rows:
            self._index.pop(self.item_ids[row], None)
        for row, item_id in zip(rows, item_ids, strict=True):
            self.item_ids[row] = item_id
            if item_id:
                self._index[item_id] = row
        taken = [row for row, item_id in zip(rows, item_ids, strict=True) if item_id]
        freed = [row for row, item_id in zip(rows, item_ids, strict=True) if not item_id]
        self.free_rows = np.union1d(np.setdiff1d(self.free_rows, taken), freed).astype(np.int64)

    def remove(self, rows_R: NDArray[np.int64]) -> None:
        """Take rows, ascending, from their items."""
        self.revision += 1
        for row in rows_R.tolist():
            del self._index[self.item_ids[row]]
            self.item_ids[row] = ""
        self.free_rows = np.union1d(self.free_rows, rows_R)

    def truncate(self, rows: int) -> None:
        """Forget the rows from `rows` on, and their items."""
        self.revision += 1
        for item_id in filter(None, self.item_ids[rows:]):
            del self._index[item_id]
        del self.item_ids[rows:]
        self.free_rows = self.free_rows[self.free_rows < rows]
