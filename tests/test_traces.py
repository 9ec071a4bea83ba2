"""Traces: what links a request to the version that learned from it, and that nothing is there while they are off."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import grpc
import pytest
import redis
from calls import SECONDS, click, log, recommender
from google.protobuf.timestamp_pb2 import Timestamp
from learning import CPU, learn_all, make_feedback, small, tick, trainer, versions
from prometheus_client import CollectorRegistry
from serving import WAYS, Running, serve

from recsys import traces
from recsys.catalog import Catalog, CatalogMirror
from recsys.errors import SettingsError, StoreFull
from recsys.feedback import Feedback, to_record
from recsys.feedback_log import FeedbackLog
from recsys.follower import Follower
from recsys.metrics import ServerMetrics
from recsys.scorer import Scorer
from recsys.settings import Settings, trace_exporters
from recsys.store.connection import connect
from recsys.store.v1.log_pb2 import FeedbackRecord
from recsys.traces.tracing import MAX_LINKS
from recsys.v1 import recommender_pb2

if importlib.util.find_spec("opentelemetry.sdk") is None:
    pytest.skip("the extra otel is not installed", allow_module_level=True)

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, StatusCode

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = (f"00-{TRACE_ID}-{SPAN_ID}-{flags}" for flags in ("01", "00"))
LOG_FEEDBACK, RECOMMEND = (f"recsys.v1.RecommenderService/{name}" for name in ("LogFeedback", "Recommend"))
VERSION = "recsys.version"
AT = Timestamp(seconds=1_700_000_000)


class Traced:
    """What was recorded, once tracing has stopped."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()

    def spans(self, name: str) -> list[ReadableSpan]:
        traces.stop()
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.spans(name)
        return span


@contextmanager
def tracing(settings: Settings) -> Iterator[Traced]:
    traced = Traced()
    traces.start(settings.model_copy(update={"traces": "on"}), "recsys-test", [traced.exporter])
    try:
        yield traced
    finally:
        traces.stop()


@pytest.fixture
def traced(settings: Settings) -> Iterator[Traced]:
    with tracing(settings) as found:
        yield found


@pytest.fixture(params=WAYS)
def running(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Running]:
    with serve(small(settings, **WAYS[request.param])) as found:
        yield found


def log_traced(running: Running, traceparent: str, *feedback: recommender_pb2.Feedback) -> None:
    request = recommender_pb2.LogFeedbackRequest(feedback=feedback)
    answer = recommender(running).LogFeedback(request, timeout=SECONDS, metadata=[("traceparent", traceparent)])
    assert answer.accepted == len(feedback)


def records(settings: Settings) -> list[FeedbackRecord]:
    with connect(settings) as client:
        return [entry.record for entry in FeedbackLog(client, settings).read_after("0-0", 1000) if entry.record]


def traceparent_of(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def named(span: ReadableSpan) -> str:
    return traceparent_of(span.context)


def linked(span: ReadableSpan) -> list[str]:
    return [traceparent_of(link.context) for link in span.links]


# From a request to the commit and into the servers


def test_a_request_is_followed_to_the_version_that_learned_it(running: Running, traced: Traced) -> None:
    settings = running.settings
    with trainer(settings) as daemon:
        first = daemon.start().version
        log_traced(running, SAMPLED, click("item-1"), click("item-2"))
        tick(settings)
        assert daemon.step()
        assert daemon.version == first + 1
    registry = CollectorRegistry()
    with connect(settings) as client:
        mirror = CatalogMirror(Catalog(client, settings))
        scorer = Scorer(settings, mirror, CPU)
        follower = Follower(settings, scorer, mirror, ServerMetrics(registry))
        assert follower.step(0.0)
        with trainer(settings) as daemon:
            daemon.start()
            log(running, click("item-3"))
            tick(settings)
            assert daemon.step()
        assert follower.step(0.0)
        follower.stop()
    server, *_ = traced.spans(LOG_FEEDBACK)
    assert server.kind is SpanKind.SERVER
    assert named(server).startswith(f"00-{TRACE_ID}-")
    assert server.parent is not None
    assert f"{server.parent.span_id:016x}" == SPAN_ID
    append, *_ = traced.spans("append feedback")
    assert append.parent is not None
    assert (append.context.trace_id, append.parent.span_id) == (server.context.trace_id, server.context.span_id)
    assert server.end_time >= append.end_time >= append.start_time >= server.start_time  # type: ignore[operator]
    assert [record.traceparent for record in records(settings)[:2]] == [named(append)] * 2
    learned, commit = traced.spans("learn version")[0], traced.spans("commit")[0]
    assert learned.parent is None
    assert commit.parent is not None
    assert commit.parent.span_id == learned.context.span_id
    # Two feedback of one call: one link.
    assert linked(learned) == linked(commit) == [named(append)]
    assert learned.attributes == commit.attributes == {VERSION: first + 1}
    assert append.end_time <= learned.start_time <= commit.start_time  # type: ignore[operator]
    assert [dict(span.attributes or {}) for span in traced.spans("apply version")] == [{VERSION: first + 2}]


def test_what_no_caller_traces_begins_a_trace_here(running: Running, traced: Traced) -> None:
    log(running, click())
    server = traced.one(LOG_FEEDBACK)
    assert server.parent is None
    assert records(running.settings)[0].traceparent == named(traced.one("append feedback"))


def test_no_id_of_a_user_or_item_is_in_a_span(running: Running, traced: Traced) -> None:
    ids = ["user-secret", "item-secret", "x" * 10_000]
    log(running, click("item-secret", user_id="user-secret"))
    log(running, click("item-secret", user_id=ids[2]))
    running.scorer.failure = RuntimeError("about user-secret and item-secret")
    with pytest.raises(grpc.RpcError):
        recommender(running).Recommend(recommender_pb2.RecommendRequest(user_id="user-secret"), timeout=SECONDS)
    with trainer(running.settings) as daemon:
        daemon.start()
        tick(running.settings)
        daemon.step()
    traces.stop()
    spans = traced.exporter.get_finished_spans()
    assert {LOG_FEEDBACK, RECOMMEND, "append feedback", "learn version", "commit"} <= {span.name for span in spans}
    assert not [span.name for span in spans if any(each in span.to_json() for each in ids)]


def test_a_call_says_how_it_ended(running: Running, traced: Traced) -> None:
    stub, request = recommender(running), recommender_pb2.RecommendRequest
    stub.Recommend(request(user_id="u"), timeout=SECONDS)
    with pytest.raises(grpc.RpcError):
        stub.Recommend(request(user_id=""), timeout=SECONDS)
    running.scorer.failure = RuntimeError("broken")
    with pytest.raises(grpc.RpcError):
        stub.Recommend(request(user_id="u"), timeout=SECONDS)
    spans = traced.spans(RECOMMEND)
    found = [(span.attributes or {}).get("rpc.response.status_code") for span in spans]
    assert found == ["OK", "INVALID_ARGUMENT", "INTERNAL"]
    # A caller's fault is no error of the server's span.
    assert [span.status.status_code for span in spans] == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR]


def test_an_append_that_fails_says_so(settings: Settings, traced: Traced) -> None:
    with serve(settings.model_copy(update={"log_max_bytes": 1 << 16})) as running:
        running.store.hset(f"{settings.key_prefix}:{{log}}:stats", "bytes", 1 << 16)
        with pytest.raises(grpc.RpcError):
            log(running, click())
    append = traced.one("append feedback")
    assert append.status.status_code is StatusCode.ERROR
    assert append.attributes == {"recsys.feedback": 1, "error.type": StoreFull.__name__}


# What is not sampled


def test_what_is_not_sampled_adds_nothing_to_the_record(running: Running, traced: Traced) -> None:
    log_traced(running, UNSAMPLED, click(time=AT))
    log_traced(running, SAMPLED, click(time=AT, user_id="v"))
    unsampled, sampled = records(running.settings)
    expected = to_record(Feedback("u", "item-7", "click", time_ms=AT.ToMilliseconds()))
    assert unsampled.SerializeToString() == expected.SerializeToString()
    assert not unsampled.HasField("traceparent")
    assert sampled.HasField("traceparent")
    # One for the sampled call alone.
    assert len(traced.spans(LOG_FEEDBACK)) == len(traced.spans("append feedback")) == 1


def test_off_a_callers_trace_adds_nothing_either(running: Running) -> None:
    log_traced(running, SAMPLED, click())
    assert not records(running.settings)[0].HasField("traceparent")


def test_a_version_is_sampled_when_its_feedback_was(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, store: redis.Redis
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    base = small(settings)
    with tracing(base) as traced, trainer(base) as daemon:
        daemon.start()
        for traceparent in ("", SAMPLED):
            _append_records(store, base, [traceparent])
            tick(base)
            assert daemon.step()
        assert daemon.version == 3
    assert [span.attributes for span in traced.spans("learn version")] == [{VERSION: 3}]


# What goes into the log, and what learning makes of it


def test_a_version_links_to_so_many_traces_and_to_each_once(
    settings: Settings, store: redis.Redis, traced: Traced
) -> None:
    base = small(settings, batch_size=64, batches_per_version=1)
    parents = [f"00-{TRACE_ID}-{number + 1:016x}-01" for number in range(MAX_LINKS + 8)]
    _append_records(store, base, [parents[0], "not a traceparent", *parents])
    tick(base)
    with trainer(base) as daemon:
        daemon.start()
        daemon.step()
    # What cannot be read takes a place and is no link.
    assert linked(traced.one("learn version")) == parents[: MAX_LINKS - 1]


def test_learning_does_not_look_at_it(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    plain, named_ = (base.model_copy(update={"key_prefix": prefix}) for prefix in ("plain", "named"))
    _append_records(store, plain, [""] * 20)
    with tracing(base):
        _append_records(store, named_, [SAMPLED] * 20)
        learned = learn_all(named_)
    assert learned == learn_all(plain)
    assert versions(named_) == versions(plain) != []
    assert base.learning_digest() == base.model_copy(update={"traces": "on"}).learning_digest()


def _append_records(store: redis.Redis, settings: Settings, traceparents: Sequence[str]) -> None:
    """Append feedback as a server would, at the same positions under every prefix."""
    feedback = make_feedback(len(traceparents))
    key = f"{settings.key_prefix}:{{log}}"
    last: Any = store.xrevrange(f"{key}:records", count=1)
    begin = int(last[0][0].partition(b"-")[0]) + 1 if last else 1_700_000_000_000
    for number, (each, traceparent) in enumerate(zip(feedback, traceparents, strict=True)):
        record = to_record(each)
        if traceparent:
            record.traceparent = traceparent
        data = record.SerializeToString()
        store.xadd(f"{key}:records", {"r": data}, id=f"{begin + number}-0")
    store.hincrby(f"{key}:stats", "appended", len(feedback))


# On and off


def test_off_nothing_of_it_is_loaded_by_a_started_server_or_trainer(settings: Settings) -> None:
    found = _modules_of_started(settings)
    assert "recsys.traces" in found
    # The store's library looks for the metrics' half by itself.
    mine = ("recsys.traces.recorder", "opentelemetry.sdk.trace", "opentelemetry.exporter")
    assert [name for name in found if name.startswith(mine)] == []


def test_on_it_is_loaded(settings: Settings) -> None:
    assert "opentelemetry.sdk.trace" in _modules_of_started(settings.model_copy(update={"traces": "on"}))


def _modules_of_started(settings: Settings) -> list[str]:
    """Start a server and a trainer as their commands do, stop them, and tell what was loaded."""
    program = (
        "import os, signal, sys, threading\n"
        "from recsys.settings import Settings\n"
        "settings = Settings.model_validate_json(sys.argv[1])\n"
        "import recsys.server, trainer.daemon\n"
        "run = {'trainer': trainer.daemon.run, 'server': recsys.server.run}\n"
        "class Said:\n"
        "    def write(self, text):\n"
        "        if text.startswith(('learning on', 'serving on')): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    def flush(self): pass\n"
        "real, sys.stdout = sys.stdout, Said()\n"
        "for name in run: run[name](settings)\n"
        "sys.stdout = real\n"
        "print('\\n'.join(sys.modules))\n"
    )
    given = settings.model_copy(update={"dimension": 8, "device": "cpu"}).model_dump_json()
    done = subprocess.run(
        [sys.executable, "-c", program, given],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_without_the_extra_it_says_so_and_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "recsys.traces.recorder", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with caplog.at_level(logging.WARNING):
        traces.start(settings.model_copy(update={"traces": "on"}), "recsys-test")
    assert "pip install 'recsys[otel]'" in caplog.text
    assert traces.call("/recsys.v1.RecommenderService/Recommend", [("traceparent", SAMPLED)]) is None


# Where they go


def test_the_exporters_are_those_of_opentelemetrys_variables() -> None:
    grpc_ = {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    assert trace_exporters({}) == trace_exporters({"OTEL_TRACES_EXPORTER": "otlp"}) == ["otlp_proto_http"]
    assert trace_exporters(grpc_) == ["otlp_proto_grpc"]
    assert trace_exporters({**grpc_, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}) == ["otlp_proto_http"]
    assert trace_exporters({"OTEL_TRACES_EXPORTER": "console, otlp"}) == ["console", "otlp_proto_http"]
    assert trace_exporters({"OTEL_TRACES_EXPORTER": "none"}) == []


def test_an_exporter_that_is_not_installed_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkon")
    with pytest.raises(SettingsError, match="OTEL_TRACES_EXPORTER: no exporter 'zipkon' is installed; there are con"):
        traces.start(settings.model_copy(update={"traces": "on"}), "recsys-test")


class Collector(BaseHTTPRequestHandler):
    """Take what is exported by OTLP over HTTP."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.taken.append((self.path, ExportTraceServiceRequest.FromString(body)))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on stderr."""


def test_a_stop_hands_over_what_was_recorded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        taken: list[tuple[str, ExportTraceServiceRequest]] = []
        collector.taken = taken  # type: ignore[attr-defined]
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
            traces.start(settings.model_copy(update={"traces": "on"}), "recsys-test")
            with traces.span("apply version", 7):
                pass
            traces.stop(SECONDS)
        finally:
            collector.shutdown()
            thread.join()
    ((path, request),) = taken
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    about = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert about["service.name"] == "recsys-test"
    (span,) = resource.scope_spans[0].spans
    assert (span.name, span.attributes[0].key, span.attributes[0].value.int_value) == ("apply version", VERSION, 7)


class Stuck(SpanExporter):
    """An exporter whose other side never answers."""

    def __init__(self) -> None:
        self.asked, self.free = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.free.wait(SECONDS)
        return SpanExportResult.SUCCESS


def test_a_stop_does_not_wait_for_ever_for_who_takes_the_spans(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = Stuck()
    traces.start(settings.model_copy(update={"traces": "on"}), "recsys-test", [stuck])
    with traces.span("apply version", 1):
        pass
    try:
        with caplog.at_level(logging.WARNING):
            traces.stop(0.05)
        assert "the last traces were not taken in time" in caplog.text
        assert stuck.asked.wait(SECONDS)
    finally:
        stuck.free.set()
