"""Several server processes: one port, one copy of the weights, one target for Prometheus; any of them may be killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from learning import append, head, learn_all, make_feedback, small, tick

from recsys import Client
from recsys.cli.system import environment_of
from recsys.errors import RecsysError
from recsys.settings import Settings

SECONDS = 60
PROCESSES = 2
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="server processes share memory on Linux only")


@dataclass
class Servers:
    """A running `recsys serve` of several processes."""

    process: subprocess.Popen[str]
    target: str
    metrics: str

    def pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="ascii")
        return [int(pid) for pid in children.split()]

    def version(self) -> int:
        """Ask over a new connection, which any of the processes may get."""
        with Client(self.target, timeout=5) as client:
            return client.recommend("user-1").version

    def values(self, name: str) -> dict[str, float]:
        with urlopen(f"http://{self.metrics}", timeout=5) as answer:
            text = answer.read().decode()
        return {p: float(v) for p, v in re.findall(rf'^{name}{{[^}}]*process="(\d)"[^}}]*}} (\S+)$', text, re.M)}


@contextmanager
def serve(settings: Settings, stderr: int | None = None) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "recsys", "serve"]
    environment = environment_of(settings)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(SECONDS)


@pytest.fixture
def base(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    return small(settings, server_processes=PROCESSES, retrieval=getattr(request, "param", "auto"))


@pytest.fixture
def servers(base: Settings) -> Iterator[Servers]:
    learn(base, 9, 1)
    with serve(base) as process:
        assert process.stdout is not None
        found = re.fullmatch(r"serving on (\S+), metrics on (\S+)\n", process.stdout.readline())
        assert found is not None
        yield Servers(process, found[1], found[2])


def learn(settings: Settings, count: int, seed: int) -> int:
    append(settings, make_feedback(count, seed))
    tick(settings)
    learn_all(settings)
    return head(settings)[0]


def until(found: Servers, wanted: int) -> None:
    """Ask until some answers come from the version that is wanted, and then from no other."""
    deadline = time.monotonic() + SECONDS
    seen = 0
    while seen < 2 * PROCESSES:
        assert time.monotonic() < deadline
        try:
            version = found.version()
        except RecsysError:
            # The connection went to a process that was just killed.
            continue
        assert not seen or version == wanted
        seen += version == wanted


@pytest.mark.parametrize("base", ["exact", "partitioned"], indirect=True)
def test_any_process_may_be_killed_and_the_others_go_on(servers: Servers, base: Settings) -> None:
    until(servers, head(base)[0])
    assert len(servers.pids()) == PROCESSES
    first, second = servers.pids()
    # One of the two leads; whichever it is, versions go on being followed.
    os.kill(first, signal.SIGKILL)
    until(servers, learn(base, 8, 2))
    deadline = time.monotonic() + SECONDS
    while len(set(servers.values("recsys_served_version"))) < PROCESSES:
        assert time.monotonic() < deadline, "the killed process was not started again"
        time.sleep(0.1)
    assert second in servers.pids()
    os.kill(second, signal.SIGKILL)
    until(servers, learn(base, 8, 3))
    assert set(servers.values("recsys_served_version")) <= {"0", "1"}


def test_all_of_them_answer_and_are_counted(servers: Servers, base: Settings) -> None:
    for _ in range(24):
        servers.version()
    name = 'grpc_server_handled_total{grpc_code="OK",grpc_method="Recommend"'
    handled = servers.values(re.escape(name.partition("{")[0]))
    assert set(handled) == {"0", "1"}
    served = servers.values("recsys_served_version")
    assert served == {"0": head(base)[0], "1": head(base)[0]}
    answers = servers.values("recsys_recommend_seconds_count")
    assert sum(answers.values()) == 24
    assert min(answers.values()) > 0, "the system gave all connections to one process"
    site = f"http://{servers.metrics}".removesuffix("/metrics")
    question = Request(f"{site}/api/recommendations", b'{"user_id": "user-1"}', {"Content-Type": "application/json"})
    with urlopen(question, timeout=SECONDS) as answer:
        assert json.load(answer)["version"] == head(base)[0]
    deadline = time.monotonic() + SECONDS
    while True:
        with urlopen(f"{site}/api/overview", timeout=SECONDS) as answer:
            seen = json.load(answer)
        if not seen["loading"]:
            break
        assert time.monotonic() < deadline
    assert seen["serving"]["version"] == seen["learning"]["newest_version"] == head(base)[0]


def test_they_stop_together(servers: Servers) -> None:
    pids = servers.pids()
    ends = [os.pidfd_open(pid) for pid in pids]
    servers.process.terminate()
    assert servers.process.wait(SECONDS) == 0
    for pid, end in zip(pids, ends, strict=True):
        os.close(end)
        assert not Path(f"/proc/{pid}").exists()


def test_a_taken_port_is_told(base: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serve(base.model_copy(update={"port": port}), stderr=subprocess.PIPE) as process:
            assert process.wait(SECONDS) == 1
            assert process.stderr is not None
            assert f"cannot listen on 127.0.0.1:{port} (host, port)" in process.stderr.read()
