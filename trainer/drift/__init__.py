"""Drift: has the stream changed, and how? What the trainer finds while it tests feedback is watched by detectors.

The learner knows this door alone. By it what followed items fades once that misleads (setting `drift_fading`), and
rates rise while accuracy is down, if the setting `drift_boost` says so.
"""

from trainer.drift.drift import Drift
from trainer.drift.misled import CHOICES
from trainer.drift.names import (
    CATEGORY_MEMORY,
    DETECTED,
    DRIFT,
    ITEM_VECTORS,
    LEVELS,
    MEASURES,
    MISLED,
    MIXES,
    NETWORK,
    TRANSITIONS,
    detected_key,
    score_key,
)

__all__ = [
    "CATEGORY_MEMORY",
    "CHOICES",
    "DETECTED",
    "DRIFT",
    "ITEM_VECTORS",
    "LEVELS",
    "MEASURES",
    "MISLED",
    "MIXES",
    "NETWORK",
    "TRANSITIONS",
    "Drift",
    "detected_key",
    "score_key",
]
