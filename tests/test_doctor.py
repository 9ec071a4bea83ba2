"""doctor and status: each fault that can be planted is found and named, with what to do; a healthy system has none."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from learning import append, learn_all, make_feedback, small, tick
from serving import Running, commit_versions, serve
from stores import OwnStore

from recsys.cli import main
from recsys.cli.doctor import chosen
from recsys.cli.doctor.machine import packages
from recsys.cli.doctor.stored import room
from recsys.cli.settings_flags import class_text
from recsys.cli.system import environment_of
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.inspection import APPEND_ONLY, DUMP, REWRITE, Files
from recsys.weights import Lineage, ObjectionRecord, WeightStore

SECONDS = 30


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from outside, and tables as wide as they want to be."""
    monkeypatch.delenv("RECSYS_CONFIG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def examine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., dict[str, list[tuple[str, str]]]]:
    """Run doctor with settings and return its findings, level and text, by what was looked at."""

    def run(settings: Settings, code: int = 0, **changes: Any) -> dict[str, list[tuple[str, str]]]:
        for name, value in environment_of(settings.model_copy(update={"data_dir": tmp_path, **changes})).items():
            if name.startswith("RECSYS_"):
                monkeypatch.setenv(name, value)
        assert main(["doctor", "--json"]) == code
        told = json.loads(capsys.readouterr().out)
        assert told["ok"] == (code == 0)
        found: dict[str, list[tuple[str, str]]] = {}
        for each in told["findings"]:
            assert bool(each["advice"]) == (each["level"] != "ok"), f"{each} says nothing of what to do"
            found.setdefault(each["check"], []).append((each["level"], each["found"]))
        return found

    return run


@pytest.fixture
def own(tmp_path: Path) -> Iterator[OwnStore]:
    with OwnStore(tmp_path / "store") as store:
        yield store


def at(url: str, **changes: Any) -> Settings:
    return load(
        {"redis_url": url, "port": 0, "metrics_port": 0, "trainer_metrics_port": 0, "device": "cpu", **changes},
        environment={},
    )


def only(found: dict[str, list[tuple[str, str]]], check: str) -> tuple[str, str]:
    (one,) = found[check]
    return one


def test_a_healthy_system_has_no_problem(
    settings: Settings, examine: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base = small(settings)
    append(base, make_feedback(20))
    tick(base)
    learn_all(base)
    found = examine(base)
    assert {level for findings in found.values() for level, _ in findings} <= {"ok", "warning"}
    for check in ("settings", "transport", "packages", "device", "store", "memory", "durability", "clock", "versions"):
        assert only(found, check)[0] == "ok", found[check]
    assert "are whole and continue one another" in only(found, "versions")[1]
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "Valkey" in shown
    assert "Traceback" not in shown


def test_an_absent_store_is_the_one_thing_told_of_it(examine: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    found = examine(at(f"redis://user:s3cret@127.0.0.1:{port}/0"), 1)
    level, text = only(found, "store")
    assert level == "problem"
    assert "s3cret" not in str(found)
    assert not {"memory", "versions", "clock"} & {*found}
    assert "cannot be reached" in text


def test_a_store_that_throws_things_away_is_a_problem(own: OwnStore, examine: Callable[..., Any]) -> None:
    with own.client() as client:
        client.config_set("maxmemory", str(20 << 30))
        client.config_set("maxmemory-policy", "allkeys-lru")
        found = examine(at(own.url), 1)
        level, text = only(found, "memory")
        assert (level, "allkeys-lru" in text) == ("problem", True)
        client.config_set("maxmemory-policy", "noeviction")
        assert only(examine(at(own.url)), "memory")[0] == "ok"


def test_a_store_with_little_room_is_told_before_it_is_full(own: OwnStore, examine: Callable[..., Any]) -> None:
    with own.client() as client:
        # Made in the store: what comes over the connection is counted twice for a while.
        client.setrange("ballast", (20 << 20) - 1, "x")
        used = int(client.info("memory")["used_memory"])
        for share, code, level in ((1.15, 0, "warning"), (1.03, 1, "problem"), (1.5, 0, "warning")):
            client.config_set("maxmemory", str(int(share * used)))
            assert only(examine(at(own.url), code), "memory")[0] == level
        # The last: room enough for now, and less than the settings allow.
        assert "may grow to" in only(examine(at(own.url)), "memory")[1]


def test_a_store_that_keeps_nothing_is_told(own: OwnStore, examine: Callable[..., Any]) -> None:
    with own.client() as client:
        client.config_set("appendfsync", "no")
        assert "appendfsync no" in only(examine(at(own.url)), "durability")[1]
        client.config_set("appendonly", "no")
        level, text = only(examine(at(own.url)), "durability")
        assert (level, "no append-only file" in text) == ("warning", True)
        level, text = only(examine(at(own.url, durability="disk"), 1), "durability")
        assert level == "problem"


def test_missing_replicas_are_a_problem(own: OwnStore, examine: Callable[..., Any]) -> None:
    level, text = only(examine(at(own.url, durability="replica", durable_replicas=2), 1), "durability")
    assert (level, "with 2 replicas, and 0 connected" in text) == ("problem", True)


def test_a_full_disk_of_the_store_is_a_problem(own: OwnStore, examine: Callable[..., Any]) -> None:
    with own.client() as client:
        own.fill_disk()
        refused = False
        deadline = time.monotonic() + SECONDS
        while not refused:
            assert time.monotonic() < deadline
            with suppress(redis.exceptions.ResponseError):
                client.set("a", b"x" * 100_000)
                continue
            refused = True
        assert "could not write its files" in only(examine(at(own.url), 1), "durability")[1]


@pytest.mark.parametrize(
    ("rewritten", "appended", "free", "levels", "text"),
    [
        (1.0, 5 << 30, 6 << 30, ["ok"], "free on the store's disk"),
        (1.0, 5 << 30, 4 << 30, ["warning"], "append-only file"),
        (1.0, 5, (1 << 30) - 1, ["warning"], "append-only file"),
        (0.0, 5 << 30, 6 << 30, ["warning"], "could not be replaced"),
        (0.0, 5 << 30, math.nan, ["warning"], "could not be replaced"),
        (1.0, 5 << 30, math.nan, ["ok"], "append-only file"),
        (math.nan, math.nan, 4 << 30, ["ok"], "free on the store's disk"),
        (math.nan, math.nan, math.nan, [], ""),
    ],
)
def test_a_store_with_little_room_for_its_files_is_told(
    rewritten: float, appended: float, free: float, levels: list[str], text: str
) -> None:
    found = list(room(Files({APPEND_ONLY: 1.0, REWRITE: rewritten, DUMP: 1.0}, appended, free)))
    assert [finding.level for finding in found] == levels
    assert all(text in finding.found for finding in found)


def test_a_clock_that_is_apart_is_told(tmp_path: Path, examine: Callable[..., Any]) -> None:
    own = OwnStore(tmp_path / "store")
    own.set_clock(0)
    with own:
        for seconds, code, level in ((5, 0, "warning"), (-5, 0, "warning"), (300, 1, "problem"), (0, 0, "ok")):
            own.set_clock(seconds)
            assert only(examine(at(own.url), code), "clock")[0] == level


@pytest.mark.parametrize("part", ["w", "t"])
def test_a_damaged_version_is_found(settings: Settings, examine: Callable[..., Any], part: str) -> None:
    base = small(settings)
    append(base, make_feedback(32))
    tick(base)
    learn_all(base)
    with connect(settings) as client:
        store = WeightStore(client, settings)
        assert only(examine(base), "versions")[0] == "ok"
        record = store.versions(2)[-1]
        (key,) = [key for key in client.keys("*:chunk:*") if f":{part}:{record.version}:".encode() in key]
        client.setrange(key, record.bytes // 2 if part == "w" else record.trainer_bytes // 2, b"####")
    level, text = examine(base, 1)["versions"][0]
    assert (level, f"version {record.version}" in text) == ("problem", True)


def test_settings_that_differ_from_the_trainers_are_told(settings: Settings, examine: Callable[..., Any]) -> None:
    base = small(settings)
    learn_all(base)
    found = examine(base.model_copy(update={"seed": 5}))
    assert [level for level, _ in found["versions"]] == ["ok", "warning"]


def test_no_version_and_feedback_set_aside_are_told(settings: Settings, examine: Callable[..., Any]) -> None:
    assert "none yet" in only(examine(settings), "versions")[1]


def test_ports_are_free_ours_or_taken(settings: Settings, examine: Callable[..., Any]) -> None:
    with serve(settings) as running, socket.create_server(("127.0.0.1", 0)) as other:
        ours = {"port": running.server.port, "metrics_port": running.server.metrics_port}
        found = examine(settings, **ours)
        assert sum("a server answers" in text for _, text in found["ports"]) == 2
        taken = other.getsockname()[1]
        found = examine(settings, 1, trainer_metrics_port=taken)
        assert next(text for level, text in found["ports"] if level == "problem").startswith(f"127.0.0.1:{taken}")
        # Ours, but another part than is wanted there.
        found = examine(settings, 1, trainer_metrics_port=running.server.metrics_port)
        assert "problem" in {level for level, _ in found["ports"]}
    found = examine(settings, 1, port=50999, metrics_port=50999)
    assert "is port too" in str(found["ports"])
    found = examine(settings, 1, host="no-such-host.invalid", port=50999, insecure=True)
    assert "no-such-host.invalid" in str(found["ports"])


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({"host": "0.0.0.0"}, "problem", "anyone there could call this server"),
        ({"host": "0.0.0.0", "insecure": True}, "warning", "anyone who reaches 0.0.0.0"),
        ({"tokens_file": "/none"}, "problem", "tokens_file: cannot read"),
        ({"gate": False}, "warning", "gate = false"),
        ({"learning_rate": 0.5}, "warning", "learning_rate"),
        ({"torch_threads": 200}, "warning", "cores"),
        ({"replay_capacity": 10**7}, "problem", "replay_capacity"),
        ({"classes": '[{"name":"a","positive":true,"history":true,"worth":0}]'}, "warning", "worth nothing"),
        ({"classes": '[{"name":"a","positive":true,"history":false,"worth":1}]'}, "problem", "none enters the history"),
    ],
)
def test_dangerous_settings_are_named(changes: dict[str, Any], level: str, text: str) -> None:
    found = list(chosen.examine(load(changes, environment={})))
    assert [(f.level, f.advice != "") for f in found if text in f.found] == [(level, True)]


def test_the_default_settings_are_not_dangerous() -> None:
    found = list(chosen.examine(load({}, environment={})))
    assert {f.level for f in found if "open" not in f.found} == {"ok"}


def test_settings_that_are_no_settings_end_it_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--port", "99999"]) == 2
    assert "port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("requirement", "level"),
    [
        ("pytest>=1", "ok"),
        ("pytest<1", "problem"),
        ("pytest>=1,<2", "problem"),
        ("redis[hiredis]>=6.0", "ok"),
        ("no-such-package-at-all>=1", "problem"),
        ('no-such-package-at-all>=1; extra == "dev"', "ok"),
    ],
)
def test_packages_are_compared_with_what_is_required(requirement: str, level: str) -> None:
    (found,) = packages([requirement])
    assert found.level == level


def test_cuda_that_is_asked_for_and_absent_is_a_problem(settings: Settings, examine: Callable[..., Any]) -> None:
    import torch

    if torch.cuda.is_available():
        assert only(examine(settings, device="cuda"), "device")[0] == "ok"
    else:
        assert only(examine(settings, 1, device="cuda"), "device")[0] == "problem"


def test_a_class_can_be_written_as_text() -> None:
    # What `at` and the environment exchange.
    assert class_text(load({}, environment={}).classes) == "shop"


# --- status


@pytest.fixture
def status(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def run(*arguments: str, code: int = 0) -> Any:
        assert main(["status", *arguments]) == code
        return capsys.readouterr().out

    return run


def levels(found: Any) -> Sequence[str]:
    return [found["condition"][topic]["level"] for topic in ("good", "fresh", "healthy")]


def test_status_answers_the_three_questions(settings: Settings, status: Callable[..., Any]) -> None:
    with serve(settings) as running:
        server = ["--server", running.target]
        found = json.loads(status(*server, "--json"))
        # The server says that it serves a version, and the store holds none.
        assert levels(found) == ["unknown", "problem", "ok"]
        assert found["condition"]["findings"][0]["command"] == "recsys train"
        commit_versions(running, 2)
        found = json.loads(status(*server, "--json"))
        assert found["newest_version"] == 2
        assert found["newest_verdict"] == "learned"
        assert found["durability"] == "memory"
        assert found["store_memory_bytes"] > 100_000
        assert found["set_aside_feedback"] == 0
        # Version 2 was committed long ago, and 1 is served still.
        assert levels(found)[1] == "problem"
        assert "version 2 stands, but 1 is served" in status(*server)


def test_status_names_the_version_that_is_held(settings: Settings, status: Callable[..., Any]) -> None:
    with serve(settings) as running:
        commit_versions(running, 2)
        weights = WeightStore(running.store, settings)
        assert json.loads(status("--server", running.target, "--json"))["held_version"] is None
        weights.write_objection(ObjectionRecord(version=3, times=1, reason="ranks worse", time_ms=0))
        found = json.loads(status("--server", running.target, "--json"))
        told = {"version": 3, "times": 1, "reason": "it ranks worse", "time": "1970-01-01T00:00:00Z"}
        assert found["held_version"] == told
        assert "version 3 is held: it ranks worse" in status("--server", running.target)


def test_status_names_what_is_wrong_with_accuracy_and_drift(settings: Settings, status: Callable[..., Any]) -> None:
    metrics = {"hr_at_10": 0.05, "popularity_hr_at_10": 0.1, "drift_item_mix_psi": 0.3, "drift_item_mix_detected": 1.0}
    with serve(settings) as running:
        weights = WeightStore(running.store, settings)
        lineage = Lineage("1-0", 5000, 5000, settings.learning_digest(), metrics, [1], 2)
        weights.commit(weights.acquire(), 0, b"payload", b"trainer", lineage)
        found = json.loads(status("--server", running.target, "--json"))
        assert levels(found)[0] == "problem"
        assert "worse than a list of what is popular" in found["condition"]["good"]["sentence"]
        assert found["drift"] == {"drift_item_mix_psi": 0.3, "drift_item_mix_detected": 1.0}
        assert any(each["title"] == "drift: item mix" for each in found["condition"]["findings"])
        shown = status("--server", running.target)
        assert "0.0500 of choices among the first ten, popularity 0.1000" in shown
        # With all that was found it fits a terminal of 24 lines.
        assert len(shown.splitlines()) < 24


@contextmanager
def watching(running: Running, *arguments: str, output: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """Run `recsys status --watch` until it is interrupted, as by Ctrl-C."""
    command = [sys.executable, "-m", "recsys", "status", "--watch", "--server", running.target, *arguments]
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()


def test_status_is_renewed_through_changes_and_the_servers_end(settings: Settings) -> None:
    with serve(settings) as running, watching(running, "--json") as process:
        assert process.stdout is not None
        lines = map(json.loads, process.stdout)
        assert next(lines)["learning_paused"] is False
        WeightStore(running.store, settings).pause(True)
        assert next(found for found in lines if found["learning_paused"])["serving"] is True
        running.stop()
        found = next(found for found in lines if not found["serving"])
        assert found["problem"]


def test_status_is_renewed_in_place_in_a_terminal(settings: Settings) -> None:
    ours, theirs = os.openpty()
    # Rows and columns.
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    shown = bytearray()

    def read() -> None:
        # Ends when nobody can write there any more.
        with suppress(OSError):
            while True:
                shown.extend(os.read(ours, 1 << 16))

    def until(text: bytes) -> None:
        deadline = time.monotonic() + SECONDS
        while text not in shown:
            assert time.monotonic() < deadline, shown.decode()
            time.sleep(0.05)

    reader = threading.Thread(target=read)
    with serve(settings) as running, watching(running, output=theirs):
        os.close(theirs)
        reader.start()
        until(b"durability")
        assert b"learning is paused" not in shown
        WeightStore(running.store, settings).pause(True)
        until(b"learning is paused")
        # What stood there was gone over, line by line.
        assert b"\x1b[1A\x1b[2K" in shown
        running.stop()
        until(b"no answer")
    reader.join(SECONDS)
    os.close(ours)
