"""Recorder: spans as OpenTelemetry records and exports them; the only module that imports it.

Sampler, limits, resource and exporters follow the variables that OpenTelemetry defines.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import entry_points
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import recsys
from recsys.errors import SettingsError

# Under this name packages offer their exporters.
EXPORTERS = "opentelemetry_traces_exporter"
# Metadata of a call that says which span it is below, by W3C Trace Context.
TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
# Names of the semantic conventions for RPC.
ERROR_TYPE = "error.type"
SYSTEM = "rpc.system.name"
METHOD = "rpc.method"
STATUS_CODE = "rpc.response.status_code"
# By the same conventions these are the server's fault; others are the caller's and no error of the span.
FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

_propagator = TraceContextTextMapPropagator()


class Span:
    """One sampled span that has begun; end it once, in any thread."""

    __slots__ = ("_span",)

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """Return what names this span to others, by W3C Trace Context."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, trace.set_span_in_context(self._span, Context()))
        return carrier[TRACEPARENT]

    def within(self) -> AbstractContextManager[Any]:
        """Let the spans that this thread begins meanwhile be below this one."""
        return trace.use_span(self._span, record_exception=False, set_status_on_exception=False)

    def answered(self, code: str) -> None:
        """End the span of a call that was answered with a gRPC code, by its name."""
        self._span.set_attribute(STATUS_CODE, code)
        self.end(code if code in FAULTS else "")

    def done(self, work: Future[Any]) -> None:
        """End with what `work` has ended with."""
        error = None if work.cancelled() else work.exception()
        self.end("cancelled" if work.cancelled() else type(error).__name__ if error else "")

    def end(self, error: str = "") -> None:
        """End; `error` names the kind of failure, never its message."""
        if error:
            self._span.set_attribute(ERROR_TYPE, error)
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()


class Recorder:
    """Record the spans of this process and hand them to exporters, in a thread beside."""

    def __init__(self, service: str, exporters: Sequence[SpanExporter]) -> None:
        about = {"service.name": service, "service.version": recsys.__version__}
        resource = Resource.create({**about, **OTELResourceDetector().detect().attributes})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.sampler = _Linked(self._provider.sampler)
        for exporter in exporters:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("recsys", recsys.__version__)

    def close(self, seconds: float) -> bool:
        """Hand over what is recorded; False when that was not done within `seconds`."""
        # Neither the library's flush nor its shutdown can be relied on to end in a given time.
        closing = threading.Thread(target=self._provider.shutdown, name="recsys-traces", daemon=True)
        closing.start()
        closing.join(seconds)
        return not closing.is_alive()

    def call(self, path: str, metadata: Sequence[tuple[str, str | bytes]]) -> Span | None:
        """Begin the span of a call; None where it is not sampled."""
        carrier = {key: str(value) for key, value in metadata if key in (TRACEPARENT, TRACESTATE)}
        outer = _propagator.extract(carrier, Context())
        name = path.removeprefix("/")
        attributes = {SYSTEM: "grpc", METHOD: name}
        return _sampled(self._tracer.start_span(name, outer, trace.SpanKind.SERVER, attributes))

    def begin(self, name: str, attributes: Mapping[str, int | str]) -> Span | None:
        """Begin a span below this thread's; None where there is none that is sampled."""
        if not trace.get_current_span().is_recording():
            return None
        return _sampled(self._tracer.start_span(name, kind=trace.SpanKind.PRODUCER, attributes=attributes))

    @contextmanager
    def span(
        self,
        name: str,
        attributes: Mapping[str, int | str],
        traceparents: Sequence[str] = (),
        start_ns: int | None = None,
    ) -> Iterator[None]:
        """Make what is done meanwhile a span, with links to what the traceparents name."""
        found = (trace.get_current_span(_propagator.extract({TRACEPARENT: each}, Context())) for each in traceparents)
        links = [trace.Link(each.get_span_context()) for each in found if each.get_span_context().is_valid]
        one = self._tracer.start_span(name, attributes=attributes, links=links, start_time=start_ns)
        failure = ""
        try:
            with Span(one).within():
                yield
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            Span(one).end(failure)


class _Linked(Sampler):
    """Sample what links to anything sampled, however rarely traces begin; leave the rest to another sampler."""

    def __init__(self, other: Sampler) -> None:
        self._other = other

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: trace.SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[trace.Link] | None = None,
        trace_state: trace.TraceState | None = None,
    ) -> SamplingResult:
        if any(link.context.trace_flags.sampled for link in links or ()):
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)
        return self._other.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return f"Linked({self._other.get_description()})"


def load_exporters(names: Sequence[str]) -> list[SpanExporter]:
    """Make the exporters that packages offer under these names, each as its own variables say.

    Raises:
        SettingsError: when one is not installed.
    """
    found: list[SpanExporter] = []
    for name in names:
        offered = entry_points(group=EXPORTERS, name=name)
        if not offered:
            known = ", ".join(sorted(each.name for each in entry_points(group=EXPORTERS)))
            raise SettingsError(f"OTEL_TRACES_EXPORTER: no exporter {name!r} is installed; there are {known} and none")
        found.append(next(iter(offered)).load()())
    return found


def _sampled(span: trace.Span) -> Span | None:
    return Span(span) if span.get_span_context().trace_flags.sampled else None
