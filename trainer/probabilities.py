"""Probabilities: what was said of yes or no beforehand, measured against what happened; pure functions of arrays.

Shapes: B feedback.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Bins of equal width for the calibration error.
BINS = 15

Floats = npt.NDArray[np.floating[Any]]
Flags = npt.NDArray[np.bool_]


def auc(happened_B: Flags, score_B: Floats) -> float:
    """Return the probability that what happened scores higher than what did not, ties half; NaN without both."""
    positives = int(happened_B.sum())
    negatives = len(happened_B) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(score_B, return_inverse=True, return_counts=True)
    # The mean of the ranks, from 1, that equal scores share.
    rank = np.cumsum(counts) - (counts - 1) / 2
    above = rank[inverse][happened_B].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def calibration_error(happened_B: Flags, probability_B: Floats) -> float:
    """Return the expected calibration error over BINS bins of equal width (Naeini et al. 2015).

    That is the mean of |share that happened - mean probability| of each bin, weighted by what is in it.
    """
    bin_B = np.minimum((probability_B.astype(np.float64) * BINS).astype(np.int64), BINS - 1)
    difference = np.bincount(bin_B, happened_B - probability_B.astype(np.float64), BINS)
    return float(np.abs(difference).sum() / len(happened_B))
