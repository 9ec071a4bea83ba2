"""MergedMetrics: the metrics of several processes as those of one target, each series with its process as a label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from urllib.request import urlopen

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from recsys.errors import AddressInUse
from recsys.settings import bracketed

# A process that does not answer in this time is left out of one scrape.
FETCH_SECONDS = 2.0
LABEL = "process"


class MergedMetrics(Collector):
    """Ask processes for their metrics whenever they are asked for; who does not answer is left out.

    `addresses` gives the URL of each process's metrics by the process's name.
    """

    def __init__(self, addresses: Callable[[], Mapping[str, str]]) -> None:
        self._addresses = addresses

    def collect(self) -> Iterable[Metric]:
        """Return every process's series, with the label `process`."""
        families: dict[str, Metric] = {}
        for process, address in self._addresses().items():
            try:
                with urlopen(address, timeout=FETCH_SECONDS) as answer:
                    text = answer.read().decode()
            except OSError:
                continue
            for family in text_string_to_metric_families(text):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples += [s._replace(labels={**s.labels, LABEL: process}) for s in family.samples]
        return families.values()


class MergedMetricsServer:
    """Serve the merged metrics of processes over HTTP until closed; `port` is the real one.

    Raises:
        AddressInUse: when the port is taken.
    """

    def __init__(self, host: str, port: int, addresses: Callable[[], Mapping[str, str]]) -> None:
        registry = CollectorRegistry()
        registry.register(MergedMetrics(addresses))
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            address = f"{bracketed(host)}:{port}"
            reason = error.strerror
            raise AddressInUse(f"cannot serve metrics on {address} (host, metrics_port): {reason}") from error
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
