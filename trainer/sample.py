"""Sample: some rows of a large table that stand for all, so that a step costs what it touches and not what there is.

What feedback was on lately, and what was chosen lately, is among them for certain: it trends most, and is most of what
histories do not lead to.
Of the rest some rows are drawn, all alike, as negatives are; each stands for as many as there are to one drawn, so that
sums over them are in the mean those over all rows. Rows that are free or cold (see trainer.contents) are left out:
nobody chose what they hold. Shapes: N rows of the sample, U rows looked at, X rows left out, S standings.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recsys.item_table import PADDING_ROW, ItemTable
from recsys.standing import COLUMNS, SLOWEST_TREND, TREND_FLOOR, Standing

# A table with more rows is looked at by a sample: from about here on that costs less (see benchmarks/RESULTS.md).
MANY_ROWS = 1 << 14
# So much of the newest feedback, and so many of the newest choices, say which items are among it for certain; so many
# rows are drawn.
LATELY, DRAWN = 4096, 2048
# What its random numbers are for: one number a purpose, beside those of learner, gate and epochs.
SAMPLING = 4
# Users whose items are ranked together: what histories of one of them lead to is looked at for all.
TOGETHER = 64

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Drawn(NamedTuple):
    """Hold rows that were drawn alike from a population: what has items, but for some rows that were left out.

    Rows that are left out, ascending, are the free ones too.
    """

    rows_N: Rows
    population: int
    left_out_X: Rows


class Among(NamedTuple):
    """Hold the rows that some users' items are ranked among, ascending, with how many rows each stands for.

    `certain_C` are those of them that were looked at for certain.
    """

    rows_U: Rows
    weight_U: Floats
    certain_C: Rows


class Sample:
    """Stand for all rows of a table as of its clock; the same rows of another table are `of` that."""

    def __init__(self, table: ItemTable, certain_N: Rows, drawn: Drawn) -> None:
        """Take rows that are among it for certain, which may repeat themselves, and those drawn, ascending."""
        self._table, self._certain, self._drawn = table, certain_N, drawn
        self._largest_T: Floats | None = None
        rows_N, weight_N, _ = self.among(certain_N)
        found = self._standing(rows_N)
        # The trends of all rows asked for are told from these: feedback was lately on what trends most.
        self._largest_T = found.largest_T
        slowest_N = found.rows_IS[:, SLOWEST_TREND].astype(np.float64)
        # What was left out trends as little as can be.
        idle = table.rows - float(weight_N.sum(dtype=np.float64))
        least = TREND_FLOOR * math.exp(-found.largest_T[SLOWEST_TREND])
        self._log_total = math.log(float((weight_N * np.exp(slowest_N)).sum()) + idle * least)

    @classmethod
    def draw(
        cls, table: ItemTable, lately_N: npt.NDArray[np.integer], cold_X: Rows, random: np.random.Generator
    ) -> Sample:
        """Draw from a table whose cold rows, ascending, are given; feedback was on `lately_N` lately."""
        population = len(table) - len(cold_X)
        number_N = 1 + np.sort(random.choice(population, min(DRAWN, population), replace=False, shuffle=False))
        drawn = Drawn(table.used_rows(number_N, cold_X), population, table.left_out(cold_X))
        return cls(table, np.unique(lately_N).astype(np.int64), drawn)

    def of(self, table: ItemTable, certain_C: Rows | None = None) -> Sample:
        """Return the same rows of another table that has them all, of which some more are looked at for certain."""
        found = Sample(table, self._certain, self._drawn)
        if certain_C is not None:
            found._certain = certain_C
        return found

    def among(self, certain_N: npt.NDArray[np.integer]) -> Among:
        """Return the sample where these rows are looked at for certain besides its own."""
        drawn_N, population, left_out_X = self._drawn
        certain_U = np.unique(np.concatenate([self._certain, certain_N.ravel(), [PADDING_ROW]])).astype(np.int64)
        drawn_N = drawn_N[~_within(certain_U, drawn_N)]
        # The padding row is no part of the population either.
        certain = len(certain_U) - 1 - np.count_nonzero(_within(left_out_X, certain_U))
        stands_for = (population - certain) / max(1, len(drawn_N))
        place_N = np.searchsorted(certain_U, drawn_N)
        rows_U = np.insert(certain_U, place_N, drawn_N)
        weight_U = np.insert(np.ones(len(certain_U), np.float32), place_N, np.float32(stands_for))
        return Among(rows_U, weight_U, certain_U)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the standing of any rows, as ItemTable.standing has it: (..., S)."""
        return torch.from_numpy(self._standing(rows.numpy().ravel()).rows_IS).view(*rows.shape, -1)

    def log_share(self, item_B: Tensor) -> Tensor:
        """Return the logarithm of rows' shares of choices at the slowest trend's speed."""
        return self[item_B][:, SLOWEST_TREND] - self._log_total

    def _standing(self, rows_N: Rows) -> Standing:
        columns = {name: self._table.columns[name].numpy()[rows_N] for name in COLUMNS}
        return Standing.of(columns, len(rows_N), self._table.clock, largest_T=self._largest_T)


def _within(ascending_X: Rows, rows_N: Rows) -> npt.NDArray[np.bool_]:
    """Tell which rows are among others, of which there may be many more."""
    if not len(ascending_X):
        return np.zeros(len(rows_N), np.bool_)
    found_N: npt.NDArray[np.bool_] = (
        ascending_X[np.minimum(np.searchsorted(ascending_X, rows_N), len(ascending_X) - 1)] == rows_N
    )
    return found_N


# What is known of rows whoever asks: of all (I, S), or of those asked for; either way `standing[rows]` has it.
Standings: TypeAlias = Tensor | Sample
