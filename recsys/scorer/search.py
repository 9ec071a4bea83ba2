"""Search: Retrieval where the processor lets rows be looked at roughly first; the same answers, several times sooner.

Where the items have partitions a few of the best may be missed; what is found has its own score and the same order.
Shapes as in recsys.network; K rows found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.item_table import ItemTable
from recsys.network import LIFTS
from recsys.scorer import probe, rough, scan
from recsys.scorer.items import Items
from recsys.scorer.lanes import USERS
from recsys.scorer.marks import Marks
from recsys.scorer.retrieval import Found, Hidden, Own

# A partition is looked at where its mean and so many spreads above it reach what is among the best so far.
SPREADS = 5.0
# Rows looked at before that, for each that is kept.
FIRST_ROWS = 16

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Longs = NDArray[np.int64]


class Search:
    """Find the best rows of a version's items for a batch of users."""

    def install(self, items: Items, table: ItemTable) -> None:
        """Take the items of a version; they are looked at where they are, not copied."""
        assert items.rough is not None
        self._partitions = items.partitions
        vectors, standing = items.rough
        self._rows = items.vectors_ID.numpy(), items.standing_IS.numpy(), vectors.blocks_GP, standing.blocks_GP
        self._scales = (
            np.concatenate([vectors.centre_D, standing.centre_D]),
            np.concatenate([vectors.scale_D, standing.scale_D]),
            items.vectors_ID.shape[1],
            *(tuple(getattr(each, name) for each in items.rough) for name in ("lost", "longest", "widest")),
        )
        successor, weight, total = (table.column(name).numpy() for name in ("successor", "successor_weight", "total"))
        self._successors = successor, weight, total

    def look_up(self, history_BK: Tensor) -> Marks:
        """Sum what the transition memory says of histories, latest first."""
        return Marks.of(self._successors, history_BK.numpy())

    def find(
        self,
        weights_BP: Tensor,
        states_BD: Tensor,
        history_BK: Tensor,
        hidden: Sequence[Hidden],
        own: Own,
        keep: int,
    ) -> Found:
        """Return what Retrieval.find does."""
        users_BV = torch.cat([weights_BP[:, :1] * states_BD, weights_BP[:, 1:-LIFTS]], 1).numpy()
        marks = Marks.of(self._successors, history_BK.numpy(), own)
        lifts_BN = marks.weighted(weights_BP[:, -LIFTS:].numpy())
        keep = min(keep, len(self._rows[0]))
        alike = list({id(each): each for each in hidden}.values())
        if len(alike) == 1:
            scores_BK, rows_BK = self._best(users_BV, marks.rows_BN, lifts_BN, alike[0], keep)
        else:
            scores_BK, rows_BK = np.empty((len(own), keep), np.float32), np.empty((len(own), keep), np.int64)
            for each in alike:
                users = np.array([place for place, other in enumerate(hidden) if other is each])
                of_users = users_BV[users], marks.rows_BN[users], lifts_BN[users]
                scores_BK[users], rows_BK[users] = self._best(*of_users, each, keep)
        return Found(torch.from_numpy(scores_BK), torch.from_numpy(rows_BK), marks)

    def _best(
        self, users_BV: Floats, marks_BN: Integers, lifts_BN: Floats, hidden: Hidden, keep: int
    ) -> tuple[Floats, Longs]:
        """Find the best rows of users from whom the same rows are hidden."""
        partitions = self._partitions
        together = 1 if partitions or len(users_BV) == 1 else USERS
        whole = rough.whole_weights(users_BV, *self._scales, together)
        looked_at = *self._rows, users_BV, *whole, marks_BN, lifts_BN, hidden.mask_I.numpy(), keep
        found: tuple[Floats, Longs]
        if partitions is None:
            found = scan.best(*looked_at)
            return found
        hopes_BL = partitions.hopes(users_BV, SPREADS)
        first_B = partitions.first(hopes_BL, FIRST_ROWS * keep)
        places = partitions.places
        where = places.partition_I, places.row_P, places.next_G, places.first_L
        found = probe.best(*looked_at, hopes_BL, first_B, *where)
        return found
