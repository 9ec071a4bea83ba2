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
    """Give the weakest slots to new successors that are no lighter; the heaviest begin, of equal ones the first.

    What is in fades each time that something follows the item, so that new habits get in; what is lighter than all
    that is in would push out, at once, what has been seen more.
    """
    slots, new = len(successor_M), len(new_N)
    order_N = np.argsort(-heavy_N, kind="mergesort") if new > 1 else np.zeros(new, np.int64)
    taken_M = np.zeros(slots, np.bool_)
    for place in range(min(slots, new)):
        weakest = -1
        for slot in range(slots):
            if not taken_M[slot] and (weakest < 0 or weight_M[slot] < weight_M[weakest]):
                weakest = slot
        if heavy_N[order_N[place]] < weight_M[weakest]:
            break
        taken_M[weakest] = True
        successor_M[weakest], weight_M[weakest] = new_N[order_N[place]], heavy_N[order_N[place]]


@compiled
def forget(successor_IM: Integers, weight_IM: Floats, gone_I: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Leave rows that are gone out of what followed items; tell which items that changes."""
    lost_I = np.zeros(len(gone_I), np.bool_)
    for item in range(len(gone_I)):
        for slot in range(successor_IM.shape[1]):
            after = successor_IM[item, slot]
            if after != 0 and gone_I[after]:
                successor_IM[item, slot], weight_IM[item, slot] = 0, 0.0
                lost_I[item] = True
    return lost_I


@compiled
def recount(
    successor_IM: Integers,
    weight_IM: Floats,
    latest_NK: Integers,
    item_N: Integers,
    nearness_K: Floats,
    back: float,
    share_I: Floats,
    rest_I: Floats,
    room: int,
) -> None:
    """Replace all that followed items by what followed in N choices, each with its history, latest first.

    Nothing fades. What follows item a and leads to b counts share_I[a] x rest_I[b] of its sum; of each item the
    heaviest successors are kept, of equal ones those that came first. At most `room` pairs are held at once, or one
    item's.
    """
    items = len(successor_IM)
    pairs_I = np.zeros(items, np.int64)
    for place in range(len(item_N)):
        for before in latest_NK[place]:
            if before != 0 and before != item_N[place]:
                pairs_I[before] += 1
                pairs_I[item_N[place]] += 1
    sum_I, found_I = np.zeros(items, np.float32), np.empty(items, np.int32)
    first = 0
    while first < items:
        end, held = first, 0
        while end < items and (end == first or held + pairs_I[end] <= room):
            held += pairs_I[end]
            end += 1
        after_P, near_P, start_I = _of_items(latest_NK, item_N, nearness_K, back, pairs_I, first, end)
        for item in range(first, end):
            found = 0
            for place in range(start_I[item - first], start_I[item - first + 1]):
                after = after_P[place]
                if sum_I[after] == 0.0:
                    found_I[found] = after
                    found += 1
                sum_I[after] += near_P[place]
            _keep(successor_IM[item], weight_IM[item], found_I[:found], sum_I, share_I[item], rest_I)
            for place in range(found):
                sum_I[found_I[place]] = 0.0
        first = end


@compiled
def _of_items(
    latest_NK: Integers, item_N: Integers, nearness_K: Floats, back: float, pairs_I: Longs, first: int, end: int
) -> tuple[Integers, Floats, Longs]:
    """Return what followed the items from `first` to `end`, one after another, and where each one's begins."""
    start_I = np.zeros(end - first + 1, np.int64)
    for item in range(first, end):
        start_I[item - first + 1] = start_I[item - first] + pairs_I[item]
    next_I = start_I.copy()
    after_P, near_P = np.empty(start_I[-1], np.int32), np.empty(start_I[-1], np.float32)
    for place in range(len(item_N)):
        item = item_N[place]
        for distance in range(latest_NK.shape[1]):
            before = latest_NK[place, distance]
            if before != 0 and before != item:
                if first <= before < end:
                    after_P[next_I[before - first]], near_P[next_I[before - first]] = item, nearness_K[distance]
                    next_I[before - first] += 1
                if first <= item < end:
                    after_P[next_I[item - first]] = before
                    near_P[next_I[item - first]] = np.float32(back) * nearness_K[distance]
                    next_I[item - first] += 1
    return after_P, near_P, start_I


@compiled
def _keep(
    successor_M: Integers, weight_M: Floats, found_N: Integers, sum_I: Floats, share: float, rest_I: Floats
) -> None:
    """Write the heaviest of what was found into the slots, the rest of which is empty."""
    weight_N = np.empty(len(found_N), np.float32)
    for place in range(len(found_N)):
        weight_N[place] = share * rest_I[found_N[place]] * sum_I[found_N[place]]
    order_N = np.argsort(-weight_N, kind="mergesort")
    successor_M[:], weight_M[:] = 0, 0.0
    for slot in range(min(len(successor_M), len(found_N))):
        successor_M[slot], weight_M[slot] = found_N[order_N[slot]], weight_N[order_N[slot]]
