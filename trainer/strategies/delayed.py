"""Delayed feedback: impressions are learned at once, as what they are so far; what follows one later puts that right.

Both ways leave the same expectation as if every impression had come with its outcome; nothing waits for a window. X
examples, C feedback classes of which one, the provisional, is that of an impression; see Delayed.loss for
`followed_X`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from recsys.settings import Settings
from trainer.strategies.remembered import Remembering

# How much of what was counted still counts after another one.
MEMORY = 1 - 1e-5

# From classes to the loss of each example.
Losses = Callable[[Tensor], Tensor]


class Delayed(Remembering, Protocol):
    """Turn the losses of examples into one."""

    def loss(self, losses: Losses, logits_XC: Tensor, class_X: Tensor, followed_X: Tensor | None) -> Tensor:
        """Return the mean loss; `followed_X` is 1 for what follows an impression of its own, else 0; None: all 0."""

    def learned(self) -> None:
        """Take in what the last loss was of: it was learned for the first time."""


class Corrected:
    """Take back, with the feedback that follows an impression, the loss of that impression."""

    name = "corrected"

    def __init__(self, provisional: int) -> None:
        self._provisional = provisional

    def loss(self, losses: Losses, logits_XC: Tensor, class_X: Tensor, followed_X: Tensor | None) -> Tensor:
        """Return the mean loss; a difference of cross-entropies is linear in the logits, so its gradient is bounded."""
        loss_X = losses(class_X)
        if followed_X is not None:
            loss_X = loss_X - followed_X * losses(torch.full_like(class_X, self._provisional))
        return loss_X.mean()

    def learned(self) -> None:
        """Remember nothing."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def reset(self) -> None:
        """Begin anew."""


class Weighted:
    """Weigh feedback by its share in the truth over its share in the log. Fake negative weighting, Ktena et al. 2019.

    Where p is the probability, as predicted, of other feedback than the provisional, that weighs 1 + p, the provisional
    (1 - p)(1 + p). So it is if an impression precedes all other feedback; if one precedes a share r of it alone, the
    weights are 1 + p r and (1 - p)(1 + p r) / (1 - p + p r). The share is counted.
    """

    name = "weighted"

    def __init__(self, provisional: int, device: torch.device) -> None:
        self._provisional = provisional
        # Of feedback other than the provisional: what follows an impression, and all; how much was counted since.
        self._counts, self._new = (torch.zeros(2, device=device) for _ in range(2))

    def loss(self, losses: Losses, logits_XC: Tensor, class_X: Tensor, followed_X: Tensor | None) -> Tensor:
        """Return the weighted mean loss."""
        given_X = class_X != self._provisional
        followed = given_X.new_zeros(()) if followed_X is None else followed_X.sum()
        self._new = torch.stack([followed.to(torch.float32), given_X.sum().to(torch.float32)])
        share = self._counts[0] / self._counts[1].clamp_min(1)
        p_X = 1 - logits_XC.detach().softmax(1)[:, self._provisional]
        often_X = 1 + p_X * share
        rare_X = often_X * (1 - p_X) / (1 - p_X + p_X * share).clamp_min(torch.finfo().tiny)
        return (torch.where(given_X, often_X, rare_X) * losses(class_X)).mean()

    def learned(self) -> None:
        """Count what was learned."""
        self._counts.mul_(MEMORY ** self._new[1]).add_(self._new)

    def state(self) -> dict[str, Tensor]:
        """Return the counts."""
        return {"counts": self._counts}

    def reset(self) -> None:
        """Know of nothing that followed an impression."""
        self._counts.zero_()


def build_delayed(settings: Settings, device: torch.device) -> Delayed | None:
    """Make what the setting `delayed_feedback` asks for; None where no class is provisional."""
    provisional = settings.provisional_class
    if provisional is None:
        return None
    return Corrected(provisional) if settings.delayed_feedback == "corrected" else Weighted(provisional, device)
