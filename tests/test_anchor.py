"""The anchor: pulls and distillation by hand, and that both hold the network nearer to what it was."""

from __future__ import annotations

import math

import pytest
import torch
from learning import CPU
from strategic import draw, go_on, learned, small_settings, weights_of
from torch import Tensor, nn

from recsys.network import Histories, build_network
from trainer.learner import Learner
from trainer.strategies.anchor import FISHER_DECAY, Anchor


def test_the_pull_is_the_gradient_of_the_penalties() -> None:
    settings = small_settings(l2sp_weight=0.3, ewc_weight=2.0)
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
    learner = learned(small_settings(l2sp_weight=1.0, anchor_steps=4, replay_size=0))
    anchor = learner.strategies._anchor
    assert anchor is not None
    before = {name: tensor.clone() for name, tensor in anchor.state().items()}
    for step in range(1, 10):
        weights = {f"weights.{name}": weight for name, weight in weights_of(learner).items()}
        go_on(learner, step, step + 1)
        if step % 4 == 0:
            before = weights
        assert all(torch.equal(before[name], tensor) for name, tensor in anchor.state().items())


def test_what_is_not_learned_now_is_no_evidence_again() -> None:
    """As the head in a replay, which has no gradient there."""
    network = build_network(small_settings(ewc_weight=2.0))
    weights = dict(network.named_parameters())
    anchor = Anchor(small_settings(ewc_weight=2.0), network, weights)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    anchor.pull(16)
    anchor.learned()
    before = {name: fisher.clone() for name, fisher in anchor.state().items() if name.startswith("fisher.")}
    for name, weight in weights.items():
        weight.grad = None if name.startswith("rank.") else torch.ones_like(weight)
    anchor.pull(16)
    anchor.learned()
    same = {name for name, fisher in before.items() if torch.equal(anchor.state()[name], fisher)}
    assert same == {name for name in before if name.startswith("fisher.rank.")} != set()


def _drift(learner: Learner, before: dict[str, Tensor]) -> float:
    now = weights_of(learner)
    return math.sqrt(sum(float((now[n] - old).square().sum()) for n, old in before.items() if "mix." not in n))


@pytest.mark.parametrize(("weight", "strong"), [("l2sp_weight", 100.0), ("ewc_weight", 1e5)])
def test_a_pull_keeps_the_weights_nearer(weight: str, strong: float) -> None:
    moved = []
    for strength in (0.0, strong):
        learner = learned(small_settings(anchor_steps=1000, **{weight: strength}))
        before = weights_of(learner)
        go_on(learner, 0, 40)
        moved.append(_drift(learner, before))
    assert moved[1] < 0.7 * moved[0]


def _histories(rows: list[list[int]]) -> Histories:
    rows_BL = torch.tensor(rows)
    return Histories(rows_BL, (rows_BL != 0).long(), torch.zeros_like(rows_BL))


def test_distillation_is_the_divergence_of_two_softmaxes() -> None:
    settings = small_settings(distillation_weight=1.0)
    network = build_network(settings).eval()
    anchor = Anchor(settings, network, dict(network.named_parameters()))
    generator = torch.Generator().manual_seed(5)
    table, sampled = (torch.randn(n, settings.dimension, generator=generator) for n in (9, 6))
    histories = _histories([[0, 0, 1, 2, 3], [0, 0, 0, 0, 0], [4, 5, 6, 7, 8]])

    def states() -> Tensor:
        return network.states(table, histories.rows_BL, histories)

    earlier = states().detach()
    said = anchor.distil(histories, table, histories.rows_BL, states().detach(), sampled)
    assert float(said) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        network.position.add_(0.5 * torch.randn(network.position.shape, generator=generator))
    later = states()
    expected = []
    for user in (0, 2):
        p, q = ((s[user] @ sampled.T).softmax(0).detach().double() for s in (earlier, later))
        expected.append(float((p * (p / q).log()).sum()))
    assert float(anchor.distil(histories, table, histories.rows_BL, later.detach(), sampled)) == pytest.approx(
        sum(expected) / 2, rel=1e-4
    )


def test_distillation_keeps_what_is_said() -> None:
    """The same feedback, with and without: how far the user states have gone is less with."""
    said = []
    for weight in (0.0, 30.0):
        learner = learned(small_settings(anchor_steps=1000, distillation_weight=weight, dropout=0.0))
        reference = build_network(learner.settings).eval()
        go_on(learner, 0, 40)
        histories = draw(learner, 99).histories(CPU)
        vectors = learner.table.column("vector")
        learner.network.eval()
        with torch.no_grad():
            now, then = (
                (n.states(vectors, histories.rows_BL, histories) @ vectors.T) for n in (learner.network, reference)
            )
        said.append(float(nn.functional.kl_div(now.log_softmax(1), then.softmax(1), reduction="batchmean")))
    assert said[1] < 0.5 * said[0]
