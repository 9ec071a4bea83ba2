"""What followed items fades once it misleads: by hand, never in noise, after a planted change, and bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from learning import CPU, START_MS, append, fork, learn_with_restarts, small, trainer, versions
from prometheus_client import CollectorRegistry

from recsys.feedback import Feedback
from recsys.item_table import ItemTable
from recsys.network import TRANSITION_FLOOR
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import WeightStore
from trainer.drift import TRANSITIONS
from trainer.drift.misled import CHOICES, LEAST_GAIN, LEAST_SPREAD, MOST_SPREAD, Misled
from trainer.learner import RECOUNTED, Learner

FADING = 0.2
ITEMS = 100
BLOCKS = 40


def _misled() -> Misled:
    return Misled(FADING, np.zeros(Misled.SIZE))


def _block(misled: Misled, led: np.ndarray, anywhere: float = 50.0, items: int = ITEMS) -> bool:
    return misled.observe(led, np.full(len(led), anywhere), items)


def test_the_gain_by_hand() -> None:
    misled = _misled()
    led_B = np.tile([3.0, 0.0], CHOICES // 2)
    # What was not led to by anything says nothing, however much there is of it.
    assert not misled.observe(np.full(500, np.nan), np.full(500, np.nan), ITEMS)
    assert not misled.observe(np.zeros(500), np.zeros(500), ITEMS)
    assert not _block(misled, led_B[:-1])
    assert misled.scores() == {"fading_gain": 0.0}
    _block(misled, led_B[-1:])

    def share(led: float, weight: float) -> float:
        return (weight * led + LEAST_SPREAD / ITEMS) / (weight * 50.0 + LEAST_SPREAD)

    gains = [math.log(share(led, FADING) / share(led, 1.0)) for led in (3.0, 0.0)]
    assert misled.scores() == {"fading_gain": pytest.approx(sum(gains) / 2)}


def test_a_memory_that_turns_wrong_is_found_at_once_and_one_that_is_right_again_is_left_alone() -> None:
    misled = _misled()
    right, wrong = np.tile([20.0, 20.0, 20.0, 0.0], CHOICES // 4), np.zeros(CHOICES)
    assert not any(_block(misled, right) for _ in range(BLOCKS))
    assert _block(misled, wrong)
    assert not any(_block(misled, right) for _ in range(BLOCKS))
    # It is found in catalogs of any size; in between what is spread grows with them.
    assert LEAST_SPREAD / TRANSITION_FLOOR > ITEMS
    assert MOST_SPREAD / TRANSITION_FLOOR < 10_000_000
    large = _misled()
    assert not any(_block(large, right, anywhere=150.0, items=10_000_000) for _ in range(BLOCKS))
    assert _block(large, wrong, anywhere=150.0, items=10_000_000)


def test_choices_that_are_only_harder_to_foresee_tell_nothing() -> None:
    misled = _misled()
    assert not any(_block(misled, np.full(CHOICES, 30.0)) for _ in range(BLOCKS))
    assert not any(_block(misled, np.tile([8.0, 8.0, 8.0, 0.0], CHOICES // 4)) for _ in range(BLOCKS))
    assert misled.scores()["fading_gain"] < 0


def test_nothing_misleads_where_nothing_is_to_fade() -> None:
    misled = Misled(1.0, np.zeros(Misled.SIZE))
    assert not any(_block(misled, np.full(CHOICES, 30.0)) for _ in range(BLOCKS))
    assert not any(_block(misled, np.zeros(CHOICES)) for _ in range(BLOCKS))


def test_a_memory_that_never_was_right_is_no_change() -> None:
    misled = _misled()
    assert not any(_block(misled, np.zeros(CHOICES)) for _ in range(BLOCKS))
    assert misled.scores()["fading_gain"] > LEAST_GAIN


@pytest.mark.parametrize("seed", range(5))
def test_noise_hardly_ever_misleads(seed: int) -> None:
    random = np.random.default_rng(seed)
    misled = _misled()
    # The memory gives each choice as much as it should: what is drawn comes from its own shares.
    shares = random.dirichlet(np.full(ITEMS, 0.3))
    chances = (50.0 * shares + LEAST_SPREAD / ITEMS) / (50.0 + LEAST_SPREAD)
    drawn = random.choice(ITEMS, (400, CHOICES), p=chances / chances.sum())
    assert not any(_block(misled, 50.0 * shares[block]) for block in drawn)


# The item table


NOTHING = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)


def _counted() -> ItemTable:
    table = ItemTable(4, 8)
    table.allocate(f"item-{n}" for n in range(6))
    history_BK = torch.tensor([[1, 2, 0], [2, 3, 1]])
    table.count(history_BK, torch.tensor([3, 4]), torch.tensor([True, True]), torch.tensor([1, 1]))
    return table


def test_fading_multiplies_what_followed_items_and_nothing_else() -> None:
    table = _counted()
    before = {name: column.clone() for name, column in table.columns.items()}
    changed = table.fade_transitions(FADING, *NOTHING)
    # Items 5 and 6 neither followed nor were followed.
    assert changed.tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(table.columns["successor_weight"], FADING * before.pop("successor_weight"))
    assert all(torch.equal(table.columns[name], column) for name, column in before.items())


def test_what_is_counted_anew_has_not_faded() -> None:
    table, other = _counted(), _counted()
    newest = torch.tensor([[5, 0, 0], [4, 5, 0]]), torch.tensor([4, 6])
    changed = table.fade_transitions(FADING, *newest)
    assert changed.tolist() == [1, 2, 3, 4, 5, 6]
    other.fade_transitions(FADING, *NOTHING)
    other.count(*newest, torch.tensor([True, True]), torch.tensor([1, 1]))
    for name in ("successor", "successor_weight"):
        assert torch.equal(table.columns[name], other.columns[name])
    # Nothing else is counted twice, and no time passes.
    assert (table.clock, other.clock) == (2, 4)
    assert torch.equal(table.columns["total"], _counted().columns["total"])


def test_what_leads_to_an_item_is_its_part_of_what_leads_anywhere() -> None:
    table = ItemTable(4, 8)
    table.allocate(f"item-{n}" for n in range(6))
    history_BK = torch.tensor([[1, 2, 0], [2, 3, 1]])
    table.count(history_BK, torch.tensor([3, 4]), torch.tensor([True, True]), torch.tensor([1, 1]))
    found = table.transitions(history_BK)
    by_item = torch.stack([found.towards(torch.full((2,), item)) for item in range(1, 7)], 1)
    torch.testing.assert_close(by_item.sum(1), found.weight_BN.sum(1))
    # Row by row as the scores have it: log(1 + sum / floor).
    lift_BI, *_ = found.lifts(table.rows, 1.0)
    torch.testing.assert_close(by_item.log1p(), lift_BI[:, 1:])


# In the trainer: users go round the items, until the items exchange their names.

COUNT, CHANGED, USERS, RING = 3500, 3072, 7, 60


def _log_with_names_exchanged(base: Settings) -> list[str]:
    """Append what users chose; return the items."""
    random = np.random.default_rng(1)
    names = random.permutation(RING)
    places = random.integers(0, RING, USERS)
    feedback = []
    for number in range(COUNT):
        user = int(random.integers(USERS))
        places[user] = (places[user] + 1) % RING if random.random() < 0.95 else random.integers(RING)
        item = names[places[user]] if number >= CHANGED else places[user]
        feedback.append(Feedback(f"user-{user}", f"item-{item}", "click", START_MS + 1000 * number))
    append(base, feedback)
    return [each.item_id for each in feedback]


# So long a log is learned twice: a quarter of a minute alone, and minutes where others want the processor.
@pytest.mark.timeout(600)
def test_what_followed_items_fades_after_a_change_alone_and_every_trainer_does_the_same(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small(settings, batch_size=64, replay_size=4, successors=32, gate_events=4)
    chosen = _log_with_names_exchanged(base)
    restarted, registry, faded = fork(base, "restarted"), CollectorRegistry(), []
    fade = ItemTable.fade_transitions

    def fading(table: ItemTable, by: float, history_BK: torch.Tensor, item_B: torch.Tensor) -> torch.Tensor:
        faded.append(by)
        # What is counted anew are the newest choices, each behind those of the same user before it.
        newest = chosen[: table.clock][-RECOUNTED:]
        assert [table.item_ids[row] for row in item_B.tolist()] == newest
        assert history_BK.shape[0] == RECOUNTED
        assert (history_BK[:, 0] != 0).all()
        return fade(table, by, history_BK, item_B)

    monkeypatch.setattr(ItemTable, "fade_transitions", fading)
    with trainer(base, registry=registry) as daemon:
        daemon.start()
        while daemon.step():
            pass
    assert 1 <= len(faded) <= 3
    assert set(faded) == {FADING}
    with connect(base) as client:
        records = list(reversed(WeightStore(client, base).versions(1000)))
    found = [r.feedback_learned for r in records if r.metrics.get(f"drift_{TRANSITIONS}_detected")]
    # Two blocks of choices, the one in which the change falls among them, and what completes a version of 128.
    assert CHANGED < found[0] <= CHANGED + 2 * CHOICES + 128
    assert registry.get_sample_value("recsys_drifts_total", {"stream": TRANSITIONS}) == len(found)
    measure = {"stream": TRANSITIONS, "measure": "fading_gain"}
    assert (
        registry.get_sample_value("recsys_drift_score", measure) == records[-1].metrics["drift_transitions_fading_gain"]
    )
    # Wherever a trainer restarts, within a block of choices too, it finds the same.
    learn_with_restarts(restarted, monkeypatch, 700)
    assert versions(restarted) == versions(base)


def test_a_learner_forgets_nothing_of_what_misled_it_when_it_is_restored(settings: Settings) -> None:
    first, second = (Learner(small(settings), CPU) for _ in range(2))
    memory = first.drift.write()["drift_misled"]
    memory[:] = np.arange(len(memory)) - 3.0
    served, own = first.write_all()
    own.dense["drift_misled"] = memory
    second.restore(served, own)
    np.testing.assert_array_equal(second.drift.write()["drift_misled"], memory)
    # An earlier release wrote none: it begins anew.
    earlier = {name: tensor for name, tensor in own.dense.items() if name != "drift_misled"}
    second.restore(served, replace(own, dense=earlier))
    assert not second.drift.write()["drift_misled"].any()
