"""Centres: points that part a space, each row being its nearest one's; found by k-means in a sample of the rows.

They stand in two levels, so that to find the nearest takes about twice the root of their number of comparisons: first
among groups, then within one. It may miss a nearer one in another group: where a row lies is a matter of speed alone.
Shapes: N rows, V columns, A groups, L centres in all, C means.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Rows of the sample for each centre, and rounds of k-means.
SAMPLED = 16
ROUNDS = 4
# Rows whose distances are in memory at a time.
STRETCH = 8192
SEED = 7

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Centres:
    """Hold the centres of groups, those within all groups one after the other, and where each group's begin and end."""

    groups_AV: Floats
    centres_LV: Floats
    ends_A: Integers

    @classmethod
    def of(cls, rows_NV: Floats, count: int) -> Centres:
        """Find about `count` centres in a sample of rows, more where more are; the same rows give the same ones."""
        draw = np.random.default_rng(SEED)
        groups_AV = _means(rows_NV, max(1, round(np.sqrt(count))), draw)
        nearest_N, _ = _nearest(rows_NV, groups_AV)
        members = [rows_NV[nearest_N == group] for group in range(len(groups_AV))]
        centres = [_means(each, max(1, round(count * len(each) / len(rows_NV))), draw) for each in members]
        return cls(groups_AV, np.concatenate(centres), np.cumsum([len(each) for each in centres], dtype=np.int32))

    def __len__(self) -> int:
        """Return the number of centres."""
        return len(self.centres_LV)

    def nearest(self, rows_NV: Floats) -> tuple[Integers, Floats]:
        """Return the number of each row's centre, and the square of how far it is."""
        group_N, _ = _nearest(rows_NV, self.groups_AV)
        found_N, squared_N = np.empty(len(rows_NV), np.int32), np.empty(len(rows_NV), np.float32)
        order_N = np.argsort(group_N, kind="stable")
        rows_A = np.bincount(group_N, minlength=len(self.groups_AV)).cumsum()
        first = start = 0
        for end, last in zip(self.ends_A.tolist(), rows_A.tolist(), strict=True):
            here = order_N[first:last]
            nearest_N, squared_N[here] = _nearest(rows_NV[here], self.centres_LV[start:end])
            found_N[here] = start + nearest_N
            first, start = last, end
        return found_N, squared_N


def _means(rows_NV: Floats, count: int, draw: np.random.Generator) -> Floats:
    """Find `count` centres by Lloyd's rounds, from rows drawn; those that no row is nearest to are drawn anew."""
    width = rows_NV.shape[1]
    if not len(rows_NV):
        return np.zeros((count, width), np.float32)
    means_CV = rows_NV[draw.choice(len(rows_NV), count, replace=len(rows_NV) < count)]
    for _ in range(ROUNDS):
        nearest_N, _ = _nearest(rows_NV, means_CV)
        sizes_C = np.bincount(nearest_N, minlength=count)
        order_N = np.argsort(nearest_N, kind="stable")
        there = sizes_C > 0
        starts_C = (np.cumsum(sizes_C) - sizes_C)[there]
        means_CV[there] = np.add.reduceat(rows_NV[order_N], starts_C) / sizes_C[there, None]
        means_CV[~there] = rows_NV[draw.integers(0, len(rows_NV), int((~there).sum()))]
    return means_CV


def _nearest(rows_NV: Floats, means_CV: Floats) -> tuple[Integers, Floats]:
    """Return the place of the nearest mean of each row, and the square of how far it is."""
    found_N, squared_N = np.empty(len(rows_NV), np.int32), np.empty(len(rows_NV), np.float32)
    half_C = (means_CV * means_CV).sum(1) / 2
    for first in range(0, len(rows_NV), STRETCH):
        rows = rows_NV[first : first + STRETCH]
        near_NC = rows @ means_CV.T - half_C
        nearest_N = near_NC.argmax(1)
        here = slice(first, first + STRETCH)
        found_N[here] = nearest_N
        squared_N[here] = (rows * rows).sum(1) - 2 * near_NC[np.arange(len(rows)), nearest_N]
    return found_N, squared_N
