"""Measures: each equals plain loops at every prefix, and values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trainer.evaluation import measures
from trainer.probabilities import auc

probabilities = st.sampled_from([0.0, 0.01, 0.1, 1 / 15, 0.3, 0.31, 0.5, 0.77, 0.9, 1.0])
outcomes = st.lists(st.tuples(st.booleans(), probabilities), min_size=1, max_size=40)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=40))
def test_accuracy_equals_a_loop_at_every_prefix(ranks: list[int]) -> None:
    for end in range(1, len(ranks) + 1):
        found = measures.accuracy(np.array(ranks[:end]))
        for k in (1, 5, 10, 20):
            within = [rank for rank in ranks[:end] if 1 <= rank <= k]
            assert found[f"hr_at_{k}"] == pytest.approx(len(within) / end)
            assert found[f"ndcg_at_{k}"] == pytest.approx(sum(math.log(2) / math.log(1 + r) for r in within) / end)
            assert found[f"mrr_at_{k}"] == pytest.approx(sum(1 / rank for rank in within) / end)
    assert measures.accuracy(np.array([], np.int64)) == {}


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 25), max_size=40), st.integers(1, 12), st.integers(1, 12))
def test_a_moving_window_equals_a_loop(ranks: list[int], window: int, step: int) -> None:
    ends, rates = measures.moving(np.array(ranks, np.int64), window, step, 10)
    assert ends == list(range(step, len(ranks) + 1, step))
    for end, rate in zip(ends, rates, strict=True):
        part = ranks[max(0, end - window) : end]
        assert rate == pytest.approx(sum(1 <= rank <= 10 for rank in part) / len(part))


@hypothesis_settings(max_examples=60, deadline=None)
@given(outcomes)
def test_measures_of_clicks_equal_loops_at_every_prefix(made: list[tuple[bool, float]]) -> None:
    for end in range(1, len(made) + 1):
        happened = np.array([one for one, _ in made[:end]])
        said = np.array([p for _, p in made[:end]])
        found = measures.clicks(happened, said)
        yes, no = [p for one, p in made[:end] if one], [p for one, p in made[:end] if not one]
        if yes and no:
            pairs = [(p > q) + 0.5 * (p == q) for p in yes for q in no]
            assert found["auc"] == pytest.approx(sum(pairs) / len(pairs))
        else:
            assert found["auc"] is None
            assert math.isnan(auc(happened, said))
        bound = [min(max(p, 1e-7), 1 - 1e-7) for p in said.tolist()]
        losses = [-math.log(p if one else 1 - p) for one, p in zip(happened, bound, strict=True)]
        assert found["log_loss"] == pytest.approx(sum(losses) / end)
        total = 0.0
        for n in range(15):
            part = [(one, p) for one, p in made[:end] if n <= 15 * p < n + 1 or (n == 14 and p == 1.0)]
            total += abs(sum(one for one, _ in part) - sum(p for _, p in part))
        assert found["calibration_error"] == pytest.approx(total / end)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_a_class_report_equals_counting(made: list[tuple[int, int]]) -> None:
    actual, said = (np.array(column) for column in zip(*made, strict=True))
    for index, row in enumerate(measures.class_report(actual, said, ["a", "b", "c"])):
        hits = sum(a == s == index for a, s in made)
        told, came = sum(s == index for _, s in made), sum(a == index for a, _ in made)
        precision, recall = hits / told if told else 0.0, hits / came if came else 0.0
        assert (row["class"], row["count"]) == ("abc"[index], came)
        assert (row["precision"], row["recall"]) == pytest.approx((precision, recall))
        mean = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        assert row["f1"] == pytest.approx(mean)


def test_errors_of_values_by_hand() -> None:
    found = measures.values(np.array([4.0, 2.0, 5.0]), np.array([3.0, 2.0, 7.0]), np.array([4.0, 2.0, 7.0]))
    assert found == {"mae": pytest.approx(2 / 3), "rmse": pytest.approx(math.sqrt(5 / 3))}


@pytest.mark.parametrize("count", [10, 11, 99, 1000])
def test_tenths_cover_everything_once(count: int) -> None:
    parts = measures.tenths(count)
    assert len(parts) == 10
    assert [place for part in parts for place in range(count)[part]] == list(range(count))
    assert {len(range(count)[part]) for part in parts} <= {count // 10, count // 10 + 1}
