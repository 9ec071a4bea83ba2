"""Full ranking: score every item for some users; say which rank an item of each has, and how well the mix foresaw it.

Written twice: in tensors, for every device, and for the CPU as one loop over the items, which gives the same numbers in
one pass over B x I. Of a sample (see trainer.sample) the loop estimates them. Shapes as in recsys.network; K latest
history entries, M successors of each, N = K x M, Z stretches of T items, U rows looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recsys.compiled import compiled
from recsys.encoding import to_tensor
from recsys.item_table import CHOSEN_PRIOR, PADDING_ROW, TRANSITION_REACH, ItemTable, nearness
from recsys.network import LIFTS, TRANSITION_FLOOR, Histories, RecommendationNetwork
from trainer.quality import MISS, Rows
from trainer.sample import Sample, Standings

# In place of the score of an item that must not be ranked.
MASKED = -1e9
# What is smaller than e to this beside the largest is taken for that.
LEAST_EXPONENT = -80.0
# Items looked at together: what is known of them, and computed, stays in the processor's nearest cache.
STRETCH = 1024
LOG2_E, LOG_2 = np.float32(1 / math.log(2)), np.float32(math.log(2))
# Where a float's exponent lies, and what is added to it.
EXPONENT_PLACE, EXPONENT_BIAS = 23, 127
# Of the series of e to the power of x: x^6 first.
SERIES = tuple(np.float32(1 / math.factorial(n)) for n in range(6, -1, -1))
PRIOR = np.float32(CHOSEN_PRIOR)
# 2^32 over the golden ratio: the upper bits of the product tell rows apart (Knuth, volume 3, 6.4).
HASH_FACTOR = 2_654_435_769
Floats = NDArray[np.float32]
Integers = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Ranked:
    """Hold what was found of each of B users' items.

    Ranks are 1 for the best, MISS where the user has the item already. Losses are the cross-entropy over all items
    that are ranked, in nats, of the scores as they are and divided by the temperature; where the mixing weights learn,
    the one leads back to them, the other to the temperature alone. `scores_BI` are what was ranked, None where nobody
    asked for them. `led_B2` is what the transition memory leads to the item, and to all items
    together. `certain_C` are the rows that were looked at for certain, where others were drawn.
    """

    rank_B: Rows
    popularity_rank_B: Rows
    mixed_loss_B: Tensor
    loss_B: Tensor
    scores_BI: Tensor | None
    led_B2: Floats
    certain_C: Rows | None = None


def rank(
    network: RecommendationNetwork,
    table: ItemTable,
    histories: Histories,
    states_BD: Tensor,
    standing: Standings,
    item_B: Tensor,
    seen: list[Rows] | None,
    *,
    keep: bool = False,
) -> Ranked:
    """Rank an item for each user among all that were chosen before, but those that the user has.

    `seen` has each user's rows, by default those of the history; an item chosen again is looked for all the same.
    `keep` asks for all scores, which a sample has not.
    """
    if isinstance(standing, Sample):
        return _by_sample(network, table, histories, states_BD, standing, item_B, seen)
    way = _by_loop if table.device.type == "cpu" else _by_tensors
    return way(network, table, histories, states_BD, standing, item_B, seen, keep=keep)


def _by_tensors(
    network: RecommendationNetwork,
    table: ItemTable,
    histories: Histories,
    states_BD: Tensor,
    standing_IS: Tensor,
    item_B: Tensor,
    seen: list[Rows] | None,
    *,
    keep: bool,
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
    mixed_loss_B = F.cross_entropy(scores_BI, item_B, reduction="none")
    cooled_BI = scores_BI.detach() / network.mix.log_temperature.exp()
    loss_B = F.cross_entropy(cooled_BI, item_B, reduction="none")
    kept_BI = scores_BI.detach() if keep else None
    return Ranked(rank_B, popularity_rank_B, mixed_loss_B, loss_B, kept_BI, led_B2.cpu().numpy())


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
    *,
    keep: bool,
) -> Ranked:
    memory = _remembered(table, histories, item_B)
    scores_BI = np.empty((len(item_B), table.rows) if keep else (0, 0), np.float32)
    looked_at = table.column("vector"), standing_IS, table.column("total"), np.ones(table.rows, np.float32)
    hidden = _hidden(histories, seen)
    return _ranked(network, histories, states_BD, looked_at, memory, item_B.numpy(), hidden, scores_BI)


def _by_sample(
    network: RecommendationNetwork,
    table: ItemTable,
    histories: Histories,
    states_BD: Tensor,
    sample: Sample,
    item_B: Tensor,
    seen: list[Rows] | None,
) -> Ranked:
    rows_BN, lifts_3BN, led_B2 = _remembered(table, histories, item_B)
    # What histories lead to, for any of the users, is looked at for all.
    rows_U, weight_U, certain_C = sample.among(np.concatenate([rows_BN[rows_BN != PADDING_ROW], item_B.numpy()]))
    index_U = torch.from_numpy(rows_U)
    looked_at = table.columns["vector"][index_U], sample[index_U], table.columns["total"][index_U], weight_U
    # What is hidden and not looked at needs no hiding: it becomes the padding row, which is first.
    rows_H, ends_B = _hidden(histories, seen)
    memory = _places(rows_U, rows_BN).astype(np.int32), lifts_3BN, led_B2
    place_B = np.searchsorted(rows_U, item_B.numpy())
    none_BU = np.empty((0, 0), np.float32)
    hidden = _places(rows_U, rows_H), ends_B
    ranked = _ranked(network, histories, states_BD, looked_at, memory, place_B, hidden, none_BU)
    return replace(ranked, certain_C=certain_C)


def _hidden(histories: Histories, seen: list[Rows] | None) -> tuple[Rows, Rows]:
    """Return the rows hidden from each user, one's after the other's, and where each one's end."""
    hidden = list(histories.rows_BL.numpy()) if seen is None else seen
    rows_H = np.concatenate(hidden).astype(np.int64, copy=False)
    return rows_H, np.cumsum([len(rows) for rows in hidden], dtype=np.int64)


def _places(rows_U: Rows, rows: NDArray[np.integer]) -> Rows:
    """Return where rows stand among some, ascending and beginning with the padding row; 0 where they do not."""
    places = np.minimum(np.searchsorted(rows_U, rows), len(rows_U) - 1)
    return np.where(rows_U[places] == rows, places, PADDING_ROW)


def _remembered(table: ItemTable, histories: Histories, item_B: Tensor) -> tuple[Integers, Floats, Floats]:
    """Return the rows that follow each user's latest items, their lifts, and `led_B2`."""
    latest_BK = histories.latest_first(TRANSITION_REACH)
    memory = (table.column(name).numpy() for name in ("successor", "successor_weight", "total"))
    scale_2K = nearness(latest_BK.shape[1])
    rows_BN, sums_3BN, led_B2 = _followed(*memory, latest_BK.contiguous().numpy(), item_B.numpy(), scale_2K)
    # torch's logarithm does eight at a time.
    lifts_3BN = torch.from_numpy(sums_3BN).div_(TRANSITION_FLOOR).log1p_()
    return rows_BN, lifts_3BN.numpy(), led_B2


def _ranked(
    network: RecommendationNetwork,
    histories: Histories,
    states_BD: Tensor,
    looked_at: tuple[Tensor, Tensor, Tensor, Floats],
    memory: tuple[Integers, Floats, Floats],
    item_B: Rows,
    hidden: tuple[Rows, Rows],
    scores_BI: Floats,
) -> Ranked:
    """Rank among the rows looked at, of which vectors, standings, totals and weights are given."""
    weights_BP = network.mixing_weights(histories)
    vectors_ID, standing_IS, total_I, weight_I = looked_at
    rows_BN, lifts_3BN, led_B2 = memory
    log_temperature = network.mix.log_temperature
    rank_B2, loss_B2, excess_BP, warming_B = _rank(
        (states_BD @ vectors_ID.T).numpy(),
        standing_IS.T.contiguous().numpy(),
        weights_BP.detach().numpy(),
        np.float32(math.exp(-log_temperature.item())),
        rows_BN,
        lifts_3BN,
        total_I.numpy(),
        weight_I,
        item_B,
        *hidden,
        scores_BI,
    )
    mixed_loss_B, loss_B = torch.from_numpy(loss_B2).unbind(1)
    # What is added is nothing but the way back to the weights, and to the temperature.
    mixed_loss_B = mixed_loss_B + ((weights_BP - weights_BP.detach()) * torch.from_numpy(excess_BP)).sum(1)
    loss_B = loss_B + (log_temperature - log_temperature.detach()) * torch.from_numpy(warming_B)
    kept_BI = torch.from_numpy(scores_BI) if scores_BI.size else None
    return Ranked(rank_B2[:, 0], rank_B2[:, 1], mixed_loss_B, loss_B, kept_BI, led_B2)


@compiled
def _followed(
    successor_IM: Integers, weight_IM: Floats, total_I: Floats, latest_BK: Rows, item_B: Rows, scale_2K: Floats
) -> tuple[Integers, Floats, Floats]:
    """Sum, for each row that followed a user's latest items, all looks at how often; past the last one rows are 0.

    Then the first look's sums for one item of each user, and for all.
    """
    users, reach = latest_BK.shape
    room = reach * successor_IM.shape[1]
    rows_BN, sums_3BN = np.zeros((users, room + 1), np.int32), np.zeros((LIFTS, users, room + 1), np.float32)
    led_B2 = np.zeros((users, 2), np.float32)
    # Of what was found the place, by row: open addressing, at most half full, so that it stays in the nearest cache.
    bits = 1
    while 1 << bits < 2 * room:
        bits += 1
    mask, shift = (1 << bits) - 1, 32 - bits
    row_H, place_H = np.zeros(1 << bits, np.int32), np.zeros(1 << bits, np.int32)
    for user in range(users):
        found = 0
        for distance in range(reach):
            item = latest_BK[user, distance]
            if item != PADDING_ROW:
                for slot in range(successor_IM.shape[1]):
                    row = successor_IM[item, slot]
                    if row != PADDING_ROW:
                        at = _slot(row_H, row, mask, shift)
                        if not row_H[at]:
                            row_H[at], place_H[at], rows_BN[user, found] = row, found, row
                            found += 1
                        for look in range(2):
                            sums_3BN[look, user, place_H[at]] += scale_2K[look, distance] * weight_IM[item, slot]
        at = _slot(row_H, item_B[user], mask, shift)
        if row_H[at]:
            led_B2[user, 0] = sums_3BN[0, user, place_H[at]]
        for place in range(found):
            row, total = rows_BN[user, place], sums_3BN[0, user, place]
            sums_3BN[2, user, place] = total * (PRIOR / (total_I[row] + PRIOR))
            led_B2[user, 1] += total
        row_H[:] = 0
    return rows_BN, sums_3BN, led_B2


@compiled
def _slot(row_H: Integers, row: int, mask: int, shift: int) -> int:
    """Return the slot of a row, or an empty one where it is none."""
    at = ((row * HASH_FACTOR) & 0xFFFFFFFF) >> shift
    while row_H[at] and row_H[at] != row:
        at = (at + 1) & mask
    return at


@compiled
def _chains(rows_X: Rows, ends_B: Rows, items: int) -> tuple[Integers, Integers]:
    """Chain each user's places in `rows_X` that lie in the same stretch: the first of each, and from each the next; -1.

    The padding row is in none.
    """
    first_BZ = np.full((len(ends_B), (items + STRETCH - 1) // STRETCH), -1, np.int32)
    next_X = np.full(len(rows_X), -1, np.int32)
    for user in range(len(ends_B)):
        for place in range(ends_B[user - 1] if user else 0, ends_B[user]):
            if rows_X[place] != PADDING_ROW:
                stretch = rows_X[place] // STRETCH
                next_X[place], first_BZ[user, stretch] = first_BZ[user, stretch], place
    return first_BZ, next_X


@compiled
def _score(
    products_T: Floats, standing_SI: Floats, weights_P: Floats, total_T: Floats, scores_T: Floats, first: int
) -> None:
    """Write the scores of a stretch of items, from `first` on, by all that is known of every item."""
    weight = weights_P[0]
    for place in range(len(products_T)):
        scores_T[place] = weight * products_T[place]
    for number in range(len(standing_SI)):
        # Row first, then stretch: that leaves the compiler sure that its numbers are side by side.
        weight, standing_T = weights_P[1 + number], standing_SI[number][first : first + len(products_T)]
        for place in range(len(products_T)):
            scores_T[place] += weight * standing_T[place]
    for place in range(len(products_T)):
        scores_T[place] = scores_T[place] if total_T[place] > 0.0 else np.float32(MASKED)


@compiled
def _lift(
    scores_T: Floats, weights_P: Floats, rows_X: Rows, lifts_3X: Floats, next_X: Integers, mark: int, first: int
) -> None:
    """Add to a stretch's scores, from item `first` on, what the transition memory says of those in a chain."""
    while mark >= 0:
        place = rows_X[mark] - first
        if scores_T[place] != np.float32(MASKED):
            for look in range(LIFTS):
                scores_T[place] += weights_P[look - LIFTS] * lifts_3X[look, mark]
        mark = next_X[mark]


@compiled
def _hide(scores_T: Floats, hidden_H: Rows, next_H: Integers, place: int, first: int, item: int) -> bool:
    """Mask those of a stretch that are in a chain, but the item; return whether that is one of them."""
    repeated = False
    if first <= PADDING_ROW < first + len(scores_T):
        scores_T[PADDING_ROW - first] = np.float32(MASKED)
    while place >= 0:
        if hidden_H[place] == item:
            repeated = True
        else:
            scores_T[hidden_H[place] - first] = np.float32(MASKED)
        place = next_H[place]
    return repeated


@compiled
def _count_ahead(
    ahead_2: NDArray[np.float64],
    scores_T: Floats,
    total_T: Floats,
    weight_T: Floats,
    own: float,
    own_total: float,
    place_of_own: int,
) -> None:
    """Count those of a stretch who are ahead by score and by popularity; of those that tie, the older are."""
    older = min(max(place_of_own, 0), len(total_T))
    ahead, popular, none = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for place in range(len(total_T)):
        ahead += weight_T[place] if scores_T[place] > own else none
        popular += weight_T[place] if (total_T[place] > own_total) & (scores_T[place] != np.float32(MASKED)) else none
    for place in range(older):
        ahead += weight_T[place] if scores_T[place] == own else none
        popular += weight_T[place] if (total_T[place] == own_total) & (scores_T[place] != np.float32(MASKED)) else none
    ahead_2[0] += ahead
    ahead_2[1] += popular


@compiled
def _powers(scores_T: Floats, largest: float, powers_T: Floats, halvings_T: Integers) -> None:
    """Write e to the power of each score less the largest, to six digits: the compiler does eight of them at a time."""
    for place in range(len(scores_T)):
        below = scores_T[place] - largest
        # What is next to nothing is not made less: underflow takes ten times as long. What is no number stays so.
        below = np.float32(LEAST_EXPONENT) if below < np.float32(LEAST_EXPONENT) else below
        whole = np.floor(below * LOG2_E + np.float32(0.5))
        rest = below - whole * LOG_2
        power = SERIES[0]
        for factor in SERIES[1:]:
            power = power * rest + factor
        halvings_T[place] = (np.int32(whole) + EXPONENT_BIAS) << EXPONENT_PLACE
        powers_T[place] = power
    factors_T = halvings_T.view(np.float32)
    for place in range(len(scores_T)):
        powers_T[place] *= factors_T[place]


@compiled
def _weigh(powers_T: Floats, weight_T: Floats) -> None:
    for place in range(len(powers_T)):
        powers_T[place] *= weight_T[place]


@compiled
def _expect(powers_T: Floats, products_T: Floats, standing_SI: Floats, expected_P: Floats, first: int) -> float:
    """Add a stretch of items, each times its power, to what is expected of parts but the lifts; return their sum."""
    total, product = np.float32(0.0), np.float32(0.0)
    for place in range(len(powers_T)):
        total += powers_T[place]
        product += powers_T[place] * products_T[place]
    expected_P[0] += product
    for number in range(len(standing_SI)):
        standing_T, found = standing_SI[number][first : first + len(powers_T)], np.float32(0.0)
        for place in range(len(powers_T)):
            found += powers_T[place] * standing_T[place]
        expected_P[1 + number] += found
    return float(total)


@compiled
def _cool(
    scores_T: Floats,
    own: float,
    largest: float,
    sharpness: float,
    weight_T: Floats,
    below_T: Floats,
    powers_T: Floats,
    halvings_T: Integers,
    sums_2: NDArray[np.float64],
) -> None:
    """Add e to the power of each score of a stretch less the largest, times `sharpness`, and that times how far above.

    How far the score is above the user's item's.
    """
    for place in range(len(scores_T)):
        below_T[place] = sharpness * (scores_T[place] - largest)
    _powers(below_T, np.float32(0.0), powers_T, halvings_T)
    _weigh(powers_T, weight_T)
    total, above = np.float32(0.0), np.float32(0.0)
    for place in range(len(scores_T)):
        total += powers_T[place]
        above += powers_T[place] * (scores_T[place] - own)
    sums_2[0] += total
    sums_2[1] += above


@compiled
def _own(
    products_BI: Floats,
    standing_SI: Floats,
    weights_BP: Floats,
    total_I: Floats,
    item_B: Rows,
    rows_X: Integers,
    lifts_3X: Floats,
    mark_BZ: Integers,
    next_X: Integers,
) -> tuple[Floats, Floats]:
    """Return each user's item's score, by the same steps as every other's so that what is alike ties, and its parts."""
    own_B, parts_BP = np.empty(len(item_B), np.float32), np.zeros_like(weights_BP)
    scores_T = np.empty(STRETCH, np.float32)
    for user in range(len(item_B)):
        item, weights_P, mark = item_B[user], weights_BP[user], mark_BZ[user, item_B[user] // STRETCH]
        first = item // STRETCH * STRETCH
        end = min(first + STRETCH, len(total_I))
        _score(products_BI[user, first:end], standing_SI, weights_P, total_I[first:end], scores_T, first)
        _lift(scores_T, weights_P, rows_X, lifts_3X, next_X, mark, first)
        own_B[user] = scores_T[item - first]
        parts_BP[user, 0], parts_BP[user, 1:-LIFTS] = products_BI[user, item], standing_SI[:, item]
        while mark >= 0:
            if rows_X[mark] == item:
                parts_BP[user, -LIFTS:] = lifts_3X[:, mark]
            mark = next_X[mark]
    return own_B, parts_BP


@compiled
def _rank(
    products_BI: Floats,
    standing_SI: Floats,
    weights_BP: Floats,
    sharpness: float,
    rows_BN: Integers,
    lifts_3BN: Floats,
    total_I: Floats,
    weight_I: Floats,
    item_B: Rows,
    hidden_H: Rows,
    ends_B: Rows,
    scores_BI: Floats,
) -> tuple[Rows, Floats, Floats, Floats]:
    """Go through all items once, a stretch at a time for all users. Scores are written where there is room for them.

    An item counts as `weight_I` of its kind.

    Return the items' ranks by score and by popularity; the losses, of scores as they are and times `sharpness`; of each
    part of the score how much more was expected than came: so the first loss changes with the part's weight; and how
    the second one changes with the logarithm of the temperature.
    """
    (users, items), rows_X, lifts_3X = products_BI.shape, rows_BN.ravel(), lifts_3BN.reshape(LIFTS, rows_BN.size)
    mark_BZ, next_X = _chains(rows_X, rows_BN.shape[1] * np.arange(1, users + 1), items)
    hidden_BZ, next_H = _chains(hidden_H, ends_B, items)
    ways = rows_X, lifts_3X, mark_BZ, next_X
    own_B, came_BP = _own(products_BI, standing_SI, weights_BP, total_I, item_B, *ways)
    largest_B, sum_B, expected_BP = own_B.copy(), np.zeros(users), np.zeros(weights_BP.shape)
    cooled_B2 = np.zeros((users, 2))
    ahead_B2, repeated_B = np.zeros((users, 2)), np.zeros(users, np.bool_)
    scores, powers, halvings = np.empty(STRETCH, np.float32), np.empty(STRETCH, np.float32), np.empty(STRETCH, np.int32)
    below = np.empty(STRETCH, np.float32)
    for stretch in range(mark_BZ.shape[1]):
        first, end = stretch * STRETCH, min((stretch + 1) * STRETCH, items)
        total_T, weight_T, scores_T = total_I[first:end], weight_I[first:end], scores[: end - first]
        powers_T, halvings_T = powers[: end - first], halvings[: end - first]
        for user in range(users):
            item, products_T, mark = item_B[user], products_BI[user, first:end], mark_BZ[user, stretch]
            _score(products_T, standing_SI, weights_BP[user], total_T, scores_T, first)
            _lift(scores_T, weights_BP[user], rows_X, lifts_3X, next_X, mark, first)
            repeated_B[user] |= _hide(scores_T, hidden_H, next_H, hidden_BZ[user, stretch], first, item)
            if len(scores_BI):
                scores_BI[user, first:end] = scores_T
            _count_ahead(ahead_B2[user], scores_T, total_T, weight_T, own_B[user], total_I[item], item - first)
            largest = largest_B[user]
            for place in range(len(scores_T)):
                largest = scores_T[place] if scores_T[place] > largest else largest
            if largest > largest_B[user]:
                shrink = np.exp(np.float64(largest_B[user]) - largest)
                sum_B[user] *= shrink
                expected_BP[user] *= shrink
                cooled_B2[user] *= np.exp(sharpness * (np.float64(largest_B[user]) - largest))
                largest_B[user] = largest
            _powers(scores_T, largest, powers_T, halvings_T)
            _weigh(powers_T, weight_T)
            sum_B[user] += _expect(powers_T, products_T, standing_SI, expected_BP[user], first)
            while mark >= 0:
                for look in range(LIFTS):
                    expected_BP[user, look - LIFTS] += powers_T[rows_X[mark] - first] * lifts_3X[look, mark]
                mark = next_X[mark]
            ways_out = below[: end - first], powers_T, halvings_T, cooled_B2[user]
            _cool(scores_T, own_B[user], largest, sharpness, weight_T, *ways_out)
    rank_B2 = (1.5 + ahead_B2).astype(np.int64)
    loss_B2, warming_B = np.empty((users, 2), np.float32), np.empty(users, np.float32)
    for user in range(users):
        expected_BP[user] = expected_BP[user] / sum_B[user] - came_BP[user]
        ahead = np.float64(largest_B[user]) - own_B[user]
        loss_B2[user, 0] = np.log(sum_B[user]) + ahead
        loss_B2[user, 1] = np.log(cooled_B2[user, 0]) + sharpness * ahead
        warming_B[user] = -sharpness * cooled_B2[user, 1] / cooled_B2[user, 0]
        if repeated_B[user]:
            rank_B2[user] = MISS
        elif not np.isfinite(own_B[user]):
            rank_B2[user, 0] = MISS
    return rank_B2, loss_B2, expected_BP.astype(np.float32), warming_B
