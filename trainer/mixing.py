"""Mixing: fit the weights that mix the score's parts to feedback kept apart, which lies anywhere in time.

What a first epoch taught them holds at the end of its time, and of counts that fade. Here they begin anew: without
trends, which tell of that end alone, and with a prior, as few feedback must teach them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np
import torch

from recsys.network import INITIAL_LIFT, INITIAL_NETWORK, LIFTS
from trainer.examples import Examples
from trainer.learner import Learner
from trainer.prequential import StepReport

# Steps of Adam, a batch each, and their rate: the weights come to rest in these.
STEPS, RATE = 256, 0.01
# Of the normal distribution around where the weights begin: few feedback move them by less than a half. Without it
# trends take weight that holds for what is kept apart alone.
PRECISION = 5.0
# Of the loss (see trainer.prequential): likely choices count more than while learning on. On a real and a made-up file
# NDCG is up to a tenth higher than with 0.2, on choices that were not fitted, and lower again with 0.8.
ROBUSTNESS = 0.5


def fit_mixing(learner: Learner, apart: Sequence[tuple[Examples, list[np.ndarray]]]) -> list[StepReport]:
    """Fit the mixing weights, and nothing else, to batches that were not learned; return what is found there then.

    Each batch has beside it the rows that the users have. The same batches give the same weights, whatever they were;
    without any, weights stay what they are.
    """
    mix, test, standing_IS = learner.network.mix, learner.prequential.test, learner.table.standing()
    # Of these only what the settings let move begins anew and is fitted.
    moving = [each for each in mix.parameters() if each.requires_grad] if apart else []
    if moving:
        with torch.no_grad():
            for parameter in moving:
                parameter.zero_()
            if mix.bias.requires_grad:
                mix.bias[0], mix.bias[-LIFTS] = INITIAL_NETWORK, INITIAL_LIFT
        begun = [each.detach().clone() for each in moving]
        pull = PRECISION / max(1, sum(len(examples) for examples, _ in apart))
        optimizer = torch.optim.Adam(moving, RATE)
        for examples, seen in islice(cycle(apart), STEPS):
            optimizer.zero_grad()
            _, loss = test(examples, seen, standing_IS, robustness=ROBUSTNESS)
            # Synchronises with the GPU: what is not finite teaches nothing. Nor does what holds nothing to be ranked.
            if bool(torch.isfinite(loss)) and moving[0].grad is not None:
                for parameter, start in zip(moving, begun, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - start, alpha=pull)
                optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return [test(examples, seen, standing_IS)[0] for examples, seen in apart]
