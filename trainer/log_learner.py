"""LogLearner: learn the feedback log entry by entry; a pure function of the weights it starts from and the log.

A batch is `batch_size` feedback, more when that much was accepted within `batch_seconds`, or what stands before a tick;
a version is `batches_per_version` batches or what stands before a tick. What the catalogue says of items is taken in
before the batch that it stands in, or at a tick. No clock is read here, so that a version can be
made again from the log, bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum, auto
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from recsys.accounts import account
from recsys.condition import DISTRUSTED_ACCOUNTS, PUSHED_ITEMS, UNDER_ATTACK
from recsys.encoding import known_history, to_tensor
from recsys.feedback_log import BEGINNING, FeedbackLog, LogEntry, position_key, previous_position
from recsys.item_table import PADDING_ROW
from recsys.packed_ids import PackedIds
from recsys.settings import Settings
from recsys.store.v1.log_pb2 import FeedbackRecord
from recsys.store.v1.weights_pb2 import Range
from recsys.weights import Lineage, LogRange, VersionRecord
from recsys.weights.earlier import ROLLBACK
from trainer.admission import Admission
from trainer.drift import DETECTED, MEASURES, detected_key, score_key
from trainer.examples import Event, Examples, encode
from trainer.gate import Gate, describe
from trainer.impressions import NONE, impression_key
from trainer.learner import Learner
from trainer.metrics import TrainerMetrics
from trainer.quality import NEW_ITEM_CHOSEN, Quality

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
        self._follows = settings.provisional_class is not None
        self._positive_C = np.array([c.positive for c in settings.classes])
        self._gate = Gate(settings, self.learner) if settings.gate else None
        self._admission = Admission(settings)
        # What the catalogue says of items, and the learner is still to take in.
        self._contents: dict[str, tuple[str, ...]] = {}
        # Places of accounts: see recsys.accounts.
        self._forgotten: list[int] = []
        # Positions of the feedback in the replay window.
        self._window: deque[str] = deque(maxlen=settings.replay_capacity)
        self.begin(VersionRecord(position=BEGINNING))

    def fill_window(self, log: FeedbackLog, head: VersionRecord) -> None:
        """Fill the replay window as it was at `head` with the feedback before its position."""
        pages: list[tuple[Examples, list[str], list[str]]] = []
        until, missing = head.position, self._settings.replay_capacity
        # From the newest back, until it is full: what was set aside has no place in it.
        while missing and (page := log.read_before(until, min(missing, FILL_COUNT))):
            until = previous_position(page[0].position)
            found = [
                (entry.position, entry.record)
                for entry in page
                if entry.record is not None and self._was_learned(entry, head)
            ]
            if found:
                missing -= len(found)
                records = [record for _, record in found]
                examples = self._examples(records, admits=not self._settings.bounded_items)
                pages.append((examples, [position for position, _ in found], [record.item_id for record in records]))
        # The table's clock counts what was learned.
        clock = self.learner.table.clock - sum(len(examples) for examples, _, _ in pages)
        for examples, positions, item_ids in reversed(pages):
            clock += len(examples)
            self.learner.remember(examples, clock)
            self._window.extend(positions)
            self._admission.learned(item_ids)

    def read_aside(self, log: FeedbackLog, head: VersionRecord) -> None:
        """Read what else stands in the part of the log that `head` set aside: only feedback is to be left out."""
        position = head.position
        for part in reversed(head.set_aside if head.kind == ROLLBACK else ()):
            if part.until == position:
                position = part.after
        while position_key(position) < position_key(head.position):
            entries = log.read_after(position, FILL_COUNT)
            before = [entry for entry in entries if position_key(entry.position) <= position_key(head.position)]
            for entry in before:
                self._heed(entry)
            if len(before) < FILL_COUNT:
                return
            position = before[-1].position

    def _heed(self, entry: LogEntry) -> None:
        """Keep what an entry says of an item, or of a forgotten account, until the next batch has been learned.

        That batch may hold what the account chose before it was forgotten.
        """
        if entry.item is not None:
            self._contents[entry.item.item_id] = tuple(entry.item.categories)
        elif entry.forgotten is not None:
            self._forgotten.append(entry.forgotten)

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
        # The streams that drifted in its feedback, and how far it is from the version before.
        self.drifted: set[str] = set()
        self._movement: dict[str, float] = {}
        self.read_position = self._position = head.position
        # Whether nothing was learned since the version before, whether anything beside feedback changed it, and whether
        # an account was let go of.
        self._fresh, self._heeded, self._let_gone = True, False, False
        # Feedback read and not yet learned.
        self._pending: list[tuple[LogEntry, FeedbackRecord]] = []
        self.batches = self.consumed = 0
        self.accepted_ms: list[int] = []

    @property
    def empty(self) -> bool:
        """Return whether nothing waits to be learned or published; what was held waits for more feedback."""
        return not (self._pending or self.batches or self._contents or self._forgotten or self._heeded)

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
        elif entry.item is not None or entry.forgotten is not None:
            self._heed(entry)
        elif not entry.tick:
            self._metrics.skipped("malformed", 1)
        if self._full() or (entry.tick and self._pending):
            self._learn()
        elif entry.tick:
            self._take_in_catalogue()
            self._let_go()
        self.read_position = entry.position
        if not self._pending:
            self._position = entry.position
        closed = entry.tick and (self.batches or self._heeded)
        if self.batches < self._settings.batches_per_version and not closed:
            return Outcome.GOING_ON
        return self._verdict()

    def _full(self) -> bool:
        """Tell whether what is pending is a batch.

        A step costs about as much for being one as for what it holds, so that fewer and larger ones keep up with more
        feedback. How far behind the trainer is must not decide; how fast feedback came stands in the log.
        """
        settings, count = self._settings, len(self._pending)
        if count < settings.batch_size:
            return False
        spanned_ms = self._pending[-1][0].accepted_ms - self._pending[0][0].accepted_ms
        return spanned_ms >= 1000 * settings.batch_seconds or count >= settings.batch_size * settings.batch_growth

    def _verdict(self) -> Outcome:
        objection = self._gate.objection() if self._gate is not None else None
        if objection is None:
            if self._gate is not None:
                self._movement = self._gate.movement(self.learner.changed())
            return Outcome.COMPLETE
        self.objections.append(objection)
        self.batches, self._heeded = 0, False
        # Who asked to be forgotten does not wait for feedback by which what is held may turn out well.
        spoiled = self._let_gone or len(self.objections) >= self._settings.gate_holds
        return Outcome.SPOILED if spoiled else Outcome.HELD

    def lineage(self, committed_ms: int) -> Lineage:
        """Describe the version that is complete."""
        oldest = self._window[0] if self._window else BEGINNING
        return Lineage(
            position=self._position,
            feedback_learned=self.head.feedback_learned + self.consumed,
            feedback_added=len(self.accepted_ms),
            settings_digest=self._settings.learning_digest(),
            metrics=self.quality.summary(recent=True) | self._drift() | self._trust(),
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

    def _drift(self) -> dict[str, float]:
        """Return what the monitored streams show, as a version's metrics have it."""
        moved = {score_key(name, MEASURES[name][0]): value for name, value in self._movement.items()}
        found = dict.fromkeys(map(detected_key, sorted(self.drifted)), 1.0)
        return {**self.learner.drift.scores(), **moved, DETECTED: float(bool(found)), **found}

    def _trust(self) -> dict[str, float]:
        """Return whether there is an attack, as a version's metrics have it."""
        accounts, pushed = self.learner.distrusted, float(len(self.learner.crowd.pushed))
        attacked = float(accounts is not None)
        return {UNDER_ATTACK: attacked, DISTRUSTED_ACCOUNTS: float(accounts or 0), PUSHED_ITEMS: pushed}

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

    def _examples(self, records: Sequence[FeedbackRecord], *, admits: bool = True) -> Examples:
        """Make examples of records of known classes, whose items get rows first if it `admits` any.

        Where each feedback's item gets one, those in its history do too, so that it looks the same ever after. Items
        without a row are left out.
        """
        # Of each record the history's items, then its own: looked up together, each costs a tenth.
        named = PackedIds.of(
            [item_id for each in records for item_id in (*(entry.item_id for entry in each.history), each.item_id)]
        )
        if admits and self._settings.bounded_items:
            self.learner.allocate(self._admission.admitted([record.item_id for record in records]))
        elif admits:
            self.learner.allocate(named)
        rows = iter(self.learner.table.look_up(named).tolist())
        histories = (list(islice(rows, len(record.history))) for record in records)
        events = [self._event(record, history, next(rows)) for record, history in zip(records, histories, strict=True)]
        return encode(events, self._settings)

    def _expire(self) -> None:
        """Free the rows of items that were unused for too long: a version's first deed."""
        fresh, self._fresh = self._fresh, False
        if fresh:
            self.learner.follow_contents()
        if fresh and len(rows := self._admission.expired(self.learner.table)):
            self.learner.free(rows)
            if self._gate is not None:
                self._gate.free(rows)
            self._metrics.expired(len(rows))

    def _take_in_catalogue(self) -> None:
        """Give what the log says of items to the learner."""
        if self._contents:
            self._expire()
            self.learner.catalogue(self._contents)
            self._contents, self._heeded = {}, True

    def _let_go(self) -> None:
        """Forget accounts that people asked to be forgotten."""
        for place in self._forgotten:
            if self.learner.trust.forget(place):
                self._let_gone = self._heeded = True
        self._forgotten = []

    def _event(self, record: FeedbackRecord, rows: list[int], row: int) -> Event:
        """Turn a record of a known class into an example; its history's items have `rows`, its own has `row`."""
        index = self._settings.class_index[record.feedback_class]
        history = known_history(record.history, rows, self._settings.class_index)
        key = impression_key(record.recommendation_id, record.user_id, record.item_id) if self._follows else NONE
        return Event(row, index, record.time_ms, history, record.context, key, account(record.user_id))

    def _learn(self) -> None:
        records = [record for _, record in self._pending]
        self._expire()
        self._take_in_catalogue()
        examples = self._examples(records)
        self._metrics.skipped("not_admitted", int((examples.item_B == PADDING_ROW).sum()))
        # Before this very feedback is counted. Synchronises with the GPU: what is told apart leaves for the metrics.
        chosen_B = self.learner.table.columns["total"][to_tensor(examples.item_B, self.learner.device)].cpu().numpy()
        report = self.learner.step(examples)
        self._let_go()
        if self._gate is not None:
            self._gate.observe(examples, report)
        positions = [entry.position for entry, _ in self._pending]
        self.accepted_ms.extend(entry.accepted_ms for entry, _ in self._pending)
        self._pending.clear()
        self.batches += 1
        self.drifted |= report.drifted
        if report.learned:
            self._window.extend(positions)
            self._admission.learned(record.item_id for record in records)
            self._metrics.gradient_norm(report.gradient_norm)
            for name, value in report.losses.items():
                self._metrics.loss(name, value)
        else:
            # What spoils a step is not replayed either.
            self._skipped.append(LogRange(self._position, positions[-1]))
            self._metrics.skipped("non_finite", len(records))
        self._metrics.distrusted(report.distrusted)
        self.quality.add_ranks("recsys", report.rank_B)
        self.quality.add_ranks("popularity", report.popularity_rank_B)
        self.quality.add_losses(report.item_loss_B, report.class_loss_B)
        self.quality.add_slices(report.rank_B, examples.rows_BL[:, -1] == 0, chosen_B < NEW_ITEM_CHOSEN)
        probability_B = report.class_probability_BC[:, self._positive_C].sum(1)
        self.quality.add_probabilities(self._positive_C[examples.class_B], probability_B)


def _ranges(head: VersionRecord) -> list[LogRange]:
    return [LogRange(part.after, part.until) for part in head.set_aside]


def _within(position: str, part: Range) -> bool:
    return position_key(part.after) < position_key(position) <= position_key(part.until)
