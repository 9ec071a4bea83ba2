"""Publisher: commit what a learner has learned, keep snapshots of it, and restore it after a start."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from torch import Tensor

from recsys.errors import CorruptWeights, FencedOff, SettingsError, StoreFull, StoreUnavailable
from recsys.feedback_log import BEGINNING, FeedbackLog
from recsys.settings import Settings
from recsys.weights import Lineage, VersionRecord, WeightStore, encode
from recsys.weights.retention import snapshot_due
from trainer.learner import Learner
from trainer.metrics import TrainerMetrics

# Between attempts while the store is away; doubled up to the longest.
RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 2.0

_log = logging.getLogger(__name__)


class Publisher:
    """Publish the versions of one learner; `head` is the last one, version 0 before the first."""

    def __init__(
        self,
        settings: Settings,
        store: WeightStore,
        log: FeedbackLog,
        metrics: TrainerMetrics,
        stopping: threading.Event,
        clock: Callable[[], float],
    ) -> None:
        self._settings, self._store, self._log = settings, store, log
        self._metrics, self._stopping, self._clock = metrics, stopping, clock
        self.head = VersionRecord(position=BEGINNING)
        self._snapshot_bytes = self._made_room_at = 0

    def take_over(self) -> None:
        """Fence off any other trainer."""
        self._epoch = self._store.acquire()

    def restore(self, learner: Learner) -> VersionRecord | None:
        """Restore the last version into a new learner; None when there is none yet.

        The replay window is left to the caller.

        Raises:
            FencedOff: when another trainer has taken over.
            SettingsError: when what the store holds was learned with settings that do not fit these.
            CorruptWeights: when what the store holds is not whole.
        """
        self.head = VersionRecord(position=BEGINNING)
        self._since_snapshot = self._versions_since_snapshot = 0
        if (current := self._store.epoch()) != self._epoch:
            raise FencedOff(f"epoch {self._epoch} is not the current one: the store is at epoch {current}")
        if (head := self._store.head()) is not None:
            try:
                self._restore(learner)
            except CorruptWeights as error:
                if head.settings_digest != self._settings.learning_digest():
                    raise SettingsError(
                        f"the weights in the store were learned with other settings ({error}); use those again, or "
                        "another key_prefix or data_dir"
                    ) from error
                raise CorruptWeights(
                    f"{error}; `recsys verify --repair` goes back to the newest version that is whole"
                ) from error
        # Also after a snapshot could not be written.
        self._snapshot_due = not self._store.snapshot_versions()
        self._rows = learner.table.rows
        return self.head if self.head.version else None

    def _restore(self, learner: Learner) -> None:
        snapshot = self._store.load_snapshot(trainer=True)
        if snapshot is not None:
            assert snapshot.trainer_payload is not None
            learner.restore(snapshot.payload, snapshot.trainer_payload)
            self.head = snapshot.record
        while deltas := self._store.read_after(self.head.version, chain=self.head.chain or None, trainer=True):
            for delta in deltas:
                assert delta.trainer_payload is not None
                learner.restore(delta.payload, delta.trainer_payload)
                self._since_snapshot += delta.record.bytes + delta.record.trainer_bytes
                self._versions_since_snapshot += 1
                self.head = delta.record
        if self.head.version == 0:
            raise CorruptWeights("the store has a head but neither a snapshot nor the deltas from the first version")
        learner.take_changed()
        if self.head.settings_digest != self._settings.learning_digest():
            _log.warning("settings that learning depends on have changed since version %d", self.head.version)

    def publish(self, learner: Learner, changed: Tensor, lineage: Lineage) -> VersionRecord:
        """Commit the rows that changed since the last version (all, if this is the first); snapshot when due.

        While the store fails the commit is tried again until it stands.

        Raises:
            FencedOff: when another trainer has taken over.
            StoreUnavailable, StoreFull: when told to stop while the store fails; the learner must be restored then.
        """
        started = self._clock()
        served, own = learner.write(changed, self._rows) if self.head.version else learner.write_all()
        self.head = self._commit(encode(served), encode(own), lineage)
        self._rows = learner.table.rows
        bytes_ = self.head.bytes + self.head.trainer_bytes
        self._since_snapshot += bytes_
        self._metrics.version_committed(self.head.version, bytes_, self._clock() - started)
        self._versions_since_snapshot += 1
        # By default not more often than it is worth: a snapshot of a large table outweighs many deltas.
        if self._snapshot_due or snapshot_due(
            self._settings, self._versions_since_snapshot, self._since_snapshot, self._snapshot_bytes
        ):
            self._snapshot_due = True
            self._snapshot(learner)
        return self.head

    def make_room(self) -> None:
        """Let go of the log behind the replay window of the last version, when the log is nearly full.

        Earlier versions can then no longer be rebuilt from the log, which is better than to refuse feedback.
        """
        if self.head.version and self._made_room_at != self.head.version:
            self._made_room_at = self.head.version
            removed = self._log.trim(self.head.window_position)
            _log.warning("the feedback log is nearly full: removed %d entries behind the replay window", removed)

    def _commit(self, payload: bytes, own_payload: bytes, lineage: Lineage) -> VersionRecord:
        """Commit, again and again while the store fails: a commit that stands already is recognised."""
        pause = RETRY_SECONDS
        while True:
            try:
                return self._store.commit(self._epoch, self.head.version, payload, own_payload, lineage)
            except (StoreUnavailable, StoreFull) as error:
                self._metrics.store_errors(1)
                _log.warning("version %d waits for the store: %s", self.head.version + 1, error)
                if self._stopping.wait(pause):
                    raise
                pause = min(2 * pause, LONGEST_RETRY_SECONDS)

    def _snapshot(self, learner: Learner) -> None:
        """Write a full copy, then let go of the log that no retained version's replay window reaches back to."""
        started = self._clock()
        served, own = learner.write_all()
        payload, own_payload = encode(served), encode(own)
        try:
            self._store.write_snapshot(self._epoch, self.head.version, payload, own_payload)
            self._log.trim(self._store.snapshots()[-1].window_position)
        except (StoreUnavailable, StoreFull) as error:
            # The version stands; the copy is written with the next one.
            self._metrics.store_errors(1)
            _log.warning("no snapshot of version %d: %s", self.head.version, error)
            return
        self._snapshot_due, self._since_snapshot, self._versions_since_snapshot = False, 0, 0
        self._snapshot_bytes = len(payload) + len(own_payload)
        self._metrics.snapshot_written(self._snapshot_bytes, self._clock() - started)


def now_ms() -> int:
    """Return the wall clock in milliseconds since 1970; for what is shown, never for what is learned."""
    return time.time_ns() // 1_000_000
