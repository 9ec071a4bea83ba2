"""A server under test: everything real but the arithmetic, for which a few lines with known answers stand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import redis
from prometheus_client import CollectorRegistry

from recsys.catalog import Catalog, CatalogMirror
from recsys.item_rows import ItemRows
from recsys.metrics import ServerMetrics
from recsys.scorer import Answer, Lists, Query, RankedItems, ScoredItem, ScoreParts, Scores
from recsys.server import Parts, Server
from recsys.service.transport import event_loop
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.v1.log_pb2 import History
from recsys.v1 import recommender_pb2
from recsys.weights import Lineage, WeightStore

# What is said of a server holds on each: the suites of the service run on all. The third is for whoever is not on this
# machine.
WAYS: dict[str, dict[str, Any]] = {
    "grpcio": {"transport": "grpcio"},
    "native": {"transport": "native"},
    "fronted": {"transport": "native", "max_connections": 100},
}
ITEMS = tuple(f"item-{number}" for number in range(2000))


@dataclass(frozen=True)
class PlainStatus:
    version: int = 0
    committed_ms: int = 0
    applied_ms: int = 0
    items: int = 0
    feedback_learned: int = 0


class PlainScorer:
    """Recommend ITEMS in order; an item of the history is the reason for the first, if there is a history."""

    def __init__(self) -> None:
        self.status = PlainStatus()
        self.problem = ""
        self.batches: list[int] = []
        # A test may hold the scoring thread here.
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.failure: Exception | None = None
        self.warming = False

    @property
    def version(self) -> int:
        return self.status.version

    @property
    def warm(self) -> bool:
        return self.version > 0 and not self.warming

    def answer(self, queries: list[Query]) -> list[Answer]:
        self.entered.release()
        assert self.gate.wait(30)
        self.batches.append(len(queries))
        if self.failure:
            raise self.failure
        return [Answer(self.version, self._items(query)) for query in queries]

    def _items(self, query: Query) -> Sequence[ScoredItem]:
        if query.candidates is not None:
            count = len(query.candidates)
            parts_KP = np.zeros((count, len(fields(ScoreParts))))
            parts_KP[:, 0] = -np.arange(count)
            known_K = np.array([item_id in ITEMS for item_id in query.candidates])
            return Scores(query.candidates, known_K, ["click", "like"], np.tile([0.25, 0.75], (count, 1)), parts_KP)
        assert isinstance(query.history, bytes)
        history = History.FromString(query.history).history
        seen = set() if query.allow_seen else {entry.item_id for entry in history}
        found = (item_id for item_id in ITEMS if item_id not in query.exclude and item_id not in seen)
        chosen = list(islice(found, query.count))
        because = history[-1].item_id if history else None
        rows = ItemRows()
        rows.allocate([*chosen, *([because] if because else [])])
        rows_BM = 1 + np.arange(len(chosen))[None]
        sources_BM, because_BM = np.full_like(rows_BM, recommender_pb2.SOURCE_TRENDING), np.zeros_like(rows_BM)
        if because:
            told = [recommender_pb2.SOURCE_TRANSITION, recommender_pb2.SOURCE_NETWORK][: len(chosen)]
            sources_BM[0, : len(told)], because_BM[0, :1] = told, rows.row(because)
        scores_BM = np.float32(1) - rows_BM.astype(np.float32)
        wanted_B = np.array([query.count])
        return RankedItems(Lists.of(rows.index, rows_BM, scores_BM, sources_BM, because_BM, wanted_B), 0)


@dataclass
class PlainFollower:
    """Load nothing: `load` says that version 1 is there."""

    scorer: PlainScorer
    ready: threading.Event = field(default_factory=threading.Event)
    started: int = 0
    stopped: int = 0

    def start(self) -> None:
        self.started += 1

    def stop(self) -> None:
        self.stopped += 1

    def load(self, version: int = 1) -> None:
        self.scorer.status = PlainStatus(version, 1_700_000_000_000, 1_700_000_000_250, len(ITEMS), 2)
        self.ready.set()


class Loop:
    """An event loop in a thread of its own, as a server process has one."""

    # A server that starts first compiles its loops where nobody has: a minute, and twice that beside another.
    SECONDS = 200

    def __init__(self, settings: Settings) -> None:
        self._loop = event_loop(settings)
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(self.SECONDS)

    def call(self, function: Callable[[], Any]) -> None:
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass
class Running:
    """A running server and what a test may turn on it."""

    settings: Settings
    server: Server
    scorer: PlainScorer
    follower: PlainFollower
    mirror: CatalogMirror
    registry: CollectorRegistry
    store: redis.Redis
    channel: grpc.Channel
    loop: Loop
    stopped: bool = False

    def reset(self) -> None:
        """Empty the store and forget what earlier tests did."""
        self.store.flushall()
        self.scorer.failure = None
        self.scorer.batches.clear()

    def stop(self) -> None:
        """Stop the server before the test's end."""
        self.stopped = True
        self.loop.run(self.server.stop())

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def value(self, name: str, **labels: str) -> float:
        """Read a metric's value; 0 where it was never touched."""
        return self.registry.get_sample_value(name, labels) or 0.0


def changed(settings: Settings, **changes: Any) -> Settings:
    return Settings.model_validate(settings.model_dump(exclude_unset=True) | changes)


def server_tls(pki: Path) -> dict[str, str]:
    return {"tls_certificate": str(pki / "server.pem"), "tls_key": str(pki / "server.key")}


@contextmanager
def serve(settings: Settings, *, ready: bool = True) -> Iterator[Running]:
    """Run a server in this process on free ports; `ready` waits for SERVING."""
    loop = Loop(settings)
    registry = CollectorRegistry()
    scorer = PlainScorer()
    follower = PlainFollower(scorer)
    with connect(settings) as store:
        mirror = CatalogMirror(Catalog(store, settings))
        server = Server(settings, Parts(scorer, follower, mirror, registry, ServerMetrics(registry)))
        running = None
        try:
            loop.run(server.start())
            with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                running = Running(settings, server, scorer, follower, mirror, registry, store, channel, loop)
                if ready:
                    follower.load()
                    loop.run(server.serving())
                yield running
        finally:
            scorer.gate.set()
            if running and not running.stopped:
                running.stop()
            loop.close()


def commit_versions(running: Running, count: int) -> WeightStore:
    """Commit versions 1 to `count`, each with two feedback learned more than the one before."""
    weights = WeightStore(running.store, running.settings)
    epoch = weights.acquire()
    for parent in range(count):
        lineage = Lineage(
            position=f"{parent + 1}-0",
            feedback_learned=2 * (parent + 1),
            feedback_added=2,
            settings_digest="digest",
            metrics={"hr": 0.5},
            accepted_ms=[],
            committed_ms=1_700_000_000_123,
        )
        weights.commit(epoch, parent, b"payload", b"trainer", lineage)
    return weights
