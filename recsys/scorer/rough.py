"""Rough: rows as whole numbers of eight bits, a quarter of the memory, and how far from the truth that may be.

A number x of column k is stood for by centre_k + scale_k q, |q| <= LARGEST. What is lost of a row is a vector whose
length is at most `lost`; by Cauchy and Schwarz its product with a user's weights is at most their length times that.
Shapes as in recsys.network; blocks of ROWS rows as recsys.scorer.lanes wants them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recsys.compiled import compiled_apart
from recsys.scorer.lanes import (
    HEAD,
    LARGEST_FACTOR,
    LARGEST_SUM,
    LARGEST_WEIGHT,
    QUAD,
    QUAD_BYTES,
    ROWS,
    SECOND,
    WIDE,
    ZERO,
)
from recsys.scorer.places import Places

LARGEST = 127
# Room for numbers to grow before all rows have to be written anew.
HEADROOM = 1.05
# Rows written singly may lose so many times what rows lost when all were written.
WORSE = 1.5
# Of a column whose numbers are all alike.
LEAST_RANGE = np.float32(1e-30)
# What rounding may do to a score, of the product of the lengths of row and weights.
ROUNDING = 2e-5

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]


@dataclass(slots=True)
class Rough:
    """Hold columns of all rows; `blocks_GP` is G blocks of four columns each, the last ones beside nothing."""

    blocks_GP: NDArray[np.uint8]
    centre_D: Floats
    scale_D: Floats
    # The largest length of what is lost of a row, and of a row.
    lost: float
    longest: float
    # The largest length of the numbers of a row that are summed in one place.
    widest: float
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
        # torch's memory begins where a line of the cache does: elsewhere every quad would lie in two of them.
        blocks_GP = torch.zeros((blocks, -(-width // QUAD) * QUAD_BYTES), dtype=torch.uint8).numpy()
        found = cls(blocks_GP, centre_D, scale_D, 0.0, 0.0, 0.0, np.inf)
        found.write(rows_ID, np.arange(count), places)
        found.allowed = WORSE * found.lost
        return found

    def write(self, rows_ID: Floats, which_R: NDArray[np.int64], places: Places | None = None) -> None:
        """Write some rows, but those that have no place yet."""
        at_R = places.place_I[which_R].astype(np.int64) if places else which_R
        lost, longest, widest = _write(rows_ID, which_R, at_R, self.centre_D, self.scale_D, self.blocks_GP)
        self.lost, self.longest = max(self.lost, lost), max(self.longest, longest)
        self.widest = max(self.widest, widest)

    def read(self, which_R: NDArray[np.int64], places: Places | None = None) -> Floats:
        """Return some rows, as far as they are known: (R, D)."""
        at_R = places.place_I[which_R].astype(np.int64) if places else which_R
        block_R, lane_R = at_R[:, None] // ROWS, at_R[:, None] % ROWS
        column_D = np.arange(len(self.scale_D))
        whole_RD = self.blocks_GP[block_R, column_D // QUAD * QUAD_BYTES + QUAD * lane_R + column_D % QUAD]
        found_RD: Floats = self.centre_D + self.scale_D * (whole_RD.astype(np.float32) - np.float32(ZERO))
        return found_RD

    def fits(self, rows: int) -> bool:
        """Tell whether so many rows have room, and those written singly have not made it much worse."""
        return rows <= len(self.blocks_GP) * ROWS and self.lost <= self.allowed


@compiled_apart
def _ranges(rows_ID: Floats) -> tuple[Floats, Floats]:
    """Return the smallest and the largest number of each column."""
    low_D, high_D = rows_ID[0].copy(), rows_ID[0].copy()
    for row in range(1, rows_ID.shape[0]):
        for column in range(rows_ID.shape[1]):
            value = rows_ID[row, column]
            low_D[column] = min(low_D[column], value)
            high_D[column] = max(high_D[column], value)
    return low_D, high_D


@compiled_apart
def _write(
    rows_ID: Floats,
    which_R: NDArray[np.int64],
    at_R: NDArray[np.int64],
    centre_D: Floats,
    scale_D: Floats,
    blocks_GP: NDArray[np.uint8],
) -> tuple[float, float, float]:
    """Write rows to their places in the blocks; return the largest lengths of what is lost, of a row and of a place."""
    most_lost = most = np.float32(0.0)
    widest = np.int64(0)
    inverse_D = np.float32(1.0) / scale_D
    for place in range(which_R.shape[0]):
        row = which_R[place]
        if at_R[place] < 0:
            continue
        block, lane = at_R[place] // ROWS, at_R[place] % ROWS
        lost = length = np.float32(0.0)
        first = second = np.int64(0)
        for column in range(rows_ID.shape[1]):
            value = rows_ID[row, column]
            nearest = np.rint((value - centre_D[column]) * inverse_D[column])
            nearest = min(max(nearest, np.float32(-LARGEST)), np.float32(LARGEST))
            whole = np.int64(nearest)
            blocks_GP[block, column // QUAD * QUAD_BYTES + QUAD * lane + column % QUAD] = np.uint8(whole + ZERO)
            if column & SECOND:
                second += whole * whole
            else:
                first += whole * whole
            difference = value - centre_D[column] - nearest * scale_D[column]
            lost += difference * difference
            length += value * value
        most_lost, most = max(most_lost, lost), max(most, length)
        widest = max(widest, first, second)
    return np.sqrt(most_lost), np.sqrt(most), float(np.sqrt(widest))


@compiled_apart
def _coarse(scaled_V: NDArray[np.float64], first: int, last: int, widest: float) -> float:
    """Return how coarse weights of rows in whole numbers must be for them and for their sums to have room."""
    largest = even = odd = 0.0
    for column in range(first, last):
        square = scaled_V[column] * scaled_V[column]
        largest = max(largest, square)
        if (column - first) & SECOND:
            odd += square
        else:
            even += square
    return float(max(np.sqrt(largest) / LARGEST_WEIGHT, np.sqrt(max(even, odd)) * widest / LARGEST_SUM))


@compiled_apart
def _write_weights(
    scaled_V: NDArray[np.float64],
    first: int,
    last: int,
    widest: float,
    unit: float,
    factor: int,
    words_WU: NDArray[np.uint32],
    start: int,
    user: int,
) -> float:
    """Write a user's weights as multiples of `factor` units or somewhat more; return what that may do to a score."""
    while True:
        even = odd = even_squares = odd_squares = np.int64(0)
        even_lost = odd_lost = 0.0
        step = factor * unit
        for column in range(last - first):
            whole = np.int64(np.rint(scaled_V[first + column] / step))
            lost = scaled_V[first + column] - whole * step
            if column & SECOND:
                odd, odd_squares, odd_lost = odd + whole, odd_squares + whole * whole, odd_lost + lost * lost
            else:
                even, even_squares, even_lost = even + whole, even_squares + whole * whole, even_lost + lost * lost
            place, shift = start + HEAD + column // QUAD, 8 * (column % QUAD)
            kept = np.int64(words_WU[place, user]) & ~(0xFF << shift)
            words_WU[place, user] = np.uint32(kept | (whole & 0xFF) << shift)
        # Rounding at most doubles a number, so that this ends before the factor is twice what it began with.
        if np.sqrt(float(max(even_squares, odd_squares))) * widest <= LARGEST_SUM:
            break
        factor += factor // 16 + 1
    if WIDE:
        words_WU[start, user] = np.uint32(-ZERO * even & 0xFFFFFFFF)
        words_WU[start + 1, user] = np.uint32(factor)
    else:
        words_WU[start, user] = np.uint32((-ZERO * even & 0xFFFF) | (-ZERO * odd & 0xFFFF) << 16)
        words_WU[start + 1, user] = np.uint32(factor | factor << 16)
    return float((np.sqrt(even_lost) + np.sqrt(odd_lost)) * widest)


@compiled_apart
def whole_weights(
    weights_BV: Floats,
    centre_V: Floats,
    scale_V: Floats,
    width: int,
    lost: Any,
    longest: Any,
    widest: Any,
    together: int,
) -> tuple[Integers, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Write users' weights as whole numbers, so many `together`; return them with what brings sums back to scores.

    A rough score is `constant + step x sum`, and at most `error` from the score. `lost`, `longest` and `widest` are
    those of vectors and of standings.
    """
    users, columns = weights_BV.shape
    middle = HEAD + -(-width // QUAD)
    tiles, words = -(-users // together), middle + HEAD + -(-(columns - width) // QUAD)
    words_TWU = np.zeros((tiles, words, together), np.uint32)
    constant_B, step_B, error_B = np.zeros(users), np.ones(users), np.zeros(users)
    scaled_V = np.empty(columns, np.float64)
    for user in range(users):
        vector = standing = 0.0
        for column in range(columns):
            weight = np.float64(weights_BV[user, column])
            scaled_V[column] = weight * scale_V[column]
            constant_B[user] += weight * centre_V[column]
            if column < width:
                vector += weight * weight
            else:
                standing += weight * weight
        coarse = _coarse(scaled_V, 0, width, widest[0]), _coarse(scaled_V, width, columns, widest[1])
        if max(coarse[0], coarse[1]) > 0.0:
            step_B[user] = max(coarse[0], coarse[1]) / LARGEST_FACTOR
        error = np.sqrt(vector) * (lost[0] + ROUNDING * longest[0])
        error += np.sqrt(standing) * (lost[1] + ROUNDING * longest[1])
        for part in range(2):
            factor = max(1, int(np.ceil(coarse[part] / step_B[user])))
            first, last, start = (width, columns, middle) if part else (0, width, 0)
            error += _write_weights(
                *(scaled_V, first, last, widest[part], step_B[user], factor),
                *(words_TWU[user // together], start, user % together),
            )
        error_B[user] = error
    return words_TWU.view(np.int32).reshape(tiles, words * together), constant_B, step_B, error_B
