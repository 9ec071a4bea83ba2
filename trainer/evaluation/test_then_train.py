"""Test-then-train: every feedback is tested, then learned, in the order of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from recsys.feedback_file import FeedbackFile
from recsys.settings import Settings
from trainer.evaluation.methods import BASELINES, RECSYS, LearnerMethod, Method, held_bytes, suitable
from trainer.evaluation.stream import Case, Stream
from trainer.evaluation.tally import Tally
from trainer.examples import batches
from trainer.learner import Learner

PROTOCOL = "test-then-train"


class Evaluation:
    """Evaluate one file; `run` once."""

    def __init__(
        self,
        file: FeedbackFile,
        settings: Settings,
        device: torch.device,
        methods: Sequence[str] | None = None,
        contents: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Prepare the evaluation; `contents` are categories by item, which the learner is told before any feedback."""
        names = list(methods) if methods is not None else suitable(settings)
        self._file, self._settings = file, settings
        self.learner = Learner(settings, device) if RECSYS in names else None
        if self.learner is not None and contents:
            self.learner.catalogue(contents)
        self._methods: dict[str, Method] = {
            name: LearnerMethod(self.learner) if name == RECSYS and self.learner else BASELINES[name]()
            for name in names
        }
        self._seconds = dict.fromkeys(names, 0.0)
        self._stream = Stream(file, settings, self.learner)
        self.tally = Tally(settings, names)

    @property
    def feedback(self) -> int:
        """Return how much feedback was tested and learned."""
        return self.tally.feedback

    def run(self, limit: int | None = None, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        """Evaluate the first `limit` feedback (default all); call `progress` with the number done after each batch."""
        for batch in batches(self._stream.cases(limit), self._settings.batch_size):
            self._batch(batch)
            progress(self.feedback)
        return self.result()

    def follow(self, allowed: Callable[[], int | None]) -> None:
        """Go on as far as `allowed` says each time that it is called, until it says None."""
        cases = self._stream.cases()
        while (until := allowed()) is not None:
            while self.feedback < until:
                batch = list(islice(cases, min(self._settings.batch_size, until - self.feedback)))
                if not batch:
                    return
                self._batch(batch)

    def _batch(self, cases: list[Case]) -> None:
        found = {}
        for name, method in self._methods.items():
            started = time.perf_counter()
            found[name] = method.run(cases)
            self._seconds[name] += time.perf_counter() - started
        self.tally.add(cases, found)
        if self.learner is not None:
            self.learner.take_changed()

    def result(self) -> dict[str, Any]:
        """Return what was measured so far as one object for JSON."""
        learner = self._methods.get(RECSYS)
        return {
            "protocol": PROTOCOL,
            "stream": self._file.layout,
            "feedback": self.feedback,
            "events": self.tally.events,
            "users": self._stream.users,
            "items": self._stream.items,
            "bad_rows": self._stream.bad_rows,
            "skipped_batches": learner.skipped if isinstance(learner, LearnerMethod) else 0,
            "methods": [
                {
                    "name": name,
                    "seconds": round(self._seconds[name], 3),
                    "bytes": held_bytes(method),
                    **self.tally.summary(name, self._stream.items),
                }
                for name, method in self._methods.items()
            ],
        }
