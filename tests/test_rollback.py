"""Earlier versions: put together again, put in force again, rebuilt from the log and compared bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis
from learning import CPU, append, make_feedback, small, tick
from prometheus_client import CollectorRegistry

from recsys.cli.app import main
from recsys.errors import CorruptWeights, NotRetained
from recsys.quarantine import Quarantine
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import WeightStore, encode
from recsys.weights.earlier import put_together, roll_back
from recsys.weights.repair import repair
from recsys.weights.replica import Replica
from trainer.daemon import Daemon
from trainer.metrics import TrainerMetrics
from trainer.rebuild import Rebuild


@contextmanager
def daemon(settings: Settings) -> Iterator[Daemon]:
    """A started daemon."""
    made = Daemon(settings, TrainerMetrics(CollectorRegistry()), CPU, clock=lambda: 0.0)
    try:
        made.start()
        yield made
    finally:
        made.close()


def learn(made: Daemon, count: int, first: int = 0) -> None:
    """Append feedback and a tick, and learn them."""
    append(made.settings, make_feedback(count, 1, first=first))
    tick(made.settings)
    while made.step():
        pass


def weights_of(made: Daemon) -> bytes:
    """All that servers see, as bytes."""
    return encode(made.learner.replica.write_all())


def test_a_version_is_put_together_from_snapshot_and_deltas(settings: Settings) -> None:
    base = small(settings).model_copy(update={"snapshot_every_bytes": 1 << 16})
    stood: dict[int, bytes] = {}
    with daemon(base) as made, connect(base) as client:
        store = WeightStore(client, base)
        for turn in range(6):
            learn(made, 8, first=8 * turn)
            head = store.head()
            assert head is not None
            stood[head.version] = weights_of(made)
        kept = {v: w for v, w in stood.items() if v >= min(store.snapshot_versions())}
        assert len(kept) > 2
        for version, bytes_ in kept.items():
            record, served, own = put_together(store, version)
            assert record.version == version
            assert encode(served) == bytes_
            replica = Replica(base, CPU)
            replica.apply(served)
            assert encode(replica.write_all()) == bytes_
            assert own.whole
        with pytest.raises(NotRetained, match=f"version {max(stood) + 1} is not retained; retained are"):
            put_together(store, max(stood) + 1)


def test_a_rollback_restores_the_content_as_a_new_version_and_learning_goes_on_behind_it(settings: Settings) -> None:
    base = small(settings)
    with daemon(base) as made, connect(base) as client:
        store = WeightStore(client, base)
        learn(made, 12)
        good, good_head = weights_of(made), store.head()
        learn(made, 12, first=12)
        bad_head = store.head()
        assert good_head is not None
        assert bad_head is not None
        record = roll_back(store, Quarantine(client, base), good_head.version, "went wrong", 5)
        assert (record.version, record.kind, record.restored_version) == (
            *(bad_head.version + 1, "rollback", good_head.version),
        )
        assert (record.position, record.reason) == (bad_head.position, "went wrong")
        assert [(part.after, part.until) for part in record.set_aside] == [(good_head.position, bad_head.position)]
        assert encode(put_together(store, record.version)[1]) == good
        # The trainer at work meets the new version at its next commit and goes on from it.
        learn(made, 8, first=24)
        while made.step():
            pass
        head = store.head()
        assert head is not None
        assert head.version > record.version
        assert head.feedback_learned == bad_head.feedback_learned + 8
        went_on = weights_of(made)
    with daemon(base) as again:
        assert weights_of(again) == went_on
        learn(again, 6, first=32)
        after = weights_of(again)
    with daemon(base) as third:
        assert weights_of(third) == after
    with connect(base) as client:
        last = WeightStore(client, base).head()
        assert last is not None
        assert Rebuild(client, base, CPU).run(last.version).equal


def test_rolling_back_to_what_is_in_force_or_gone_is_refused(settings: Settings) -> None:
    base = small(settings)
    with daemon(base) as made, connect(base) as client:
        store = WeightStore(client, base)
        learn(made, 4)
        for version in (2, 3):
            with pytest.raises(NotRetained):
                roll_back(store, Quarantine(client, base), version, "", 0)


@pytest.mark.parametrize("replay_capacity", [5, 1000])
def test_every_version_is_rebuilt_bit_for_bit(settings: Settings, replay_capacity: int) -> None:
    base = small(settings).model_copy(update={"replay_capacity": replay_capacity, "snapshot_every_bytes": 1 << 17})
    with daemon(base) as made, connect(base) as client:
        for turn in range(7):
            learn(made, 5, first=5 * turn)
        store, rebuild = WeightStore(client, base), Rebuild(client, base, CPU)
        head = store.head()
        assert head is not None
        for version in range(min(store.snapshot_versions()) + 1, head.version + 1):
            seen: list[tuple[int, int]] = []
            rebuilt = rebuild.run(version, lambda done, of, seen=seen: seen.append((done, of)))
            assert rebuilt.equal
            assert rebuilt.version == version
            assert seen[-1] == (rebuilt.versions, rebuilt.versions)


@pytest.mark.parametrize("part", ["chunk:w", "chunk:t", "snapshot:w"])
def test_after_a_repair_all_is_learned_again_from_the_newest_whole_version(
    settings: Settings, store: redis.Redis, part: str
) -> None:
    base = small(settings)
    weights = WeightStore(store, base)
    with daemon(base) as made:
        for turn in range(5):
            learn(made, 8, first=8 * turn)
        good, head = weights_of(made), weights.head()
    assert head is not None
    whole = head.version if part == "snapshot:w" else head.version - 2
    damaged = weights.snapshot_versions()[-1] if part == "snapshot:w" else whole + 1
    if part == "snapshot:w":
        weights.write_snapshot(weights.acquire(), head.version, *map(encode, put_together(weights, head.version)[1:]))
        damaged = head.version
    (key,) = store.scan_iter(f"{base.key_prefix}:{{weights}}:{part}:{damaged}:*")
    store.setrange(key, 100, b"damage")
    assert weights.verify().problems
    if part != "snapshot:w":
        with pytest.raises(CorruptWeights, match=r"the checksum .* `recsys verify --repair`"), daemon(base):
            pass
    record = repair(weights, 5)
    assert weights.verify().problems == []
    assert weights.snapshot_versions() == [record.version]
    if part == "snapshot:w":
        assert record == head
    else:
        assert (record.version, record.kind, record.restored_version) == (head.version + 1, "repair", whole)
        assert "were damaged" in record.reason
        assert record.feedback_learned == head.feedback_learned - 16
    with daemon(base) as again:
        while again.step():
            pass
        assert weights_of(again) == good, "the log gives the same weights again"
    after = weights.head()
    assert after is not None
    assert (after.feedback_learned, after.position) == (head.feedback_learned, head.position)


def test_the_command_repairs_only_what_is_wrong(
    settings: Settings, store: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    base = small(settings)
    command = ["verify", "--repair", "--yes", "--json", "--redis-url", base.redis_url]
    with daemon(base) as made:
        learn(made, 8)
        learn(made, 8, first=8)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["repair"] == {}
    head = WeightStore(store, base).head()
    assert head is not None
    for key in store.scan_iter(f"{base.key_prefix}:{{weights}}:chunk:w:{head.version}:*"):
        store.delete(key)
    assert main(command[:1] + command[3:]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == [problem]
    assert told["repair"] == {"version": head.version + 1, "restored_version": head.version - 1, "left": []}


def test_where_nothing_is_whole_nothing_is_repaired(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    weights = WeightStore(store, base)
    with pytest.raises(NotRetained, match="there are no versions yet"):
        repair(weights, 0)
    with daemon(base) as made:
        learn(made, 8)
    for key in store.scan_iter(f"{base.key_prefix}:{{weights}}:*:w:1:*"):
        store.delete(key)
    before = weights.head()
    with pytest.raises(NotRetained, match="no version is whole"):
        repair(weights, 0)
    assert weights.head() == before
    assert not weights.paused()


def test_a_rebuild_with_other_settings_comes_out_otherwise(settings: Settings) -> None:
    base = small(settings)
    with daemon(base) as made, connect(base) as client:
        learn(made, 8)
        learn(made, 8, first=8)
        other = base.model_copy(update={"learning_rate": base.learning_rate * 2})
        assert Rebuild(client, base, CPU).run(3).different == ()
        assert Rebuild(client, other, CPU).run(3).different == (2, 3)


def test_while_paused_nothing_is_learned_and_nothing_lost(settings: Settings) -> None:
    base = small(settings)
    with daemon(base) as made, connect(base) as client:
        store = WeightStore(client, base)
        store.pause(True)
        append(base, make_feedback(6, 1))
        tick(base)
        assert not made.step()
        head = store.head()
        assert head is not None
        assert head.version == 1
        store.pause(False)
        while made.step():
            pass
        head = store.head()
        assert head is not None
        assert head.feedback_learned == 6
