"""Fit: learn a file of feedback offline, say what that was worth, and hand the weights to the store as a version.

The file is cut by time: the first part is learned in epochs, the second says when to stop, the third is never learned
from before the accuracy on it was measured. Then the second and the third are learned as well, in the order of time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from recsys.errors import FencedOff, InputFileError, OtherVersionCameFirst
from recsys.feedback_file import FeedbackFile
from recsys.feedback_log import BEGINNING
from recsys.settings import Settings
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights import Lineage, LogRange, WeightPayload, WeightStore, encode
from recsys.weights.earlier import ATTEMPTS, FITTED, HOLD_SECONDS, put_together
from trainer.arrivals import Arrivals
from trainer.epochs import Epochs
from trainer.evaluation.methods import RECSYS, Found, LearnerMethod
from trainer.evaluation.stream import Case, Stream
from trainer.evaluation.tally import Tally
from trainer.examples import batches
from trainer.gate import Comparison
from trainer.learner import Learner


@dataclass(frozen=True, slots=True)
class Start:
    """Say what a fit starts from, and which version it will be compared with; version 0 is an empty store."""

    record: VersionRecord
    weights: tuple[WeightPayload, WeightPayload] | None
    served: tuple[WeightPayload, WeightPayload] | None


def start_from(store: WeightStore | None, version: int) -> Start:
    """Read what the store holds: a fit from `version`, from nothing when it is 0, from the last one when it is -1.

    Raises:
        NotRetained: when the version is not kept.
    """
    head = store.head() if store is not None else None
    if store is None or head is None:
        return Start(VersionRecord(position=BEGINNING), None, None)
    _, *served = put_together(store, head.version)
    if version in (-1, head.version):
        return Start(head, (served[0], served[1]), (served[0], served[1]))
    if version == 0:
        return Start(head, None, (served[0], served[1]))
    record, *weights = put_together(store, version)
    return Start(record, (weights[0], weights[1]), (served[0], served[1]))


class Fit:
    """Fit one learner to one file; `run`, then `result`, then perhaps `hand_over`.

    `train_size` is how much feedback an epoch learns; `contents` are categories by item.
    """

    def __init__(
        self,
        file: FeedbackFile,
        settings: Settings,
        device: torch.device,
        start: Start,
        *,
        validation_share: float,
        test_share: float,
        contents: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._settings, self._start = settings, start
        self.learner = Learner(settings, device)
        if start.weights is not None:
            self.learner.restore(*start.weights)
        if contents:
            self.learner.catalogue(contents)
        self._arrivals = Arrivals(self.learner)
        self._stream = Stream(file, settings, self._arrivals)
        cases = list(self._stream.cases())
        tested, kept = round(len(cases) * test_share), round(len(cases) * validation_share)
        self.train_size = len(cases) - tested - kept
        if self.train_size < 1:
            raise InputFileError("the file holds too little feedback: nothing is left to learn")
        self._validation = cases[self.train_size : len(cases) - tested]
        self._test = cases[len(cases) - tested :]
        self._epochs = Epochs(self.learner, cases[: self.train_size], self._validation, self._arrivals)
        # The epochs hold it in a tenth of the space.
        del cases
        self._before, self._losses_before = self._measured_before(file)
        self._after: dict[str, Any] = {}
        self._losses_after: list[np.ndarray] = []

    def run(self, epochs: int, patience: int, progress: Callable[[int, int], None]) -> None:
        """Learn in epochs, measure, and learn what was kept apart; see Epochs.run."""
        try:
            self._epochs.run(epochs, patience, progress)
        finally:
            self._after, self._losses_after = self._measure(self.learner, self._arrivals, self._test)
        LearnerMethod(self.learner, self._arrivals).learn([*self._validation, *self._test])
        self.learner.follow_contents()

    def result(self) -> dict[str, Any]:
        """Return what was done and what it was worth as one object for JSON."""
        return {
            "feedback": {"train": self.train_size, "validation": len(self._validation), "test": len(self._test)},
            "bad_rows": self._stream.bad_rows,
            "items": len(self.learner.table),
            "from_version": self._start.record.version if self._start.weights is not None else 0,
            # What has no meaning, such as a loss over nothing, is no number in JSON.
            "epochs": [
                {name: value if math.isfinite(value) else None for name, value in asdict(epoch).items()}
                for epoch in self._epochs.history
            ],
            "best_epoch": self._epochs.best,
            "before": self._before,
            "after": self._after,
            "objection": self.objection(),
        }

    def objection(self) -> str | None:
        """Return why the weights must not be served, or None: they are compared with the version that is.

        The comparison is the gate's, on the part of the file that neither has learned.
        """
        if self._start.served is None:
            return None
        names = ("ranks", "classifies")
        for name, candidate, served in zip(names, self._losses_after, self._losses_before, strict=True):
            comparison = Comparison()
            comparison.add(candidate, served)
            worse = comparison.at_least(self._settings.gate_confidence)
            if worse > self._settings.gate_margin:
                return f"{name} the file's last part worse than the version served: surely by {worse:.3f} nats"
        return None

    def hand_over(self, store: WeightStore, now_ms: int) -> VersionRecord:
        """Commit the weights as a new version; a trainer at work goes on from it.

        It goes on behind the feedback that the version it started from had learned, or the last version when the fit
        began from nothing: what came in since is learned on top.

        Raises:
            OtherVersionCameFirst: when trainers committed in between ATTEMPTS times.
        """
        served, own = map(encode, self.learner.write_all())
        lineage = self._lineage(now_ms)
        store.hold(HOLD_SECONDS)
        try:
            for _ in range(ATTEMPTS):
                epoch, head = store.epoch() or store.acquire(), store.head()
                try:
                    made = store.commit(epoch, head.version if head is not None else 0, served, own, lineage)
                except FencedOff:
                    continue
                # The versions behind it are rebuilt from here: no log leads to it.
                store.write_snapshot(epoch, made.version, served, own)
                return made
        finally:
            store.hold(0)
        raise OtherVersionCameFirst(f"trainers committed other versions in between, {ATTEMPTS} times; try again")

    def _lineage(self, now_ms: int) -> Lineage:
        record, after = self._start.record, self._after
        count = self.train_size + len(self._validation) + len(self._test)
        named = {name: value for name, value in after.items() if isinstance(value, float)}
        return Lineage(
            position=record.position,
            feedback_learned=record.feedback_learned,
            feedback_added=0,
            settings_digest=self._settings.learning_digest(),
            metrics=named,
            accepted_ms=(),
            committed_ms=now_ms,
            window_position=record.window_position or BEGINNING,
            kind=FITTED,
            set_aside=[LogRange(part.after, part.until) for part in record.set_aside],
            reason=f"fitted to {count:,} feedback of a file in {len(self._epochs.history)} epochs",
        )

    def _measured_before(self, file: FeedbackFile) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Measure the version that is served, or new weights where there is none, on the last part of the file."""
        if self._start.served is self._start.weights:
            return self._measure(self.learner, self._arrivals, self._test)
        served = Learner(self._settings, self.learner.device)
        assert self._start.served is not None
        served.restore(*self._start.served)
        # Its rows are others than those of weights made from nothing.
        arrivals = Arrivals(served)
        cases = list(Stream(file, self._settings, arrivals).cases())
        return self._measure(served, arrivals, cases[len(cases) - len(self._test) :])

    def _measure(
        self, learner: Learner, arrivals: Arrivals, cases: Sequence[Case]
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Test cases without learning; return the measures, and each one's losses over items and classes."""
        tally, method, found = Tally(self._settings, [RECSYS]), LearnerMethod(learner, arrivals), list[Found]()
        for batch in batches(cases, self._settings.batch_size):
            found.append(method.run(batch, learn=False))
            tally.add(batch, {RECSYS: found[-1]})
        losses = [
            np.concatenate([getattr(each, name) for each in found] or [np.zeros(0)])
            for name in ("item_loss_B", "class_loss_B")
        ]
        measures = tally.summary(RECSYS, self._stream.items)
        measures.pop("moving", None)
        return measures, losses
