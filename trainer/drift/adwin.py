"""Adwin: does a window of numbers fall into an earlier and a later part whose means surely differ?

Bifet and Gavalda, Learning from Time-Changing Data with Adaptive Windowing, 2007: with the bound of the paper, every
cut tried, as river's ADWIN does with buckets of one number. The window is bounded, so that its memory is, and a slow
trend of long ago is forgotten.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Numbers in the window at most; in the shorter part at least; before anything is judged.
WINDOW = 128
LEAST_PART = 5
GRACE = 10

Memory = NDArray[np.float64]


class Adwin:
    """Judge numbers one by one; all it remembers is in `memory`, zeros at first.

    `delta` bounds the chance that a window without a change is cut. `score` is the later mean less the earlier one at
    the clearest cut, as a share of what a detection takes: beyond 1 the numbers rose, below -1 they fell.
    """

    SIZE = 2 + WINDOW

    def __init__(self, delta: float, memory: Memory) -> None:
        self._delta = delta
        self._count, self._score, self._values = memory[:1], memory[1:2], memory[2:]

    @property
    def score(self) -> float:
        """Return how near the window is to a detection, and in which direction."""
        return float(self._score[0])

    def update(self, value: float, unit: float = 1.0) -> bool:
        """Take a number; return whether the window changed, after which the caller clears it.

        The bound is for numbers that lie within one `unit`, or nearly so.
        """
        count = int(self._count[0])
        if count == WINDOW:
            self._values[:-1] = self._values[1:]
            count -= 1
        self._values[count] = value
        self._count[0] = count = count + 1
        self._score[0] = self._judge(self._values[:count], unit) if count > GRACE else 0.0
        return abs(self.score) > 1.0

    def _judge(self, values: Memory, unit: float) -> float:
        count = len(values)
        earlier, later, reciprocal, root = _cuts(count)
        sums = values.cumsum()
        total = float(sums[-1])
        mean = total / count
        variance = max(0.0, float(values @ values) / count - mean * mean)
        before = sums[LEAST_PART - 1 : count - LEAST_PART]
        rise = (total - before) / later - before / earlier
        surprise = math.log(2 * math.log(count) / self._delta)
        share = rise / (root * math.sqrt(variance * surprise) + reciprocal * (2 / 3 * surprise * unit))
        lowest, highest = float(share.min()), float(share.max())
        return highest if highest > -lowest else lowest

    def clear(self) -> None:
        """Forget all numbers; the score stays until the next one."""
        self._count[0] = 0


@lru_cache(WINDOW)
def _cuts(count: int) -> tuple[Memory, Memory, Memory, Memory]:
    """Return for each cut of a window the length of both parts, and what the bound takes from these alone."""
    earlier = np.arange(LEAST_PART, count - LEAST_PART + 1, dtype=np.float64)
    later = count - earlier
    reciprocal = 1 / (earlier - LEAST_PART + 1) + 1 / (later - LEAST_PART + 1)
    return earlier, later, reciprocal, np.sqrt(2 * reciprocal)
