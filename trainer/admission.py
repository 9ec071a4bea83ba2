"""Admission: which items get a row of the item table, and which lose theirs; a function of the log and the table alone.

An item gets a row once there is enough feedback on it among what replay draws from, so that what is counted is bounded
and a restart finds it in the log.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from recsys.item_table import ItemTable
from recsys.settings import Settings

# To free rows costs a pass over the table and the replay window: one in so many at once makes that rare.
SHARE = 8


class Admission:
    """Count feedback on items as far back as the replay window reaches; `learned` is told of all that enters it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._counts: Counter[str] = Counter()
        self._items: deque[str] = deque()

    def admitted(self, item_ids: Sequence[str]) -> list[str]:
        """Return those items of new feedback, in its order, that have a row or are to get one."""
        here: Counter[str] = Counter()
        found = []
        for item_id in item_ids:
            here[item_id] += 1
            if here[item_id] + self._counts[item_id] >= self._settings.item_admission:
                found.append(item_id)
        return found

    def learned(self, item_ids: Iterable[str]) -> None:
        """Count feedback that was learned, oldest first, and no longer what left the window."""
        if self._settings.item_admission == 1:
            return
        for item_id in item_ids:
            self._items.append(item_id)
            self._counts[item_id] += 1
            if len(self._items) > self._settings.replay_capacity:
                oldest = self._items.popleft()
                self._counts[oldest] -= 1
                if not self._counts[oldest]:
                    del self._counts[oldest]

    def expired(self, table: ItemTable) -> NDArray[np.int64]:
        """Return the rows that are to be freed now, ascending; of items unused for equally long the lower ones."""
        settings, items = self._settings, len(table)
        excess = items - settings.max_items if settings.max_items else 0
        if excess <= 0 and not settings.item_expiry:
            return np.empty(0, np.int64)
        rows_U = table.used_rows(np.arange(1, items + 1))
        # Synchronises with the GPU: once a version, where rows are freed at all.
        touched_U = table.column("touched").cpu().numpy()[rows_U]
        gone_U = touched_U < table.clock - settings.item_expiry if settings.item_expiry else np.zeros(items, bool)
        if gone_U.sum() * SHARE < items:
            gone_U[:] = False
        if excess > 0:
            gone_U[np.argsort(touched_U, kind="stable")[: excess + settings.max_items // SHARE]] = True
        return rows_U[gone_U]
