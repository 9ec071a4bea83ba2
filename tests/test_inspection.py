"""inspection: what a real store says of its memory, and one that keeps it to itself."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

import redis
from stores import OwnStore

from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.inspection import APPEND_ONLY, DUMP, FILES, REWRITE, files, inspect, memory


def test_memory_and_its_bound_are_what_the_store_says(store: redis.Redis) -> None:
    store.config_set("maxmemory", 1 << 30)
    try:
        used, bound = memory(store)
        assert bound == 1 << 30
        assert 0 < used < bound
        store.set("a", bytes(4 << 20))
        assert memory(store)[0] > used + (4 << 20)
    finally:
        store.config_set("maxmemory", 0)
    assert memory(store)[1] == inspect(store).max_memory == 0


def test_a_store_that_lets_nobody_ask_stops_nothing(settings: Settings, store: redis.Redis) -> None:
    store.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "-info")
    try:
        url = settings.redis_url.replace("redis://", "redis://app:secret@")
        with connect(settings.model_copy(update={"redis_url": url})) as client:
            assert all(map(math.isnan, memory(client)))
            found = files(client)
            assert {*found.written} == {*FILES}
            told = [*found.written.values(), found.append_only_bytes, found.free_bytes]
            assert all(map(math.isnan, told))
    finally:
        store.execute_command("ACL", "DELUSER", "app")


def rewrite(client: redis.Redis) -> None:
    client.bgrewriteaof()
    while client.info("persistence")["aof_rewrite_in_progress"] or client.info("persistence")["aof_rewrite_scheduled"]:
        pass


def test_files_are_told_of_and_the_room_where_they_are(tmp_path: Path) -> None:
    with OwnStore(tmp_path / "store", save="3600 1000000") as own, own.client() as client:
        before = files(client)
        assert before.written == dict.fromkeys(FILES, 1.0)
        kept = os.urandom(4 << 20)
        client.set("a", kept)
        after = files(client)
        assert after.append_only_bytes > before.append_only_bytes + (4 << 20)
        assert abs(after.free_bytes - shutil.disk_usage(tmp_path).free) < 1 << 30
        rewrite(client)
        assert files(client).written == dict.fromkeys(FILES, 1.0)
        client.set("b", os.urandom(4 << 20))
        own.fill_disk()
        # Half of it is in one file, and half in another: together they are too much for one.
        rewrite(client)
        assert files(client).written == {APPEND_ONLY: 1.0, REWRITE: 0.0, DUMP: 1.0}
        while files(client).written[APPEND_ONLY]:
            with suppress(redis.exceptions.ResponseError):
                client.set("c", bytes(1 << 20))
        # Reads are answered all the same.
        assert client.get("a") == kept
        own.free_disk()
        while not files(client).written[APPEND_ONLY]:
            pass


def test_a_store_without_an_append_only_file_has_none_that_could_fail(tmp_path: Path) -> None:
    with OwnStore(tmp_path / "store", appendonly="no", save="3600 1000000") as own, own.client() as client:
        found = files(client)
        assert found.written[DUMP] == 1
        assert math.isnan(found.written[APPEND_ONLY])
        assert math.isnan(found.written[REWRITE])
        assert math.isnan(found.append_only_bytes)


def test_a_store_that_dumps_nothing_of_its_own_accord_takes_writes_when_a_dump_fails(tmp_path: Path) -> None:
    with OwnStore(tmp_path / "store") as own, own.client() as client:
        assert files(client).written[DUMP] == 1
        (tmp_path / "store" / "dump.rdb").mkdir()
        client.set("a", "b")
        client.bgsave()
        while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
            pass
        client.set("c", "d")
        assert not inspect(client).last_write_failed
        assert math.isnan(files(client).written[DUMP])
