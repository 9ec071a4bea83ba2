"""LogLearner: learn the feedback log entry by entry; a pure function of the weights it starts from and the log.

A batch is `batch_size` feedback, more when that much was accepted within `batch_seconds`, or what stands before a tick;
a version is `batches_per_version` batches or what stands before a tick. No clock is read here, so that a version can be
made again from the log, bit for bit.
"""

from __future__ import annotations

from collections import deque
from enum import Enum, auto

import torch
from torch import Tensor

from recsys.encoding import row_history
from recsys.feedback_log import BEGINNING, FeedbackLog, LogEntry, position_key, previous_position
from recsys.settings import Settings
from recsys.store.v1.log_pb2 import FeedbackRecord
from recsys.store.v1.weights_pb2 import Range
from recsys.weights import Lineage, LogRange, VersionRecord
from recsys.weights.earlier import ROLLBACK
from trainer.examples import Event, Examples, encode
from trainer.gate import Gate, describe
from trainer.learner import Learner
from trainer.metrics import TrainerMetrics
from trainer.quality import Quality

# Feedback read and encoded at once while the replay window is filled.
FILL_COUNT = 5000


class Outcome(Enum):
    """What taking an entry of the log led to."""

    GOING_ON = auto()
    # A version is complete and may be published.
    COMPLETE = auto()
    # A version is complete and worse than the one being served; learning goes on.
    HELD = auto()
    # It was held too often: the feedback since the last version is to be set aside.
    SPOILED = auto()


class LogLearner:
    """Own a learner and the version in the making.

    `read_position` is that of the last entry taken; `head` the record of the version that is being continued.
    """

    def __init__(self, settings: Settings, metrics: TrainerMetrics, device: torch.device) -> None:
        self._settings, self._metrics = settings, metrics
        self.learner = Learner(settings, device)
        self.quality = Quality()
        self._gate = Gate(settings, self.learner) if settings.gate else None
        # Positions of the feedback in the replay window.
        self._window: deque[str] = deque(maxlen=settings.replay_capacity)
        self.begin(VersionRecord(position=BEGINNING))

    def fill_window(self, log: FeedbackLog, head: VersionRecord) -> None:
        """Fill the replay window as it was at `head` with the feedback before its position."""
        pages: list[tuple[Examples, list[str]]] = []
        until, missing = head.position, self._settings.replay_capacity
        # From the newest back, until it is full: what was set aside has no place in it.
        while missing and (page := log.read_before(until, min(missing, FILL_COUNT))):
            until = previous_position(page[0].position)
            found = [
                (entry.position, event)
                for entry in page
                if entry.record is not None
                and self._was_learned(entry, head)
                and (event := self._event(entry.record)) is not None
            ]
            if found:
                missing -= len(found)
                positions = [position for position, _ in found]
                pages.append((encode([event for _, event in found], self._settings), positions))
        for examples, positions in reversed(pages):
            self.learner.window.add(examples)
            self._window.extend(positions)

    def _was_learned(self, entry: LogEntry, head: VersionRecord) -> bool:
        known = entry.record is not None and entry.record.feedback_class in self._settings.class_index
        return known and not any(_within(entry.position, part) for part in head.set_aside)

    def begin(self, head: VersionRecord, changed: Tensor | None = None) -> None:
        """Begin the version after `head`, whose weights the learner holds; `changed` rows since the one before."""
        self.head = head
        if self._gate is not None:
            self._gate.accept(changed)
        self._skipped: list[LogRange] = []
        # Why the version in the making was held so far.
        self.objections: list[str] = []
        self.read_position = self._position = head.position
        # Feedback read and not yet learned.
        self._pending: list[tuple[LogEntry, FeedbackRecord]] = []
        self.batches = self.consumed = 0
        self.accepted_ms: list[int] = []

    @property
    def empty(self) -> bool:
        """Return whether nothing waits to be learned or published; what was held waits for more feedback."""
        return not self._pending and not self.batches

    def take(self, entry: LogEntry) -> Outcome:
        """Go past one entry of the log, learning the batch that it completes.

        After COMPLETE the caller publishes what `lineage` describes and calls `begin` before the next entry, after
        SPOILED it goes back to `head`.
        """
        if entry.record is not None:
            self.consumed += 1
            if entry.record.feedback_class in self._settings.class_index:
                self._pending.append((entry, entry.record))
            else:
                self._metrics.skipped("unknown_class", 1)
        elif not entry.tick:
            self._metrics.skipped("malformed", 1)
        if self._full() or (entry.tick and self._pending):
            self._learn()
        self.read_position = entry.position
        if not self._pending:
            self._position = entry.position
        if self.batches < self._settings.batches_per_version and not (entry.tick and self.batches):
            return Outcome.GOING_ON
        return self._verdict()

    def _full(self) -> bool:
        """Tell whether what is pending is a batch.

        A step costs about as much for what it replays as for what is new, so that fewer and larger ones keep up with
        more feedback. How far behind the trainer is must not decide; how fast feedback came stands in the log.
        """
        settings, count = self._settings, len(self._pending)
        if count < settings.batch_size:
            return False
        spanned_ms = self._pending[-1][0].accepted_ms - self._pending[0][0].accepted_ms
        return spanned_ms >= 1000 * settings.batch_seconds or count >= settings.batch_size * settings.batch_growth

    def _verdict(self) -> Outcome:
        objection = self._gate.objection() if self._gate is not None else None
        if objection is None:
            return Outcome.COMPLETE
        self.objections.append(objection)
        self.batches = 0
        return Outcome.SPOILED if len(self.objections) >= self._settings.gate_holds else Outcome.HELD

    def lineage(self, committed_ms: int) -> Lineage:
        """Describe the version that is complete."""
        oldest = self._window[0] if self._window else BEGINNING
        return Lineage(
            position=self._position,
            feedback_learned=self.head.feedback_learned + self.consumed,
            feedback_added=len(self.accepted_ms),
            settings_digest=self._settings.learning_digest(),
            metrics=self.quality.summary(recent=True),
            accepted_ms=self.accepted_ms,
            committed_ms=committed_ms,
            window_position=oldest,
            set_aside=[
                part
                for part in (*_ranges(self.head), *self._skipped)
                if position_key(part.until) > position_key(oldest)
            ],
            reason=describe(self.objections),
        )

    def spoiled_lineage(self, committed_ms: int) -> Lineage:
        """Describe the version that stands in place of what was spoiled: the content of `head`, behind the feedback."""
        head = self.head
        return Lineage(
            position=self.read_position,
            feedback_learned=head.feedback_learned + self.consumed,
            feedback_added=0,
            settings_digest=self._settings.learning_digest(),
            metrics=dict(head.metrics),
            accepted_ms=(),
            committed_ms=committed_ms,
            window_position=head.window_position,
            kind=ROLLBACK,
            restored_version=head.version,
            set_aside=[*_ranges(head), LogRange(head.position, self.read_position)],
            reason=describe(self.objections),
        )

    def _event(self, record: FeedbackRecord) -> Event | None:
        """Turn a record into an example; every item in it gets a row, so that it looks the same ever after."""
        index = self._settings.class_index.get(record.feedback_class)
        if index is None:
            return None
        self.learner.allocate([*(entry.item_id for entry in record.history), record.item_id])
        table = self.learner.table
        history = row_history(record.history, table, self._settings.class_index)
        return Event(table.row(record.item_id), index, record.time_ms, history, record.context)

    def _learn(self) -> None:
        events = [event for _, record in self._pending if (event := self._event(record)) is not None]
        examples = encode(events, self._settings)
        report = self.learner.step(examples)
        if self._gate is not None:
            self._gate.observe(examples, report)
        positions = [entry.position for entry, _ in self._pending]
        self.accepted_ms.extend(entry.accepted_ms for entry, _ in self._pending)
        self._pending.clear()
        self.batches += 1
        if report.learned:
            self._window.extend(positions)
            self._metrics.gradient_norm(report.gradient_norm)
            for name, value in report.losses.items():
                self._metrics.loss(name, value)
        else:
            # What spoils a step is not replayed either.
            self._skipped.append(LogRange(self._position, positions[-1]))
            self._metrics.skipped("non_finite", len(events))
        self.quality.add_ranks("recsys", report.rank_B)
        self.quality.add_ranks("popularity", report.popularity_rank_B)
        self.quality.add_losses(report.item_loss_B, report.class_loss_B)


def _ranges(head: VersionRecord) -> list[LogRange]:
    return [LogRange(part.after, part.until) for part in head.set_aside]


def _within(position: str, part: Range) -> bool:
    return position_key(part.after) < position_key(position) <= position_key(part.until)
