"""Made-up weights of any number of items, as a trainer would publish them."""

from __future__ import annotations

import time

import numpy as np
import torch

from recsys.settings import Settings
from recsys.weights import Lineage, WeightPayload
from trainer.learner import Learner


def made_up_learner(settings: Settings, items: int) -> Learner:
    """Make a learner whose table has `items` items, each with a vector, counts and successors."""
    learner = Learner(settings, torch.device("cpu"))
    draw = np.random.default_rng(1)
    rows = items + 1
    successors = draw.integers(1, rows, (items, settings.successors), dtype=np.int32)
    columns = {
        "vector": draw.standard_normal((items, settings.dimension), dtype=np.float32),
        "trend": draw.random((items, 3), dtype=np.float32),
        "touched": draw.integers(0, 1_000_000, items),
        "total": draw.integers(0, 1000, items).astype(np.float32),
        "successor": successors,
        "successor_weight": draw.random(successors.shape, dtype=np.float32),
    }
    table = learner.table
    table.clock = 1_000_000
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
