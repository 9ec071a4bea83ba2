"""The gate: noise holds nothing, what is worse is held, and what stays worse is set aside and found again."""

from __future__ import annotations

import numpy as np
import pytest
import redis
import torch
from learning import CPU, append, make_feedback, small, tick
from prometheus_client import CollectorRegistry

from recsys.encoding import RowHistory
from recsys.errors import NotRetained
from recsys.feedback import Feedback
from recsys.feedback_log import FeedbackLog
from recsys.quarantine import Quarantine
from recsys.settings import Settings
from recsys.weights import WeightStore, encode
from trainer.daemon import Daemon
from trainer.examples import Event
from trainer.examples import encode as encode_events
from trainer.gate import LARGEST_LOSS, LEAST_EVENTS, WINDOW_VERSIONS, Comparison, Gate
from trainer.learner import Learner
from trainer.metrics import TrainerMetrics
from trainer.rebuild import Rebuild


def test_a_difference_is_sure_only_beyond_its_error_and_with_enough_events() -> None:
    comparison = Comparison()
    comparison.add(np.full(LEAST_EVENTS - 1, 2.0), np.full(LEAST_EVENTS - 1, 1.0))
    assert comparison.at_least(4.0) == -np.inf
    comparison.add(np.array([2.0]), np.array([1.0]))
    assert (comparison.mean, comparison.at_least(4.0)) == (1.0, 1.0)
    noisy = Comparison()
    values = np.array([0.0, 2.0] * 50)
    noisy.add(values, np.zeros(100))
    assert noisy.mean == 1.0
    assert noisy.at_least(4.0) == pytest.approx(1.0 - 4.0 * values.std(ddof=1) / 10.0)


def test_single_losses_are_capped_and_what_is_no_number_counts_against_the_candidate() -> None:
    comparison = Comparison()
    comparison.add(np.array([1000.0, np.nan, 3.0]), np.array([0.0, 1.0, np.nan]))
    # A candidate without a number is as wrong as can be; what the served version could not be asked is left out.
    assert comparison.differences == [LARGEST_LOSS, LARGEST_LOSS - 1.0]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_held(seed: int) -> None:
    random = np.random.default_rng(seed)
    comparison = Comparison()
    for _ in range(50):
        comparison.add(random.normal(5, 2, 16), random.normal(5, 2, 16))
        assert comparison.at_least(4.0) < 0.5


def _learner(settings: Settings, batches: int) -> tuple[Learner, Gate]:
    """A learner of the rule that item n + 1 follows item n, with its gate."""
    learner = Learner(settings, CPU)
    learner.allocate(f"item-{n}" for n in range(8))
    for number in range(batches):
        learner.step(encode_events(_walk(settings, number), settings))
    learner.take_changed()
    return learner, Gate(settings, learner)


def _walk(settings: Settings, seed: int, step: int = 1) -> list[Event]:
    random = np.random.default_rng(seed)
    starts = random.integers(0, 8, settings.batch_size)
    return [Event(1 + (int(s) + step) % 8, 1, 1000, RowHistory((1 + int(s),), (1,), (0,)), {}) for s in starts]


@pytest.fixture
def world(settings: Settings) -> Settings:
    return small(settings).model_copy(update={"batch_size": 16, "batches_per_version": 4, "learning_rate": 0.01})


def test_the_served_copy_learns_nothing_and_takes_over_what_is_accepted(world: Settings) -> None:
    learner, gate = _learner(world, 10)
    before = encode(gate._served.write_all())
    assert before == encode(learner.replica.write_all())
    for number in range(4):
        examples = encode_events(_walk(world, 100 + number), world)
        gate.observe(examples, learner.step(examples))
    assert encode(gate._served.write_all()) == before
    assert gate.objection() is None
    gate.accept(learner.take_changed())
    assert encode(gate._served.write_all()) == encode(learner.replica.write_all())
    assert gate.ranking.differences == []


def test_a_version_that_ranks_new_feedback_worse_is_objected_to(world: Settings) -> None:
    learner, gate = _learner(world, 60)
    for number in range(4):
        if number == 1:
            with torch.no_grad():
                learner.table.columns["vector"][1:9] = learner.table.columns["vector"][1:9].flip(0)
                learner.table.columns["successor_weight"].zero_()
        examples = encode_events(_walk(world, 100 + number), world)
        gate.observe(examples, learner.step(examples))
    assert "ranks new feedback worse" in str(gate.objection())


def test_new_items_of_a_version_of_one_batch_are_found_by_both(world: Settings) -> None:
    settings = world.model_copy(update={"batches_per_version": 1, "gate_events": 400})
    learner, gate = _learner(settings, WINDOW_VERSIONS + 4)
    learner.allocate([f"new-{n}" for n in range(400)])
    events = [Event(9 + n, 1, 1000, RowHistory((1,), (1,), (0,)), {}) for n in range(400)]
    examples = encode_events(events, settings)
    gate.observe(examples, learner.step(examples))
    # They are drawn from the past, to be asked about: whatever is said of them, both have their rows.
    gate.objection()
    assert gate._served.table.item_ids == learner.table.item_ids


def test_weights_that_are_not_finite_or_grow_at_once_are_objected_to(world: Settings) -> None:
    learner, gate = _learner(world, 2)
    with torch.no_grad():
        learner.network.position.mul_(1e6)
    assert "position whose norm grew" in str(gate.objection())
    with torch.no_grad():
        learner.network.position.fill_(float("nan"))
    assert "position that is not finite" in str(gate.objection())
    learner, gate = _learner(world, 2)
    learner.step(encode_events(_walk(world, 2), world))
    assert gate.objection() is None
    learner.table.columns["vector"][3, 0] = float("inf")
    assert "item vector" in str(gate.objection())


def _worse(daemon: Daemon) -> None:
    """Spoil what the daemon has learned since the last version."""
    with torch.no_grad():
        daemon.learner.network.position.mul_(1e6)


def test_what_stays_worse_is_set_aside_and_learning_goes_on_behind_it(settings: Settings, store: redis.Redis) -> None:
    base = small(settings).model_copy(update={"gate_holds": 2})
    registry = CollectorRegistry()
    daemon = Daemon(base, TrainerMetrics(registry), CPU, clock=lambda: 0.0)
    weights, quarantine = WeightStore(store, base), Quarantine(store, base)
    daemon.start()
    append(base, make_feedback(6))
    tick(base)
    daemon.step()
    good = encode(daemon.learner.replica.write_all())
    head = weights.head()
    assert head is not None
    for turn in range(2):
        append(base, make_feedback(3, 1, first=6 + 3 * turn))
        _worse(daemon)
        tick(base)
        daemon.step()
        assert registry.get_sample_value("recsys_versions_held_total") == turn + 1
        held = weights.objection()
        if turn == 0:
            # Whoever looks while it is held sees which one, how often and why.
            assert held is not None
            assert (held.version, held.times) == (head.version + 1, 1)
            assert "position whose norm grew" in held.reason
    assert held is None, "another version stands in its place"
    record = weights.head()
    assert record is not None
    assert (record.version, record.kind, record.restored_version) == (head.version + 1, "rollback", head.version)
    assert "held 2 times, the last time because it holds position whose norm grew" in record.reason
    assert encode(daemon.learner.replica.write_all()) == good
    assert registry.get_sample_value("recsys_feedback_set_aside_total") == 6
    (case,) = quarantine.cases()
    assert (case.number, case.after, case.until, case.feedback) == (1, head.position, record.position, 6)
    assert [shown.item_id for shown in quarantine.show(1, 2)] == [f.item_id for f in make_feedback(2, 1, first=6)]
    append(base, make_feedback(3, 1, first=20))
    tick(base)
    daemon.step()
    learned = weights.head()
    assert learned is not None
    assert (learned.kind, learned.feedback_added) == ("learned", 3)
    # Released, it is feedback like any other.
    assert quarantine.release(1) == 6
    assert quarantine.release(1) == 0
    tick(base)
    while daemon.step():
        pass
    released = weights.head()
    assert released is not None
    assert released.feedback_learned == FeedbackLog(store, base).appended() == 6 + 6 + 3 + 6
    daemon.close()
    with pytest.raises(NotRetained, match="there is no case 2"):
        quarantine.show(2, 1)
    again = Daemon(base, TrainerMetrics(CollectorRegistry()), CPU, clock=lambda: 0.0)
    again.start()
    assert encode(again.learner.replica.write_all()) == encode(daemon.learner.replica.write_all())
    again.close()
    assert Rebuild(store, base, CPU).run(released.version).equal


def test_setting_aside_twice_changes_nothing(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    positions = append(base, [Feedback("u", f"i{n}", "click") for n in range(5)])
    quarantine = Quarantine(store, base)
    for _ in range(2):
        quarantine.set_aside(positions[0], positions[3], "because", 7)
    (case,) = quarantine.cases()
    assert (case.feedback, case.reason, case.time_ms) == (3, "because", 7)


def test_what_a_crash_kept_out_of_quarantine_gets_there_at_the_next_start(
    settings: Settings, store: redis.Redis
) -> None:
    base = small(settings).model_copy(update={"gate_holds": 1})
    daemon = Daemon(base, TrainerMetrics(CollectorRegistry()), CPU, clock=lambda: 0.0)
    daemon.start()
    append(base, make_feedback(6))
    tick(base)
    daemon.step()
    append(base, make_feedback(3, 1, first=6))
    _worse(daemon)
    tick(base)
    daemon.step()
    daemon.close()
    quarantine = Quarantine(store, base)
    (case,) = quarantine.cases()
    # As if the trainer had been killed between its commit and the copy.
    store.delete(*store.scan_iter(f"{base.key_prefix}:*quarantine*"))
    assert quarantine.cases() == []
    for _ in range(2):
        again = Daemon(base, TrainerMetrics(CollectorRegistry()), CPU, clock=lambda: 0.0)
        again.start()
        again.close()
        assert quarantine.cases() == [case]
