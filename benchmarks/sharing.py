"""Sharing: what a new version costs the answers of processes that share one copy of the weights.

Items are learned and copied as partitions.py does. Processes then answer batches of users of the file, one after
another, while one of them puts a version of 1,000 changed rows in place every so often. Prints one JSON object: of each
process users answered a second, and the milliseconds of batches during which no version came and of those during which
one did: median, 99th percentile and longest.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_up import changed
from partitions import CPU, copied, learned
from threadpoolctl import threadpool_limits

from recsys.catalog import Catalog, CatalogMirror
from recsys.follower import CALLED_SECONDS, LOOK_SECONDS
from recsys.scorer import Query, Scorer
from recsys.server import SWITCH_SECONDS
from recsys.settings import load
from recsys.store.connection import connect
from recsys.store.v1.log_pb2 import HistoryEntry
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights import encode
from recsys.weights.payload import decode
from recsys.weights.shared import SharedWeights, create

CHANGED_ROWS = 1000
MINUTE_MS = 60_000
# Of all processes, to be ready at the same time.
START_SECONDS = 300
Times = dict[str, list[float]]


def write(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a whole version and those that follow it to a folder; return what a process needs besides."""
    settings, learner, histories = learned(arguments.data, arguments.events)
    many = copied(learner, settings, arguments.items, noise=0.5)
    (folder / "0").write_bytes(encode(many.replica.write_all()))
    for version in range(1, round(arguments.seconds * arguments.versions_per_second) + 1):
        (folder / str(version)).write_bytes(encode(changed(many, CHANGED_ROWS, version)[0]))
    return {
        "settings": {
            "classes": [each.model_dump() for each in settings.classes],
            "device": "cpu",
            "retrieval": arguments.retrieval,
        },
        "histories": [[int(row) for row in rows if row] for rows in histories.rows_BL[: arguments.batch]],
        "interval": 1 / arguments.versions_per_second,
        "seconds": arguments.seconds,
        "folder": str(folder),
    }


def follow(scorer: Scorer, stopping: threading.Event) -> None:
    """Do what the follower of a process does that does not lead."""
    while not stopping.is_set():
        deadline = time.monotonic() + LOOK_SECONDS
        while not scorer.called() and time.monotonic() < deadline and not stopping.wait(CALLED_SECONDS):
            pass
        scorer.refresh()
        scorer.prepare()


def lead(scorer: Scorer, task: dict[str, Any], stopping: threading.Event) -> None:
    """Put one version after another in place."""
    scorer.prepare()
    due = time.monotonic()
    for path in sorted(Path(task["folder"]).glob("[1-9]*"), key=lambda each: int(each.name)):
        due += task["interval"]
        if stopping.wait(max(0.0, due - time.monotonic())):
            return
        payload = scorer.beside(lambda path=path: decode(path.read_bytes()))
        scorer.apply(VersionRecord(version=int(path.name) + 1), payload)
        scorer.prepare()


def answer(scorer: Scorer, task: dict[str, Any], users: int) -> Times:
    """Answer one batch after another; return how many milliseconds each took, by what happened meanwhile."""
    now_ms = time.time_ns() // 1_000_000
    name = task["settings"]["classes"][-1]["name"]
    queries = [
        Query(
            history=tuple(
                HistoryEntry(item_id=f"item-{row}", feedback_class=name, time_ms=now_ms - MINUTE_MS * (len(rows) - n))
                for n, row in enumerate(rows)
            )
        )
        for rows in task["histories"]
    ][:users]
    times: Times = {"without": [], "with": []}
    version, end = scorer.version, time.monotonic() + task["seconds"]
    while (started := time.monotonic()) < end:
        answers = scorer.answer(queries, now_ms)
        times["with" if answers[0].version != version else "without"].append(1000 * (time.monotonic() - started))
        version = answers[0].version
    return times


def serve(number: int, descriptors: list[int], task: dict[str, Any]) -> dict[str, Any]:
    """Be one of the processes; the first one leads."""
    settings = load(task["settings"], environment={})
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_SECONDS)
    scorer = Scorer(
        settings, CatalogMirror(Catalog(connect(settings), settings)), CPU, SharedWeights(settings, descriptors)
    )
    if not number:
        scorer.leads()
        scorer.load(VersionRecord(version=1), decode((Path(task["folder"]) / "0").read_bytes()))
    while not scorer.version:
        time.sleep(LOOK_SECONDS)
        scorer.refresh()
    scorer.prepare()
    scorer.leave()
    scorer.warm_up()
    print("ready", flush=True)
    sys.stdin.readline()
    stopping = threading.Event()
    moving = threading.Thread(
        target=follow if number else lead, args=(scorer, stopping) if number else (scorer, task, stopping)
    )
    moving.start()
    times = answer(scorer, task, len(task["histories"]))
    stopping.set()
    moving.join()
    scorer.leave()
    return {
        "users_per_second": round(sum(map(len, times.values())) * len(task["histories"]) / task["seconds"]),
        "versions": scorer.version - 1,
        **{f"{kind}_a_version_ms": summary(each) for kind, each in times.items()},
    }


def summary(values: list[float]) -> list[float]:
    """Return median, 99th percentile and longest."""
    return [round(float(np.quantile(values, share)), 2) for share in (0.5, 0.99, 1.0)] if values else []


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of feedback")
    parser.add_argument("--events", type=int, default=20_000, help="feedback to learn")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="users to a batch")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--versions-per-second", type=float, default=1.0)
    parser.add_argument("--retrieval", default="auto")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--descriptors", type=int, nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process is not None:
        with threadpool_limits(1):
            task = json.loads(sys.stdin.readline())
            print(json.dumps(serve(arguments.process, arguments.descriptors, task)))
        return
    torch.set_num_threads(1)
    torch.manual_seed(1)
    descriptors = create()
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        task = write(Path(folder), arguments)
        command = [sys.executable, __file__, "--descriptors", *map(str, descriptors), "--process"]
        children = [
            subprocess.Popen(
                [*command, str(number)],
                pass_fds=descriptors,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for number in range(arguments.processes)
        ]
        for line in (json.dumps(task), None, "go"):
            for child in children:
                assert child.stdin is not None
                assert child.stdout is not None
                if line is None:
                    assert child.stdout.readline() == "ready\n"
                else:
                    child.stdin.write(line + "\n")
                    child.stdin.flush()
        found = [json.loads(child.communicate(timeout=START_SECONDS)[0]) for child in children]
    print(json.dumps({"items": arguments.items, "retrieval": arguments.retrieval, "processes": found}))


if __name__ == "__main__":
    main()
