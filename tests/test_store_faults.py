"""Faults of a real store under a real server and trainer: what is acknowledged stays, what is refused says why."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import pytest
from calls import check_refusal, click, log, recommend
from learning import PASS, Proxy, append, fork, head, held, learn_all, make_feedback, small, trainer, versions
from prometheus_client import CollectorRegistry
from serving import Running, serve
from stores import OwnStore

from recsys.errors import FencedOff, SettingsError, StoreUnavailable
from recsys.feedback import Feedback
from recsys.feedback_log import BEGINNING, FeedbackLog, position_key
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.weights import WeightStore
from trainer.daemon import Daemon

SECONDS = 60
SHORT_SECONDS = 0.5


@pytest.fixture
def own(tmp_path: Path) -> Iterator[OwnStore]:
    with OwnStore(tmp_path / "store") as running:
        yield running


def at(url: str, **changes: object) -> Settings:
    return load({"redis_url": url, "port": 0, "metrics_port": 0, **changes}, environment={})


def logged(settings: Settings) -> list[str]:
    """List the ids in the log, in order."""
    with connect(settings) as client:
        entries = FeedbackLog(client, settings).read_after(BEGINNING, 100_000)
    return [entry.record.feedback_id for entry in entries if entry.record is not None]


def log_until_refused(running: Running) -> list[str]:
    """Log feedback until the server refuses one; return the ids that it acknowledged."""
    accepted: list[str] = []
    for number in count():
        try:
            log(running, click(feedback_id=f"{number}"))
        except grpc.RpcError:
            return accepted
        accepted.append(f"{number}")
    raise AssertionError


def log_until_accepted(running: Running, feedback_id: str) -> Any:
    """Repeat what was refused as unavailable until it is acknowledged, as clients do."""
    while True:
        try:
            return log(running, click(feedback_id=feedback_id)).results[0]
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise


# The disk


def test_a_full_disk_refuses_feedback_and_nothing_else_until_there_is_room(own: OwnStore) -> None:
    with serve(at(own.url)) as running:
        log(running, click(feedback_id="first"))
        own.fill_disk()
        accepted = log_until_refused(running)
        found = check_refusal(
            lambda: log(running, click(feedback_id="more")), grpc.StatusCode.UNAVAILABLE, "STORE_READ_ONLY"
        )
        assert "takes no writes at present, as when its disk is full" in found["message"]
        assert recommend(running).items
        own.free_disk()
        assert not log_until_accepted(running, "more").duplicate
        assert logged(running.settings) == ["first", *accepted, "more"]


def test_what_is_acknowledged_on_disk_survives_a_kill_while_the_disk_is_full(own: OwnStore) -> None:
    with serve(at(own.url, durability="disk", store_timeout_seconds=SHORT_SECONDS)) as running:
        log_until_accepted(running, "first")
        own.fill_disk()
        accepted = log_until_refused(running)
        own.kill()
        own.start()
        # What was cut off in the middle of a write is gone, and was never acknowledged.
        survived = logged(running.settings)
        assert survived[: 1 + len(accepted)] == ["first", *accepted]
        log_until_accepted(running, str(len(accepted)))
        assert sorted(logged(running.settings)) == sorted({"first", *accepted, str(len(accepted))})


def test_what_is_not_durable_is_refused_and_may_be_repeated(own: OwnStore) -> None:
    with serve(at(own.url, durability="disk", store_timeout_seconds=SHORT_SECONDS)) as running:
        log_until_accepted(running, "1")
        running.store.config_set("appendfsync", "no")
        check_refusal(lambda: log(running, click(feedback_id="2")), grpc.StatusCode.UNAVAILABLE, "NOT_DURABLE")
        running.store.config_set("appendfsync", "always")
        assert log_until_accepted(running, "2").duplicate


def test_a_server_does_not_start_over_a_store_that_cannot_be_as_durable(tmp_path: Path) -> None:
    with OwnStore(tmp_path, appendonly="no") as own, pytest.raises(SettingsError, match="durability"):
        serve(at(own.url, durability="disk"), ready=False).__enter__()


@contextmanager
def learning(settings: Settings) -> Iterator[tuple[Daemon, CollectorRegistry]]:
    """Run a trainer in a thread, with a clock that makes it impatient."""
    registry = CollectorRegistry()
    with trainer(settings, registry=registry, clock=count().__next__) as daemon:
        daemon.start()
        thread = threading.Thread(target=daemon.run)
        thread.start()
        try:
            yield daemon, registry
        finally:
            daemon.stopping.set()
            thread.join()


def wait_for_learned(settings: Settings, feedback: int) -> None:
    with connect(settings) as client:
        weights, version = WeightStore(client, settings), 1
        while True:
            deltas = weights.read_after(version, SECONDS)
            assert deltas, f"no version after {version}"
            version = deltas[-1].record.version
            if deltas[-1].record.feedback_learned >= feedback:
                return


def wait_for_store_errors(registry: CollectorRegistry) -> None:
    while not registry.get_sample_value("recsys_store_errors_total"):
        threading.Event().wait(0.005)


def append_until_refused(base: Settings) -> None:
    with suppress(StoreUnavailable):
        for number in count(9):
            append(base, make_feedback(1, number, first=number))


def check_unchanged_by_faults(base: Settings, feedback: int) -> None:
    """Compare with a trainer that met none of it."""
    assert head(base)[3] == feedback
    reference = fork(base, "reference")
    assert learn_all(reference) == held(base)
    assert versions(reference) == versions(base)


def test_a_trainer_waits_for_a_full_disk_and_goes_on(own: OwnStore, settings: Settings) -> None:
    base = small(settings, redis_url=own.url)
    append(base, make_feedback(9))
    with learning(base) as (_, registry):
        wait_for_learned(base, 9)
        own.fill_disk()
        append_until_refused(base)
        with connect(base) as client:
            appended = FeedbackLog(client, base).appended()
        wait_for_store_errors(registry)
        own.free_disk()
        wait_for_learned(base, appended)
    check_unchanged_by_faults(base, appended)


# Memory


def test_a_store_without_memory_refuses_feedback_and_nothing_else(own: OwnStore, settings: Settings) -> None:
    base = small(settings, redis_url=own.url)
    with own.client() as plain, serve(base) as running, learning(base) as (_, registry):
        append(base, make_feedback(9))
        wait_for_learned(base, 9)
        plain.config_set("maxmemory", 1)
        check_refusal(lambda: log(running, click()), grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
        assert recommend(running).items
        plain.config_set("maxmemory", 0)
        log(running, click(feedback_id="1"))
        plain.config_set("maxmemory", 1)
        wait_for_store_errors(registry)
        plain.config_set("maxmemory", 0)
        wait_for_learned(base, 10)
    check_unchanged_by_faults(base, 10)


# A store that is slow, or whose answers are cut


def test_a_store_that_answers_too_late_did_it_all_the_same(own: OwnStore) -> None:
    go_on = threading.Event()

    def slow_append(number: int, command: list[bytes]) -> str:
        if command[0] == b"EVALSHA":
            go_on.wait(SECONDS)
        return PASS

    with Proxy(own.url) as proxy, serve(at(proxy.url, store_timeout_seconds=SHORT_SECONDS)) as running:
        log_until_accepted(running, "first")
        proxy.fate = slow_append
        check_refusal(lambda: log(running, click(feedback_id="late")), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        assert recommend(running).items
        go_on.set()
        while "late" not in logged(at(own.url)):
            pass
        assert log_until_accepted(running, "late").duplicate
    assert logged(at(own.url)) == ["first", "late"]


def test_a_frozen_store_refuses_feedback_and_a_restarted_one_takes_it(own: OwnStore) -> None:
    # On disk: a busy one lets a store that is killed lose what it had only in memory.
    with serve(at(own.url, durability="disk", store_timeout_seconds=SHORT_SECONDS)) as running:
        log_until_accepted(running, "1")
        own.freeze()
        check_refusal(lambda: log(running, click(feedback_id="2")), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        assert recommend(running).items
        own.thaw()
        log_until_accepted(running, "2")
        own.kill()
        check_refusal(lambda: log(running, click(feedback_id="3")), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        own.start()
        log_until_accepted(running, "3")
        assert logged(running.settings) == ["1", "2", "3"]


# Two trainers


def test_of_two_trainers_at_work_the_newer_one_learns_everything_once(settings: Settings) -> None:
    # Without dropout: what torch draws at random is drawn by all threads of a process.
    base = small(settings, dropout=0.0)
    append(base, make_feedback(21))
    with trainer(base, clock=count().__next__) as older, ThreadPoolExecutor(1) as pool:
        older.start()
        work = pool.submit(older.run)
        try:
            wait_for_learned(base, 21)
            with learning(base):
                for start in range(21, 61, 5):
                    append(base, make_feedback(5, start, first=start))
                wait_for_learned(base, 61)
                with pytest.raises(FencedOff, match="epoch 1 is not the current one"):
                    work.result(SECONDS)
        finally:
            older.stopping.set()
    check_unchanged_by_faults(base, 61)


# Clocks


def test_times_that_go_back_and_forth_are_learned_like_others(settings: Settings) -> None:
    """A server whose clock is set back or forward gives its feedback such times; nothing in learning relies on them."""
    base = small(settings)
    times_ms = [1_700_000_000_000, 4_000_000_000_000, 1_000, 1_700_000_000_500, 1_699_000_000_000] * 8
    with connect(base) as client:
        feedback_log = FeedbackLog(client, base)
        for number, time_ms in enumerate(times_ms):
            feedback_log.append([Feedback("u", f"item-{number % 7}", "click")], now_ms=time_ms)
    learn_all(base)
    assert head(base)[3] == len(times_ms)
    check_unchanged_by_faults(base, len(times_ms))


def test_the_store_s_clock_may_be_set_back_and_forward(tmp_path: Path, settings: Settings) -> None:
    """Positions go on rising and all is learned once; ids are known for ten minutes of the store's own time."""
    own = OwnStore(tmp_path / "store")
    own.set_clock(0)
    base = small(settings, redis_url=own.url, deduplication_seconds=600, batch_growth=3, snapshot_every_bytes=1)
    feedback = [replace(one, feedback_id=f"f{number}") for number, one in enumerate(make_feedback(50))]
    with own, own.client() as plain, learning(base):
        positions = append(base, feedback[:10])
        for start, offset, known in ((10, -3600, True), (20, -3300, True), (30, 86_400, False), (40, -86_400, True)):
            before = plain.time()[0]
            own.set_clock(offset)
            while abs(plain.time()[0] - before) < 60:
                pass
            repeated = append(base, feedback[start - 10 : start])
            assert repeated == [""] * 10 if known else "" not in repeated
            positions += [*filter(None, repeated), *append(base, feedback[start : start + 10])]
        wait_for_learned(base, len(positions))
    keys = [position_key(position) for position in positions]
    assert len(keys) == 60
    assert keys == sorted(set(keys))
    # Set back by two days: the log's time stands still.
    assert {milliseconds for milliseconds, _ in keys[-11:]} == {keys[-1][0]}


def test_what_a_trainer_learns_does_not_depend_on_the_store_s_clock(tmp_path: Path, settings: Settings) -> None:
    own = OwnStore(tmp_path / "store")
    own.set_clock(0)
    base = small(settings, redis_url=own.url, batch_growth=3, snapshot_every_bytes=1, snapshots_retained=1)
    with own:
        with learning(base):
            for start, offset in ((0, 0), (10, -3600), (20, 86_400), (30, -86_400)):
                own.set_clock(offset)
                append(base, make_feedback(10, start, first=start))
            wait_for_learned(base, 40)
        assert head(base)[3] == 40
        reference = fork(base, "reference")
        assert learn_all(reference) == held(base)
