"""Hindsight: what was known of an item when an impression of it was given, from what is known now and what came since.

An impression is learned as such with what was known of its item then. Were what follows it learned with what is known
later, the two would differ in how much had been counted, and that alone would tell outcomes from impressions. All that
came since stands in the replay window, so a trainer that starts again finds the same. What came before the window began
is not known: trends begin there, and a count may be one too low for an older impression that was taken back since.

Shapes: M impressions, C feedback classes, S standings, E feedback on one item.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from recsys.item_table import ItemTable
from recsys.standing import AGE_SCALE, TOTAL_SCALE, TREND_DECAYS, TREND_FLOOR
from trainer.examples import Followed, ReplayWindow
from trainer.impressions import NONE

DECAY_S = np.array(TREND_DECAYS)


class Hindsight:
    """Look back from the item table as it stands; `positive_C` tells which classes are positive."""

    def __init__(self, window: ReplayWindow, table: ItemTable, positive_C: np.ndarray, provisional: int) -> None:
        self._window, self._table = window, table
        self._positive_C, self._provisional = positive_C, provisional

    def look(self, followed: Followed, item_M: Tensor, counts_MC: Tensor, standing_MS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the counts of classes and the standings that the items had, given those that they have.

        Trends are of the feedback in the window alone, and relative to what trends most today.
        """
        # Synchronises with the GPU: the replay window is the host's.
        rows_M, totals_M, firsts_M = (
            column.cpu().tolist()
            for column in (item_M, self._table.columns["total"][item_M], self._table.columns["first"][item_M])
        )
        counts, standings = counts_MC.cpu().double().numpy(), standing_MS.cpu().double().numpy()
        for m, age in enumerate(followed.age_M.tolist()):
            # Nothing was counted since the batch began.
            if age > 0:
                counts[m] = self._counts(rows_M[m], age, counts[m])
                standings[m] = self._standing(rows_M[m], age, totals_M[m], firsts_M[m], standings[m])
        return torch.from_numpy(counts).to(counts_MC), torch.from_numpy(standings).to(standing_MS)

    def _counts(self, row: int, age: int, counts_C: np.ndarray) -> np.ndarray:
        age_E, class_E, key_E = self._window.of_item(row)
        since_E = age_E <= age
        found_C = counts_C - np.bincount(class_E[since_E], minlength=len(counts_C))
        # Impressions that were taken back since were counted then, or are not counted now.
        opened = key_E[(class_E == self._provisional) & (key_E != NONE)]
        closed = key_E[since_E & (class_E != self._provisional)]
        found_C[self._provisional] += len(np.intersect1d(opened, closed))
        return np.maximum(found_C, 0)

    def _standing(self, row: int, age: int, total: float, first: int, standing_S: np.ndarray) -> np.ndarray:
        age_E, class_E, _ = self._window.of_item(row)
        positive_E = self._positive_C[class_E]
        found_S = standing_S.copy()
        for number, counted_E in enumerate((positive_E, np.ones_like(positive_E))):
            now_E, then_E = age_E[counted_E], age_E[counted_E & (age_E > age)] - age
            now_S, then_S = ((DECAY_S[:, None] ** (ages - 1)).sum(1) for ages in (now_E, then_E))
            here = slice(number * len(DECAY_S), (number + 1) * len(DECAY_S))
            found_S[here] += np.log(then_S + TREND_FLOOR) - np.log(now_S + TREND_FLOOR)
        since = float(positive_E[age_E <= age].sum())
        found_S[-2] = TOTAL_SCALE * math.log1p(max(0.0, total - since))
        clock = max(0, self._table.clock - age)
        # An item without any feedback counts as old as can be, unless it is known when it got its row.
        first = first if first <= clock else clock if self._table.dated else 0
        found_S[-1] = AGE_SCALE * (math.log1p(clock - first) - math.log1p(clock))
        return found_S
