"""Mix: has the distribution of a feature of the feedback changed? The newest block beside a rolling reference.

The population stability index, sum (p - q) log(p / q), and the Jensen-Shannon divergence, in bits, of the shares of
bins. What half a value in a block would be is added to each share, so that empty bins are finite and say nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Values in a block; blocks before it that are its reference, at most and at least.
BLOCK = 1024
REFERENCE = 8
LEAST_REFERENCE = 4
# From where on the newest block is a drift: noise alone stays below, see benchmarks/drift.py.
PSI = 0.1
JS = 0.018

Floats = NDArray[np.float64]


def stability_index(expected: Floats, found: Floats) -> float:
    """Return the population stability index of two lists of shares."""
    return float(((found - expected) * np.log(found / expected)).sum())


def jensen_shannon(expected: Floats, found: Floats) -> float:
    """Return the Jensen-Shannon divergence of two lists of shares, in bits: 0 the same, 1 nothing in common."""
    middle = (expected + found) / 2
    return float((expected * np.log2(expected / middle) + found * np.log2(found / middle)).sum() / 2)


def _shares(counts: Floats) -> Floats:
    shares: Floats = counts / counts.sum() + 0.5 / BLOCK
    shares /= shares.sum()
    return shares


class Mix:
    """Watch the shares of `bins`; all it remembers is in `memory`, zeros at first."""

    @staticmethod
    def size(bins: int) -> int:
        """Return how long the memory is."""
        return 4 + (1 + REFERENCE) * bins

    def __init__(self, bins: int, memory: Floats, psi: float = PSI, js: float = JS) -> None:
        self._bins, self._limits = bins, (psi, js)
        # Values in the newest block and blocks in its reference; both measures of the last whole block.
        self._filled, self._known, self._found = memory[:1], memory[1:2], memory[2:4]
        self._newest = memory[4 : 4 + bins]
        # Newest first.
        self._reference = memory[4 + bins :].reshape(REFERENCE, bins)

    def add(self, values: NDArray[np.int64]) -> bool:
        """Take bins in order; return whether their shares were found to have changed."""
        changed = False
        while len(values):
            taken = values[: BLOCK - int(self._filled[0])]
            values = values[len(taken) :]
            self._newest += np.bincount(taken, minlength=self._bins)
            self._filled[0] += len(taken)
            if self._filled[0] == BLOCK:
                changed |= self._judge()
        return changed

    def _judge(self) -> bool:
        known = int(self._known[0])
        changed = False
        if known >= LEAST_REFERENCE:
            expected, found = _shares(self._reference[:known].sum(0)), _shares(self._newest)
            self._found[:] = stability_index(expected, found), jensen_shannon(expected, found)
            psi, js = self._limits
            changed = bool(self._found[0] > psi or self._found[1] > js)
        # What was before a change is no reference for what comes after it.
        self._known[0] = 1 if changed else min(known + 1, REFERENCE)
        self._reference[1:] = self._reference[:-1]
        self._reference[0] = self._newest
        self._newest[:] = 0
        self._filled[0] = 0
        return changed

    def scores(self) -> dict[str, float]:
        """Return both measures of the last block that had a reference."""
        psi, js = self._found.tolist()
        return {"psi": psi, "js": js}
