"""Durability: what it costs to acknowledge feedback only when it is on disk, or on a replica.

Appends batches one after the other to a store of its own, for each degree in turn, several rounds, so that what else
the machine does meets all of them. Prints one JSON object: feedback per second and seconds per batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from recsys import Feedback
from recsys.feedback_log import FeedbackLog
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore

USERS = 1000
# The setting, and when the store flushes its file.
DEGREES = (("memory", "everysec"), ("disk", "always"), ("disk", "everysec"), ("replica", "everysec"))


@contextmanager
def stores(directory: Path) -> Iterator[dict[tuple[str, str], Settings]]:
    """Run a store per degree; that for replicas has one, on this machine too."""
    found = {}
    with ExitStack() as stack:
        for durability, flush in DEGREES:
            place = directory / f"{durability}-{flush}"
            store = stack.enter_context(EmbeddedStore(place, appendfsync=flush))
            settings = load({"redis_url": store.url, "durability": durability}, environment={})
            found[durability, flush] = settings
            if durability == "replica":
                copy = stack.enter_context(EmbeddedStore(directory / "copy"))
                replicate(settings, load({"redis_url": copy.url}, environment={}))
        yield found


def replicate(settings: Settings, copy: Settings) -> None:
    """Make one store a replica of another and wait until it is."""
    with connect(settings) as client, connect(copy) as replica:
        connection = client.connection_pool.connection_kwargs
        replica.replicaof(connection["host"], connection["port"])
        while "online" not in str(client.info("replication").get("slave0")):
            time.sleep(0.1)


def batches(size: int, seconds: float, settings: Settings, first: int) -> list[float]:
    """Append for so long; return how long each batch took."""
    took: list[float] = []
    with connect(settings) as client:
        log = FeedbackLog(client, settings)
        over = time.perf_counter() + seconds
        while (started := time.perf_counter()) < over:
            number = first + len(took) * size
            log.append(
                [
                    Feedback(f"user-{one % USERS}", f"item-{one * one % 997}", "click", feedback_id=f"f{one}")
                    for one in range(number, number + size)
                ]
            )
            took.append(time.perf_counter() - started)
    return took


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 1000], help="feedback in a batch")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each degree and size in a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    took: dict[tuple[str, str, int], list[float]] = {}
    first = 0
    with tempfile.TemporaryDirectory() as directory, stores(Path(directory)) as found:
        for _ in range(arguments.rounds):
            for (durability, flush), settings in found.items():
                for size in arguments.sizes:
                    part = batches(size, arguments.seconds, settings, first)
                    took.setdefault((durability, flush, size), []).extend(part)
                    first += len(part) * size
    print(
        json.dumps(
            [
                {
                    "durability": durability,
                    "appendfsync": flush,
                    "batch": size,
                    "feedback_per_second": round(size * len(seconds) / sum(seconds)),
                    "batch_seconds": dict(
                        zip(("p50", "p99"), np.quantile(seconds, [0.5, 0.99]).round(5).tolist(), strict=True)
                    ),
                }
                for (durability, flush, size), seconds in took.items()
            ]
        )
    )


if __name__ == "__main__":
    main()
