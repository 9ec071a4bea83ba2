"""Server: the services, health, reflection and /metrics wired together, and the life of the process that serves."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any
from wsgiref.simple_server import WSGIServer

import grpc.aio
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server

from recsys.batcher import Batcher
from recsys.catalog import Catalog, CatalogMirror
from recsys.device import choose
from recsys.errors import AddressInUse, SettingsError
from recsys.feedback import Feedback
from recsys.feedback_log import Appended, FeedbackLog
from recsys.follower import Follower
from recsys.histories import Histories
from recsys.metrics import ServerMetrics
from recsys.quarantine import Quarantine
from recsys.scorer import Answer, Scorer
from recsys.service.auth import Guard
from recsys.service.catalog import CatalogItems
from recsys.service.edge import Edge
from recsys.service.model import Model
from recsys.service.recommender import Appending, Question, Recommender, Scoring
from recsys.service.store_calls import StoreCalls
from recsys.settings import Settings, is_loopback
from recsys.store.connection import connect
from recsys.tls import Named, read_pem
from recsys.v1 import catalog_pb2, catalog_pb2_grpc, model_pb2, model_pb2_grpc, recommender_pb2, recommender_pb2_grpc
from recsys.weights import WeightStore

SERVICES = tuple(
    service.full_name
    for file in (recommender_pb2, catalog_pb2, model_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
# How long a stopping server may have to wait for the thread that watches for the first weights.
READY_SLICE_SECONDS = 0.1
# Larger batches are scored faster, up to a point; this one keeps what waits for a batch from waiting long.
SCORE_BATCH_SECONDS = 0.02
# How long a thread may keep the interpreter from others that want it. With the default of 5 ms the event loop, which
# asks for it many times a call, waits that long each time while scoring is busy in Python.
SWITCH_SECONDS = 0.0005
# A peer that connects and then says nothing holds a connection for this long; the library's two minutes are many.
HANDSHAKE_SECONDS = 10
# How long a connection may be silent with calls in flight before it is asked whether it lives, and then to answer.
KEEPALIVE_SECONDS = 60
KEEPALIVE_TIMEOUT_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Parts:
    """Hold what a server is built around; `metrics` writes to `registry`."""

    scorer: Scorer
    follower: Follower
    mirror: CatalogMirror
    registry: CollectorRegistry
    metrics: ServerMetrics


class Server:
    """Serve the three services on `settings.host`; use `start` and `stop` from one event loop, once each.

    Health says NOT_SERVING until the follower is ready, then SERVING until `stop` begins.
    """

    def __init__(self, settings: Settings, parts: Parts) -> None:
        self._settings = settings
        self._parts = parts
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # absent from the stubs
        self.port = 0
        self.metrics_port = 0

    async def start(self) -> None:
        """Listen, then start to load the weights; `port` and `metrics_port` hold the real numbers from here on.

        Raises:
            SettingsError: when the settings would let strangers in, or name files that cannot be used.
            AddressInUse: when a port is taken; nothing keeps running.
        """
        settings = self._settings
        check_exposure(settings)
        credentials, guard = _credentials(settings), Guard(settings.tokens_file)
        self._client = connect(settings)
        self._metrics_server, self._metrics_thread = _serve_metrics(settings, self._parts.registry)
        self.metrics_port = self._metrics_server.server_port
        self._grpc = grpc.aio.server(
            interceptors=[
                Edge(SERVICES, self._parts.metrics, guard, max_answer_bytes=settings.max_message_bytes),
            ],
            options=_options(settings),
        )
        try:
            self.port = _listen(self._grpc, settings, credentials)
        except AddressInUse:
            await asyncio.to_thread(self._close_metrics)
            raise
        self._make_services()
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._grpc.start()
        self._parts.follower.start()
        self._readiness = asyncio.create_task(self._serve_when_ready())

    async def serving(self) -> None:
        """Wait until health says SERVING."""
        await asyncio.shield(self._readiness)

    async def stop(self) -> None:
        """Say NOT_SERVING, finish the calls in flight within `drain_seconds`, and close everything.

        Takes all of that time when somebody watches the health: such a call never finishes by itself.
        """
        self._readiness.cancel()
        await self._health.enter_graceful_shutdown()
        await self._grpc.stop(self._settings.drain_seconds)
        await asyncio.to_thread(self._close)

    def _make_services(self) -> None:
        settings, scorer, metrics = self._settings, self._parts.scorer, self._parts.metrics
        log = FeedbackLog(self._client, settings)
        self._scoring: Batcher[Question, Answer] = Batcher(
            "scoring",
            Scoring(Histories(self._client, settings), scorer, metrics),
            max_batch=settings.max_score_batch,
            queue_limit=settings.queue_limit,
            max_seconds=SCORE_BATCH_SECONDS,
        )
        # One append is one script, which the store runs alone: its length is bounded like that of a single call.
        self._appending: Batcher[list[Feedback], list[Appended]] = Batcher(
            "feedback",
            Appending(log),
            max_batch=settings.max_feedback_batch,
            queue_limit=settings.queue_limit,
            size=len,
        )
        self._calls = StoreCalls(settings)
        recommender = Recommender(settings, scorer, self._parts.mirror, self._scoring, self._appending, metrics)
        catalog = CatalogItems(settings, Catalog(self._client, settings), self._calls)
        weights, quarantine = WeightStore(self._client, settings), Quarantine(self._client, settings)
        model = Model(settings, scorer, log, weights, quarantine, self._calls)
        add: Any
        for add, servicer in (
            (recommender_pb2_grpc.add_RecommenderServiceServicer_to_server, recommender),
            (catalog_pb2_grpc.add_CatalogServiceServicer_to_server, catalog),
            (model_pb2_grpc.add_ModelServiceServicer_to_server, model),
            (health_pb2_grpc.add_HealthServicer_to_server, self._health),
        ):
            add(servicer, self._grpc)
        if settings.reflection:
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)

    async def _serve_when_ready(self) -> None:
        # In slices, because a thread that waits for an event cannot be told to stop.
        while not await asyncio.to_thread(self._parts.follower.ready.wait, READY_SLICE_SECONDS):
            pass
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def _close(self) -> None:
        for part in (self._scoring, self._appending, self._calls):
            part.close()
        self._parts.follower.stop()
        self._client.close()
        self._close_metrics()

    def _close_metrics(self) -> None:
        self._metrics_server.shutdown()
        self._metrics_server.server_close()
        self._metrics_thread.join()


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, with the real scorer.

    Raises:
        AddressInUse: when a port is taken.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    asyncio.run(serve_until_signal(settings, assemble(settings)))


def assemble(settings: Settings) -> Parts:
    """Make the real parts: the scorer, what keeps it up to date, and their metrics."""
    torch.set_num_threads(settings.torch_threads)
    registry = CollectorRegistry()
    mirror = CatalogMirror(Catalog(connect(settings), settings))
    scorer = Scorer(settings, mirror, choose(settings.device))
    metrics = ServerMetrics(registry)
    return Parts(scorer, Follower(settings, scorer, mirror, metrics), mirror, registry, metrics)


async def serve_until_signal(settings: Settings, parts: Parts) -> None:
    """Serve until SIGTERM or SIGINT; print one line when SERVING."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = Server(settings, parts)
    await server.start()
    try:
        await _first(server.serving(), stopping.wait())
        if not stopping.is_set():
            host = _bracketed(settings.host)
            print(f"serving on {host}:{server.port}, metrics on {host}:{server.metrics_port}/metrics", flush=True)
            await stopping.wait()
    finally:
        await server.stop()


async def _first(*waits: Awaitable[Any]) -> None:
    """Wait until one of them is over, and give the others up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()


def _serve_metrics(settings: Settings, registry: CollectorRegistry) -> tuple[WSGIServer, threading.Thread]:
    try:
        return start_http_server(settings.metrics_port, settings.host, registry)
    except OSError as error:
        address = f"{_bracketed(settings.host)}:{settings.metrics_port}"
        raise AddressInUse(f"cannot serve metrics on {address} (host, metrics_port): {error.strerror}") from error


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Both: between the two the library refuses at random.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_connection_idle_ms", round(settings.max_idle_seconds * 1000)),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        ("grpc.http2.min_ping_interval_without_data_ms", round(settings.min_ping_seconds * 1000)),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        # With the library's default a taken port is shared in silence, and each server gets half the calls.
        ("grpc.so_reuseport", 0),
    ]


def check_exposure(settings: Settings) -> None:
    """Refuse to be called from other machines by anyone, unless the settings say that this is meant.

    Raises:
        SettingsError: saying what to set.
    """
    missing = [name for name in ("tls_certificate", "tokens_file") if not getattr(settings, name)]
    if missing and not is_loopback(settings.host) and not settings.insecure:
        raise SettingsError(
            f"host: {settings.host} is reached from other machines, so that anyone there could call this server; set "
            f"{' and '.join(missing)} (with tls_key), or listen on 127.0.0.1, or set insecure = true where the "
            "network is guarded otherwise"
        )


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Read the certificates that the settings name; None without TLS."""
    pem = read_pem(
        Named("tls_client_ca", settings.tls_client_ca),
        Named("tls_certificate", settings.tls_certificate),
        Named("tls_key", settings.tls_key),
    )
    if pem.certificate is None or pem.key is None:
        return None
    return grpc.ssl_server_credentials(
        [(pem.key, pem.certificate)], root_certificates=pem.ca, require_client_auth=pem.ca is not None
    )


def _listen(server: grpc.aio.Server, settings: Settings, credentials: grpc.ServerCredentials | None) -> int:
    address = f"{_bracketed(settings.host)}:{settings.port}"
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise AddressInUse(
            f"cannot listen on {address} (host, port): the port is taken or the address is not this machine's"
        ) from error


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
