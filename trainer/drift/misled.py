"""Misled: has what followed items become misleading? Would less of it have foreseen the newest choices better?

The share that the transition memory gives to a choice, smoothed over all items, is compared with what it would be if
all that was counted weighed less: of two such learners the one that foresees the newest better is right (Bach and
Maloof, Paired Learners for Concept Drift, 2008). A change after which choices are harder to foresee but the memory is
as right as before, new tastes for one, is none here; nor is a world in which it never was.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from recsys.network import TRANSITION_FLOOR

# Choices that are judged together.
CHOICES = 128
# In standard errors, how sure it must be that less is better; in nats, by how much it is, and was worse before.
ERRORS = 4.0
LEAST_GAIN = 0.02
# What the gain that is usual keeps of itself at a block.
USUAL = 1 - 1 / 16
# What is spread evenly over all items: the memory's floor, for so many at least and at most. It must be like what leads
# anywhere, some 200 in a catalog that is known well, or neither would tell by how much the other counts.
LEAST_SPREAD, MOST_SPREAD = TRANSITION_FLOOR * 1024, TRANSITION_FLOOR * 4096

Floats = NDArray[np.float64]


class Misled:
    """Judge choices by blocks; all it remembers is in `memory`, zeros at first."""

    SIZE = 5

    def __init__(self, fading: float, memory: Floats) -> None:
        """`fading` is by how much what was counted would be multiplied."""
        self.memory, self._fading = memory, fading
        # How many choices wait, the sum of their gains and of the squares; the usual gain, and the last block's.
        self._sums, self._gains = memory[:3], memory[3:]

    def observe(self, led_B: Floats, anywhere_B: Floats, items: int) -> bool:
        """Take how much leads to each choice and to all of `items`, NaN where there was none.

        Returns whether less of it would have been better than all, and was not before.
        """
        known_B = anywhere_B > 0
        if not known_B.any():
            return False
        led_N, anywhere_N = led_B[known_B], anywhere_B[known_B]
        gain_N = _loss(1.0, led_N, anywhere_N, items) - _loss(self._fading, led_N, anywhere_N, items)
        self._sums += np.array([len(gain_N), gain_N.sum(), gain_N @ gain_N])
        count, total, squares = self._sums.tolist()
        if count < CHOICES:
            return False
        self._sums[:] = 0
        mean, usual = total / count, float(self._gains[0])
        self._gains[:] = mean + USUAL * (usual - mean), mean
        variance = max(0.0, squares / count - mean * mean)
        return usual < -LEAST_GAIN and mean > max(LEAST_GAIN, ERRORS * math.sqrt(variance / count))

    def scores(self) -> dict[str, float]:
        """Return by how many nats a choice less would have been better in the last block; mostly below 0."""
        return {"fading_gain": float(self._gains[1])}


def _loss(weight: float, led_N: Floats, anywhere_N: Floats, items: int) -> Floats:
    """Return how badly each choice was foreseen, in nats, if what leads there is so much of what was counted."""
    spread = min(max(TRANSITION_FLOOR * items, LEAST_SPREAD), MOST_SPREAD)
    loss_N: Floats = np.log((weight * anywhere_N + spread) / (weight * led_N + spread / items))
    return loss_N
