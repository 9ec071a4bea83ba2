"""Learners under any strategies: settings, made-up feedback, and learners that went through so many steps of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from learning import CPU, small
from torch import Tensor

from recsys.encoding import RowHistory
from recsys.settings import Settings, load
from recsys.weights import decode, encode
from trainer.examples import Event, Examples
from trainer.examples import encode as encode_events
from trainer.learner import Learner

ITEMS = 20


def small_settings(**changes: Any) -> Settings:
    return small(load({"classes": "shop"}, environment={}), batch_size=8, **changes)


def draw(learner: Learner, seed: int) -> Examples:
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


def learned(settings: Settings, steps: int = 0) -> Learner:
    learner = Learner(settings, CPU)
    go_on(learner, 0, steps)
    return learner


def go_on(learner: Learner, first: int, last: int) -> None:
    for number in range(first, last):
        assert learner.step(draw(learner, number)).learned


def payloads(learner: Learner) -> tuple[bytes, bytes]:
    served, own = learner.write_all()
    return encode(served), encode(own)


def copied(learner: Learner, settings: Settings) -> Learner:
    other = Learner(settings, CPU)
    other.restore(*map(decode, payloads(learner)))
    other.window = learner.window
    return other


def weights_of(learner: Learner) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.network.named_parameters()}
