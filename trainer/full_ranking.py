"""Full ranking: score every item for some users; say which rank an item of each has, and how well the mix foresaw it.

Written twice: in tensors, for every device, and for the CPU as one loop over users, which gives the same numbers
with fewer passes over B x I. Shapes as in recsys.network; K latest history entries, M successors of each, N = K x M.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recsys.compiled import compiled
from recsys.encoding import to_tensor
from recsys.item_table import LEAST_EXPONENT, NEXT_POWER, PADDING_ROW, TRANSITION_REACH, ItemTable
from recsys.network import TRANSITION_FLOOR, Histories, RecommendationNetwork
from trainer.quality import MISS, Rows

# In place of the score of an item that must not be ranked.
MASKED = -1e9
# Items scored at once: what is computed of them stays in the processor's nearest cache.
STRETCH = 2048
Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Ranked:
    """Hold what was found of each of B users' items.

    Ranks are 1 for the best, MISS where the user has the item already. The loss is the cross-entropy over all items
    that are ranked, in nats; where the mixing weights learn, it leads back to them. `scores_BI` are what was ranked.
    `led_B2` is what the transition memory leads to the item, and to all items together.
    """

    rank_B: Rows
    popularity_rank_B: Rows
    loss_B: Tensor
    scores_BI: Tensor
    led_B2: Floats


def rank(
    network: RecommendationNetwork,
    table: ItemTable,
    histories: Histories,
    states_BD: Tensor,
    standing_IS: Tensor,
    item_B: Tensor,
    seen: list[Rows] | None,
) -> Ranked:
    """Rank an item for each user among all that were chosen before, but those that the user has.

    `seen` has each user's rows, by default those of the history; an item chosen again is looked for all the same.
    """
    way = _by_loop if table.device.type == "cpu" else _by_tensors
    return way(network, table, histories, states_BD, standing_IS, item_B, seen)


def _by_tensors(
    network: RecommendationNetwork,
    table: ItemTable,
    histories: Histories,
    states_BD: Tensor,
    standing_IS: Tensor,
    item_B: Tensor,
    seen: list[Rows] | None,
) -> Ranked:
    with torch.no_grad():
        transitions = table.transitions(histories.latest_first(TRANSITION_REACH))
        lifts_BI = network.lifts(transitions, table.rows)
        led_B2 = torch.stack([transitions.towards(item_B), transitions.weight_BN.sum(1)], 1)
    weights_BP = network.mixing_weights(histories)
    scores_BI = network.scores(weights_BP, states_BD, table.column("vector"), standing_IS, lifts_BI)
    hidden_BI = (table.column("total") == 0).repeat(len(item_B), 1)
    if seen is None:
        hidden_BI.scatter_(1, histories.rows_BL, True)
    else:
        for hidden_I, rows in zip(hidden_BI, seen, strict=True):
            hidden_I[to_tensor(rows, hidden_BI.device)] = True
    hidden_BI[:, PADDING_ROW] = True
    # What the user has already is not recommended again: choosing it again cannot be hit, though it can be learned.
    repeated_B = hidden_BI.gather(1, item_B[:, None])[:, 0]
    hidden_BI.scatter_(1, item_B[:, None], False)
    scores_BI = scores_BI.masked_fill(hidden_BI, MASKED)
    popularity_BI = table.column("total").masked_fill(hidden_BI, MASKED)
    # Synchronises with the GPU: what was found leaves for the metrics.
    rank_B, popularity_rank_B = (
        ranks(each_BI.detach(), item_B).masked_fill(repeated_B, MISS).cpu().numpy()
        for each_BI in (scores_BI, popularity_BI)
    )
    loss_B = F.cross_entropy(scores_BI, item_B, reduction="none")
    return Ranked(rank_B, popularity_rank_B, loss_B, scores_BI.detach(), led_B2.cpu().numpy())


def ranks(scores_BI: Tensor, item_B: Tensor) -> Tensor:
    """Return each item's rank, 1 the best; a tie counts against it only where the other item is older.

    A score that is not finite is no rank: MISS.
    """
    own_B1 = scores_BI.gather(1, item_B[:, None])
    ahead_B = (scores_BI > own_B1).sum(1)
    older_BI = torch.arange(scores_BI.shape[1], device=scores_BI.device) < item_B[:, None]
    ranks_B = 1 + ahead_B + ((scores_BI == own_B1) & older_BI).sum(1)
    return ranks_B.masked_fill(~torch.isfinite(own_B1[:, 0]), MISS)


def _by_loop(
    network: RecommendationNetwork,
    table: ItemTable,
    histories: Histories,
    states_BD: Tensor,
    standing_IS: Tensor,
    item_B: Tensor,
    seen: list[Rows] | None,
) -> Ranked:
    weights_BP = network.mixing_weights(histories)
    latest_BK = histories.latest_first(TRANSITION_REACH)
    distance_K = np.arange(1, latest_BK.shape[1] + 1, dtype=np.float32)
    scale_2K = np.stack([1 / np.sqrt(distance_K), 1 / np.sqrt(distance_K) / distance_K**NEXT_POWER]).astype(np.float32)
    successors = table.column("successor").numpy(), table.column("successor_weight").numpy()
    rows_BN, sums_2BN, led_B2 = _followed(*successors, latest_BK.contiguous().numpy(), item_B.numpy(), scale_2K)
    # torch's logarithm does eight at a time.
    lifts_2BN = torch.from_numpy(sums_2BN).div_(TRANSITION_FLOOR).log1p_()
    hidden = list(histories.rows_BL.numpy()) if seen is None else seen
    products_BI = states_BD @ table.column("vector").T
    standing_SI = standing_IS.T.contiguous()
    scores_BI = torch.empty_like(products_BI)
    rank_B2, lifts_B2 = _rank(
        products_BI.numpy(),
        scores_BI.numpy(),
        standing_SI.numpy(),
        weights_BP.detach().numpy(),
        rows_BN,
        lifts_2BN.numpy(),
        table.column("total").numpy(),
        item_B.numpy(),
        np.concatenate(hidden).astype(np.int64, copy=False),
        np.cumsum([len(rows) for rows in hidden], dtype=np.int64),
    )
    log_BI = scores_BI.log_softmax(1)
    loss_B = -log_BI.gather(1, item_B[:, None])[:, 0]
    # What is next to nothing is not made less: underflow takes ten times as long.
    probability_BI = log_BI.clamp_(min=LEAST_EXPONENT).exp_()
    # Adds nothing but the way back to the weights: the loss changes by each as what was expected of its part and what
    # came differ.
    network_B1 = torch.linalg.vecdot(probability_BI, products_BI)[:, None]
    expected_B2 = (probability_BI.gather(1, torch.from_numpy(rows_BN).long()) * lifts_2BN).sum(2).T
    expected_BP = torch.cat([network_B1, probability_BI @ standing_SI.T, expected_B2], 1)
    came_BP = torch.cat([products_BI.gather(1, item_B[:, None]), standing_IS[item_B], torch.from_numpy(lifts_B2)], 1)
    loss_B = loss_B + ((weights_BP - weights_BP.detach()) * (expected_BP - came_BP)).sum(1)
    return Ranked(rank_B2[:, 0], rank_B2[:, 1], loss_B, scores_BI, led_B2)


@compiled
def _followed(
    successor_IM: Integers, weight_IM: Floats, latest_BK: Rows, item_B: Rows, scale_2K: Floats
) -> tuple[Integers, Floats, Floats]:
    """Sum, for each row that followed a user's latest items, both looks at how often; past the last one rows are 0.

    Then the first look's sums for one item of each user, and for all.
    """
    users, reach = latest_BK.shape
    room = reach * successor_IM.shape[1]
    rows_BN, sums_2BN = np.zeros((users, room + 1), np.int32), np.zeros((2, users, room + 1), np.float32)
    led_B2 = np.zeros((users, 2), np.float32)
    place_I = np.full(len(successor_IM), -1, np.int32)
    for user in range(users):
        found = 0
        for distance in range(reach):
            item = latest_BK[user, distance]
            if item != PADDING_ROW:
                for slot in range(successor_IM.shape[1]):
                    row = successor_IM[item, slot]
                    if row != PADDING_ROW:
                        if place_I[row] < 0:
                            place_I[row], rows_BN[user, found] = found, row
                            found += 1
                        for look in range(2):
                            sums_2BN[look, user, place_I[row]] += scale_2K[look, distance] * weight_IM[item, slot]
        if place_I[item_B[user]] >= 0:
            led_B2[user, 0] = sums_2BN[0, user, place_I[item_B[user]]]
        for place in range(found):
            led_B2[user, 1] += sums_2BN[0, user, place]
            place_I[rows_BN[user, place]] = -1
    return rows_BN, sums_2BN, led_B2


@compiled
def _score(
    products_I: Floats, standing_SI: Floats, weights_P: Floats, total_I: Floats, scores_I: Floats, first: int
) -> None:
    """Write the scores of a stretch of items from `first` on by all that is known of every item."""
    weight = weights_P[0]
    for item in range(len(scores_I)):
        scores_I[item] = weight * products_I[item]
    for number in range(len(standing_SI)):
        # Row first, then stretch: that leaves the compiler sure that its numbers are side by side.
        weight, standing_I = weights_P[1 + number], standing_SI[number][first : first + len(scores_I)]
        for item in range(len(scores_I)):
            scores_I[item] += weight * standing_I[item]
    for item in range(len(scores_I)):
        scores_I[item] = scores_I[item] if total_I[item] > 0.0 else np.float32(MASKED)


@compiled
def _rank(
    products_BI: Floats,
    scores_BI: Floats,
    standing_SI: Floats,
    weights_BP: Floats,
    rows_BN: Integers,
    lifts_2BN: Floats,
    total_I: Floats,
    item_B: Rows,
    hidden_H: Rows,
    ends_B: Rows,
) -> tuple[Rows, Floats]:
    """Write all scores; return the items' ranks by score and by popularity, and their lifts."""
    users, items = products_BI.shape
    rank_B2, lifts_B2 = np.full((users, 2), MISS), np.zeros((users, 2), np.float32)
    for user in range(users):
        products_I, scores_I, weights_P, item = products_BI[user], scores_BI[user], weights_BP[user], item_B[user]
        for first in range(0, items, STRETCH):
            end = min(first + STRETCH, items)
            _score(products_I[first:end], standing_SI, weights_P, total_I[first:end], scores_I[first:end], first)
        mark = 0
        while rows_BN[user, mark] != PADDING_ROW:
            row = rows_BN[user, mark]
            if row == item:
                lifts_B2[user] = lifts_2BN[:, user, mark]
            if total_I[row] > 0.0:
                scores_I[row] += weights_P[-2] * lifts_2BN[0, user, mark] + weights_P[-1] * lifts_2BN[1, user, mark]
            mark += 1
        repeated, popular = _hide(scores_I, total_I, item, hidden_H[ends_B[user - 1] if user else 0 : ends_B[user]])
        own, ahead = scores_I[item], 0
        for place in range(items):
            ahead += scores_I[place] > own
        for place in range(item):
            ahead += scores_I[place] == own
        if not repeated:
            rank_B2[user, 0] = 1 + ahead if np.isfinite(own) else MISS
            rank_B2[user, 1] = 1 + popular
    return rank_B2, lifts_B2


@compiled
def _hide(scores_I: Floats, total_I: Floats, item: int, hidden_H: Rows) -> tuple[bool, int]:
    """Mask a user's rows but the item; return whether the item is one of them, and how many others are more popular."""
    own, popular, repeated = total_I[item], 0, False
    scores_I[PADDING_ROW] = np.float32(MASKED)
    for place in range(len(total_I)):
        popular += total_I[place] > own
    for place in range(item):
        popular += total_I[place] == own
    for row in hidden_H:
        if row == item:
            repeated = True
        elif scores_I[row] != np.float32(MASKED):
            scores_I[row] = np.float32(MASKED)
            popular -= total_I[row] > own or (total_I[row] == own and row < item)
    return repeated, popular
