"""Server: the services, health, reflection and /metrics wired together, and the life of the process that serves."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry
from threadpoolctl import threadpool_limits

import recsys
from recsys import traces
from recsys.batcher import Batcher
from recsys.catalog import Catalog, CatalogMirror
from recsys.collector import settle
from recsys.device import choose
from recsys.errors import AddressInUse, SettingsError
from recsys.feedback import Feedback
from recsys.feedback_log import Appended, FeedbackLog
from recsys.follower import Follower
from recsys.forgetting import Forgetting
from recsys.histories import Histories
from recsys.logs import tell
from recsys.metrics import ServerMetrics
from recsys.page import Application, HttpServer, InProcess, Overview
from recsys.quarantine import Quarantine
from recsys.scorer import Answer, Scorer
from recsys.service.auth import Guard
from recsys.service.catalog import CatalogItems
from recsys.service.edge import Edge, Method, methods_of
from recsys.service.model import Model
from recsys.service.recommender import Appending, Question, Recommender, Scoring
from recsys.service.store_calls import StoreCalls
from recsys.service.transport import event_loop, open_transport
from recsys.settings import Settings, bracketed, is_loopback
from recsys.store.connection import connect
from recsys.store.durability import check_durability
from recsys.store.inspection import inspect
from recsys.tls import CERTIFICATES, Named, expiries
from recsys.v1 import catalog_pb2, model_pb2, recommender_pb2
from recsys.weights import WeightStore
from recsys.weights.shared import SharedWeights

SERVICES = tuple(
    service.full_name
    for file in (recommender_pb2, catalog_pb2, model_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
# How long a stopping server may have to wait for the thread that watches for the first weights.
READY_SLICE_SECONDS = 0.1
# Larger batches are scored faster, up to a point; this one keeps what waits for a batch from waiting long.
SCORE_BATCH_SECONDS = 0.025
# How long a thread may keep the interpreter from others that want it. With the default of 5 ms the event loop, which
# asks for it many times a call, waits that long each time while scoring is busy in Python.
SWITCH_SECONDS = 0.0005

_log = logging.getLogger(__name__)


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

    def __init__(self, settings: Settings, parts: Parts, *, share_port: bool = False) -> None:
        """Prepare; `share_port` lets several processes listen on one port, and the system spreads the connections."""
        self._settings = settings
        self._share_port = share_port
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
        guard = Guard(settings.tokens_file)
        self._client = connect(settings)
        await asyncio.to_thread(check_durability, self._client, settings)
        edge = Edge(self._methods(), self._parts.metrics, guard, max_answer_bytes=settings.max_message_bytes)
        scorer, registry = self._parts.scorer, self._parts.registry
        overview = Overview(settings, registry.collect, lambda: scorer.problem)
        self._page = Application(settings, registry, overview, InProcess(edge), guard)
        try:
            self._http = HttpServer(settings.host, settings.metrics_port, self._page)
            self.metrics_port = self._http.port
            self._transport = open_transport(
                settings, edge, self._scoring, self._add_services, share_port=self._share_port
            )
        except (AddressInUse, SettingsError):
            await asyncio.to_thread(self._close)
            raise
        self.port = self._transport.port
        self._count_down()
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._transport.start()
        self._parts.follower.start()
        self._readiness = asyncio.create_task(self._serve_when_ready())

    def _count_down(self) -> None:
        """Show when certificates expire; one that serves and cannot be read here is no reason not to serve."""
        for name in CERTIFICATES:
            try:
                found = expiries([Named(name, getattr(self._settings, name))])
            except SettingsError as error:
                _log.warning("when a certificate expires is not known: %s", error)
                continue
            for setting, expires in found.items():
                self._parts.metrics.certificate_expires(setting, expires)

    async def serving(self) -> None:
        """Wait until health says SERVING."""
        await asyncio.shield(self._readiness)

    async def stop(self) -> None:
        """Say NOT_SERVING, finish the calls in flight within `drain_seconds`, and close everything.

        Takes all of that time when somebody watches the health: such a call never finishes by itself.
        """
        self._readiness.cancel()
        await self._health.enter_graceful_shutdown()
        await self._transport.stop(self._settings.drain_seconds)
        await asyncio.to_thread(self._close)

    def _methods(self) -> list[Method]:
        """Make the services and what they share; return their methods."""
        settings, scorer, metrics = self._settings, self._parts.scorer, self._parts.metrics
        mirror = self._parts.mirror
        log, histories = FeedbackLog(self._client, settings), Histories(self._client, settings)
        self._scoring: Batcher[Question, Answer] = Batcher(
            "scoring",
            Scoring(histories, scorer, metrics),
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
        self._explaining = StoreCalls(settings, "explaining")
        self._forgetting = StoreCalls(settings, "forgetting")
        recommender = Recommender(
            settings, scorer, mirror, self._scoring, self._appending, histories, self._explaining, metrics
        )
        catalog = CatalogItems(settings, Catalog(self._client, settings), log, self._calls)
        weights, quarantine = WeightStore(self._client, settings), Quarantine(self._client, settings)
        forgetting = Forgetting(self._client, settings)
        model = Model(
            *(settings, scorer, log, weights, quarantine, partial(inspect, self._client)),
            *(forgetting, self._calls, self._forgetting),
        )
        servicers = {
            "RecommenderService": (recommender_pb2, recommender),
            "CatalogService": (catalog_pb2, catalog),
            "ModelService": (model_pb2, model),
        }
        return [
            method
            for name, (file, servicer) in servicers.items()
            for method in methods_of(file.DESCRIPTOR.services_by_name[name], servicer)
        ]

    def _add_services(self, server: Any) -> None:
        """Add the services that are not ours, which need no token, to a grpcio server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._settings.reflection:
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    async def _serve_when_ready(self) -> None:
        # In slices, because a thread that waits for an event cannot be told to stop.
        while not await asyncio.to_thread(self._parts.follower.ready.wait, READY_SLICE_SECONDS):
            pass
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def _close(self) -> None:
        for part in (self._scoring, self._appending, self._calls, self._explaining, self._forgetting):
            part.close()
        self._parts.follower.stop()
        self._client.close()
        if self.metrics_port:
            self._http.close()
        self._page.close()


def run(settings: Settings, shared: Sequence[int] = ()) -> None:
    """Serve until SIGTERM or SIGINT, with the real scorer.

    With descriptors of `shared` weights, share them and the port with the processes that hold the same.

    Raises:
        AddressInUse: when a port is taken.
        SettingsError: when the settings would let strangers in, or name files or exporters that cannot be used.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    traces.start(settings, "recsys-server")
    weights = SharedWeights(settings, shared) if shared else None
    try:
        with asyncio.Runner(loop_factory=partial(event_loop, settings)) as runner:
            # Before anything is begun that would have to be ended.
            runner.get_loop()
            runner.run(serve_until_signal(settings, assemble(settings, weights), share_port=bool(shared)))
    finally:
        traces.stop()
    if weights is not None:
        weights.close()


def assemble(settings: Settings, shared: SharedWeights | None = None) -> Parts:
    """Make the real parts: the scorer, what keeps it up to date, and their metrics."""
    torch.set_num_threads(settings.torch_threads)
    # numpy has threads of its own for products, and the scorer uses them.
    threadpool_limits(settings.torch_threads, user_api="blas")
    registry = CollectorRegistry()
    mirror = CatalogMirror(Catalog(connect(settings), settings))
    device = choose("cpu" if shared else settings.device)
    scorer = Scorer(settings, mirror, device, shared)
    metrics = ServerMetrics(registry)
    metrics.lists.chosen = scorer.chosen
    return Parts(scorer, Follower(settings, scorer, mirror, metrics), mirror, registry, metrics)


async def serve_until_signal(settings: Settings, parts: Parts, *, share_port: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; print one line when SERVING."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = Server(settings, parts, share_port=share_port)
    await server.start()
    try:
        await _first(server.serving(), stopping.wait())
        if not stopping.is_set():
            settle()
            host = bracketed(settings.host)
            tell(_log, logging.INFO, "serving", software=recsys.__version__, version=parts.scorer.version)
            print(f"serving on {host}:{server.port}, metrics on {host}:{server.metrics_port}/metrics", flush=True)
            await stopping.wait()
    finally:
        tell(_log, logging.INFO, "stopping", version=parts.scorer.version)
        await server.stop()
        tell(_log, logging.INFO, "stopped")


async def _first(*waits: Awaitable[Any]) -> None:
    """Wait until one of them is over, and give the others up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()


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
