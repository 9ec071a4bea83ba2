"""ModelService: which weights are served, how fresh they are, and the versions that are kept."""

from __future__ import annotations

from dataclasses import dataclass

import recsys
from recsys.errors import StoreUnavailable
from recsys.feedback_log import FeedbackLog
from recsys.scorer import Scorer
from recsys.service import validation
from recsys.service.edge import Context, deadline_of
from recsys.service.store_calls import StoreCalls
from recsys.settings import Settings
from recsys.v1 import model_pb2
from recsys.v1.model_pb2_grpc import ModelServiceServicer
from recsys.weights import VersionRecord, WeightStore


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """Hold what only the store knows; -1 while it is out of reach."""

    backlog: int = -1
    log_records: int = -1
    log_bytes: int = -1
    reachable: bool = False


class Model(ModelServiceServicer):
    """Serve recsys.v1.ModelService."""

    def __init__(
        self, settings: Settings, scorer: Scorer, log: FeedbackLog, weights: WeightStore, calls: StoreCalls
    ) -> None:
        self._settings = settings
        self._scorer = scorer
        self._log = log
        self._weights = weights
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
        records, snapshots = await self._calls.run(
            lambda: (self._weights.versions(size + 1, before), set(self._weights.snapshot_versions())), deadline
        )
        more = len(records) > size
        return model_pb2.ListVersionsResponse(
            versions=[_version(record, record.version in snapshots) for record in records[:size]],
            next_page_token=str(records[size - 1].version) if more else "",
        )

    def _ask_store(self) -> StoreFacts:
        try:
            # The head first: what is learned between the two reads then never exceeds what was appended.
            head = self._weights.head()
            appended = self._log.appended()
            usage = self._log.usage()
        except StoreUnavailable:
            return StoreFacts()
        learned = head.feedback_learned if head else 0
        # A store restored from an older copy may hold weights that know more than its log.
        return StoreFacts(max(0, appended - learned), usage.records, usage.bytes, reachable=True)


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
    )
    version.committed_time.FromMilliseconds(record.committed_ms)
    return version
