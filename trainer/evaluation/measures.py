"""Measures: what ranks, probabilities and predicted values were worth; pure functions of arrays.

Shapes: B feedback, C feedback classes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from trainer.probabilities import Flags, auc, calibration_error
from trainer.probabilities import Floats as Floats
from trainer.quality import Rows, gains_at

CUTOFFS = (1, 5, 10, 20)
# A probability counts as at least this, so that one certain mistake does not outweigh a stream.
LEAST_PROBABILITY = 1e-7


def accuracy(rank_B: Rows, cutoffs: tuple[int, ...] = CUTOFFS) -> dict[str, float]:
    """Return HR, NDCG and MRR at each cutoff over ranks, of which 0 is a miss; {} without any."""
    if not len(rank_B):
        return {}
    found: dict[str, float] = {}
    for name, column in (("hr", 0), ("ndcg", 1), ("mrr", 2)):
        found |= {f"{name}_at_{k}": float(gains_at(rank_B, k)[:, column].mean()) for k in cutoffs}
    return found


def moving(rank_B: Rows, window: int, step: int, cutoff: int) -> tuple[list[int], list[float]]:
    """Return the hit rate at `cutoff` over the last `window` events, and where each window ends, every `step` events.

    The first windows are shorter.
    """
    hits = np.concatenate([[0], np.cumsum((rank_B > 0) & (rank_B <= cutoff))])
    ends = np.arange(step, len(rank_B) + 1, step)
    starts = np.maximum(0, ends - window)
    return ends.tolist(), ((hits[ends] - hits[starts]) / (ends - starts)).tolist()


def tenths(count: int) -> list[slice]:
    """Cut `count` feedback into ten parts, as equal as can be."""
    edges = [count * n // 10 for n in range(11)]
    return [slice(start, end) for start, end in pairwise(edges)]


def log_loss(happened_B: Flags, probability_B: Floats) -> float:
    """Return the mean cross-entropy in nats of probabilities of yes or no."""
    p_B = np.clip(probability_B.astype(np.float64), LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    return float(-np.where(happened_B, np.log(p_B), np.log1p(-p_B)).mean())


def clicks(happened_B: Flags, probability_B: Floats) -> dict[str, float | None]:
    """Return AUC (None where it has no meaning), log loss and calibration error of probabilities of yes or no."""
    both = happened_B.any() and not happened_B.all()
    return {
        "auc": auc(happened_B, probability_B) if both else None,
        "log_loss": log_loss(happened_B, probability_B),
        "calibration_error": calibration_error(happened_B, probability_B),
    }


def values(actual_B: Floats, mean_B: Floats, median_B: Floats) -> dict[str, float]:
    """Return the mean absolute error of predicted medians and the root mean squared error of predicted means.

    Each is the prediction that its measure asks for; a method that has but one gives it twice.
    """
    error_B, absolute_B = mean_B.astype(np.float64) - actual_B, np.abs(median_B.astype(np.float64) - actual_B)
    return {"mae": float(absolute_B.mean()), "rmse": float(np.sqrt(np.square(error_B).mean()))}


def class_report(actual_B: Rows, predicted_B: Rows, names: list[str]) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of each class, 0 where there is nothing to divide by, and how often it came."""
    size = len(names)
    matrix = np.bincount(actual_B.astype(np.int64) * size + predicted_B, minlength=size * size).reshape(size, size)
    hits, came, said = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    precision, recall = hits / np.maximum(1, said), hits / np.maximum(1, came)
    f1 = 2 * hits / np.maximum(1, came + said)
    rows = zip(names, precision.tolist(), recall.tolist(), f1.tolist(), came.tolist(), strict=True)
    return [dict(zip(("class", "precision", "recall", "f1", "count"), row, strict=True)) for row in rows]
