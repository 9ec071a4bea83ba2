"""A real run of `recsys up` with simulated users, and a real Prometheus that scrapes it by deploy's configuration."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from recsys import Client, Feedback
from recsys.audience import Audience
from recsys.catalog import Item
from recsys.errors import RecsysError

PROMETHEUS = Path(__file__).resolve().parents[1] / "deploy" / "prometheus"
NAMES = ("prometheus", "promtool")
SECONDS = 60.0
POLL_SECONDS = 0.5
# What a user is recommended, every so many visits looks at, and how much of it then.
COUNT, LOOK_EVERY, SHELF = 10, 5, 5
SMALL = ("--dimension=8", "--history-length=5", "--device=cpu", "--classes=clicks")

needs_prometheus = pytest.mark.skipif(
    not all(map(shutil.which, NAMES)), reason="prometheus is absent; Debian's package `prometheus` has it"
)


def shortened(rules: str, seconds: int) -> str:
    """Let no alert wait longer, nor look back further: a fault is then seen in a test's time."""
    rules = re.sub(r"(for: )\w+", rf"\g<1>{seconds}s", rules)
    return re.sub(r"(\[|offset )\d+m", rf"\g<1>{4 * seconds}s", rules)


class Prometheus:
    """Ask a running Prometheus."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, path: str, **parameters: Any) -> Any:
        """Return what the HTTP API answers to a GET."""
        url = f"{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            return json.load(answer)["data"]

    def values(self, expr: str, since: float) -> list[float]:
        """Return every number that `expr` had since then, NaN not among them."""
        found = self.ask("query_range", query=expr, start=since, end=time.time(), step=1)["result"]
        return [float(value) for series in found for _, value in series["values"] if value != "NaN"]

    def alerts(self) -> dict[str, str]:
        """Return the state, pending or firing, of each alert that is not silent."""
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.ask("alerts")["alerts"]}

    def wait_until(self, holds: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Look again and again; fail with all alerts when it does not come to hold."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"not in {seconds} s; alerts: {self.alerts()}"
            time.sleep(POLL_SECONDS)


@dataclass
class Observed:
    """What runs: the parts' process ids, the address for clients, Prometheus, and when it began."""

    pids: Mapping[str, int]
    grpc: str
    prometheus: Prometheus
    began: float

    @contextmanager
    def halted(self, part: str) -> Iterator[None]:
        """Stop a part's process where it stands, as a machine that hangs would, and let it go on at the end."""
        pid = self.pids[part]
        if part == "store":
            # The process of ours watches over the store's own, its only child.
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def observed(
    folder: Path, *flags: str, pause: float = 0.02, seed: int = 1, scrape: str = "1s", fast: int = 0
) -> Iterator[Observed]:
    """Run everything, with a user's visit every `pause` seconds; alerts are shortened to `fast` seconds, if given."""
    with ExitStack() as stack:
        told = stack.enter_context(_up(folder, *flags))
        jobs = {"recsys-server": told["metrics"], "recsys-trainer": told["trainer_metrics"]}
        prometheus = stack.enter_context(_prometheus(folder, jobs, scrape, fast))
        began = time.time()
        stack.enter_context(_users(told["grpc"], pause, seed))
        yield Observed(told["pids"], told["grpc"], prometheus, began)


@contextmanager
def _up(folder: Path, *flags: str) -> Iterator[dict[str, Any]]:
    free = [f"--{name}=0" for name in ("port", "metrics-port", "trainer-metrics-port")]
    command = [sys.executable, "-m", "recsys", "up", "--json", f"--data-dir={folder / 'data'}", *SMALL, *free, *flags]
    with (folder / "up.log").open("w") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line, (folder / "up.log").read_text()
            yield json.loads(line)
        finally:
            process.terminate()
            process.wait(SECONDS)


@contextmanager
def _prometheus(folder: Path, jobs: Mapping[str, str], scrape: str, fast: int) -> Iterator[Prometheus]:
    rules = folder / "rules"
    rules.mkdir()
    for path in (PROMETHEUS / "rules").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        # Objectives are evaluated as often as is scraped: a test does not last long enough for more patience.
        text = re.sub(r"interval: \w+", f"interval: {scrape}", text)
        (rules / path.name).write_text(shortened(text, fast) if fast and path.stem == "alerts" else text, "utf-8")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": scrape, "scrape_timeout": scrape, "evaluation_interval": scrape}
    for job in config["scrape_configs"]:
        address = urllib.parse.urlsplit(jobs[job["job_name"]])
        job["static_configs"] = [{"targets": [address.netloc]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'tsdb'}"], stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        _until_ready(process, f"http://127.0.0.1:{port}/-/ready", folder / "prometheus.log")
        yield prometheus
    finally:
        process.terminate()
        process.wait(SECONDS)


def _until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=SECONDS).close()
            return
        except OSError:
            time.sleep(POLL_SECONDS)


@contextmanager
def _users(grpc: str, pause: float, seed: int) -> Iterator[None]:
    """Let simulated users visit one after another until the end."""
    stopping = threading.Event()
    # So long that no tastes turn meanwhile; users and items come one by one.
    audience = Audience(seed, users=3000, events=1_000_000)

    def visit(client: Client, user_id: str, look: bool) -> None:
        answer = client.recommend(user_id, COUNT)
        if look:
            acts = audience.respond(user_id, [item.item_id for item in answer.items[:SHELF]])
        else:
            acts = [(audience.choose(user_id), True)]
        found = answer.recommendation_id if look else ""
        classes = {True: "click", False: "impression"}
        client.log_feedback(Feedback(user_id, item, classes[c], recommendation_id=found) for item, c in acts)

    def visits() -> None:
        with Client(grpc, timeout=5.0) as client:
            client.upsert_items(Item(i.item_id, i.title, tuple(i.categories)) for i in audience.items())
            for number in itertools.count():
                if stopping.wait(pause):
                    return
                # A call that fails is for the alerts to tell.
                with suppress(RecsysError):
                    visit(client, audience.next_user(), number % LOOK_EVERY == 0)

    thread = threading.Thread(target=visits, name="users")
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
