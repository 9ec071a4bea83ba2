"""Repair: when what the store holds is damaged, go on from the newest version that is whole."""

from __future__ import annotations

from recsys.errors import FencedOff, NotRetained, OtherVersionCameFirst
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights.earlier import ATTEMPTS, HOLD_SECONDS, newest_whole
from recsys.weights.payload import encode
from recsys.weights.record import Lineage, LogRange
from recsys.weights.store import WeightStore

# The kind of a version that a repair made.
KIND = "repair"


def repair(store: WeightStore, now_ms: int) -> VersionRecord:
    """Put the newest version that is whole in force again, as a new version, and let go of all before it.

    Its position in the log is in force again too: what was learned since is learned again, and nothing is lost that the
    log still holds. A last version that is whole itself stays, with a full copy beside it.

    Raises:
        NotRetained: when no version is whole, or there is none.
        OtherVersionCameFirst: when trainers committed in between ATTEMPTS times.
    """
    store.hold(HOLD_SECONDS)
    try:
        for _ in range(ATTEMPTS):
            epoch, head = store.epoch(), store.head()
            record, served, own = newest_whole(store)
            if head is None:
                raise NotRetained("the store does not say which version is the last; nothing can follow it")
            payloads = encode(served), encode(own)
            try:
                if record.chain != head.chain:
                    head = store.commit(epoch, head.version, *payloads, _again(record, head, now_ms))
                store.write_snapshot(epoch, head.version, *payloads, alone=True)
            except FencedOff:
                continue
            return head
    finally:
        store.hold(0)
    raise OtherVersionCameFirst(f"trainers committed other versions in between, {ATTEMPTS} times; try again")


def _again(record: VersionRecord, head: VersionRecord, now_ms: int) -> Lineage:
    """Describe the version after `head` that is `record` once more."""
    return Lineage(
        position=record.position,
        feedback_learned=record.feedback_learned,
        feedback_added=0,
        settings_digest=record.settings_digest,
        metrics=dict(record.metrics),
        accepted_ms=(),
        committed_ms=now_ms,
        window_position=record.window_position,
        kind=KIND,
        restored_version=record.version,
        set_aside=[LogRange(part.after, part.until) for part in record.set_aside],
        reason=f"versions {record.version + 1} to {head.version} were damaged",
    )
