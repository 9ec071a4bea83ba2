"""Tracing: what the parts say of their spans; OpenTelemetry is loaded by `start`, and only when `traces` is on.

One process has one recorder or none, as it has one log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from recsys.logs import tell
from recsys.settings import Settings, trace_exporters

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from recsys.traces.recorder import Recorder, Span

# Of the traces that a version learned from, as many are linked.
MAX_LINKS = 32
# How long a stopping process may wait for those who take the spans.
FLUSH_SECONDS = 2.0
VERSION = "recsys.version"

_log = logging.getLogger(__name__)
_nothing = nullcontext()
_recorder: Recorder | None = None


def start(settings: Settings, service: str, exporters: Sequence[SpanExporter] | None = None) -> None:
    """Trace this process from here on, if the settings say so and OpenTelemetry is installed.

    Without `exporters` those of OTEL_TRACES_EXPORTER are used; OTEL_SERVICE_NAME goes over `service`.

    Raises:
        SettingsError: when OTEL_TRACES_EXPORTER names one that is not installed.
    """
    global _recorder
    if settings.traces == "off":
        return
    try:
        from recsys.traces.recorder import Recorder, load_exporters
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        words = "traces = on, but nothing is traced: OpenTelemetry is not installed"
        tell(_log, logging.WARNING, words, fix="pip install 'recsys[otel]'")
        return
    _recorder = Recorder(service, load_exporters(trace_exporters()) if exporters is None else exporters)


def stop(seconds: float = FLUSH_SECONDS) -> None:
    """Trace no more, and hand over what was recorded; what takes longer than `seconds` is lost."""
    global _recorder
    recorder, _recorder = _recorder, None
    if recorder is not None and not recorder.close(seconds):
        tell(_log, logging.WARNING, "the last traces were not taken in time", seconds=seconds)


def call(path: str, metadata: Sequence[tuple[str, str | bytes]]) -> Span | None:
    """Begin the span of a call of the method `path`, below the caller's where `metadata` names it.

    None where it is not sampled: then nothing below it is.
    """
    return None if _recorder is None else _recorder.call(path, metadata)


def within(outer: Span | None) -> AbstractContextManager[None]:
    """Let the spans that this thread begins meanwhile be below `outer`."""
    return _nothing if outer is None else outer.within()


def begin(name: str, **attributes: int | str) -> Span | None:
    """Begin a span below the one that this thread is within; None where there is none that is sampled."""
    return None if _recorder is None else _recorder.begin(name, attributes)


@contextmanager
def span(name: str, version: int) -> Iterator[None]:
    """Make what is done meanwhile with a version a span of its own."""
    if _recorder is None:
        yield
        return
    with _recorder.span(name, {VERSION: version}):
        yield


class Sources:
    """Know which traces the feedback of a version in the making came from, and when the first of it was taken."""

    def __init__(self) -> None:
        self.since_ns = 0
        # In the order they came, each once.
        self.traceparents: dict[str, None] = {}

    def add(self, traceparent: str) -> None:
        """Note one feedback, "" without a trace; while nothing is traced this does nothing."""
        if _recorder is None:
            return
        self.since_ns = self.since_ns or time.time_ns()
        if traceparent and len(self.traceparents) < MAX_LINKS:
            self.traceparents[traceparent] = None


@contextmanager
def learned(sources: Sources, version: int) -> Iterator[None]:
    """Make of what is done meanwhile the span "commit", below "learn version", which began with the first feedback.

    Both link to what `sources` holds, and are sampled when any of that is.
    """
    if _recorder is None:
        yield
        return
    links, attributes = list(sources.traceparents), {VERSION: version}
    with (
        _recorder.span("learn version", attributes, links, sources.since_ns or None),
        _recorder.span("commit", attributes, links),
    ):
        yield
