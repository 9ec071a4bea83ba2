"""Items: what is computed of an item table once per version, most of it before the version is put in place.

Shapes as in recsys.network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.item_table import ItemTable
from recsys.scorer import lanes
from recsys.scorer.partitions import Partitions
from recsys.scorer.rough import Rough
from recsys.standing import COLUMNS, Changed, Standing
from recsys.weights.payload import NewItems, WeightPayload
from recsys.weights.replica import CLOCK

# Rows from which on not all are looked at, unless the settings say otherwise.
PARTITIONED_FROM = 300_000


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
    # Where rows lie in `rough`; None where they lie in their order.
    partitions: Partitions | None

    @classmethod
    def of(cls, table: ItemTable, *, parted: bool = False) -> Items:
        """Compute everything from a table, and partitions, which takes seconds, where it is to be `parted`.

        Rows may be changed meanwhile and new ones given, if all of them are told to `moved` then.
        """
        rows = table.rows
        vectors_ID = table.columns["vector"][:rows]
        if not looked_at_roughly(table.device):
            standing_IS = table.standing()
            means = vectors_ID[1:].mean(0), standing_IS[1:].mean(0)
            return cls(vectors_ID, standing_IS, *means, None, np.zeros(0), None)
        standing = Standing.of(_arrays(table), rows, table.clock)
        capacity = _capacity(rows)
        partitions = Partitions.of(vectors_ID.numpy(), standing.rows_IS, capacity) if parted else None
        places = partitions.places if partitions else None
        vectors = Rough.of(vectors_ID.numpy(), centred=False, capacity=capacity, places=places)
        sum_D = vectors_ID.sum(0).double().numpy()
        rough_standing = Rough.of(standing.rows_IS, centred=True, places=places)
        return _items(vectors_ID, sum_D, standing, vectors, rough_standing, partitions)

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.standing_IS)

    def lack_partitions(self, partitioned_from: float) -> bool:
        """Tell whether there are so many rows, and they lie in their order or in partitions that are worn."""
        if self.rough is None or self.rows < partitioned_from:
            return False
        return self.partitions is None or self.partitions.worn(self.rows)

    def moved(self, table: ItemTable, changed_R: NDArray[np.int64]) -> Items:
        """Return the items of a table in which these rows, ascending, have changed since, or are new.

        What was held is good for no more.
        """
        rows, partitions = table.rows, self.partitions
        fit = self.rough is not None and self.rough[0].fits(rows)
        if not fit or (partitions and not partitions.fit(rows, len(changed_R))):
            return Items.of(table)
        assert self.rough is not None
        vectors_ID, vectors = table.column("vector"), self.rough[0]
        standing, to_R = Standing.of(_arrays(table), rows, table.clock), np.empty(0, np.int32)
        if partitions:
            # The numbers that the rows had are gone; what is known of them roughly is near enough for means.
            before_KD = vectors.read(changed_R[changed_R < self.rows], partitions.places)
            partitions, to_R = partitions.after(before_KD, changed_R, vectors_ID.numpy()[changed_R], standing.rows_IS)
        rough_standing = Rough.of(standing.rows_IS, centred=True, places=partitions.places if partitions else None)
        sum_D = vectors_ID.sum(0).double().numpy()
        return Ahead(changed_R, sum_D, standing, rough_standing, vectors, partitions, to_R).land(table)


@dataclass(frozen=True, slots=True)
class Ahead:
    """Hold what the next version's items will be, but for the rows that its table does not have yet."""

    changed_R: NDArray[np.int64]
    sum_D: NDArray[np.float64]
    standing: Standing
    rough_standing: Rough
    vectors: Rough
    # With them, the partition that each changed row moves to.
    partitions: Partitions | None
    to_R: NDArray[np.int32]

    @classmethod
    def of(cls, items: Items, table: ItemTable, payload: WeightPayload) -> Ahead | None:
        """Compute it beside answers from the version before; None where all has to be computed when it is in place.

        The payload must fit the table.
        """
        if items.rough is None or payload.whole or payload.kept_rows:
            return None
        known = table.rows
        rows = max([known, *(int(row) + 1 for row in NewItems.of(payload.new_items).rows[-1:])])
        changed_R = np.asarray(payload.rows, np.int64)
        # Copies: what may not be written to is of another kind to the compiler, which would begin anew.
        columns = {name: np.array(payload.columns[name]) for name in ("vector", *COLUMNS)}
        standing = Standing.of(
            _arrays(table), rows, int(payload.dense[CLOCK][0]), Changed(changed_R, columns), known=known
        )
        before_ID = table.columns["vector"][:known].numpy()
        before_KD = before_ID[changed_R[changed_R < known]]
        moved_D = columns["vector"].sum(0, dtype=np.float64) - before_KD.sum(0, dtype=np.float64)
        vectors, partitions, to_R = items.rough[0], items.partitions, np.empty(0, np.int32)
        if not vectors.fits(rows) or (partitions and not partitions.fit(rows, len(changed_R))):
            # Partitions are for another to find again, beside.
            partitions, vectors = None, Rough.of(before_ID, centred=False, capacity=_capacity(rows))
        if partitions:
            partitions, to_R = partitions.after(before_KD, changed_R, columns["vector"], standing.rows_IS)
        rough_standing = Rough.of(standing.rows_IS, centred=True, places=partitions.places if partitions else None)
        sum_D = items.sum_D + moved_D
        return cls(changed_R, sum_D, standing, rough_standing, vectors, partitions, to_R)

    def land(self, table: ItemTable) -> Items:
        """Return the items of the version, now that it is in place."""
        places = None
        if self.partitions:
            places = self.partitions.places
            places.move(self.changed_R, self.to_R, self.vectors.blocks_GP, self.rough_standing.blocks_GP)
            self.rough_standing.write(self.standing.rows_IS, self.changed_R, places)
        self.vectors.write(table.column("vector").numpy(), self.changed_R, places)
        vectors_ID = table.column("vector")
        return _items(vectors_ID, self.sum_D, self.standing, self.vectors, self.rough_standing, self.partitions)


def looked_at_roughly(device: torch.device) -> bool:
    """Tell whether items on this device are looked at roughly first."""
    return device.type == "cpu" and lanes.available()


def partitioned_from(retrieval: str) -> float:
    """Return from how many rows on a setting has them looked at in partitions."""
    return {"auto": PARTITIONED_FROM, "exact": math.inf, "partitioned": 1}[retrieval]


def _capacity(rows: int) -> int:
    """Return for how many rows there should be room where there are so many."""
    return rows + rows // 8


def _items(
    vectors_ID: Tensor,
    sum_D: NDArray[np.float64],
    standing: Standing,
    vectors: Rough,
    rough_standing: Rough,
    partitions: Partitions | None,
) -> Items:
    return Items(
        vectors_ID,
        torch.from_numpy(standing.rows_IS),
        torch.from_numpy((sum_D / max(1, len(vectors_ID) - 1)).astype(np.float32)),
        torch.from_numpy(standing.mean_S),
        (vectors, rough_standing),
        sum_D,
        partitions,
    )


def _arrays(table: ItemTable) -> dict[str, NDArray[np.generic]]:
    return {name: column.numpy() for name, column in table.columns.items()}
