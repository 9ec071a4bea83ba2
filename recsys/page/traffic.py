"""Traffic: requests, times and freshness of the last minute, from the metrics that Prometheus reads too."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from prometheus_client import Metric

# What figures of the present are averaged over, and what the charts show.
WINDOW_SECONDS = 60.0
SERIES_SECONDS = 300.0
# Codes that are the server's fault or load, not the caller's.
FAILED = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

_RECOMMEND, _APPLIED = "recsys_recommend_seconds", "accepted_to_applied"
_SUMMED = {
    "recsys_feedback_accepted_total": "feedback",
    "recsys_feedback_refused_total": "refused",
    f"{_RECOMMEND}_count": "recommend",
}
_LARGEST = {
    "recsys_served_version": "version",
    "recsys_served_version_committed_timestamp_seconds": "committed",
    "recsys_served_version_applied_timestamp_seconds": "applied",
    "recsys_items": "items",
}
Buckets = Mapping[float, float]


@dataclass(frozen=True, slots=True)
class Now:
    """Say what a server (all processes of it together) serves and how busy it is; null where nothing is known.

    Rates and quantiles are of the last `window_seconds`.
    """

    version: int
    committed_ms: int
    applied_ms: int
    items: int
    queue: int
    window_seconds: float
    recommend_per_second: float | None
    recommend_p50_seconds: float | None
    recommend_p99_seconds: float | None
    feedback_per_second: float | None
    feedback_refused_per_second: float | None
    calls_per_second: float | None
    failed_ratio: float | None
    # From acceptance until the version that learned it was in force, by feedback.
    freshness_p50_seconds: float | None
    freshness_p99_seconds: float | None


@dataclass(frozen=True, slots=True)
class Point:
    """Hold one point of the charts: rates and times since the point before."""

    time_ms: int
    recommend_per_second: float
    feedback_per_second: float
    recommend_p99_seconds: float | None
    freshness_p99_seconds: float | None


@dataclass(frozen=True, slots=True)
class _Sample:
    """Hold counters as they stood at `at` (seconds of a clock that only rises)."""

    at: float
    time_ms: int
    counts: Mapping[str, float]
    recommend: Buckets
    freshness: Buckets
    gauges: Mapping[str, float]


class Traffic:
    """Sample metrics and compare them with those of a minute before; `collect` gives the families of all processes."""

    def __init__(self, collect: Callable[[], Iterable[Metric]], clock: Callable[[], float] = time.monotonic) -> None:
        self._collect, self._clock = collect, clock
        self._samples: deque[_Sample] = deque()
        self._points: deque[Point] = deque()

    def look(self) -> tuple[Now, list[Point]]:
        """Take a sample; return what it says beside earlier ones, and the charts' points, oldest first."""
        sample = self._sample()
        if self._samples and sample.at - self._samples[-1].at > WINDOW_SECONDS:
            # Nobody looked for a while: a mean over that time would tell nothing of the present.
            self._samples.clear()
            self._points.clear()
        self._samples.append(sample)
        while len(self._samples) > 2 and sample.at - self._samples[1].at >= WINDOW_SECONDS:
            self._samples.popleft()
        if len(self._samples) > 1:
            self._points.append(_point(self._samples[-2], sample))
        while self._points and sample.time_ms - self._points[0].time_ms > 1000 * SERIES_SECONDS:
            self._points.popleft()
        return _now(self._samples[0], sample), list(self._points)

    def _sample(self) -> _Sample:
        counts: defaultdict[str, float] = defaultdict(float)
        recommend: defaultdict[float, float] = defaultdict(float)
        freshness: defaultdict[float, float] = defaultdict(float)
        gauges: defaultdict[str, float] = defaultdict(float)
        for family in self._collect():
            for name, labels, value, *_ in family.samples:
                if name in _SUMMED:
                    counts[_SUMMED[name]] += value
                elif name in _LARGEST:
                    gauges[_LARGEST[name]] = max(gauges[_LARGEST[name]], value)
                elif name == "recsys_queue_requests":
                    gauges["queue"] += value
                elif name == f"{_RECOMMEND}_bucket":
                    recommend[float(labels["le"])] += value
                elif name == "recsys_freshness_seconds_bucket" and labels["stage"] == _APPLIED:
                    freshness[float(labels["le"])] += value
                elif name == "grpc_server_handled_total" and value:
                    counts["calls"] += value
                    counts["failed"] += value if labels["grpc_code"] in FAILED else 0
        return _Sample(self._clock(), time.time_ns() // 1_000_000, counts, recommend, freshness, gauges)


def _point(before: _Sample, after: _Sample) -> Point:
    seconds = max(after.at - before.at, 1e-9)
    return Point(
        after.time_ms,
        _risen(before.counts, after.counts, "recommend") / seconds,
        _risen(before.counts, after.counts, "feedback") / seconds,
        quantile(0.99, before.recommend, after.recommend),
        quantile(0.99, before.freshness, after.freshness),
    )


def _now(before: _Sample, after: _Sample) -> Now:
    seconds = after.at - before.at
    gauges = after.gauges

    def rate(name: str) -> float | None:
        return _risen(before.counts, after.counts, name) / seconds if seconds > 0 else None

    calls = _risen(before.counts, after.counts, "calls")
    return Now(
        version=int(gauges.get("version", 0)),
        committed_ms=round(1000 * gauges.get("committed", 0)),
        applied_ms=round(1000 * gauges.get("applied", 0)),
        items=int(gauges.get("items", 0)),
        queue=int(gauges.get("queue", 0)),
        window_seconds=seconds,
        recommend_per_second=rate("recommend"),
        recommend_p50_seconds=quantile(0.5, before.recommend, after.recommend),
        recommend_p99_seconds=quantile(0.99, before.recommend, after.recommend),
        feedback_per_second=rate("feedback"),
        feedback_refused_per_second=rate("refused"),
        calls_per_second=rate("calls"),
        failed_ratio=_risen(before.counts, after.counts, "failed") / calls if calls else None,
        freshness_p50_seconds=quantile(0.5, before.freshness, after.freshness),
        freshness_p99_seconds=quantile(0.99, before.freshness, after.freshness),
    )


def _risen(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float:
    # A process that was started again begins at 0.
    return max(0.0, after.get(name, 0.0) - before.get(name, 0.0))


def quantile(q: float, before: Buckets, after: Buckets) -> float | None:
    """Return the quantile of what a cumulative histogram gained, as PromQL's histogram_quantile does; None of nothing.

    Beyond the last finite bound there is only that bound to tell.
    """
    gained = [(bound, max(0.0, after[bound] - before.get(bound, 0.0))) for bound in sorted(after)]
    total = gained[-1][1] if gained else 0.0
    if total <= 0:
        return None
    wanted = q * total
    for (lower, below), (upper, until) in pairwise([(0.0, 0.0), *gained]):
        if until >= wanted:
            if upper == float("inf"):
                return lower
            return lower + (upper - lower) * (wanted - below) / (until - below) if until > below else upper
    return gained[-1][0]
