"""Memory: what one item takes in a server, in a trainer and in the store, and what one user takes.

Each process is one of its own, measured with two numbers of items: the difference is what items take. Prints one JSON
object, in bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from made_up import made_up_learner

from recsys.feedback import Feedback
from recsys.feedback_log import FeedbackLog
from recsys.histories import history_key
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.weights import encode
from recsys.weights.chunks import CHUNK_BYTES
from recsys.weights.payload import Receiver
from recsys.weights.replica import Replica

STATUS, RESIDENT = Path("/proc/self/status"), "VmRSS"
KIB = 1024
FEW_ITEMS = 1000
BATCH = 1000


def resident_bytes() -> int:
    """Return the memory that this process holds now."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(RESIDENT))
    return int(line.split()[1]) * KIB


def hold(part: str, items: int) -> int:
    """Hold the weights of so many items as a trainer or a server does; return the memory of the process then."""
    settings = Settings()
    torch.set_num_threads(1)
    learner = made_up_learner(settings, items)
    if part == "trainer":
        return resident_bytes()
    path = Path(tempfile.gettempdir()) / f"weights-{items}"
    path.write_bytes(encode(learner.replica.write_all()))
    try:
        return int(subprocess.check_output([sys.executable, __file__, "--part", "read", "--path", str(path)]))
    finally:
        path.unlink()


def read(path: Path) -> int:
    """Hold the weights in a file as a server does; return the memory of the process then."""
    replica = Replica(Settings(), torch.device("cpu"))
    receiver = Receiver(path.stat().st_size, replica.place)
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            receiver.feed(piece)
    replica.apply(receiver.payload())
    return resident_bytes()


def measure_items(items: int) -> dict[str, float]:
    """Measure what an item takes where weights are held, and in a full copy of them."""
    found: dict[str, float] = {}
    for part in ("server", "trainer"):
        few, many = (
            int(subprocess.check_output([sys.executable, __file__, "--part", part, "--items", str(count)]))
            for count in (FEW_ITEMS, items)
        )
        found[part] = (many - few) / (items - FEW_ITEMS)
    served, own = (
        len(encode(payload)) - len(encode(few))
        for payload, few in zip(
            *(made_up_learner(Settings(), count).write_all() for count in (items, FEW_ITEMS)), strict=True
        )
    )
    found["full_copy"] = (served + own) / (items - FEW_ITEMS)
    return {name: round(value) for name, value in found.items()}


def measure_users(users: int, entries: int) -> dict[str, float]:
    """Measure in the store what a user with so many history entries takes, and each entry and log record."""
    with tempfile.TemporaryDirectory() as directory, EmbeddedStore(Path(directory)) as embedded:
        settings = Settings(redis_url=embedded.url)
        with connect(settings) as client:
            log = FeedbackLog(client, settings)
            for number in range(entries):
                for first in range(0, users, BATCH):
                    log.append(
                        [
                            Feedback(
                                f"user-{user}", f"item-{user + number}", "click", 1_700_000_000_000 + 1000 * number
                            )
                            for user in range(first, min(first + BATCH, users))
                        ]
                    )
            kept = sum(int(client.memory_usage(history_key(settings, f"user-{user}")) or 0) for user in range(users))
            usage = log.usage()
            return {
                "history": round(kept / users),
                "history_entry": round(kept / users / entries),
                "log_record": round(usage.bytes / usage.records),
            }


def main() -> None:
    """Measure, or do one part of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--users", type=int, default=500)
    parser.add_argument("--entries", type=int, default=100)
    parser.add_argument("--part", choices=["server", "trainer", "read"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(read(given.path) if given.part == "read" else hold(given.part, given.items))
        return
    print(
        json.dumps(
            {
                "items": given.items,
                "item": measure_items(given.items),
                "entries": given.entries,
                "user": measure_users(given.users, given.entries),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
