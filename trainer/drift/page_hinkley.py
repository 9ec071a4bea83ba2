"""PageHinkley: have numbers risen above their mean for longer than chance allows?

Page, Continuous Inspection Schemes, 1954, with the fading sum of Sebastiao and Fernandes, 2017; as river's PageHinkley
with mode "up".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST_COUNT = 30
FADING = 1 - 0.0001


class PageHinkley:
    """Judge numbers one by one; all it remembers is in `memory`, zeros at first.

    What lies above the mean so far by more than `tolerance` units is summed up; `threshold` is by how many units the
    sum rises above its lowest for a detection. `score` is how far it rose, as a share of that.
    """

    SIZE = 5

    def __init__(self, tolerance: float, threshold: float, memory: NDArray[np.float64]) -> None:
        self._tolerance, self._threshold = tolerance, threshold
        # How many numbers, their mean, the sum, its lowest; the score.
        self._sums, self._score = memory[:4], memory[4:]

    @property
    def score(self) -> float:
        """Return how near the numbers are to a detection."""
        return float(self._score[0])

    def update(self, value: float, unit: float = 1.0) -> bool:
        """Take a number; return whether they rose, after which the caller clears what is summed up."""
        count, mean, total, lowest = self._sums.tolist()
        count += 1
        mean += (value - mean) / count
        total = FADING * total + value - mean - self._tolerance * unit
        lowest = total if count == 1 else min(lowest, total)
        self._sums[:] = count, mean, total, lowest
        self._score[0] = (total - lowest) / (self._threshold * unit) if count >= LEAST_COUNT else 0.0
        return self.score > 1.0

    def clear(self) -> None:
        """Forget all numbers; the score stays until the next one."""
        self._sums[:] = 0
