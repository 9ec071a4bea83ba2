"""Drift: has the stream changed, and how? What the trainer finds while it tests feedback is watched by detectors.

The learner knows this door alone. Nothing here changes what is learned unless the setting `drift_boost` says so.
"""

from trainer.drift.drift import Drift
from trainer.drift.names import (
    DETECTED,
    DRIFT,
    ITEM_VECTORS,
    LEVELS,
    MEASURES,
    MIXES,
    NETWORK,
    detected_key,
    score_key,
)

__all__ = [
    "DETECTED",
    "DRIFT",
    "ITEM_VECTORS",
    "LEVELS",
    "MEASURES",
    "MIXES",
    "NETWORK",
    "Drift",
    "detected_key",
    "score_key",
]
