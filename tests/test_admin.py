"""What people decide and look into: rollback, pause, versions one by one, verification and rebuilding."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import redis
import torch
from learning import CPU, append, held, make_feedback, small, tick, trainer
from serving import Loop

from recsys.cli import main
from recsys.client import AsyncClient, Client
from recsys.errors import InvalidInput, NotRetained, OtherVersionCameFirst
from recsys.quarantine import Quarantine
from recsys.server import Server, assemble
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import Lineage, WeightPayload, WeightStore, encode
from recsys.weights.earlier import ATTEMPTS, put_together, roll_back
from recsys.weights.replica import Replica
from trainer.daemon import Daemon

SECONDS = 30


@dataclass
class System:
    """A server with its real scorer and follower, and a trainer to be stepped."""

    client: Client
    daemon: Daemon
    target: str
    settings: Settings

    @property
    def store(self) -> WeightStore:
        return self.daemon.store

    def learn(self, count: int, first: int = 0) -> int:
        """Learn new feedback; return the last version."""
        append(self.settings, make_feedback(count, seed=first + 1, first=first))
        tick(self.settings)
        while self.daemon.step():
            pass
        return self.last()

    def last(self) -> int:
        head = self.store.head()
        assert head is not None
        return int(head.version)

    def answered_by(self, version: int) -> bool:
        """Ask until an answer comes from `version`; False when none does in time."""
        for _ in range(2000):
            if self.client.recommend("user-1").version == version:
                return True
            threading.Event().wait(0.005)
        return False


@pytest.fixture
def system(settings: Settings) -> Iterator[System]:
    quick = small(settings, drain_seconds=0.05)
    loop = Loop(quick)
    try:
        with trainer(quick) as daemon:
            daemon.start()
            server = Server(quick, assemble(quick))
            loop.run(server.start())
            try:
                loop.run(server.serving())
                target = f"127.0.0.1:{server.port}"
                with Client(target, timeout=SECONDS) as client:
                    yield System(client, daemon, target, quick)
            finally:
                loop.run(server.stop())
    finally:
        loop.close()


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command and read the one object that it prints."""

    def run(*arguments: str, code: int = 0) -> Any:
        assert main([*arguments, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


@contextmanager
def working(daemon: Daemon) -> Iterator[None]:
    """Let the trainer run in a thread of its own."""
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        yield
    finally:
        daemon.stopping.set()
        thread.join()


# --- Rollback


def test_answers_come_from_the_version_that_a_rollback_makes(system: System) -> None:
    good = system.learn(12)
    record, served, _ = put_together(system.store, good)
    bad = system.learn(12, first=12)
    made = system.client.rollback(good, "went wrong")
    assert (made.version, made.kind, made.restored_version, made.reason) == (bad + 1, "rollback", good, "went wrong")
    assert (made.parent, made.feedback_added, made.feedback_learned) == (bad, 0, record.feedback_learned + 12)
    assert [part.after for part in made.set_aside] == [record.position]
    assert system.answered_by(made.version)
    assert held(system.settings) == encode(served)
    # Asked again, as a client does whose answer was lost: it is done already.
    assert system.client.rollback(good).version == made.version
    assert system.learn(8, first=24) > made.version
    assert not system.client.status().learning_paused


def test_a_rollback_stands_while_a_trainer_is_at_work(system: System) -> None:
    good = system.learn(12) - 1
    append(system.settings, make_feedback(600, seed=5, first=12))
    with working(system.daemon):
        made = system.client.rollback(good)
        assert system.answered_by(made.version) or system.client.status().version > made.version
    versions = {version.version: version for version in system.client.versions()}
    assert versions[made.version].restored_version == good
    assert not system.store.paused()


def test_what_cannot_be_rolled_back_to_is_told(system: System) -> None:
    last = system.learn(4)
    for version in (last, last + 5):
        with pytest.raises(NotRetained, match=f"version {version} is .*retained are 1 to {last}"):
            system.client.rollback(version)
    with pytest.raises(InvalidInput, match="version: is 0"):
        system.client.rollback(0)
    with pytest.raises(InvalidInput, match="reason: is 1001 bytes long"):
        system.client.rollback(1, "é" * 500 + "!")
    with pytest.raises(NotRetained, match=f"version {last + 1} is not retained"):
        system.client.version(last + 1)
    with pytest.raises(InvalidInput, match="version: is -1"):
        system.client.version(-1)


def test_a_rollback_gives_up_when_others_always_come_first(system: System) -> None:
    system.learn(12)
    system.learn(12, first=12)

    class Crowded(WeightStore):
        tries = 0

        def commit(self, *arguments: Any) -> Any:
            self.tries += 1
            raise OtherVersionCameFirst("again")

    with connect(system.settings) as client:
        crowded = Crowded(client, system.settings)
        with pytest.raises(OtherVersionCameFirst, match=f"{ATTEMPTS} times"):
            roll_back(crowded, Quarantine(client, system.settings), 1, "", 0)
        assert crowded.tries == ATTEMPTS
        assert not crowded.paused()


def _commit(store: WeightStore, parent: int, served: WeightPayload, own: WeightPayload) -> int:
    lineage = Lineage(f"{parent + 1}-0", parent + 1, 1, "", {}, (), 0)
    return int(store.commit(store.epoch(), parent, encode(served), encode(own), lineage).version)


def test_any_version_is_restored_from_any_other_whatever_items_each_has(settings: Settings) -> None:
    """Versions that grow, rows that are passed on, and rollbacks that shrink: followers end where the version stood."""
    base = small(settings)
    with connect(base) as client:
        store = WeightStore(client, base)
        store.acquire()
        followed, made = Replica(base, CPU), Replica(base, CPU)
        # Enough of them that what changed costs less than everything.
        made.table.allocate(f"item-{number}" for number in range(5000))
        stood: dict[int, bytes] = {}
        every = np.arange(made.table.rows, dtype=np.int32)
        own = WeightPayload(whole=True, columns={"own": np.zeros(len(every), np.float32)}, rows=every)
        last = _commit(store, 0, made.write_all(), own)
        draw = np.random.default_rng(1)

        def follow() -> None:
            for delta in store.read_after(last - 1):
                followed.apply(delta.payload)
            stood[last] = encode(followed.write_all())

        follow()
        for turn in range(40):
            if turn % 4 == 3:
                wanted = int(draw.integers(1, last))
                last = int(roll_back(store, Quarantine(client, base), wanted, "", 0).version)
                follow()
                assert stood[last] == stood[wanted]
                made.apply(put_together(store, last)[1])
                assert encode(made.write_all()) == stood[last]
                assert len(put_together(store, last)[2].rows) == made.table.rows
                continue
            ids = list(made.table.item_ids)
            gone = np.unique(draw.integers(1, 60, 3 * int(draw.integers(0, 2))))
            made.table.remove(gone[~np.isin(gone, made.table.free_rows)])
            # Some of those that were gone come back.
            coming = draw.integers(-80, 80, int(draw.integers(0, 6)))
            made.table.allocate(f"item-{number}" for number in coming.tolist())
            named = [row for row, item_id in enumerate(made.table.item_ids) if ids[row : row + 1] != [item_id]]
            used = np.flatnonzero(np.array(made.table.item_ids, bool))
            rows = torch.from_numpy(np.union1d(draw.choice(used, 2), named).astype(np.int64))
            made.table.columns["vector"][rows] += 1.0
            made.table.clock += 1
            served = made.write(rows, [(made.table.item_ids[row], row) for row in named])
            last = _commit(
                store, last, served, WeightPayload({}, served.rows, {"own": np.ones(len(served.rows), np.float32)})
            )
            follow()


# --- Pause


def test_learning_is_paused_and_goes_on(system: System) -> None:
    system.learn(4)
    system.client.pause_learning()
    assert system.client.status().learning_paused
    before = system.last()
    assert system.learn(8, first=4) == before
    assert system.client.status().backlog == 8
    # A hold is for the moment of a rollback; it ends without ending the pause.
    system.store.hold(30)
    system.store.hold(0)
    assert system.client.status().learning_paused
    system.client.resume_learning()
    assert not system.client.status().learning_paused
    assert system.learn(0) > before
    assert system.client.status().backlog == 0


def test_the_asyncio_client_decides_too(system: System) -> None:
    last = system.learn(12)

    async def decide() -> tuple[Any, ...]:
        async with AsyncClient(system.target, timeout=SECONDS) as client:
            await client.pause_learning()
            paused = (await client.status()).learning_paused
            await client.resume_learning()
            made = await client.rollback(last - 1, "async")
            return paused, made, await client.version(made.version)

    paused, made, shown = asyncio.run(decide())
    assert paused
    assert (shown.version, shown.reason, shown.restored_version) == (last + 1, "async", last - 1)
    assert made == shown


# --- Status and versions


def test_status_and_versions_tell_what_is_retained(system: System) -> None:
    last = system.learn(12)
    status = system.client.status()
    assert (status.retained_versions_from, status.snapshots) == (1, 1)
    assert status.retained_bytes == system.store.usage() > 0
    found = list(system.client.versions())
    # The first has a snapshot and no delta any more.
    assert [version.version for version in found] == list(range(last, 0, -1))
    assert [version.version for version in found if version.snapshot] == [1]
    for version in found:
        assert system.client.version(version.version) == version
        assert (version.kind, version.restored_version, version.parent) == ("learned", 0, version.version - 1)
        assert version.settings_digest == system.settings.learning_digest()
        assert version.trainer_bytes > 0


# --- The command line


def test_rollback_pause_and_versions_from_the_command_line(
    system: System, output: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    good = system.learn(12)
    bad = system.learn(6, first=12)
    at = ["--server", system.target]
    assert output("pause", *at) == {"learning_paused": True}
    assert output("status", *at)["learning_paused"] is True
    assert output("resume", *at) == {"learning_paused": False}
    assert main(["rollback", str(good), *at]) == 2
    assert "nobody can be asked here; give --yes" in capsys.readouterr().err
    assert main(["rollback", str(good), "--reason", "too [bold]", "--yes", *at]) == 0
    shown = capsys.readouterr().out
    assert f"version {bad + 1} has the content of version {good}; 6 feedback are set aside" in shown
    found = output("versions", "show", str(bad + 1), *at)
    assert (found["kind"], found["restored_version"], found["reason"]) == ("rollback", good, "too [bold]")
    assert len(found["set_aside"]) == 1
    # Of one version more is told: which part of the log it learned, and how good the one before was found.
    assert (found["records"]["until"], len(found["metrics_before"])) == (found["position"], len(found["metrics"]))
    listed = {name: value for name, value in found.items() if name not in ("records", "metrics_before")}
    assert output("versions", *at)["versions"][0] == listed
    assert main(["versions", *at]) == 0
    table = capsys.readouterr().out
    assert f"rollback to {good}" in table
    assert "too [bold]" in table
    assert main(["versions", *at, "show", str(bad + 1)]) == 0
    assert found["chain"] in capsys.readouterr().out
    assert main(["versions", "show", "1000", *at]) == 1
    assert "version 1000 is not retained" in capsys.readouterr().err
    assert main(["pause", *at]) == main(["resume", *at]) == main(["status", *at]) == 0


def _at(settings: Settings) -> list[str]:
    names: tuple[str, ...] = (
        "redis_url",
        "dimension",
        "history_length",
        "heads",
        "successors",
        "context_buckets",
        "batch_size",
    )
    names += ("batch_growth", "replay_size", "replay_every", "replay_capacity", "negatives", "batches_per_version")
    names += ("device",)
    flags = [(f"--{name.replace('_', '-')}", str(getattr(settings, name))) for name in names]
    return [text for flag in flags for text in flag]


@pytest.fixture
def learned(settings: Settings) -> Settings:
    """Settings of a store with some versions and several snapshots."""
    quick = small(settings, snapshot_every_bytes=1 << 19)
    with trainer(quick) as daemon:
        daemon.start()
        for turn in range(9):
            append(quick, make_feedback(6, seed=turn, first=6 * turn))
            tick(quick)
            while daemon.step():
                pass
    return quick


def test_verify_finds_every_kind_of_damage(
    learned: Settings, store: redis.Redis, output: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = WeightStore(store, learned)
    found = output("verify", *_at(learned))
    assert found["problems"] == []
    assert found["versions"] == len(weights.versions(1000))
    assert found["snapshots"] == len(weights.snapshots()) > 1
    assert found["bytes"] == weights.usage()
    seen: list[tuple[int, int]] = []
    weights.verify(lambda done, of: seen.append((done, of)))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    last = weights.versions(1)[0].version
    for kind, of in (
        ("chunk:w", f"version {last}"),
        ("snapshot:t", f"snapshot of version {max(weights.snapshot_versions())}"),
    ):
        version = of.rpartition(" ")[2]
        (key,) = store.keys(f"recsys:{{weights}}:{kind}:{version}:*:0")
        whole = store.get(key)
        store.set(key, bytes([whole[0] ^ 1]) + whole[1:])
        (problem,) = output("verify", *_at(learned), code=1)["problems"]
        assert problem.startswith(f"{of}: the checksum of ")
        store.delete(key)
        (problem,) = output("verify", *_at(learned), code=1)["problems"]
        assert problem == f"{of}: chunk 1 of 1 is gone"
        store.set(key, whole)
    # A version out of the middle.
    store.xdel("recsys:{weights}:deltas", f"{last - 1}-0")
    gone = output("verify", *_at(learned), code=1)["problems"]
    assert gone == [f"version {last} of parent {last - 1} follows version {last - 2}"]
    store.delete("recsys:{weights}:head")
    assert main(["verify", *_at(learned)]) == 1
    assert "there are versions, and none is the last" in capsys.readouterr().out


def test_verify_of_an_empty_store_finds_nothing(settings: Settings, output: Callable[..., Any]) -> None:
    found = output("verify", "--redis-url", settings.redis_url)
    assert found == {"versions": 0, "snapshots": 0, "bytes": 0, "problems": []}


def test_rebuild_compares_bit_for_bit(
    learned: Settings, store: redis.Redis, output: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    head = WeightStore(store, learned).head()
    assert head is not None
    arguments = ["rebuild", "--version", str(head.version), *_at(learned)]
    found = output(*arguments)
    assert (found["version"], found["equal"], found["different"]) == (head.version, True, [])
    assert found["from_version"] < head.version
    assert found["feedback"] > 0
    other = output(*arguments, "--seed", "9", code=1)
    assert (other["equal"], other["different"][-1]) == (False, head.version)
    assert "equal" not in output(*arguments, "--seed", "9", "--no-verify")
    assert main(arguments) == 0
    assert "from_version" in capsys.readouterr().out
    assert main(["rebuild", "--version", "1000", *_at(learned)]) == 1
    assert "retained" in capsys.readouterr().err
