"""Shortlist: the rows that may be among a user's best, by their rough scores, and the choice between them by scores.

The rough score of a row is at most `error` from its score. Whoever has a rough score of more than twice that below the
rough score of K others is therefore not among the best K. Of equal scores the lower row comes first.
Shapes: B users, I rows, D columns of vectors and S of standings, V of both, N marks, K rows kept, C rows held.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled
from recsys.scorer.lanes import ROWS

# Below any real score, and past the key of any.
HIDDEN = -1e9
NO_KEY = 2**63 - 1
SIGN = -(2**31)

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]


@compiled
def exact(vectors_ID: Floats, standing_IS: Floats, row: int, weights_BV: Floats, user: int) -> np.float32:
    """Return the score of a row for a user without what the transition memory adds."""
    total = np.float32(0.0)
    width = vectors_ID.shape[1]
    for column in range(width):
        total += vectors_ID[row, column] * weights_BV[user, column]
    for column in range(standing_IS.shape[1]):
        total += standing_IS[row, column] * weights_BV[user, width + column]
    return total


@compiled
def _smallest(values_C: Any, count: int, place: int) -> Any:
    """Return what would stand at `place` were the first `count` values sorted; they are left in any order (Hoare)."""
    low, high = 0, count - 1
    while low < high:
        pivot = values_C[(low + high) // 2]
        left, right = low, high
        while left <= right:
            while values_C[left] < pivot:
                left += 1
            while values_C[right] > pivot:
                right -= 1
            if left <= right:
                values_C[left], values_C[right] = values_C[right], values_C[left]
                left, right = left + 1, right - 1
        if place <= right:
            high = right
        elif place >= left:
            low = left
        else:
            break
    return values_C[place]


@compiled
def kth(rough_BC: NDArray[np.float64], user: int, count: int, keep: int) -> float:
    """Return the rough score that `keep` of a user's rows reach."""
    return float(_smallest(rough_BC[user, :count].copy(), count, count - keep))


@compiled
def _key(score: np.float32, row: int) -> Any:
    """Return a whole number that is smaller for larger scores and, of equal ones, for lower rows."""
    ordered = np.int64(np.float32(score).view(np.int32))
    # A float's bits are in its order once those of negative ones are turned round; either zero becomes 0.
    if ordered < 0:
        ordered = -(ordered & 0x7FFFFFFF)
    return row - (ordered << 32)


@compiled
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
) -> int:
    """Write the keys of those rows that may be among the best `keep`, and move them to the front; return how many."""
    needed, held = -np.inf, 0
    middle = kth(rough_BC, user, count, keep) if count > keep else -np.inf
    # First those that are the best roughly: the rest needs a look only where it may be better than the last of them.
    for first in (True, False):
        least = np.inf
        for place in range(held, count):
            rough = rough_BC[user, place]
            if (rough < middle) if first else (rough + error < needed):
                continue
            row, mark = place_BC2[user, place, 0], place_BC2[user, place, 1]
            score = exact(vectors_ID, standing_IS, row, weights_BV, user)
            if mark >= 0:
                score += lifts_BN[user, mark]
            least = min(least, np.float64(score))
            rough_BC[user, place], rough_BC[user, held] = rough_BC[user, held], rough
            place_BC2[user, place, 0], place_BC2[user, place, 1] = place_BC2[user, held, 0], place_BC2[user, held, 1]
            place_BC2[user, held, 0], place_BC2[user, held, 1] = row, mark
            keys_BC[user, held] = _key(score, row)
            held += 1
        needed = least
    return held


def in_order(keys_BC: NDArray[np.int64], keep: int) -> tuple[Floats, NDArray[np.int64]]:
    """Return the scores and rows of the `keep` smallest keys, (B, K) each; HIDDEN and row 0 where there are no more."""
    keys_BK = np.sort(keys_BC, axis=1)[:, :keep]
    ordered_BK = (-(keys_BK >> 32)).astype(np.int32)
    negative_BK = ordered_BK < 0
    bits_BK = np.where(negative_BK, -ordered_BK | np.int32(SIGN), ordered_BK)
    none_BK = keys_BK == NO_KEY
    scores_BK = np.where(none_BK, np.float32(HIDDEN), bits_BK.view(np.float32))
    return scores_BK, np.where(none_BK, 0, keys_BK & 0xFFFFFFFF)


@compiled
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
            held = look_closely(
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
