"""Freshness: how long accepted feedback takes to reach an answer, at a given rate, store, trainer and server together.

Open loop: feedback is sent on schedule whether or not the system keeps up, so that waiting is not hidden. A second
client asks for recommendations all the time; a feedback is fresh when an answer comes from a version that learned it.
Prints one JSON object, with seconds per stage: accepted, read, learned, committed, applied, first answer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from recsys import Client, Feedback
from recsys.audience import Audience
from recsys.cli.system import environment_of
from recsys.errors import RecsysError
from recsys.feedback_file import BadRow, open_feedback_file
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.weights import VersionRecord, WeightStore

# After "learned", which record.committed_ms tells: what is written into a version is known before its commit.
LATER_STAGES = ("learned_to_committed", "committed_to_applied", "applied_to_answered")
PROBE_SECONDS = 0.005
START_SECONDS = 60.0
SETTLE_SECONDS = 60.0
PORTS = {"port": 50071, "metrics_port": 50072, "trainer_metrics_port": 50073}
TIMED = Path(__file__).resolve().with_name("timed.py")


@contextmanager
def system(settings: Settings, notes: Path) -> Iterator[Client]:
    """Run trainer and server as processes of their own; yield a client once they serve; `notes` gets their times."""
    processes = [
        subprocess.Popen(
            [sys.executable, TIMED, part, notes / part], env=environment_of(settings), stdout=subprocess.DEVNULL
        )
        for part in ("train", "serve")
    ]
    try:
        with Client(f"127.0.0.1:{settings.port}", timeout=10.0) as client:
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline:
                try:
                    # Answers come once the loops are warm, some time after the first version is there.
                    client.recommend("nobody")
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


def send(client: Client, feedback: list[Feedback], rate: float, per_call: int) -> float:
    """Send on schedule; return the largest lag behind it in seconds."""
    started, lag = time.monotonic(), 0.0
    for index in range(0, len(feedback), per_call):
        wait = started + index / rate - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        lag = max(lag, -wait)
        client.log_feedback(feedback[index : index + per_call])
    return lag


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return p50, p99 and the largest, rounded to milliseconds."""
    p50, p99, most = np.quantile(seconds, [0.5, 0.99, 1.0]).tolist()
    return {"p50": round(p50, 3), "p99": round(p99, 3), "max": round(most, 3)}


def stages(
    records: list[VersionRecord], notes: dict[str, Any], first_seen: dict[int, float]
) -> dict[str, dict[str, float]]:
    """Say how long each stage took, every feedback counted that got to its end."""
    committed, applied = ({int(v): when for v, when in part["versions"].items()} for part in notes.values())
    told = notes["train"]["stages"]
    found: dict[str, list[float]] = {stage: told.get(stage, []) for stage in ("accepted_to_read", "read_to_learned")}
    for record in records:
        version, accepted = record.version, [each / 1000 for each in record.accepted_ms]
        # A server applies several versions at once, and a client sees the last of them alone.
        ends = [min((at[v] for v in at if v >= version), default=None) for at in (committed, applied, first_seen)]
        starts = [record.committed_ms / 1000, *ends]
        for stage, start, end in zip(LATER_STAGES, starts, ends, strict=False):
            if start is not None and end is not None:
                found.setdefault(stage, []).extend([end - start] * len(accepted))
        for name, end in (("accepted_to_committed", ends[0]), ("accepted_to_answered", ends[2])):
            if end is not None:
                found.setdefault(name, []).extend(end - each for each in accepted)
    return {stage: quantiles(seconds) for stage, seconds in found.items() if seconds}


def measure(rate: float, seconds: float, data: Path | None, per_call: int) -> dict[str, object]:
    """Run the whole system for `seconds` at `rate` feedback per second."""
    feedback, classes = feedback_of(data, int(rate * seconds))
    with tempfile.TemporaryDirectory() as directory, EmbeddedStore(Path(directory)) as store:
        settings = load({"redis_url": store.url, "classes": classes, **PORTS})
        with system(settings, Path(directory)) as client:
            prober = Prober(client, sorted({each.user_id for each in feedback}))
            prober.start()
            lag = send(client, feedback, rate, per_call)
            sent = time.time()
            deadline = time.monotonic() + SETTLE_SECONDS
            while client.status().feedback_learned < len(feedback) and time.monotonic() < deadline:
                time.sleep(0.05)
            behind = time.time() - sent
            time.sleep(0.5)
            prober.over.set()
            prober.join()
            learned = client.status().feedback_learned
        with connect(settings) as connection:
            records = [record for record in WeightStore(connection, settings).versions(1_000_000) if record.accepted_ms]
        notes = {part: json.loads((Path(directory) / part).read_text()) for part in ("train", "serve")}
        found = stages(records, notes, prober.first_seen)
    return {
        "rate": rate,
        "feedback": len(feedback),
        "learned": learned,
        "versions": len(records),
        "feedback_per_version": round(learned / max(1, len(records)), 1),
        "seconds": found,
        "cpu_milliseconds_per_feedback": {
            part: round(1000 * noted["cpu_seconds"] / max(1, learned), 3) for part, noted in notes.items()
        },
        "recommend_seconds": quantiles(prober.seconds),
        "largest_lag_of_sender_seconds": round(lag, 3),
        "learned_after_the_last_was_sent_seconds": round(behind, 3),
    }


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=500.0, help="feedback per second")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--per-call", type=int, default=10, help="feedback in one LogFeedback")
    parser.add_argument("--data", type=Path, help="a file of feedback; default the simulated audience")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.rate, arguments.seconds, arguments.data, arguments.per_call)))


if __name__ == "__main__":
    main()
