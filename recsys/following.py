"""Following: count what follows what in the transition memory, a batch at once, in one loop; see ItemTable for what.

The same counts as ItemTable has in tensors for every device. Shapes as there; P pairs of items, N new successors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Longs = NDArray[np.int64]

# A pair is one number, the item before in the upper half, the one after in the lower.
HALF = 32


@compiled
def follow(
    successor_IM: Integers,
    weight_IM: Floats,
    latest_BK: Longs,
    item_B: Longs,
    nearness_K: Floats,
    kept_T: Floats,
    back: float,
) -> Longs:
    """Count that each item followed those of its history, latest first; return the rows that changed, ascending.

    Weights are summed up in the order of the batch, by `nearness_K`, of which `back` leads back. Of what followed an
    item before kept_T[n] is left where something followed it n times in the batch.
    """
    pair_P, weight_P = _pairs(latest_BK, item_B, nearness_K, back)
    order_P = np.argsort(pair_P, kind="mergesort")
    new_N, heavy_N = np.empty(len(pair_P), np.int32), np.empty(len(pair_P), np.float32)
    rows_R = np.empty(len(pair_P), np.int64)
    found = place = 0
    while place < len(order_P):
        before = pair_P[order_P[place]] >> HALF
        end = place
        times = 0
        while end < len(order_P) and pair_P[order_P[end]] >> HALF == before:
            times += order_P[end] < len(order_P) // 2
            end += 1
        successor_M, weight_M = successor_IM[before], weight_IM[before]
        weight_M *= kept_T[times]
        new = 0
        while place < end:
            pair = pair_P[order_P[place]]
            total = np.float32(0.0)
            while place < end and pair_P[order_P[place]] == pair:
                total += weight_P[order_P[place]]
                place += 1
            after = np.int32(pair & ((1 << HALF) - 1))
            slot = 0
            while slot < len(successor_M) and successor_M[slot] != after:
                slot += 1
            if slot < len(successor_M):
                weight_M[slot] += total
            else:
                new_N[new], heavy_N[new] = after, total
                new += 1
        _get_in(successor_M, weight_M, new_N[:new], heavy_N[:new])
        rows_R[found] = before
        found += 1
    return rows_R[:found]


@compiled
def _pairs(latest_BK: Longs, item_B: Longs, nearness_K: Floats, back: float) -> tuple[Longs, Floats]:
    """Return pairs and their weights: first each item behind those before it, then, as many, these behind it."""
    batch, reach = latest_BK.shape
    count = 0
    for place in range(batch):
        for distance in range(reach):
            before = latest_BK[place, distance]
            count += before != 0 and before != item_B[place]
    pair_P, weight_P = np.empty(2 * count, np.int64), np.empty(2 * count, np.float32)
    pair = 0
    for place in range(batch):
        for distance in range(reach):
            before, item = latest_BK[place, distance], item_B[place]
            if before != 0 and before != item:
                pair_P[pair], pair_P[count + pair] = before << HALF | item, item << HALF | before
                weight_P[pair] = nearness_K[distance]
                weight_P[count + pair] = np.float32(back) * nearness_K[distance]
                pair += 1
    return pair_P, weight_P


@compiled
def _get_in(successor_M: Integers, weight_M: Floats, new_N: Integers, heavy_N: Floats) -> None:
    """Give the weakest slots to new successors, the heaviest and of equal ones the first to the weakest slot.

    So new habits always get in.
    """
    slots, new = len(successor_M), len(new_N)
    order_N = np.argsort(-heavy_N, kind="mergesort") if new > 1 else np.zeros(new, np.int64)
    taken_M = np.zeros(slots, np.bool_)
    for place in range(min(slots, new)):
        weakest = -1
        for slot in range(slots):
            if not taken_M[slot] and (weakest < 0 or weight_M[slot] < weight_M[weakest]):
                weakest = slot
        taken_M[weakest] = True
        successor_M[weakest], weight_M[weakest] = new_N[order_N[place]], heavy_N[order_N[place]]
