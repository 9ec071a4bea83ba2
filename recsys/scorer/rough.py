"""Rough: rows as whole numbers of eight bits, a quarter of the memory, and how far from the truth that may be.

A number x of column k is stood for by centre_k + scale_k q, |q| <= LARGEST. What is lost of a row is a vector whose
length is at most `lost`; by Cauchy and Schwarz its product with a user's weights is at most their length times that.
Shapes as in recsys.network; blocks of ROWS rows as recsys.scorer.lanes wants them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled
from recsys.scorer.lanes import PAIR_BYTES, ROWS
from recsys.scorer.places import Places

LARGEST = 127
# Room for numbers to grow before all rows have to be written anew.
HEADROOM = 1.05
# Rows written singly may lose so many times what rows lost when all were written.
WORSE = 1.5
# Of a column whose numbers are all alike.
LEAST_RANGE = np.float32(1e-30)

Floats = NDArray[np.float32]


@dataclass(slots=True)
class Rough:
    """Hold columns of all rows; `blocks_GP` is G blocks of pairs of columns, an odd last column beside nothing."""

    blocks_GP: NDArray[np.int8]
    centre_D: Floats
    scale_D: Floats
    # The largest length of what is lost of a row, and of a row.
    lost: float
    longest: float
    allowed: float

    @classmethod
    def of(cls, rows_ID: Floats, *, centred: bool, capacity: int = 0, places: Places | None = None) -> Rough:
        """Write all rows; `centred` where their numbers do not lie around zero.

        Without `places` rows lie in their order.
        """
        low_D, high_D = _ranges(rows_ID)
        if not centred:
            high_D = np.maximum(-low_D, high_D)
            low_D = -high_D
        centre_D = (low_D + high_D) / 2
        scale_D: Floats = np.maximum((high_D - low_D) / 2, LEAST_RANGE) * np.float32(HEADROOM / LARGEST)
        count, width = rows_ID.shape
        blocks = places.blocks if places else -(-max(count, capacity) // ROWS)
        blocks_GP = np.zeros((blocks, -(-width // 2) * PAIR_BYTES), np.int8)
        found = cls(blocks_GP, centre_D, scale_D, 0.0, 0.0, np.inf)
        found.write(rows_ID, np.arange(count), places)
        found.allowed = WORSE * found.lost
        return found

    def write(self, rows_ID: Floats, which_R: NDArray[np.int64], places: Places | None = None) -> None:
        """Write some rows, but those that have no place yet."""
        at_R = places.place_I[which_R].astype(np.int64) if places else which_R
        lost, longest = _write(rows_ID, which_R, at_R, self.centre_D, self.scale_D, self.blocks_GP)
        self.lost, self.longest = max(self.lost, lost), max(self.longest, longest)

    def fits(self, rows: int) -> bool:
        """Tell whether so many rows have room, and those written singly have not made it much worse."""
        return rows <= len(self.blocks_GP) * ROWS and self.lost <= self.allowed


@compiled
def _ranges(rows_ID: Floats) -> tuple[Floats, Floats]:
    """Return the smallest and the largest number of each column."""
    low_D, high_D = rows_ID[0].copy(), rows_ID[0].copy()
    for row in range(1, rows_ID.shape[0]):
        for column in range(rows_ID.shape[1]):
            value = rows_ID[row, column]
            low_D[column] = min(low_D[column], value)
            high_D[column] = max(high_D[column], value)
    return low_D, high_D


@compiled
def _write(
    rows_ID: Floats,
    which_R: NDArray[np.int64],
    at_R: NDArray[np.int64],
    centre_D: Floats,
    scale_D: Floats,
    blocks_GP: NDArray[np.int8],
) -> tuple[float, float]:
    """Write rows to their places in the blocks; return the largest lengths of what is lost and of a row."""
    most_lost = most = np.float32(0.0)
    inverse_D = np.float32(1.0) / scale_D
    for place in range(which_R.shape[0]):
        row = which_R[place]
        if at_R[place] < 0:
            continue
        block, lane = at_R[place] // ROWS, at_R[place] % ROWS
        lost = length = np.float32(0.0)
        for column in range(rows_ID.shape[1]):
            value = rows_ID[row, column]
            nearest = np.rint((value - centre_D[column]) * inverse_D[column])
            nearest = min(max(nearest, np.float32(-LARGEST)), np.float32(LARGEST))
            blocks_GP[block, (column >> 1) * PAIR_BYTES + 2 * lane + (column & 1)] = np.int8(nearest)
            difference = value - centre_D[column] - nearest * scale_D[column]
            lost += difference * difference
            length += value * value
        most_lost, most = max(most_lost, lost), max(most, length)
    return np.sqrt(most_lost), np.sqrt(most)
