"""Trainable: which part of the network moves while it learns; the rest stays as it is, bit for bit.

| choice | of the network | mixing weights | item rows |
|---|---|---|---|
| all | everything | learn | learn |
| head | what classifies feedback: the MLP and the map of the rates | learn | frozen |
| bias | biases alone (BitFit, Ben Zaken et al. 2022) | their biases and the temperature | learn |
| lora | low-rank pairs on the blocks' linear maps (Hu et al. 2022), the class head | learn | learn |
| adapter | the blocks' adapters and norms (Houlsby et al. 2019), the class head | learn | learn |
| prompt | the blocks' prompts (Li and Liang 2021; Lester et al. 2021), the class head | learn | learn |

Item rows learn wherever new items must get a vector. The counts of the item table are no parameters: they go on always.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from recsys.network import RecommendationNetwork
from recsys.settings import Settings

MIXING = "mix."
# Beside few parameters of the blocks the head that classifies feedback learns: it has a say in the final order.
BESIDE = r"(mix|rank|rates|context)\..*"
LINEAR_MAPS = r"blocks\.\d+\.(query|key|value|output|expand|contract)\.weight"
# Names of parameters that learn, by choice.
PATTERNS = {
    "all": r".*",
    "head": r"(rank|rates|mix)\..*",
    "bias": r".*\bbias|mix\.log_temperature",
    "lora": rf"{LINEAR_MAPS}|{BESIDE}",
    "adapter": rf"blocks\.\d+\.(adapter|attention_norm|feed_norm)\..*|{BESIDE}",
    "prompt": rf"blocks\.\d+\.prompt\..*|{BESIDE}",
}
FROZEN_ROWS = {"head"}


class Trainable:
    """Freeze what must not move.

    `weights` are the network's own parameters that change, `moving` what the optimizer moves, both by name and without
    the mixing weights, which are `mixing`. `rows` tells whether item rows learn.
    """

    name = "trainable"

    def __init__(self, settings: Settings, network: RecommendationNetwork) -> None:
        pattern = re.compile(PATTERNS[settings.trainable])
        chosen = {name: p for name, p in network.named_parameters() if pattern.fullmatch(name)}
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in chosen)
        self.weights = {name: p for name, p in chosen.items() if not name.startswith(MIXING)}
        self.mixing = {name: p for name, p in chosen.items() if name.startswith(MIXING)}
        self.moving = self.weights
        self.rows = settings.trainable not in FROZEN_ROWS

    def gather(self) -> None:
        """Bring the gradients of `weights` to `moving`."""

    def merge(self) -> None:
        """Bring `moving` to `weights`."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing: all that moves is in the network."""
        return {}

    def reset(self) -> None:
        """Begin anew from the network's weights as they stand."""


class LowRank(Trainable):
    """Move the blocks' linear maps by a product of two thin matrices each: weight = base + up @ down.

    The network always holds the sum, so that what is served, tested and published knows nothing of the pairs; by the
    chain rule their gradients come from the sum's.
    """

    def __init__(self, settings: Settings, network: RecommendationNetwork) -> None:
        super().__init__(settings, network)
        rank, self._seed = settings.lora_rank, settings.seed
        # Pairs of another rank are another strategy's.
        self.name = f"low_rank_{rank}"
        self._maps = {name: weight for name, weight in self.weights.items() if re.fullmatch(LINEAR_MAPS, name)}
        self._base = {name: weight.detach().clone() for name, weight in self._maps.items()}
        self._down = {name: nn.Parameter(w.new_zeros(rank, w.shape[1])) for name, w in self._maps.items()}
        self._up = {name: nn.Parameter(w.new_zeros(w.shape[0], rank)) for name, w in self._maps.items()}
        pairs = {f"{self.name}.{name}.{end}": p for name, end, p in self._pairs()}
        self.moving = pairs | {name: weight for name, weight in self.weights.items() if name not in self._maps}
        self.reset()

    def _pairs(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        for name in self._maps:
            yield name, "down", self._down[name]
            yield name, "up", self._up[name]

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the gradients of the maps to the pairs."""
        for name, weight in self._maps.items():
            assert weight.grad is not None
            self._down[name].grad = self._up[name].T @ weight.grad
            self._up[name].grad = weight.grad @ self._down[name].T

    @torch.no_grad()
    def merge(self) -> None:
        """Bring the pairs to the maps."""
        for name, weight in self._maps.items():
            weight.copy_(torch.addmm(self._base[name], self._up[name], self._down[name]))

    def state(self) -> dict[str, Tensor]:
        """Return the bases and the pairs."""
        base = {f"{name}.base": tensor for name, tensor in self._base.items()}
        return base | {f"{name}.{end}": p.detach() for name, end, p in self._pairs()}

    @torch.no_grad()
    def reset(self) -> None:
        """Take the network's weights as the base; the pairs begin without effect, the same for one seed."""
        generator = torch.Generator().manual_seed(self._seed)
        for name, weight in self._maps.items():
            self._base[name].copy_(weight)
            drawn = torch.randn(self._down[name].shape, generator=generator) / weight.shape[1] ** 0.5
            self._down[name].copy_(drawn)
            self._up[name].zero_()


def kind(settings: Settings) -> str:
    """Name what moves and what there is: strategies that remember weights by name are others where this differs."""
    added = ((settings.adapter_width, "adapter"), (settings.prompt_length, "prompt"))
    return "_".join([settings.trainable, *(f"{name}{size}" for size, name in added if size)])


def build_trainable(settings: Settings, network: RecommendationNetwork) -> Trainable:
    """Make what the setting `trainable` asks for."""
    return (LowRank if settings.trainable == "lora" else Trainable)(settings, network)
