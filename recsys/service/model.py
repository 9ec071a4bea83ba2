"""ModelService: which weights are served, how fresh they are, the versions that are kept, and what people decide."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import recsys
from recsys.errors import NotRetained, StoreUnavailable
from recsys.feedback_log import BEGINNING, FeedbackLog
from recsys.forgetting import Forgetting, Forgotten
from recsys.logs import tell
from recsys.quarantine import Quarantine
from recsys.scorer import Scorer
from recsys.service import validation
from recsys.service.edge import Pending
from recsys.service.store_calls import StoreCalls
from recsys.settings import Settings
from recsys.store.inspection import Inspection
from recsys.v1 import model_pb2
from recsys.weights import ObjectionRecord, VersionRecord, WeightStore
from recsys.weights.earlier import describe_retained, roll_back

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """Hold what only the store knows; -1 while it is out of reach."""

    backlog: int = -1
    log_records: int = -1
    log_bytes: int = -1
    retained_from: int = -1
    delta_bytes: int = -1
    snapshot_bytes: int = -1
    snapshots: int = -1
    set_aside: int = -1
    newest_version: int = -1
    newest_committed_ms: int = 0
    used_memory: int = -1
    max_memory: int = -1
    paused: bool = False
    objection: ObjectionRecord | None = None
    reachable: bool = False


class Model:
    """Serve recsys.v1.ModelService."""

    def __init__(
        self,
        settings: Settings,
        scorer: Scorer,
        log: FeedbackLog,
        weights: WeightStore,
        quarantine: Quarantine,
        inspect: Callable[[], Inspection],
        forgetting: Forgetting,
        calls: StoreCalls,
        forgetting_calls: StoreCalls,
    ) -> None:
        self._settings = settings
        self._scorer = scorer
        self._log = log
        self._weights = weights
        self._quarantine = quarantine
        self._inspect = inspect
        self._forgetting = forgetting
        self._calls = calls
        # Apart from the others, which would wait while the whole log is gone through.
        self._forgetting_calls = forgetting_calls

    def GetStatus(self, request: model_pb2.GetStatusRequest, deadline: float) -> Pending:
        """Tell what this server serves; answers without the store too."""
        return Pending(self._calls.submit(self._ask_store, deadline), self._status)

    def _status(self, facts: StoreFacts) -> model_pb2.GetStatusResponse:
        status = self._scorer.status
        response = model_pb2.GetStatusResponse(
            version=status.version,
            items=status.items,
            feedback_learned=status.feedback_learned,
            backlog=facts.backlog,
            log_records=facts.log_records,
            log_bytes=facts.log_bytes,
            log_max_bytes=self._settings.log_max_bytes,
            store_reachable=facts.reachable,
            software_version=recsys.__version__,
            feedback_classes=[c.name for c in self._settings.classes],
            learning_paused=facts.paused,
            retained_versions_from=facts.retained_from,
            retained_bytes=facts.delta_bytes + facts.snapshot_bytes if facts.reachable else -1,
            delta_bytes=facts.delta_bytes,
            snapshot_bytes=facts.snapshot_bytes,
            weights_max_bytes=self._settings.weights_max_bytes,
            weights_problem=self._scorer.problem,
            snapshots=facts.snapshots,
            durability=self._settings.durability,
            set_aside_feedback=facts.set_aside,
            newest_version=facts.newest_version,
            store_memory_bytes=facts.used_memory,
            store_max_memory_bytes=facts.max_memory,
        )
        if facts.newest_version > 0:
            response.newest_committed_time.FromMilliseconds(facts.newest_committed_ms)
        if held := facts.objection:
            response.held_version.MergeFrom(
                model_pb2.HeldVersion(version=held.version, times=held.times, reason=f"it {held.reason}")
            )
            response.held_version.held_time.FromMilliseconds(held.time_ms)
        if status.version:
            response.committed_time.FromMilliseconds(status.committed_ms)
            response.applied_time.FromMilliseconds(status.applied_ms)
        return response

    def ListVersions(self, request: model_pb2.ListVersionsRequest, deadline: float) -> Pending:
        """List the retained versions, newest first; a page token is the version that the page ends before."""
        size, before = validation.page(request)

        def response(versions: list[model_pb2.Version]) -> model_pb2.ListVersionsResponse:
            more = len(versions) > size
            return model_pb2.ListVersionsResponse(
                versions=versions[:size], next_page_token=str(versions[size - 1].version) if more else ""
            )

        # One more than asked for tells whether there is a next page.
        return Pending(self._calls.submit(lambda: self._retained(size + 1, before), deadline), response)

    def GetVersion(self, request: model_pb2.GetVersionRequest, deadline: float) -> Pending:
        """Return one retained version."""
        number = validation.version(request)
        return Pending(self._calls.submit(lambda: self._retained_one(number), deadline), lambda version: version)

    def Rollback(self, request: model_pb2.RollbackRequest, deadline: float) -> Pending:
        """Put the content of an earlier version in force again, as a new version."""
        validation.rollback(request)
        return Pending(
            self._calls.submit(lambda: self._roll_back(request), deadline),
            lambda record: _version(record, snapshot=False),
        )

    def PauseLearning(self, request: model_pb2.PauseLearningRequest, deadline: float) -> Pending:
        """Tell trainers to stop learning."""
        return Pending(
            self._calls.submit(lambda: self._pause(True), deadline), lambda _: model_pb2.PauseLearningResponse()
        )

    def ResumeLearning(self, request: model_pb2.ResumeLearningRequest, deadline: float) -> Pending:
        """Tell trainers to go on learning."""
        return Pending(
            self._calls.submit(lambda: self._pause(False), deadline), lambda _: model_pb2.ResumeLearningResponse()
        )

    def ForgetUser(self, request: model_pb2.ForgetUserRequest, deadline: float) -> Pending:
        """Remove what was logged of a user."""
        user_id = validation.user(request, self._settings)
        return Pending(self._forgetting_calls.submit(lambda: self._forget(user_id), deadline), _forgotten)

    def _forget(self, user_id: str) -> Forgotten:
        head = self._weights.head()
        forgotten = self._forgetting.forget(user_id, head.position if head else BEGINNING)
        _log.warning(
            "a user is forgotten: %d history entries, %d records, %d records in quarantine",
            *(forgotten.history_entries, forgotten.log_records, forgotten.set_aside_records),
        )
        return forgotten

    def _roll_back(self, request: model_pb2.RollbackRequest) -> VersionRecord:
        now_ms = time.time_ns() // 1_000_000
        record = roll_back(self._weights, self._quarantine, request.version, request.reason, now_ms)
        now, of = record.version, request.version
        tell(_log, logging.WARNING, "rolled back", version=now, restored_version=of, reason=request.reason)
        return record

    def _pause(self, pause: bool) -> None:
        self._weights.pause(pause)
        _log.warning("learning is paused" if pause else "learning goes on")

    def _retained_one(self, number: int) -> model_pb2.Version:
        found = self._retained(1, number + 1)
        if not found or found[0].version != number:
            raise NotRetained(f"version {number} is not retained; {describe_retained(self._weights)}")
        return found[0]

    def _retained(self, count: int, before: int | None) -> list[model_pb2.Version]:
        """List retained versions below `before`, newest first."""
        # The oldest has a snapshot only: its delta is gone.
        snapshots = {r.version: r for r in self._weights.snapshots()}
        retained = {v: r for v, r in snapshots.items() if before is None or v < before}
        retained |= {r.version: r for r in self._weights.versions(count, before)}
        newest = sorted(retained, reverse=True)[:count]
        return [_version(retained[version], version in snapshots) for version in newest]

    def _ask_store(self) -> StoreFacts:
        try:
            # The head first: what is learned between the two reads then never exceeds what was appended.
            head = self._weights.head()
            appended = self._log.appended()
            usage = self._log.usage()
            snapshots = self._weights.snapshot_versions()
            (delta_bytes, snapshot_bytes), paused = self._weights.sizes(), self._weights.paused()
            set_aside = sum(case.feedback for case in self._quarantine.cases())
            objection = self._weights.objection()
            inspection = self._inspect()
        except StoreUnavailable:
            return StoreFacts()
        learned = head.feedback_learned if head else 0
        # A store restored from an older copy may hold weights that know more than its log.
        backlog = max(0, appended - learned)
        oldest = min(snapshots, default=1) if head else 0
        return StoreFacts(
            backlog=backlog,
            log_records=usage.records,
            log_bytes=usage.bytes,
            retained_from=oldest,
            delta_bytes=delta_bytes,
            snapshot_bytes=snapshot_bytes,
            snapshots=len(snapshots),
            set_aside=set_aside,
            newest_version=head.version if head else 0,
            newest_committed_ms=head.committed_ms if head else 0,
            used_memory=inspection.used_memory,
            max_memory=inspection.max_memory,
            paused=paused,
            objection=objection,
            reachable=True,
        )


def _forgotten(forgotten: Forgotten) -> model_pb2.ForgetUserResponse:
    return model_pb2.ForgetUserResponse(**asdict(forgotten))


def _version(record: VersionRecord, snapshot: bool) -> model_pb2.Version:
    version = model_pb2.Version(
        version=record.version,
        feedback_learned=record.feedback_learned,
        feedback_added=record.feedback_added,
        bytes=record.bytes,
        epoch=record.epoch,
        position=record.position,
        chain=record.chain.hex(),
        metrics=record.metrics,
        snapshot=snapshot,
        kind=record.kind,
        restored_version=record.restored_version,
        reason=record.reason,
        parent=record.parent,
        trainer_bytes=record.trainer_bytes,
        settings_digest=record.settings_digest,
        set_aside=[model_pb2.LogRange(after=part.after, until=part.until) for part in record.set_aside],
    )
    version.committed_time.FromMilliseconds(record.committed_ms)
    if record.accepted_ms:
        version.oldest_accepted_time.FromMilliseconds(min(record.accepted_ms))
    return version
