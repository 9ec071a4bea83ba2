"""Scan: the best rows for each user, exactly, by looking at all of them roughly and at few of them closely.

While the rough scores of sixteen rows are in registers they are compared with what a row must reach to be among the
best; next to none does. What does is shortlisted. What must be reached is guessed from a sample of the rows and proved
by what is found then: who finds too little looks again without a guess. Rows that the transition memory adds to, or
that must not come back to this user, are a user's marks, by ascending row.
Shapes: B users, I rows, D columns of vectors and S of standings, V of both, N marks, K rows kept, G blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart
from recsys.scorer.lanes import ROWS, USERS, products_of_four, products_of_one, trailing_zeros
from recsys.scorer.shortlist import HIDDEN, in_order, look_closely, make_room, put

# Blocks that all users look at in turn while they lie in the processor's cache, with what comes of them.
STRETCH = 128
# Rows kept before those that are no longer among the best are dropped, for each that is asked for: more than a good
# guess lets through.
ROOM = 12
# Blocks looked at to guess what the best will reach.
SAMPLED = 128
# The guess lies so many errors below what the sample reaches: one for rows that are left out, whose scores may be so
# much higher, and a little for what rounding does to the sample, which is far less than it might.
MARGIN = 1.2
NOTHING = -(2**31)
NEVER = 2**31 - 1

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]


@compiled_apart
def limit(threshold: float, constant: float, step: float) -> int:
    """Return the whole number that a sum must be above for its rough score to reach the threshold."""
    return int(min(max(np.floor((threshold - constant) / step) - 2.0, float(NOTHING)), float(NEVER - 1)))


@compiled_apart
def look(
    vectors_GP: NDArray[np.uint8],
    standing_GP: NDArray[np.uint8],
    blocks_Q: Integers,
    words_TP: Integers,
    tile: int,
    limits_TU: Integers,
    sums_QR: Integers,
    above_Q: NDArray[np.uint64],
) -> None:
    """Write the sums of some blocks' rows for a tile of users, and a bit for each that is above its user's limit."""
    for place in range(len(blocks_Q)):
        # The products take 64 bits.
        block = np.int64(blocks_Q[place])
        if limits_TU.shape[1] == 1:
            above_Q[place] = products_of_one(vectors_GP, standing_GP, block, words_TP, tile, limits_TU, sums_QR, place)
        else:
            above_Q[place] = products_of_four(vectors_GP, standing_GP, block, words_TP, tile, limits_TU, sums_QR, place)


@compiled_apart
def _guess(
    vectors_GP: NDArray[np.uint8],
    standing_GP: NDArray[np.uint8],
    words_TP: Integers,
    constant_B: NDArray[np.float64],
    step_B: NDArray[np.float64],
    error_B: NDArray[np.float64],
    hidden_I: NDArray[np.bool_],
    keep: int,
    together: int,
) -> NDArray[np.float64]:
    """Guess for each user what the best rows will reach, from a sample of blocks; nothing where there are few."""
    guess_B = np.full(len(constant_B), -np.inf)
    every = len(hidden_I) // (ROWS * SAMPLED)
    if every < 2:
        return guess_B
    # Of the best there are `expected` in the sample, and hardly ever as many as `place`.
    expected = keep / every
    place = int(expected + 3.0 * np.sqrt(expected)) + 1
    blocks_Q = np.empty(SAMPLED, np.int32)
    for number in range(SAMPLED):
        blocks_Q[number] = number * every
    limits_TU = np.full((len(words_TP), together), NEVER, np.int32)
    sums_QR, above_Q = np.empty((SAMPLED, together * ROWS), np.int32), np.empty(SAMPLED, np.uint64)
    largest_K = np.empty(place, np.int32)
    for tile in range(len(words_TP)):
        look(vectors_GP, standing_GP, blocks_Q, words_TP, tile, limits_TU, sums_QR, above_Q)
        for user in range(tile * together, min(tile * together + together, len(guess_B))):
            first = ROWS * (user - tile * together)
            largest_K[:] = NOTHING
            for number in range(SAMPLED):
                for lane in range(ROWS):
                    total = sums_QR[number, first + lane]
                    if total > largest_K[0] and not hidden_I[blocks_Q[number] * ROWS + lane]:
                        above = 1
                        while above < place and largest_K[above] < total:
                            largest_K[above - 1] = largest_K[above]
                            above += 1
                        largest_K[above - 1] = total
            least = largest_K[0]
            guess = constant_B[user] + step_B[user] * least - MARGIN * error_B[user]
            if least > NOTHING and guess > -np.inf:
                guess_B[user] = guess
    return guess_B


@compiled_apart
def _hold_marks(
    vectors_ID: Floats,
    standing_IS: Floats,
    weights_BV: Floats,
    marks_BN: Integers,
    lifts_BN: Floats,
    hidden_I: NDArray[np.bool_],
    rough_BC: NDArray[np.float64],
    place_BC2: Integers,
    keys_BC: NDArray[np.int64],
    held_B: NDArray[np.int64],
    threshold_B: NDArray[np.float64],
    above_G: NDArray[np.uint64],
    sums_GR: Integers,
    start: int,
    first: int,
    last: int,
    mark_B: NDArray[np.int64],
    keep: int,
    constant_B: NDArray[np.float64],
    step_B: NDArray[np.float64],
    error_B: NDArray[np.float64],
) -> None:
    """Hold the marked rows of some users that reach the threshold, and take their bits.

    Of a stretch of blocks from `start` on; the marks of each user from `mark_B` on, which is moved to a later stretch.
    """
    end = (start + len(above_G)) * ROWS
    for user in range(first, last):
        mark, bits = mark_B[user], ROWS * (user - first)
        constant, step = constant_B[user], step_B[user]
        row = marks_BN[user, mark]
        while row < end:
            block, place = row // ROWS - start, bits + row % ROWS
            above_G[block] &= ~(np.uint64(1) << np.uint64(place))
            lift = lifts_BN[user, mark]
            rough = constant + step * sums_GR[block, place] + lift
            if (
                rough >= threshold_B[user]
                and lift > HIDDEN
                and not hidden_I[row]
                and put(rough_BC, place_BC2, held_B, user, row, mark, rough)
            ):
                held_B[user], threshold_B[user] = make_room(
                    *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC),
                    *(user, held_B[user], keep, error_B[user], threshold_B[user]),
                )
            mark += 1
            row = marks_BN[user, mark]
        mark_B[user] = mark


@compiled_apart
def _sweep(
    vectors_ID: Floats,
    standing_IS: Floats,
    vectors_GP: NDArray[np.uint8],
    standing_GP: NDArray[np.uint8],
    weights_BV: Floats,
    words_TP: Integers,
    constant_B: NDArray[np.float64],
    step_B: NDArray[np.float64],
    error_B: NDArray[np.float64],
    marks_BN: Integers,
    lifts_BN: Floats,
    hidden_I: NDArray[np.bool_],
    keep: int,
    together: int,
    rough_BC: NDArray[np.float64],
    place_BC2: Integers,
    keys_BC: NDArray[np.int64],
    held_B: NDArray[np.int64],
    threshold_B: NDArray[np.float64],
) -> None:
    """Look at all blocks, but for users whose threshold is infinite, and hold the rows that reach it."""
    users, blocks = len(weights_BV), -(-len(vectors_ID) // ROWS)
    mark_B = np.zeros(users, np.int64)
    limits_TU = np.full((len(words_TP), together), NEVER, np.int32)
    sums_GR, above = np.empty((STRETCH, together * ROWS), np.int32), np.empty(STRETCH, np.uint64)
    numbers = np.empty(STRETCH, np.int32)
    for start in range(0, blocks, STRETCH):
        count = min(STRETCH, blocks - start)
        above_G, blocks_G = above[:count], numbers[:count]
        for place in range(count):
            blocks_G[place] = start + place
        for tile in range(len(words_TP)):
            first, last = tile * together, min(tile * together + together, users)
            least = np.inf
            for user in range(first, last):
                limits_TU[tile, user - first] = limit(threshold_B[user], constant_B[user], step_B[user])
                least = min(least, threshold_B[user])
            if least == np.inf:
                continue
            look(vectors_GP, standing_GP, blocks_G, words_TP, tile, limits_TU, sums_GR, above_G)
            _hold_marks(
                *(vectors_ID, standing_IS, weights_BV, marks_BN, lifts_BN, hidden_I),
                *(rough_BC, place_BC2, keys_BC, held_B, threshold_B, above_G, sums_GR),
                *(start, first, last, mark_B, keep, constant_B, step_B, error_B),
            )
            for place in range(count):
                bits = above_G[place]
                while bits:
                    lane = trailing_zeros(np.int64(bits))
                    bits &= bits - np.uint64(1)
                    user, row = first + lane // ROWS, (start + place) * ROWS + lane % ROWS
                    rough = constant_B[user] + step_B[user] * sums_GR[place, lane]
                    if (
                        rough >= threshold_B[user]
                        and row < len(hidden_I)
                        and not hidden_I[row]
                        and put(rough_BC, place_BC2, held_B, user, row, -1, rough)
                    ):
                        held_B[user], threshold_B[user] = make_room(
                            *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC),
                            *(user, held_B[user], keep, error_B[user], threshold_B[user]),
                        )


@compiled_apart
def best(
    vectors_ID: Floats,
    standing_IS: Floats,
    vectors_GP: NDArray[np.uint8],
    standing_GP: NDArray[np.uint8],
    weights_BV: Floats,
    words_TP: Integers,
    constant_B: NDArray[np.float64],
    step_B: NDArray[np.float64],
    error_B: NDArray[np.float64],
    marks_BN: Integers,
    lifts_BN: Floats,
    hidden_I: NDArray[np.bool_],
    keep: int,
) -> tuple[Floats, NDArray[np.int64]]:
    """Return the scores of each user's best rows, and the rows, (B, K) each; HIDDEN and row 0 past the last."""
    users = len(weights_BV)
    together = 1 if users == 1 else USERS
    room = ROOM * keep + 2 * ROWS
    rough_BC, place_BC2 = np.empty((users, room), np.float64), np.empty((users, room, 2), np.int32)
    keys_BC, count_B = np.empty((users, room), np.int64), np.zeros(users, np.int64)
    held_B = np.zeros(users, np.int64)
    guess_B = _guess(vectors_GP, standing_GP, words_TP, constant_B, step_B, error_B, hidden_I, keep, together)
    threshold_B = guess_B.copy()
    left = users
    while left:
        _sweep(
            *(vectors_ID, standing_IS, vectors_GP, standing_GP, weights_BV, words_TP, constant_B, step_B, error_B),
            *(marks_BN, lifts_BN, hidden_I, keep, together),
            *(rough_BC, place_BC2, keys_BC, held_B, threshold_B),
        )
        for user in range(users):
            if threshold_B[user] != np.inf:
                count_B[user], reached = look_closely(
                    *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC),
                    *(user, held_B[user], keep, error_B[user]),
                )
                # Whoever was left out has a score below the guess and an error more.
                if reached < guess_B[user] + error_B[user]:
                    guess_B[user] = threshold_B[user] = -np.inf
                    held_B[user] = 0
                else:
                    threshold_B[user] = np.inf
                    left -= 1
    found: tuple[Floats, NDArray[np.int64]] = in_order(keys_BC, count_B, keep)
    return found
