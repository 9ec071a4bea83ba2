"""Scan: the best rows for each user, exactly, by looking at all of them roughly and at few of them closely.

While the rough scores of sixteen rows are in registers they are compared with what a row must reach to be among the
best so far; next to none does. What does is shortlisted. Rows that the transition memory adds to, or that must not come
back to this user, are a user's marks, by ascending row.
Shapes: B users, I rows, D columns of vectors and S of standings, V of both, N marks, K rows kept, G blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled
from recsys.scorer.lanes import ROWS, USERS, products_of_four, products_of_one, trailing_zeros
from recsys.scorer.shortlist import HIDDEN, NO_KEY, look_closely, make_room

# Blocks that all users look at in turn while they lie in the processor's cache, with what comes of them.
STRETCH = 128
# Rows kept before those that are no longer among the best are dropped, for each that is asked for.
ROOM = 5
# Users' weights are whole numbers of sixteen bits, whose sums of products must fit 32.
LARGEST_WEIGHT, LARGEST_SUM, LARGEST_ROW = 32767.0, 2_000_000_000.0, 127.0
# What rounding may do to a score, of the product of the lengths of row and weights.
ROUNDING = 2e-5
NOTHING = -(2**31)
NEVER = 2**31 - 1

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]


@compiled
def whole_weights(
    weights_BV: Floats, centre_V: Floats, scale_V: Floats, width: int, lost: Any, longest: Any, together: int
) -> tuple[Integers, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Write users' weights as whole numbers, so many `together`; return them with what brings sums back to scores.

    A rough score is `constant + step x sum`, and at most `error` from the score. `lost` and `longest` are those of
    vectors and of standings.
    """
    users, columns = weights_BV.shape
    tiles = -(-users // together)
    first, second = (width + 1) // 2, (columns - width + 1) // 2
    words = np.zeros((tiles, first + second, together, 2), np.int16)
    constant_B, step_B, error_B = np.zeros(users), np.ones(users), np.zeros(users)
    for user in range(users):
        largest = total = vector = standing = 0.0
        for column in range(columns):
            weight = np.float64(weights_BV[user, column])
            scaled = abs(weight * scale_V[column])
            largest, total = max(largest, scaled), total + scaled
            constant_B[user] += weight * centre_V[column]
            if column < width:
                vector += weight * weight
            else:
                standing += weight * weight
        step = max(largest / LARGEST_WEIGHT, LARGEST_ROW * total / LARGEST_SUM)
        if step > 0.0:
            step_B[user] = step
        for column in range(columns):
            value = np.rint(weights_BV[user, column] * np.float64(scale_V[column]) / step_B[user])
            place = column if column < width else 2 * first + column - width
            words[user // together, place >> 1, user % together, place & 1] = np.int16(value)
        vector, standing = np.sqrt(vector), np.sqrt(standing)
        error_B[user] = (
            vector * (lost[0] + ROUNDING * longest[0])
            + standing * (lost[1] + ROUNDING * longest[1])
            + 0.5 * step * LARGEST_ROW * columns
        )
    return words.reshape(-1).view(np.int32).reshape(tiles, -1), constant_B, step_B, error_B


@compiled
def limit(threshold: float, constant: float, step: float) -> int:
    """Return the whole number that a sum must be above for its rough score to reach the threshold."""
    return int(min(max(np.floor((threshold - constant) / step) - 2.0, float(NOTHING)), float(NEVER - 1)))


@compiled
def _hold(
    vectors_ID: Floats,
    standing_IS: Floats,
    weights_BV: Floats,
    marks_BN: Integers,
    lifts_BN: Floats,
    hidden_I: NDArray[np.bool_],
    rough_BC: NDArray[np.float64],
    place_BC2: Integers,
    keys_BC: NDArray[np.int64],
    above_G: NDArray[np.uint64],
    sums_GR: Integers,
    start: int,
    first: int,
    user: int,
    mark: int,
    held: int,
    keep: int,
    constant: float,
    step: float,
    error: float,
    threshold: float,
) -> tuple[int, int, float]:
    """Hold the rows of a stretch of blocks from `start` on that reach the threshold, marked ones and those with a bit.

    The user's sums and bits begin at `first` of each block's. Return the first mark of a later stretch, how many rows
    are held, and what a row must reach from now on.
    """
    room, end = rough_BC.shape[1], (start + len(above_G)) * ROWS
    row = marks_BN[user, mark]
    while row < end:
        block, place = row // ROWS - start, first + row % ROWS
        above_G[block] &= ~(np.uint64(1) << np.uint64(place))
        lift = lifts_BN[user, mark]
        rough = constant + step * sums_GR[block, place] + lift
        if rough >= threshold and lift > HIDDEN and not hidden_I[row]:
            rough_BC[user, held], place_BC2[user, held, 0], place_BC2[user, held, 1] = rough, row, mark
            held += 1
            if held == room:
                held, threshold = make_room(
                    *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC),
                    *(user, held, keep, error, threshold),
                )
        mark += 1
        row = marks_BN[user, mark]
    for block in range(len(above_G)):
        bits = np.int64((above_G[block] >> np.uint64(first)) & np.uint64(0xFFFF))
        while bits:
            lane = trailing_zeros(bits)
            bits &= bits - 1
            row = (start + block) * ROWS + lane
            rough = constant + step * sums_GR[block, first + lane]
            if rough >= threshold and row < len(hidden_I) and not hidden_I[row]:
                rough_BC[user, held], place_BC2[user, held, 0], place_BC2[user, held, 1] = rough, row, -1
                held += 1
                if held == room:
                    held, threshold = make_room(
                        *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC),
                        *(user, held, keep, error, threshold),
                    )
    return mark, held, threshold


@compiled
def _sweep(
    vectors_ID: Floats,
    standing_IS: Floats,
    vectors_GP: NDArray[np.int8],
    standing_GP: NDArray[np.int8],
    weights_BV: Floats,
    words_TP: Integers,
    constant_B: NDArray[np.float64],
    step_B: NDArray[np.float64],
    error_B: NDArray[np.float64],
    marks_BN: Integers,
    lifts_BN: Floats,
    hidden_I: NDArray[np.bool_],
    keep: int,
    limits_TU: Integers,
    held_B: NDArray[np.int64],
    rough_BC: NDArray[np.float64],
    place_BC2: Integers,
    keys_BC: NDArray[np.int64],
) -> None:
    """Look at all blocks for all users, and hold the rows that reach what each user's must."""
    users, together = len(weights_BV), limits_TU.shape[1]
    blocks = -(-len(vectors_ID) // ROWS)
    mark_B, threshold_B = np.zeros(users, np.int64), np.full(users, -np.inf)
    sums_GR, above = np.empty((STRETCH, together * ROWS), np.int32), np.empty(STRETCH, np.uint64)
    for start in range(0, blocks, STRETCH):
        count = min(STRETCH, blocks - start)
        above_G = above[:count]
        for tile in range(len(words_TP)):
            for place in range(count):
                block = start + place
                if together == 1:
                    above_G[place] = products_of_one(
                        vectors_GP, standing_GP, block, words_TP, tile, limits_TU, sums_GR, place
                    )
                else:
                    above_G[place] = products_of_four(
                        vectors_GP, standing_GP, block, words_TP, tile, limits_TU, sums_GR, place
                    )
            for user in range(tile * together, min(tile * together + together, users)):
                place = user - tile * together
                mark_B[user], held_B[user], threshold_B[user] = _hold(
                    *(vectors_ID, standing_IS, weights_BV, marks_BN, lifts_BN, hidden_I, rough_BC, place_BC2, keys_BC),
                    *(above_G, sums_GR, start, ROWS * place, user, mark_B[user], held_B[user], keep),
                    *(constant_B[user], step_B[user], error_B[user], threshold_B[user]),
                )
                limits_TU[tile, place] = limit(threshold_B[user], constant_B[user], step_B[user])


@compiled
def best(
    vectors_ID: Floats,
    standing_IS: Floats,
    vectors_GP: NDArray[np.int8],
    standing_GP: NDArray[np.int8],
    weights_BV: Floats,
    words_TP: Integers,
    constant_B: NDArray[np.float64],
    step_B: NDArray[np.float64],
    error_B: NDArray[np.float64],
    marks_BN: Integers,
    lifts_BN: Floats,
    hidden_I: NDArray[np.bool_],
    keep: int,
) -> NDArray[np.int64]:
    """Return the keys of each user's best rows and of some others, in any order, and NO_KEY beside them: (B, C)."""
    users = len(weights_BV)
    together = 1 if users == 1 else USERS
    room = ROOM * keep + 2 * ROWS
    rough_BC, place_BC2 = np.empty((users, room), np.float64), np.empty((users, room, 2), np.int32)
    keys_BC = np.full((users, room), NO_KEY, np.int64)
    held_B = np.zeros(users, np.int64)
    limits_TU = np.full((len(words_TP), together), NEVER, np.int32)
    for user in range(users):
        limits_TU[user // together, user % together] = NOTHING
    _sweep(
        *(vectors_ID, standing_IS, vectors_GP, standing_GP, weights_BV, words_TP, constant_B, step_B, error_B),
        *(marks_BN, lifts_BN, hidden_I, keep, limits_TU, held_B, rough_BC, place_BC2, keys_BC),
    )
    for user in range(users):
        held = look_closely(
            *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC),
            *(user, held_B[user], keep, error_B[user]),
        )
        keys_BC[user, held:] = NO_KEY
    return keys_BC
