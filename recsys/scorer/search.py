"""Search: Retrieval where the processor lets rows be looked at roughly first; the same answers, several times sooner.

Where the items have partitions a few of the best may be missed; what is found has its own score and the same order.
Shapes as in recsys.network; K rows found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recsys.item_table import ItemTable
from recsys.network import LIFTS
from recsys.scorer import probe, rough, scan, shortlist
from recsys.scorer.items import Items
from recsys.scorer.lanes import USERS
from recsys.scorer.marks import Marks
from recsys.scorer.retrieval import Found, Hidden, Own

# A partition is looked at where its mean and so many spreads above it reach what is among the best so far.
SPREADS = 5.0
# Rows looked at before that, for each that is kept.
FIRST_ROWS = 16


class Search:
    """Find the best rows of a version's items for a batch of users."""

    def __init__(self) -> None:
        self._items: Items | None = None

    def install(self, items: Items, table: ItemTable) -> None:
        """Take the items of a version; they are looked at where they are, not copied."""
        self._items, self._table = items, table

    def look_up(self, history_BK: Tensor) -> Marks:
        """Sum what the transition memory says of histories, latest first."""
        return Marks.of(self._table, history_BK.numpy())

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
        items = self._items
        assert items is not None
        assert items.rough is not None
        vectors, standing = items.rough
        users_BV = torch.cat([weights_BP[:, :1] * states_BD, weights_BP[:, 1:-LIFTS]], 1).numpy()
        marks = Marks.of(self._table, history_BK.numpy(), own)
        lifts_BN = marks.weighted(weights_BP[:, -LIFTS:].numpy())
        keep = min(keep, len(items.vectors_ID))
        scores_BK = np.empty((len(own), keep), np.float32)
        rows_BK = np.empty((len(own), keep), np.int64)
        for each in {id(each): each for each in hidden}.values():
            users = np.array([place for place, other in enumerate(hidden) if other is each])
            alike_BV = users_BV[users]
            whole = rough.whole_weights(
                alike_BV,
                np.concatenate([vectors.centre_D, standing.centre_D]),
                np.concatenate([vectors.scale_D, standing.scale_D]),
                states_BD.shape[1],
                (vectors.lost, standing.lost),
                (vectors.longest, standing.longest),
                (vectors.widest, standing.widest),
                1 if items.partitions or len(users) == 1 else USERS,
            )
            looked_at = (
                items.vectors_ID.numpy(),
                items.standing_IS.numpy(),
                vectors.blocks_GP,
                standing.blocks_GP,
                alike_BV,
                *whole,
                marks.rows_BN[users],
                lifts_BN[users],
                each.mask_I.numpy(),
                keep,
            )
            if items.partitions is None:
                keys_BC = scan.best(*looked_at)
            else:
                hopes_BL = items.partitions.hopes(alike_BV, SPREADS)
                first_B = items.partitions.first(hopes_BL, FIRST_ROWS * keep)
                places = items.partitions.places
                where = places.partition_I, places.row_P, places.next_G, places.first_L
                keys_BC = probe.best(*looked_at, hopes_BL, first_B, *where)
            scores_BK[users], rows_BK[users] = shortlist.in_order(keys_BC, keep)
        return Found(torch.from_numpy(scores_BK), torch.from_numpy(rows_BK), marks)
