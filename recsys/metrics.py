"""ServerMetrics: what the server counts and times, under the names that dashboards and alerts use.

Every series that can be known beforehand is exported from the start, and no label can take a value that a caller
of the service invents: what is outside a closed set of values is counted as `other`.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

import recsys
from recsys.stages import FRESHNESS_BUCKETS, FRESHNESS_HELP, FRESHNESS_METRIC, SERVER_STAGES, ServerStage
from recsys.v1 import catalog_pb2, model_pb2, recommender_pb2

OTHER = "other"
# The names of grpc.StatusCode, in the order of their numbers.
CODES = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED"),
    *("INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)
METHODS = tuple(
    (service.full_name, method.name)
    for file in (recommender_pb2, catalog_pb2, model_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
# "network", "transition", "trending", by the number that an answer carries.
SOURCES = {
    number: name.removeprefix("SOURCE_").lower() for name, number in recommender_pb2.Source.items() if number != 0
}
FIELDS = tuple(field.name for field in recommender_pb2.Feedback.DESCRIPTOR.fields)
REJECTIONS = ("overloaded", "deadline_passed", "histories_unavailable", "not_ready")
RELOADS = ("start", "corrupt")

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCH_BUCKETS = tuple(float(2**i) for i in range(13))


@dataclass(frozen=True, slots=True)
class _Method:
    """Hold one method's series, so that a call costs no label look-up."""

    started: Counter
    received: Counter
    sent: Counter
    seconds: Histogram
    handled: Mapping[str, Counter]


class ServerMetrics:
    """Export the server's metrics through `registry`; safe to call from any thread.

    Turns off the client library's `_created` series for the whole process: they double the series and nobody reads
    them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._methods = _methods(registry)
        Info("recsys_build", "The software that runs.", registry=registry).info(
            {"version": recsys.__version__, "python_version": platform.python_version()}
        )
        self._accepted = Counter("recsys_feedback_accepted", "Feedback written to the log.", registry=registry)
        self._duplicate = Counter(
            "recsys_feedback_duplicate", "Feedback accepted again by its id, not written twice.", registry=registry
        )
        self._refused = Counter(
            "recsys_feedback_refused", "Feedback refused, by the field at fault.", ["field"], registry=registry
        )
        self._items_recommended = Counter(
            "recsys_items_recommended",
            "Items in answers to Recommend, by the part of the score that lifted them.",
            ["source"],
            registry=registry,
        )
        self._recommend_seconds = Histogram(
            "recsys_recommend_seconds",
            "Time that one answer to Recommend took, waiting in the queue included.",
            registry=registry,
            buckets=_LATENCY_BUCKETS,
        )
        self._batch = Histogram(
            "recsys_score_batch_requests",
            "Requests scored together in one batch.",
            registry=registry,
            buckets=_BATCH_BUCKETS,
        )
        self._queue = Gauge("recsys_queue_requests", "Requests that wait to be scored.", registry=registry)
        self._rejected = Counter(
            "recsys_requests_rejected", "Requests turned away before scoring, by reason.", ["reason"], registry=registry
        )
        self._version = Gauge(
            "recsys_served_version", "Version of the weights being served; 0 before the first.", registry=registry
        )
        self._committed = Gauge(
            "recsys_served_version_committed_timestamp_seconds",
            "When the trainer committed the version being served; 0 before the first.",
            registry=registry,
        )
        self._applied = Gauge(
            "recsys_served_version_applied_timestamp_seconds",
            "When this server applied the version that it serves; 0 before the first.",
            registry=registry,
        )
        self._items = Gauge("recsys_items", "Items that the served version holds.", registry=registry)
        self._freshness = Histogram(
            FRESHNESS_METRIC, FRESHNESS_HELP, ["stage"], registry=registry, buckets=FRESHNESS_BUCKETS
        )
        self._reloads = Counter(
            "recsys_weights_reloads",
            "Loads of a whole snapshot of weights, by reason.",
            ["reason"],
            registry=registry,
        )
        self._store_reachable = Gauge(
            "recsys_store_reachable", "1 while the store answers within its timeout, else 0.", registry=registry
        )
        self._export_zeros()

    def rpc_started(self, service: str, method: str) -> None:
        """Count a unary call whose message has arrived; `service` is fully qualified."""
        series = self._method(service, method)
        series.started.inc()
        series.received.inc()

    def rpc_handled(self, service: str, method: str, code: str, seconds: float) -> None:
        """Count and time a finished call; `code` is the name of a grpc.StatusCode, such as "OK"."""
        series = self._method(service, method)
        series.handled[code if code in CODES else "UNKNOWN"].inc()
        series.seconds.observe(seconds)
        if code == "OK":
            series.sent.inc()

    def feedback_accepted(self, n: int) -> None:
        """Count feedback newly written to the log, duplicates not included."""
        self._accepted.inc(n)

    def feedback_duplicate(self, n: int) -> None:
        """Count feedback that an earlier call had written already."""
        self._duplicate.inc(n)

    def feedback_refused(self, field: str, n: int) -> None:
        """Count feedback refused because of `field`, named as in the Feedback message."""
        self._refused.labels(field if field in FIELDS else OTHER).inc(n)

    def recommended(self, source_counts: Mapping[int, int], seconds: float) -> None:
        """Count the items of one answer by their recsys.v1.Source, and time the answer."""
        for source, count in source_counts.items():
            self._items_recommended.labels(SOURCES.get(source, OTHER)).inc(count)
        self._recommend_seconds.observe(seconds)

    def batch_scored(self, size: int) -> None:
        """Record how many requests were scored together."""
        self._batch.observe(size)

    def queue_length(self, n: int) -> None:
        """Record how many requests wait."""
        self._queue.set(n)

    def rejected(self, reason: str) -> None:
        """Count a request turned away before scoring; `reason` is one of REJECTIONS."""
        self._rejected.labels(reason if reason in REJECTIONS else OTHER).inc()

    def version_applied(self, version: int, committed_seconds: float, applied_seconds: float, items: int) -> None:
        """Record the version now being served; both times are seconds since 1970."""
        self._version.set(version)
        self._committed.set(committed_seconds)
        self._applied.set(applied_seconds)
        self._items.set(items)

    def freshness(self, stage: ServerStage, seconds: Iterable[float]) -> None:
        """Record how long each of some feedback spent in `stage`."""
        histogram = self._freshness.labels(stage)
        for value in seconds:
            # Two machines' clocks may differ by more than a fast stage takes.
            histogram.observe(max(value, 0.0))

    def weights_reloaded(self, reason: str) -> None:
        """Count a load of a whole snapshot; `reason` is one of RELOADS."""
        self._reloads.labels(reason if reason in RELOADS else OTHER).inc()

    def store_reachable(self, reachable: bool) -> None:
        """Record whether the store answers."""
        self._store_reachable.set(reachable)

    def _method(self, service: str, method: str) -> _Method:
        return self._methods.get((service, method)) or self._methods[OTHER, OTHER]

    def _export_zeros(self) -> None:
        for field in (*FIELDS, OTHER):
            self._refused.labels(field)
        for source in (*SOURCES.values(), OTHER):
            self._items_recommended.labels(source)
        for reason in (*REJECTIONS, OTHER):
            self._rejected.labels(reason)
        for stage in SERVER_STAGES:
            self._freshness.labels(stage)
        for reason in (*RELOADS, OTHER):
            self._reloads.labels(reason)


def _methods(registry: CollectorRegistry) -> dict[tuple[str, str], _Method]:
    """Create the series that gRPC servers in other languages export too, for every method known."""
    labels = ["grpc_type", "grpc_service", "grpc_method"]
    started = Counter("grpc_server_started", "RPCs started on the server.", labels, registry=registry)
    received = Counter("grpc_server_msg_received", "Messages received from clients.", labels, registry=registry)
    sent = Counter("grpc_server_msg_sent", "Messages sent to clients.", labels, registry=registry)
    handled = Counter(
        "grpc_server_handled",
        "RPCs completed on the server, with success or not.",
        [*labels, "grpc_code"],
        registry=registry,
    )
    seconds = Histogram(
        "grpc_server_handling_seconds",
        "Time from an RPC's arrival to its completion.",
        labels,
        registry=registry,
        buckets=_LATENCY_BUCKETS,
    )
    return {
        (service, method): _Method(
            started.labels("unary", service, method),
            received.labels("unary", service, method),
            sent.labels("unary", service, method),
            seconds.labels("unary", service, method),
            {code: handled.labels("unary", service, method, code) for code in CODES},
        )
        for service, method in (*METHODS, (OTHER, OTHER))
    }
