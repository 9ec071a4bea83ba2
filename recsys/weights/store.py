"""WeightStore: every version committed whole or not at all, kept with its deltas and snapshots, and followed.

All keys share the hash tag {weights}, so a commit is atomic on a cluster too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, NoReturn, cast

import redis

from recsys.errors import CorruptWeights, FencedOff, OtherVersionCameFirst, StoreUnavailable
from recsys.settings import Settings
from recsys.store.connection import store_errors
from recsys.store.v1.weights_pb2 import ObjectionRecord, SnapshotRecord, VersionRecord
from recsys.weights.chunks import CHUNK_BYTES, STAGED_SECONDS, Chunks
from recsys.weights.payload import Place, WeightPayload
from recsys.weights.record import Lineage, Record, extend_chain, pack, same_commit, unpack
from recsys.weights.retention import oldest_kept
from recsys.weights.verification import Verification, chain_problems

# Records per command when all of them are gone through.
RECORDS_PER_PAGE = 64

Entries = list[tuple[bytes, dict[bytes, bytes]]]


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """Hold what one version changed against its parent; version 1 changed everything."""

    record: VersionRecord
    payload: WeightPayload
    trainer_payload: WeightPayload | None


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Hold all of one version; `skipped` are newer snapshots that were passed over because they are not whole."""

    record: VersionRecord
    payload: WeightPayload
    trainer_payload: WeightPayload | None
    skipped: tuple[int, ...]


class WeightStore:
    """Keep the versions of the weights. One trainer writes, the last that took an epoch; any number read.

    Every method raises StoreUnavailable when the store does not answer and StoreFull when it takes no more.
    """

    def __init__(self, client: redis.Redis, settings: Settings, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._client = client
        self._settings = settings
        # Half of what the connection waits for any answer, so a store with nothing new is not taken for a dead one:
        # stores end a wait up to a tenth of a second late.
        self._longest_block = settings.store_timeout_seconds / 2
        prefix = f"{settings.key_prefix}:{{weights}}"
        self._epoch_key, self._head_key = f"{prefix}:epoch", f"{prefix}:head"
        self._deltas_key, self._snapshots_key = f"{prefix}:deltas", f"{prefix}:snapshots"
        self._paused_key, self._held_key = f"{prefix}:paused", f"{prefix}:held"
        self._objection_key = f"{prefix}:objection"
        self._chunks = Chunks(client, prefix, chunk_bytes)
        self._commit_script = _script(client, "commit.lua")
        self._snapshot_script = _script(client, "snapshot.lua")

    def acquire(self) -> int:
        """Take a new epoch; from now on the store refuses what trainers with older ones write."""
        with store_errors():
            return int(self._client.incr(self._epoch_key))

    def head(self) -> VersionRecord | None:
        """Return the last version's record, or None before the first."""
        with store_errors():
            return _version(cast("bytes | None", self._client.hget(self._head_key, "record")))

    def commit(
        self, epoch: int, parent: int, payload: bytes, trainer_payload: bytes, lineage: Lineage
    ) -> VersionRecord:
        """Commit version `parent + 1`, whole or not at all; `parent` is 0 before the first.

        After StoreUnavailable the version may stand or not. Call again with the same arguments: if it stands, its
        record is returned and nothing is written.

        Raises:
            FencedOff: when the epoch is not the current one, or `parent` is not the last version.
        """
        record = VersionRecord(version=parent + 1, parent=parent, epoch=epoch, **asdict(lineage))
        self._chunks.describe(record, payload, trainer_payload)
        with store_errors():
            head, current = self._stand()
            if head is not None and same_commit(head, record):
                return head
            if current != epoch or (head.version if head else 0) != parent:
                _refuse(epoch, current, parent, head.version if head else 0)
            record.chain = extend_chain(head.chain if head else b"", record)
            keys = self._chunks.stage(record, payload, trainer_payload)
            outcome, *found = self._commit_script(
                keys=[self._epoch_key, self._head_key, self._deltas_key, *keys],
                args=[epoch, parent, record.version, record.chain, record.position, pack(record)],
            )
        if outcome == b"repeated":
            return cast(VersionRecord, _version(found[0]))
        if outcome == b"fenced":
            _refuse(epoch, int(found[0]), parent, int(found[1]))
        if outcome == b"refused":
            raise FencedOff(f"version {record.version} is among the deltas already, though the head does not say so")
        _check_staged(outcome)
        return record

    def write_snapshot(
        self, epoch: int, version: int, payload: bytes, trainer_payload: bytes, *, alone: bool = False
    ) -> None:
        """Keep a full copy of `version`; then let go of the oldest, as many as the settings' bounds demand.

        The deltas up to the oldest snapshot go too: who holds it needs only what came after. `version` must be the
        last one, or one whose delta is still there; an earlier snapshot of it is replaced. `alone` lets go of all
        others.

        Raises:
            FencedOff: when the epoch is not the current one, or the store does not have `version`.
        """
        with store_errors():
            head, current = self._stand()
            if current != epoch:
                _refuse(epoch, current)
            of = head if head and head.version == version else next(iter(self.versions(1, version + 1)), None)
            if of is None or of.version != version:
                raise FencedOff(f"version {version} cannot be snapshotted: the store does not have it any more")
            record = SnapshotRecord(version=version, epoch=epoch, record=of)
            self._chunks.describe(record, payload, trainer_payload)
            others = self._snapshots()
            copies = sorted((record, *(s for s in others if s.version != version)), key=lambda s: -s.version)
            last = head.version if head else version
            kept = version if alone else oldest_kept(self._settings, copies, list(self._all_versions()), last)
            if version < kept:
                return
            retired = [s for s in others if s.version == version or s.version < kept or alone]
            keys = self._chunks.stage(record, payload, trainer_payload)
            gone = [key for s in retired for key in self._chunks.keys(s)]
            outcome, *found = self._snapshot_script(
                keys=[self._epoch_key, self._snapshots_key, *keys, *gone],
                args=[epoch, version, pack(record), len(keys), STAGED_SECONDS, *map(pack, retired)],
            )
            if outcome == b"fenced":
                _refuse(epoch, int(found[0]))
            _check_staged(outcome)
            self._chunks.remove(gone)
            self._trim(kept)

    def load_snapshot(
        self, *, trainer: bool = False, at_most: int | None = None, place: Place | None = None
    ) -> Snapshot | None:
        """Load the newest snapshot that is whole, or None when there is none (then follow from version 0).

        With `at_most` snapshots of later versions do not count. `place` is asked, for each one that is tried, where its
        columns are to be read to.

        Raises:
            CorruptWeights: when there are snapshots and none is whole.
        """
        tried: dict[str, SnapshotRecord] = {}
        # Listed anew after each failure: the one that failed may have been retired while it was being read.
        with store_errors():
            while left := [s for s in self._snapshots(at_most) if s.attempt not in tried]:
                newest = tried[left[0].attempt] = left[0]
                try:
                    payloads = self._payloads(newest, trainer, place)
                except CorruptWeights:
                    continue
                skipped = tuple(s.version for s in tried.values() if s is not newest)
                return Snapshot(newest.record, *payloads, skipped)
        if tried:
            raise CorruptWeights(f"none of the snapshots {[s.version for s in tried.values()]} is whole")
        return None

    def read_after(
        self,
        version: int,
        wait_seconds: float = 0,
        count: int = 16,
        *,
        chain: bytes | None = None,
        trainer: bool = False,
    ) -> list[Delta]:
        """Read up to `count` versions after `version`, in order; wait for the first of them if there is none.

        Empty when nothing came in `wait_seconds`; a wait longer than the connection's patience is made of several.
        `chain` is that of the version held: with it, a version that continues another past of the same length is
        found out (a store that crashed can forget its last second).

        Raises:
            CorruptWeights: when what follows is not there, not whole, or does not continue `version`. Load a
                snapshot then.
        """
        deadline = time.monotonic() + wait_seconds
        with store_errors():
            while not (records := self._following(version, chain, count)):
                left = deadline - time.monotonic()
                if left <= 0:
                    return []
                block_ms = max(1, int(min(left, self._longest_block) * 1000))  # 0 would wait for ever
                self._client.xread({self._deltas_key: f"{version}-0"}, count=1, block=block_ms)
            return self._whole(records, trainer)

    def epoch(self) -> int:
        """Return the current epoch, 0 before the first trainer."""
        with store_errors():
            return self._stand()[1]

    def pause(self, paused: bool) -> None:
        """Tell trainers to stop learning after the batch at hand, or to go on; feedback keeps being accepted."""
        with store_errors():
            if paused:
                self._client.set(self._paused_key, b"1")
            else:
                self._client.delete(self._paused_key)

    def paused(self) -> bool:
        """Return whether learning is paused, or held for a moment."""
        with store_errors():
            return bool(self._client.exists(self._paused_key, self._held_key))

    def hold(self, seconds: int) -> None:
        """Keep trainers from learning for so long at the most, whether or not they are paused; 0 lets them go on."""
        with store_errors():
            if seconds:
                self._client.set(self._held_key, b"1", ex=seconds)
            else:
                self._client.delete(self._held_key)

    def write_objection(self, objection: ObjectionRecord) -> None:
        """Keep, for people to see, why the version in the making is held."""
        with store_errors():
            self._client.set(self._objection_key, objection.SerializeToString())

    def objection(self) -> ObjectionRecord | None:
        """Return why the version after the head is held; None where it is not, as far as is known."""
        pipeline = self._client.pipeline(transaction=True)
        pipeline.get(self._objection_key)
        pipeline.hget(self._head_key, "record")
        with store_errors():
            found, head = pipeline.execute()
        objection, last = None if found is None else unpack(ObjectionRecord, found), _version(head)
        return objection if objection and last and objection.version == last.version + 1 else None

    def versions(self, count: int, before: int | None = None) -> list[VersionRecord]:
        """List the records of retained versions, newest first, those below `before` if given."""
        newest = "+" if before is None else f"{max(before, 1) - 1}-0"
        with store_errors():
            entries = cast(Entries, self._client.xrevrange(self._deltas_key, max=newest, count=count))
        return [_record(entry) for entry in entries]

    def snapshots(self) -> list[VersionRecord]:
        """List the records of versions of which a full copy is kept, newest first."""
        with store_errors():
            return [snapshot.record for snapshot in self._snapshots()]

    def snapshot_versions(self) -> list[int]:
        """List the versions of which a full copy is kept, newest first."""
        return [record.version for record in self.snapshots()]

    def snapshot_names(self) -> list[str]:
        """Name the full copies that are kept; one that is written anew has another name."""
        with store_errors():
            return [snapshot.attempt for snapshot in self._snapshots()]

    def usage(self) -> int:
        """Add up the bytes of all retained deltas and snapshots."""
        return sum(self.sizes())

    def sizes(self) -> tuple[int, int]:
        """Add up the bytes of all retained deltas, and of all snapshots."""
        with store_errors():
            parts: tuple[Iterator[Record], ...] = (self._all_versions(), iter(self._snapshots()))
            deltas, snapshots = (sum(record.bytes + record.trainer_bytes for record in part) for part in parts)
        return deltas, snapshots

    def verify(self, progress: Callable[[int, int], None] = lambda done, of: None) -> Verification:
        """Read all that is retained, and compare chains and checksums; what is let go of meanwhile is passed over.

        `progress` is called with what was read and all there is to read.
        """
        with store_errors():
            head = self._stand()[0]
            deltas = list(self._all_versions())[::-1]
            # After the deltas: a snapshot written in between lets go of some, and no gap is seen where none is.
            snapshots = self._snapshots()
            problems = chain_problems(deltas, [snapshot.record for snapshot in snapshots], head)
            records: list[Record] = [*deltas, *snapshots]
            for done, record in enumerate(records, 1):
                problems.extend(self._damage(record))
                progress(done, len(records))
        read = sum(record.bytes + record.trainer_bytes for record in records)
        return Verification(len(deltas), len(snapshots), read, problems)

    def _damage(self, record: Record) -> list[str]:
        """Say what is wrong with a record's payloads, unless it is not retained any more."""
        try:
            self._payloads(record, trainer=True)
        except CorruptWeights as error:
            if isinstance(record, SnapshotRecord):
                return [f"snapshot of {error}"] if record in self._snapshots() else []
            return [str(error)] if record in self.versions(1, record.version + 1) else []
        return []

    def _stand(self) -> tuple[VersionRecord | None, int]:
        """Return the last version and the current epoch, 0 before the first."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hget(self._head_key, "record")
        pipeline.get(self._epoch_key)
        record, epoch = pipeline.execute()
        return _version(record), int(epoch or 0)

    def _snapshots(self, at_most: int | None = None) -> list[SnapshotRecord]:
        """List the snapshots of versions up to `at_most`, newest first."""
        members = cast("list[bytes]", self._client.zrange(self._snapshots_key, 0, -1, desc=True))
        snapshots = [unpack(SnapshotRecord, member) for member in members]
        return [s for s in snapshots if at_most is None or s.version <= at_most]

    def _all_versions(self) -> Iterator[VersionRecord]:
        before: int | None = None
        while page := self.versions(RECORDS_PER_PAGE, before):
            yield from page
            before = page[-1].version

    def _payloads(
        self, record: Record, trainer: bool, place: Place | None = None
    ) -> tuple[WeightPayload, WeightPayload | None]:
        payload = self._chunks.read(record, "w", place)
        return payload, self._chunks.read(record, "t") if trainer else None

    def _whole(self, records: list[VersionRecord], trainer: bool) -> list[Delta]:
        """Read the payloads of records up to the first that is damaged, which must not be the first of all."""
        deltas: list[Delta] = []
        for record in records:
            try:
                deltas.append(Delta(record, *self._payloads(record, trainer)))
            except CorruptWeights:
                if not deltas:
                    raise
                break
        return deltas

    def _following(self, version: int, held: bytes | None, count: int) -> list[VersionRecord]:
        """Return the records after `version`, each shown to continue the one before."""
        # Both at one instant: an empty stream is only "nothing new" when the head is not ahead of the reader.
        pipeline = self._client.pipeline(transaction=True)
        pipeline.xrange(self._deltas_key, min=f"({version}-0", count=count)
        pipeline.hget(self._head_key, "record")
        entries, last = pipeline.execute()
        records = [_record(entry) for entry in cast(Entries, entries)]
        head = _version(last)
        if not records and head is not None:
            if head.version > version:
                raise CorruptWeights(f"version {version + 1} is gone: the store stands at {head.version}")
            if head.version == version and held is not None and head.chain != held:
                raise CorruptWeights(f"version {version} of the store is another than the one held")
        for record in records:
            if record.version != version + 1 or record.parent != version:
                raise CorruptWeights(f"version {record.version} of parent {record.parent} follows version {version}")
            if held is not None and record.chain != extend_chain(held, record):
                raise CorruptWeights(f"version {record.version} does not continue the version {version} that is held")
            version, held = record.version, record.chain
        return records

    def _trim(self, version: int) -> None:
        """Remove deltas up to `version`, oldest first; the stream's entries last, so what is cut short is resumed."""
        while entries := cast(
            Entries, self._client.xrange(self._deltas_key, max=f"{version}-0", count=RECORDS_PER_PAGE)
        ):
            records = [_record(entry) for entry in entries]
            self._chunks.remove([key for record in records for key in self._chunks.keys(record)])
            self._client.xtrim(self._deltas_key, minid=f"{records[-1].version + 1}-0", approximate=False)


def _script(client: redis.Redis, name: str) -> Callable[..., list[Any]]:
    source = files("recsys.weights").joinpath(name).read_text(encoding="utf-8")
    return cast("Callable[..., list[Any]]", client.register_script(source))


def _version(data: bytes | None) -> VersionRecord | None:
    return None if data is None else unpack(VersionRecord, data)


def _record(entry: tuple[bytes, dict[bytes, bytes]]) -> VersionRecord:
    return unpack(VersionRecord, entry[1].get(b"record", b""))


def _refuse(epoch: int, current: int, parent: int = 0, last: int = 0) -> NoReturn:
    if epoch == current and parent != last:
        raise OtherVersionCameFirst(f"version {parent} is not the last: the store stands at version {last}")
    raise FencedOff(f"epoch {epoch} is not the current one: the store is at epoch {current}")


def _check_staged(outcome: bytes) -> None:
    if outcome == b"lapsed":
        raise StoreUnavailable(f"nothing was written: staging took longer than {STAGED_SECONDS} seconds")
