"""parts: what the scores of chosen pairs are made of, and which of it is the reason for an item; and their last order.

Shapes as in recsys.network; K items of each user.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart
from recsys.network import LIFTS, WORTH_FLOOR
from recsys.scorer.shortlist import HIDDEN
from recsys.v1.recommender_pb2 import SOURCE_NETWORK, SOURCE_TRANSITION, SOURCE_TRENDING

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
# In the generated code they are more than plain numbers.
_NETWORK, _TRANSITION, _TRENDING = int(SOURCE_NETWORK), int(SOURCE_TRANSITION), int(SOURCE_TRENDING)
_LIFTS = LIFTS


class Parts(NamedTuple):
    """Hold of users and K items each the parts of the score, (B, K) each, and the largest of them."""

    network_BK: Floats
    standing_BK: Floats
    transitions_BK: Floats
    # Values of recsys.v1.Source, and the row of the history item that explains it; 0 where none does.
    sources_BK: Longs
    because_BK: Longs


@compiled_apart
def log_worth(logits_BKC: Floats, worth_C: Floats, weight: float) -> Floats:
    """Return the weighted log of the expected worth of feedback whose classes have these logits: (B, K)."""
    users, kept, classes = logits_BKC.shape
    found_BK = np.empty((users, kept), np.float32)
    for user in range(users):
        for place in range(kept):
            largest = logits_BKC[user, place, 0]
            for each in range(1, classes):
                largest = max(largest, logits_BKC[user, place, each])
            total, expected = np.float32(0.0), np.float32(0.0)
            for each in range(classes):
                share = np.float32(math.exp(logits_BKC[user, place, each] - largest))
                total += share
                expected += share * worth_C[each]
            found_BK[user, place] = weight * math.log(expected / total + np.float32(WORTH_FLOOR))
    return found_BK


@compiled_apart
def contested(scores_BK: Floats, worth_BF: Floats, own_B: Longs, wanted_B: Longs, most_worth: float) -> Longs:
    """Return the users for whom a candidate past the first F, whose worth is known, may still be among those wanted.

    None is where even `most_worth` would not bring the best of the others there: scores are in descending order.
    """
    users, first = worth_BF.shape
    found_B = np.empty(users, np.int64)
    count = 0
    for user in range(users):
        best = scores_BK[user, first] if first < scores_BK.shape[1] else np.float32(HIDDEN)
        if first >= own_B[user] or best <= np.float32(HIDDEN / 2):
            continue
        final_F = np.sort(scores_BK[user, :first] + worth_BF[user])
        if wanted_B[user] > first or best + most_worth > final_F[first - wanted_B[user]]:
            found_B[count] = user
            count += 1
    return found_B[:count].copy()


@compiled_apart
def in_final_order(
    scores_BK: Floats, worth_BK: Floats, rows_BK: Longs, own_B: Longs, most: int
) -> tuple[Floats, Longs]:
    """Return the `most` best by score and worth together, with their rows: (B, most) each; HIDDEN past the last.

    `own_B` tells how many candidates each user has: more are at hand only because others want more. Of equal ones the
    better by score comes first, of these the lower row.
    """
    users, kept = scores_BK.shape
    final_BM, chosen_BM = np.empty((users, most), np.float32), np.empty((users, most), np.int64)
    below_K = np.empty(kept, np.float32)
    for user in range(users):
        for place in range(kept):
            score = scores_BK[user, place]
            hidden = place >= own_B[user] or score <= np.float32(HIDDEN / 2)
            below_K[place] = -np.float32(HIDDEN) if hidden else -(score + worth_BK[user, place])
        order_K = np.argsort(below_K, kind="mergesort")
        for place in range(most):
            final_BM[user, place] = -below_K[order_K[place]] if place < kept else HIDDEN
            chosen_BM[user, place] = rows_BK[user, order_K[place]] if place < kept else 0
    return final_BM, chosen_BM


@compiled_apart
def apart(
    weights_BP: Floats,
    states_BD: Floats,
    vectors_ID: Floats,
    standing_IS: Floats,
    rows_BK: Longs,
    lifts_BK3: Floats,
    because_BK: Longs,
    mean_vector_D: Floats,
    mean_standing_S: Floats,
) -> Parts:
    """Take the scores of pairs apart; what an average item has is no reason for any."""
    users, kept = rows_BK.shape
    width, standings = vectors_ID.shape[1], standing_IS.shape[1]
    network_BK, standing_BK = np.empty((users, kept), np.float32), np.empty((users, kept), np.float32)
    transitions_BK = np.empty((users, kept), np.float32)
    sources_BK, why_BK = np.empty((users, kept), np.int64), np.zeros((users, kept), np.int64)
    for user in range(users):
        network, lifts = weights_BP[user, 0], weights_BP[user, weights_BP.shape[1] - _LIFTS :]
        usual_network, usual_standing = np.float32(0.0), np.float32(0.0)
        for column in range(width):
            usual_network += states_BD[user, column] * mean_vector_D[column]
        for column in range(standings):
            usual_standing += weights_BP[user, 1 + column] * mean_standing_S[column]
        for place in range(kept):
            row, product, stands, moves = rows_BK[user, place], np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for column in range(width):
                product += states_BD[user, column] * vectors_ID[row, column]
            for column in range(standings):
                stands += weights_BP[user, 1 + column] * standing_IS[row, column]
            for look in range(_LIFTS):
                moves += lifts[look] * lifts_BK3[user, place, look]
            product *= network
            network_BK[user, place], standing_BK[user, place], transitions_BK[user, place] = product, stands, moves
            # A part that says nothing is no reason, even where the others are below average: the network without a
            # history, the transition memory for an item that never followed. Of equal ones the first.
            best = product - network * usual_network if network else np.float32(HIDDEN)
            sources_BK[user, place] = _NETWORK
            if lifts_BK3[user, place, 0] and moves > best:
                best, sources_BK[user, place] = moves, _TRANSITION
            if stands - usual_standing > best:
                sources_BK[user, place] = _TRENDING
            if sources_BK[user, place] == _TRANSITION:
                why_BK[user, place] = because_BK[user, place]
    return Parts(network_BK, standing_BK, transitions_BK, sources_BK, why_BK)
