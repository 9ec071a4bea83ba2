"""Ranking: the network's class head over a user's candidates, which share all that depends on the user alone.

The head's first layer is linear in state, item, state x item, context and rates. Of what it makes of the state and the
item, the item's part is a matrix of the user's own, so that half of the products are left, and nothing is repeated for
every candidate. The numbers are those of RecommendationNetwork.class_logits.
Shapes as in recsys.network; K candidates, H the first layer's width, E what is fed to it of each candidate.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.item_table import STANDINGS
from recsys.network import CONTEXT_WIDTH, RecommendationNetwork


class Ranking:
    """Hold one version's class head."""

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
        self._known_EC = known_item.T

    def logits(
        self,
        states_BD: Tensor,
        context_BC: Tensor,
        user_BU: Tensor,
        vectors_BKD: Tensor,
        standing_BKS: Tensor,
        item_counts_BKC: Tensor,
    ) -> Tensor:
        """Return the logits over feedback classes: (B, K, C); `user_BU` are the network's `user_rates`."""
        batch, dimension = states_BD.shape
        item_BKE = self._rates.item(item_counts_BKC)
        user_BH = F.linear(torch.cat([states_BD, context_BC, user_BU], 1), self._user_HU, self._user_bias_H)
        fed_BKE = torch.cat([vectors_BKD, standing_BKS, item_BKE], 2)
        maps_BEH = states_BD.new_empty(batch, fed_BKE.shape[2], user_BH.shape[1])
        torch.addcmul(self._vector_DH, states_BD[:, :, None], self._product_DH, out=maps_BEH[:, :dimension])
        maps_BEH[:, dimension:] = self._rest_EH
        hidden_BKH = torch.baddbmm(user_BH[:, None], fed_BKE, maps_BEH).relu_()
        logits_BKC = self._third(self._second(hidden_BKH).relu_())
        known_BC = F.linear(user_BU, self._known_user_CU, self._known_bias_C)
        found: Tensor = logits_BKC + known_BC[:, None] + item_BKE @ self._known_EC
        return found
