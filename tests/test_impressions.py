"""Impressions: what follows one is found at every prefix and after every restart, and leaves none of it counted."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from learning import CPU, small
from torch import Tensor

from recsys.encoding import RowHistory
from recsys.rates import DECAY
from recsys.settings import Settings, load
from recsys.standing import TREND_DECAYS, TREND_FLOOR
from recsys.weights import encode as encode_payload
from trainer.examples import Event, ReplayWindow, batches, encode
from trainer.hindsight import Hindsight
from trainer.impressions import NONE, impression_key
from trainer.learner import Learner

IMPRESSION, CLICK, LIKE, PURCHASE = range(4)
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


# What belongs together


def test_recommendation_user_and_item_together_make_the_key() -> None:
    keys = {impression_key(*parts) for parts in (("r", "u", "i"), ("r", "u", "j"), ("r", "v", "i"), ("s", "u", "i"))}
    assert len(keys) == 4
    assert impression_key("ab", "c", "d") != impression_key("a", "bc", "d")
    assert impression_key("", "u", "i") == NONE
    assert impression_key("r", "u", "i") == impression_key("r", "u", "i") != NONE


class _Told:
    """The last so many feedback as a plain list, asked from the beginning every time."""

    def __init__(self, capacity: int) -> None:
        self.last: deque[tuple[int, int]] = deque(maxlen=capacity)

    def follows(self, batch: list[tuple[int, int]]) -> list[int]:
        """For each feedback of a batch the age of the impression that it follows, 1 the last one before it; or 0."""
        known, found = list(self.last), []
        for number, (key, kind) in enumerate(batch):
            before = [*known, *batch[:number]]
            same = [place for place, (other, _) in enumerate(before) if other == key]
            opened = key != NONE and kind != IMPRESSION and same and before[same[-1]][1] == IMPRESSION
            within = opened and same[-1] >= len(before) - number - self.last.maxlen
            found.append(len(before) - same[-1] if within else 0)
        self.last.extend(batch)
        return found


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([IMPRESSION, CLICK, PURCHASE])), max_size=60),
    st.integers(1, 7),
)
def test_what_follows_an_impression_is_found_at_every_prefix_and_after_every_restart(
    stream: list[tuple[int, int]], size: int
) -> None:
    settings = _settings(replay_capacity=9)
    window, told = ReplayWindow(settings), _Told(9)
    for batch in batches(stream, size):
        again = ReplayWindow(settings)
        again.add(encode([_event(3, kind, key) for key, kind in told.last], settings))
        examples = encode([_event(3, kind, key) for key, kind in batch], settings)
        expected = told.follows(batch)
        for each in (window, again):
            followed = each.followed(examples)
            ages = [0] * len(batch)
            if followed is not None:
                for place, age in zip(followed.place_M.tolist(), followed.age_M.tolist(), strict=True):
                    ages[place] = place + age
                assert (followed.impressions.class_B == IMPRESSION).all()
                assert (followed.impressions.impression_B == examples.impression_B[followed.place_M]).all()
            assert ages == expected
        window.add(examples)


# Counts


def test_a_click_leaves_no_impression_behind() -> None:
    learner = _learner()
    _learn(learner, _event(3, IMPRESSION, 7), _event(3, IMPRESSION, 8), _event(4, IMPRESSION, 9))
    assert _counts(learner, 3) == [2, 0, 0, 0]
    _learn(learner, _event(3, CLICK, 7))
    assert (_counts(learner, 3), _counts(learner, 4)) == ([1, 1, 0, 0], [1, 0, 0, 0])
    # A click is no impression: what follows it stands beside it.
    _learn(learner, _event(3, PURCHASE, 7))
    assert _counts(learner, 3) == [1, 1, 0, 1]
    # Of another answer, or of none.
    _learn(learner, _event(4, CLICK, 10), _event(4, CLICK))
    assert _counts(learner, 4) == [1, 2, 0, 0]
    # In the same batch.
    _learn(learner, _event(4, CLICK, 9), _event(5, IMPRESSION, 11), _event(5, LIKE, 11))
    assert (_counts(learner, 4), _counts(learner, 5)) == ([0, 3, 0, 0], [0, 0, 1, 0])
    assert learner.network.rates.class_counts.tolist() == pytest.approx([1, 4, 1, 1], abs=1e-3)


def test_of_an_item_without_a_row_nothing_is_taken_back() -> None:
    learner = _learner(item_admission=2)
    # What the user of the item without a row had is counted by somebody else's impression.
    _learn(learner, _event(4, IMPRESSION), _event(0, IMPRESSION, 7))
    before = {name: column.clone() for name, column in learner.table.columns.items()}
    learner.take_changed()
    _learn(learner, _event(0, CLICK, 7))
    assert 0 not in learner.take_changed().tolist()
    for name in ("classes", "audience"):
        assert torch.equal(learner.table.columns[name], before[name])


def test_an_impression_is_taken_back_as_faded_as_it_is() -> None:
    learner = _learner()
    _learn(learner, _event(3, IMPRESSION, 7))
    _learn(learner, *(_event(4, IMPRESSION) for _ in range(200)))
    _learn(learner, _event(3, CLICK, 7))
    of_impressions = 200 * DECAY
    assert float(learner.network.rates.class_counts[IMPRESSION]) == pytest.approx(of_impressions, abs=1e-4)
    # More than there are is not taken.
    learner.network.rates.class_counts.fill_(0.25)
    learner.network.rates.retract(IMPRESSION, torch.tensor([0]), torch.full((1, 1), -1))
    assert learner.network.rates.class_counts.tolist() == [0, 0.25, 0.25, 0.25]


@ways
def test_what_is_not_finite_takes_nothing_back(way: str) -> None:
    learner = _learner(delayed_feedback=way)
    _learn(learner, _event(3, IMPRESSION, 7))
    served, own = learner.write_all()
    vectors = learner.table.columns["vector"]
    kept = vectors[3].clone()
    vectors[3] = math.inf
    assert not learner.step(encode([_event(3, CLICK, 7)], learner.settings)).learned
    vectors[3] = kept
    learner.steps -= 1
    assert list(map(encode_payload, learner.write_all())) == list(map(encode_payload, (served, own)))
    _learn(learner, _event(3, CLICK, 7))
    assert _counts(learner, 3) == [0, 1, 0, 0]


# What was known then


def test_hindsight_is_what_the_table_said_when_the_impression_was_given() -> None:
    """At every prefix of made-up feedback with answers."""
    learner = _learner(batch_size=1)
    random, table = np.random.default_rng(1), learner.table
    then: dict[int, tuple[int, Tensor, Tensor]] = {}
    compared = 0
    for key in range(1, 100):
        item = int(random.integers(1, 6))
        then[key] = item, table.columns["classes"][item].clone(), _raw(learner, item)
        _learn(learner, _event(item, IMPRESSION, key))
        _learn(learner, _event(int(random.integers(1, 6)), int(random.integers(4))))
        answered = int(random.integers(max(1, key - 15), key + 1))
        click = encode([_event(then[answered][0], CLICK, answered)], learner.settings)
        followed = learner.window.followed(click)
        if followed is None:
            continue
        item_M = torch.tensor([then[answered][0]])
        counts_MC, standing_MS = table.columns["classes"][item_M], table.standing()[item_M]
        hindsight = Hindsight(learner.window, table, np.array([False, True, True, True]), IMPRESSION)
        counts, standing = hindsight.look(followed, item_M, counts_MC.clone(), standing_MS.clone())
        assert counts[0].tolist() == then[answered][1].tolist()
        # Trends are relative to today's largest.
        largest = _raw(learner, int(item_M)) - standing_MS[0]
        largest[-2:] = 0
        torch.testing.assert_close(standing[0] + largest, then[answered][2], atol=0.01, rtol=0)
        compared += 1
        _learn(learner, _event(then[answered][0], CLICK, answered))
    assert compared > 30


def _raw(learner: Learner, item: int) -> Tensor:
    """An item's standing with its trends on their own scale."""
    table = learner.table
    standing = table.standing()[item].clone()
    decayed = table.columns["trend"][item] * torch.tensor(TREND_DECAYS * 2) ** (
        table.clock - int(table.columns["touched"][item])
    )
    standing[:-2] = torch.log(decayed + TREND_FLOOR)
    return standing
