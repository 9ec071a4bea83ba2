"""Strategies: those that the settings choose, in the order in which they act on a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recsys.errors import CorruptWeights
from recsys.network import Histories, RecommendationNetwork
from recsys.settings import Settings
from trainer.prequential import StepReport
from trainer.strategies import remembered
from trainer.strategies.anchor import Anchor
from trainer.strategies.average import Average
from trainer.strategies.delayed import build_delayed
from trainer.strategies.following_rate import FollowingRate
from trainer.strategies.last_layer import LastLayer
from trainer.strategies.optimizers import STATE, Optimizers
from trainer.strategies.trainable import build_trainable, kind


class Strategies:
    """Decide what moves, by how much, what holds it back and what is served; remember it all in the trainer's payload.

    A step: `clear`; test; within `learning` the losses, their gradients, `clip`, and `step` if all was finite.
    Between steps the network holds what is served. `last_layer` is None unless chosen, `rows` tells whether item rows
    learn.
    """

    def __init__(self, settings: Settings, network: RecommendationNetwork) -> None:
        self._settings = settings
        self._trainable = build_trainable(settings, network)
        self.rows = self._trainable.rows
        weights = self._trainable.weights
        self._average = Average(settings.average_decay, weights, kind(settings)) if settings.average_decay else None
        self._pulls = bool(settings.l2sp_weight or settings.ewc_weight)
        anchored = self._pulls or settings.distillation_weight
        self._anchor = Anchor(settings, network, weights) if anchored else None
        self._rate = FollowingRate() if settings.follow_loss else None
        # Multiplies the rates further; whoever drives the steps may set it before each.
        self.boost = 1.0
        self.last_layer = LastLayer(network) if settings.bayesian_head else None
        self._optimizers = Optimizers(settings, self._trainable.moving, self._trainable.mixing)
        device = next(network.parameters()).device
        self._delayed = build_delayed(settings, device)
        chosen = (self._trainable, self._average, self._anchor, self._rate, self.last_layer, self._delayed)
        self._remembering = [each for each in chosen if each is not None]
        worth_C = torch.tensor([c.worth for c in settings.classes], device=device)
        # In shares of their range: what the weight of the error means does not depend on the scale of worth.
        self._place_C = (worth_C - worth_C.min()) / (worth_C.max() - worth_C.min()).clamp_min(torch.finfo().tiny)

    @property
    def rate(self) -> float:
        """Return by what the learning rates are multiplied."""
        return self.boost * (self._rate.factor if self._rate is not None else 1.0)

    def clear(self) -> None:
        """Forget the gradients of the step before."""
        self._optimizers.clear()
        for weight in self._trainable.weights.values():
            weight.grad = None

    @contextmanager
    def learning(self, steps: int) -> Iterator[None]:
        """Have the network hold what learns, in step number `steps`; afterwards again what is served."""
        if self._average is not None:
            self._average.take_out()
        try:
            if self._anchor is not None:
                self._anchor.renew(steps)
            yield
        finally:
            if self._average is not None:
                self._average.put_back()

    def class_loss(self, logits_XC: Tensor, class_X: Tensor, followed_X: Tensor | None = None) -> Tensor:
        """Return the loss over feedback classes: cross-entropy and, if chosen, the expected worth's squared error.

        `followed_X` is 1 for feedback that follows an impression of its own, 0 for other; None where none does.
        """
        if self.last_layer is not None:
            self.last_layer.watch(logits_XC, followed_X)

        def losses(class_X: Tensor) -> Tensor:
            loss_X = F.cross_entropy(logits_XC, class_X, reduction="none")
            if self._settings.squared_error_weight:
                error_X = logits_XC.softmax(1) @ self._place_C - self._place_C[class_X]
                loss_X = loss_X + self._settings.squared_error_weight * error_X.square()
            return loss_X

        if self._delayed is None:
            return losses(class_X).mean()
        return self._delayed.loss(losses, logits_XC, class_X, followed_X)

    def distillation(
        self, histories: Histories, vectors_UD: Tensor, index_BL: Tensor, states_BD: Tensor, sampled_ND: Tensor
    ) -> Tensor:
        """Return the weighted loss for saying something else of sampled items than before; 0 unless chosen."""
        if self._anchor is None or not self._settings.distillation_weight:
            return states_BD.new_zeros(())
        divergence = self._anchor.distil(histories, vectors_UD, index_BL, states_BD, sampled_ND)
        return self._settings.distillation_weight * divergence

    def clip(self, count: int) -> Tensor:
        """Finish the gradients of a mean loss over `count` examples, clip the dense ones and return their norm."""
        if self._anchor is not None and self._pulls:
            self._anchor.pull(count)
        self._trainable.gather()
        return torch.nn.utils.clip_grad_norm_(list(self._trainable.moving.values()), self._settings.gradient_clip)

    def step(self, report: StepReport, new: int) -> None:
        """Move the weights by their gradients; `new` of the examples, the first, were not learned before."""
        if self._rate is not None:
            self._rate.observe(_mean(report.item_loss_B) + _mean(report.class_loss_B))
        self._optimizers.set_rate(self._settings.learning_rate * self.rate)
        self._optimizers.step()
        self._trainable.merge()
        if self._anchor is not None:
            self._anchor.learned()
        if self._average is not None:
            self._average.learned()
        if self.last_layer is not None and new:
            self.last_layer.learned(new)
        if self._delayed is not None and new:
            self._delayed.learned()

    def step_mixing(self) -> None:
        """Move the mixing weights alone by their gradients."""
        self._optimizers.step_mixing()

    def write(self) -> dict[str, NDArray[Any]]:
        """Copy all that is remembered, by name."""
        return {**self._optimizers.write(), **remembered.write(self._remembering)}

    def check(self, dense: Mapping[str, NDArray[Any]]) -> None:
        """Refuse what does not fit; what was not chosen when it was written may be missing.

        Raises:
            CorruptWeights: naming what is wrong; nothing was changed.
        """
        for name in dense:
            if not name.startswith(remembered.PREFIX) and name.rpartition(".")[2] not in STATE:
                raise CorruptWeights(f"{name} is nothing that a trainer remembers")
        self._optimizers.check(dense)
        remembered.check(self._remembering, dense)

    def restore(self, dense: Mapping[str, NDArray[Any]]) -> None:
        """Set everything to what `check` has let pass; the network holds the weights served already."""
        self._optimizers.restore(dense)
        remembered.restore(self._remembering, dense)


def _mean(losses_B: NDArray[np.float64]) -> float:
    finite_B = losses_B[np.isfinite(losses_B)]
    return float(finite_B.mean()) if len(finite_B) else float("nan")
