"""Made-up weights of any number of items, as a trainer would publish them."""

from __future__ import annotations

import time

import numpy as np
import redis
import torch

from recsys.settings import Settings
from recsys.standing import TREND_DECAYS
from recsys.weights import Lineage, WeightPayload
from trainer.learner import Learner

SLOW_MICROSECONDS, SLOW_KEPT = 20, 10_000
# Feedback that the made-up weights have counted.
CLOCK = 1_000_000


def made_up_learner(settings: Settings, items: int) -> Learner:
    """Make a learner whose table has `items` items, each with a vector, counts and successors."""
    learner = Learner(settings, torch.device("cpu"))
    draw = np.random.default_rng(1)
    rows = items + 1
    successors = draw.integers(1, rows, (items, settings.successors), dtype=np.int32)
    touched = draw.integers(1, CLOCK, items)
    columns = {
        "vector": draw.standard_normal((items, settings.dimension), dtype=np.float32),
        "trend": draw.random((items, 2 * len(TREND_DECAYS)), dtype=np.float32),
        "touched": touched,
        "first": draw.integers(1, touched + 1),
        "total": draw.integers(0, 1000, items).astype(np.float32),
        "classes": draw.integers(0, 1000, (items, len(settings.classes))).astype(np.float32),
        "successor": successors,
        "successor_weight": draw.random(successors.shape, dtype=np.float32),
    }
    table = learner.table
    table.clock = CLOCK
    table.write(
        torch.arange(1, rows),
        {name: torch.from_numpy(column) for name, column in columns.items()},
        [(f"item-{row}", row) for row in range(1, rows)],
    )
    return learner


def changed(learner: Learner, count: int, seed: int) -> tuple[WeightPayload, WeightPayload]:
    """Change the vectors of `count` items, and return what a trainer publishes of that."""
    draw = np.random.default_rng(seed)
    rows = torch.from_numpy(np.sort(draw.choice(np.arange(1, learner.table.rows), count, replace=False)))
    learner.table.columns["vector"][rows] += 0.01
    return learner.write(rows, learner.table.rows)


def watch_commands(client: redis.Redis) -> None:
    """Have the store remember which of its commands took long, from here on."""
    client.config_set("slowlog-log-slower-than", SLOW_MICROSECONDS)
    client.config_set("slowlog-max-len", SLOW_KEPT)
    client.slowlog_reset()


def longest_commands(client: redis.Redis) -> dict[str, float]:
    """Return, per command that took long, the most milliseconds that one of them kept the store from all others."""
    found: dict[str, float] = {}
    for entry in client.slowlog_get(SLOW_KEPT):
        name = entry["command"].split()[0].decode()
        found[name] = max(found.get(name, 0.0), entry["duration"] / 1000)
    return found


def made_up_lineage(settings: Settings, version: int) -> Lineage:
    """Describe a version of 256 feedback."""
    return Lineage(
        position=f"{version}-0",
        feedback_learned=256 * version,
        feedback_added=256,
        settings_digest=settings.learning_digest(),
        metrics={},
        accepted_ms=(),
        committed_ms=time.time_ns() // 1_000_000,
    )
