"""up: real processes over a real store, started by one command, stopped in order, with nothing left or lost."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from recsys import Client, Feedback
from recsys.cli.system import environment_of
from recsys.feedback_log import FeedbackLog
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.weights import WeightStore

SECONDS = 60
# Longer than a test needs to say stop: what is learned at the end is learned because of that.
SLOW_VERSIONS = ("--publish-seconds", "3")


@dataclass
class Up:
    """A running `recsys up`, and the open ends by which the kernel tells when its parts have ended."""

    process: subprocess.Popen[str]
    grpc: str
    ends: dict[int, str]
    pids: dict[str, int]

    def order_of_ending(self) -> list[str]:
        """Wait until all parts have ended; those that end together come in any order."""
        order: list[str] = []
        poll = select.poll()
        for end in self.ends:
            poll.register(end, select.POLLIN)
        while len(order) < len(self.ends):
            ready = poll.poll(SECONDS * 1000)
            assert ready, f"only {order} ended"
            for end, _ in ready:
                poll.unregister(end)
                order.append(self.ends[end])
        return order


def command(directory: Path, *flags: str) -> list[str]:
    free = [f"--{name}=0" for name in ("port", "metrics-port", "trainer-metrics-port")]
    small = ["--dimension=8", "--history-length=5", "--device=cpu"]
    return [sys.executable, "-m", "recsys", "up", "--json", f"--data-dir={directory}", *small, *free, *flags]


@contextmanager
def running(directory: Path, *flags: str) -> Iterator[Up]:
    process = subprocess.Popen(
        command(directory, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    ends: dict[int, str] = {}
    assert process.stdout
    assert process.stderr
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        told = json.loads(line)
        ends |= {os.pidfd_open(pid): name for name, pid in told["pids"].items()}
        yield Up(process, told["grpc"], ends, told["pids"])
    finally:
        process.kill()
        process.wait(SECONDS)
        for end in ends:
            os.close(end)
        process.stdout.close()
        process.stderr.close()


def refused(directory: Path, *flags: str) -> str:
    done = subprocess.run(command(directory, *flags), capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_parts_see_the_settings_that_are_in_force_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_CONFIG", "elsewhere.toml")
    monkeypatch.setenv("RECSYS_SEED", "7")
    settings = load(
        {"classes": "ratings", "learning_rate": 1e-7, "reflection": False, "torch_threads": 3}, environment={}
    )
    environment = environment_of(settings)
    assert load(environment=environment) == settings
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["PATH"]


@pytest.mark.slow
def test_ctrl_c_stops_in_order_and_loses_nothing(tmp_path: Path) -> None:
    with running(tmp_path, *SLOW_VERSIONS) as up:
        assert "in use by another process" in refused(tmp_path)
        with Client(up.grpc, timeout=SECONDS) as client:
            results = client.log_feedback(Feedback(f"u{n % 5}", f"i{n % 9}", "click") for n in range(300))
            assert all(result.accepted for result in results)
            os.killpg(up.process.pid, signal.SIGINT)
        assert up.order_of_ending() == ["server", "trainer", "store"]
        assert up.process.wait(SECONDS) == 0
    with EmbeddedStore(tmp_path) as store:
        settings: Settings = load({"redis_url": store.url}, environment={})
        with connect(settings) as client_of_store:
            head = WeightStore(client_of_store, settings).head()
            assert head is not None
            assert head.feedback_learned == FeedbackLog(client_of_store, settings).appended() == 300


@pytest.mark.slow
def test_a_part_that_dies_is_named_and_takes_the_others_along(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        os.kill(up.pids["trainer"], signal.SIGKILL)
        assert up.order_of_ending() == ["trainer", "server", "store"]
        assert up.process.wait(SECONDS) == 1
        assert up.process.stderr
        assert "error: the trainer stopped by itself (SIGKILL)" in up.process.stderr.read()


@pytest.mark.slow
def test_no_part_outlives_a_killed_up(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        up.process.kill()
        assert sorted(up.order_of_ending()) == ["server", "store", "trainer"]
    with EmbeddedStore(tmp_path):
        pass


@pytest.mark.slow
def test_a_port_in_use_is_told_and_nothing_stays(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(tmp_path, f"--port={port}")
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "error: the server stopped by itself (exit code 1)" in said
    with EmbeddedStore(tmp_path):
        pass
