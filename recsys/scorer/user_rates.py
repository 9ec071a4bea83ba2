"""UserRates: what counting says of a user and of the request's context, as the network computes it.

The numbers are those of RecommendationNetwork.user_rates and context_vectors. On the CPU they are one loop over users:
a batch of short histories is little work and many small steps.
Shapes as in recsys.network and recsys.rates.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.compiled import compiled_apart
from recsys.item_table import AUDIENCE_REACH, ItemTable
from recsys.network import Histories, RecommendationNetwork
from recsys.rates import FADING, PRIOR, RESIDUAL_PRIOR

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]


class UserRates:
    """Hold what one version has counted by class, of items once they are installed."""

    def __init__(self, network: RecommendationNetwork) -> None:
        self._network = network
        rates = network.rates
        self._on_host = rates.context_counts.device.type == "cpu"
        if not self._on_host:
            return
        among_C, variance = rates.among()
        self._counts = tuple(each.numpy() for each in (rates.context_counts, among_C, rates.worth_C))
        self._variance, self._histories_tell = float(variance), rates.histories_tell
        self._context_XC = network.context.weight.detach().numpy()

    def install(self, table: ItemTable) -> None:
        """Take the items of the version, which are looked at where they are."""
        self._table = table
        if self._on_host:
            self._counted = *(table.column(name).numpy() for name in ("classes", "audience")), *self._counts

    def __call__(self, histories: Histories, buckets_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the context's vectors (B, CONTEXT_WIDTH) and the rates (B, user_width)."""
        if not self._on_host:
            network = self._network
            return network.context_vectors(buckets_BP), network.user_rates(histories, self._table, buckets_BP)
        # In torch's memory: by the alignment of others the last bits of products would differ from batch to batch.
        context_BC = torch.zeros(len(histories), self._context_XC.shape[1])
        rates_BU = torch.zeros(len(histories), self._network.rates.user_width)
        _count(
            *(histories.rows_BL.numpy(), histories.classes_BL.numpy(), buckets_BP.numpy()),
            *(*self._counted, self._variance, self._histories_tell, self._context_XC),
            *(rates_BU.numpy(), context_BC.numpy()),
        )
        return context_BC, rates_BU


@compiled_apart
def _add_above(counts_C: Floats, among_C: Floats, found_C: Floats) -> None:
    """Add how much more often each class came than among all, on a log scale."""
    total, prior = np.float32(0.0), np.float32(PRIOR)
    for each in range(len(counts_C)):
        total += counts_C[each]
    for each in range(len(counts_C)):
        found_C[each] += math.log((counts_C[each] / among_C[each] + prior) / (total + prior))


@compiled_apart
def _count(
    rows_BL: Longs,
    classes_BL: Longs,
    buckets_BP: Longs,
    counts_IC: Floats,
    audience_IC: Floats,
    context_counts_XC: Floats,
    among_C: Floats,
    worth_C: Floats,
    variance: float,
    histories_tell: bool,
    context_XC: Floats,
    rates_BU: Floats,
    context_BC: Floats,
) -> None:
    """Count into `rates_BU` and `context_BC`, which hold zeros."""
    users, length = rows_BL.shape
    classes = len(among_C)
    observed_C, expected_C = np.empty(classes, np.float32), np.empty(classes, np.float32)
    prior = np.float32(PRIOR)
    for user in range(users):
        own_U = rates_BU[user]
        own_C, pairs_C = own_U[classes : 2 * classes], own_U[2 * classes : 3 * classes]
        observed_C[:], expected_C[:] = 0.0, 0.0
        size, weight, entries, known = np.float32(0.0), np.float32(1.0), 0, 0
        for place in range(length - 1, -1, -1):
            row = rows_BL[user, place]
            if row and classes_BL[user, place]:
                entries += 1
                if histories_tell:
                    total = np.float32(0.0)
                    for each in range(classes):
                        total += counts_IC[row, each]
                    for each in range(classes):
                        expected_C[each] += weight * (counts_IC[row, each] + prior * among_C[each]) / (total + prior)
                    observed_C[classes_BL[user, place] - 1] += weight
                    size += weight
                elif place >= length - AUDIENCE_REACH:
                    known += 1
                    _add_above(audience_IC[row], among_C, own_C)
            weight *= np.float32(FADING)
        if histories_tell:
            residual = np.float32(0.0)
            for each in range(classes):
                mean = expected_C[each] / size if size > 0 else among_C[each]
                own_C[each] = math.log((observed_C[each] / mean + prior) / (size + prior))
                residual += (observed_C[each] - expected_C[each]) * worth_C[each]
            own_U[3 * classes] = residual / (size + np.float32(RESIDUAL_PRIOR)) / variance
        elif known:
            for each in range(classes):
                own_C[each] /= known
        pairs = 0
        for place in range(buckets_BP.shape[1]):
            bucket = buckets_BP[user, place]
            if bucket >= 0:
                pairs += 1
                _add_above(context_counts_XC[bucket], among_C, pairs_C)
                for column in range(context_XC.shape[1]):
                    context_BC[user, column] += context_XC[bucket, column]
        for each in range(classes):
            own_U[each] = math.log(among_C[each])
            if pairs:
                pairs_C[each] /= pairs
        own_U[3 * classes + 1] = math.log1p(np.float32(entries)) / np.float32(4.0)
