"""Level: has the mean of a number for each event risen? ADWIN and Page-Hinkley over the means of blocks of events.

Means of blocks are nearly normal whatever the single numbers are, and a judgement for each block instead of each event
costs next to nothing. The unit of all judgements is the scatter of such means, taken from differences of neighbours: a
trend (the loss falls while the network learns) or a jump hardly moves those.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trainer.drift.adwin import Adwin
from trainer.drift.page_hinkley import PageHinkley

# Numbers in a block; blocks after which their scatter is known, and how many it remembers then.
BLOCK = 64
SCATTER_BLOCKS = 16
SCATTER_MEMORY = 128
# A share that has been 0 all the time has no scatter; one event in a block is no change.
LEAST_SCATTER = 0.02
# How sure a detection must be; chosen by benchmarks/drift.py so that streams without a change set off next to none.
DELTA = 0.05
# In scatters of a block's mean.
TOLERANCE = 0.5
THRESHOLD = 12.0


class Level:
    """Watch one stream of numbers of which higher is worse; all it remembers is in `memory`, zeros at first."""

    SIZE = 4 + BLOCK + Adwin.SIZE + PageHinkley.SIZE

    def __init__(self, memory: NDArray[np.float64], delta: float = DELTA, threshold: float = THRESHOLD) -> None:
        # Numbers that wait for their block; blocks so far, the mean of the last one, and the variance of such means.
        self._filled, self._state = memory[:1], memory[1:4]
        self._block = memory[4 : 4 + BLOCK]
        rest = memory[4 + BLOCK :]
        self._adwin = Adwin(delta, rest[: Adwin.SIZE])
        self._page_hinkley = PageHinkley(TOLERANCE, threshold, rest[Adwin.SIZE :])

    def add(self, values: NDArray[np.float64]) -> bool:
        """Take numbers in order; return whether their mean was found to have risen."""
        risen = False
        while len(values):
            filled = int(self._filled[0])
            taken = values[: BLOCK - filled]
            self._block[filled : filled + len(taken)] = taken
            values = values[len(taken) :]
            self._filled[0] = filled = (filled + len(taken)) % BLOCK
            if not filled:
                risen |= self._judge(float(self._block.mean()))
        return risen

    def _judge(self, mean: float) -> bool:
        blocks, last, variance = self._state.tolist()
        if blocks:
            # Neighbours differ by twice their variance.
            variance += ((mean - last) ** 2 / 2 - variance) / min(blocks, SCATTER_MEMORY)
        self._state[:] = blocks + 1, mean, variance
        if blocks < SCATTER_BLOCKS:
            return False
        unit = max(math.sqrt(variance), LEAST_SCATTER)
        turned, risen = self._adwin.update(mean, unit), self._page_hinkley.update(mean, unit)
        if turned:
            risen = risen or self._adwin.score > 0
            self._adwin.clear()
        if risen:
            # What is usual has to be learned anew.
            self._adwin.clear()
            self._page_hinkley.clear()
        return risen

    def scores(self) -> dict[str, float]:
        """Return how near to a detection each detector was at the last block; 1 is one, below 0 the mean fell."""
        return {"adwin": self._adwin.score, "page_hinkley": self._page_hinkley.score}
