"""StoreLook: what the store holds, as the page shows it: the log, the versions and how good they are, quarantine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from recsys.condition import verdict
from recsys.errors import RecsysError, StoreUnavailable
from recsys.feedback_log import FeedbackLog
from recsys.quarantine import Quarantine
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.inspection import inspect
from recsys.weights import ObjectionRecord, VersionRecord, WeightStore

# The newest versions that are held here, for charts and tables, and how many are read in one command.
VERSIONS_HELD = 2000
VERSIONS_PER_READ = 200
CASES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Version:
    """Describe one version; `verdict` is learned, held (before it was let pass), set aside, rolled back or fitted."""

    version: int
    committed_ms: int
    verdict: str
    reason: str
    restored_version: int
    feedback_learned: int
    feedback_added: int
    bytes: int
    # From the acceptance of its oldest feedback to its commit; null where it has none.
    accepted_to_committed_seconds: float | None
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Held:
    """Describe the version that the gate holds back at present: `times` so far, `reason` the last time."""

    version: int
    times: int
    reason: str
    time_ms: int


@dataclass(frozen=True, slots=True)
class Case:
    """Describe one part of the log in quarantine; `feedback` is what has not been released."""

    number: int
    time_ms: int
    feedback: int
    reason: str


@dataclass(frozen=True, slots=True)
class Stored:
    """Hold what the store said at `time_ms`; `problem` is why it said nothing since, "" where all is well."""

    time_ms: int
    problem: str = ""
    backlog: int = 0
    log_records: int = 0
    log_bytes: int = 0
    log_max_bytes: int = 0
    paused: bool = False
    epoch: int = 0
    used_memory: int = 0
    max_memory: int = 0
    held: Held | None = None
    # Newest first.
    versions: Sequence[Version] = ()
    cases: Sequence[Case] = ()
    set_aside: int = 0

    @property
    def reachable(self) -> bool:
        """Return whether the store answered."""
        return not self.problem


class StoreLook:
    """Read what is new in the store each time it is called; over a connection of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = connect(settings)
        self._log = FeedbackLog(self._client, settings)
        self._weights = WeightStore(self._client, settings)
        self._quarantine = Quarantine(self._client, settings)
        # Oldest first.
        self._versions: deque[Version] = deque(maxlen=VERSIONS_HELD)
        self._last = Stored(0)

    def look(self) -> Stored:
        """Return what the store holds now, or what it last said with the problem it has since."""
        now_ms = time.time_ns() // 1_000_000
        try:
            # The head first: what is learned between the two reads then never exceeds what was appended.
            head = self._weights.head()
            appended, usage = self._log.appended(), self._log.usage()
            cases = self._quarantine.cases()
            objection = self._weights.objection()
            inspection = inspect(self._client)
            self._follow(head)
            self._last = Stored(
                now_ms,
                backlog=max(0, appended - (head.feedback_learned if head else 0)),
                log_records=usage.records,
                log_bytes=usage.bytes,
                log_max_bytes=usage.max_bytes,
                paused=self._weights.paused(),
                epoch=self._weights.epoch(),
                used_memory=inspection.used_memory,
                max_memory=inspection.max_memory,
                held=_held(objection),
                versions=list(reversed(self._versions)),
                cases=[Case(c.number, c.time_ms, c.feedback, c.reason) for c in cases[: -CASES_SHOWN - 1 : -1]],
                set_aside=sum(case.feedback for case in cases),
            )
        except RecsysError as error:
            said = "the store does not answer" if isinstance(error, StoreUnavailable) else str(error)
            return replace(self._last, problem=said)
        return self._last

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()

    def _follow(self, head: VersionRecord | None) -> None:
        """Read the versions that came since the last look, as many as are held."""
        newest = self._versions[-1].version if self._versions else 0
        if head is None or head.version < newest:
            # The store began anew.
            self._versions.clear()
            newest = 0
        found: list[VersionRecord] = []
        before: int | None = None
        while len(found) < VERSIONS_HELD and (page := self._weights.versions(VERSIONS_PER_READ, before)):
            found += (record for record in page if record.version > newest)
            before = page[-1].version
            if before <= newest + 1:
                break
        if not found and not self._versions and head is not None:
            # Of the oldest that is retained there may be a full copy only.
            found = [head]
        self._versions.extend(described(record) for record in reversed(found))


def _held(objection: ObjectionRecord | None) -> Held | None:
    if objection is None:
        return None
    return Held(objection.version, objection.times, f"it {objection.reason}", objection.time_ms)


def described(record: VersionRecord) -> Version:
    """Describe a version for people."""
    oldest = min(record.accepted_ms, default=None)
    return Version(
        record.version,
        record.committed_ms,
        verdict(record.kind, record.reason, record.version, record.restored_version),
        record.reason,
        record.restored_version,
        record.feedback_learned,
        record.feedback_added,
        record.bytes + record.trainer_bytes,
        None if oldest is None else max(0, record.committed_ms - oldest) / 1000,
        dict(record.metrics),
    )
