"""Ranking: the network's class head over a user's candidates, which share all that depends on the user alone.

The head's first layer is linear in state, item, state x item, context and rates. Of what it makes of the state and the
item, the item's part is a matrix of the user's own, so that half of the products are left, and nothing is repeated for
every candidate. The numbers are those of RecommendationNetwork.class_logits. On the CPU it is one loop over users and
candidates: the products of a small batch are less work than to call for them one by one.
Shapes as in recsys.network; K candidates, H and G the first two layers' widths, E what is fed to the first of each
candidate, F to the third, U what it gets of the user, T and W as in recsys.scorer.dense; X the places of a strip.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.compiled import compiled_apart
from recsys.item_table import ItemTable
from recsys.network import CONTEXT_WIDTH, RecommendationNetwork
from recsys.rates import PRIOR
from recsys.scorer.dense import COLUMNS, VECTORS, add_products, strips
from recsys.scorer.lanes import prefetch
from recsys.standing import STANDINGS

# Candidates of a user whose layers are in the processor's first cache together.
TOGETHER = 32

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]


class Ranking:
    """Hold one version's class head, and the items that it judges once they are installed."""

    def __init__(self, network: RecommendationNetwork) -> None:
        self._rates = network.rates
        layers = cast("list[nn.Linear]", [each for each in network.rank if isinstance(each, nn.Linear)])
        first, self._second, self._third = layers
        known = [self._rates.user_width, self._rates.item_width]
        dimension = (first.in_features - CONTEXT_WIDTH - STANDINGS - sum(known)) // 3
        parts = torch.split(first.weight, [dimension, dimension, dimension, STANDINGS, CONTEXT_WIDTH, *known], 1)
        state, vector, product, standing, context, user, item = parts
        self._user_HU = torch.cat([state, context, user], 1)
        self._user_bias_H = first.bias
        self._vector_DH, self._product_DH = vector.T.contiguous(), product.T.contiguous()
        self._rest_EH = torch.cat([standing, item], 1).T
        self._known_user_CU, known_item = torch.split(self._rates.weigh.weight, known, 1)
        self._known_bias_C = self._rates.weigh.bias
        self._known_EC = known_item.T.contiguous()
        self._on_host = first.weight.device.type == "cpu"
        if self._on_host:
            # The two layers between have whole strips, so that nothing behind their columns is read.
            assert not first.out_features % COLUMNS
            assert not self._second.out_features % COLUMNS
            on_host = (
                *(_strips(self._known_user_CU.T), self._known_bias_C + self._third.bias),
                *(_strips(self._user_HU.T), self._user_bias_H),
                *(_strips(self._vector_DH), _strips(self._product_DH), _strips(self._rest_EH)),
                *(_strips(self._second.weight.T), self._second.bias),
                _strips(torch.cat([self._third.weight.T, self._known_EC])),
            )
            among_C, variance = self._rates.among()
            counting = among_C.numpy(), self._rates.worth_C.numpy(), float(variance)
            self._layers = (*counting, *(each.detach().contiguous().numpy() for each in on_host))

    def install(self, table: ItemTable, standing_IS: Tensor) -> None:
        """Take the items of the version, which are looked at where they are."""
        self._items = table.column("vector"), standing_IS, table.column("classes")
        if self._on_host:
            self._host = (*(each.numpy() for each in self._items), *self._layers)

    def logits(self, states_BD: Tensor, context_BC: Tensor, user_BU: Tensor, rows_BK: Tensor) -> Tensor:
        """Return the logits over feedback classes: (B, K, C); `user_BU` are the network's `user_rates`."""
        if self._on_host:
            logits_BKC = torch.empty(*rows_BK.shape, self._known_EC.shape[1])
            users = (each.numpy() for each in (states_BD, context_BC, user_BU))
            _judge(*users, rows_BK.contiguous().numpy(), *self._host, logits_BKC.numpy())
            return logits_BKC
        batch, dimension = states_BD.shape
        vectors_BKD, standing_BKS, counts_BKC = (each[rows_BK] for each in self._items)
        item_BKE = self._rates.item(counts_BKC)
        fed_BKE = torch.cat([vectors_BKD, standing_BKS, item_BKE], 2)
        user_BH = F.linear(torch.cat([states_BD, context_BC, user_BU], 1), self._user_HU, self._user_bias_H)
        maps_BEH = states_BD.new_empty(batch, fed_BKE.shape[2], user_BH.shape[1])
        torch.addcmul(self._vector_DH, states_BD[:, :, None], self._product_DH, out=maps_BEH[:, :dimension])
        maps_BEH[:, dimension:] = self._rest_EH
        hidden_BKH = torch.baddbmm(user_BH[:, None], fed_BKE, maps_BEH).relu_()
        logits_BKC = self._third(self._second(hidden_BKH).relu_())
        known_BC = F.linear(user_BU, self._known_user_CU, self._known_bias_C)
        found: Tensor = logits_BKC + known_BC[:, None] + item_BKE @ self._known_EC
        return found


def _strips(map_EH: Tensor) -> Tensor:
    return torch.from_numpy(strips(map_EH.detach().contiguous().numpy()))


@compiled_apart
def _padded(rows: int) -> int:
    """Return the rows of whole tiles that so many rows are within."""
    return -(-rows // VECTORS) * VECTORS


@compiled_apart
def _feed(
    row: int,
    vectors_ID: Floats,
    standing_IS: Floats,
    counts_IC: Floats,
    among_C: Floats,
    worth_C: Floats,
    variance: float,
    fed_E: Floats,
) -> None:
    """Gather what is known of a row, with Rates.item of its counts."""
    width, standings, classes = vectors_ID.shape[1], standing_IS.shape[1], len(among_C)
    fed_E[:width] = vectors_ID[row]
    fed_E[width : width + standings] = standing_IS[row]
    item_E = fed_E[width + standings :]
    total = np.float32(0.0)
    for each in range(classes):
        total += counts_IC[row, each]
    deviation, prior = np.float32(0.0), np.float32(PRIOR)
    for each in range(classes):
        count, among = counts_IC[row, each], among_C[each]
        item_E[each] = math.log((count / among + prior) / (total + prior))
        deviation += ((count + prior * among) / (total + prior) - among) * worth_C[each]
    item_E[classes] = deviation / variance
    item_E[classes + 1] = math.log1p(total) / np.float32(4.0)


@compiled_apart
def _fetch(vectors_ID: Floats, standing_IS: Floats, counts_IC: Floats, row: int) -> None:
    prefetch(vectors_ID, row)
    prefetch(standing_IS, row)
    prefetch(counts_IC, row)


@compiled_apart
def _base(x_BE: Floats, map_TEW: Floats, bias_H: Floats) -> Floats:
    """Return what the users alone add to a layer: (B, H), both up to whole tiles."""
    rows = _padded(len(x_BE))
    x_KE, found_KH = np.zeros((rows, x_BE.shape[1]), np.float32), np.zeros((rows, len(map_TEW) * COLUMNS), np.float32)
    x_KE[: len(x_BE)] = x_BE
    found_KH[:, : len(bias_H)] = bias_H
    add_products(x_KE, map_TEW, found_KH)
    return found_KH


@compiled_apart
def _judge(
    states_BD: Floats,
    context_BC: Floats,
    rates_BU: Floats,
    rows_BK: Longs,
    vectors_ID: Floats,
    standing_IS: Floats,
    counts_IC: Floats,
    among_C: Floats,
    worth_C: Floats,
    variance: float,
    known_TUW: Floats,
    last_C: Floats,
    user_TUW: Floats,
    user_H: Floats,
    vector_TDW: Floats,
    product_TDW: Floats,
    rest_TEW: Floats,
    second_THW: Floats,
    second_G: Floats,
    third_TFW: Floats,
    logits_BKC: Floats,
) -> None:
    """Write the logits, of some candidates of a user together."""
    users, kept = rows_BK.shape
    dimension, fed = states_BD.shape[1], states_BD.shape[1] + rest_TEW.shape[1]
    counted = third_TFW.shape[1] - len(second_G)
    base_BH = _base(np.concatenate((states_BD, context_BC, rates_BU), 1), user_TUW, user_H)
    base_BC = _base(rates_BU, known_TUW, last_C)
    map_TEW = np.empty((len(vector_TDW), fed, COLUMNS), np.float32)
    map_TEW[:, dimension:] = rest_TEW
    # The strips' rows behind one another: one long loop rather than many short ones.
    parts = len(map_TEW)
    map_TX = map_TEW.reshape(parts, -1)
    vector_TX, product_TX = vector_TDW.reshape(parts, -1), product_TDW.reshape(parts, -1)
    state_X = np.empty(dimension * COLUMNS, np.float32)
    size = min(TOGETHER, _padded(max(kept, 1)))
    fed_KE, hidden_KH = np.zeros((size, fed), np.float32), np.empty((size, base_BH.shape[1]), np.float32)
    # What the second layer makes, and behind it what is counted of the candidates, which the third reads as well.
    deep_KF = np.empty((size, third_TFW.shape[1]), np.float32)
    found_KC = np.empty((size, base_BC.shape[1]), np.float32)
    for user in range(users):
        # The rows come from memory meanwhile.
        for place in range(kept):
            _fetch(vectors_ID, standing_IS, counts_IC, rows_BK[user, place])
        for row in range(dimension):
            state_X[row * COLUMNS : (row + 1) * COLUMNS] = states_BD[user, row]
        for strip in range(parts):
            found_X, of_all_X, by_state_X = map_TX[strip], vector_TX[strip], product_TX[strip]
            for place in range(len(state_X)):
                found_X[place] = of_all_X[place] + state_X[place] * by_state_X[place]
        for start in range(0, kept, size):
            count = min(size, kept - start)
            for place in range(count):
                row = rows_BK[user, start + place]
                _feed(row, vectors_ID, standing_IS, counts_IC, among_C, worth_C, variance, fed_KE[place])
            hidden_KH[:], deep_KF[:, : len(second_G)], found_KC[:] = base_BH[user], second_G, base_BC[user]
            deep_KF[:, len(second_G) :] = fed_KE[:, fed - counted :]
            add_products(fed_KE, map_TEW, hidden_KH)
            _rectify(hidden_KH)
            add_products(hidden_KH, second_THW, deep_KF)
            _rectify(deep_KF[:, : len(second_G)])
            add_products(deep_KF, third_TFW, found_KC)
            for place in range(count):
                for each in range(logits_BKC.shape[2]):
                    logits_BKC[user, start + place, each] = found_KC[place, each]


@compiled_apart
def _rectify(found_KH: Floats) -> None:
    for each in range(len(found_KH)):
        for column in range(found_KH.shape[1]):
            # Multiplied rather than chosen between, which can be done for eight at a time.
            found_KH[each, column] *= np.float32(found_KH[each, column] > np.float32(0.0))
