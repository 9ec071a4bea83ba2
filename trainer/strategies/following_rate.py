"""FollowingRate: a learning rate that follows the prequential loss, which stands in for validation.

Losses of batches before they are learned are averaged over blocks. A plateau, several blocks without a new best, lowers
the rate; a drift, a block that is surely worse than the one before, raises it and begins the search for a best anew. A
pure function of the losses, so of the log.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Batches in a block; blocks without a new best that make a plateau.
BLOCK = 32
PATIENCE = 4
# Standard errors by which a block must be worse than the one before for a drift: noise passes one in some 15,000.
DRIFT_ERRORS = 4.0
LOWER, RAISE = 0.7, 2.0
LEAST, MOST = 0.1, 4.0


class FollowingRate:
    """Follow the losses of batches; `factor` multiplies the learning rates that were set."""

    name = "following_rate"

    def __init__(self) -> None:
        # One tensor of each, to be remembered; all on the CPU.
        self._factor = torch.ones((), dtype=torch.float64)
        # Of the block in the making: losses, their sum, the sum of their squares.
        self._block = torch.zeros(3, dtype=torch.float64)
        # Of the block before, and the best mean; the variance of a block's mean; blocks since the best.
        self._before = torch.zeros(2, dtype=torch.float64)
        self._best = torch.zeros((), dtype=torch.float64)
        self._since = torch.zeros((), dtype=torch.int64)
        self.reset()

    @property
    def factor(self) -> float:
        """Return by what the learning rates are multiplied."""
        return float(self._factor)

    def observe(self, loss: float) -> None:
        """Take a batch's loss before it was learned; one that is not finite (there were no events) is no news."""
        if not math.isfinite(loss):
            return
        self._block += torch.tensor([1.0, loss, loss * loss], dtype=torch.float64)
        count, total, squares = self._block.tolist()
        if count == BLOCK:
            mean = total / count
            variance = max(0.0, squares / count - mean * mean) * count / (count - 1)
            self._block.zero_()
            self._close(mean, variance / count)

    def _close(self, mean: float, variance: float) -> None:
        """Judge a block by its mean and the variance of that."""
        before, before_variance = self._before.tolist()
        self._before.copy_(torch.tensor([mean, variance], dtype=torch.float64))
        # Before the first block the variance is infinite, and nothing is surely worse.
        if mean - before > DRIFT_ERRORS * math.sqrt(variance + before_variance):
            self._turn(RAISE, mean)
        elif mean < float(self._best):
            self._best.fill_(mean)
            self._since.zero_()
        else:
            self._since += 1
            if int(self._since) >= PATIENCE:
                self._turn(LOWER, float(self._best))

    def _turn(self, by: float, best: float) -> None:
        self._factor.copy_((self._factor * by).clamp(LEAST, MOST))
        self._best.fill_(best)
        self._since.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return all that decides."""
        return {
            "factor": self._factor,
            "block": self._block,
            "before": self._before,
            "best": self._best,
            "since": self._since,
        }

    def reset(self) -> None:
        """Begin anew."""
        self._factor.fill_(1.0)
        self._block.zero_()
        self._before.copy_(torch.tensor([0.0, math.inf]))
        self._best.fill_(math.inf)
        self._since.zero_()
