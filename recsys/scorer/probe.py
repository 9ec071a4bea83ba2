"""Probe: the best rows for each user, by a rough look at the partitions alone that may hold some of them.

Each user looks first where its hopes are highest; from then on a partition is looked at by those whose hope of it
reaches what a row must reach to be among the best so far. Until a user has found enough that is nothing: whoever is
shown few rows looks everywhere. Rows that the transition memory adds to are scored one by one.
Shapes as in recsys.scorer.scan; L partitions, Q blocks looked at together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart
from recsys.scorer.lanes import ROWS, USERS, prefetch, trailing_zeros
from recsys.scorer.marks import END
from recsys.scorer.scan import NEVER, NOTHING, ROOM, limit, look
from recsys.scorer.shortlist import AHEAD, HIDDEN, exact, in_order, look_closely, make_room, put

# Blocks after which what a row must reach is looked at again.
STRETCH = 16
# Of a rough score's error, how much more than the threshold a partition's hope must reach: with it nearly the same is
# found (99.9 of 100 rows) as by errors a third as large with a whole one.
SLACK = 0.5

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]


@compiled_apart
def _tile(words_BP: Integers, users_U: NDArray[np.int64], first: int, count: int, words_1P: Integers) -> None:
    """Write the weights of some users, USERS or fewer, as the products want them, user after user within each word."""
    for word in range(words_BP.shape[1]):
        for place in range(count):
            words_1P[0, word * USERS + place] = words_BP[users_U[first + place], word]


@compiled_apart
def _marked(marks_BN: Integers, user: int, row: int) -> bool:
    """Tell whether a row is among a user's marks."""
    low, high = 0, marks_BN.shape[1] - 1
    while low < high:
        middle = (low + high) // 2
        if marks_BN[user, middle] < row:
            low = middle + 1
        else:
            high = middle
    return bool(marks_BN[user, low] == row)


@compiled_apart
def _hold(
    vectors_ID: Floats,
    standing_IS: Floats,
    weights_BV: Floats,
    marks_BN: Integers,
    lifts_BN: Floats,
    hidden_I: NDArray[np.bool_],
    row_P: Integers,
    rough_BC: NDArray[np.float64],
    place_BC2: Integers,
    keys_BC: NDArray[np.int64],
    above_Q: NDArray[np.uint64],
    sums_QR: Integers,
    blocks_Q: Integers,
    users_U: NDArray[np.int64],
    held_B: NDArray[np.int64],
    threshold_B: NDArray[np.float64],
    keep: int,
    constant_B: NDArray[np.float64],
    step_B: NDArray[np.float64],
    error_B: NDArray[np.float64],
) -> None:
    """Hold the rows of these blocks that have a bit, are not hidden and not marked, for some users."""
    for place in range(len(blocks_Q)):
        bits = above_Q[place]
        while bits:
            lane = trailing_zeros(np.int64(bits))
            bits &= bits - np.uint64(1)
            user, row = users_U[lane // ROWS], row_P[blocks_Q[place] * ROWS + lane % ROWS]
            rough = constant_B[user] + step_B[user] * sums_QR[place, lane]
            if (
                row >= 0
                and rough >= threshold_B[user]
                and not hidden_I[row]
                and not _marked(marks_BN, user, row)
                and put(rough_BC, place_BC2, held_B, user, row, -1, rough)
            ):
                held_B[user], threshold_B[user] = make_room(
                    *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC),
                    *(user, held_B[user], keep, error_B[user], threshold_B[user]),
                )


@compiled_apart
def _look(
    vectors_ID: Floats,
    standing_IS: Floats,
    vectors_GP: NDArray[np.uint8],
    standing_GP: NDArray[np.uint8],
    weights_BV: Floats,
    words_BP: Integers,
    constant_B: NDArray[np.float64],
    step_B: NDArray[np.float64],
    error_B: NDArray[np.float64],
    marks_BN: Integers,
    lifts_BN: Floats,
    hidden_I: NDArray[np.bool_],
    keep: int,
    row_P: Integers,
    next_G: Integers,
    start: int,
    users_U: NDArray[np.int64],
    wanting: int,
    held_B: NDArray[np.int64],
    threshold_B: NDArray[np.float64],
    rough_BC: NDArray[np.float64],
    place_BC2: Integers,
    keys_BC: NDArray[np.int64],
    memory: tuple[Integers, NDArray[np.uint64], Integers, Integers, Integers],
) -> None:
    """Look at the chain of blocks from `start` on for the first `wanting` of some users."""
    sums_QR, above_Q, blocks_Q, words_1P, limits_1U = memory
    for first in range(0, wanting, USERS):
        count = min(USERS, wanting - first)
        _tile(words_BP, users_U, first, count, words_1P)
        block = start
        while block >= 0:
            limits_1U[:] = NEVER
            for place in range(count):
                user = users_U[first + place]
                limits_1U[0, place] = limit(threshold_B[user], constant_B[user], step_B[user])
            found = 0
            while block >= 0 and found < STRETCH:
                blocks_Q[found] = block
                block, found = next_G[block], found + 1
            look(vectors_GP, standing_GP, blocks_Q[:found], words_1P, 0, limits_1U, sums_QR, above_Q)
            _hold(
                *(vectors_ID, standing_IS, weights_BV, marks_BN, lifts_BN, hidden_I, row_P),
                *(rough_BC, place_BC2, keys_BC, above_Q, sums_QR, blocks_Q[:found], users_U[first:]),
                *(held_B, threshold_B, keep, constant_B, step_B, error_B),
            )


@compiled_apart
def _look_at_marks(
    vectors_ID: Floats,
    standing_IS: Floats,
    weights_BV: Floats,
    marks_BN: Integers,
    lifts_BN: Floats,
    hidden_I: NDArray[np.bool_],
    hopes_BL: Floats,
    partition_I: Integers,
    rough_BC: NDArray[np.float64],
    place_BC2: Integers,
    keys_BC: NDArray[np.int64],
    user: int,
    held_B: NDArray[np.int64],
    threshold_B: NDArray[np.float64],
    keep: int,
    error: float,
) -> None:
    """Hold a user's marked rows by their scores, as far as there is hope of them."""
    hopeful_N, count = np.empty(marks_BN.shape[1], np.int32), 0
    for mark in range(marks_BN.shape[1]):
        row, lift = marks_BN[user, mark], lifts_BN[user, mark]
        if row == END:
            break
        hope = hopes_BL[user, partition_I[row]] + lift
        if lift > HIDDEN and hope >= threshold_B[user] + error and not hidden_I[row]:
            hopeful_N[count] = mark
            count += 1
    for place in range(count):
        ahead = marks_BN[user, hopeful_N[min(place + AHEAD, count - 1)]]
        prefetch(vectors_ID, ahead)
        prefetch(standing_IS, ahead)
        mark = hopeful_N[place]
        row, lift = marks_BN[user, mark], lifts_BN[user, mark]
        score = np.float64(exact(vectors_ID, standing_IS, row, weights_BV, user) + lift)
        if score >= threshold_B[user] + error and put(rough_BC, place_BC2, held_B, user, row, mark, score):
            held_B[user], threshold_B[user] = make_room(
                *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC),
                *(user, held_B[user], keep, error, threshold_B[user]),
            )


@compiled_apart
def _tell_apart(
    vectors_ID: Floats,
    standing_IS: Floats,
    weights_BV: Floats,
    lifts_BN: Floats,
    rough_BC: NDArray[np.float64],
    place_BC2: Integers,
    keys_BC: NDArray[np.int64],
    user: int,
    held_B: NDArray[np.int64],
    threshold_B: NDArray[np.float64],
    keep: int,
    error: float,
) -> None:
    """Look closely at what a user has found so far; from then on a row must reach an error less than the last of it."""
    held_B[user], reached = look_closely(
        *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC),
        *(user, held_B[user], keep, error),
    )
    threshold_B[user] = max(threshold_B[user], reached - error)


@compiled_apart
def best(
    vectors_ID: Floats,
    standing_IS: Floats,
    vectors_GP: NDArray[np.uint8],
    standing_GP: NDArray[np.uint8],
    weights_BV: Floats,
    words_BP: Integers,
    constant_B: NDArray[np.float64],
    step_B: NDArray[np.float64],
    error_B: NDArray[np.float64],
    marks_BN: Integers,
    lifts_BN: Floats,
    hidden_I: NDArray[np.bool_],
    keep: int,
    hopes_BL: Floats,
    first_B: Floats,
    partition_I: Integers,
    row_P: Integers,
    next_G: Integers,
    first_L: Integers,
) -> tuple[Floats, NDArray[np.int64]]:
    """Return what scan.best does, of the partitions that are looked at, first those with a hope of `first_B`."""
    users, partitions = hopes_BL.shape
    room = ROOM * keep + 2 * ROWS
    rough_BC, place_BC2 = np.empty((users, room), np.float64), np.empty((users, room, 2), np.int32)
    keys_BC = np.empty((users, room), np.int64)
    held_B, threshold_B = np.zeros(users, np.int64), np.full(users, -np.inf)
    users_U = np.empty(users, np.int64)
    memory = (
        np.empty((STRETCH, USERS * ROWS), np.int32),
        np.empty(STRETCH, np.uint64),
        np.empty(STRETCH, np.int32),
        np.zeros((1, words_BP.shape[1] * USERS), np.int32),
        np.full((1, USERS), NOTHING, np.int32),
    )
    for everywhere in (False, True):
        for partition in range(partitions):
            wanting = 0
            for user in range(users):
                hope = hopes_BL[user, partition]
                # What is among the best reaches an error more than the threshold; hopes are no bounds.
                needed = threshold_B[user] + SLACK * error_B[user]
                if (first_B[user] > hope >= needed) if everywhere else (hope >= first_B[user]):
                    users_U[wanting] = user
                    wanting += 1
            if wanting and first_L[partition] >= 0:
                _look(
                    *(vectors_ID, standing_IS, vectors_GP, standing_GP, weights_BV, words_BP),
                    *(constant_B, step_B, error_B, marks_BN, lifts_BN, hidden_I, keep, row_P, next_G),
                    *(first_L[partition], users_U, wanting, held_B, threshold_B, rough_BC, place_BC2, keys_BC, memory),
                )
        for user in range(users if not everywhere else 0):
            for found in range(2):
                _tell_apart(
                    *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC),
                    *(user, held_B, threshold_B, keep, error_B[user]),
                )
                if not found:
                    _look_at_marks(
                        *(vectors_ID, standing_IS, weights_BV, marks_BN, lifts_BN, hidden_I, hopes_BL, partition_I),
                        *(rough_BC, place_BC2, keys_BC, user, held_B, threshold_B, keep, error_B[user]),
                    )
    for user in range(users):
        _tell_apart(
            *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC),
            *(user, held_B, threshold_B, keep, error_B[user]),
        )
    chosen: tuple[Floats, NDArray[np.int64]] = in_order(keys_BC, held_B, keep)
    return chosen
