"""Freshness: how long accepted feedback takes to reach an answer, at a given rate, store, trainer and server together.

Open loop: feedback is sent on schedule whether or not the system keeps up, so that waiting is not hidden. A second
client asks for recommendations all the time; a feedback is fresh when an answer comes from a version that learned it.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from recsys import Client, Feedback
from recsys.audience import Audience
from recsys.errors import RecsysError
from recsys.feedback_file import BadRow, open_feedback_file
from recsys.settings import load
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.weights import WeightStore

PER_CALL = 10
PROBE_SECONDS = 0.005
START_SECONDS = 60.0
SETTLE_SECONDS = 60.0
PORTS = {"RECSYS_PORT": "50071", "RECSYS_METRICS_PORT": "50072", "RECSYS_TRAINER_METRICS_PORT": "50073"}


@contextmanager
def system(store_url: str, classes: str) -> Iterator[Client]:
    """Run trainer and server as processes of their own; yield a client once they serve."""
    environment = {**os.environ, **PORTS, "RECSYS_REDIS_URL": store_url, "RECSYS_CLASSES": classes}
    environment |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-m", "recsys", part], env=environment, stdout=subprocess.DEVNULL)
        for part in ("train", "serve")
    ]
    try:
        with Client(f"127.0.0.1:{PORTS['RECSYS_PORT']}", timeout=10.0) as client:
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline:
                try:
                    if client.status().version:
                        break
                except RecsysError:
                    pass
                time.sleep(0.1)
            yield client
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


class Prober(threading.Thread):
    """Ask for recommendations all the time; remember when each version was first seen and how long answers took."""

    def __init__(self, client: Client, users: list[str]) -> None:
        super().__init__(daemon=True)
        self._client, self._users = client, users
        self.first_seen: dict[int, float] = {}
        self.seconds: list[float] = []
        self.over = threading.Event()

    def run(self) -> None:
        """Probe until `over` is set."""
        number = 0
        while not self.over.wait(PROBE_SECONDS):
            started = time.time()
            version = self._client.recommend(self._users[number % len(self._users)]).version
            self.seconds.append(time.time() - started)
            self.first_seen.setdefault(version, time.time())
            number += 1


def feedback_of(data: Path | None, count: int) -> tuple[list[Feedback], str]:
    """Return `count` feedback and the classes that the settings must hold for them."""
    if data is not None:
        file = open_feedback_file(data)
        found = [row for row in islice(file, count) if not isinstance(row, BadRow)]
        return found, json.dumps([each.model_dump() for each in file.classes])
    audience = Audience(1, events=count)
    chosen = []
    for _ in range(count):
        user_id = audience.next_user()
        chosen.append(Feedback(user_id=user_id, item_id=audience.choose(user_id), feedback_class="click"))
    return chosen, "clicks"


def send(client: Client, feedback: list[Feedback], rate: float) -> float:
    """Send on schedule; return the largest lag behind it in seconds."""
    started, lag = time.monotonic(), 0.0
    for index in range(0, len(feedback), PER_CALL):
        wait = started + index / rate - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        lag = max(lag, -wait)
        client.log_feedback(feedback[index : index + PER_CALL])
    return lag


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return p50, p99 and the largest, rounded to milliseconds."""
    p50, p99, most = np.quantile(seconds, [0.5, 0.99, 1.0]).tolist()
    return {"p50": round(p50, 3), "p99": round(p99, 3), "max": round(most, 3)}


def measure(rate: float, seconds: float, data: Path | None) -> dict[str, object]:
    """Run the whole system for `seconds` at `rate` feedback per second."""
    feedback, classes = feedback_of(data, int(rate * seconds))
    with tempfile.TemporaryDirectory() as directory, EmbeddedStore(Path(directory)) as store:
        with system(store.url, classes) as client:
            prober = Prober(client, sorted({each.user_id for each in feedback}))
            prober.start()
            lag = send(client, feedback, rate)
            deadline = time.monotonic() + SETTLE_SECONDS
            while client.status().feedback_learned < len(feedback) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)
            prober.over.set()
            prober.join()
            learned = client.status().feedback_learned
        with connect(load({"redis_url": store.url}, environment={})) as connection:
            records = WeightStore(connection, load({}, environment={})).versions(1_000_000)
    seen = sorted(prober.first_seen.items())
    fresh, committed = [], []
    for record in records:
        answered = next((when for version, when in seen if version >= record.version), None)
        for accepted_ms in record.accepted_ms:
            committed.append((record.committed_ms - accepted_ms) / 1000)
            if answered is not None:
                fresh.append(answered - accepted_ms / 1000)
    return {
        "rate": rate,
        "feedback": len(feedback),
        "learned": learned,
        "versions": len(records),
        "accepted_to_learned_seconds": quantiles(committed),
        "accepted_to_answered_seconds": quantiles(fresh),
        "recommend_seconds": quantiles(prober.seconds),
        "largest_lag_of_sender_seconds": round(lag, 3),
    }


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=500.0, help="feedback per second")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--data", type=Path, help="a file of feedback; default the simulated audience")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.rate, arguments.seconds, arguments.data)))


if __name__ == "__main__":
    main()
