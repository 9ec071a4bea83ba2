"""Drift: detectors equal river's at every prefix, measures worked by hand, planted changes found, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from learning import CPU, append, fork, learn_all, make_feedback, small, trainer, versions
from prometheus_client import CollectorRegistry
from river.drift import ADWIN
from river.drift import PageHinkley as RiverPageHinkley

from recsys.accounts import NOBODY
from recsys.errors import CorruptWeights
from recsys.feedback import Feedback
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import VersionRecord, WeightStore
from trainer.drift import (
    DETECTED,
    DRIFT,
    LEVELS,
    MEASURES,
    MIXES,
    TRANSITIONS,
    Drift,
    adwin,
    mix,
    page_hinkley,
    response,
)
from trainer.drift.adwin import Adwin
from trainer.drift.drift import levels, mixes
from trainer.drift.level import BLOCK, Level
from trainer.drift.mix import Mix, jensen_shannon, stability_index
from trainer.drift.page_hinkley import PageHinkley
from trainer.drift.response import Response
from trainer.examples import Examples, ReplayWindow
from trainer.impressions import NONE
from trainer.learner import Learner
from trainer.prequential import StepReport
from trainer.quality import MISS, NO_EVENT


def stream(seed: int, count: int, jumps: tuple[float, ...]) -> list[float]:
    """Draw normal numbers whose mean jumps at equal distances."""
    random = np.random.default_rng(seed)
    means = np.repeat(jumps, -(-count // len(jumps)))[:count]
    return (means + random.normal(0, 1, count)).tolist()


JUMPS = [(0.0,), (0.0, 3.0), (5.0, 0.0, 2.0, -1.0), (0.0, 0.2, 0.4, 0.6, 0.8)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("jumps", JUMPS)
def test_adwin_is_river_s_at_every_prefix(seed: int, jumps: tuple[float, ...]) -> None:
    # Buckets of one number: every cut is tried.
    theirs = ADWIN(delta=0.002, clock=1, max_buckets=10_000, min_window_length=adwin.LEAST_PART)
    ours = Adwin(0.002, np.zeros(Adwin.SIZE))
    detections = 0
    for value in stream(seed, adwin.WINDOW, jumps):
        theirs.update(value)
        found = ours.update(value)
        assert found == theirs.drift_detected
        if found:
            detections += 1
            ours.clear()
    assert bool(detections) == (len(jumps) > 1) or jumps == JUMPS[-1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("jumps", JUMPS)
def test_page_hinkley_is_river_s_at_every_prefix(seed: int, jumps: tuple[float, ...]) -> None:
    theirs = RiverPageHinkley(min_instances=page_hinkley.LEAST_COUNT, delta=0.5, threshold=10.0, mode="up")
    ours = PageHinkley(0.5, 10.0, np.zeros(PageHinkley.SIZE))
    for value in stream(seed, 2000, jumps):
        theirs.update(value)
        found = ours.update(value)
        assert found == theirs.drift_detected
        if found:
            ours.clear()


def test_the_window_of_adwin_is_bounded() -> None:
    ours = Adwin(0.002, np.zeros(Adwin.SIZE))
    # A slow trend of which the window holds too little to see.
    assert not any(ours.update(value) for value in np.linspace(0, 0.1, 3000) + np.tile([-1.0, 1.0], 1500))


# Measures, by hand


def test_measures_of_two_mixes() -> None:
    before, after = np.array([0.5, 0.5]), np.array([0.75, 0.25])
    assert stability_index(before, after) == pytest.approx(0.25 * math.log(1.5) + 0.25 * math.log(2))
    middle = np.array([0.625, 0.375])
    divergence = [(p * np.log2(p / middle)).sum() for p in (before, after)]
    assert jensen_shannon(before, after) == pytest.approx(sum(divergence) / 2)
    assert jensen_shannon(np.array([1.0, 1e-300]), np.array([1e-300, 1.0])) == pytest.approx(1.0)
    assert stability_index(after, after) == jensen_shannon(after, after) == 0


def test_a_mix_is_compared_with_the_blocks_before_it() -> None:
    watched = Mix(2, np.zeros(Mix.size(2)))
    even, uneven = np.tile([0, 1], mix.BLOCK // 2), np.tile([0, 0, 0, 1], mix.BLOCK // 4)
    for _ in range(mix.LEAST_REFERENCE + 1):
        assert not watched.add(even)
    assert watched.scores() == {"psi": 0.0, "js": 0.0}
    assert watched.add(uneven)
    found = watched.scores()
    shares = [(np.array(pair) + 0.5 / mix.BLOCK) / (1 + 1 / mix.BLOCK) for pair in ([0.5, 0.5], [0.75, 0.25])]
    assert found == {"psi": pytest.approx(stability_index(*shares)), "js": pytest.approx(jensen_shannon(*shares))}
    # What came before the change is no reference any more.
    assert not any(watched.add(uneven) for _ in range(mix.REFERENCE + 2))
    assert watched.scores() == {"psi": pytest.approx(0, abs=1e-12), "js": pytest.approx(0, abs=1e-12)}


def test_a_mix_forgets_what_lies_behind_its_reference() -> None:
    watched = Mix(2, np.zeros(Mix.size(2)))
    for share in np.linspace(0.5, 0.6, 3 * mix.REFERENCE):
        # So slow that no block differs much from those before it.
        assert not watched.add((np.arange(mix.BLOCK) >= share * mix.BLOCK).astype(np.int64))


@pytest.mark.parametrize("cut", [1, 7, 64, 100, 5000])
def test_how_values_are_cut_into_batches_does_not_matter(cut: int) -> None:
    random = np.random.default_rng(3)
    numbers, bins = random.normal(np.repeat([0.0, 2.0], 3500), 1.0), random.integers(0, 4, 7000)
    bins[5500:] = 0
    memories = []
    for size in (7000, cut):
        level_memory, mix_memory = np.zeros(Level.SIZE), np.zeros(Mix.size(4))
        watched_level, watched_mix = Level(level_memory), Mix(4, mix_memory)
        parts = range(0, 7000, size)
        assert sum(watched_level.add(numbers[i : i + size]) for i in parts)
        assert sum(watched_mix.add(bins[i : i + size]) for i in parts)
        memories.append(np.concatenate([level_memory, mix_memory]))
    np.testing.assert_array_equal(*memories)


# A level


@pytest.mark.parametrize("scale", [0.1, 1.0, 1000.0])
def test_a_level_finds_a_rise_whatever_its_scale_and_not_a_fall(scale: float) -> None:
    random = np.random.default_rng(5)
    fallen = Level(np.zeros(Level.SIZE))
    numbers = scale * random.normal(np.repeat([5.0, 3.0], 6400), 1.0)
    assert not fallen.add(numbers)
    # The rise is found though there was a fall before it.
    assert fallen.add(scale * random.normal(4.0, 1.0, 10 * BLOCK))


# Per million feedback, of one stream; benchmarks/drift.py measures less than a third of it.
MOST_FALSE_ALARMS = 10


@pytest.mark.parametrize("kind", ["normal", "share", "exponential"])
def test_noise_hardly_ever_fires_a_level(kind: str) -> None:
    random, count = np.random.default_rng(1), 12_800
    draw = {
        "normal": lambda: random.normal(0, 1, count),
        "share": lambda: (random.random(count) < 0.1).astype(np.float64),
        "exponential": lambda: random.exponential(1, count),
    }[kind]
    watched, feedback = Level(np.zeros(Level.SIZE)), 400_000
    alarms = sum(watched.add(block) for _ in range(feedback // count) for block in np.split(draw(), count // BLOCK))
    assert alarms <= MOST_FALSE_ALARMS * feedback / 1e6


def test_noise_does_not_fire_a_mix() -> None:
    random = np.random.default_rng(1)
    assert not Mix(32, np.zeros(Mix.size(32))).add(random.integers(0, 32, 400_000))


def test_a_share_that_was_nothing_is_not_found_by_one_event() -> None:
    watched = Level(np.zeros(Level.SIZE))
    assert not watched.add(np.zeros(100 * BLOCK))
    assert not watched.add(np.eye(1, 100 * BLOCK)[0])
    assert watched.add((np.arange(30 * BLOCK) % 4 == 0).astype(np.float64))


# What is watched


def _examples(settings: Settings, count: int, **changes: np.ndarray) -> Examples:
    length = settings.history_length
    arrays = {
        **{name: np.zeros((count, length), np.int64) for name in ("rows_BL", "classes_BL", "gaps_BL")},
        **{"item_B": np.arange(1, count + 1), "class_B": np.zeros(count, np.int64)},
        "context_BP": np.full((count, settings.max_context), -1),
        "impression_B": np.full(count, NONE),
        "account_B": np.full(count, NOBODY),
    }
    return Examples(**{**arrays, **changes})


def test_what_is_taken_from_a_batch(settings: Settings) -> None:
    settings = small(settings)
    rows_BL = np.zeros((4, 5), np.int64)
    gaps_BL = np.zeros((4, 5), np.int64)
    # Nothing, one, three and five entries.
    rows_BL[1, -1:], rows_BL[2, -3:], rows_BL[3] = 7, 8, 9
    gaps_BL[1:, -1] = 3, 0, 9
    context_BP = np.array([[-1, -1], [2, -1], [33, 5], [-1, -1]])
    examples = _examples(settings, 4, rows_BL=rows_BL, gaps_BL=gaps_BL, context_BP=context_BP)
    report = StepReport.untested(4)
    report.rank_B = np.array([MISS, 10, NO_EVENT, 11])
    # The first item was not known; the third feedback is not positive.
    report.item_loss_B = np.array([np.nan, 1.5, np.nan, 30.0])
    report.class_loss_B = np.array([0.1, 0.2, 0.3, 0.4])
    numbers = levels(examples, report, 1000)
    assert {name: values.tolist() for name, values in numbers.items()} == {
        "item_loss": pytest.approx([1.5 - math.log(1000), 30 - math.log(1000)]),
        "class_loss": [0.1, 0.2, 0.3, 0.4],
        "miss_at_10": [1, 0, 1],
        "unknown_items": [1, 0, 0],
        "new_users": [1, 0, 0, 0],
    }
    # Of two items nothing is known, one is of two categories.
    categories_BK = np.array([[0, 0], [65, 7], [-1, 0], [0, 0]])
    bins = mixes(examples, numbers["item_loss"], categories_BK)
    assert bins.pop("item_mix").tolist() == [(row * 2654435761 % 2**32) >> 27 for row in (1, 2, 3, 4)]
    assert {name: values.tolist() for name, values in bins.items()} == {
        "class_mix": [0, 0, 0, 0],
        "context_mix": [2, 1, 5],
        "history_length": [0, 1, 2, 3],
        "time_gap": [3, 0, 9],
        # 5.4 nats above chance, and far below it.
        "score": [9, 0],
        "category_mix": [1, 7, 31],
    }


def test_every_stream_has_its_measures_and_memory_of_its_own(settings: Settings) -> None:
    drift = Drift(settings)
    assert set(drift.scores()) == {f"drift_{s}_{m}" for s in (*MIXES, *LEVELS, TRANSITIONS) for m in MEASURES[s]}
    assert not any(memory.any() for memory in drift.write().values())
    for name in LEVELS:
        drift._levels[name].add(np.ones(3))
    assert drift.write()[DRIFT].sum() == 2 * 3 * len(LEVELS)


@pytest.mark.parametrize("damage", [np.zeros(3), np.zeros(1, np.float32), "nan"])
def test_memory_that_does_not_fit_is_refused(settings: Settings, damage: np.ndarray | str) -> None:
    drift = Drift(settings)
    memory = drift.write()[DRIFT]
    with pytest.raises(CorruptWeights):
        drift.check({DRIFT: np.full_like(memory, np.nan) if isinstance(damage, str) else damage})
    # An earlier release wrote none.
    drift.check({})
    drift.restore({})


# The response


def test_a_response_ends_when_the_loss_is_back_or_after_its_longest() -> None:
    def begin() -> Response:
        one = Response(np.zeros(Response.SIZE))
        for _ in range(100):
            one.observe(1.0, 64, False)
        assert not one.on
        one.observe(3.0, 64, True)
        assert one.on
        return one

    recovered, lasting = begin(), begin()
    for _ in range(20):
        recovered.observe(0.5, 64, False)
    assert not recovered.on
    for number in range(1, 200):
        lasting.observe(3.0, 64, False)
        assert lasting.on == (64 * number < response.LONGEST)
    lasting.observe(math.nan, 64, False)
    assert not lasting.on


def test_recent_replay_is_drawn_from_the_newest_alone(settings: Settings) -> None:
    settings = small(settings)
    window = ReplayWindow(settings)
    window.add(_examples(settings, 50, rows_BL=np.ones((50, 5), np.int64), class_B=np.ones(50, np.int64)))
    drawn = window.draw_choices(1000, np.random.default_rng(1), 10)
    assert set(drawn.item_B.tolist()) == set(range(41, 51))
    again = [window.draw_choices(100, np.random.default_rng(2), newest).item_B.tolist() for newest in (None, 50, 1000)]
    assert again[0] == again[1] == again[2]


def test_learning_changes_only_while_a_drift_is_responded_to(settings: Settings) -> None:
    learners = [Learner(small(settings, drift_boost=boost), CPU) for boost in (1.0, 4.0)]
    examples = _examples(learners[0].settings, 8, class_B=np.ones(8, np.int64))

    def weights() -> list[bytes]:
        for learner in learners:
            learner.allocate(f"item-{n}" for n in range(8))
            learner.step(examples)
        return [one.replica.write_all().dense["rank.0.weight"].tobytes() for one in learners]

    for _ in range(5):
        plain, boosted = weights()
        assert plain == boosted
    for learner in learners:
        learner.drift._response.observe(1.0, 8, True)
        assert learner.drift.responding
    plain, boosted = weights()
    assert plain != boosted
    assert [learner.strategies.rate for learner in learners] == [1.0, 4.0]


# In the trainer


COUNT = 7168
CHANGED = 5500


def _log_with_a_change(base: Settings) -> None:
    """Append feedback of which the kind of items changes, and nothing else by intent."""
    feedback = make_feedback(COUNT)
    for number in range(CHANGED, COUNT):
        one = feedback[number]
        feedback[number] = Feedback(one.user_id, f"{one.item_id[-1]}-new", one.feedback_class, one.time_ms)
    for start in range(0, COUNT, 1000):
        append(base, feedback[start : start + 1000])


def _records(base: Settings) -> list[VersionRecord]:
    with connect(base) as client:
        return list(reversed(WeightStore(client, base).versions(1000)))


def test_a_drift_is_recorded_with_the_version_that_learned_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small(settings, batch_size=128, replay_size=4, gate_events=4)
    _log_with_a_change(base)
    restarted, registry = fork(base, "restarted"), CollectorRegistry()
    with trainer(base, registry=registry) as daemon:
        daemon.start()
        while daemon.step():
            pass
    records = _records(base)
    found = [r for r in records if r.metrics.get("drift_item_mix_detected")]
    assert len(found) == 1
    learned = found[0].feedback_learned
    assert CHANGED < learned <= -(-(CHANGED + mix.BLOCK) // 256) * 256
    assert found[0].metrics[DETECTED] == 1
    assert found[0].metrics["drift_item_mix_psi"] > mix.PSI
    assert all(
        r.metrics[DETECTED] == float(any(k.endswith("_detected") and k != DETECTED for k in r.metrics))
        for r in records[1:]
    )
    assert 0 < found[0].metrics["drift_network_norm_change"] < 0.1
    assert 0 < found[0].metrics["drift_item_vectors_cosine_distance"] < 1
    of = {"stream": "item_mix"}
    assert registry.get_sample_value("recsys_drifts_total", of) == 1
    last = records[-1].metrics["drift_item_mix_psi"]
    assert registry.get_sample_value("recsys_drift_score", {**of, "measure": "psi"}) == last
    # Wherever the trainer restarts, it remembers what it watched.
    monkeypatch.setattr("trainer.daemon.READ_COUNT", 1500)
    for _ in range(3):
        with trainer(restarted) as daemon:
            daemon.start()
            daemon.step()
    learn_all(restarted)
    assert versions(restarted) == versions(base)

    def drift_of(record: VersionRecord) -> dict[str, float]:
        return {key: value for key, value in record.metrics.items() if key.startswith("drift_")}

    assert [drift_of(r) for r in _records(restarted)] == [drift_of(r) for r in records]
