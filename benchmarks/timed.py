"""Timed: run the trainer or the server as `recsys train` or `serve` do, and write down what its metrics only count.

`python timed.py (train|serve) FILE` with RECSYS_* in the environment; FILE is written as JSON after SIGTERM: seconds by
stage for each feedback, when each version was committed (by the trainer) or applied (by the server), and CPU seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import recsys.server
import trainer.daemon
from recsys.metrics import ServerMetrics
from recsys.settings import load
from trainer.metrics import TrainerMetrics

VERSION_METHODS: dict[Any, str] = {TrainerMetrics: "version_committed", ServerMetrics: "version_applied"}


def listen(metrics: Any) -> dict[str, Any]:
    """Write down what instances of a class of metrics are told, from now on."""
    stages: dict[str, list[float]] = {}
    versions: dict[int, float] = {}
    freshness, about_version = metrics.freshness, getattr(metrics, VERSION_METHODS[metrics])

    def note_freshness(self: Any, stage: str, seconds: Iterable[float]) -> None:
        values = list(seconds)
        stages.setdefault(stage, []).extend(values)
        freshness(self, stage, values)

    def note_version(self: Any, version: int, *rest: Any) -> None:
        # The server says itself when it applied a version; by the time it is told here there may be answers from it.
        versions[version] = rest[1] if metrics is ServerMetrics else time.time()
        about_version(self, version, *rest)

    metrics.freshness = note_freshness
    setattr(metrics, VERSION_METHODS[metrics], note_version)
    return {"stages": stages, "versions": versions}


def main() -> None:
    """Run one part."""
    part, file = sys.argv[1:]
    metrics, run = {
        "train": (TrainerMetrics, trainer.daemon.run),
        "serve": (ServerMetrics, recsys.server.run),
    }[part]
    noted, started = listen(metrics), time.process_time()
    run(load())
    Path(file).write_text(json.dumps({**noted, "cpu_seconds": time.process_time() - started}))


if __name__ == "__main__":
    main()
