"""Uninterrupted: what a trainer that is never killed makes of a copy of the log, to compare others with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from witnesses import ANSWER_ITEMS, Shown

from recsys.catalog import Catalog, CatalogMirror
from recsys.scorer import Query, Scorer
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import VersionRecord, WeightStore, encode
from recsys.weights.replica import Replica

NEVER_BYTES = 1 << 60


def reference_of(settings: Settings) -> Settings:
    """Return the settings of an uninterrupted trainer that keeps every version."""
    return settings.model_copy(
        update={"key_prefix": f"{settings.key_prefix}-reference", "snapshot_every_bytes": NEVER_BYTES}
    )


def copy_log(entries: Sequence[tuple[str, dict[bytes, bytes]]], settings: Settings) -> None:
    """Write a copy of a log, position by position."""
    with connect(settings) as client, client.pipeline(transaction=False) as pipeline:
        for position, fields in entries:
            pipeline.xadd(f"{settings.key_prefix}:{{log}}:records", fields, id=position)
        pipeline.execute()


def final(settings: Settings) -> tuple[VersionRecord, bytes]:
    """Read the last version as a server does: its record, and all of its weights as bytes."""
    replica = Replica(settings, torch.device("cpu"))
    record = VersionRecord()
    with connect(settings) as client:
        weights = WeightStore(client, settings)
        if snapshot := weights.load_snapshot():
            replica.apply(snapshot.payload)
            record = snapshot.record
        while deltas := weights.read_after(record.version, chain=record.chain or None):
            for delta in deltas:
                replica.apply(delta.payload)
                record = delta.record
    return record, encode(replica.write_all())


def same(one: Settings, other: Settings) -> bool:
    """Tell whether two trainers came to the same version, weights, optimizer state and all that led there."""
    (record, weights), (expected, expected_weights) = final(one), final(other)
    return weights == expected_weights and (
        (record.version, record.chain, record.position, record.feedback_learned)
        == (expected.version, expected.chain, expected.position, expected.feedback_learned)
    )


def torn(seen: dict[int, Counter[Shown]], reference: Settings) -> int:
    """Count answers that differ from the one that the reference's version of that number gives."""
    wrong = 0
    query = Query(history=(), count=ANSWER_ITEMS)

    def check(version: int) -> int:
        given = seen.pop(version, None)
        if given is None:
            return 0
        expected = tuple((item.item_id, item.score) for item in scorer.answer([query])[0].items)
        return sum(number for answer, number in given.items() if answer != expected)

    with connect(reference) as client:
        scorer = Scorer(reference, CatalogMirror(Catalog(client, reference)), torch.device("cpu"))
        weights = WeightStore(client, reference)
        snapshot = weights.load_snapshot()
        assert snapshot is not None
        scorer.load(snapshot.record, snapshot.payload)
        wrong += check(snapshot.record.version)
        while deltas := weights.read_after(scorer.version):
            for delta in deltas:
                scorer.apply(delta.record, delta.payload)
                wrong += check(delta.record.version)
    # Versions that never were.
    return wrong + sum(sum(given.values()) for given in seen.values())
