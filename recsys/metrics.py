"""ServerMetrics: what the server counts and times, under the names that dashboards and alerts use.

Every series that can be known beforehand is exported from the start, and no label can take a value that a caller
of the service invents: what is outside a closed set of values is counted as `other`.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

import recsys
from recsys.call_metrics import CallMetrics
from recsys.recommendation_id import RecommendationId
from recsys.served_lists import OTHER, Rows, ServedLists
from recsys.stages import FRESHNESS_BUCKETS, FRESHNESS_HELP, FRESHNESS_METRIC, SERVER_STAGES, ServerStage
from recsys.store.inspection import FILES, Files
from recsys.tls import CERTIFICATES
from recsys.v1 import catalog_pb2, model_pb2, recommender_pb2

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
FIELDS = tuple(field.name for field in recommender_pb2.Feedback.DESCRIPTOR.fields)
REJECTIONS = ("overloaded", "deadline_passed", "histories_unavailable", "not_ready")
RELOADS = ("start", "corrupt")
# What was known of the user of a request that was scored: unavailable while the store cannot be read.
HISTORIES = ("known", "empty", "unavailable")

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCH_BUCKETS = tuple(float(2**i) for i in range(13))


class ServerMetrics:
    """Export the server's metrics through `registry`; safe to call from any thread.

    Turns off the client library's `_created` series for the whole process: they double the series and nobody reads
    them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._calls = CallMetrics(registry, (*METHODS, (OTHER, OTHER)), CODES, "UNKNOWN", _LATENCY_BUCKETS)
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
        self._lists = ServedLists(registry, _LATENCY_BUCKETS)
        histories = Counter(
            "recsys_scored_requests",
            "Requests scored, by what was known of the user: without a history what is trending is the answer.",
            ["history"],
            registry=registry,
        )
        self._histories = {history: histories.labels(history) for history in HISTORIES}
        self._batch = Histogram(
            "recsys_score_batch_requests",
            "Requests scored together in one batch.",
            registry=registry,
            buckets=_BATCH_BUCKETS,
        )
        self._queue = Gauge("recsys_queue_requests", "Requests that wait to be scored.", registry=registry)
        rejected = Counter(
            "recsys_requests_rejected", "Requests turned away before scoring, by reason.", ["reason"], registry=registry
        )
        self._rejections = {reason: rejected.labels(reason) for reason in (*REJECTIONS, OTHER)}
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
        self._store_file_written = Gauge(
            "recsys_store_file_written",
            "1 where the store's last write of a file was done, 0 where it failed; NaN where it does not say, or has "
            "no such file.",
            ["file"],
            registry=registry,
        )
        self._store_append_only = Gauge(
            "recsys_store_append_only_bytes",
            "Size of the store's append-only file; NaN where it does not say, or has none.",
            registry=registry,
        )
        self._store_disk_free = Gauge(
            "recsys_store_disk_free_bytes",
            "Room on the disk that the store's files are on; NaN where that is not this machine's.",
            registry=registry,
        )
        self._certificates = Gauge(
            "recsys_certificate_expiry_timestamp_seconds",
            "When the first certificate expires in the file that a setting names, as it was read at start; 0: no file.",
            ["setting"],
            registry=registry,
        )
        self._export_zeros()

    def rpc_started(self, service: str, method: str) -> None:
        """Count a unary call whose message has arrived; `service` is fully qualified."""
        self._calls.started(service, method)

    def rpc_handled(self, service: str, method: str, code: str, seconds: float) -> None:
        """Count and time a finished call; `code` is the name of a grpc.StatusCode, such as "OK"."""
        self._calls.handled(service, method, code, seconds)

    def feedback_accepted(self, n: int) -> None:
        """Count feedback newly written to the log, duplicates not included."""
        self._accepted.inc(n)

    def feedback_duplicate(self, n: int) -> None:
        """Count feedback that an earlier call had written already."""
        self._duplicate.inc(n)

    def feedback_refused(self, field: str, n: int) -> None:
        """Count feedback refused because of `field`, named as in the Feedback message."""
        self._refused.labels(field if field in FIELDS else OTHER).inc(n)

    @property
    def lists(self) -> ServedLists:
        """Return what counts the lists that were served."""
        return self._lists

    def recommended(self, rows: Rows, sources: Sequence[int], seconds: float) -> None:
        """Count the items of one answer, by their rows, best first, by their recsys.v1.Source, and time the answer."""
        self._lists.shown(rows, sources, seconds)

    def recommendation_feedback(
        self, found: RecommendationId | None, item_id: str, served_version: int, *, positive: bool
    ) -> None:
        """Count feedback on what was recommended; `found` is None where its recommendation_id says nothing."""
        self._lists.feedback(found, item_id, served_version, positive=positive)

    def scored(self, history: str, n: int) -> None:
        """Count requests that were scored; `history` is one of HISTORIES."""
        self._histories[history].inc(n)

    def batch_scored(self, size: int) -> None:
        """Record how many requests were scored together."""
        self._batch.observe(size)

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Ask `length` how many requests wait, whenever Prometheus asks."""
        self._queue.set_function(length)

    def rejected(self, reason: str) -> None:
        """Count a request turned away before scoring; `reason` is one of REJECTIONS."""
        self._rejections.get(reason, self._rejections[OTHER]).inc()

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

    def store_files(self, found: Files) -> None:
        """Record how the store's files are."""
        for file, written in found.written.items():
            self._store_file_written.labels(file).set(written)
        self._store_append_only.set(found.append_only_bytes)
        self._store_disk_free.set(found.free_bytes)

    def certificate_expires(self, setting: str, seconds: float) -> None:
        """Record when a certificate expires, in seconds since 1970; `setting` is one of CERTIFICATES."""
        self._certificates.labels(setting).set(seconds)

    def _export_zeros(self) -> None:
        for setting in CERTIFICATES:
            self._certificates.labels(setting)
        # Not known until the store was asked.
        self.store_files(Files(dict.fromkeys(FILES, math.nan), math.nan, math.nan))
        for field in (*FIELDS, OTHER):
            self._refused.labels(field)
        for stage in SERVER_STAGES:
            self._freshness.labels(stage)
        for reason in (*RELOADS, OTHER):
            self._reloads.labels(reason)
