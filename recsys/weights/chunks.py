"""Chunks: the bytes of one version or snapshot, as small values that no single command moves at once.

Chunks are staged with a lifetime and under keys of their own, so a killed writer leaves nothing behind and touches
nothing that stands; a script makes them permanent together with the record that names them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, cast

import redis

from recsys.errors import CorruptWeights
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights.payload import Place, Receiver, WeightPayload
from recsys.weights.record import Checksum, Record, checksum

CHUNK_BYTES = 1 << 20
# How long staged chunks wait for their script. Far longer than staging the largest snapshot takes.
STAGED_SECONDS = 600
# Chunks per round trip: enough to hide its latency, few enough to bound what either side buffers.
CHUNKS_PER_PIPELINE = 4
# A store frees strings in its main thread, even on UNLINK: about a millisecond for this many.
CHUNKS_PER_UNLINK = 16

# What servers read, and what only the trainer reads.
Part = Literal["w", "t"]


class Chunks:
    """Stage, read and remove the chunks that a record names. Store errors pass through as the library raises them."""

    def __init__(self, client: redis.Redis, prefix: str, chunk_bytes: int) -> None:
        self._client = client
        self._prefix = prefix
        self._chunk_bytes = chunk_bytes

    def keys(self, record: Record) -> list[str]:
        """Name all chunks of a record."""
        return [*self._keys(record, "w"), *self._keys(record, "t")]

    def describe(self, record: Record, payload: bytes, trainer_payload: bytes) -> None:
        """Fill in what `record` says of its payloads; each call makes keys that no other has."""
        record.attempt = secrets.token_hex(8)
        record.checksum, record.trainer_checksum = checksum(payload), checksum(trainer_payload)
        record.bytes, record.trainer_bytes = len(payload), len(trainer_payload)
        record.chunks, record.trainer_chunks = self._count(payload), self._count(trainer_payload)

    def stage(self, record: Record, payload: bytes, trainer_payload: bytes) -> list[str]:
        """Write both payloads of a described record for STAGED_SECONDS; return the keys."""
        keys = self.keys(record)
        parts = [*self._split(payload), *self._split(trainer_payload)]
        for start in range(0, len(keys), CHUNKS_PER_PIPELINE):
            pipeline = self._client.pipeline(transaction=False)
            slice_ = slice(start, start + CHUNKS_PER_PIPELINE)
            for key, part in zip(keys[slice_], parts[slice_], strict=True):
                pipeline.set(key, part, ex=STAGED_SECONDS)
            pipeline.execute()
        return keys

    def read(self, record: Record, part: Part, place: Place | None = None) -> WeightPayload:
        """Read one payload, its arrays straight to where they stay; `place` may say where that is for its columns.

        Raises:
            CorruptWeights: when a chunk is gone or the bytes differ from those that were written; what `place` gave is
                then of no use.
        """
        expected, size = (
            (record.checksum, record.bytes) if part == "w" else (record.trainer_checksum, record.trainer_bytes)
        )
        receiver, found, problem = Receiver(size, place), Checksum(), ""
        for pieces in self._hashed(found, self._pieces(record, part)):
            try:
                for piece in () if problem else pieces:
                    receiver.feed(piece)
            except CorruptWeights as error:
                # Reading goes on: bytes that are damaged are one thing, bytes that were written so another.
                problem = str(error)
        if found.digest() != expected:
            raise CorruptWeights(f"version {record.version}: the checksum of {size} bytes is wrong")
        try:
            if problem:
                raise CorruptWeights(problem)
            return receiver.payload()
        except CorruptWeights as error:
            raise CorruptWeights(f"version {record.version}: {error}") from None

    def _pieces(self, record: Record, part: Part) -> Iterator[list[bytes]]:
        """Read the chunks, a few at a time."""
        keys = list(self._keys(record, part))
        for start in range(0, len(keys), CHUNKS_PER_PIPELINE):
            pipeline = self._client.pipeline(transaction=False)
            for key in keys[start : start + CHUNKS_PER_PIPELINE]:
                pipeline.get(key)
            found = cast("list[bytes | None]", pipeline.execute())
            if None in found:
                missing = start + found.index(None)
                raise CorruptWeights(f"version {record.version}: chunk {missing + 1} of {len(keys)} is gone")
            yield cast("list[bytes]", found)

    @staticmethod
    def _hashed(into: Checksum, batches: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
        """Hash batches, all but the last in a thread of its own while the next is on its way; at most two are held."""
        held: list[bytes] = []
        with ThreadPoolExecutor(1) as executor:
            last: Future[None] | None = None
            for batch in batches:
                if last is not None:
                    last.result()
                if held:
                    last = executor.submit(into.update, held)
                    yield held
                held = batch
            if last is not None:
                last.result()
            into.update(held)
            yield held

    def remove(self, keys: Sequence[str]) -> None:
        """Remove chunks in bounded slices; those already gone do not matter."""
        for start in range(0, len(keys), CHUNKS_PER_UNLINK):
            self._client.unlink(*keys[start : start + CHUNKS_PER_UNLINK])

    def _keys(self, record: Record, part: Part) -> Iterator[str]:
        kind = "chunk" if isinstance(record, VersionRecord) else "snapshot"
        count = record.chunks if part == "w" else record.trainer_chunks
        for i in range(count):
            yield f"{self._prefix}:{kind}:{part}:{record.version}:{record.epoch}:{record.attempt}:{i}"

    def _count(self, data: bytes) -> int:
        return -(-len(data) // self._chunk_bytes)

    def _split(self, data: bytes) -> Iterator[memoryview]:
        view = memoryview(data)
        for start in range(0, len(data), self._chunk_bytes):
            yield view[start : start + self._chunk_bytes]
