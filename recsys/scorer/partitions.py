"""Partitions: rows that are alike lie together, so that a user needs to look only where the best may be.

A row is taken with its vector and its standing, and belongs to the partition of the nearest centre; those that are far
from any, which no mean and spread would foretell, have the last partition, where everyone looks. What a user makes of a
partition's rows has the mean of these rows, by the user's weights, and a spread; how far above both the best of them
may be is for who looks to say.
Shapes: I rows, D columns of vectors and S of standings, V of both, L partitions, R rows that a version changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart
from recsys.scorer.centres import SAMPLED, Centres
from recsys.scorer.places import Places

# Rows to a partition. Smaller ones are told apart better, but there are more of them to be told apart.
TOGETHER = 192
# The share of rows that are far from any centre when these are found.
FAR = 0.004
# Rows that may have come or moved, of those there were, before the centres are looked for anew; and of how many rows
# there must be room for another one.
MOVED = 0.5
SPARE = 32
SEED = 11
# Each user looks first at so many partitions or more.
FIRST = 8
# Rows whose nearest centres are looked for at a time.
STRETCH = 65_536
# Of a column whose numbers are all alike.
LEAST_VARIANCE = 1e-12

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int32]
Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Partitions:
    """Hold the partitions of one version's rows; where the rows lie is moved along from version to version."""

    centres: Centres
    scale_V: Floats
    # The square of how far from its centre a row of a partition is at most.
    reach: float
    places: Places
    # Of the vectors: sums, and sums of squares.
    sums_2LD: Doubles
    mean_LV: Floats
    variance_LV: Floats
    # Rows that came or moved since the centres were found.
    moved: int

    @classmethod
    def of(cls, vectors_ID: Floats, standing_IS: Floats, capacity: int) -> Partitions:
        """Part all rows, with room for `capacity`."""
        rows = len(vectors_ID)
        draw = np.random.default_rng(SEED)
        count = -(-rows // TOGETHER)
        sample = np.sort(draw.choice(rows, min(rows, SAMPLED * count), replace=False))
        scale_V = _scale(vectors_ID[sample], standing_IS[sample])
        sample_NV = np.concatenate([vectors_ID[sample], standing_IS[sample]], 1) * scale_V
        centres = Centres.of(sample_NV, count)
        reach = float(np.quantile(centres.nearest(sample_NV)[1], 1 - FAR))
        partition_I = _nearest(centres, reach, vectors_ID, standing_IS, scale_V)
        sums_2LD = np.zeros((2, len(centres) + 1, vectors_ID.shape[1]))
        _add(sums_2LD, vectors_ID, np.arange(rows), partition_I, 1.0)
        described = _describe(sums_2LD, standing_IS, partition_I)
        places = Places.of(partition_I, len(centres) + 1, capacity)
        return cls(centres, scale_V, reach, places, sums_2LD, *described, 0)

    def after(
        self, before_KD: Floats, changed_R: Longs, vectors_RD: Floats, standing_IS: Floats
    ) -> tuple[Partitions, Integers]:
        """Return what they are once these rows, ascending, have these vectors and all rows these standings.

        The first K of the rows had other vectors before, the rest are new. With it comes the partition of each row that
        changed, where `places` moves it then.
        """
        to_R = _nearest(self.centres, self.reach, vectors_RD, standing_IS[changed_R], self.scale_V)
        partition_I = self.places.partition_I[: len(standing_IS)].copy()
        known_K = changed_R[: len(before_KD)]
        moved = len(changed_R) - int((partition_I[known_K] == to_R[: len(known_K)]).sum())
        sums_2LD = self.sums_2LD.copy()
        _add(sums_2LD, before_KD, np.arange(len(known_K)), partition_I[known_K], -1.0)
        _add(sums_2LD, vectors_RD, np.arange(len(changed_R)), to_R, 1.0)
        partition_I[changed_R] = to_R
        mean_LV, variance_LV = _describe(sums_2LD, standing_IS, partition_I)
        after = replace(self, sums_2LD=sums_2LD, mean_LV=mean_LV, variance_LV=variance_LV, moved=self.moved + moved)
        return after, to_R

    def fit(self, rows: int, changed: int) -> bool:
        """Tell whether so many rows, and so many that change, have room."""
        return self.places.fit(rows, changed)

    def worn(self, rows: int) -> bool:
        """Tell whether they should be found anew: many of so many rows have come or moved, or room runs out."""
        more = rows // SPARE
        return self.moved > MOVED * rows or not self.places.fit(rows + more, more)

    def hopes(self, weights_BV: Floats, spreads: float) -> Floats:
        """Return for each user and partition a score, without transitions, that its rows hardly exceed: (B, L).

        It lies so many spreads above the mean, as the columns spread each by itself.
        """
        variance_BL = (weights_BV * weights_BV) @ self.variance_LV.T
        np.sqrt(variance_BL, out=variance_BL)
        variance_BL *= np.float32(spreads)
        hopes_BL: Floats = np.add(weights_BV @ self.mean_LV.T, variance_BL, out=variance_BL)
        hopes_BL[:, -1] = np.inf
        return hopes_BL

    def first(self, hopes_BL: Floats, rows: int) -> Floats:
        """Return the hope that the partitions have where each user looks first, those with about so many rows: (B)."""
        size = max(1, len(self.places.partition_I) // len(self.mean_LV))
        place = max(0, hopes_BL.shape[1] - max(FIRST, -(-rows // size)))
        least_B: Floats = np.partition(hopes_BL, place, axis=1)[:, place]
        return least_B


def _scale(vectors_ND: Floats, standing_NS: Floats) -> Floats:
    """Return how much each column counts: those of the standing, each alike, as much as all those of the vector."""
    whole = vectors_ND.var(0).sum() / standing_NS.shape[1]
    scale_S = np.sqrt(whole / np.maximum(standing_NS.var(0), LEAST_VARIANCE))
    return np.concatenate([np.ones(vectors_ND.shape[1]), scale_S]).astype(np.float32)


def _nearest(centres: Centres, reach: float, vectors_ND: Floats, standing_NS: Floats, scale_V: Floats) -> Integers:
    """Return the partition of each row."""
    found_N = np.empty(len(vectors_ND), np.int32)
    # A stretch at a time: all rows side by side would be another copy of them.
    for first in range(0, len(vectors_ND), STRETCH):
        here = slice(first, first + STRETCH)
        nearest_N, squared_N = centres.nearest(np.concatenate([vectors_ND[here], standing_NS[here]], 1) * scale_V)
        found_N[here] = np.where(squared_N > reach, len(centres), nearest_N)
    return found_N


def _describe(sums_2LD: Doubles, standing_IS: Floats, partition_I: Integers) -> tuple[Floats, Floats]:
    """Return the mean and the variance of each column in each partition."""
    count_L = np.bincount(partition_I, minlength=sums_2LD.shape[1]).astype(np.float64)
    sums_2LS = np.zeros((2, len(count_L), standing_IS.shape[1]))
    _add(sums_2LS, standing_IS, np.arange(len(standing_IS)), partition_I, 1.0)
    sums_2LV: Doubles = np.concatenate([sums_2LD, sums_2LS], 2) / np.maximum(count_L, 1.0)[:, None]
    mean_LV: Floats = sums_2LV[0].astype(np.float32)
    variance_LV: Floats = (sums_2LV[1] - sums_2LV[0] ** 2).astype(np.float32)
    return mean_LV, np.maximum(variance_LV, np.float32(0.0))


@compiled_apart
def _add(sums_2LV: Doubles, rows_NV: Floats, which_R: Longs, partition_R: Integers, sign: float) -> None:
    """Add rows and their squares to their partitions' sums, or take them away."""
    for place in range(len(which_R)):
        row, partition = which_R[place], partition_R[place]
        for column in range(rows_NV.shape[1]):
            value = np.float64(rows_NV[row, column])
            sums_2LV[0, partition, column] += sign * value
            sums_2LV[1, partition, column] += sign * value * value
