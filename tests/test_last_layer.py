"""The Bayesian last layer: by the whole Kronecker product, by sampling, and by calibration."""

from __future__ import annotations

import pytest
import torch
from strategic import draw, learned, small_settings
from torch import Tensor, nn

from recsys.network import build_network
from trainer.strategies.last_layer import LastLayer


def _watched(seed: int, count: int) -> tuple[LastLayer, nn.Linear, Tensor, Tensor, Tensor]:
    """A last layer fitted to `count` examples of a planted rule; what went in, the classes, and the rule's weights."""
    network = build_network(small_settings())
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
    learner = learned(small_settings(bayesian_head=True), 10)
    layer = learner.strategies.last_layer
    assert layer is not None
    assert float(layer.state()["count"]) == pytest.approx(80, rel=1e-2)
    learner.step(draw(learner, 3), again=True)
    assert float(layer.state()["count"]) == pytest.approx(80, rel=1e-2)
