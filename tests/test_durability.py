"""Durability: feedback is acknowledged only when it is where the settings say, and repeated otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from learning import Proxy
from stores import OwnStore
from test_redis import find_server

from recsys.errors import NotDurable, SettingsError, StoreUnavailable
from recsys.feedback import Feedback
from recsys.feedback_log import BEGINNING, FeedbackLog
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.durability import Durability, check_durability
from recsys.store.embedded import EmbeddedStore

FEEDBACK = [Feedback("u", f"item-{number}", "click", 1000, feedback_id=f"f{number}") for number in range(3)]
SHORT_SECONDS = 0.5


def at(url: str, durability: str, **changes: object) -> Settings:
    given = {"redis_url": url, "durability": durability, "port": 0, "metrics_port": 0, **changes}
    return load(given, environment={})


@pytest.fixture
def own(tmp_path: Path) -> Iterator[OwnStore]:
    with OwnStore(tmp_path / "store") as running:
        yield running


def duplicates(settings: Settings) -> list[bool]:
    with connect(settings) as client:
        return [each.duplicate for each in FeedbackLog(client, settings).append(FEEDBACK)]


@pytest.mark.parametrize(("durability", "sent"), [("memory", []), ("disk", [b"WAITAOF"]), ("replica", [b"WAIT"])])
def test_one_wait_per_batch_in_the_same_round_trip(own: OwnStore, durability: str, sent: list[bytes]) -> None:
    with Proxy(own.url) as proxy:
        settings = at(proxy.url, durability, durable_replicas=1, store_timeout_seconds=SHORT_SECONDS)
        with connect(settings) as client:
            feedback_log = FeedbackLog(client, settings)
            for _ in range(2):
                try:
                    feedback_log.append(FEEDBACK)
                except NotDurable:
                    assert durability == "replica"
                seen = list(proxy.commands)
                proxy.restart(proxy.fate)
    # The script is known by now, and the store was asked what it can do.
    assert seen == [b"EVALSHA", *sent]


def test_what_is_not_on_disk_in_time_is_not_acknowledged_and_safely_repeated(own: OwnStore) -> None:
    settings = at(own.url, "disk", store_timeout_seconds=SHORT_SECONDS)
    assert duplicates(settings) == [False] * 3
    with own.client() as client:
        client.config_set("appendfsync", "no")
        client.delete("recsys:{log}:records")
        for key in client.keys("recsys:{log}:id:*"):
            client.delete(key)
        with pytest.raises(NotDurable, match=r"not on its disk within 0\.375 s"):
            duplicates(settings)
        # It stands in memory; that it is a duplicate does not make it durable.
        with pytest.raises(NotDurable):
            duplicates(settings)
        client.config_set("appendfsync", "everysec")
        assert duplicates(settings.model_copy(update={"store_timeout_seconds": 5.0})) == [True] * 3
        assert len(FeedbackLog(client, settings).read_after(BEGINNING, 100)) == 3


def test_a_store_without_a_file_is_refused_at_once_and_later(own: OwnStore) -> None:
    settings = at(own.url, "disk")
    assert duplicates(settings) == [False] * 3
    with connect(settings) as client:
        feedback_log = FeedbackLog(client, settings)
        feedback_log.append(FEEDBACK)
        client.config_set("appendonly", "no")
        with pytest.raises(NotDurable, match="appendonly is disabled"):
            feedback_log.append(FEEDBACK)
        with pytest.raises(SettingsError, match=r"durability: .*appendonly is disabled"):
            check_durability(client, settings)


def test_a_store_that_forgot_the_script_is_taught_again(own: OwnStore) -> None:
    settings = at(own.url, "disk")
    with connect(settings) as client:
        feedback_log = FeedbackLog(client, settings)
        feedback_log.append(FEEDBACK)
        client.script_flush()
        assert [each.duplicate for each in feedback_log.append(FEEDBACK)] == [True] * 3


def test_a_store_that_is_away_is_asked_before_the_first_write(own: OwnStore, caplog: pytest.LogCaptureFixture) -> None:
    settings = at(own.url, "disk", store_timeout_seconds=SHORT_SECONDS)
    with connect(settings) as client:
        feedback_log = FeedbackLog(client, settings)
        own.kill()
        check_durability(client, settings)
        assert "not checked yet" in caplog.text
        with pytest.raises(StoreUnavailable):
            feedback_log.append(FEEDBACK)
        own.start()
        with own.client() as plain:
            plain.config_set("appendonly", "no")
            with pytest.raises(SettingsError):
                feedback_log.append(FEEDBACK)
            assert plain.keys() == []


@pytest.mark.parametrize(("flush", "fits"), [("always", True), ("everysec", False)])
def test_an_older_store_must_flush_before_it_answers(tmp_path: Path, flush: str, fits: bool) -> None:
    with OwnStore(tmp_path, program=find_server(), appendfsync=flush) as older:
        settings = at(older.url, "disk")
        with connect(settings) as client:
            if tuple(map(int, client.info("server")["redis_version"].split(".")[:2])) >= (7, 2):
                pytest.skip("this Redis has WAITAOF")
            if fits:
                assert duplicates(settings) == [False] * 3
            else:
                with pytest.raises(SettingsError, match="has appendonly yes and appendfsync everysec"):
                    check_durability(client, settings)


def test_feedback_waits_for_replicas(own: OwnStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = at(own.url, "replica", store_timeout_seconds=SHORT_SECONDS)
    with connect(settings) as client:
        check_durability(client, settings)
    assert "1 replicas are asked for and 0 connected" in caplog.text
    with pytest.raises(NotDurable, match="only 0 of 1 replicas"):
        duplicates(settings)
    replicaof = {"replicaof": f"127.0.0.1 {own.port}", "repl-diskless-sync-delay": "0"}
    with OwnStore(tmp_path / "replica", **replicaof) as replica, own.client() as client, replica.client() as copy:
        while "online" not in str(client.info("replication").get("slave0")):
            pass
        patient = settings.model_copy(update={"store_timeout_seconds": 10.0})
        assert duplicates(patient) == [True] * 3
        assert len(FeedbackLog(copy, settings).read_after(BEGINNING, 100)) == 3
        replica.freeze()
        with pytest.raises(NotDurable):
            duplicates(settings)
        replica.thaw()
        assert duplicates(patient) == [True] * 3


def test_the_embedded_store_flushes_as_asked(tmp_path: Path) -> None:
    settings = load({"data_dir": tmp_path}, environment={})
    for durability, flush in (("memory", "everysec"), ("disk", "always")):
        asked = settings.model_copy(update={"durability": durability})
        with EmbeddedStore.of(asked) as store, connect(at(store.url, durability)) as client:
            assert client.config_get("appendfsync") == {"appendfsync": flush}
            Durability(client, asked).check()
    with pytest.raises(SettingsError, match="durability: replica needs a store of your own"):
        EmbeddedStore.of(settings.model_copy(update={"durability": "replica"}))
