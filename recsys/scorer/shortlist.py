"""Shortlist: the rows that may be among a user's best, by their rough scores, and the choice between them by scores.

The rough score of a row is at most `error` from its score. Whoever has a rough score of more than twice that below the
rough score of K others is therefore not among the best K. Of equal scores the lower row comes first.
Shapes: B users, I rows, D columns of vectors and S of standings, V of both, N marks, K rows kept, C rows held.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart
from recsys.scorer.lanes import ROWS, prefetch

# Below any real score, and past the key of any.
HIDDEN = -1e9
NO_KEY = 2**63 - 1
SIGN = -(2**31)
# Rows that are being fetched while one is looked at closely.
AHEAD = 16

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]


@compiled_apart
def exact(vectors_ID: Floats, standing_IS: Floats, row: int, weights_BV: Floats, user: int) -> np.float32:
    """Return the score of a row for a user without what the transition memory adds."""
    # Indices from nought on, or numba asks of each whether it is negative.
    vector_D, standing_S, weights_V = vectors_ID[row], standing_IS[row], weights_BV[user]
    weights_S = weights_V[len(vector_D) :]
    total = np.float32(0.0)
    for column in range(len(vector_D)):
        total += vector_D[column] * weights_V[column]
    for column in range(len(standing_S)):
        total += standing_S[column] * weights_S[column]
    return total


@compiled_apart
def _smallest(values_C: Any, count: int, place: int) -> Any:
    """Return what would stand at `place` were the first `count` values sorted; they are left in any order.

    As Hoare's selection; but what is exchanged does not depend on a comparison that the processor would have to guess.
    """
    low, high = 0, count
    while True:
        pivot, first = values_C[(low + high) // 2], low
        for here in range(low, high):
            value = values_C[here]
            values_C[here], values_C[first] = values_C[first], value
            first += value < pivot
        if place < first:
            high = first
            continue
        low = first
        for here in range(first, high):
            value = values_C[here]
            values_C[here], values_C[low] = values_C[low], value
            low += value == pivot
        if place < low:
            return pivot


@compiled_apart
def kth(rough_BC: NDArray[np.float64], user: int, count: int, keep: int) -> float:
    """Return the rough score that `keep` of a user's rows reach."""
    return float(_smallest(rough_BC[user, :count].copy(), count, count - keep))


@compiled_apart
def _key(score: np.float32, row: int) -> Any:
    """Return a whole number that is smaller for larger scores and, of equal ones, for lower rows."""
    ordered = np.int64(np.float32(score).view(np.int32))
    # A float's bits are in its order once those of negative ones are turned round; either zero becomes 0.
    if ordered < 0:
        ordered = -(ordered & 0x7FFFFFFF)
    return row - (ordered << 32)


@compiled_apart
def look_closely(
    vectors_ID: Floats,
    standing_IS: Floats,
    weights_BV: Floats,
    lifts_BN: Floats,
    rough_BC: NDArray[np.float64],
    place_BC2: Integers,
    keys_BC: NDArray[np.int64],
    user: int,
    count: int,
    keep: int,
    error: float,
) -> tuple[int, float]:
    """Write the keys of those rows that may be among the best `keep`, and move them to the front.

    Return how many these are, and a score that `keep` of them reach.
    """
    needed, held = -np.inf, 0
    middle = kth(rough_BC, user, count, keep) if count > keep else -np.inf
    # First those that are the best roughly: the rest needs a look only where it may be better than the last of them.
    for first in (True, False):
        chosen = held
        for place in range(held, count):
            rough = rough_BC[user, place]
            if (rough < middle) if first else (rough + error < needed):
                continue
            rough_BC[user, place], rough_BC[user, chosen] = rough_BC[user, chosen], rough
            for part in range(2):
                other = place_BC2[user, place, part]
                place_BC2[user, place, part] = place_BC2[user, chosen, part]
                place_BC2[user, chosen, part] = other
            chosen += 1
        least = np.inf
        for place in range(held, chosen):
            ahead = place_BC2[user, min(place + AHEAD, chosen - 1), 0]
            prefetch(vectors_ID, ahead)
            prefetch(standing_IS, ahead)
            row, mark = place_BC2[user, place, 0], place_BC2[user, place, 1]
            score = exact(vectors_ID, standing_IS, row, weights_BV, user)
            if mark >= 0:
                score += lifts_BN[user, mark]
            least = min(least, np.float64(score))
            keys_BC[user, place] = _key(score, row)
        held = chosen
        needed = least if first else needed
    return held, needed if held >= keep else -np.inf


@compiled_apart
def make_room(
    vectors_ID: Floats,
    standing_IS: Floats,
    weights_BV: Floats,
    lifts_BN: Floats,
    rough_BC: NDArray[np.float64],
    place_BC2: Integers,
    keys_BC: NDArray[np.int64],
    user: int,
    held: int,
    keep: int,
    error: float,
    threshold: float,
) -> tuple[int, float]:
    """Drop rows that are not among the best; return how many are left and what a row must reach from now on."""
    threshold = max(threshold, kth(rough_BC, user, held, keep) - 2.0 * error)
    # Of rows that lie too close together to be told apart roughly, those that are not among the best of these.
    last = np.int64(NO_KEY)
    for closely in (False, True):
        if closely:
            held, _ = look_closely(
                *(vectors_ID, standing_IS, weights_BV, lifts_BN, rough_BC, place_BC2, keys_BC, user, held, keep, error)
            )
            last = _smallest(keys_BC[user, :held].copy(), held, keep - 1)
        left, least = 0, np.inf
        for place in range(held):
            if rough_BC[user, place] >= threshold and (not closely or keys_BC[user, place] <= last):
                rough_BC[user, left] = rough_BC[user, place]
                for part in range(2):
                    place_BC2[user, left, part] = place_BC2[user, place, part]
                least = min(least, rough_BC[user, left])
                left += 1
        held = left
        if held <= rough_BC.shape[1] - ROWS:
            break
    return held, max(threshold, least - 2.0 * error) if last != NO_KEY else threshold


@compiled_apart
def put(
    rough_BC: NDArray[np.float64],
    place_BC2: Integers,
    held_B: NDArray[np.int64],
    user: int,
    row: int,
    mark: int,
    rough: float,
) -> bool:
    """Hold a row for a user with its rough score and its mark, -1 if it has none; tell whether no room is left."""
    held = held_B[user]
    rough_BC[user, held], place_BC2[user, held, 0], place_BC2[user, held, 1] = rough, row, mark
    held_B[user] = held + 1
    return bool(held + 1 == rough_BC.shape[1])


@compiled_apart
def in_order(keys_BC: NDArray[np.int64], count_B: NDArray[np.int64], keep: int) -> tuple[Floats, NDArray[np.int64]]:
    """Return the scores and rows of each user's `keep` smallest keys, (B, K) each; HIDDEN and row 0 past the last.

    The first `count_B` of a user's keys are looked at, and left in another order.
    """
    users = len(count_B)
    scores_BK, rows_BK = np.full((users, keep), np.float32(HIDDEN)), np.zeros((users, keep), np.int64)
    for user in range(users):
        keys_N, count = keys_BC[user], count_B[user]
        if count > keep:
            _smallest(keys_N, count, keep - 1)
            count = keep
        ordered_K = np.sort(keys_N[:count])
        for place in range(count):
            key = ordered_K[place]
            ordered = -(key >> 32)
            bits = ordered if ordered >= 0 else -ordered | SIGN
            scores_BK[user, place], rows_BK[user, place] = np.int32(bits).view(np.float32), key & 0xFFFFFFFF
    return scores_BK, rows_BK
