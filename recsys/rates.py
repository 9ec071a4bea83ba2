"""Rates: what counting alone says of a feedback's class, for the user, the item and the context; where the head begins.

Every part is a logarithm of how much more often a class came than among all, drawn to nothing where little was counted;
their weighted sum is a naive Bayes classifier's answer. Shapes as in recsys.network; R of what is known, X any axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Few feedback count as if there were so many more that are like those among all.
PRIOR = 5.0
# The rates among all and those of contexts forget half after 69,000 feedback.
DECAY = 0.99999
# A history entry tells so much more of its user than the one before it.
FADING = 0.93
# Of the user's mean error against the items' means: as if two more entries were without any.
RESIDUAL_PRIOR = 2.0
# First weights where histories tell their class: of the item and the user, and of what tilts to the expected worth.
HALF, TILT = 0.5, 0.75
LEAST_VARIANCE = 1e-3


class Rates(nn.Module):
    """Count classes among all and by context, compare, and weigh the comparisons.

    Where histories hold feedback of every class a user's part is what the user made of the items, beside what others
    made of them; where they do not, it is what users who had the same items made of others (the items' audiences).
    """

    def __init__(self, classes: int, context_buckets: int, worth: Sequence[float], histories_tell: bool) -> None:
        super().__init__()
        self.histories_tell = histories_tell
        # Of each class, of late: among all, and where the context had a pair.
        self.class_counts: Tensor
        self.register_buffer("class_counts", torch.zeros(classes))
        self.context_counts: Tensor
        self.register_buffer("context_counts", torch.zeros(context_buckets, classes))
        self.worth_C: Tensor
        self.register_buffer("worth_C", torch.tensor(worth, dtype=torch.float32), persistent=False)
        self.user_width, self.item_width = 3 * classes + 2, classes + 2
        self.width = self.user_width + self.item_width
        self.weigh = nn.Linear(self.width, classes)
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)
        one_CC, place_C = torch.eye(classes), self.worth_C - self.worth_C.mean()
        share = HALF if histories_tell else 1.0
        with torch.no_grad():
            among_all, user, context, residual, _, item, deviation, _ = self.split(self.weigh.weight)
            among_all.copy_(one_CC)
            user.copy_(one_CC * share)
            context.copy_(one_CC)
            item.copy_(one_CC * share)
            if histories_tell:
                residual.copy_(TILT * place_C[:, None])
                deviation.copy_(TILT * place_C[:, None])

    def split(self, of_XR: Tensor) -> tuple[Tensor, ...]:
        """Split the last axis: among all, the user's own, context, residual, size; the item's own, deviation, size."""
        classes = len(self.class_counts)
        return torch.split(of_XR, [classes, classes, classes, 1, 1, classes, 1, 1], 1)

    def user(self, classes_BL: Tensor, counts_BLC: Tensor, audience_BKC: Tensor, context_BP: Tensor) -> Tensor:
        """Return what is known whatever the item is: (B, user_width).

        Of each history the entries' classes (0 is empty), the counts of the entries' items and, of the last K, those of
        their audiences; buckets of context pairs, -1 is empty.
        """
        among_C, variance = self.among()
        batch, length = classes_BL.shape
        given_BL = classes_BL != 0
        if self.histories_tell:
            weight_BL = given_BL * FADING ** torch.arange(length - 1, -1, -1, device=classes_BL.device)
            rates_BLC = self._rates(counts_BLC, among_C)
            expected_BC = torch.einsum("bl,blc->bc", weight_BL, rates_BLC)
            one_BLC = F.one_hot(classes_BL, len(among_C) + 1)[:, :, 1:].to(rates_BLC.dtype)
            observed_BC = torch.einsum("bl,blc->bc", weight_BL, one_BLC)
            size_B1 = weight_BL.sum(1, keepdim=True)
            mean_BC = torch.where(size_B1 > 0, expected_BC / size_B1.clamp_min(FADING**length), among_C)
            user_BC = torch.log((observed_BC / mean_BC + PRIOR) / (size_B1 + PRIOR))
            residual_B1 = ((observed_BC - expected_BC) @ self.worth_C)[:, None] / (size_B1 + RESIDUAL_PRIOR) / variance
        else:
            known_BK = given_BL[:, -audience_BKC.shape[1] :]
            above_BKC = self._above(audience_BKC, among_C) * known_BK[..., None]
            user_BC = above_BKC.sum(1) / known_BK.sum(1, keepdim=True).clamp_min(1)
            residual_B1 = user_BC.new_zeros(batch, 1)
        pair_BP = (context_BP >= 0).to(user_BC.dtype)
        above_BPC = self._above(self.context_counts[context_BP.clamp_min(0)], among_C) * pair_BP[..., None]
        context_BC = above_BPC.sum(1) / pair_BP.sum(1, keepdim=True).clamp_min(1)
        entries_B1 = torch.log1p(given_BL.sum(1, keepdim=True).to(user_BC.dtype)) / 4
        return torch.cat([among_C.log().expand(batch, -1), user_BC, context_BC, residual_B1, entries_B1], 1)

    def item(self, counts: Tensor) -> Tensor:
        """Return what is known of items with these counts of each class: (..., item_width)."""
        among_C, variance = self.among()
        deviation = (self._rates(counts, among_C) - among_C) @ self.worth_C / variance
        size = torch.log1p(counts.sum(-1, keepdim=True)) / 4
        return torch.cat([self._above(counts, among_C), deviation[..., None], size], -1)

    def count(self, class_B: Tensor, context_BP: Tensor) -> None:
        """Count a batch of feedback."""
        classes = len(self.class_counts)
        fading = DECAY ** len(class_B)
        self.class_counts.mul_(fading).add_(torch.bincount(class_B, minlength=classes))
        given_BP = context_BP >= 0
        place_N = (context_BP * classes + class_B[:, None])[given_BP]
        counted = torch.bincount(place_N, minlength=self.context_counts.numel())
        self.context_counts.mul_(fading).add_(counted.view_as(self.context_counts))

    def retract(self, feedback_class: int, age_M: Tensor, context_MP: Tensor) -> None:
        """Take back the counting of M feedback of a class, since which so many feedback each were counted."""
        taken_M = (DECAY**age_M).to(self.class_counts.dtype)
        self.class_counts[feedback_class] = (self.class_counts[feedback_class] - taken_M.sum()).clamp_min(0)
        given_MP = context_MP >= 0
        counts_P = self.context_counts[:, feedback_class]
        counts_P.index_add_(0, context_MP[given_MP], -taken_M[:, None].expand_as(context_MP)[given_MP])
        counts_P.clamp_min_(0)

    def among(self) -> tuple[Tensor, Tensor]:
        """Return the rates among all, and the variance of the worth."""
        among_C = (self.class_counts + 1) / (self.class_counts + 1).sum()
        mean = among_C @ self.worth_C
        return among_C, (among_C @ (self.worth_C - mean).square()).clamp_min(LEAST_VARIANCE)

    def _rates(self, counts: Tensor, among_C: Tensor) -> Tensor:
        return (counts + PRIOR * among_C) / (counts.sum(-1, keepdim=True) + PRIOR)

    def _above(self, counts: Tensor, among_C: Tensor) -> Tensor:
        return torch.log((counts / among_C + PRIOR) / (counts.sum(-1, keepdim=True) + PRIOR))
