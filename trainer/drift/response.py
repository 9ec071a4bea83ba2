"""Response: learn faster, and more of what is recent, from when accuracy is found to fall until it has recovered."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# Feedback after which a response ends, recovered or not.
LONGEST = 8192
# What an average of the loss keeps for each feedback: one knows some 500, the other some 5,000.
FAST, SLOW = 1 - 1 / 500, 1 - 1 / 5000


class Response:
    """Follow the loss; all it remembers is in `memory`, zeros at first."""

    SIZE = 5

    def __init__(self, memory: NDArray[np.float64]) -> None:
        # Feedback that the response lasts yet at most; the loss to come back to; both averages; the feedback in them.
        self._memory = memory

    @property
    def on(self) -> bool:
        """Return whether a drift is being responded to."""
        return bool(self._memory[0] > 0)

    def observe(self, loss: float, feedback: int, drifted: bool) -> None:
        """Take the mean loss of a batch before it was learned, and whether accuracy was found to fall."""
        left, before, fast, slow, count = self._memory.tolist()
        left = max(0.0, left - feedback)
        if math.isfinite(loss):
            count += feedback
            # At first plain means of what there is.
            fast += (loss - fast) * max(1 - FAST**feedback, feedback / count)
            slow += (loss - slow) * max(1 - SLOW**feedback, feedback / count)
        if left and fast <= before:
            left = 0.0
        if drifted and not left:
            left, before = float(LONGEST), slow
        self._memory[:] = left, before, fast, slow, count
