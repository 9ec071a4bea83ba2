"""Strategies: each does what it says, by hand or beside a reference, and stops and starts bit for bit."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from learning import CPU, append, fork, head, learn_all, make_feedback, small, trainer, versions
from strategic import copied, draw, go_on, learned, payloads, small_settings, weights_of
from torch import nn

from recsys.errors import CorruptWeights
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import WeightPayload
from trainer.rebuild import Rebuild
from trainer.strategies.average import WARM_UP, Average
from trainer.strategies.following_rate import BLOCK, LEAST, LOWER, MOST, PATIENCE, RAISE, FollowingRate
from trainer.strategies.optimizers import HEAD_TIMES, MIX_LEARNING_RATE, MOMENTUM, Optimizers

ITEMS = 20
EVERY: dict[str, dict[str, Any]] = {
    "head": {"trainable": "head"},
    "bias": {"trainable": "bias"},
    "lora": {"trainable": "lora", "lora_rank": 2},
    "adapter": {"trainable": "adapter", "adapter_width": 3},
    "prompt": {"trainable": "prompt", "prompt_length": 2},
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.01},
    "average": {"average_decay": 0.9},
    "l2sp": {"l2sp_weight": 0.5, "anchor_steps": 7},
    "ewc": {"ewc_weight": 10.0, "anchor_steps": 7},
    "distillation": {"distillation_weight": 1.0, "anchor_steps": 7},
    "follow_loss": {"follow_loss": True},
    "drift_boost": {"drift_boost": 3.0},
    "squared_error": {"squared_error_weight": 1.0},
    "bayesian_head": {"bayesian_head": True},
    "together": {
        **{"trainable": "lora", "optimizer": "sgd", "average_decay": 0.9, "anchor_steps": 5, "l2sp_weight": 0.1},
        **{"ewc_weight": 1.0, "distillation_weight": 1.0, "follow_loss": True, "squared_error_weight": 0.5},
        **{"bayesian_head": True},
    },
}
# What the trainer's payload holds beside the optimizers' state.
KEPT = {"steps", "followed", "drift", "drift_misled", "drift_category_mix", "trust", "trust_accounts", "crowd"}
every = pytest.mark.parametrize("changes", EVERY.values(), ids=EVERY)


# Optimizers


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_two_steps_of_each_optimizer_by_hand(optimizer: str) -> None:
    rate, decay, gradient, weight = 0.1, 0.5, 3.0, 2.0
    settings = small_settings(optimizer=optimizer, learning_rate=rate, weight_decay=decay)
    parameter, mixing = nn.Parameter(torch.tensor([weight])), nn.Parameter(torch.zeros(1))
    optimizers = Optimizers(settings, {"w": parameter}, {"mix.w": mixing})
    momentum = square = 0.0
    for step in (1, 2):
        parameter.grad = torch.tensor([gradient])
        optimizers.step()
        g = gradient + (0 if optimizer == "adamw" else decay * weight)
        if optimizer == "sgd":
            momentum = MOMENTUM * momentum + g
            weight -= rate * momentum
        else:
            momentum, square = 0.9 * momentum + 0.1 * g, 0.999 * square + 0.001 * g * g
            if optimizer == "adamw":
                weight *= 1 - rate * decay
            weight -= rate * (momentum / (1 - 0.9**step)) / (math.sqrt(square / (1 - 0.999**step)) + 1e-8)
        assert float(parameter.detach()) == pytest.approx(weight, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weights_are_bit_for_bit_those_of_torchs_own_classes(optimizer: str) -> None:
    rate, decay, factor = 0.01, 0.1, 0.5
    settings = small_settings(optimizer=optimizer, learning_rate=rate, weight_decay=decay)
    shapes = {"body.weight": (5, 3), "rank.weight": (7,), "mix.weight": (2, 2)}
    random = torch.Generator().manual_seed(4)
    ours = {name: nn.Parameter(torch.randn(shape, generator=random)) for name, shape in shapes.items()}
    theirs = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
    mixing = {"mix.weight": ours["mix.weight"]}
    dense = {name: parameter for name, parameter in ours.items() if name not in mixing}
    optimizers = Optimizers(settings, dense, mixing)
    groups = [
        {"params": [theirs["body.weight"]], "lr": factor * rate},
        {"params": [theirs["rank.weight"]], "lr": factor * rate * HEAD_TIMES},
    ]
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, momentum=MOMENTUM)}
    expected = kinds[optimizer](groups, lr=rate, weight_decay=decay, fused=True)
    expected_mixing = torch.optim.AdamW([theirs["mix.weight"]], lr=MIX_LEARNING_RATE, weight_decay=0.0, fused=True)
    optimizers.set_rate(factor * rate)
    for step in range(6):
        for name, parameter in ours.items():
            # A parameter's first gradient may come late, and it may have none now and then.
            given = not (name == "rank.weight" and step in (0, 3))
            parameter.grad = torch.randn(shapes[name], generator=random) if given else None
            theirs[name].grad = None if parameter.grad is None else parameter.grad.clone()
        if step == 4:
            # As after a restart.
            state = optimizers.write()
            optimizers = Optimizers(settings, dense, mixing)
            optimizers.check(state)
            optimizers.restore(state)
            optimizers.set_rate(factor * rate)
        optimizers.step()
        expected.step()
        expected_mixing.step()
        for name, parameter in ours.items():
            assert torch.equal(parameter, theirs[name]), (step, name)


def test_to_learn_imports_no_compiler() -> None:
    # It takes seconds and 70 MB of every process that learns.
    program = (
        "import sys; from recsys.device import choose; from recsys.settings import load; "
        "from trainer.learner import Learner; Learner(load({}, environment={}), choose('cpu')); "
        "print('torch._dynamo' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout == "False\n"


# Average


def test_the_network_between_steps_is_the_average_of_what_learns() -> None:
    settings = small_settings(average_decay=0.8, replay_size=0)
    learner = learned(settings)
    average = {name: p.detach().double() for name, p in learner.network.named_parameters() if "mix." not in name}
    for step in range(12):
        go_on(learner, step, step + 1)
        raw = learner.strategies._average.state()  # type: ignore[union-attr]
        decay = min(0.8, (1 + step) / (WARM_UP + step))
        for name, parameter in learner.network.named_parameters():
            if name in average:
                average[name] = decay * average[name] + (1 - decay) * raw[name].double()
                torch.testing.assert_close(parameter.detach().double(), average[name], rtol=1e-4, atol=1e-6)
    assert not torch.equal(raw["position"], learner.network.position)


def test_the_average_is_put_back_whatever_happens() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    average = Average(0.5, {"w": weight}, "all")
    average.take_out()
    weight.data.fill_(3.0)
    average.learned()
    average.put_back()
    # The first decay is 1/10.
    assert weight.tolist() == pytest.approx([0.1 * 1.0 + 0.9 * 3.0])
    average.take_out()
    assert weight.tolist() == [3.0]
    average.put_back()
    assert weight.tolist() == pytest.approx([2.8])


# Learning rate


def _noise(mean: float, count: int, seed: int) -> list[float]:
    return np.random.default_rng(seed).normal(mean, 0.3, count).tolist()


def test_the_rate_stays_while_the_loss_falls_sinks_on_a_plateau_and_rises_on_a_drift() -> None:
    rate = FollowingRate()
    for block in range(20):
        for loss in _noise(5.0 - 0.2 * block, BLOCK, block):
            rate.observe(loss)
    assert rate.factor == 1.0
    lowest = min(5.0 - 0.2 * 19, 1.2)
    for _ in range(PATIENCE * BLOCK):
        rate.observe(lowest + 0.5 * 0.2)
    assert rate.factor == pytest.approx(LOWER)
    for loss in _noise(3.0, BLOCK, 1):
        rate.observe(loss)
    assert rate.factor == pytest.approx(LOWER * RAISE)
    rate.observe(math.nan)
    rate.observe(math.inf)
    assert rate.state()["block"].tolist() == [0.0, 0.0, 0.0]


def test_the_rate_has_bounds() -> None:
    low, high = FollowingRate(), FollowingRate()
    for number in range(100 * BLOCK):
        low.observe(1.0)
        high.observe(float(number // BLOCK))
    assert (low.factor, high.factor) == (LEAST, MOST)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_drift(seed: int) -> None:
    rate, highest = FollowingRate(), 1.0
    for loss in _noise(2.0, 200 * BLOCK, seed):
        before = rate.factor
        rate.observe(loss)
        highest = max(highest, rate.factor / before)
    assert highest == 1.0


def test_the_rate_is_what_both_parts_learn_with() -> None:
    moved = {}
    for factor in (1.0, 0.25):
        learner = learned(small_settings(follow_loss=True, optimizer="sgd", weight_decay=0.0, replay_size=0), 3)
        learner.strategies._rate.state()["factor"].fill_(factor)  # type: ignore[union-attr]
        position, vectors = learner.network.position.detach().clone(), learner.table.column("vector").clone()
        go_on(learner, 3, 4)
        moved[factor] = learner.network.position.detach() - position, learner.table.column("vector") - vectors
    for slow, fast in zip(moved[0.25], moved[1.0], strict=True):
        assert fast.abs().max() > 1e-4
        torch.testing.assert_close(4 * slow, fast, rtol=1e-3, atol=1e-6)


# Classes


def test_the_squared_error_is_of_the_expected_place_among_the_classes() -> None:
    """Worths 0, 1, 2 and 5: places 0, 0.2, 0.4 and 1."""
    learner = learned(small_settings(squared_error_weight=3.0))
    logits, classes = (
        torch.log(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0001, 0.0, 0.9999, 0.0]])),
        torch.tensor([3, 2]),
    )
    cross = -(math.log(0.25) + math.log(0.9999)) / 2
    squared = ((0.4 - 1.0) ** 2 + (0.9999 * 0.4 - 0.4) ** 2) / 2
    assert float(learner.strategies.class_loss(logits, classes)) == pytest.approx(cross + 3 * squared, rel=1e-5)
    plain = learned(small_settings()).strategies.class_loss(logits, classes)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(logits, classes))


# Stopped and started


def test_by_default_nothing_is_remembered_but_the_optimizers_state_and_what_is_monitored() -> None:
    learner = learned(small_settings(), 3)
    names = {f"{name}.{key}" for name in weights_of(learner) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(learner.write_all()[1].dense) == {*KEPT, *names}


@every
def test_a_restored_learner_goes_on_as_if_never_stopped(changes: dict[str, Any]) -> None:
    settings = small_settings(**changes)
    through = learned(settings)
    # Before the first step there is a version too.
    other = copied(through, settings)
    for step in range(0, 40, 8):
        go_on(through, step, step + 8)
        other = copied(through, settings)
        assert payloads(other) == payloads(through)
        # The same window for both: what the other draws is not added twice.
        window, other.window = other.window, learned(settings).window
        del window
    assert any(name.startswith("strategy.") or "exp_avg" not in name for name in through.write_all()[1].dense)


@every
def test_a_log_gives_one_chain_of_versions_wherever_the_trainer_restarts(
    settings: Settings, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small(settings, **changes)
    append(base, make_feedback(200))
    restarted = fork(base, "restarted")
    weights = learn_all(base)
    monkeypatch.setattr("trainer.daemon.READ_COUNT", 41)
    for _ in range(4):
        with trainer(restarted) as daemon:
            daemon.start()
            daemon.step()
    assert learn_all(restarted) == weights
    assert versions(restarted) == versions(base)
    assert len(versions(base)) == 25
    with connect(base) as client:
        assert Rebuild(client, base, CPU).run(head(base)[0]).equal


@every
def test_what_was_learned_can_be_learned_again(changes: dict[str, Any]) -> None:
    learner = learned(small_settings(**changes), 3)
    for number in (0, 2):
        assert learner.step(draw(learner, number), again=True).learned


@every
def test_what_is_not_finite_changes_nothing(changes: dict[str, Any]) -> None:
    learner = learned(small_settings(**changes, replay_size=0), 10)
    before = payloads(learner)
    vector = learner.table.columns["vector"]
    kept = vector[3].clone()
    vector[3] = math.inf
    assert not learner.step(draw(learner, 10)).learned
    vector[3] = kept
    learner.steps -= 1
    assert payloads(learner) == before


# Other settings than before


@every
def test_another_strategy_goes_on_from_any_weights_and_back(changes: dict[str, Any]) -> None:
    # The network is the same.
    added = {name: changes[name] for name in ("adapter_width", "prompt_length") if name in changes}
    plain, other = small_settings(**added), small_settings(**changes)
    first = learned(plain, 5)
    second = copied(first, other)
    assert payloads(second)[0] == payloads(first)[0]
    # It begins anew twice alike: nothing but the payload has a say.
    third = copied(first, other)
    assert payloads(third) == payloads(second)
    go_on(second, 5, 12)
    back = copied(second, plain)
    assert payloads(back)[0] == payloads(second)[0]
    go_on(back, 12, 15)


def test_what_moves_may_be_chosen_anew_under_any_strategy() -> None:
    learner = learned(small_settings(average_decay=0.9, l2sp_weight=0.1), 3)
    for changes in (
        {"trainable": "head"},
        {"ewc_weight": 1.0},
        {"trainable": "lora"},
        {"trainable": "lora", "lora_rank": 1},
        {"trainable": "bias"},
    ):
        other = copied(learner, small_settings(average_decay=0.9, l2sp_weight=0.1, **changes))
        assert payloads(other)[0] == payloads(learner)[0]
        go_on(other, 3, 5)
        learner = other


def _damaged(own: WeightPayload, damage: Callable[[dict[str, Any]], None]) -> WeightPayload:
    dense = dict(own.dense)
    damage(dense)
    return replace(own, dense=dense)


@pytest.mark.parametrize(
    "damage",
    [
        lambda dense: dense.pop("strategy.average_all.steps"),
        lambda dense: dense.pop("position.exp_avg"),
        lambda dense: dense.pop("steps"),
        lambda dense: dense.update({"strategy.average_all.position": np.zeros(3, np.float32)}),
        lambda dense: dense.update({"strategy.average_all.steps": np.zeros(1, np.float32)}),
        lambda dense: dense.update({"strategy.average_all.other": np.zeros(1, np.float32)}),
        lambda dense: dense.update({"position.exp_avg": np.zeros(3, np.float32)}),
        lambda dense: dense.update({"other": np.zeros(3, np.float32)}),
    ],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(damage: Callable[[dict[str, Any]], None]) -> None:
    settings = small_settings(average_decay=0.9)
    served, own = learned(settings, 3).write_all()
    other = learned(settings, 1)
    before = payloads(other)
    with pytest.raises(CorruptWeights):
        other.restore(served, _damaged(own, damage))
    assert payloads(other) == before
