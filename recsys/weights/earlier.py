"""Earlier versions: all of one put together again, and put in force again by a rollback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.errors import CorruptWeights, FencedOff, NotRetained, OtherVersionCameFirst
from recsys.quarantine import Quarantine
from recsys.store.v1.weights_pb2 import PayloadHeader, VersionRecord
from recsys.weights.payload import DTYPES, NewItems, WeightPayload, encode
from recsys.weights.record import Lineage, LogRange
from recsys.weights.store import WeightStore

# The kind of a version that a rollback made.
ROLLBACK = "rollback"
DELTAS_AT_ONCE = 16
# The kind of a version whose content was fitted to a file.
FITTED = "fitted"
# Times that a rollback is tried while trainers commit in between. They are told to hold still, so what still comes is
# what they have read already, or a trainer that starts.
ATTEMPTS = 10
# Longest that a rollback keeps trainers from learning, should it not live to let them go.
HOLD_SECONDS = 30


class _Whole:
    """All of one part of a version, moved from version to version by applying payloads.

    A column is a view of a payload's bytes until it is written to, and may then have more rows than are in use.
    """

    def __init__(self) -> None:
        self._dense: Mapping[str, NDArray[Any]] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        self._placed: dict[str, NDArray[Any]] = {}
        # Those of rows 1, 2 and so on.
        self._item_ids: list[str] = []
        self._rows = 0

    def place(self, header: PayloadHeader) -> Mapping[str, NDArray[Any]]:
        """Give the memory that a whole payload's columns are read to, so that they need not be copied to be changed."""
        rows = header.rows
        self._placed = {
            column.name: np.zeros((_with_room(rows), *column.shape[1:]), DTYPES[column.dtype])
            for column in header.columns
        }
        return {name: column[:rows] for name, column in self._placed.items()}

    def apply(self, payload: WeightPayload, kept: int, rows: int) -> None:
        """Move on to the version that `payload` leads to; `kept` rows of the item table stay, `rows` it has then."""
        self._dense = payload.dense
        if payload.whole:
            self._item_ids = list(NewItems.of(payload.new_items).ids)
            self._columns = {**payload.columns, **self._placed}
            self._placed = {}
        else:
            known, new = NewItems.of(payload.new_items).split(kept)
            if len(payload.new_items) or kept < self._rows:
                self._item_ids = self._item_ids[: max(0, kept - 1)]
                for item_id, row in known:
                    self._item_ids[row - 1] = item_id
                self._item_ids += new.ids
            for name, values in payload.columns.items():
                column = self._writable(name, rows)
                column[kept : self._rows] = 0
                column[payload.rows] = values
        self._rows = rows

    def payload(self) -> WeightPayload:
        """Return all of it."""
        rows = np.arange(self._rows, dtype=np.int32)
        columns = {name: column[: self._rows] for name, column in self._columns.items()}
        items = NewItems(self._item_ids, range(1, 1 + len(self._item_ids)))
        return WeightPayload(self._dense, rows, columns, items, whole=True)

    def _writable(self, name: str, rows: int) -> NDArray[Any]:
        column = self._columns[name]
        if len(column) < rows or not column.flags.writeable:
            grown = np.zeros((_with_room(rows), *column.shape[1:]), column.dtype)
            grown[: self._rows] = column[: self._rows]
            self._columns[name] = column = grown
        return column


def _with_room(rows: int) -> int:
    """Leave room: every version may bring new items."""
    return rows * 9 // 8


class _Since:
    """What the versions after an earlier one have changed of it, told from their deltas."""

    def __init__(self, store: WeightStore, record: VersionRecord, whole: WeightPayload) -> None:
        self._store, self._record = store, record
        # Rows below it still are those of the earlier version's items.
        self._kept = len(whole.rows)
        self._changed: list[NDArray[np.int32]] = []
        # Rows that have, or had, another item.
        self._passed_on: list[NDArray[np.int32]] = []
        # Bytes of deltas that may still be read: going through more is slower than publishing everything.
        self._affordable = sum(column.nbytes for column in whole.columns.values())

    def follow(self) -> VersionRecord:
        """Go on to the last version and return its record."""
        head = self._store.head()
        assert head is not None
        if (ahead := head.version - self._record.version) > 0:
            self._affordable -= sum(record.bytes for record in self._store.versions(ahead, head.version + 1))
        while self._affordable > 0 and self._record.version < head.version:
            for delta in self._store.read_after(self._record.version, chain=self._record.chain):
                payload, self._record = delta.payload, delta.record
                if payload.whole:
                    self._affordable = 0
                self._kept = min(self._kept, payload.kept_rows or self._kept)
                self._changed.append(payload.rows)
                self._passed_on.append(NewItems.of(payload.new_items).rows)
        self._record = head if self._affordable <= 0 else self._record
        return self._record

    def undo(self, served: WeightPayload, own: WeightPayload) -> tuple[WeightPayload, WeightPayload]:
        """Make what leads from the last version to the earlier one, of which all is given."""
        if self._affordable <= 0:
            return served, own
        rows, passed_on = (self._before(parts, served.rows) for parts in (self._changed, self._passed_on))
        ids = NewItems.of(served.new_items).ids
        new_items = NewItems(ids.take(passed_on - 1), passed_on)
        return _some_rows(served, rows, self._kept, new_items), _some_rows(own, rows, self._kept, ())

    def _before(self, parts: Sequence[NDArray[np.int32]], rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the rows named in `parts` that stay, and all that do not."""
        named = np.unique(np.concatenate([*parts, np.empty(0, np.int32)]))
        return np.concatenate([named[named < self._kept], rows[self._kept :]])


def _some_rows(
    whole: WeightPayload, rows: NDArray[np.int32], kept: int, new_items: Sequence[tuple[str, int]]
) -> WeightPayload:
    columns = {name: column[rows] for name, column in whole.columns.items()}
    return WeightPayload(whole.dense, rows, columns, new_items, kept_rows=kept)


def put_together(store: WeightStore, version: int) -> tuple[VersionRecord, WeightPayload, WeightPayload]:
    """Return the record of a retained version with all that servers and all that only a trainer needs of it.

    Raises:
        NotRetained: when the version is not kept (any more).
        CorruptWeights: when what it is made of is not whole.
    """
    record, served, own, damage = _follow(store, version)
    if damage is not None:
        raise damage
    if record.version != version:
        raise NotRetained(f"version {version} is not retained; {describe_retained(store)}")
    return record, served, own


def newest_whole(store: WeightStore) -> tuple[VersionRecord, WeightPayload, WeightPayload]:
    """Return the newest version that can be put together, as put_together does.

    Raises:
        NotRetained: when there is none.
    """
    try:
        record, served, own, damage = _follow(store, None)
    except CorruptWeights as error:
        raise NotRetained(f"no version is whole: {error}") from error
    if not record.version:
        raise NotRetained(f"no version is whole: {damage}" if damage else "there are no versions yet")
    return record, served, own


def _follow(
    store: WeightStore, version: int | None
) -> tuple[VersionRecord, WeightPayload, WeightPayload, CorruptWeights | None]:
    """Put together `version`, or the last one, or the one before the damage that is then returned too."""
    served, own = _Whole(), _Whole()
    snapshot = store.load_snapshot(trainer=True, at_most=version, place=served.place)
    damage: CorruptWeights | None = None
    record = VersionRecord()
    rows = 0
    if snapshot is not None and snapshot.trainer_payload is not None:
        record, rows = snapshot.record, len(snapshot.payload.rows)
        served.apply(snapshot.payload, 0, rows)
        own.apply(snapshot.trainer_payload, 0, rows)
    if snapshot is None and store.snapshot_versions():
        # What the oldest snapshot stands for is gone.
        raise NotRetained(f"version {version} is not retained; {describe_retained(store)}")
    while version is None or record.version < version:
        wanted = DELTAS_AT_ONCE if version is None else min(version - record.version, DELTAS_AT_ONCE)
        try:
            deltas = store.read_after(record.version, count=wanted, chain=record.chain or None, trainer=True)
        except CorruptWeights as error:
            damage = error
            break
        if not deltas:
            break
        for delta in deltas:
            assert delta.trainer_payload is not None
            kept = delta.payload.kept_rows or rows
            new = NewItems.of(delta.payload.new_items).split(kept)[1]
            rows = len(delta.payload.rows) if delta.payload.whole else kept + len(new)
            served.apply(delta.payload, kept, rows)
            own.apply(delta.trainer_payload, kept, rows)
            record = delta.record
    return record, served.payload(), own.payload(), damage


def describe_retained(store: WeightStore) -> str:
    """Say which versions are retained, for a person."""
    head = store.head()
    if head is None:
        return "there are no versions yet"
    snapshots = store.snapshot_versions()
    return f"retained are {min(snapshots, default=1)} to {head.version}"


def roll_back(store: WeightStore, quarantine: Quarantine, version: int, reason: str, now_ms: int) -> VersionRecord:
    """Put the content of an earlier version in force again, as a new version; versions never go back.

    The feedback learned since goes into quarantine: learning goes on behind it. A trainer at work notices and goes on
    from the new version. A last version that restored `version` already is returned as it stands, so that a call may be
    repeated.

    Raises:
        NotRetained: when the version is not kept (any more), or is not an earlier one.
        OtherVersionCameFirst: when trainers committed in between ATTEMPTS times.
    """
    made = _committed(store, version, reason, now_ms)
    # Behind the commit: what is in quarantine is not learned. A repeated call makes up for a crash in between.
    for part in made.set_aside:
        quarantine.set_aside(part.after, part.until, reason or f"rollback to version {version}", now_ms)
    return made


def _committed(store: WeightStore, version: int, reason: str, now_ms: int) -> VersionRecord:
    store.hold(HOLD_SECONDS)
    try:
        record, served, own = put_together(store, version)
        since = _Since(store, record, served)
        for _ in range(ATTEMPTS):
            epoch, head = store.epoch(), since.follow()
            if head.kind == ROLLBACK and head.restored_version == version:
                return head
            if record.version >= head.version:
                raise NotRetained(f"version {version} is in force; {describe_retained(store)}")
            payload, own_payload = map(encode, since.undo(served, own))
            try:
                return store.commit(epoch, head.version, payload, own_payload, _restoring(record, head, reason, now_ms))
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
