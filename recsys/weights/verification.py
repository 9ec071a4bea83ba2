"""Verification: what is wrong with the versions that a store retains, and how much was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights.record import extend_chain


@dataclass(frozen=True, slots=True)
class Verification:
    """Say what was read, and in `problems`, a sentence each, what is wrong with it."""

    versions: int
    snapshots: int
    bytes: int
    problems: Sequence[str]


def chain_problems(
    deltas: Sequence[VersionRecord], snapshots: Sequence[VersionRecord], head: VersionRecord | None
) -> list[str]:
    """Say where records do not continue one another; `deltas` are oldest first, and follow the oldest snapshot."""
    if head is None:
        return ["there are versions, and none is the last"] if deltas or snapshots else []
    problems = []
    chains = {0: b""} | {record.version: record.chain for record in snapshots}
    oldest = min(record.version for record in snapshots) if snapshots else 0
    version = (deltas[0].version if deltas else head.version + 1) - 1
    if version > oldest:
        problems.append(f"versions {oldest + 1} to {version} are gone")
    chain = chains.get(version)
    for record in deltas:
        if record.version != version + 1 or record.parent != version:
            problems.append(f"version {record.version} of parent {record.parent} follows version {version}")
        elif chain is not None and record.chain != extend_chain(chain, record):
            problems.append(f"version {record.version} does not continue version {version}")
        if chains.setdefault(record.version, record.chain) != record.chain:
            problems.append(f"the snapshot of version {record.version} is that of another")
        version, chain = record.version, record.chain
    if head.version >= oldest and chains.get(head.version) != head.chain:
        problems.append(f"the last version is another version {head.version} than the one retained")
    return problems
