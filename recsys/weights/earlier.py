"""Earlier versions: all of one put together again, and put in force again by a rollback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.errors import FencedOff, NotRetained, OtherVersionCameFirst
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights.payload import WeightPayload, encode
from recsys.weights.record import Lineage, LogRange
from recsys.weights.store import WeightStore

# The kind of a version that a rollback made.
ROLLBACK = "rollback"
# Times that a rollback is tried while trainers commit in between. They are told to hold still, so what still comes is
# what they have read already, or a trainer that starts.
ATTEMPTS = 10
# Longest that a rollback keeps trainers from learning, should it not live to let them go.
HOLD_SECONDS = 30


class _Whole:
    """All of one part of a version, moved from version to version by applying payloads."""

    def __init__(self) -> None:
        self._dense: Mapping[str, NDArray[Any]] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        self._items: list[tuple[str, int]] = []
        self._rows = 0

    def apply(self, payload: WeightPayload, rows: int) -> None:
        """Move on to the version that `payload` leads to, whose item table has `rows` rows."""
        self._dense = payload.dense
        if payload.whole:
            self._items = list(payload.new_items)
            self._columns = dict(payload.columns)
        else:
            self._items.extend(payload.new_items)
            for name, values in payload.columns.items():
                column = self._columns[name]
                if len(column) < rows:
                    grown = np.zeros((rows, *column.shape[1:]), column.dtype)
                    grown[: len(column)] = column
                    self._columns[name] = column = grown
                elif not column.flags.writeable:  # a view of a payload's bytes
                    self._columns[name] = column = column.copy()
                column[payload.rows] = values
        self._rows = rows

    def payload(self) -> WeightPayload:
        """Return all of it."""
        rows = np.arange(self._rows, dtype=np.int32)
        return WeightPayload(self._dense, rows, self._columns, self._items, whole=True)


def put_together(store: WeightStore, version: int) -> tuple[VersionRecord, WeightPayload, WeightPayload]:
    """Return the record of a retained version with all that servers and all that only a trainer needs of it.

    Raises:
        NotRetained: when the version is not kept (any more).
        CorruptWeights: when what it is made of is not whole.
    """
    served, own = _Whole(), _Whole()
    snapshot = store.load_snapshot(trainer=True, at_most=version)
    record = VersionRecord()
    rows = 0
    if snapshot is not None and snapshot.trainer_payload is not None:
        record, rows = snapshot.record, len(snapshot.payload.rows)
        served.apply(snapshot.payload, rows)
        own.apply(snapshot.trainer_payload, rows)
    while record.version < version:
        wanted = version - record.version
        deltas = store.read_after(record.version, count=min(wanted, 16), chain=record.chain or None, trainer=True)
        if not deltas:
            break
        for delta in deltas:
            assert delta.trainer_payload is not None
            rows = len(delta.payload.rows) if delta.payload.whole else rows + len(delta.payload.new_items)
            served.apply(delta.payload, rows)
            own.apply(delta.trainer_payload, rows)
            record = delta.record
    if record.version != version:
        raise NotRetained(f"version {version} is not retained; {describe_retained(store)}")
    return record, served.payload(), own.payload()


def describe_retained(store: WeightStore) -> str:
    """Say which versions are retained, for a person."""
    head = store.head()
    if head is None:
        return "there are no versions yet"
    snapshots = store.snapshot_versions()
    return f"retained are {min(snapshots, default=1)} to {head.version}"


def roll_back(store: WeightStore, version: int, reason: str, now_ms: int) -> VersionRecord:
    """Put the content of an earlier version in force again, as a new version; versions never go back.

    The feedback learned since is set aside: learning goes on behind it. A trainer at work notices and goes on from the
    new version. A last version that restored `version` already is returned as it stands, so a call may be repeated.

    Raises:
        NotRetained: when the version is not kept (any more), or is not an earlier one.
        OtherVersionCameFirst: when trainers committed in between ATTEMPTS times.
    """
    store.hold(HOLD_SECONDS)
    try:
        record, served, own = put_together(store, version)
        payloads = encode(served), encode(own)
        for _ in range(ATTEMPTS):
            head, epoch = store.head(), store.epoch()
            assert head is not None
            if head.kind == ROLLBACK and head.restored_version == version:
                return head
            if record.version >= head.version:
                raise NotRetained(f"version {version} is in force; {describe_retained(store)}")
            try:
                return store.commit(epoch, head.version, *payloads, _restoring(record, head, reason, now_ms))
            except FencedOff:
                continue
    finally:
        store.hold(0)
    raise OtherVersionCameFirst(f"trainers committed other versions in between, {ATTEMPTS} times; try again")


def _restoring(record: VersionRecord, head: VersionRecord, reason: str, now_ms: int) -> Lineage:
    """Describe the version after `head` that has the content of `record`."""
    set_aside = [LogRange(part.after, part.until) for part in record.set_aside]
    if head.position != record.position:
        set_aside.append(LogRange(record.position, head.position))
    return Lineage(
        position=head.position,
        feedback_learned=head.feedback_learned,
        feedback_added=0,
        settings_digest=record.settings_digest,
        metrics=dict(record.metrics),
        accepted_ms=(),
        committed_ms=now_ms,
        window_position=record.window_position,
        kind=ROLLBACK,
        restored_version=record.version,
        set_aside=set_aside,
        reason=reason,
    )
