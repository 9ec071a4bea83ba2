"""Ranking: the network's class head over a user's candidates, which share all that depends on the user alone.

The head's first layer is linear in state, item, state x item, context and rates. Of what it makes of the state and the
item, the item's part is a matrix of the user's own, so that half of the products are left, and nothing is repeated for
every candidate. The numbers are those of RecommendationNetwork.class_logits. On the CPU it is one loop over users and
candidates: the products of a small batch are less work than to call for them one by one.
Shapes as in recsys.network; K candidates, H and G the first two layers' widths, E what is fed to the first of each
candidate, U what it gets of the user.
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
from recsys.standing import STANDINGS

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]


class Ranking:
    """Hold one version's class head and the items that it judges."""

    def __init__(self, network: RecommendationNetwork, table: ItemTable, standing_IS: Tensor) -> None:
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
        self._items = table.column("vector"), standing_IS, table.column("classes")
        self._on_host = table.device.type == "cpu"
        if self._on_host:
            among_C, variance = self._rates.among()
            counting = among_C.numpy(), self._rates.worth_C.numpy(), float(variance)
            layers_in_order = (
                *(self._known_EC, self._known_user_CU.T, self._known_bias_C, self._user_HU.T, self._user_bias_H),
                *(self._vector_DH, self._product_DH, self._rest_EH),
                *(self._second.weight.T, self._second.bias, self._third.weight.T, self._third.bias),
            )
            layers_on_host = (each.detach().contiguous().numpy() for each in layers_in_order)
            self._host = *(each.numpy() for each in self._items), *counting, *layers_on_host

    def logits(self, states_BD: Tensor, context_BC: Tensor, user_BU: Tensor, rows_BK: Tensor) -> Tensor:
        """Return the logits over feedback classes: (B, K, C); `user_BU` are the network's `user_rates`."""
        if self._on_host:
            users_BU = torch.cat([states_BD, context_BC, user_BU], 1)
            logits_BKC = torch.empty(*rows_BK.shape, self._known_EC.shape[1])
            _judge(
                *(users_BU.numpy(), states_BD.shape[1], user_BU.shape[1], rows_BK.contiguous().numpy()),
                *(*self._host, logits_BKC.numpy()),
            )
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


@compiled_apart
def _add(x_2E: Floats, map_EH: Floats, found_2H: Floats) -> None:
    """Add the products of two vectors and a matrix, four rows at a time: so much more is done with what is fetched."""
    rows, width = x_2E.shape[1], found_2H.shape[1]
    first_E, second_E, one_H, other_H = x_2E[0], x_2E[1], found_2H[0], found_2H[1]
    whole = rows - rows % 4
    for row in range(0, whole, 4):
        a, b, c, d = first_E[row], first_E[row + 1], first_E[row + 2], first_E[row + 3]
        e, f, g, h = second_E[row], second_E[row + 1], second_E[row + 2], second_E[row + 3]
        for column in range(width):
            i, j, k, m = map_EH[row, column], map_EH[row + 1, column], map_EH[row + 2, column], map_EH[row + 3, column]
            one_H[column] += a * i + b * j + c * k + d * m
            other_H[column] += e * i + f * j + g * k + h * m
    for row in range(whole, rows):
        for column in range(width):
            one_H[column] += first_E[row] * map_EH[row, column]
            other_H[column] += second_E[row] * map_EH[row, column]


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
def _judge(
    users_BU: Floats,
    dimension: int,
    rates: int,
    rows_BK: Longs,
    vectors_ID: Floats,
    standing_IS: Floats,
    counts_IC: Floats,
    among_C: Floats,
    worth_C: Floats,
    variance: float,
    known_EC: Floats,
    known_UC: Floats,
    known_C: Floats,
    user_UH: Floats,
    user_H: Floats,
    vector_DH: Floats,
    product_DH: Floats,
    rest_EH: Floats,
    second_HG: Floats,
    second_G: Floats,
    third_GC: Floats,
    third_C: Floats,
    logits_BKC: Floats,
) -> None:
    """Write the logits of users, of whom the state comes first and the rates last; two candidates at a time."""
    fed, kept = dimension + rest_EH.shape[0], rows_BK.shape[1]
    map_EH, fed_2E = np.empty((fed, len(user_H)), np.float32), np.empty((2, fed), np.float32)
    map_EH[dimension:] = rest_EH
    counted_2E = fed_2E[:, fed - known_EC.shape[0] :]
    base_2H, hidden_2H = np.empty((2, len(user_H)), np.float32), np.empty((2, len(user_H)), np.float32)
    hidden_2G, base_2C = np.empty((2, len(second_G)), np.float32), np.empty((2, len(known_C)), np.float32)
    found_2C, user_2U = np.empty_like(base_2C), np.empty((2, users_BU.shape[1]), np.float32)
    for user in range(rows_BK.shape[0]):
        base_2H[:], base_2C[:], user_2U[:] = user_H, known_C + third_C, users_BU[user]
        _add(user_2U, user_UH, base_2H)
        _add(user_2U[:, user_2U.shape[1] - rates :], known_UC, base_2C)
        for row in range(dimension):
            for column in range(len(user_H)):
                map_EH[row, column] = vector_DH[row, column] + users_BU[user, row] * product_DH[row, column]
        for place in range(0, kept, 2):
            # Where they are odd the last is judged twice.
            other = min(place + 1, kept - 1)
            for each in range(2):
                row = rows_BK[user, other if each else place]
                _feed(row, vectors_ID, standing_IS, counts_IC, among_C, worth_C, variance, fed_2E[each])
            hidden_2H[:], hidden_2G[:], found_2C[:] = base_2H, second_G, base_2C
            _add(fed_2E, map_EH, hidden_2H)
            _rectify(hidden_2H)
            _add(hidden_2H, second_HG, hidden_2G)
            _rectify(hidden_2G)
            _add(hidden_2G, third_GC, found_2C)
            _add(counted_2E, known_EC, found_2C)
            logits_BKC[user, place], logits_BKC[user, other] = found_2C[0], found_2C[1]


@compiled_apart
def _rectify(found_2H: Floats) -> None:
    for each in range(2):
        for column in range(found_2H.shape[1]):
            found_2H[each, column] = max(found_2H[each, column], np.float32(0.0))
