"""Strategies: each does what it says, by hand or beside a reference, and stops and starts bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from learning import CPU, append, fork, head, learn_all, make_feedback, small, trainer, versions
from torch import Tensor, nn

from recsys.encoding import RowHistory
from recsys.errors import CorruptWeights
from recsys.network import Histories, build_network
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.weights import WeightPayload, decode, encode
from recsys.weights.replica import Replica
from trainer.examples import Event, Examples
from trainer.examples import encode as encode_events
from trainer.learner import Learner
from trainer.rebuild import Rebuild
from trainer.strategies.anchor import FISHER_DECAY, Anchor
from trainer.strategies.average import WARM_UP, Average
from trainer.strategies.following_rate import BLOCK, LEAST, LOWER, MOST, PATIENCE, RAISE, FollowingRate
from trainer.strategies.last_layer import LastLayer
from trainer.strategies.optimizers import MOMENTUM, Optimizers

ITEMS = 20
EVERY: dict[str, dict[str, Any]] = {
    "head": {"trainable": "head"},
    "bias": {"trainable": "bias"},
    "lora": {"trainable": "lora", "lora_rank": 2},
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.01},
    "average": {"average_decay": 0.9},
    "l2sp": {"l2sp_weight": 0.5, "anchor_steps": 7},
    "ewc": {"ewc_weight": 10.0, "anchor_steps": 7},
    "distillation": {"distillation_weight": 1.0, "anchor_steps": 7},
    "follow_loss": {"follow_loss": True},
    "squared_error": {"squared_error_weight": 1.0},
    "bayesian_head": {"bayesian_head": True},
    "together": {
        **{"trainable": "lora", "optimizer": "sgd", "average_decay": 0.9, "anchor_steps": 5, "l2sp_weight": 0.1},
        **{"ewc_weight": 1.0, "distillation_weight": 1.0, "follow_loss": True, "squared_error_weight": 0.5},
        **{"bayesian_head": True},
    },
}
every = pytest.mark.parametrize("changes", EVERY.values(), ids=EVERY)


def _settings(**changes: Any) -> Settings:
    return small(load({"classes": "shop"}, environment={}), batch_size=8, **changes)


def _batch(learner: Learner, seed: int) -> Examples:
    """Draw feedback of users that go through the items in turn."""
    random = np.random.default_rng(seed)
    learner.allocate(f"item-{n}" for n in range(ITEMS))
    events = []
    for _ in range(learner.settings.batch_size):
        first = int(random.integers(ITEMS))
        rows = tuple(1 + (first + n) % ITEMS for n in range(4))
        history = RowHistory(rows[:-1], (1, 2, 1), (0, 1000, 5000))
        events.append(Event(rows[-1], int(random.integers(4)), 9000, history, {"page": "a"}))
    return encode_events(events, learner.settings)


def _learner(settings: Settings, steps: int = 0) -> Learner:
    learner = Learner(settings, CPU)
    _go_on(learner, 0, steps)
    return learner


def _go_on(learner: Learner, first: int, last: int) -> None:
    for number in range(first, last):
        assert learner.step(_batch(learner, number)).learned


def _payloads(learner: Learner) -> tuple[bytes, bytes]:
    served, own = learner.write_all()
    return encode(served), encode(own)


def _copy(learner: Learner, settings: Settings) -> Learner:
    other = Learner(settings, CPU)
    other.restore(*map(decode, _payloads(learner)))
    other.window = learner.window
    return other


def _weights(learner: Learner) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.network.named_parameters()}


# What moves


@pytest.mark.parametrize(
    ("trainable", "moves", "rows"),
    [
        ("all", lambda name: True, True),
        ("head", lambda name: name.startswith(("rank.", "rates.", "mix.")), False),
        ("bias", lambda name: name.endswith("bias"), True),
        (
            "lora",
            lambda name: (
                name.startswith("mix.")
                or (name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name)
            ),
            True,
        ),
    ],
)
def test_what_is_chosen_moves_and_nothing_else(trainable: str, moves: Callable[[str], bool], rows: bool) -> None:
    learner = _learner(_settings(trainable=trainable, blocks=2))
    _batch(learner, 0)
    before = _weights(learner)
    vectors = learner.table.column("vector").clone()
    _go_on(learner, 0, 3)
    moved = {name for name, old in before.items() if not torch.equal(old, _weights(learner)[name])}
    assert moved == {name for name in before if moves(name)}
    assert torch.equal(vectors, learner.table.column("vector")) is not rows
    # Counts go on whatever is frozen.
    assert learner.table.clock == 24


def test_low_rank_pairs_are_merged_and_their_gradients_are_those_of_the_product() -> None:
    learner = _learner(_settings(trainable="lora", lora_rank=2))
    initial = {name: tensor.clone() for name, tensor in learner.network.state_dict().items()}
    _go_on(learner, 0, 20)
    low = learner.strategies._trainable
    for name, weight in low.weights.items():
        moved = weight.detach() - initial[name]
        assert moved.abs().max() > 1e-4
        assert torch.linalg.matrix_rank(moved, atol=1e-5) <= 2
        down, up = (
            low.moving[f"{low.name}.{name}.{kind}"].detach().clone().requires_grad_() for kind in ("down", "up")
        )
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        ((up @ down) * weight.grad).sum().backward()
        low.gather()
        for kind, expected in (("down", down), ("up", up)):
            torch.testing.assert_close(low.moving[f"{low.name}.{name}.{kind}"].grad, expected.grad)
    # A server with any settings of learning reads it.
    Replica(_settings(), CPU).apply(learner.write_all()[0])


def test_low_rank_pairs_begin_without_effect() -> None:
    through = _learner(_settings(), 5)
    other = _copy(through, _settings(trainable="lora"))
    assert _payloads(other)[0] == _payloads(through)[0]
    low = other.strategies._trainable
    low.merge()
    assert _payloads(other)[0] == _payloads(through)[0]


# Optimizers


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_two_steps_of_each_optimizer_by_hand(optimizer: str) -> None:
    rate, decay, gradient, weight = 0.1, 0.5, 3.0, 2.0
    settings = _settings(optimizer=optimizer, learning_rate=rate, weight_decay=decay)
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


# Average


def test_the_network_between_steps_is_the_average_of_what_learns() -> None:
    settings = _settings(average_decay=0.8)
    learner = _learner(settings)
    average = {name: p.detach().double() for name, p in learner.network.named_parameters() if "mix." not in name}
    for step in range(12):
        _go_on(learner, step, step + 1)
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


# Anchor


def test_the_pull_is_the_gradient_of_the_penalties() -> None:
    settings = _settings(l2sp_weight=0.3, ewc_weight=2.0)
    network = build_network(settings)
    weights = dict(network.named_parameters())
    anchor = Anchor(settings, network, weights)
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(3)
    fisher = {name: torch.zeros_like(weight) for name, weight in start.items()}
    for _ in range(3):
        task = {name: torch.randn(w.shape, generator=generator) for name, w in start.items()}
        for name, weight in weights.items():
            weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator))
            weight.grad = task[name].clone()
        anchor.pull(16)
        penalty = torch.zeros(())
        copies = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        for name, copy in copies.items():
            penalty = penalty + ((0.3 + 2.0 * fisher[name]) * (copy - start[name]) ** 2).sum() / 2
        penalty.backward()
        for name, weight in weights.items():
            torch.testing.assert_close(weight.grad, task[name] + copies[name].grad)
            fisher[name] = FISHER_DECAY * fisher[name] + (1 - FISHER_DECAY) * 16 * task[name] ** 2
        anchor.learned()


def test_the_anchor_moves_at_its_steps() -> None:
    learner = _learner(_settings(l2sp_weight=1.0, anchor_steps=4))
    anchor = learner.strategies._anchor
    assert anchor is not None
    before = {name: tensor.clone() for name, tensor in anchor.state().items()}
    for step in range(1, 10):
        weights = {f"weights.{name}": weight for name, weight in _weights(learner).items()}
        _go_on(learner, step, step + 1)
        if step % 4 == 0:
            before = weights
        assert all(torch.equal(before[name], tensor) for name, tensor in anchor.state().items())


def _drift(learner: Learner, before: dict[str, Tensor]) -> float:
    now = _weights(learner)
    return math.sqrt(sum(float((now[n] - old).square().sum()) for n, old in before.items() if "mix." not in n))


@pytest.mark.parametrize(("weight", "strong"), [("l2sp_weight", 100.0), ("ewc_weight", 1e5)])
def test_a_pull_keeps_the_weights_nearer(weight: str, strong: float) -> None:
    moved = []
    for strength in (0.0, strong):
        learner = _learner(_settings(anchor_steps=1000, **{weight: strength}))
        before = _weights(learner)
        _go_on(learner, 0, 40)
        moved.append(_drift(learner, before))
    assert moved[1] < 0.7 * moved[0]


def _histories(rows: list[list[int]]) -> Histories:
    rows_BL = torch.tensor(rows)
    return Histories(rows_BL, (rows_BL != 0).long(), torch.zeros_like(rows_BL))


def test_distillation_is_the_divergence_of_two_softmaxes() -> None:
    settings = _settings(distillation_weight=1.0)
    network = build_network(settings).eval()
    anchor = Anchor(settings, network, dict(network.named_parameters()))
    generator = torch.Generator().manual_seed(5)
    table, sampled = (torch.randn(n, settings.dimension, generator=generator) for n in (9, 6))
    histories = _histories([[0, 0, 1, 2, 3], [0, 0, 0, 0, 0], [4, 5, 6, 7, 8]])
    vectors = table[histories.rows_BL]

    def states() -> Tensor:
        return network.states(vectors, vectors[:, -1], histories)

    earlier = states().detach()
    assert float(anchor.distil(histories, vectors, states().detach(), sampled)) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        network.position.add_(0.5 * torch.randn(network.position.shape, generator=generator))
    later = states()
    expected = []
    for user in (0, 2):
        p, q = ((s[user] @ sampled.T).softmax(0).detach().double() for s in (earlier, later))
        expected.append(float((p * (p / q).log()).sum()))
    assert float(anchor.distil(histories, vectors, later.detach(), sampled)) == pytest.approx(
        sum(expected) / 2, rel=1e-4
    )


def test_distillation_keeps_what_is_said() -> None:
    """The same feedback, with and without: how far the user states have gone is less with."""
    said = []
    for weight in (0.0, 30.0):
        learner = _learner(_settings(anchor_steps=1000, distillation_weight=weight, dropout=0.0))
        reference = build_network(learner.settings).eval()
        _go_on(learner, 0, 40)
        histories = _batch(learner, 99).histories(CPU)
        vectors = learner.table.column("vector")
        learner.network.eval()
        with torch.no_grad():
            now, then = (
                (n.states(vectors[histories.rows_BL], vectors[histories.rows_BL[:, -1]], histories) @ vectors.T)
                for n in (learner.network, reference)
            )
        said.append(float(nn.functional.kl_div(now.log_softmax(1), then.softmax(1), reduction="batchmean")))
    assert said[1] < 0.5 * said[0]


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
        learner = _learner(_settings(follow_loss=True, optimizer="sgd", weight_decay=0.0), 3)
        learner.strategies._rate.state()["factor"].fill_(factor)  # type: ignore[union-attr]
        position, vectors = learner.network.position.detach().clone(), learner.table.column("vector").clone()
        _go_on(learner, 3, 4)
        moved[factor] = learner.network.position.detach() - position, learner.table.column("vector") - vectors
    for slow, fast in zip(moved[0.25], moved[1.0], strict=True):
        assert fast.abs().max() > 1e-4
        torch.testing.assert_close(4 * slow, fast, rtol=1e-3, atol=1e-6)


# Classes


def test_the_squared_error_is_of_the_expected_place_among_the_classes() -> None:
    """Worths 0, 1, 2 and 5: places 0, 0.2, 0.4 and 1."""
    learner = _learner(_settings(squared_error_weight=3.0))
    logits, classes = (
        torch.log(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0001, 0.0, 0.9999, 0.0]])),
        torch.tensor([3, 2]),
    )
    cross = -(math.log(0.25) + math.log(0.9999)) / 2
    squared = ((0.4 - 1.0) ** 2 + (0.9999 * 0.4 - 0.4) ** 2) / 2
    assert float(learner.strategies.class_loss(logits, classes)) == pytest.approx(cross + 3 * squared, rel=1e-5)
    plain = _learner(_settings()).strategies.class_loss(logits, classes)
    assert torch.equal(plain, nn.functional.cross_entropy(logits, classes))


# The last layer


def _watched(seed: int, count: int) -> tuple[LastLayer, nn.Linear, Tensor, Tensor, Tensor]:
    """A last layer fitted to `count` examples of a planted rule; what went in, the classes, and the rule's weights."""
    network = build_network(_settings())
    last = network.rank[-1]
    assert isinstance(last, nn.Linear)
    layer, generator = LastLayer(network), torch.Generator().manual_seed(seed)
    rule_CF = torch.randn(last.out_features, last.in_features, generator=generator) / 4
    inputs_XF = torch.randn(count, last.in_features, generator=generator)
    classes_X = torch.multinomial((inputs_XF @ rule_CF.T).softmax(1), 1, generator=generator)[:, 0]
    optimizer = torch.optim.Adam(last.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (nn.functional.cross_entropy(last(inputs_XF), classes_X)).backward()
        optimizer.step()
    network.train()
    layer.watch(last(inputs_XF))
    layer.learned(count)
    network.eval()
    return layer, last, inputs_XF, classes_X, rule_CF


def test_the_variance_is_that_of_the_whole_kronecker_product() -> None:
    layer, last, inputs, _, _ = _watched(1, 50)
    state = {name: tensor.double() for name, tensor in layer.state().items()}
    one = torch.cat([inputs, torch.ones(50, 1)], 1).double()
    torch.testing.assert_close(state["moments"], one.T @ one, rtol=2e-3, atol=1e-3)
    p = last(inputs).softmax(1).detach().double()
    expected = sum(torch.diag(each) - torch.outer(each, each) for each in p)
    torch.testing.assert_close(state["curvature"], expected, rtol=2e-3, atol=1e-3)
    assert float(state["count"]) == pytest.approx(50)
    root = state["count"].sqrt()
    precision = torch.kron(
        state["moments"] / root + torch.eye(len(state["moments"])), state["curvature"] / root + torch.eye(4)
    )
    covariance = torch.linalg.inv(precision)
    found = layer.variances(inputs[:3])
    for b in range(3):
        # Row-major: weight (f, c) at f * C + c.
        jacobian = torch.kron(one[b : b + 1], torch.eye(4))
        torch.testing.assert_close(
            found[b].double(), (jacobian @ covariance @ jacobian.T).diagonal(), rtol=1e-3, atol=0
        )


def test_samples_have_the_mean_and_the_variance() -> None:
    layer, last, inputs, _, _ = _watched(2, 30)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([layer.sample(inputs[:2], last(inputs[:2]).detach(), generator) for _ in range(1000)])
    variance = layer.variances(inputs[:2])
    assert ((drawn.mean(0) - last(inputs[:2]).detach()).abs() < 5 * (variance / 1000).sqrt()).all()
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.25, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_are_better_calibrated_than_those_of_an_overfitted_layer(seed: int) -> None:
    layer, last, _, _, rule = _watched(seed, 60)
    generator = torch.Generator().manual_seed(100 + seed)
    inputs = torch.randn(4000, last.in_features, generator=generator)
    classes = torch.multinomial((inputs @ rule.T).softmax(1), 1, generator=generator)[:, 0]
    logits = last(inputs).detach()
    plain, bayesian = logits.softmax(1), layer.probabilities(layer.inputs, logits)
    losses, gaps = [], []
    for probabilities in (plain, bayesian):
        losses.append(float(nn.functional.nll_loss(probabilities.log(), classes)))
        best, said = probabilities.max(1)
        gaps.append(abs(float(best.mean() - (said == classes).float().mean())))
    assert losses[1] < 0.9 * losses[0]
    assert gaps[1] < 0.7 * gaps[0]


def test_the_last_layer_counts_what_is_new_once() -> None:
    learner = _learner(_settings(bayesian_head=True), 10)
    layer = learner.strategies.last_layer
    assert layer is not None
    assert float(layer.state()["count"]) == pytest.approx(80, rel=1e-2)
    learner.step(_batch(learner, 3), again=True)
    assert float(layer.state()["count"]) == pytest.approx(80, rel=1e-2)


# Stopped and started


def test_by_default_nothing_is_remembered_but_the_optimizers_state() -> None:
    learner = _learner(_settings(), 3)
    names = {f"{name}.{key}" for name in _weights(learner) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(learner.write_all()[1].dense) == {"steps", *names}


@every
def test_a_restored_learner_goes_on_as_if_never_stopped(changes: dict[str, Any]) -> None:
    settings = _settings(**changes)
    through = _learner(settings)
    # Before the first step there is a version too.
    other = _copy(through, settings)
    for step in range(0, 40, 8):
        _go_on(through, step, step + 8)
        other = _copy(through, settings)
        assert _payloads(other) == _payloads(through)
        # The same window for both: what the other draws is not added twice.
        window, other.window = other.window, _learner(settings).window
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
def test_what_is_not_finite_changes_nothing(changes: dict[str, Any]) -> None:
    learner = _learner(_settings(**changes), 10)
    before = _payloads(learner)
    vector = learner.table.columns["vector"]
    kept = vector[3].clone()
    vector[3] = math.inf
    assert not learner.step(_batch(learner, 10)).learned
    vector[3] = kept
    learner.steps -= 1
    assert _payloads(learner) == before


# Other settings than before


@every
def test_another_strategy_goes_on_from_any_weights_and_back(changes: dict[str, Any]) -> None:
    plain, other = _settings(), _settings(**changes)
    first = _learner(plain, 5)
    second = _copy(first, other)
    assert _payloads(second)[0] == _payloads(first)[0]
    # It begins anew twice alike: nothing but the payload has a say.
    third = _copy(first, other)
    assert _payloads(third) == _payloads(second)
    _go_on(second, 5, 12)
    back = _copy(second, plain)
    assert _payloads(back)[0] == _payloads(second)[0]
    _go_on(back, 12, 15)


def test_what_moves_may_be_chosen_anew_under_any_strategy() -> None:
    learner = _learner(_settings(average_decay=0.9, l2sp_weight=0.1), 3)
    for changes in (
        {"trainable": "head"},
        {"ewc_weight": 1.0},
        {"trainable": "lora"},
        {"trainable": "lora", "lora_rank": 1},
    ):
        other = _copy(learner, _settings(average_decay=0.9, l2sp_weight=0.1, **changes))
        assert _payloads(other)[0] == _payloads(learner)[0]
        _go_on(other, 3, 5)
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
    settings = _settings(average_decay=0.9)
    served, own = _learner(settings, 3).write_all()
    other = _learner(settings, 1)
    before = _payloads(other)
    with pytest.raises(CorruptWeights):
        other.restore(served, _damaged(own, damage))
    assert _payloads(other) == before
