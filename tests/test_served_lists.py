"""Served lists: what was shown and what came of it is counted exactly, and its variety equals plain loops."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from learning import CPU, append, learn_all, make_feedback, replica, small
from prometheus_client import CollectorRegistry

from recsys.catalog import Catalog, CatalogMirror
from recsys.recommendation_id import issue, parse
from recsys.scorer import Scorer
from recsys.served_lists import ANSWERS_KEPT, ITEMS_KEPT, ServedLists, Variety, variety
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.v1.weights_pb2 import VersionRecord

CHOSEN = (0, 40, 0, 7, 1, 300, 12, 3)
CATALOGUE = np.array(CHOSEN, np.float32)
ROWS = range(1, len(CHOSEN))


def rows(*each: int) -> np.ndarray:
    return np.array(each, np.int64)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    found = registry.get_sample_value(name, labels)
    assert found is not None, (name, labels)
    return found


def reference(lists: Sequence[Sequence[int]]) -> Variety:
    """The same by loops: the catalogue is too small for its most chosen hundredth to be more than one item."""
    slots = [row for each in lists for row in each if row in ROWS]
    if not any(lists):
        return Variety()
    if not slots:
        return Variety(0.0)
    bits = [-math.log(max(1, CHOSEN[row]) / sum(CHOSEN), 2) for row in slots]
    top = [CHOSEN[row] == max(CHOSEN) for row in slots]
    return Variety(len(set(slots)) / len(ROWS), sum(bits) / len(slots), sum(top) / len(slots))


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, len(CHOSEN)), max_size=6), max_size=6))
def test_variety_equals_a_loop_at_every_prefix(lists: list[list[int]]) -> None:
    for end in range(len(lists) + 1):
        found, expected = variety([rows(*each) for each in lists[:end]], CATALOGUE), reference(lists[:end])
        for name in ("coverage", "novelty_bits", "head"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6, nan_ok=True), name


def test_the_head_is_a_hundredth_of_the_catalogue() -> None:
    chosen = np.arange(501, dtype=np.float32)
    assert variety([rows(500, 499, 498, 497, 496, 495)], chosen).head == pytest.approx(5 / 6)


def test_without_anything_chosen_only_coverage_is_known() -> None:
    found = variety([rows(2)], np.zeros(5, np.float32))
    assert found.coverage == 0.25
    assert math.isnan(found.novelty_bits)
    assert math.isnan(found.head)


def test_a_row_beyond_a_table_that_shrank_counts_as_unknown() -> None:
    assert variety([rows(5)], np.zeros(5, np.float32)).coverage == 0


def test_items_are_counted_by_source_and_position() -> None:
    registry = CollectorRegistry()
    lists = ServedLists(registry)
    lists.shown(rows(*range(1, 14)), [1, 2, 3, *[1] * 9, 99], 0.01)
    lists.shown(rows(1), [2], 0.01)
    lists.shown(rows(), [], 0.01)
    expected = {
        **{("network", "1"): 1, ("transition", "1"): 1, ("transition", "2"): 1, ("trending", "3"): 1},
        **{("network", "4-5"): 2, ("network", "6-10"): 5, ("network", "11+"): 2, ("other", "11+"): 1},
    }
    for source in ("network", "transition", "trending", "other"):
        for position in ("1", "2", "3", "4-5", "6-10", "11+"):
            found = value(registry, "recsys_items_recommended_total", source=source, position=position)
            assert found == expected.get((source, position), 0), (source, position)


@pytest.mark.parametrize(
    ("served", "behind"),
    [(5, "0"), (4, "0"), (6, "1-9"), (14, "1-9"), (15, "10-99"), (105, "100-999"), (1005, "1000+"), (10**6, "1000+")],
)
def test_feedback_is_counted_by_how_far_behind_its_answer_is(served: int, behind: str) -> None:
    registry = CollectorRegistry()
    lists = ServedLists(registry)
    lists.feedback(parse(issue(5, ["a", "b"], [1, 3])), "b", served, positive=False)
    name = "recsys_recommendation_version_feedback_total"
    assert value(registry, name, versions_behind=behind, outcome="not_positive") == 1
    assert sum(s.value for m in registry.collect() for s in m.samples if s.name == name) == 1
    of = {"source": "trending", "position": "2", "outcome": "not_positive"}
    assert value(registry, "recsys_recommendation_feedback_total", **of) == 1


def test_feedback_on_what_cannot_be_placed_is_counted_as_other() -> None:
    registry = CollectorRegistry()
    lists = ServedLists(registry)
    lists.feedback(None, "b", 7, positive=True)
    lists.feedback(parse(issue(5, ["a"], [1])), "b", 7, positive=True)
    of = {"source": "other", "position": "other", "outcome": "positive"}
    assert value(registry, "recsys_recommendation_feedback_total", **of) == 2
    name = "recsys_recommendation_version_feedback_total"
    assert value(registry, name, versions_behind="unknown", outcome="positive") == 1
    assert value(registry, name, versions_behind="1-9", outcome="positive") == 1


def test_variety_is_that_of_the_first_items_of_the_last_answers() -> None:
    registry = CollectorRegistry()
    lists = ServedLists(registry)
    assert math.isnan(value(registry, "recsys_recommended_coverage_ratio"))
    lists.shown(rows(5), [1], 0.01)
    assert math.isnan(value(registry, "recsys_recommended_coverage_ratio"))
    lists.chosen = lambda: CATALOGUE
    assert value(registry, "recsys_recommended_coverage_ratio") == pytest.approx(1 / 7)
    assert value(registry, "recsys_recommended_novelty") == pytest.approx(-math.log2(300 / 363))
    assert value(registry, "recsys_recommended_head_ratio") == 1
    for _ in range(ANSWERS_KEPT):
        lists.shown(rows(*[1] * ITEMS_KEPT, 5), [1] * (ITEMS_KEPT + 1), 0.01)
    assert value(registry, "recsys_recommended_coverage_ratio") == pytest.approx(1 / 7)
    assert value(registry, "recsys_recommended_head_ratio") == 0


def test_nothing_is_lost_between_threads() -> None:
    registry = CollectorRegistry()
    lists = ServedLists(registry)
    recommendation = parse(issue(1, ["a"], [1]))

    def work() -> None:
        for _ in range(2000):
            lists.shown(rows(1), [1], 0.01)
            lists.feedback(recommendation, "a", 1, positive=True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        list(registry.collect())
    for thread in threads:
        thread.join()
    of = {"source": "network", "position": "1"}
    assert value(registry, "recsys_items_recommended_total", **of) == 8000
    assert value(registry, "recsys_recommendation_feedback_total", **of, outcome="positive") == 8000


def test_a_scorer_tells_how_often_items_were_chosen(settings: Settings) -> None:
    settings = small(settings)
    with connect(settings) as client:
        scorer = Scorer(settings, CatalogMirror(Catalog(client, settings)), CPU)
        assert scorer.chosen().tolist() == [0.0]
        assert math.isnan(variety([rows(1)], scorer.chosen()).coverage)
        feedback = make_feedback(64)
        append(settings, feedback)
        learn_all(settings)
        held = replica(settings)
        scorer.take(VersionRecord(version=1), held)
    positive = {each.name for each in settings.classes if each.positive}
    items = sorted({each.item_id for each in feedback})
    assert scorer.chosen()[held.table.look_up(items)].tolist() == [
        sum(each.item_id == item and each.feedback_class in positive for each in feedback) for item in items
    ]
