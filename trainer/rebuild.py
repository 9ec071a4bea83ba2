"""Rebuild: make a version again from an earlier snapshot and the feedback log, and compare it bit for bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import redis
import torch
from prometheus_client import CollectorRegistry

from recsys.errors import NotRetained
from recsys.feedback_log import BEGINNING, FeedbackLog, LogEntry, position_key, previous_position
from recsys.forgetting import Forgetting
from recsys.settings import Settings
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights import WeightPayload, WeightStore, encode
from recsys.weights.earlier import FITTED, ROLLBACK, describe_retained, put_together
from recsys.weights.record import checksum
from trainer.log_learner import LogLearner, Outcome
from trainer.metrics import TrainerMetrics

READ_COUNT = 1000


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """Say from where a version was rebuilt and which versions on the way, if any, came out otherwise."""

    version: int
    from_version: int
    versions: int
    feedback: int
    different: tuple[int, ...]
    # Records of the range and its replay window that were forgotten: versions that had learned them come out otherwise.
    forgotten: int

    @property
    def equal(self) -> bool:
        """Return whether every version came out bit for bit as it stands in the store."""
        return not self.different


class Rebuild:
    """Learn the log again from a retained snapshot, without writing anything."""

    def __init__(self, client: redis.Redis, settings: Settings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._store, self._log = WeightStore(client, settings), FeedbackLog(client, settings)
        self._forgetting = Forgetting(client, settings)

    def run(self, version: int, progress: Callable[[int, int], None] = lambda done, of: None) -> Rebuilt:
        """Rebuild `version`; `progress` is called with versions done and to do.

        Raises:
            NotRetained: when no snapshot before the version is kept, or the log behind it was trimmed.
        """
        snapshot = self._store.load_snapshot(trainer=True, at_most=version - 1)
        if snapshot is None or snapshot.trainer_payload is None:
            raise NotRetained(f"no snapshot before version {version} is kept; {describe_retained(self._store)}")
        start = snapshot.record
        records = {r.version: r for r in self._store.versions(version - start.version, version + 1)}
        if version not in records:
            raise NotRetained(f"version {version} is not retained; {describe_retained(self._store)}")
        window = previous_position(start.window_position)
        self._forgotten = self._forgetting.lost(window, records[version].position)
        self._check_log(start)
        self._begin(start, snapshot.payload, snapshot.trainer_payload)
        different, feedback = [], 0
        for number in range(start.version + 1, version + 1):
            expected = records[number]
            if expected.kind in (ROLLBACK, FITTED):
                # What was fitted to a file is taken as it stands: no log leads to it.
                _, served, own = put_together(self._store, expected.restored_version or number)
                self._begin(expected, served, own)
            else:
                if not self._learn(expected):
                    different.append(number)
                feedback += expected.feedback_added
            progress(number - start.version, version - start.version)
        return Rebuilt(version, start.version, version - start.version, feedback, tuple(different), self._forgotten)

    def _check_log(self, start: VersionRecord) -> None:
        first = self._log.usage().first_position
        if self._forgetting.lost(previous_position(start.window_position), first):
            # What stood before was forgotten, not trimmed.
            return
        if position_key(first) > position_key(start.window_position) and start.window_position != BEGINNING:
            raise NotRetained(f"the log begins at {first}, but version {start.version} replays from before that")

    def _begin(self, head: VersionRecord, served: WeightPayload, own: WeightPayload) -> None:
        """Go on from a version whose parts are given."""
        self._learning = LogLearner(self._settings, TrainerMetrics(CollectorRegistry()), self._device)
        self._learning.learner.restore(served, own)
        self._learning.fill_window(self._log, head)
        self._learning.read_aside(self._log, head)
        self._learning.learner.take_changed()
        self._learning.begin(head)
        self._rows = self._learning.learner.table.rows
        self._entries: deque[LogEntry] = deque()

    def _learn(self, expected: VersionRecord) -> bool:
        """Learn the version after the one at hand; return whether it came out as expected."""
        learning = self._learning
        outcome = Outcome.GOING_ON
        while outcome is not Outcome.COMPLETE:
            if not self._entries:
                last = learning.read_position
                self._entries.extend(self._log.read_after(last, READ_COUNT))
            if not self._entries and self._forgotten:
                return False
            if not self._entries:
                raise NotRetained(f"the log ends at {learning.read_position}, before version {expected.version} does")
            outcome = learning.take(self._entries.popleft())
            if outcome is Outcome.SPOILED:
                return False
        changed = learning.learner.take_changed()
        served, own = learning.learner.write(changed, self._rows)
        self._rows = learning.learner.table.rows
        made = (checksum(encode(served)), checksum(encode(own)), learning.lineage(0).position)
        learning.begin(expected, changed)
        return made == (expected.checksum, expected.trainer_checksum, expected.position)
