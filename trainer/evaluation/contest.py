"""Contest: several methods over the cases of one file, taught and tested apart, as offline protocols do it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recsys.feedback_file import FeedbackFile
from recsys.settings import Settings
from trainer.arrivals import Arrivals
from trainer.epochs import Epochs
from trainer.evaluation.methods import BASELINES, RECSYS, LearnerMethod, Method, held_bytes
from trainer.evaluation.stream import Case, Stream
from trainer.evaluation.tally import Tally
from trainer.examples import batches
from trainer.learner import Learner

# Told what is being done, how much feedback of it is done, and of how much.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Teaching:
    """Say how long the learner is taught: at most so many epochs, until `patience` in a row gained nothing.

    `timeless`: what is tested lies anywhere in the time of what is taught.
    """

    epochs: int
    patience: int
    timeless: bool = False


class Contest:
    """Own the methods and the whole file's cases."""

    def __init__(
        self,
        file: FeedbackFile,
        settings: Settings,
        device: torch.device,
        names: Sequence[str],
        progress: Progress,
        contents: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Prepare the methods; `contents` are categories by item, which the learner is told before any feedback."""
        self._file, self._settings, self._progress = file, settings, progress
        learner = Learner(settings, device) if RECSYS in names else None
        if learner is not None and contents:
            learner.catalogue(contents)
        arrivals = Arrivals(learner)
        self._methods: dict[str, Method] = {
            name: LearnerMethod(learner, arrivals) if name == RECSYS and learner else BASELINES[name]()
            for name in names
        }
        self._stream = Stream(file, settings, arrivals)
        self.seconds = dict.fromkeys(names, 0.0)

    @property
    def names(self) -> list[str]:
        """Return the methods' names."""
        return list(self._methods)

    def cases(self, limit: int | None) -> list[Case]:
        """Read the first `limit` feedback of the file (default all)."""
        return list(self._stream.cases(limit))

    def teach(self, train: Sequence[Case], validation: Sequence[Case], teaching: Teaching) -> None:
        """Teach every method; the learner in epochs, which `validation` ends, or who interrupts a further one."""
        for name, method in self._methods.items():
            started = time.perf_counter()
            if isinstance(method, LearnerMethod):
                self._teach_learner(method, train, validation, teaching)
            else:
                self._progress(name, 0, len(train))
                method.learn(train)
            self.seconds[name] += time.perf_counter() - started

    def _teach_learner(
        self, method: LearnerMethod, train: Sequence[Case], validation: Sequence[Case], teaching: Teaching
    ) -> None:
        epochs = Epochs(method.learner, train, validation, method.arrivals, timeless=teaching.timeless)

        def progress(epoch: int, done: int) -> None:
            best = f", best {epochs.best}" if epochs.best else ""
            self._progress(f"{RECSYS}: epoch {epoch} of at most {teaching.epochs}{best}", done, len(train))

        try:
            epochs.run(teaching.epochs, teaching.patience, progress)
        except KeyboardInterrupt:
            if not epochs.best:
                raise

    def learn(self, cases: Sequence[Case]) -> None:
        """Let every method learn cases once, in the order of time."""
        for name, method in self._methods.items():
            self._progress(name, 0, len(cases))
            started = time.perf_counter()
            method.learn(cases)
            self.seconds[name] += time.perf_counter() - started

    def test(self, cases: Sequence[Case], *, learn: bool = False) -> Tally:
        """Test every method on cases; with `learn`, each batch is learned once it was tested."""
        tally = Tally(self._settings, self.names)
        for batch in batches(cases, self._settings.batch_size):
            found = {}
            for name, method in self._methods.items():
                started = time.perf_counter()
                found[name] = method.run(batch, learn=learn)
                self.seconds[name] += time.perf_counter() - started
            tally.add(batch, found)
            self._progress("test", tally.feedback, len(cases))
        return tally

    def summary(self, name: str, tally: Tally) -> dict[str, Any]:
        """Return what a tally tells of one method, with what the method has cost so far."""
        return {
            "seconds": round(self.seconds[name], 3),
            "bytes": held_bytes(self._methods[name]),
            **tally.summary(name, self._stream.items),
        }

    def result(self, protocol: str, methods: list[dict[str, Any]], tested: Tally, **more: Any) -> dict[str, Any]:
        """Put together one object for JSON."""
        return {
            "protocol": protocol,
            "stream": self._file.layout,
            "feedback": self._stream.feedback,
            "events": tested.events,
            "users": self._stream.users,
            "items": self._stream.items,
            "bad_rows": self._stream.bad_rows,
            "skipped_batches": sum(m.skipped for m in self._methods.values() if isinstance(m, LearnerMethod)),
            **more,
            "methods": methods,
        }
