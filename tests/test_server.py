from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from serving import WAYS, Running, changed, serve

from recsys.errors import AddressInUse
from recsys.server import SERVICES
from recsys.service import front
from recsys.service.transport import chosen
from recsys.settings import Settings, load
from recsys.v1 import recommender_pb2
from recsys.v1.recommender_pb2_grpc import RecommenderServiceStub

SECONDS = 30
TLS = {"tls_certificate": "chain.pem", "tls_key": "key.pem"}
Status = health_pb2.HealthCheckResponse


@pytest.fixture(params=WAYS)
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    """Settings for each transport."""
    return settings.model_copy(update=WAYS[request.param])


def health(channel: grpc.Channel, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int(HealthStub(channel).Check(request, timeout=SECONDS, wait_for_ready=True).status)


def watch(channel: grpc.Channel, service: str = "") -> Any:
    return HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS)


def recommend_later(running: Running) -> Any:
    request = recommender_pb2.RecommendRequest(user_id="u")
    return RecommenderServiceStub(running.channel).Recommend.future(request, timeout=SECONDS)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_health_is_serving_from_the_first_weights_until_stopping(settings: Settings) -> None:
    with serve(settings.model_copy(update={"drain_seconds": 0.05}), ready=False) as running:
        assert SERVICES == ("recsys.v1.RecommenderService", "recsys.v1.CatalogService", "recsys.v1.ModelService")
        for service in ("", *SERVICES):
            assert health(running.channel, service) == Status.NOT_SERVING
        seen = watch(running.channel)
        assert next(seen).status == Status.NOT_SERVING
        running.follower.load()
        assert next(seen).status == Status.SERVING
        running.loop.run(running.server.serving())
        for service in ("", *SERVICES):
            assert health(running.channel, service) == Status.SERVING
        stopping = threading.Thread(target=running.stop)
        stopping.start()
        assert next(seen).status == Status.NOT_SERVING
        stopping.join()
        assert (running.follower.started, running.follower.stopped) == (1, 1)


def test_health_of_an_unknown_service(settings: Settings) -> None:
    with serve(settings.model_copy(update={"drain_seconds": 0.05})) as running:
        with pytest.raises(grpc.RpcError) as caught:
            health(running.channel, "recsys.v1.Oracle")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert next(watch(running.channel, "recsys.v1.Oracle")).status == Status.SERVICE_UNKNOWN


def test_a_stopping_server_finishes_the_calls_in_flight(settings: Settings) -> None:
    with serve(settings) as running:
        running.scorer.gate.clear()
        call = recommend_later(running)
        assert running.scorer.entered.acquire(timeout=SECONDS)
        stopping = threading.Thread(target=running.stop)
        stopping.start()
        running.scorer.gate.set()
        assert call.result().version == 1
        stopping.join()
        with pytest.raises(grpc.RpcError) as caught:
            recommend_later(running).result()
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_call_that_takes_longer_than_draining_is_cut_off(settings: Settings) -> None:
    with serve(settings.model_copy(update={"drain_seconds": 0.05})) as running:
        running.scorer.gate.clear()
        call = recommend_later(running)
        assert running.scorer.entered.acquire(timeout=SECONDS)
        stopping = threading.Thread(target=running.stop)
        stopping.start()
        assert call.exception().code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        running.scorer.gate.set()
        stopping.join()


def test_a_server_that_never_got_weights_stops(settings: Settings) -> None:
    with serve(settings, ready=False) as running:
        running.stop()
        assert running.follower.stopped == 1


def services(channel: grpc.Channel) -> set[str]:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=SECONDS)
    return {service.name for answer in answers for service in answer.list_services_response.service}


def test_reflection_lists_every_service(settings: Settings) -> None:
    with serve(settings) as running:
        assert services(running.channel) == {
            *SERVICES,
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }


def test_reflection_can_be_turned_off(settings: Settings) -> None:
    with serve(settings.model_copy(update={"reflection": False})) as running:
        with pytest.raises(grpc.RpcError) as caught:
            services(running.channel)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_metrics_are_served_until_the_server_stops(settings: Settings) -> None:
    with serve(settings) as running:
        url = f"http://127.0.0.1:{running.server.metrics_port}/metrics"
        recommend_later(running).result()
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            text = answer.read().decode()
        assert 'grpc_server_handled_total{grpc_code="OK",grpc_method="Recommend"' in text
        running.stop()
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=SECONDS)


@pytest.mark.parametrize(
    ("setting", "text"), [("port", "cannot listen on"), ("metrics_port", "cannot serve metrics on")]
)
def test_a_taken_port_is_refused(settings: Settings, taken_port: int, setting: str, text: str) -> None:
    with (
        pytest.raises(AddressInUse, match=rf"{text} 127\.0\.0\.1:{taken_port} "),
        serve(settings.model_copy(update={setting: taken_port})),
    ):
        pass


def test_a_port_is_not_shared_with_another_server(settings: Settings) -> None:
    with (
        serve(settings) as running,
        pytest.raises(AddressInUse),
        serve(settings.model_copy(update={"port": running.server.port})),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, False),
        ({"host": "localhost", "min_ping_seconds": 0.0}, False),
        ({"host": "0.0.0.0"}, True),
        ({"max_connections": 10}, True),
        ({"max_idle_seconds": 60.0}, True),
        ({"min_ping_seconds": 10.0}, True),
        (TLS, True),
    ],
)
def test_who_is_elsewhere_or_bounded_passes_a_front(changes: dict[str, Any], passed: bool) -> None:
    found = load(changes, environment={})
    assert front.needed(found) == passed
    assert (chosen(found), chosen(changed(found, transport="grpcio"))) == ("native", "grpcio")


PROGRAM = """
import asyncio, sys
from pathlib import Path
from prometheus_client import CollectorRegistry
from recsys.catalog import Catalog, CatalogMirror
from recsys.metrics import ServerMetrics
from recsys.server import Parts, serve_until_signal
from recsys.settings import load
from recsys.store.connection import connect
from serving import PlainFollower, PlainScorer

settings = load({"redis_url": sys.argv[1], "port": 0, "metrics_port": 0}, environment={})
registry = CollectorRegistry()
scorer = PlainScorer()
follower = PlainFollower(scorer)
mirror = CatalogMirror(Catalog(connect(settings), settings))
if sys.argv[2] == "ready":
    follower.load()
else:
    follower.start = lambda: print("loading", flush=True)
asyncio.run(serve_until_signal(settings, Parts(scorer, follower, mirror, registry, ServerMetrics(registry))))
print("stopped", follower.stopped)
"""


@pytest.mark.parametrize(("number", "state"), [(signal.SIGTERM, "ready"), (signal.SIGINT, "loading")])
def test_a_process_serves_until_a_signal(settings: Settings, number: signal.Signals, state: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, settings.redis_url, state],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    with process:
        assert process.stdout
        line = process.stdout.readline()
        if state == "ready":
            words = line.split()
            assert words[0::3] == ["serving", "metrics"]
            with grpc.insecure_channel(words[2].rstrip(",")) as channel:
                assert health(channel) == Status.SERVING
        else:
            assert line == "loading\n"
        process.send_signal(number)
        assert process.stdout.read() == "stopped 1\n"
    assert process.returncode == 0
