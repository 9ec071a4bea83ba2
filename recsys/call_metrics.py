"""CallMetrics: calls by method and code under the names that gRPC servers in other languages export too.

Counted in plain lists, one lock a method, and turned into series when Prometheus asks: a call costs a tenth of what
the client library's own counters and histograms do.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

LABELS = ("grpc_type", "grpc_service", "grpc_method")


class Timings:
    """Hold a histogram; whoever uses it from several threads has a lock."""

    __slots__ = ("_counts", "_edges", "_sum")

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Add one duration."""
        self._counts[bisect_left(self._edges, seconds)] += 1
        self._sum += seconds

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Write the histogram as a series of `family`."""
        total, buckets = 0, []
        for edge, count in zip((*self._edges, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((_text(edge), float(total)))
        family.add_metric(labels, buckets, self._sum)


def _text(edge: float) -> str:
    return str(floatToGoString(edge))  # type: ignore[no-untyped-call]


class _Method:
    """Hold one method's numbers."""

    __slots__ = ("handled", "lock", "started", "timings")

    def __init__(self, codes: int, edges: Sequence[float]) -> None:
        self.lock = threading.Lock()
        self.started = 0
        self.handled = [0] * codes
        self.timings = Timings(edges)


class CallMetrics(Collector):
    """Count unary calls of known methods and codes; safe to call from any thread.

    `methods` are (service, method); the last takes what is none of them. The first of `codes` is that of success, and
    `unknown` among them takes what is none of them.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        methods: Sequence[tuple[str, str]],
        codes: Sequence[str],
        unknown: str,
        edges: Sequence[float],
    ) -> None:
        self._codes = codes
        self._index = {code: i for i, code in enumerate(codes)}
        self._unknown = self._index[unknown]
        self._methods = {method: _Method(len(codes), edges) for method in methods}
        self._other = self._methods[methods[-1]]
        registry.register(self)

    def started(self, service: str, method: str) -> None:
        """Count a call whose message has arrived."""
        series = self._methods.get((service, method), self._other)
        with series.lock:
            series.started += 1

    def handled(self, service: str, method: str, code: str, seconds: float) -> None:
        """Count and time a finished call."""
        series = self._methods.get((service, method), self._other)
        index = self._index.get(code, self._unknown)
        with series.lock:
            series.handled[index] += 1
            series.timings.observe(seconds)

    def collect(self) -> Iterable[Metric]:
        """Return the series as they stand."""
        started = CounterMetricFamily("grpc_server_started", "RPCs started on the server.", labels=LABELS)
        received = CounterMetricFamily("grpc_server_msg_received", "Messages received from clients.", labels=LABELS)
        sent = CounterMetricFamily("grpc_server_msg_sent", "Messages sent to clients.", labels=LABELS)
        handled = CounterMetricFamily(
            "grpc_server_handled", "RPCs completed on the server, with success or not.", labels=(*LABELS, "grpc_code")
        )
        seconds = HistogramMetricFamily(
            "grpc_server_handling_seconds", "Time from an RPC's arrival to its completion.", labels=LABELS
        )
        for (service, method), series in self._methods.items():
            labels = ("unary", service, method)
            with series.lock:
                # A unary call is one message in, and one out when it succeeds.
                for family, count in ((started, series.started), (received, series.started), (sent, series.handled[0])):
                    family.add_metric(labels, count)
                for code, count in zip(self._codes, series.handled, strict=True):
                    handled.add_metric((*labels, code), count)
                series.timings.add_to(seconds, labels)
        return [started, received, sent, handled, seconds]
