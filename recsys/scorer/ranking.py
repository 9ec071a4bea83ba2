"""Ranking: the network's class head over a user's candidates, which share all that depends on the user alone.

The head's first layer is linear in state, item, state x item, context and rates. Of what it makes of the state and the
item, the item's part is a matrix of the user's own, so that half of the products are left, and nothing is repeated for
every candidate. The numbers are those of RecommendationNetwork.class_logits.
Shapes as in recsys.network; K candidates, H the first layer's width, E what is fed to it of each candidate.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.compiled import compiled
from recsys.item_table import STANDINGS, ItemTable
from recsys.network import CONTEXT_WIDTH, RecommendationNetwork
from recsys.rates import PRIOR

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
            self._counting = (
                *(each.numpy() for each in (among_C, self._rates.worth_C)),
                float(variance),
                self._known_EC.detach().numpy(),
            )

    def logits(self, states_BD: Tensor, context_BC: Tensor, user_BU: Tensor, rows_BK: Tensor) -> Tensor:
        """Return the logits over feedback classes: (B, K, C); `user_BU` are the network's `user_rates`."""
        batch, dimension = states_BD.shape
        fed_BKE, known_BKC = self._feed(rows_BK)
        user_BH = F.linear(torch.cat([states_BD, context_BC, user_BU], 1), self._user_HU, self._user_bias_H)
        maps_BEH = states_BD.new_empty(batch, fed_BKE.shape[2], user_BH.shape[1])
        torch.addcmul(self._vector_DH, states_BD[:, :, None], self._product_DH, out=maps_BEH[:, :dimension])
        maps_BEH[:, dimension:] = self._rest_EH
        hidden_BKH = torch.baddbmm(user_BH[:, None], fed_BKE, maps_BEH).relu_()
        logits_BKC = self._third(self._second(hidden_BKH).relu_())
        known_BC = F.linear(user_BU, self._known_user_CU, self._known_bias_C)
        found: Tensor = logits_BKC + known_BC[:, None] + known_BKC
        return found

    def _feed(self, rows_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first layer gets of each row (B, K, E), and what counting alone says of it (B, K, C)."""
        if self._on_host:
            # In torch's memory: by the alignment of others the last bits of products would differ from batch to batch.
            fed_BKE = torch.empty(*rows_BK.shape, self._product_DH.shape[0] + len(self._rest_EH))
            known_BKC = torch.empty(*rows_BK.shape, self._known_EC.shape[1])
            items = (each.numpy() for each in self._items)
            _feed(rows_BK.contiguous().numpy(), *items, *self._counting, fed_BKE.numpy(), known_BKC.numpy())
            return fed_BKE, known_BKC
        vectors_BKD, standing_BKS, counts_BKC = (each[rows_BK] for each in self._items)
        item_BKE = self._rates.item(counts_BKC)
        return torch.cat([vectors_BKD, standing_BKS, item_BKE], 2), item_BKE @ self._known_EC


@compiled
def _feed(
    rows_BK: Longs,
    vectors_ID: Floats,
    standing_IS: Floats,
    counts_IC: Floats,
    among_C: Floats,
    worth_C: Floats,
    variance: float,
    known_EC: Floats,
    fed_BKE: Floats,
    known_BKC: Floats,
) -> None:
    """Gather what is known of rows, with Rates.item of their counts: one pass over memory that lies anywhere."""
    users, kept = rows_BK.shape
    width, standings, classes = vectors_ID.shape[1], standing_IS.shape[1], len(among_C)
    end = width + standings
    for user in range(users):
        for place in range(kept):
            row = rows_BK[user, place]
            for column in range(width):
                fed_BKE[user, place, column] = vectors_ID[row, column]
            for column in range(standings):
                fed_BKE[user, place, width + column] = standing_IS[row, column]
            total = np.float32(0.0)
            for each in range(classes):
                total += counts_IC[row, each]
            deviation, prior = np.float32(0.0), np.float32(PRIOR)
            for each in range(classes):
                count, among = counts_IC[row, each], among_C[each]
                fed_BKE[user, place, end + each] = math.log((count / among + prior) / (total + prior))
                deviation += ((count + prior * among) / (total + prior) - among) * worth_C[each]
            fed_BKE[user, place, end + classes] = deviation / variance
            fed_BKE[user, place, end + classes + 1] = math.log1p(total) / np.float32(4.0)
            for each in range(classes):
                sum_ = np.float32(0.0)
                for column in range(classes + 2):
                    sum_ += fed_BKE[user, place, end + column] * known_EC[column, each]
                known_BKC[user, place, each] = sum_
