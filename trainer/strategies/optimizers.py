"""Optimizers: AdamW, Adam or SGD for the dense part, AdamW for the mixing weights; their state, written and read back.

The state goes under the names of the parameters that it belongs to. Where there is none, before a parameter's first
gradient or because another optimizer or other parameters were chosen before, it begins anew. What moves weights are
torch's own fused loops, and the numbers those of torch.optim; its classes import a compiler of seconds and 70 MB that
nothing here uses, and take longer to call the loops than these run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

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
# Of SGD; the learning rate then moves ten times as far in the long run as it says.
MOMENTUM = 0.9
# Of Adam and AdamW (Kingma and Ba 2015): how much is kept of both moments, and what keeps a step finite.
FIRST_KEPT, SECOND_KEPT, EPSILON = 0.9, 0.999, 1e-8
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
SGD_STATE = ("momentum_buffer",)
STATE = {*ADAM_STATE, *SGD_STATE}

State = dict[str, Tensor]
Named = Mapping[str, nn.Parameter]


class _Rule(Protocol):
    """Say what is remembered of a parameter, and how parameters of one device move by their gradients, in place."""

    keys: tuple[str, ...]

    def move(self, parameters: list[Tensor], states: Sequence[State], rate: float) -> None: ...


class _Adam:
    """AdamW where the decay is decoupled from the gradient, else Adam."""

    keys: tuple[str, ...] = ADAM_STATE

    def __init__(self, decay: float, *, decoupled: bool) -> None:
        self._decay = decay
        self._move: Callable[..., None] = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def move(self, parameters: list[Tensor], states: Sequence[State], rate: float) -> None:
        steps, first, second = ([state[key] for state in states] for key in ADAM_STATE)
        torch._foreach_add_(steps, 1)
        self._move(
            *(parameters, [each.grad for each in parameters], first, second, [], steps),
            **{"lr": rate, "beta1": FIRST_KEPT, "beta2": SECOND_KEPT, "weight_decay": self._decay, "eps": EPSILON},
            **{"amsgrad": False, "maximize": False},
        )


class _Sgd:
    keys: tuple[str, ...] = SGD_STATE

    def __init__(self, decay: float) -> None:
        self._decay = decay

    def move(self, parameters: list[Tensor], states: Sequence[State], rate: float) -> None:
        move: Callable[..., None] = torch._fused_sgd_
        move(
            *(parameters, [each.grad for each in parameters], [state["momentum_buffer"] for state in states]),
            **{"lr": rate, "momentum": MOMENTUM, "weight_decay": self._decay, "dampening": 0.0},
            **{"nesterov": False, "maximize": False, "is_first_step": False},
        )


class _Optimizer:
    """Move parameters, by name, as a rule says; those without a gradient stay as they are."""

    def __init__(self, rule: _Rule, parameters: Named) -> None:
        self._rule, self._parameters = rule, parameters
        self._states: dict[str, State] = {}

    @torch.no_grad()
    def step(self, rate: float, names: Sequence[str]) -> None:
        """Move those of these names."""
        moving = [name for name in names if self._parameters[name].grad is not None]
        if moving:
            parameters: list[Tensor] = [self._parameters[name] for name in moving]
            self._rule.move(parameters, [self._state(name) for name in moving], rate)

    def write(self) -> dict[str, NDArray[Any]]:
        """Copy the state."""
        states = ((name, self._states[name]) for name in self._parameters if name in self._states)
        return {f"{name}.{key}": to_array(value) for name, state in states for key, value in state.items()}

    def check(self, dense: Mapping[str, NDArray[Any]]) -> None:
        """Refuse state that is there in part or does not fit; nothing is changed."""
        for name, parameter in self._parameters.items():
            found = [key for key in self._rule.keys if f"{name}.{key}" in dense]
            if found and tuple(found) != self._rule.keys:
                raise CorruptWeights(f"the optimizer's state of {name} has {found} alone")
            for key in found:
                shape = () if key == "step" else tuple(parameter.shape)
                fits(f"{name}.{key}", dense[f"{name}.{key}"], shape, torch.float32)

    def restore(self, dense: Mapping[str, NDArray[Any]]) -> None:
        """Set the state to what `check` has let pass."""
        keys = self._rule.keys
        self._states = {
            name: {key: to_tensor(dense[f"{name}.{key}"], parameter.device) for key in keys}
            for name, parameter in self._parameters.items()
            if f"{name}.{keys[0]}" in dense
        }

    def _state(self, name: str) -> State:
        if name not in self._states:
            parameter = self._parameters[name]
            self._states[name] = {
                key: torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
                for key in self._rule.keys
            }
        return self._states[name]


class Optimizers:
    """Own one optimizer for `dense` and one for `mixing`, both parameters by name."""

    def __init__(self, settings: Settings, dense: Named, mixing: Named) -> None:
        self._parameters = [*dense.values(), *mixing.values()]
        decay, kind = settings.weight_decay, settings.optimizer
        rule = _Sgd(decay) if kind == "sgd" else _Adam(decay, decoupled=kind == "adamw")
        self._dense, self._mixing = _Optimizer(rule, dense), _Optimizer(_Adam(0.0, decoupled=True), mixing)
        head = [name for name in dense if name.startswith(HEAD)]
        self._groups = ([name for name in dense if name not in head], 1.0), (head, HEAD_TIMES)
        self._mixing_names = list(mixing)
        self._rate = settings.learning_rate

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the dense part."""
        self._rate = rate

    def step(self) -> None:
        """Move everything by its gradient."""
        for names, times in self._groups:
            self._dense.step(self._rate * times, names)
        self.step_mixing()

    def step_mixing(self) -> None:
        """Move the mixing weights by their gradient."""
        self._mixing.step(MIX_LEARNING_RATE, self._mixing_names)

    def write(self) -> dict[str, NDArray[Any]]:
        """Copy the state."""
        return {**self._dense.write(), **self._mixing.write()}

    def check(self, dense: Mapping[str, NDArray[Any]]) -> None:
        """Refuse state that is there in part or does not fit; nothing is changed.

        Raises:
            CorruptWeights: naming what is wrong.
        """
        self._dense.check(dense)
        self._mixing.check(dense)

    def restore(self, dense: Mapping[str, NDArray[Any]]) -> None:
        """Set the state to what `check` has let pass."""
        self._dense.restore(dense)
        self._mixing.restore(dense)
