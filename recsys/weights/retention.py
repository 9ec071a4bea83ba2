"""Retention: which full copies of the weights are kept, and how often one is made, so that all stays within bounds."""

from __future__ import annotations

from collections.abc import Sequence

from recsys.settings import Settings
from recsys.store.v1.weights_pb2 import SnapshotRecord, VersionRecord
from recsys.weights.record import Record

LEAST_SNAPSHOT_BYTES = 64 << 20


def snapshot_due(settings: Settings, versions: int, bytes_: int, snapshot_bytes: int) -> bool:
    """Tell whether a copy is due after so many versions with so many bytes, where a copy has `snapshot_bytes`."""
    often = settings.snapshot_every_bytes or max(LEAST_SNAPSHOT_BYTES, snapshot_bytes)
    # Several times within the bound on versions: they are let go of from copy to copy.
    return bytes_ >= often or versions >= max(1, settings.versions_retained // (settings.snapshots_retained + 1))


def oldest_kept(
    settings: Settings, snapshots: Sequence[SnapshotRecord], deltas: Sequence[VersionRecord], last: int
) -> int:
    """Return the oldest version of which the copy is kept, given all copies, newest first, and all deltas.

    As many as the bounds allow of copies, of versions up to `last`, and of bytes; the newest is kept whatever it takes.
    """
    kept = snapshots[0].version
    for count, snapshot in enumerate(snapshots, 1):
        copies = sum(map(_size, snapshots[:count]))
        behind = sum(_size(delta) for delta in deltas if delta.version > snapshot.version)
        # Before the next copy lets go of any, there will be it and what leads to it.
        coming = 2 * _size(snapshots[0])
        if count > settings.snapshots_retained or last - snapshot.version > settings.versions_retained:
            break
        if count > 1 and copies + behind + coming > settings.weights_max_bytes:
            break
        kept = snapshot.version
    return kept


def _size(record: Record) -> int:
    return record.bytes + record.trainer_bytes
