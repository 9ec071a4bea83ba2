"""Average: serve the exponential moving average of the network's weights instead of the last ones.

The network holds the average, so that it is what is tested, judged by the gate and published; the weights that learn
are put in its place while a batch is learned. Item rows and mixing weights are as they are: the latter are learned for
what is served. Polyak and Juditsky 1992.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# The first averages reach back no further than this share of the steps so far: the initial weights are soon forgotten.
WARM_UP = 10


class Average:
    """Average `weights` over steps; `decay` is how much of the average stays at each; `of` names which weights."""

    def __init__(self, decay: float, weights: Mapping[str, nn.Parameter], of: str) -> None:
        self.name = f"average_{of}"
        self._decay, self._weights = decay, weights
        self._learning = {name: weight.detach().clone() for name, weight in weights.items()}
        self._average = {name: weight.detach().clone() for name, weight in weights.items()}
        self._steps = torch.zeros(1, dtype=torch.int64)

    @torch.no_grad()
    def take_out(self) -> None:
        """Put the weights that learn into the network."""
        for name, weight in self._weights.items():
            self._average[name].copy_(weight)
            weight.copy_(self._learning[name])

    @torch.no_grad()
    def learned(self) -> None:
        """Take the network's weights, which have learned, into the average."""
        count = int(self._steps)
        decay = min(self._decay, (1 + count) / (WARM_UP + count))
        self._steps += 1
        for name, weight in self._weights.items():
            self._learning[name].copy_(weight)
            self._average[name].lerp_(self._learning[name], 1 - decay)

    @torch.no_grad()
    def put_back(self) -> None:
        """Put the average into the network."""
        for name, weight in self._weights.items():
            weight.copy_(self._average[name])

    def state(self) -> dict[str, Tensor]:
        """Return the weights that learn and how many steps were averaged; the average is what is served."""
        return {"steps": self._steps, **self._learning}

    @torch.no_grad()
    def reset(self) -> None:
        """Begin anew from the network's weights as they stand."""
        self._steps.zero_()
        for name, weight in self._weights.items():
            self._learning[name].copy_(weight)
