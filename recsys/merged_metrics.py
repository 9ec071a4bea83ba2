"""MergedMetrics: the metrics of several processes as those of one target, each series with its process as a label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from http.client import HTTPException
from urllib.request import ProxyHandler, build_opener

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

# A process that does not answer in this time is left out of one scrape.
FETCH_SECONDS = 2.0
LABEL = "process"
# Processes of this machine are never behind a proxy, whatever the environment says of others.
_OPENER = build_opener(ProxyHandler({}))


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
                with _OPENER.open(address, timeout=FETCH_SECONDS) as answer:
                    text = answer.read().decode()
            # A process that is killed while it answers leaves half of it.
            except (OSError, HTTPException):
                continue
            for family in text_string_to_metric_families(text):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples += [s._replace(labels={**s.labels, LABEL: process}) for s in family.samples]
        return families.values()
