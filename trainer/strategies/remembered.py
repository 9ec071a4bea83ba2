"""Remembered: what a strategy must remember from step to step, written to the trainer's payload and read back.

A strategy keeps it in tensors that are filled in place. What a payload does not hold, because the strategy was not
chosen when it was written, begins anew from the weights as they stand; what it holds must fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.errors import CorruptWeights
from recsys.weights.replica import fits, to_array, to_tensor

PREFIX = "strategy."


class Remembering(Protocol):
    """Have a name of its own and tensors to remember."""

    name: str

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to remember, by name; writing into them sets the state."""

    def reset(self) -> None:
        """Begin anew from the network's weights as they stand."""


def write(strategies: Sequence[Remembering]) -> dict[str, NDArray[Any]]:
    """Copy what the strategies remember, under names that tell whose it is."""
    return {name: to_array(tensor) for each in strategies for name, tensor in _named(each).items()}


def check(strategies: Sequence[Remembering], dense: Mapping[str, NDArray[Any]]) -> None:
    """Refuse what is there in part or does not fit; nothing is changed.

    Raises:
        CorruptWeights: naming what is wrong.
    """
    for each in strategies:
        named = _named(each)
        found = {name for name in dense if name.startswith(f"{PREFIX}{each.name}.")}
        if found and found != set(named):
            raise CorruptWeights(f"{sorted(found ^ set(named))} do not fit the strategy {each.name}")
        for name in found:
            fits(name, dense[name], tuple(named[name].shape), named[name].dtype)


@torch.no_grad()
def restore(strategies: Sequence[Remembering], dense: Mapping[str, NDArray[Any]]) -> None:
    """Set every strategy to what `check` has let pass, or let it begin anew where that holds nothing of it."""
    for each in strategies:
        named = _named(each)
        if set(named) <= set(dense):
            for name, tensor in named.items():
                tensor.copy_(to_tensor(np.asarray(dense[name]), tensor.device))
        else:
            each.reset()


def _named(strategy: Remembering) -> dict[str, Tensor]:
    return {f"{PREFIX}{strategy.name}.{name}": tensor for name, tensor in strategy.state().items()}
