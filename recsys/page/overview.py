"""Overview: all that the page shows, put together from what was last found; nothing here waits for anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import Metric

import recsys
from recsys.condition import ACCURACY, BESIDE, UNKNOWN, Condition, Facts, judge
from recsys.page.sampled import Sampled
from recsys.page.store_look import Case, Held, Stored, StoreLook, Version
from recsys.page.traffic import Now, Point, Traffic
from recsys.settings import Settings

# Points of a chart over versions; between them versions are left out.
HISTORY_POINTS = 240
# Versions whose accuracy says what is usual.
USUAL_VERSIONS = 100
MAX_VERSIONS = 200
DRIFT = "drift_"


@dataclass(frozen=True, slots=True)
class Learning:
    """Say what the store holds of learning; -1 and null where nothing is known yet."""

    newest_version: int
    newest_committed_ms: int
    feedback_learned: int
    backlog: int
    paused: bool
    epoch: int
    # The version after the newest while the gate holds it back, else null.
    held: Held | None
    # Of the newest version: from its oldest feedback's acceptance to its commit.
    accepted_to_committed_seconds: float | None


@dataclass(frozen=True, slots=True)
class Store:
    """Say how the store is; `looked_ms` is when it last answered, 0 for never. A bound of 0 is none."""

    reachable: bool
    looked_ms: int
    problem: str
    log_records: int
    log_bytes: int
    log_max_bytes: int
    used_memory: int
    max_memory: int


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """Hold one version in the charts; null where it was not measured."""

    version: int
    committed_ms: int
    verdict: str
    accuracy: float | None
    popularity: float | None
    accepted_to_committed_seconds: float | None
    drift: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Seen:
    """Hold everything at one time; `loading` while something was not looked at yet."""

    time_ms: int
    loading: bool
    software_version: str
    condition: Condition
    serving: Now | None
    learning: Learning | None
    store: Store | None
    # Of the newest version, by name; drift apart.
    metrics: Mapping[str, float]
    drift: Mapping[str, float]
    feedback_classes: Sequence[str]
    quarantine: Sequence[Case]
    set_aside: int
    # Oldest first: of versions, and of the last minutes.
    history: Sequence[HistoryPoint]
    traffic: Sequence[Point]


class Overview:
    """Look at metrics and store, each in a thread of its own while somebody asks."""

    def __init__(
        self,
        settings: Settings,
        collect: Callable[[], Iterable[Metric]],
        problem: Callable[[], str] = lambda: "",
    ) -> None:
        """`collect` gives the metrics of all server processes, `problem` why newer weights cannot be served."""
        self._classes = [each.name for each in settings.classes]
        self._problem = problem
        self._store = StoreLook(settings)
        self._looks = Sampled("page-store", self._store.look)
        self._traffic = Sampled("page-traffic", Traffic(collect).look)

    def seen(self) -> Seen:
        """Return what is known now."""
        stored, traffic = self._looks.latest(), self._traffic.latest()
        now, points = traffic or (None, [])
        versions = stored.versions if stored else ()
        newest = versions[0] if versions else None
        metrics = dict(newest.metrics) if newest else {}
        now_ms = time.time_ns() // 1_000_000
        return Seen(
            time_ms=now_ms,
            loading=stored is None or now is None,
            software_version=recsys.__version__,
            condition=UNKNOWN if stored is None or now is None else judge(_facts(now_ms, stored, now, self._problem())),
            serving=now,
            learning=_learning(stored, newest) if stored and stored.time_ms else None,
            store=_store(stored) if stored else None,
            metrics={name: value for name, value in metrics.items() if not name.startswith(DRIFT)},
            drift={name: value for name, value in metrics.items() if name.startswith(DRIFT)},
            feedback_classes=self._classes,
            quarantine=stored.cases if stored else (),
            set_aside=stored.set_aside if stored else 0,
            history=_history(versions),
            traffic=points,
        )

    def versions(self, limit: int) -> Sequence[Version]:
        """Return the newest versions, newest first."""
        stored = self._looks.latest()
        return stored.versions[:limit] if stored else ()

    def close(self) -> None:
        """End the threads and give the connection back."""
        self._looks.close()
        self._traffic.close()
        self._store.close()


def _facts(now_ms: int, stored: Stored, now: Now, problem: str) -> Facts:
    newest = stored.versions[0] if stored.versions else None
    return Facts(
        now_ms,
        store_problem=stored.problem,
        serving_problem=problem,
        served_version=now.version,
        newest_version=newest.version if newest else 0,
        newest_committed_ms=newest.committed_ms if newest else 0,
        newest_verdict=newest.verdict if newest else "",
        newest_reason=newest.reason if newest else "",
        held_times=stored.held.times if stored.held else 0,
        held_reason=stored.held.reason if stored.held else "",
        feedback_learned=newest.feedback_learned if newest else 0,
        backlog=stored.backlog,
        paused=stored.paused,
        metrics=newest.metrics if newest else {},
        earlier_accuracy=[v.metrics[ACCURACY] for v in stored.versions[1:USUAL_VERSIONS] if ACCURACY in v.metrics],
        freshness_seconds=now.freshness_p99_seconds,
        set_aside=stored.set_aside,
        log_bytes=stored.log_bytes,
        log_max_bytes=stored.log_max_bytes,
        used_memory=stored.used_memory,
        max_memory=stored.max_memory,
        failed_ratio=now.failed_ratio,
        answer_seconds=now.recommend_p99_seconds,
    )


def _learning(stored: Stored, newest: Version | None) -> Learning:
    return Learning(
        newest.version if newest else 0,
        newest.committed_ms if newest else 0,
        newest.feedback_learned if newest else 0,
        stored.backlog,
        stored.paused,
        stored.epoch,
        stored.held,
        newest.accepted_to_committed_seconds if newest else None,
    )


def _store(stored: Stored) -> Store:
    return Store(
        *(stored.reachable, stored.time_ms, stored.problem, stored.log_records, stored.log_bytes),
        *(stored.log_max_bytes, stored.used_memory, stored.max_memory),
    )


def _history(versions: Sequence[Version]) -> list[HistoryPoint]:
    """Thin versions (newest first) out to the points of a chart, oldest first; what was no plain learning stays."""
    step = max(1, -(-len(versions) // HISTORY_POINTS))
    # By their number, so that a point does not come and go as versions are added.
    kept = [v for i, v in enumerate(versions) if i == 0 or v.version % step == 0]
    marked = [v for v in versions if v.verdict not in ("learned", "held")][:HISTORY_POINTS]
    chosen = {v.version: v for v in (*kept, *marked)}
    return [
        HistoryPoint(
            v.version,
            v.committed_ms,
            v.verdict,
            v.metrics.get(ACCURACY),
            v.metrics.get(BESIDE),
            v.accepted_to_committed_seconds,
            {name: value for name, value in v.metrics.items() if name.startswith(DRIFT)},
        )
        for _, v in sorted(chosen.items())
    ]
