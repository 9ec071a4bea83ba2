"""The follower: the scorer holds what the store holds, whatever happens to the store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from learning import (
    CPU,
    CUT,
    PASS,
    START_MS,
    Proxy,
    append,
    head,
    learn_all,
    make_feedback,
    replica,
    small,
    tick,
    trainer,
)
from prometheus_client import CollectorRegistry
from stores import OwnStore

from recsys.catalog import Catalog, CatalogMirror, Item
from recsys.errors import StoreUnavailable
from recsys.follower import Follower
from recsys.metrics import ServerMetrics
from recsys.scorer import Answer, Query, Scorer
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.v1.log_pb2 import HistoryEntry
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights import WeightStore
from recsys.weights.repair import repair

SECONDS = 60
QUERIES = (
    Query(()),
    Query((HistoryEntry(item_id="item-3", feedback_class="click", time_ms=START_MS),), count=100),
)


@dataclass
class Following:
    """A follower and what it keeps up to date."""

    follower: Follower
    scorer: Scorer
    mirror: CatalogMirror
    registry: CollectorRegistry

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def observed(self, stage: str) -> float:
        return self.value("recsys_freshness_seconds_count", stage=stage)

    def answers(self) -> list[Answer]:
        return self.scorer.answer(QUERIES, START_MS + 1000)


@contextmanager
def following(settings: Settings) -> Iterator[Following]:
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry)
    with connect(settings) as client:
        mirror = CatalogMirror(Catalog(client, settings))
        scorer = Scorer(settings, mirror, CPU)
        follower = Follower(settings, scorer, mirror, metrics)
        try:
            yield Following(follower, scorer, mirror, registry)
        finally:
            follower.stop()


def expected(settings: Settings) -> list[Answer]:
    """Answer from what the store holds."""
    with connect(settings) as client:
        scorer = Scorer(settings, CatalogMirror(Catalog(client, settings)), CPU)
    scorer.load(VersionRecord(version=head(settings)[0]), replica(settings).write_all())
    return scorer.answer(QUERIES, START_MS + 1000)


def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + SECONDS
    idle = threading.Event()
    while not true():
        assert time.monotonic() < deadline
        idle.wait(0.005)


@pytest.fixture
def base(settings: Settings) -> Settings:
    return small(settings)


def learn(settings: Settings, count: int, seed: int = 1) -> None:
    append(settings, make_feedback(count, seed))
    tick(settings)
    learn_all(settings)


def test_deltas_are_followed(base: Settings) -> None:
    with following(base) as here:
        assert not here.follower.step(0)
        assert (here.scorer.version, here.follower.ready.is_set()) == (0, False)
        for part in range(4):
            learn(base, 9, part)
            assert here.follower.step(0)
            assert here.scorer.version == head(base)[0]
            assert here.answers() == expected(base)
        assert here.value("recsys_weights_reloads_total", reason="start") == 1
        assert here.value("recsys_served_version") in (0, here.scorer.version)
        status = here.scorer.status
        assert status.feedback_learned == 36
        assert status.items == len(replica(base).table)


@pytest.mark.parametrize("snapshot", [True, False])
def test_a_follower_starts_wherever_the_store_stands(base: Settings, store: redis.Redis, snapshot: bool) -> None:
    learn(base.model_copy(update={"snapshot_every_bytes": 150_000 if snapshot else 1 << 30}), 41)
    with following(base) as here:
        assert here.follower.step(0)
        assert here.scorer.version == head(base)[0]
        assert here.answers() == expected(base)
        # All that led there is gone past in one step, and nothing of it twice.
        assert not here.follower.step(0) or here.answers() == expected(base)


def test_ready_only_when_warm(base: Settings) -> None:
    """By the time that ready is set the batches of the warm-up have been scored, not just loaded."""
    learn(base, 9)
    with following(base) as here:
        sizes: list[tuple[int, bool]] = []
        answer = here.scorer._answer

        def watched(queries: list[Query], now_ms: int) -> list[Answer]:
            sizes.append((len(queries), here.follower.ready.is_set()))
            return answer(queries, now_ms)

        here.scorer._answer = watched  # type: ignore[method-assign,assignment]
        here.follower.step(0)
        assert here.follower.ready.is_set()
        assert sizes == [(1, False), (8, False), (32, False)]
        here.follower.step(0)
        assert len(sizes) == 3


def test_the_catalogue_is_followed(base: Settings, store: redis.Redis) -> None:
    learn(base, 9)
    catalog = Catalog(store, base)
    catalog.upsert([Item("item-1", "One")])
    with following(base) as here:
        here.follower.step(0)
        assert here.mirror.title("item-1") == "One"
        best = here.answers()[0].items[0].item_id
        catalog.delete([best])
        here.follower.step(0)
        assert best not in [item.item_id for item in here.answers()[0].items]


# A store that is not as it was


def test_a_gap_is_filled_from_a_snapshot(base: Settings) -> None:
    """While the follower is away more versions come than the store keeps deltas of."""
    learn(base, 9)
    with following(base) as here:
        here.follower.start()
        assert here.follower.ready.wait(SECONDS)
        with Proxy(base.redis_url) as proxy, following(base.model_copy(update={"redis_url": proxy.url})) as away:
            away.follower.start()
            assert away.follower.ready.wait(SECONDS)
            held = away.scorer.version
            proxy.fate = lambda number, command: CUT
            until(lambda: away.value("recsys_store_reachable") == 0)
            learn(base.model_copy(update={"snapshot_every_bytes": 1, "snapshots_retained": 1}), 41)
            with connect(base) as client:
                assert WeightStore(client, base).versions(100) == []
            before = away.answers()
            assert {answer.version for answer in before} == {held}
            proxy.fate = lambda number, command: PASS
            until(lambda: away.scorer.version == head(base)[0])
            assert away.answers() == expected(base)
            assert away.value("recsys_weights_reloads_total", reason="corrupt") == 1


def test_a_damaged_delta_is_never_half_applied(base: Settings, store: redis.Redis) -> None:
    learn(base, 9)
    with following(base) as here:
        here.follower.start()
        assert here.follower.ready.wait(SECONDS)
        version, before = here.scorer.version, here.answers()
        # A chunk of the next version is damaged before anyone can read it.
        with Proxy(base.redis_url) as proxy:

            def damage(number: int, command: list[bytes]) -> str:
                if command[0] == b"SET" and b":chunk:w:" in command[1] and f":{version + 1}:".encode() in command[1]:
                    command[2] = command[2][:-1] + bytes([command[2][-1] ^ 1])
                return PASS

            proxy.fate = damage
            append(base, make_feedback(8, 2))
            learn_all(base.model_copy(update={"redis_url": proxy.url}))
        assert head(base)[0] == version + 1
        until(lambda: here.value("recsys_weights_reloads_total", reason="corrupt") > 1)
        assert (here.scorer.version, here.answers()) == (version, before), "answers never go back"
        # The next snapshot mends it.
        with trainer(base.model_copy(update={"snapshot_every_bytes": 1})) as daemon:
            store.delete(*store.scan_iter(f"{base.key_prefix}:{{weights}}:*"))
            daemon.start()
            while daemon.step():
                pass
        until(lambda: here.scorer.version == head(base)[0])
        until(lambda: here.answers() == expected(base))


def test_a_repair_is_followed_at_once_and_the_damage_told_until_then(base: Settings, store: redis.Redis) -> None:
    learn(base, 33)
    last = head(base)[0]
    for key in store.scan_iter(f"{base.key_prefix}:{{weights}}:chunk:w:{last - 1}:*"):
        store.setrange(key, 100, b"damage")
    with following(base) as here:
        here.follower.start()
        until(lambda: here.scorer.problem.startswith(f"version {last - 1}: the checksum"))
        assert here.scorer.version == last - 2
        repaired = repair(WeightStore(store, base), 0)
        until(lambda: here.scorer.version == repaired.version)
        until(lambda: not here.scorer.problem)
        assert here.answers() == expected(base)


def test_whole_deltas_before_a_damaged_one_are_applied(base: Settings, store: redis.Redis) -> None:
    learn(base, 33)
    last = head(base)[0]
    assert last > 4
    (key,) = store.scan_iter(f"{base.key_prefix}:{{weights}}:chunk:w:{last}:*")
    data = store.get(key)
    store.set(key, data[:-1] + bytes([data[-1] ^ 1]))
    with following(base) as here:
        here.follower.start()
        until(lambda: here.scorer.version == last - 1)


def test_a_store_that_began_anew_is_followed_from_its_beginning(base: Settings, store: redis.Redis) -> None:
    """After a flush the held weights are served until there are others, though their number is lower."""
    learn(base, 33)
    with following(base) as here:
        here.follower.start()
        assert here.follower.ready.wait(SECONDS)
        until(lambda: here.scorer.version == head(base)[0])
        before = here.answers()
        store.flushall()
        here.follower.step(0)
        assert here.answers() == before
        other = base.model_copy(update={"seed": 2})
        learn(other, 9, 7)
        assert head(base)[0] < before[0].version
        until(lambda: here.scorer.version == head(base)[0])
        assert here.answers() == expected(base)


def test_another_chain_of_the_same_length_is_found_out(base: Settings, store: redis.Redis) -> None:
    learn(base, 9)
    with following(base) as here:
        here.follower.start()
        assert here.follower.ready.wait(SECONDS)
        until(lambda: here.scorer.version == head(base)[0])
        store.flushall()
        learn(base, 9, 2)
        until(lambda: here.answers() == expected(base))
        assert here.value("recsys_weights_reloads_total", reason="corrupt") == 1


def test_while_the_store_is_away_the_weights_held_are_served(base: Settings) -> None:
    learn(base, 9)
    with Proxy(base.redis_url) as proxy, following(base.model_copy(update={"redis_url": proxy.url})) as here:
        here.follower.step(0)
        before = here.answers()
        proxy.fate = lambda number, command: CUT
        with pytest.raises(StoreUnavailable):
            here.follower.step(0)
        assert here.answers() == before
        learn(base, 9, 2)
        proxy.fate = lambda number, command: PASS
        here.follower.step(0)
        assert here.answers() == expected(base)
        assert here.value("recsys_weights_reloads_total", reason="start") == 1


# Freshness


def test_freshness_is_observed_once_per_stage(base: Settings) -> None:
    learn(base, 9)
    stages = ("committed_to_applied", "accepted_to_applied", "accepted_to_answered")
    with following(base) as here:
        here.follower.step(0)
        here.answers()
        start = [here.observed(stage) for stage in stages]
        learn(base, 21, 2)
        here.follower.step(0)
        assert [here.observed(stage) for stage in stages] == [start[0] + 21, start[1] + 21, start[2]]
        for _ in range(2):
            here.answers()
            here.follower.step(0)
            assert [here.observed(stage) for stage in stages] == [one + 21 for one in start]
        learn(base, 5, 3)
        learn(base, 6, 4)
        here.follower.step(0)
        here.answers()
        assert [here.observed(stage) for stage in stages] == [one + 32 for one in start]


def test_the_warm_up_is_nobody_s_answer(base: Settings) -> None:
    learn(base, 9)
    with following(base) as here:
        here.follower.step(0)
        assert here.follower.ready.is_set()
        assert here.scorer.warm
        assert here.observed("accepted_to_answered") == 0


def test_answers_are_timed_again_after_a_store_began_anew(base: Settings, store: redis.Redis) -> None:
    """Feedback whose version was never answered from must not hold up that of a shorter chain."""
    learn(base, 9)
    with following(base) as here:
        here.follower.start()
        assert here.follower.ready.wait(SECONDS)
        learn(base, 25, 2)
        until(lambda: here.scorer.version == head(base)[0])
        store.flushall()
        learn(base, 8, 3)
        until(lambda: here.scorer.version == head(base)[0])
        here.answers()
        start = here.observed("accepted_to_answered")
        learn(base, 7, 4)
        until(lambda: here.scorer.version == head(base)[0] and here.scorer.status.feedback_learned == 15)
        until(lambda: here.observed("accepted_to_applied") >= 7)
        here.answers()
        assert here.observed("accepted_to_answered") == start + 7


def test_a_store_that_cannot_write_is_told_of_while_it_is_followed(base: Settings, tmp_path: Path) -> None:
    with OwnStore(tmp_path / "store") as own:
        base = base.model_copy(update={"redis_url": own.url})
        learn(base, 9)
        with own.client() as client, following(base) as found:

            def written() -> float:
                return found.value("recsys_store_file_written", file="append_only")

            found.follower.start()
            until(lambda: written() == 1)
            assert found.value("recsys_store_append_only_bytes") > 1000
            assert found.value("recsys_store_disk_free_bytes") > 0
            own.fill_disk()

            def refused() -> bool:
                try:
                    return not client.set("ballast", bytes(100_000))
                except redis.exceptions.ResponseError:
                    return True

            until(refused)
            until(lambda: written() == 0)
            assert found.value("recsys_store_reachable") == 1
            own.free_disk()
            until(lambda: written() == 1)
