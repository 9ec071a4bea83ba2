"""Sampled softmax: the cross-entropy of each example's own item among negatives that all examples share.

The loss and its gradients are computed together, some examples at a time: their scores are worked on while they lie in
the processor's cache, and those of all examples are never held at once, however many negatives there are (as fused
losses of language models do: Hsu et al. 2024, Wijmans et al. 2024).
Shapes: X examples, N negatives, D dimension, E pairs of both that are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores computed at a time, where a cache is to hold them, and where only memory is.
SCORES_IN_CACHE, SCORES_IN_MEMORY = 1 << 18, 1 << 27
# Of what is left out: adds nothing to any sum.
MASKED = -1e9

Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Hold places of negatives that are left out, one example's after the other's, and where each example's end."""

    place_E: Longs
    ends_X: Longs

    def between(self, first: int, last: int, negatives: int) -> Longs:
        """Return the places of these examples' pairs in their scores, one row after the other."""
        starts_X = np.concatenate([[0], self.ends_X])[first : last + 1]
        row_E = np.repeat(np.arange(last - first), np.diff(starts_X))
        found_E: Longs = row_E * negatives + self.place_E[starts_X[0] : starts_X[-1]]
        return found_E


def sampled_softmax(
    states_XD: Tensor, items_XD: Tensor, negatives_ND: Tensor, shift: float, left_out: LeftOut
) -> Tensor:
    """Return the mean over the examples of -log softmax of the own item's score; 0 where there are no examples.

    `shift` is added to the scores of negatives: the logarithm of how many others each stands for.
    """
    found: Tensor = _SampledSoftmax.apply(states_XD, items_XD, negatives_ND, shift, left_out)  # type: ignore[no-untyped-call]
    return found


class _SampledSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states_XD: Tensor, items_XD: Tensor, negatives_ND: Tensor, shift: float, left_out: LeftOut
    ) -> Tensor:
        examples, negatives = len(states_XD), len(negatives_ND)
        at_once = SCORES_IN_CACHE if states_XD.device.type == "cpu" else SCORES_IN_MEMORY
        together = max(1, at_once // max(1, negatives))
        learned = any(ctx.needs_input_grad)
        total = states_XD.new_zeros(())
        gradients = torch.empty_like(states_XD), torch.empty_like(items_XD), torch.zeros_like(negatives_ND)
        for first in range(0, examples, together):
            last = min(first + together, examples)
            states_CD, items_CD = states_XD[first:last], items_XD[first:last]
            scores_CN = (states_CD @ negatives_ND.T).add_(shift)
            places = torch.from_numpy(left_out.between(first, last, negatives)).to(scores_CN.device)
            scores_CN.view(-1).index_fill_(0, places, MASKED)
            own_C = (states_CD * items_CD).sum(1)
            largest_C = torch.maximum(scores_CN.amax(1), own_C)
            # From here on shares of the sum rather than scores.
            shares_CN = scores_CN.sub_(largest_C[:, None]).exp_()
            own_share_C = (own_C - largest_C).exp_()
            sum_C = shares_CN.sum(1) + own_share_C
            total += (sum_C.log() + largest_C - own_C).sum()
            if not learned:
                continue
            scale_C = 1.0 / (examples * sum_C)
            shares_CN.mul_(scale_C[:, None])
            pull_C1 = (own_share_C * scale_C - 1.0 / examples)[:, None]
            torch.addcmul(shares_CN @ negatives_ND, pull_C1, items_CD, out=gradients[0][first:last])
            torch.mul(pull_C1, states_CD, out=gradients[1][first:last])
            gradients[2].addmm_(shares_CN.T, states_CD)
        ctx.save_for_backward(*gradients)
        return total / max(1, examples)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = (
            each * gradient if needed else None
            for each, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        return (*found, None, None)
