"""Additions: what settings may add to the network's blocks, without effect until it has learned.

Shapes as in recsys.network; N vectors of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What a block calls them.
ADAPTER, PROMPT = "adapter", "prompt"
# Of a prompt's vectors before they have learned.
PROMPT_SCALE = 0.02


class Adapter(nn.Module):
    """A narrow detour with a shortcut; its way out begins at zero. Houlsby et al. 2019."""

    def __init__(self, dimension: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(dimension, width)
        self.up = nn.Linear(width, dimension)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input and what the detour adds to it: (..., D)."""
        detour: Tensor = self.up(F.gelu(self.down(x)))
        return x + detour


class Prompt(nn.Module):
    """Learned vectors that are attended to as if they stood before every history.

    Each block has its own (prefix tuning, Li and Liang 2021). They have a softmax to themselves, and what they give is
    weighed by a gate for each head that begins at zero (Zhang et al. 2023, LLaMA-Adapter).
    """

    def __init__(self, dimension: int, heads: int, length: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(length, dimension))
        nn.init.normal_(self.vectors, std=PROMPT_SCALE)
        self.gate = nn.Parameter(torch.zeros(heads))

    def mixed(self, q_BHD: Tensor) -> Tensor:
        """Return the mix of the vectors, before the values' map, that queries behind the keys' map find: (B, H, D)."""
        attention_BHN = (q_BHD @ self.vectors.T).softmax(-1)
        return self.gate[:, None] * (attention_BHN @ self.vectors)


def additions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return of a network's tensors, by name, those that settings added."""
    return {name: tensor for name, tensor in state.items() if not {ADAPTER, PROMPT}.isdisjoint(name.split("."))}
