"""Anchor: hold the network near what it was, in its weights (L2-SP, EWC) or in what it says (distillation).

The anchor is the network as it was at the last multiple of `anchor_steps`. Shapes as in recsys.network; N sampled
items.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.network import Histories, RecommendationNetwork, build_network
from recsys.settings import Settings
from trainer.strategies.trainable import kind

# How much of the Fisher information stays at each step: it remembers some hundreds.
FISHER_DECAY = 0.995


class Anchor:
    """Remember the network of `anchor_steps` ago, and the importance of its weights where EWC asks for it."""

    def __init__(self, settings: Settings, network: RecommendationNetwork, weights: Mapping[str, nn.Parameter]) -> None:
        self._settings, self._network, self._weights = settings, network, weights
        self.name = f"{'ewc' if settings.ewc_weight else 'anchor'}_{kind(settings)}"
        device = next(network.parameters()).device
        self._earlier = build_network(settings).to(device).eval().requires_grad_(False)
        self._earlier_weights = dict(self._earlier.named_parameters())
        important = weights if settings.ewc_weight else {}
        self._fisher = {name: torch.zeros_like(weight) for name, weight in important.items()}
        self._information: dict[str, Tensor] = {}
        self.reset()

    @torch.no_grad()
    def renew(self, steps: int) -> None:
        """Move the anchor to the network as it stands when `steps` are a multiple of `anchor_steps`."""
        if steps % self._settings.anchor_steps == 0:
            self._earlier.load_state_dict(self._network.state_dict())

    @torch.no_grad()
    def pull(self, count: int) -> None:
        """Add the gradients of the penalties to those of a mean loss over `count` examples.

        L2-SP (Li et al. 2018): weight / 2 * |w - anchor|^2. EWC (Kirkpatrick et al. 2017; online: Schwarz et al.
        2018): weight / 2 * sum F (w - anchor)^2, F the running diagonal of the Fisher information. As the gradients of
        single examples are not there, F comes from their mean's: `count` times its square, which is their second moment
        when they are independent and near 0 on average.
        """
        settings = self._settings
        # Of what nothing is learned now, what an earlier step found is no evidence again.
        self._information = {}
        for name, weight in self._weights.items():
            # What nothing was learned of stays where it is, as the head does in replays and further epochs.
            if weight.grad is None:
                continue
            strength: float | Tensor = settings.l2sp_weight
            if name in self._fisher:
                strength = settings.ewc_weight * self._fisher[name] + settings.l2sp_weight
                self._information[name] = count * weight.grad.square()
            weight.grad.add_(strength * (weight - self._earlier_weights[name]))

    @torch.no_grad()
    def learned(self) -> None:
        """Keep the information of the gradients that were pulled last: they were learned."""
        for name, information in self._information.items():
            self._fisher[name].lerp_(information, 1 - FISHER_DECAY)

    def distil(
        self,
        histories: Histories,
        vectors_UD: Tensor,
        index_BL: Tensor,
        states_BD: Tensor,
        sampled_ND: Tensor,
    ) -> Tensor:
        """Return how far the network's user states say something else of sampled items than the anchor's, in nats.

        The mean KL divergence of the two softmaxes over N items (Hinton et al. 2015), from the anchor's to the
        network's; where there is no history there is nothing to keep. The item vectors, of entries those
        at `index_BL`, are today's.
        """
        given_B = (histories.rows_BL != 0).any(1)
        with torch.no_grad():
            earlier_BD = self._earlier.states(vectors_UD, index_BL, histories)
            target_BN = (earlier_BD @ sampled_ND.T).log_softmax(1)
        said_BN = (states_BD @ sampled_ND.T).log_softmax(1)
        divergence_B = F.kl_div(said_BN, target_BN, reduction="none", log_target=True).sum(1)
        return (divergence_B * given_B).sum() / given_B.sum().clamp_min(1)

    def state(self) -> dict[str, Tensor]:
        """Return the anchor's weights and the Fisher information."""
        fisher = {f"fisher.{name}": tensor for name, tensor in self._fisher.items()}
        return {f"weights.{name}": p.detach() for name, p in self._earlier_weights.items()} | fisher

    @torch.no_grad()
    def reset(self) -> None:
        """Begin anew from the network's weights as they stand."""
        self._earlier.load_state_dict(self._network.state_dict())
        for fisher in self._fisher.values():
            fisher.zero_()
