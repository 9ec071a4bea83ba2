"""FeedbackLog: accepted feedback in order, each with the history it was given in.

Nothing is lost and nothing is counted twice: a batch is appended, remembered and entered into histories by one
atomic script, and the log refuses feedback at its bound instead of dropping any.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import redis

from recsys.accounts import PLACES
from recsys.errors import StoreFull
from recsys.feedback import Feedback, parse_item, parse_record, to_entry, to_record
from recsys.histories import history_key, log_key
from recsys.settings import Settings
from recsys.store.connection import store_errors
from recsys.store.durability import Durability
from recsys.store.v1.log_pb2 import FeedbackRecord, ItemRecord

BEGINNING = "0-0"
# The largest number that a stream gives to an entry within one millisecond.
LAST_SEQUENCE = (1 << 64) - 1

# Entries per page of read_before, and per script call of trim: at 2 KB an entry, about a millisecond of the store.
PAGE = 256

# KEYS: records, stats; then for each feedback its user's history and, if it has an id, what remembers that id.
# ARGV: entries in a record, entries in a history, seconds an id is remembered, the log's bound in bytes; then for
# each feedback its record, its history entry ('' if its class leaves none), and '1' if it has an id.
# Returns a position for each feedback ('' for a duplicate), or, when the log is full, the bytes in use.
# The first write is one that a store out of memory refuses, so such a store refuses the whole batch.
APPEND = """
local stats = redis.call('HMGET', KEYS[2], 'bytes', 'trimmed_bytes')
local used = (tonumber(stats[1]) or 0) - (tonumber(stats[2]) or 0)
if used >= tonumber(ARGV[4]) then
  return used
end
local positions, appended, bytes, key = {}, 0, 0, 3
for i = 5, #ARGV, 3 do
  local history, fresh = KEYS[key], true
  key = key + 1
  if ARGV[i + 2] == '1' then
    fresh = redis.call('SET', KEYS[key], '', 'NX', 'EX', ARGV[3])
    key = key + 1
  end
  if fresh then
    local entries = redis.call('LRANGE', history, '-' .. ARGV[1], -1)
    local record = ARGV[i] .. table.concat(entries)
    positions[#positions + 1] = redis.call('XADD', KEYS[1], '*', 'r', record)
    appended = appended + 1
    bytes = bytes + #record
    if ARGV[i + 1] ~= '' and redis.call('RPUSH', history, ARGV[i + 1]) > tonumber(ARGV[2]) then
      redis.call('LTRIM', history, '-' .. ARGV[2], -1)
    end
  else
    positions[#positions + 1] = ''
  end
end
redis.call('HINCRBY', KEYS[2], 'appended', appended)
redis.call('HINCRBY', KEYS[2], 'bytes', bytes)
return positions
"""

# KEYS: records, stats, digests of what was logged of items. ARGV: the log's bound in bytes; then for each item its id,
# a digest of its record ('' if that says nothing) and the record.
# Appends the records that say something else than the last ones. Returns how many, or, when the log is full, the bytes
# in use below zero.
APPEND_ITEMS = """
local stats = redis.call('HMGET', KEYS[2], 'bytes', 'trimmed_bytes')
local used = (tonumber(stats[1]) or 0) - (tonumber(stats[2]) or 0)
if used >= tonumber(ARGV[1]) then
  return -used
end
local appended = 0
for i = 2, #ARGV, 3 do
  if (redis.call('HGET', KEYS[3], ARGV[i]) or '') ~= ARGV[i + 1] then
    redis.call('XADD', KEYS[1], '*', 'i', ARGV[i + 2])
    redis.call('HINCRBY', KEYS[2], 'bytes', #ARGV[i + 2])
    if ARGV[i + 1] == '' then
      redis.call('HDEL', KEYS[3], ARGV[i])
    else
      redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1])
    end
    appended = appended + 1
  end
end
return appended
"""

# KEYS: records, stats, forgotten positions. ARGV: the first position to keep, its milliseconds, the most entries to
# remove.
# Returns how many entries were removed. XTRIM comes first: a store out of memory allows it, and what follows it.
TRIM = """
local limit = tonumber(ARGV[3])
local entries = redis.call('XRANGE', KEYS[1], '-', '(' .. ARGV[1], 'COUNT', limit + 1)
local keep = entries[limit + 1] and entries[limit + 1][1] or ARGV[1]
local records, bytes = 0, 0
for i = 1, math.min(#entries, limit) do
  local fields = entries[i][2]
  if fields[1] == 'r' then
    records = records + 1
  end
  if fields[1] == 'r' or fields[1] == 'i' then
    bytes = bytes + #fields[2]
  end
end
local removed = redis.call('XTRIM', KEYS[1], 'MINID', '=', keep)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', '(' .. ARGV[2])
if bytes > 0 then
  redis.call('HINCRBY', KEYS[2], 'trimmed', records)
  redis.call('HINCRBY', KEYS[2], 'trimmed_bytes', bytes)
end
return removed
"""


@dataclass(frozen=True, slots=True)
class Appended:
    """Tell where a feedback stands in the log; a duplicate has no position of its own: ""."""

    position: str
    duplicate: bool


@dataclass(frozen=True, slots=True)
class LogEntry:
    """Hold one entry: a record of feedback or of an item, a tick, the place of an account that was forgotten.

    With none of them it is malformed.
    """

    position: str
    accepted_ms: int
    record: FeedbackRecord | None
    tick: bool
    item: ItemRecord | None = None
    # See recsys.accounts.
    forgotten: int | None = None


@dataclass(frozen=True, slots=True)
class LogUsage:
    """Tell how much feedback the log holds; positions of its first and last entry, "0-0" where there is none."""

    records: int
    # Of all records as written, those of items too; what the store needs beside them is not counted.
    bytes: int
    max_bytes: int
    first_position: str
    # Stays when everything is trimmed.
    last_position: str


def position_key(position: str) -> tuple[int, int]:
    """Give what orders positions; as strings they do not compare."""
    milliseconds, _, sequence = position.partition("-")
    return int(milliseconds), int(sequence or 0)


def previous_position(position: str) -> str:
    """Give the last position before one."""
    milliseconds, sequence = position_key(position)
    return f"{milliseconds}-{sequence - 1}" if sequence else f"{max(0, milliseconds - 1)}-{LAST_SEQUENCE}"


class FeedbackLog:
    """Append feedback and read it back in order from any position ("0-0" is the beginning)."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._client = client
        self._settings = settings
        self._records = log_key(settings, "records")
        self._stats = log_key(settings, "stats")
        # Written by Forgetting.
        self._forgotten = log_key(settings, "forgotten")
        self._durability = Durability(client, settings)
        self._append = client.register_script(APPEND)
        # item_id -> digest of the last record that was appended of it; none where that says nothing.
        self._contents = log_key(settings, "contents")
        self._append_items = client.register_script(APPEND_ITEMS)
        self._trim = client.register_script(TRIM)
        self._history_classes = frozenset(c.name for c in settings.classes if c.history)

    def append(self, batch: Sequence[Feedback], now_ms: int | None = None) -> list[Appended]:
        """Append a validated batch in its order, in one round trip; feedback without a time gets `now_ms`.

        A feedback_id seen within `deduplication_seconds`, in this batch or before, is a duplicate: it changes
        nothing. When StoreUnavailable is raised the batch may have been appended all the same, as a whole;
        repeating it is safe for feedback with an id.

        Raises:
            StoreFull: the log is at its bound or the store out of memory; nothing of the batch was written.
            NotDurable: the store has the batch, but not as durably as `settings.durability` says.
        """
        if not batch:
            return []
        now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        settings = self._settings
        keys: list[str | bytes] = [self._records, self._stats]
        arguments: list[bytes | int] = [
            settings.history_length,
            settings.history_limit,
            settings.deduplication_seconds,
            settings.log_max_bytes,
        ]
        for feedback in batch:
            timed = feedback if feedback.time_ms else replace(feedback, time_ms=now_ms)
            keys.append(history_key(settings, timed.user_id))
            if timed.feedback_id:
                keys.append(self._id_key(timed.feedback_id))
            arguments += (
                to_record(timed).SerializeToString(),
                to_entry(timed) if timed.feedback_class in self._history_classes else b"",
                b"1" if timed.feedback_id else b"0",
            )
        reply: int | list[bytes] = self._durability.run(self._append, keys, arguments)
        if isinstance(reply, int):
            raise self._full(reply)
        return [Appended(position.decode(), duplicate=not position) for position in reply]

    def append_items(self, categories: Mapping[str, Sequence[str]]) -> int:
        """Append what the catalogue says of items, by id, where it says something else than before; return how many.

        All in one round trip. Doing it again appends nothing.

        Raises:
            StoreFull, NotDurable: as `append` does.
        """
        if not categories:
            return 0
        arguments: list[bytes | int | str] = [self._settings.log_max_bytes]
        for item_id, each in categories.items():
            record = ItemRecord(item_id=item_id, categories=each).SerializeToString()
            digest = blake2b(record, digest_size=8).digest() if each else b""
            arguments += (item_id, digest, record)
        reply = int(self._durability.run(self._append_items, [self._records, self._stats, self._contents], arguments))
        if reply < 0:
            raise self._full(-reply)
        return reply

    def _full(self, used: int) -> StoreFull:
        return StoreFull(
            f"the feedback log holds {used} bytes and its bound is {self._settings.log_max_bytes} (log_max_bytes); "
            "let the trainer catch up so that learned feedback is trimmed, or raise log_max_bytes"
        )

    def tick(self) -> str:
        """Append the mark "close the current version here" and return its position.

        Batches are a pure function of the log, so a trainer that will not wait any longer has to say so in it.
        """
        with store_errors():
            position: Any = self._client.xadd(self._records, {"t": ""})
        return str(position.decode())

    def read_after(self, position: str, count: int, wait_seconds: float = 0) -> list[LogEntry]:
        """Read up to `count` entries after a position; wait up to `wait_seconds` for the first when there is none.

        A single blocking call stays at half of `store_timeout_seconds`, so that silence in the log is never taken
        for silence of the store; longer waits are made of several.
        """
        deadline = time.monotonic() + wait_seconds
        longest = self._settings.store_timeout_seconds / 2
        while True:
            left = deadline - time.monotonic()
            # BLOCK 0 would wait for ever.
            block = max(1, int(min(left, longest) * 1000)) if left > 0 else None
            with store_errors():
                reply: Any = self._client.xread({self._records: position}, count=count, block=block)
            if reply or block is None:
                return [_entry(*raw) for _, raws in reply or () for raw in raws]

    def read_before(self, position: str, count: int) -> list[LogEntry]:
        """Read the last `count` feedback entries at or before a position, oldest first; others are left out."""
        found: list[LogEntry] = []
        end = position
        while len(found) < count:
            with store_errors():
                page: Any = self._client.xrevrange(self._records, max=end, min="-", count=PAGE)
            found += (entry for entry in (_entry(*raw) for raw in page) if entry.record is not None)
            if len(page) < PAGE:
                break
            end = f"({page[-1][0].decode()}"
        return found[:count][::-1]

    def appended(self) -> int:
        """Count the feedback ever appended, but for what was forgotten before a version learned it.

        Trimming does not lower it.
        """
        with store_errors():
            values: Any = self._client.hmget(self._stats, ["appended", "forgotten_unlearned"])
        appended, unlearned = (int(value or 0) for value in values)
        return appended - unlearned

    def usage(self) -> LogUsage:
        """Measure the log, exactly."""
        with store_errors():
            values: Any = self._client.hmget(self._stats, ["appended", "trimmed", "bytes", "trimmed_bytes"])
        appended, trimmed, written, trimmed_bytes = (int(value or 0) for value in values)
        first, last = self._ends()
        return LogUsage(appended - trimmed, written - trimmed_bytes, self._settings.log_max_bytes, first, last)

    def last_position(self) -> str:
        """Return the position of the newest entry, trimmed or not; "0-0" when there never was one."""
        return self._ends()[1]

    def trim(self, position: str) -> int:
        """Remove every entry before a position, never that one; return how many, ticks included.

        Works in slices of about a millisecond, between which the store serves others, and also out of memory.
        """
        if position_key(position) == (0, 0):
            return 0
        keys, total = [self._records, self._stats, self._forgotten], 0
        while True:
            with store_errors():
                removed = int(self._trim(keys, [position, position_key(position)[0], PAGE]))
            total += removed
            if removed < PAGE:
                return total

    def _ends(self) -> tuple[str, str]:
        try:
            with store_errors():
                stream: Any = self._client.xinfo_stream(self._records)
        except redis.exceptions.ResponseError as error:
            if "no such key" not in str(error):
                raise
            return BEGINNING, BEGINNING
        first = stream["first-entry"]
        return first[0].decode() if first else BEGINNING, stream["last-generated-id"].decode()

    def _id_key(self, feedback_id: str) -> bytes:
        return log_key(self._settings, "id:").encode() + blake2b(feedback_id.encode(), digest_size=16).digest()


def _entry(position: bytes, fields: Mapping[bytes, bytes]) -> LogEntry:
    data = fields.get(b"r")
    return LogEntry(
        position=position.decode(),
        accepted_ms=int(position.partition(b"-")[0]),
        record=None if data is None else parse_record(data),
        tick=data is None and b"t" in fields,
        item=parse_item(fields[b"i"]) if b"i" in fields else None,
        forgotten=_place(fields.get(b"f", b"")),
    )


def _place(data: bytes) -> int | None:
    return int(data) if data.isdigit() and len(data) <= len(str(PLACES)) and int(data) < PLACES else None
