"""Items: what is computed of an item table once per version, most of it before the version is put in place.

Shapes as in recsys.network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.item_table import ItemTable
from recsys.scorer import lanes
from recsys.scorer.rough import Rough
from recsys.scorer.standing import COLUMNS, Changed, Standing
from recsys.weights.payload import NewItems, WeightPayload
from recsys.weights.replica import CLOCK


@dataclass(frozen=True, slots=True)
class Items:
    """Hold a version's items; `rough` are of vectors and of standings, None where they are not looked at roughly."""

    vectors_ID: Tensor
    standing_IS: Tensor
    # What is average is no reason for an item.
    mean_vector_D: Tensor
    mean_standing_S: Tensor
    rough: tuple[Rough, Rough] | None
    # Of all vectors, in double precision: kept up from version to version.
    sum_D: NDArray[np.float64]

    @classmethod
    def of(cls, table: ItemTable) -> Items:
        """Compute everything from a table."""
        vectors_ID = table.column("vector")
        if not looked_at_roughly(table.device):
            standing_IS = table.standing()
            means = vectors_ID[1:].mean(0), standing_IS[1:].mean(0)
            return cls(vectors_ID, standing_IS, *means, None, np.zeros(0))
        standing = Standing.of(_arrays(table), table.rows, table.clock)
        rough = Rough.of(vectors_ID.numpy(), centred=False, capacity=_with_room(table.rows))
        return _items(table, vectors_ID.sum(0, dtype=torch.float64).numpy(), standing, rough)


@dataclass(frozen=True, slots=True)
class Ahead:
    """Hold what the next version's items will be, but for the rows that its table does not have yet."""

    changed_R: NDArray[np.int64]
    sum_D: NDArray[np.float64]
    standing: Standing
    rough_standing: Rough
    vectors: Rough

    @classmethod
    def of(cls, items: Items, table: ItemTable, payload: WeightPayload) -> Ahead | None:
        """Compute it beside answers from the version before; None where all has to be computed when it is in place.

        The payload must fit the table.
        """
        if items.rough is None or payload.whole or payload.kept_rows:
            return None
        rows = max([table.rows, *(int(row) + 1 for row in NewItems.of(payload.new_items).rows[-1:])])
        changed_R = np.asarray(payload.rows, np.int64)
        # Copies: what may not be written to is of another kind to the compiler, which would begin anew.
        columns = {name: np.array(payload.columns[name]) for name in ("vector", *COLUMNS)}
        standing = Standing.of(
            _arrays(table), rows, int(payload.dense[CLOCK][0]), Changed(changed_R, columns), known=table.rows
        )
        before_ID = table.column("vector").numpy()
        known_R = changed_R[changed_R < table.rows]
        moved_D = columns["vector"].sum(0, dtype=np.float64) - before_ID[known_R].sum(0, dtype=np.float64)
        vectors = items.rough[0]
        if not vectors.fits(rows):
            vectors = Rough.of(before_ID, centred=False, capacity=_with_room(rows))
        rough_standing = Rough.of(standing.rows_IS, centred=True)
        return cls(changed_R, items.sum_D + moved_D, standing, rough_standing, vectors)

    def land(self, table: ItemTable) -> Items:
        """Return the items of the version, now that it is in place."""
        vectors_ID = table.column("vector")
        self.vectors.write(vectors_ID.numpy(), self.changed_R)
        return _items(table, self.sum_D, self.standing, self.vectors, self.rough_standing)


def looked_at_roughly(device: torch.device) -> bool:
    """Tell whether items on this device are looked at roughly first."""
    return device.type == "cpu" and lanes.available()


def _items(
    table: ItemTable, sum_D: NDArray[np.float64], standing: Standing, vectors: Rough, rough: Rough | None = None
) -> Items:
    return Items(
        table.column("vector"),
        torch.from_numpy(standing.rows_IS),
        torch.from_numpy((sum_D / max(1, table.rows - 1)).astype(np.float32)),
        torch.from_numpy(standing.mean_S),
        (vectors, rough or Rough.of(standing.rows_IS, centred=True)),
        sum_D,
    )


def _arrays(table: ItemTable) -> dict[str, NDArray[np.generic]]:
    return {name: column.numpy() for name, column in table.columns.items()}


def _with_room(rows: int) -> int:
    return rows + rows // 8
