"""Quality: every metric against plain loops at every prefix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trainer.quality import MISS, NAMES, NO_EVENT, SLICE_NAMES, Mean, Quality, gains

RECENT = 5
batches_of_ranks = st.lists(st.lists(st.integers(-1, 25), max_size=6), max_size=8)
losses = st.one_of(st.just(math.nan), st.floats(0, 50))


def _array(ranks: Sequence[int]) -> np.ndarray:
    return np.array(ranks, np.int64)


def _reference(ranks: Sequence[int]) -> dict[str, float]:
    if not ranks:
        return {}
    sums = dict.fromkeys(NAMES, 0.0)
    for rank in ranks:
        for k in (1, 5, 10, 20):
            sums[f"hr_at_{k}"] += 1 if 1 <= rank <= k else 0
        if 1 <= rank <= 10:
            sums["ndcg_at_10"] += math.log(2) / math.log(1 + rank)
            sums["mrr_at_10"] += 1 / rank
    return {name: value / len(ranks) for name, value in sums.items()}


def test_gains_by_hand() -> None:
    found = gains(_array([1, 3, 7, 10, 11, 21, MISS]))
    assert NAMES == ("hr_at_1", "hr_at_5", "hr_at_10", "hr_at_20", "ndcg_at_10", "mrr_at_10")
    expected = [
        [1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 0.5, 1 / 3],
        [0, 0, 1, 1, 1 / 3, 1 / 7],
        [0, 0, 1, 1, math.log(2) / math.log(11), 0.1],
        [0, 0, 0, 1, 0, 0],
        [0] * 6,
        [0] * 6,
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


@hypothesis_settings(max_examples=60, deadline=None)
@given(batches_of_ranks)
def test_metrics_equal_a_loop_at_every_prefix(batches: list[list[int]]) -> None:
    quality = Quality(("a", "b"), recent=RECENT)
    events: list[int] = []
    for batch in batches:
        quality.add_ranks("a", _array(batch))
        quality.add_ranks("b", _array([MISS if rank == 1 else rank for rank in batch]))
        events += [rank for rank in batch if rank != NO_EVENT]
        assert quality.events == len(events)
        for method, ranks in (("a", events), ("b", [MISS if rank == 1 else rank for rank in events])):
            assert quality.metrics(method) == pytest.approx(_reference(ranks), abs=1e-12)
            assert quality.metrics(method, recent=True) == pytest.approx(_reference(ranks[-RECENT:]), abs=1e-12)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(losses, losses), min_size=1, max_size=6), min_size=1, max_size=8))
def test_losses_are_means_of_what_is_there_at_every_prefix(batches: list[list[tuple[float, float]]]) -> None:
    quality = Quality(recent=RECENT)
    rows: list[tuple[float, float]] = []
    for batch in batches:
        quality.add_losses(*(np.array(column) for column in zip(*batch, strict=True)))
        rows += batch
        for recent, window in ((False, rows), (True, rows[-RECENT:])):
            found = quality.losses(recent=recent)
            for c, name in enumerate(("item_log_loss", "log_loss")):
                there = [row[c] for row in window if not math.isnan(row[c])]
                if there:
                    assert found[name] == pytest.approx(math.fsum(there) / len(there), abs=1e-9)


slice_batches = st.lists(
    st.lists(st.tuples(st.integers(-1, 25), st.booleans(), st.booleans()), max_size=6), min_size=1, max_size=8
)


def _slices(events: Sequence[tuple[int, bool, bool]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for place, name in ((1, "new_user"), (2, "new_item")):
        inside = [1.0 if 1 <= event[0] <= 10 else 0.0 for event in events if event[place]]
        if inside:
            found[f"{name}_hr_at_10"] = sum(inside) / len(inside)
        if events:
            found[f"{name}_share"] = len(inside) / len(events)
    return found


@hypothesis_settings(max_examples=60, deadline=None)
@given(slice_batches)
def test_slices_equal_a_loop_at_every_prefix(batches: list[list[tuple[int, bool, bool]]]) -> None:
    quality = Quality(recent=RECENT)
    events: list[tuple[int, bool, bool]] = []
    for batch in batches:
        ranks, users, items = zip(*batch, strict=True) if batch else ((), (), ())
        quality.add_slices(_array(ranks), np.array(users, bool), np.array(items, bool))
        events += [event for event in batch if event[0] != NO_EVENT]
        assert quality.slices() == pytest.approx(_slices(events), abs=1e-12)
        assert quality.slices(recent=True) == pytest.approx(_slices(events[-RECENT:]), abs=1e-12)
        assert set(quality.slices()) <= set(SLICE_NAMES)


def _auc(pairs: Sequence[tuple[bool, float]]) -> float | None:
    yes, no = [p for happened, p in pairs if happened], [p for happened, p in pairs if not happened]
    if not yes or not no:
        return None
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in yes for b in no) / (len(yes) * len(no))


def _calibration(pairs: Sequence[tuple[bool, float]]) -> float:
    bins: dict[int, list[float]] = {}
    for happened, p in pairs:
        bins.setdefault(min(14, int(p * 15)), []).append(happened - p)
    return sum(abs(math.fsum(each)) for each in bins.values()) / len(pairs)


said = st.sampled_from([0.0, 0.01, 0.125, 0.25, 0.5, 0.875, 1.0, math.nan])


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.booleans(), said), min_size=1, max_size=6), min_size=1, max_size=8))
def test_probabilities_equal_a_loop_at_every_prefix(batches: list[list[tuple[bool, float]]]) -> None:
    quality = Quality(recent=RECENT)
    pairs: list[tuple[bool, float]] = []
    assert quality.probabilities() == {}
    for batch in batches:
        happened, p = zip(*batch, strict=True)
        quality.add_probabilities(np.array(happened), np.array(p, np.float32))
        pairs = [*pairs, *(each for each in batch if not math.isnan(each[1]))][-RECENT:]
        # What the network says comes in single precision.
        exact = [(each, float(np.float32(p))) for each, p in pairs]
        expected = {"auc": _auc(exact), "calibration_error": _calibration(exact) if exact else None}
        assert quality.probabilities() == pytest.approx({k: v for k, v in expected.items() if v is not None}, abs=1e-9)


def test_the_summary_joins_what_is_known() -> None:
    quality = Quality(("recsys", "popularity"))
    quality.add_ranks("recsys", _array([1]))
    quality.add_ranks("popularity", _array([2]))
    quality.add_losses(np.array([1.5]), np.array([0.5]))
    quality.add_slices(_array([1]), np.array([True]), np.array([False]))
    quality.add_probabilities(np.array([True, False]), np.array([0.75, 0.25]))
    recent = quality.summary(recent=True)
    expected = {"hr_at_1": 1.0, "popularity_hr_at_1": 0.0, "new_user_hr_at_10": 1.0, "auc": 1.0, "log_loss": 0.5}
    assert {name: recent[name] for name in expected} == expected
    assert "new_item_hr_at_10" not in recent
    assert "auc" not in quality.summary()


def test_before_the_first_event_there_is_nothing() -> None:
    quality = Quality(("a",))
    assert quality.events == 0
    assert quality.metrics("a") == {}
    assert quality.metrics("a", recent=True) == {}
    assert quality.losses() == {}
    assert quality.losses(recent=True) == {}
    quality.add_ranks("a", _array([NO_EVENT, NO_EVENT]))
    assert quality.events == 0
    assert quality.metrics("a") == {}


def test_a_miss_is_an_event() -> None:
    quality = Quality(("a",))
    quality.add_ranks("a", _array([MISS, NO_EVENT]))
    assert quality.events == 1
    assert quality.metrics("a") == dict.fromkeys(NAMES, 0.0)


def test_events_are_those_of_the_first_method() -> None:
    quality = Quality(("a", "b"))
    quality.add_ranks("b", _array([1, 2]))
    assert quality.events == 0
    quality.add_ranks("a", _array([1]))
    assert quality.events == 1


def test_the_recent_window_forgets() -> None:
    quality = Quality(("a",), recent=3)
    quality.add_ranks("a", _array([1, 1, 1, 1]))
    quality.add_ranks("a", _array([MISS, 1]))
    assert quality.metrics("a", recent=True)["hr_at_1"] == pytest.approx(2 / 3)
    assert quality.metrics("a")["hr_at_1"] == pytest.approx(5 / 6)
    quality.add_ranks("a", _array([MISS] * 7))
    assert quality.metrics("a", recent=True)["hr_at_1"] == 0.0


def test_mean_by_hand() -> None:
    mean = Mean(2)
    mean.add(np.array([[1.0, math.nan], [2.0, 6.0], [6.0, math.nan]]))
    assert mean.all().tolist() == [3.0, 6.0]
    assert mean.recent().tolist() == [4.0, 6.0]
