"""Delayed feedback: an impression learned as such and clicked later ends as a click, in counts and in probabilities."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import CPU, append, fork, head, learn_all, make_feedback, small, trainer, versions
from torch import Tensor
from torch.nn import functional as F

from recsys.encoding import RowHistory
from recsys.feedback import Feedback
from recsys.feedback_file import open_feedback_file
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.weights import encode as encode_payload
from trainer.evaluation.stream import Stream
from trainer.examples import Event, batches, encode
from trainer.impressions import NONE
from trainer.learner import Learner
from trainer.rebuild import Rebuild
from trainer.strategies.delayed import Corrected, Weighted

IMPRESSION, CLICK, LIKE, PURCHASE = range(4)
DATA = Path(os.environ.get("RECSYS_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
ways = pytest.mark.parametrize("way", ["weighted", "corrected"])


def _settings(**changes: Any) -> Settings:
    return small(load({"classes": "shop"}, environment={}), **changes)


def _learner(**changes: Any) -> Learner:
    learner = Learner(_settings(**changes), CPU)
    learner.allocate(f"item-{n}" for n in range(12))
    return learner


def _event(item: int, kind: int, key: int = NONE, page: str = "") -> Event:
    return Event(item, kind, 9000, RowHistory((1, 2), (1, 1), (0, 1000)), {"page": page} if page else {}, key)


def _learn(learner: Learner, *events: Event) -> None:
    assert learner.step(encode(events, learner.settings)).learned


def _counts(learner: Learner, item: int) -> list[float]:
    return [round(count, 3) for count in learner.table.columns["classes"][item].tolist()]


# Losses


def _losses(logits: Tensor) -> Any:
    return lambda classes: F.cross_entropy(logits, classes, reduction="none")


def test_the_corrected_loss_takes_back_that_of_the_impression() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    classes = torch.tensor([2, 0, 1])
    corrected = Corrected(IMPRESSION)
    loss = corrected.loss(_losses(logits), logits, classes, torch.tensor([1.0, 0.0, 0.0]))
    log_p = logits.log_softmax(1)
    expected = -(log_p[0, 2] - log_p[0, 0] + log_p[1, 0] + log_p[2, 1]) / 3
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], torch.tensor([1.0, 0.0, -1.0, 0.0]) / 3)
    # An impression and the click that follows it are together what a click alone is.
    pair = torch.stack([logits[0], logits[0]])
    both = corrected.loss(_losses(pair), pair, torch.tensor([0, 2]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(2 * both, -log_p[0, 2])
    assert torch.equal(corrected.loss(_losses(logits), logits, classes, None), _losses(logits)(classes).mean())


def test_weights_are_those_of_the_paper_and_fade_with_the_share_that_has_an_impression() -> None:
    """p = 0.2: 1.2 for a click, 0.8 * 1.2 for an impression; with an impression before half of them 1.1, 0.8 / 0.9."""
    logits = torch.tensor([[0.8, 0.2]]).log().expand(2, 2)
    classes = torch.tensor([CLICK, IMPRESSION])
    click, impression = -math.log(0.2), -math.log(0.8)
    weighted = Weighted(IMPRESSION, CPU)
    loss = weighted.loss(_losses(logits), logits, classes, None)
    assert float(loss) == pytest.approx((click + impression) / 2)
    for share, often, rare in ((1.0, 1.2, 0.8 * 1.2), (0.5, 1.1, 0.8 * 1.1 / 0.9)):
        weighted.state()["counts"].copy_(torch.tensor([30 * share, 30]))
        loss = weighted.loss(_losses(logits), logits, classes, torch.tensor([1.0, 0.0]))
        assert float(loss) == pytest.approx((often * click + rare * impression) / 2)
    weighted.learned()
    assert weighted.state()["counts"].tolist() == pytest.approx([16, 31], rel=1e-4)
    weighted.reset()
    assert weighted.state()["counts"].tolist() == [0, 0]
    certain = torch.tensor([[-200.0, 200.0]])
    assert torch.isfinite(weighted.loss(_losses(certain), certain, torch.tensor([IMPRESSION]), None))


@pytest.mark.parametrize(("way", "moves"), [("none", True), ("weighted", False), ("corrected", False)])
def test_the_class_is_learned_where_the_impression_was_given(way: str, moves: bool) -> None:
    learner = _learner(delayed_feedback=way, weight_decay=0.0, seed=2)
    # The head's last layer begins at zero: from the second step on the context has a gradient.
    _learn(learner, *(_event(3, IMPRESSION, key, "shelf") for key in range(1, 5)))
    before = learner.network.context.weight.detach().clone()
    _learn(learner, *(_event(3, CLICK, key, "basket") for key in range(1, 5)))
    shelf, basket = (
        int(encode([_event(3, CLICK, NONE, page)], learner.settings).context_BP.max()) for page in ("shelf", "basket")
    )
    assert shelf != basket
    assert torch.equal(before[shelf], learner.network.context.weight[shelf]) is moves
    assert torch.equal(before[basket], learner.network.context.weight[basket]) is not moves


# A planted world

RATES = np.array([0.1, 0.3, 0.6]).repeat(4)


def _world(count: int, seed: int, mean_delay: float) -> Iterator[Event]:
    """Show items at random; each is clicked with its own rate, after so much other feedback on average."""
    random = np.random.default_rng(seed)
    waiting: list[tuple[float, int, int]] = []
    for number in range(count):
        while waiting and waiting[0][0] <= number:
            _, key, item = heapq.heappop(waiting)
            yield Event(item, CLICK, 9000, RowHistory((), (), ()), {}, key)
        item = int(random.integers(len(RATES)))
        yield Event(1 + item, IMPRESSION, 9000, RowHistory((), (), ()), {}, number + 1)
        if random.random() < RATES[item]:
            heapq.heappush(waiting, (number + random.exponential(mean_delay), number + 1, 1 + item))


def _estimates(way: str, world: Iterator[Event]) -> np.ndarray:
    """Learn a world; return the mean probability of a click for each true rate."""
    settings = small(
        load({"classes": "clicks", "delayed_feedback": way, "learning_rate": 0.003}, environment={}),
        **{"batch_size": 64, "replay_size": 1, "replay_capacity": 5000},
    )
    learner = Learner(settings, CPU)
    learner.allocate(f"item-{n}" for n in range(len(RATES)))
    for batch in batches(world, settings.batch_size):
        _learn(learner, *batch)
    asked = [Event(1 + item, IMPRESSION, 9000, RowHistory((), (), ()), {}) for item in range(len(RATES))]
    with torch.no_grad():
        report, _ = learner.prequential.test(encode(asked, settings), None, learner.table.standing())
    return np.array(report.class_probability_BC[:, CLICK].reshape(3, 4).mean(1))


def test_the_planted_click_rates_are_found_whatever_the_delay_and_not_without_correction() -> None:
    """About 1,700 impressions of each rate: a standard error of at most 0.012, and the head's own noise."""
    truth = RATES.reshape(3, 4)[:, 0]
    found = {way: _estimates(way, _world(5000, 3, 60.0)) for way in ("none", "weighted", "corrected")}
    assert np.abs(found["weighted"] - truth).max() < 0.05
    assert np.abs(found["corrected"] - truth).max() < 0.05
    # What the log says as it stands: p / (1 + p).
    assert np.abs(found["none"] - truth / (1 + truth)).max() < 0.05
    assert found["none"][2] < truth[2] - 0.15


def test_outcomes_at_once_and_clicks_without_impressions_need_no_correction() -> None:
    """One feedback for each impression, of what became of it: nothing follows anything, no weight differs."""
    waited = list(_world(700, 4, 0.0))
    clicked = {event.impression for event in waited if event.feedback_class == CLICK}
    outcomes = [
        event._replace(feedback_class=CLICK if event.impression in clicked else IMPRESSION)
        for event in waited
        if event.feedback_class == IMPRESSION
    ]
    estimates = [_estimates(way, iter(outcomes)) for way in ("none", "weighted", "corrected")]
    assert np.array_equal(estimates[0], estimates[2])
    np.testing.assert_allclose(estimates[0], estimates[1], atol=1e-3)


def test_real_outcomes_are_learned_as_without_correction() -> None:
    path = DATA / "kuairand-pure" / "log_standard.parquet"
    if not path.exists():
        pytest.skip(f"no {path}")
    weights = []
    for way in ("none", "corrected"):
        file = open_feedback_file(path)
        learner = Learner(load({"classes": file.classes, "delayed_feedback": way}, environment={}), CPU)
        for batch in batches(islice(Stream(file, learner.settings, learner).cases(), 1000), 64):
            learner.step(encode([case.event for case in batch], learner.settings), [case.seen for case in batch])
        weights.append(list(map(encode_payload, learner.write_all())))
    assert weights[0] == weights[1]


# The log


def _visits(count: int) -> list[Feedback]:
    """Impressions of answers, some clicked later, beside other feedback."""
    feedback = [
        replace(each, recommendation_id=f"answer-{number % 40}" if number % 3 else "")
        for number, each in enumerate(make_feedback(count, 5))
    ]
    seen = [each for each in feedback if each.feedback_class == "impression"]
    return [*feedback, *(replace(each, feedback_class="click") for each in seen), *make_feedback(20, 6)]


@ways
def test_a_log_gives_one_chain_of_versions_wherever_the_trainer_restarts(
    settings: Settings, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small(settings, delayed_feedback=way, replay_capacity=60)
    append(base, _visits(120))
    restarted, plain = fork(base, "restarted"), fork(base, "plain")
    weights = learn_all(base)
    monkeypatch.setattr("trainer.daemon.READ_COUNT", 29)
    for _ in range(4):
        with trainer(restarted) as daemon:
            daemon.start()
            daemon.step()
    assert learn_all(restarted) == weights
    assert versions(restarted) == versions(base)
    with connect(base) as client:
        assert Rebuild(client, base, CPU).run(head(base)[0]).equal
    assert learn_all(plain.model_copy(update={"delayed_feedback": "none"})) != weights


def test_impressions_that_are_clicked_later_are_gone_from_the_served_counts(settings: Settings) -> None:
    base = small(settings, classes=_settings().classes)
    shown = [Feedback(f"user-{n % 3}", f"item-{n % 5}", "impression", recommendation_id=f"a-{n}") for n in range(40)]
    append(base, [*shown, *(replace(each, feedback_class="click") for each in shown)])
    with trainer(base) as daemon:
        daemon.start()
        while daemon.step():
            pass
        classes = daemon.learner.table.column("classes").sum(0).tolist()
    assert classes == [0, 40, 0, 0]
