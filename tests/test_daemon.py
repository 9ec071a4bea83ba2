"""The daemon: what it learns depends on the log alone, nothing is lost, nothing is learned twice."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, count
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from learning import (
    CPU,
    CUT,
    DONE_AND_CUT,
    PASS,
    START_MS,
    TORN,
    Proxy,
    append,
    fork,
    head,
    held,
    learn_all,
    make_feedback,
    script_sha,
    small,
    tick,
    trainer,
    versions,
)
from prometheus_client import CollectorRegistry

from recsys.errors import CorruptWeights, FencedOff, StoreUnavailable
from recsys.feedback import Feedback, to_record
from recsys.feedback_log import FeedbackLog, LogEntry
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.weights import WeightStore, encode
from recsys.weights.replica import Replica
from trainer.daemon import Daemon
from trainer.rebuild import Rebuild

SECONDS = 30


def test_to_be_told_to_stop_waits_for_nothing() -> None:
    # The signal comes while the main thread holds the event's lock, as it does on its way into a wait and out of it.
    program = (
        "import signal, threading\n"
        "from trainer.daemon import stop_when_told\n"
        "stopping = threading.Event()\n"
        "stop_when_told(stopping)\n"
        "with stopping._cond:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "print(stopping.wait(30))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True\n"


def entries(settings: Settings) -> list[LogEntry]:
    with connect(settings) as client:
        return FeedbackLog(client, settings).read_after("0-0", 100_000)


def ticks(settings: Settings) -> int:
    return sum(entry.tick for entry in entries(settings))


def wait_for(settings: Settings, feedback_learned: int) -> None:
    """Follow the versions until so much has been learned."""
    with connect(settings) as client:
        store = WeightStore(client, settings)
        version = 1
        while True:
            deltas = store.read_after(version, SECONDS)
            assert deltas, f"no version after {version}"
            version = deltas[-1].record.version
            if deltas[-1].record.feedback_learned >= feedback_learned:
                return


# The first version


def test_the_first_start_publishes_the_initial_weights_with_a_snapshot(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    with trainer(base) as daemon:
        record = daemon.start()
    assert (record.version, record.parent, record.position, record.feedback_learned) == (1, 0, "0-0", 0)
    assert record.settings_digest == base.learning_digest()
    weights = WeightStore(store, base)
    assert weights.snapshot_versions() == [1]
    assert held(base) == encode(Replica(base, CPU).write_all())


def test_a_start_publishes_nothing_when_there_is_a_version(settings: Settings) -> None:
    base = small(settings)
    with trainer(base) as daemon:
        first = daemon.start()
    with trainer(base) as daemon:
        assert daemon.start() == first
        assert not daemon.step()
    assert versions(base) == []


# Versions are a function of the log


def write_mixed_log(base: Settings) -> None:
    """Write feedback with ticks in all kinds of places, malformed entries and unknown classes."""
    tick(base)
    append(base, make_feedback(10))
    tick(base)
    tick(base)
    with connect(base) as client:
        client.xadd(f"{base.key_prefix}:{{log}}:records", {"r": b"\xff"})
        append(base, [Feedback("user-1", "item-1", "gift", START_MS)])
        append(base, make_feedback(8, 2, first=10))
        client.xadd(f"{base.key_prefix}:{{log}}:records", {"other": b""})
    tick(base)
    append(base, make_feedback(3, 3, first=18))
    tick(base)
    append(base, make_feedback(13, 4, first=21))


def test_the_same_log_gives_the_same_versions_however_it_is_consumed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small(settings)
    write_mixed_log(base)
    reference = fork(base, "reference")
    weights = learn_all(reference)
    chains = versions(reference)
    # 10 | 8 and no more at the tick | 3 | 8 of 13; the rest waits. "gift" counts, what is malformed does not.
    assert [(learned, added) for *_, learned, added in chains] == [(8, 8), (10, 2), (19, 8), (22, 3), (30, 8)]
    run = count()

    # For each trainer in turn, how much it reads in each of its steps.
    @hypothesis_settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.lists(st.integers(1, 15), max_size=4), min_size=1, max_size=6))
    def consume(plan: list[list[int]]) -> None:
        other = fork(base, f"run-{next(run)}")
        for part in plan:
            with trainer(other) as daemon:
                daemon.start()
                for read_count in part:
                    monkeypatch.setattr("trainer.daemon.READ_COUNT", read_count)
                    daemon.step()
        monkeypatch.setattr("trainer.daemon.READ_COUNT", 256)
        assert learn_all(other) == weights
        assert versions(other) == chains

    consume()


@pytest.mark.parametrize("read_count", [1, 3, 7])
def test_how_much_is_read_at_once_does_not_matter(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, read_count: int
) -> None:
    base = small(settings)
    write_mixed_log(base)
    reference = fork(base, "reference")
    weights = learn_all(reference)
    monkeypatch.setattr("trainer.daemon.READ_COUNT", read_count)
    assert learn_all(base) == weights
    assert versions(base) == versions(reference)


def test_a_restart_after_every_entry_does_not_matter(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a new daemon after every single step only a version's last entry moves the position on."""
    base = small(settings, batch_size=1, batches_per_version=1)
    append(base, make_feedback(12))
    reference = fork(base, "reference")
    weights = learn_all(reference)
    monkeypatch.setattr("trainer.daemon.READ_COUNT", 1)
    for _ in range(12):
        with trainer(base) as daemon:
            daemon.start()
            daemon.step()
    assert held(base) == weights
    assert versions(base) == versions(reference)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ((3, "tick"), [(3, "tick")]),
        ((4, "tick"), [(4, "tick")]),
        ((8,), [(8, "feedback")]),
        ((8, "tick"), [(8, "feedback")]),
        ((9,), [(8, "feedback")]),
        ((9, "tick"), [(8, "feedback"), (9, "tick")]),
        (("tick", "tick"), []),
        ((1, "tick", 1, "tick", "tick"), [(1, "tick"), (2, "tick")]),
    ],
)
def test_what_closes_a_version(
    settings: Settings, plan: tuple[int | str, ...], expected: list[tuple[int, str]]
) -> None:
    base = small(settings)
    for part in plan:
        if isinstance(part, int):
            append(base, make_feedback(part))
        else:
            tick(base)
    learn_all(base)
    kinds = {entry.position: "tick" if entry.tick else "feedback" for entry in entries(base)}
    assert [(learned, kinds[position]) for _, _, position, learned, _ in versions(base)] == expected
    # The version stands at the entry that closed it: no feedback at or before its position is unlearned.
    for _, _, position, learned, _ in versions(base):
        places = [entry.position for entry in entries(base)]
        before = entries(base)[: places.index(position) + 1]
        assert sum(not entry.tick for entry in before) == learned


# Batches grow with the rate of feedback


def append_at(settings: Settings, times_ms: Sequence[int], seed: int = 1) -> None:
    """Append feedback that the store accepts at these times."""
    with connect(settings) as client:
        for one, time_ms in zip(make_feedback(len(times_ms), seed), times_ms, strict=True):
            record = to_record(one).SerializeToString()
            client.xadd(f"{settings.key_prefix}:{{log}}:records", {"r": record}, id=f"{time_ms}-*")


@pytest.mark.parametrize(
    ("gaps_ms", "batches"),
    [
        # A batch is 4, spans 100 ms or is 12.
        ([50] * 12, [4, 4, 4]),
        ([33, 33, 34] * 4, [4, 4, 4]),
        ([33, 33, 33] * 4, [5, 5]),
        ([0] * 11, [12]),
        ([0] * 12, [12]),
        ([0] * 23, [12, 12]),
        ([10] * 23, [11, 11]),
        # A long silence counts as well as a short one.
        ([0] * 5 + [60_000] + [0] * 10, [7]),
        # A clock that was set back stands still for the log.
        ([50] * 3 + [0] * 20, [4, 12]),
    ],
)
def test_a_batch_that_fills_fast_grows(settings: Settings, gaps_ms: list[int], batches: list[int]) -> None:
    base = small(settings, batch_growth=3, batch_seconds=0.1, batches_per_version=1)
    append_at(base, list(accumulate(gaps_ms, initial=START_MS)))
    learn_all(base)
    assert [added for *_, added in versions(base)] == batches


def test_a_backlog_is_cut_as_if_there_had_been_none(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that follows, one that comes late, one that restarts all the time, and a rebuild: the same versions."""
    base = small(settings, batch_growth=3, batch_seconds=0.1)
    draw = random.Random(7)
    gaps_ms = [draw.choice([0, 0, 5, 40, 200]) for _ in range(90)]
    times_ms = list(accumulate(gaps_ms, initial=START_MS))
    with trainer(base) as following:
        following.start()
        for part in range(0, len(times_ms), 7):
            append_at(base, times_ms[part : part + 7], part)
            if draw.random() < 0.2:
                with connect(base) as client:
                    client.xadd(f"{base.key_prefix}:{{log}}:records", {"t": ""}, id=f"{times_ms[part + 6]}-*")
            following.step()
        while following.step():
            pass
        weights = encode(following.learner.replica.write_all())
    assert len({added for *_, added in versions(base)}) > 3
    late, restarted = fork(base, "late"), fork(base, "restarted")
    assert learn_all(late) == weights
    monkeypatch.setattr("trainer.daemon.READ_COUNT", 30)
    for _ in range(6):
        with trainer(restarted) as daemon:
            daemon.start()
            daemon.step()
    assert learn_all(restarted) == weights
    assert versions(late) == versions(restarted) == versions(base)
    with connect(base) as client:
        assert Rebuild(client, base, CPU).run(head(base)[0]).equal


# Ticks


def test_one_tick_when_feedback_has_waited_long_enough(settings: Settings) -> None:
    base = small(settings)
    now = [100.0]
    with trainer(base, clock=lambda: now[0]) as daemon:
        daemon.start()
        now[0] = 500.0
        daemon.step()
        append(base, make_feedback(3))
        daemon.step()
        now[0] = 500.875
        append(base, make_feedback(2, 2))
        daemon.step()
        daemon.step()
        assert ticks(base) == 0
        now[0] = 501.0
        assert not daemon.step()
        assert ticks(base) == 1
        assert daemon.step()
        assert [(learned, added) for *_, learned, added in versions(base)] == [(5, 5)]
        now[0] = 900.0
        for _ in range(3):
            assert not daemon.step()
    assert ticks(base) == 1
    assert head(base)[2] == entries(base)[-1].position


def test_no_second_tick_while_the_first_is_on_its_way(settings: Settings) -> None:
    base = small(settings)
    clock = count(step=10)
    with trainer(base, clock=lambda: float(next(clock))) as daemon:
        daemon.start()
        append(base, make_feedback(3))
        daemon.step()
        assert ticks(base) == 1
        daemon.step()
        daemon.step()
    assert ticks(base) == 1


def test_no_tick_while_more_is_to_be_read(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small(settings)
    monkeypatch.setattr("trainer.daemon.READ_COUNT", 3)
    append(base, make_feedback(14))
    clock = count(step=10)
    with trainer(base, clock=lambda: float(next(clock))) as daemon:
        daemon.start()
        for _ in range(4):
            daemon.step()
            assert ticks(base) == 0
        daemon.step()
        assert ticks(base) == 1
        assert daemon.step()
    assert entries(base)[-1].tick
    assert [learned for *_, learned, _ in versions(base)] == [8, 14]


# What cannot be learned


def test_what_cannot_be_learned_is_counted_and_passed_over(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    records = f"{base.key_prefix}:{{log}}:records"
    feedback = make_feedback(11)
    clean = base.model_copy(update={"key_prefix": "clean"})
    append(clean, feedback)
    tick(clean)
    append(base, feedback[:2])
    store.xadd(records, {"r": b"\xff\xff"})
    append(base, feedback[2:5])
    # The unknown class names an item that nothing else does: no row may come of it.
    append(base, [Feedback("user-9", "item-of-no-class", "gift", START_MS)])
    append(base, feedback[5:])
    store.xadd(records, {"what": b"is this"})
    tick(base)
    last = append(base, [Feedback("user-9", "item-of-no-class", "gift", START_MS)] * 2)[-1]
    registry = CollectorRegistry()
    with trainer(base, registry=registry) as daemon:
        daemon.start()
        while daemon.step():
            pass
        weights = encode(daemon.learner.replica.write_all())
        append(base, feedback[:8])
        daemon.step()
    assert learn_all(clean) == weights
    assert [chain for _, chain, *_ in versions(base)][:2] == [chain for _, chain, *_ in versions(clean)]
    assert registry.get_sample_value("recsys_feedback_skipped_total", {"reason": "malformed"}) == 2
    assert registry.get_sample_value("recsys_feedback_skipped_total", {"reason": "unknown_class"}) == 3
    assert registry.get_sample_value("recsys_feedback_learned_total") == 19
    # All feedback that was accepted is gone past: 11 + 1, then 2 + 8.
    assert [(learned, added) for *_, learned, added in versions(base)] == [(9, 8), (12, 3), (22, 8)]
    assert head(base)[2] > last


# One trainer at a time


def test_a_second_daemon_fences_off_the_first(settings: Settings) -> None:
    base = small(settings)
    append(base, make_feedback(8))
    reference = fork(base, "reference")
    with trainer(base) as old, trainer(base) as new:
        old.start()
        old.step()
        new.start()
        append(base, make_feedback(9, 2, first=8))
        with pytest.raises(FencedOff, match="epoch 1 is not the current one"):
            old.step()
        assert head(base)[0] == 2
        new.step()
        assert head(base)[0] == 3
        with pytest.raises(FencedOff):
            old.step()
    fork(base, "reference")
    weights = learn_all(reference)
    assert held(base) == weights
    assert versions(base) == versions(reference)


# Restoring


@pytest.mark.parametrize("every_bytes", [1, 320_000, 1 << 30])
def test_a_restored_trainer_goes_on_bit_for_bit(settings: Settings, every_bytes: int) -> None:
    base = small(settings, snapshot_every_bytes=every_bytes, snapshots_retained=2, batches_per_version=1)
    reference = base.model_copy(update={"key_prefix": "reference", "snapshot_every_bytes": 1 << 30})
    for part in range(6):
        feedback = make_feedback(8, part, first=8 * part)
        append(base, feedback)
        learn_all(base)
    fork(base, "reference")
    assert learn_all(reference) == held(base)
    assert head(reference) == head(base)
    assert [chain for _, chain, *_ in versions(reference)][-len(versions(base)) :] == [
        chain for _, chain, *_ in versions(base)
    ]
    with connect(base) as client:
        store = WeightStore(client, base)
        newest = store.snapshot_versions()[0]
    # Version 1, then 12: with a snapshot of each, of some, of the first alone.
    assert newest == 13 if every_bytes == 1 else newest == 1 if every_bytes == 1 << 30 else newest > 1


@pytest.mark.parametrize("every_bytes", [1, 60_000])
def test_the_log_is_kept_as_far_back_as_replay_reaches(settings: Settings, every_bytes: int) -> None:
    base = small(settings, snapshot_every_bytes=every_bytes, snapshots_retained=2, replay_capacity=20)
    uncut = base.model_copy(update={"key_prefix": "uncut", "snapshot_every_bytes": 1 << 30})
    positions: list[str] = []
    trimmed = 0
    for part in range(8):
        positions += append(base, make_feedback(9, part, first=9 * part))
        with connect(base) as client:
            # Trimmed entries are kept for the trainer that never restarts.
            for key, fields in client.xrange("recsys:{log}:records"):
                if not client.xrange("uncut:{log}:records", key, key):
                    client.xadd("uncut:{log}:records", fields, id=key)
        learn_all(base)
        with connect(base) as client:
            oldest = WeightStore(client, base).snapshots()[-1]
            first = FeedbackLog(client, base).usage().first_position
        if oldest.window_position != "0-0":
            learned = positions.index(oldest.position) + 1
            assert oldest.window_position == positions[max(0, learned - 20)]
            assert first == oldest.window_position
            trimmed = positions.index(first)
    assert trimmed > 20
    assert learn_all(uncut) == held(base)
    assert head(uncut) == head(base)


def test_the_replay_window_is_rebuilt_past_feedback_that_was_not_learned(settings: Settings) -> None:
    """The window holds the last `replay_capacity` feedback learned, not read."""
    base = small(settings, replay_capacity=12)
    mixed = [
        one
        for number, feedback in enumerate(make_feedback(40))
        for one in ([feedback, Feedback("user-1", "item-1", "gift", START_MS)] if number % 3 == 0 else [feedback])
    ]
    append(base, mixed[:30])
    reference = fork(base, "reference")
    with trainer(base) as daemon, trainer(reference) as uninterrupted:
        for one in (daemon, uninterrupted):
            one.start()
            one.step()
        append(base, mixed[30:])
        fork(base, "reference")
        uninterrupted.step()
    assert learn_all(base) == held(reference)
    assert head(base) == head(reference)


def test_weights_without_a_beginning_are_refused(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    append(base, make_feedback(8))
    learn_all(base)
    store.delete(f"{base.key_prefix}:{{weights}}:snapshots", f"{base.key_prefix}:{{weights}}:deltas")
    with trainer(base) as daemon, pytest.raises(CorruptWeights):
        daemon.start()


def test_a_change_of_what_learning_depends_on_is_told(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    base = small(settings)
    learn_all(base)
    with caplog.at_level(logging.WARNING):
        learn_all(base.model_copy(update={"port": 1, "publish_seconds": 9.0}))
        assert not caplog.records
        learn_all(base.model_copy(update={"learning_rate": 0.5}))
    assert [record.message for record in caplog.records] == [
        "settings that learning depends on have changed since version 1"
    ]


# A store that fails


@pytest.mark.parametrize("fate", [CUT, DONE_AND_CUT])
def test_a_commit_whose_answer_is_lost_stands_once(settings: Settings, store: redis.Redis, fate: str) -> None:
    base = small(settings)
    append(base, make_feedback(16))
    reference = fork(base, "reference")
    weights = learn_all(reference)
    commit = script_sha(store, "commit.lua")
    failed = []

    def cut_second_commit(number: int, command: list[bytes]) -> str:
        if command[:2] == [b"EVALSHA", commit]:
            failed.append(number)
        return fate if len(failed) == 2 and failed[-1] == number else PASS

    registry = CollectorRegistry()
    with Proxy(base.redis_url) as proxy:
        proxy.fate = cut_second_commit
        through = base.model_copy(update={"redis_url": proxy.url})
        with trainer(through, registry=registry) as daemon:
            daemon.start()
            daemon.step()
            assert encode(daemon.learner.replica.write_all()) == weights
    # Version 2 was sent twice if it did not stand, and looked up if it did.
    assert len(failed) == (4 if fate == CUT else 3)
    assert versions(base) == versions(reference)
    assert held(base) == weights
    assert registry.get_sample_value("recsys_store_errors_total") == 1
    assert registry.get_sample_value("recsys_versions_committed_total") == 3


def test_every_command_may_fail_once(settings: Settings) -> None:
    """A trainer that lives through a failure goes on where it was, whichever command it hit."""
    base = small(settings, snapshot_every_bytes=1, snapshots_retained=1)
    append(base, make_feedback(9))
    tick(base)
    reference = fork(base, "reference")
    weights = learn_all(reference)
    with Proxy(base.redis_url) as proxy:
        learn_all(fork(base, "counted").model_copy(update={"redis_url": proxy.url}))
        names = list(proxy.commands)
        for bad in range(1, len(names) + 1):
            # What changes nothing is the same whether it was done or not.
            fate = (CUT, DONE_AND_CUT, TORN)[bad % 3]
            other = fork(base, f"bad-{bad}").model_copy(update={"redis_url": proxy.url})
            proxy.restart(lambda number, _, bad=bad, fate=fate: fate if number == bad else PASS)
            with trainer(other) as daemon:
                # As `run` does, without its pauses.
                daemon.stopping.wait = lambda timeout=None: False  # type: ignore[method-assign]
                started = False
                more = True
                while more:
                    with suppress(StoreUnavailable):
                        started = started or bool(daemon.start())
                        more = daemon.step()
            proxy.restart(lambda number, command: PASS)
            assert held(other) == weights, names[bad - 1]
            assert head(other) == head(reference)


@pytest.fixture
def own_store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    with EmbeddedStore(tmp_path / "store") as running:
        yield running


def test_a_store_that_restarts_costs_nothing(own_store: EmbeddedStore, settings: Settings) -> None:
    with Proxy(own_store.url) as proxy:
        base = small(settings, redis_url=own_store.url)
        through = base.model_copy(update={"redis_url": proxy.url, "publish_seconds": 0.02})
        registry = CollectorRegistry()
        with trainer(through, registry=registry, clock=count().__next__) as daemon:
            daemon.start()
            running = threading.Thread(target=daemon.run)
            running.start()
            try:
                append(base, make_feedback(21))
                wait_for(base, 21)
                own_store.stop()
                own_store.start()
                base = base.model_copy(update={"redis_url": own_store.url})
                proxy.port = int(own_store.url.rpartition(":")[2].partition("/")[0])
                append(base, make_feedback(30, 2, first=21))
                wait_for(base, 51)
            finally:
                daemon.stopping.set()
                running.join()
    reference = fork(base, "reference")
    assert learn_all(reference) == held(base)
    assert versions(reference) == versions(base)
    assert head(base)[3] == 51


# Stopping


def test_finish_publishes_what_waits(settings: Settings) -> None:
    base = small(settings)
    append(base, make_feedback(11))
    with trainer(base) as daemon:
        daemon.start()
        daemon.step()
        assert head(base)[3] == 8
        daemon.finish()
        assert head(base)[3] == 11
        daemon.finish()
    assert ticks(base) == 1
    reference = fork(base, "reference")
    assert learn_all(reference) == held(base)


def test_run_finishes_when_told_to_stop(settings: Settings) -> None:
    base = small(settings, publish_seconds=3600.0)
    append(base, make_feedback(3))
    with trainer(base) as daemon:
        daemon.start()
        daemon.step()
        daemon.stopping.set()
        daemon.run()
    assert head(base)[3] == 3


def test_finish_leaves_a_backlog_to_the_next_trainer(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.daemon.READ_COUNT", 5)
    base = small(settings)
    append(base, make_feedback(11))
    with trainer(base) as daemon:
        daemon.start()
        daemon.step()
        daemon.finish()
    assert ticks(base) == 0
    assert head(base)[3] == 0


@pytest.mark.parametrize("fate", [CUT, DONE_AND_CUT])
def test_stopping_while_a_commit_fails_leaves_whole_versions(settings: Settings, store: redis.Redis, fate: str) -> None:
    """The store fails one commit of a trainer that is stopping, then answers again: no row may be missing."""
    base = small(settings)
    append(base, make_feedback(8))
    commit = script_sha(store, "commit.lua")
    with Proxy(base.redis_url) as proxy:
        through = base.model_copy(update={"redis_url": proxy.url})
        with trainer(through) as daemon:
            daemon.start()
            daemon.step()  # version 2
            append(base, make_feedback(8, 2, first=8))
            failed: list[int] = []

            def fail_once(number: int, command: list[bytes]) -> str:
                if command[:2] == [b"EVALSHA", commit] and not failed:
                    failed.append(number)
                    return fate
                return PASS

            proxy.fate = fail_once
            step = daemon.step

            def stop_then_step(wait_seconds: float = 0.0) -> bool:
                daemon.stopping.set()
                return step(wait_seconds)

            daemon.step = stop_then_step  # type: ignore[method-assign]
            daemon.run()
    assert failed
    learn_all(base)
    reference = fork(base, "reference")
    assert learn_all(reference) == held(base)
    assert head(reference) == head(base)


def test_freshness_is_observed_once_for_each_feedback(settings: Settings) -> None:
    base = small(settings)
    registry = CollectorRegistry()
    append(base, make_feedback(19))
    tick(base)
    with trainer(base, registry=registry) as daemon:
        daemon.start()
        while daemon.step():
            pass
    for stage in ("accepted_to_read", "read_to_learned", "learned_to_committed"):
        assert registry.get_sample_value("recsys_freshness_seconds_count", {"stage": stage}) == 19
    with connect(base) as client:
        records = WeightStore(client, base).versions(100)
    accepted = [ms for record in reversed(records) for ms in record.accepted_ms]
    assert accepted == [entry.accepted_ms for entry in entries(base) if not entry.tick]


def test_backlog_is_shown(settings: Settings) -> None:
    base = small(settings)
    registry = CollectorRegistry()
    append(base, make_feedback(11))
    clock = count()
    with trainer(
        base.model_copy(update={"publish_seconds": 1e9}), registry=registry, clock=lambda: float(next(clock))
    ) as daemon:
        assert isinstance(daemon, Daemon)
        daemon.start()
        daemon.step()
        assert registry.get_sample_value("recsys_feedback_backlog") == 3
        assert registry.get_sample_value("recsys_feedback_log_records") == 11


def test_a_log_that_is_nearly_full_is_trimmed_to_the_replay_window(settings: Settings, store: redis.Redis) -> None:
    base = small(settings, replay_capacity=10, snapshots_retained=3)
    with trainer(base) as daemon:
        daemon.start()
        append(base, make_feedback(60))
        tick(base)
        while daemon.step():
            pass
    used = FeedbackLog(store, base).usage()
    assert used.records == 60, "no snapshot since the first: all of it is kept"
    with trainer(base.model_copy(update={"log_max_bytes": used.bytes})) as daemon:
        daemon.start()
        daemon.step()
    assert FeedbackLog(store, base).usage().records == 10


def test_a_batch_that_is_not_finite_is_not_replayed_after_a_restart_either(settings: Settings) -> None:
    base = small(settings, gate=False)
    with trainer(base) as daemon:
        daemon.start()
        append(base, make_feedback(8))
        tick(base)
        while daemon.step():
            pass
        spoiled = make_feedback(4, 2, first=8)
        append(base, spoiled)
        row = daemon.learner.table.row(spoiled[0].item_id) or 1
        kept = daemon.learner.table.columns["vector"][row].clone()
        daemon.learner.table.columns["vector"][row] = float("inf")
        daemon.step()
        daemon.learner.table.columns["vector"][row] = kept
        append(base, make_feedback(8, 3, first=12))
        tick(base)
        while daemon.step():
            pass
        window = len(daemon.learner.window)
    with trainer(base) as again:
        again.start()
        assert len(again.learner.window) == window < 20
