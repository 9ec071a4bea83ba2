"""Evaluation: run the learner over a file of feedback as fast as the machine goes, test-then-train, beside counting.

Protocol: events (positive feedback) in time order; before learning from an event, rank every item seen so far except
those the user already has; an event whose item is new is a miss, as is one whose item the user already has; no
sampling of negatives; ties count against the target only where the other item is older.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from recsys.encoding import RowHistory
from recsys.feedback_file import FeedbackFile
from recsys.settings import Settings
from trainer.baselines import Popularity
from trainer.examples import Event, batches, encode
from trainer.learner import Learner
from trainer.quality import NO_EVENT, Quality

PROTOCOL = "test-then-train"
DECAY = 0.999


@dataclass(slots=True)
class _User:
    """What one user has done so far: recent history, and every distinct item chosen."""

    history: deque[tuple[int, int, int]]
    seen: array[int] = field(default_factory=lambda: array("q"))


@dataclass(frozen=True, slots=True)
class _Test:
    """An event with what the user had before it."""

    event: Event
    positive: bool
    seen: np.ndarray


class Evaluation:
    """Evaluate one file; `run` once."""

    def __init__(self, file: FeedbackFile, settings: Settings, device: torch.device) -> None:
        self._file, self._settings = file, settings
        self._learner = Learner(settings, device)
        self._baselines = {"popularity": Popularity(), "popularity_decayed": Popularity(DECAY)}
        self.quality = Quality(("recsys", *self._baselines))
        self._seconds = dict.fromkeys(("recsys", *self._baselines), 0.0)
        self._users: dict[str, _User] = {}
        self.bad_rows = 0
        self.feedback = 0
        self.skipped = 0

    def run(self, limit: int | None = None, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """Evaluate the first `limit` feedback (default all); call `progress` with the number done after each batch."""
        for batch in batches(self._tests(limit), self._settings.batch_size):
            self._batch(batch)
            progress(self.feedback)
        return self.result()

    def result(self) -> dict[str, Any]:
        """Return what was measured so far as one object for JSON."""
        return {
            "protocol": PROTOCOL,
            "stream": self._file.layout,
            "feedback": self.feedback,
            "events": self.quality.events,
            "bad_rows": self.bad_rows,
            "skipped_batches": self.skipped,
            **self.quality.losses(),
            "methods": [
                {"name": name, **self.quality.metrics(name), "seconds": round(seconds, 3)}
                for name, seconds in self._seconds.items()
            ],
        }

    def _tests(self, limit: int | None) -> Iterator[_Test]:
        classes = self._settings.classes
        for chunk in self._file.chunks():
            self.bad_rows += len(chunk.bad)
            contexts = self._file.contexts(chunk)
            columns = (
                chunk.user_ids.tolist(),
                chunk.item_ids.tolist(),
                chunk.classes.tolist(),
                chunk.times_ms.tolist(),
            )
            for user_id, item_id, index, time_ms, context in zip(*columns, contexts, strict=False):
                if limit is not None and self.feedback >= limit:
                    return
                self.feedback += 1
                user = self._users.get(user_id)
                if user is None:
                    user = self._users[user_id] = _User(deque(maxlen=self._settings.history_length))
                row = self._learner.table.row(item_id) or self._learner.table.allocate([item_id])[0][1]
                history = RowHistory(*zip(*user.history, strict=True)) if user.history else RowHistory((), (), ())
                positive = classes[index].positive
                event = Event(row, index, time_ms, history, context)
                yield _Test(event, positive, np.array(user.seen, np.int64))
                if classes[index].history:
                    user.history.append((row, index, time_ms))
                    if row not in user.seen:
                        user.seen.append(row)

    def _batch(self, tests: list[_Test]) -> None:
        for name, baseline in self._baselines.items():
            started = time.perf_counter()
            ranks = np.full(len(tests), NO_EVENT)
            for i, test in enumerate(tests):
                if test.positive:
                    ranks[i] = baseline.rank(test.event.row, test.seen)
                    baseline.add(test.event.row)
            self._seconds[name] += time.perf_counter() - started
            self.quality.add_ranks(name, ranks)
        started = time.perf_counter()
        report = self._learner.step(encode([t.event for t in tests], self._settings), [t.seen for t in tests])
        self._seconds["recsys"] += time.perf_counter() - started
        self.quality.add_ranks("recsys", report.rank_B)
        self.quality.add_losses(report.item_loss_B, report.class_loss_B)
        self.skipped += not report.learned
        self._learner.take_changed()
