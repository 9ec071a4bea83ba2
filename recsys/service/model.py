"""ModelService: which weights are served, how fresh they are, the versions that are kept, and what people decide."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import recsys
from recsys.errors import NotRetained, StoreUnavailable
from recsys.feedback_log import FeedbackLog
from recsys.quarantine import Quarantine
from recsys.scorer import Scorer
from recsys.service import validation
from recsys.service.edge import Context, deadline_of
from recsys.service.store_calls import StoreCalls
from recsys.settings import Settings
from recsys.v1 import model_pb2
from recsys.v1.model_pb2_grpc import ModelServiceServicer
from recsys.weights import VersionRecord, WeightStore
from recsys.weights.earlier import describe_retained, roll_back

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """Hold what only the store knows; -1 while it is out of reach."""

    backlog: int = -1
    log_records: int = -1
    log_bytes: int = -1
    retained_from: int = -1
    retained_bytes: int = -1
    snapshots: int = -1
    paused: bool = False
    reachable: bool = False


class Model(ModelServiceServicer):
    """Serve recsys.v1.ModelService."""

    def __init__(
        self,
        settings: Settings,
        scorer: Scorer,
        log: FeedbackLog,
        weights: WeightStore,
        quarantine: Quarantine,
        calls: StoreCalls,
    ) -> None:
        self._settings = settings
        self._scorer = scorer
        self._log = log
        self._weights = weights
        self._quarantine = quarantine
        self._calls = calls

    async def GetStatus(self, request: model_pb2.GetStatusRequest, context: Context) -> model_pb2.GetStatusResponse:
        """Tell what this server serves; answers without the store too."""
        facts = await self._calls.run(self._ask_store, deadline_of(context))
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
            retained_bytes=facts.retained_bytes,
            snapshots=facts.snapshots,
        )
        if status.version:
            response.committed_time.FromMilliseconds(status.committed_ms)
            response.applied_time.FromMilliseconds(status.applied_ms)
        return response

    async def ListVersions(
        self, request: model_pb2.ListVersionsRequest, context: Context
    ) -> model_pb2.ListVersionsResponse:
        """List the retained versions, newest first; a page token is the version that the page ends before."""
        deadline = deadline_of(context)
        size, before = validation.page(request)
        # One more than asked for tells whether there is a next page.
        versions = await self._calls.run(lambda: self._retained(size + 1, before), deadline)
        more = len(versions) > size
        return model_pb2.ListVersionsResponse(
            versions=versions[:size], next_page_token=str(versions[size - 1].version) if more else ""
        )

    async def GetVersion(self, request: model_pb2.GetVersionRequest, context: Context) -> model_pb2.Version:
        """Return one retained version."""
        deadline = deadline_of(context)
        number = validation.version(request)
        found = await self._calls.run(lambda: self._retained(1, number + 1), deadline)
        if not found or found[0].version != number:
            retained = await self._calls.run(lambda: describe_retained(self._weights), deadline)
            raise NotRetained(f"version {number} is not retained; {retained}")
        return found[0]

    async def Rollback(self, request: model_pb2.RollbackRequest, context: Context) -> model_pb2.Version:
        """Put the content of an earlier version in force again, as a new version."""
        deadline = deadline_of(context)
        validation.rollback(request)
        record = await self._calls.run(lambda: self._roll_back(request), deadline)
        _log.warning("version %d has the content of version %d: %r", record.version, request.version, request.reason)
        return _version(record, snapshot=False)

    def _roll_back(self, request: model_pb2.RollbackRequest) -> VersionRecord:
        now_ms = time.time_ns() // 1_000_000
        return roll_back(self._weights, self._quarantine, request.version, request.reason, now_ms)

    async def PauseLearning(
        self, request: model_pb2.PauseLearningRequest, context: Context
    ) -> model_pb2.PauseLearningResponse:
        """Tell trainers to stop learning."""
        await self._calls.run(lambda: self._weights.pause(True), deadline_of(context))
        _log.warning("learning is paused")
        return model_pb2.PauseLearningResponse()

    async def ResumeLearning(
        self, request: model_pb2.ResumeLearningRequest, context: Context
    ) -> model_pb2.ResumeLearningResponse:
        """Tell trainers to go on learning."""
        await self._calls.run(lambda: self._weights.pause(False), deadline_of(context))
        _log.warning("learning goes on")
        return model_pb2.ResumeLearningResponse()

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
            retained_bytes, paused = self._weights.usage(), self._weights.paused()
        except StoreUnavailable:
            return StoreFacts()
        learned = head.feedback_learned if head else 0
        # A store restored from an older copy may hold weights that know more than its log.
        backlog = max(0, appended - learned)
        oldest = min(snapshots, default=1) if head else 0
        return StoreFacts(
            backlog, usage.records, usage.bytes, oldest, retained_bytes, len(snapshots), paused, reachable=True
        )


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
    return version
