"""Rollback: how long it takes from asking for an earlier version to the first answer that comes from it.

Made-up weights of several sizes: a snapshot, some versions behind it, and then a rollback to one in the middle, while a
client asks for recommendations all the time. The server is a process of its own. Also what a commit of 1,000 changed
rows weighs and takes, and how long a single command kept the store from all others. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from made_up import changed, longest_commands, made_up_learner, made_up_lineage, watch_commands

from recsys import Client
from recsys.errors import RecsysError
from recsys.settings import load
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.weights import WeightStore, encode

PORTS = {"RECSYS_PORT": "50091", "RECSYS_METRICS_PORT": "50092"}
TARGET = f"127.0.0.1:{PORTS['RECSYS_PORT']}"
VERSIONS = 20
ROWS_PER_VERSION = 1000
# Far longer than it takes on a machine with nothing else to do.
START_SECONDS = 300.0
PROBE_SECONDS = 0.005


@contextmanager
def server(store_url: str) -> Iterator[Client]:
    """Run a server; yield a client of it once it serves."""
    environment = {**os.environ, **PORTS, "RECSYS_REDIS_URL": store_url, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "recsys", "serve"], env=environment, stdout=subprocess.DEVNULL)
    try:
        with Client(TARGET, timeout=10.0) as client:
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline:
                try:
                    if client.status().version == VERSIONS:
                        break
                except RecsysError:
                    pass
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait()


class Prober(threading.Thread):
    """Ask for recommendations all the time; remember when each version was first seen and the slowest answer."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first_seen: dict[int, float] = {}
        self.slowest = 0.0
        self.changed = threading.Condition()
        self.over = threading.Event()

    def run(self) -> None:
        """Probe until `over` is set."""
        with Client(TARGET, timeout=10.0) as client:
            while not self.over.wait(PROBE_SECONDS):
                started = time.monotonic()
                version = client.recommend("anna").version
                now = time.monotonic()
                with self.changed:
                    self.slowest = max(self.slowest, now - started)
                    self.first_seen.setdefault(version, now)
                    self.changed.notify_all()


def measure(items: int, repeats: int) -> dict[str, Any]:
    """Roll back `repeats` times with `items` items."""
    with tempfile.TemporaryDirectory() as directory, EmbeddedStore(Path(directory)) as embedded:
        settings = load({"redis_url": embedded.url}, environment={})
        with connect(settings) as connection:
            store = WeightStore(connection, settings)
            epoch = store.acquire()
            learner = made_up_learner(settings, items)
            payload, own = map(encode, learner.write_all())
            payload_bytes = len(payload) + len(own)
            store.commit(epoch, 0, payload, own, made_up_lineage(settings, 1))
            store.write_snapshot(epoch, 1, payload, own)
            watch_commands(connection)
            commits = []
            for version in range(2, VERSIONS + 1):
                payload, own = map(encode, changed(learner, ROWS_PER_VERSION, version))
                started = time.monotonic()
                store.commit(epoch, version - 1, payload, own, made_up_lineage(settings, version))
                commits.append(time.monotonic() - started)
        with server(embedded.url) as client:
            prober = Prober()
            prober.start()
            asked, answered = [], []
            for repeat in range(repeats):
                started = time.monotonic()
                version = client.rollback(VERSIONS // 2 + repeat, "measured").version
                asked.append(time.monotonic() - started)
                with prober.changed:
                    prober.changed.wait_for(lambda version=version: version in prober.first_seen, START_SECONDS)
                answered.append(prober.first_seen[version] - started)
            prober.over.set()
            prober.join()
        with connect(settings) as connection:
            longest = longest_commands(connection)
    return {
        "items": items,
        "payload_bytes": payload_bytes,
        "commit_bytes_per_1000_rows": len(payload) + len(own),
        "commit_milliseconds_per_1000_rows": round(1000 * statistics.median(commits), 1),
        "longest_store_commands_milliseconds": longest,
        "rollback_seconds": rounded(asked),
        "rollback_to_first_answer_seconds": rounded(answered),
        "slowest_answer_meanwhile_seconds": round(prober.slowest, 3),
    }


def rounded(seconds: list[float]) -> list[float]:
    """Round to milliseconds."""
    return [round(each, 3) for each in seconds]


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps({"rollback": [measure(items, arguments.repeats) for items in arguments.items]}))


if __name__ == "__main__":
    main()
