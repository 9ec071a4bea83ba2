"""ServedLists: what was recommended and what users did with it, by source and position, and how varied it was.

Counted in plain lists and turned into series when Prometheus asks, so that an answer costs next to nothing. The items
of the last answers are kept for the shares and means over them; those of several processes are each about its own.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from recsys.call_metrics import Timings
from recsys.recommendation_id import RecommendationId
from recsys.v1 import recommender_pb2

OTHER = "other"
# "network", "transition", "trending", by the number that an answer carries.
SOURCES = {
    number: name.removeprefix("SOURCE_").lower() for name, number in recommender_pb2.Source.items() if number != 0
}
# Positions that are counted together, from 1; what is further down has the last.
_POSITION_GROUPS = ((1, 1, "1"), (2, 2, "2"), (3, 3, "3"), (4, 5, "4-5"), (6, 10, "6-10"))
POSITIONS = (*(name for _, _, name in _POSITION_GROUPS), "11+")
_GROUPS = tuple(i for i, (first, last, _) in enumerate(_POSITION_GROUPS) for _ in range(first, last + 1))
_LAST_GROUP = len(_POSITION_GROUPS)
# How many versions before the one being served the answer came from; several are committed in a second.
BEHIND = ("0", "1-9", "10-99", "100-999", "1000+")
UNKNOWN = "unknown"
OUTCOMES = ("positive", "not_positive")
# Coverage, novelty and popularity are those of this many answers, of which the first items count.
ANSWERS_KEPT = 1000
ITEMS_KEPT = 10
# The most chosen items of the catalogue: this share of them.
HEAD_SHARE = 0.01

# Rows of the item table, or how often the item of each was chosen.
Rows = NDArray[np.int64]
Chosen = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Variety:
    """Say how varied some lists were; NaN where that cannot be told."""

    # Share of the catalogue's items that was recommended.
    coverage: float = math.nan
    # Mean of -log2 of the share that an item has in all that was ever chosen (Zhou et al. 2010).
    novelty_bits: float = math.nan
    # Share of the recommended items that are of the catalogue's most chosen hundredth.
    head: float = math.nan


def variety(lists: Sequence[Rows], chosen_I: Chosen) -> Variety:
    """Measure lists of items, by row, against how often every item was chosen; one counts as often as it is in them.

    One never chosen counts as chosen once, so that its novelty is finite.
    """
    shown = np.concatenate([np.zeros(0, np.int64), *lists])
    if not len(shown):
        return Variety()
    row_U, times_U = np.unique(shown, return_counts=True)
    # Row 0 stands for no item; a table may be replaced by a smaller one between two looks.
    known_U = (row_U > 0) & (row_U < len(chosen_I))
    row_U, times_U = row_U[known_U], times_U[known_U]
    items, total = len(chosen_I) - 1, float(chosen_I[1:].sum(dtype=np.float64))
    chosen_U = chosen_I[row_U]
    if not len(row_U) or not total:
        return Variety(coverage=len(times_U) / items if items > 0 else math.nan)
    head = max(1, int(items * HEAD_SHARE))
    least = max(1.0, np.partition(chosen_I[1:], items - head)[items - head])
    bits_U = -np.log2(np.maximum(1.0, chosen_U) / total)
    return Variety(
        coverage=len(times_U) / items,
        novelty_bits=float(np.average(bits_U, weights=times_U)),
        head=float(np.average(chosen_U >= least, weights=times_U)),
    )


class ServedLists(Collector):
    """Count the items of answers and the feedback on them; safe to call from any thread.

    `chosen`, once set, tells how often the item of each row was chosen; a row counts as the item that has it then.
    """

    def __init__(self, registry: CollectorRegistry, edges: Sequence[float] = ()) -> None:
        """Export through `registry`; `edges` are those of the histogram of how long answers took, in seconds."""
        self.chosen: Callable[[], Chosen] | None = None
        self._lock = threading.Lock()
        self._sources = (*SOURCES.values(), OTHER)
        self._source_index = {number: i for i, number in enumerate(SOURCES)}
        places = len(self._sources) * len(POSITIONS)
        self._shown = [0] * places
        self._seconds = Timings(edges)
        # Feedback on items by source and position, those that were not in their answer last; by how old the answer was.
        self._feedback = [[0] * (places + 1) for _ in OUTCOMES]
        self._behind = [[0] * (len(BEHIND) + 1) for _ in OUTCOMES]
        self._lists: deque[Rows] = deque(maxlen=ANSWERS_KEPT)
        registry.register(self)

    def shown(self, rows: Rows, sources: Sequence[int], seconds: float) -> None:
        """Count one answer's items, by their rows, best first, each with its recsys.v1.Source, and time the answer."""
        other = len(self._sources) - 1
        index, counts, groups = self._source_index, self._shown, len(POSITIONS)
        with self._lock:
            for source, group in zip(sources, _GROUPS, strict=False):
                counts[index.get(source, other) * groups + group] += 1
            # The rest of a longer list is all in the last group.
            for source in sources[len(_GROUPS) :]:
                counts[index.get(source, other) * groups + _LAST_GROUP] += 1
            self._seconds.observe(seconds)
            self._lists.append(rows[:ITEMS_KEPT])

    def feedback(self, found: RecommendationId | None, item_id: str, served_version: int, *, positive: bool) -> None:
        """Count feedback that came with a recommendation_id, `found` is None where that says nothing."""
        outcome = 0 if positive else 1
        place = found.place(item_id) if found else None
        at, behind = -1, -1
        if found:
            # A server that is not there yet has an answer of a newer version before it: none behind.
            versions = max(0, served_version - found.version)
            behind = min(len(str(versions)), len(BEHIND) - 1) if versions else 0
        if place:
            other = len(self._sources) - 1
            group = _GROUPS[place.position] if place.position < len(_GROUPS) else _LAST_GROUP
            at = self._source_index.get(place.source, other) * len(POSITIONS) + group
        with self._lock:
            self._feedback[outcome][at] += 1
            self._behind[outcome][behind] += 1

    def collect(self) -> Iterable[Metric]:
        """Return the series as they stand."""
        shown = CounterMetricFamily(
            "recsys_items_recommended",
            "Items in answers to Recommend, by the part of the score that lifted them and by position.",
            labels=["source", "position"],
        )
        took = HistogramMetricFamily(
            "recsys_recommend_seconds",
            "Time that one answer to Recommend took, waiting in the queue included.",
            labels=[],
        )
        done = CounterMetricFamily(
            "recsys_recommendation_feedback",
            "Feedback with a recommendation_id, by the source and position that its item had in that answer; other "
            "where it was not among the answer's first items or the id is none of this software's.",
            labels=["source", "position", "outcome"],
        )
        behind = CounterMetricFamily(
            "recsys_recommendation_version_feedback",
            "Feedback with a recommendation_id, by how many versions before the one being served the answer came from.",
            labels=["versions_behind", "outcome"],
        )
        places = [[source, position] for source in self._sources for position in POSITIONS]
        with self._lock:
            lists = list(self._lists)
            self._seconds.add_to(took, [])
            for place, count in zip(places, self._shown, strict=True):
                shown.add_metric(place, count)
            for o, outcome in enumerate(OUTCOMES):
                for place, count in zip([*places, [OTHER, OTHER]], self._feedback[o], strict=True):
                    done.add_metric([*place, outcome], count)
                for name, count in zip((*BEHIND, UNKNOWN), self._behind[o], strict=True):
                    behind.add_metric([name, outcome], count)
        return [took, shown, done, behind, *self._variety(lists)]

    def _variety(self, lists: list[Rows]) -> list[Metric]:
        found = variety(lists, self.chosen()) if self.chosen else Variety()
        of = f"in the first {ITEMS_KEPT} places of this process's last {ANSWERS_KEPT} answers; NaN until measured."
        return [
            GaugeMetricFamily(name, f"{help_} {of}", value=value)
            for name, help_, value in (
                ("recsys_recommended_coverage_ratio", "Share of all items that was recommended", found.coverage),
                (
                    "recsys_recommended_novelty",
                    "Mean information in bits, -log2 of an item's share in all that was chosen,",
                    found.novelty_bits,
                ),
                (
                    "recsys_recommended_head_ratio",
                    "Share of the most chosen hundredth of all items",
                    found.head,
                ),
            )
        ]
