"""LastLayer: a Bayesian last layer of the class head, by an online Laplace approximation.

The last linear map's weights are taken as normally distributed around those learned. The precision is a Kronecker
product (Ritter et al. 2018) of the second moments of what goes into the map and of the softmax's curvature, each with
the prior's share added; both are summed over what was learned, so that what is often seen is known well.
F inputs of the map and the constant 1, C feedback classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from recsys.network import RecommendationNetwork

# Of the weights before anything was learned.
PRIOR_PRECISION = 1.0
# How much of what was learned still counts after another example: that of some 100,000.
MEMORY = 1 - 1e-5


class LastLayer:
    """Learn how sure the class head is; say it as probabilities, or draw from it.

    `inputs_BF` are always those of the last map, as `inputs` has them after classes were asked for; `logits_BC` the
    logits over classes that came of it.
    """

    name = "last_layer"

    def __init__(self, network: RecommendationNetwork) -> None:
        last = network.rank[-1]
        assert isinstance(last, nn.Linear)
        inputs, classes = last.in_features + 1, last.out_features
        options: dict[str, Any] = {"dtype": torch.float32, "device": last.weight.device}
        self._moments_FF = torch.zeros(inputs, inputs, **options)
        self._curvature_CC = torch.zeros(classes, classes, **options)
        self._count = torch.zeros((), **options)
        self.inputs = torch.zeros(0, last.in_features, **options)
        self._watched: tuple[Tensor, Tensor] | None = None
        last.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        self.inputs = inputs[0].detach()

    def watch(self, logits_XC: Tensor, followed_X: Tensor | None = None) -> None:
        """Note what is being learned: these logits came of `inputs`; what follows an impression adds none to it."""
        logits_XC = logits_XC.detach()
        once_X = slice(None) if followed_X is None else followed_X == 0
        self._watched = self.inputs[once_X], logits_XC[once_X]

    @torch.no_grad()
    def learned(self, new: int) -> None:
        """Take in the first `new` of the examples that were watched last: they were learned for the first time."""
        assert self._watched is not None
        inputs, logits = self._watched
        inputs_XF, p_XC = _with_one(inputs[:new]), logits[:new].softmax(1)
        new = len(inputs_XF)
        self._watched = None
        kept = MEMORY**new
        self._moments_FF.mul_(kept).addmm_(inputs_XF.T, inputs_XF)
        self._curvature_CC.mul_(kept).add_(torch.diag(p_XC.sum(0)) - p_XC.T @ p_XC)
        self._count.mul_(kept).add_(new)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return lower triangles whose products with their transposes are the precision's two factors."""
        # Each has a square root of the count and of the prior's precision; the sums hold a whole count already.
        root, prior = self._count.clamp_min(1.0).sqrt(), math.sqrt(PRIOR_PRECISION)
        lower_FF, lower_CC = (
            torch.linalg.cholesky(sums / root + prior * torch.eye(len(sums), device=sums.device))
            for sums in (self._moments_FF, self._curvature_CC)
        )
        return lower_FF, lower_CC

    @torch.no_grad()
    def variances(self, inputs_BF: Tensor) -> Tensor:
        """Return the variance of each logit, given what goes into the last map: (B, C)."""
        lower_FF, lower_CC = self._factors()
        spread_FB: Tensor = torch.linalg.solve_triangular(lower_FF, _with_one(inputs_BF).T, upper=False)
        variance_C: Tensor = torch.cholesky_inverse(lower_CC).diagonal()
        return spread_FB.square().sum(0)[:, None] * variance_C

    @torch.no_grad()
    def probabilities(self, inputs_BF: Tensor, logits_BC: Tensor) -> Tensor:
        """Return the probability of each class with the weights' uncertainty counted in: (B, C).

        Logits are divided by sqrt(1 + pi/8 variance) (MacKay 1992): the less is known, the nearer to equal.
        """
        return (logits_BC / torch.sqrt(1 + math.pi / 8 * self.variances(inputs_BF))).softmax(1)

    @torch.no_grad()
    def sample(self, inputs_BF: Tensor, logits_BC: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the weights once and return the logits that they give: (B, C), for Thompson sampling (1933).

        One draw serves all B, as those compete with each other for one answer.
        """
        lower_FF, lower_CC = self._factors()
        noise_FC = torch.randn(len(lower_FF), len(lower_CC), generator=generator).to(lower_FF.device)
        half_FC = torch.linalg.solve_triangular(lower_FF.T, noise_FC, upper=True)
        drawn_FC: Tensor = torch.linalg.solve_triangular(lower_CC, half_FC, upper=False, left=False)
        return logits_BC + _with_one(inputs_BF) @ drawn_FC

    def state(self) -> dict[str, Tensor]:
        """Return what was summed up."""
        return {"moments": self._moments_FF, "curvature": self._curvature_CC, "count": self._count}

    def reset(self) -> None:
        """Know nothing."""
        for tensor in self.state().values():
            tensor.zero_()


def _with_one(inputs_BF: Tensor) -> Tensor:
    return torch.cat([inputs_BF, torch.ones_like(inputs_BF[:, :1])], 1)
