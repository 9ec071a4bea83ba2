"""Optimizers: AdamW, Adam or SGD for the dense part, AdamW for the mixing weights; their state, written and read back.

The state goes under the names of the parameters that it belongs to. Where there is none, before a parameter's first
gradient or because another optimizer or other parameters were chosen before, it begins anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsys.errors import CorruptWeights
from recsys.settings import Settings
from recsys.weights.replica import fits, to_array, to_tensor

MIX_LEARNING_RATE = 0.01
# The class head sees each feedback once and takes longer steps. On two real streams three times the rate was best, of
# one, two, three and ten.
HEAD = ("rank.", "rates.", "context.")
HEAD_TIMES = 3.0
TIMES = "times"
# Of SGD; the learning rate then moves ten times as far in the long run as it says.
MOMENTUM = 0.9
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
SGD_STATE = ("momentum_buffer",)
STATE = {*ADAM_STATE, *SGD_STATE}


class Optimizers:
    """Own one optimizer for `dense` and one for `mixing`, both parameters by name."""

    def __init__(
        self, settings: Settings, dense: Mapping[str, nn.Parameter], mixing: Mapping[str, nn.Parameter]
    ) -> None:
        self._dense, self._mixing = dense, mixing
        self._dense_optimizer = _build(settings, dense)
        self._mixing_optimizer = torch.optim.AdamW(
            list(mixing.values()), lr=MIX_LEARNING_RATE, weight_decay=0.0, fused=True
        )

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in (*self._dense.values(), *self._mixing.values()):
            parameter.grad = None

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the dense part."""
        for group in self._dense_optimizer.param_groups:
            group["lr"] = rate * group[TIMES]

    def step(self) -> None:
        """Move everything by its gradient."""
        self._dense_optimizer.step()
        self.step_mixing()

    def step_mixing(self) -> None:
        """Move the mixing weights by their gradient."""
        self._mixing_optimizer.step()

    def write(self) -> dict[str, NDArray[Any]]:
        """Copy the state."""
        return {
            f"{name}.{key}": to_array(value)
            for name, parameter, optimizer in self._owned()
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def check(self, dense: Mapping[str, NDArray[Any]]) -> None:
        """Refuse state that is there in part or does not fit; nothing is changed.

        Raises:
            CorruptWeights: naming what is wrong.
        """
        for name, parameter, optimizer in self._owned():
            found = [key for key in _keys(optimizer) if f"{name}.{key}" in dense]
            if found and tuple(found) != _keys(optimizer):
                raise CorruptWeights(f"the optimizer's state of {name} has {found} alone")
            for key in found:
                shape = () if key == "step" else tuple(parameter.shape)
                fits(f"{name}.{key}", dense[f"{name}.{key}"], shape, torch.float32)

    def restore(self, dense: Mapping[str, NDArray[Any]]) -> None:
        """Set the state to what `check` has let pass."""
        for name, parameter, optimizer in self._owned():
            optimizer.state.pop(parameter, None)
            keys = _keys(optimizer)
            if f"{name}.{keys[0]}" in dense:
                optimizer.state[parameter] = {key: to_tensor(dense[f"{name}.{key}"], parameter.device) for key in keys}

    def _owned(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        yield from ((name, p, self._dense_optimizer) for name, p in self._dense.items())
        yield from ((name, p, self._mixing_optimizer) for name, p in self._mixing.items())


def _build(settings: Settings, dense: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    head = [p for name, p in dense.items() if name.startswith(HEAD)]
    body = [p for name, p in dense.items() if not name.startswith(HEAD)]
    parameters = [
        {"params": group, "lr": rate * times, TIMES: times}
        for group, times in ((body, 1.0), (head, HEAD_TIMES))
        if group
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM, weight_decay=decay, fused=True)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=rate, weight_decay=decay, fused=True)


def _keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return SGD_STATE if isinstance(optimizer, torch.optim.SGD) else ADAM_STATE
