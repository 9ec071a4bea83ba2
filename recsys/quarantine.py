"""Quarantine: parts of the feedback log that were set aside instead of learned, until a person releases them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, cast

import redis

from recsys.errors import NotRetained
from recsys.feedback import parse_record
from recsys.feedback_log import PAGE, position_key
from recsys.histories import log_key
from recsys.settings import Settings
from recsys.store.connection import store_errors
from recsys.store.v1.log_pb2 import FeedbackRecord

# KEYS: set aside, records, stats. ARGV: the most entries to move.
# Moves entries back to the end of the log, where they are feedback like any other; returns how many.
RELEASE = """
local entries = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', ARGV[1])
for _, entry in ipairs(entries) do
  redis.call('XADD', KEYS[2], '*', 'r', entry[2][2])
  redis.call('XDEL', KEYS[1], entry[1])
  redis.call('HINCRBY', KEYS[3], 'appended', 1)
  redis.call('HINCRBY', KEYS[3], 'bytes', #entry[2][2])
end
return #entries
"""


@dataclass(frozen=True, slots=True)
class Case:
    """Describe one part of the log that was set aside: what stands behind `after`, up to and including `until`."""

    number: int
    after: str
    until: str
    reason: str
    time_ms: int
    feedback: int


class Quarantine:
    """Set parts of the log aside, list, show and release them.

    Every method raises StoreUnavailable when the store does not answer and StoreFull when it takes no more.
    """

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._client = client
        self._records, self._stats = log_key(settings, "records"), log_key(settings, "stats")
        self._cases = log_key(settings, "quarantine")
        self._release = client.register_script(RELEASE)

    def set_aside(self, after: str, until: str, reason: str, time_ms: int) -> None:
        """Copy a part of the log, so that it outlives the log's trimming; what was set aside before is left out.

        Doing it again changes nothing, also after a crash half-way.
        """
        cursor = after
        for case in sorted(self.cases(), key=lambda case: position_key(case.after)):
            if position_key(case.until) <= position_key(cursor) or position_key(case.after) >= position_key(until):
                continue
            if position_key(case.after) > position_key(cursor):
                self._copy(cursor, case.after, reason, time_ms)
            cursor = case.until
        if position_key(cursor) < position_key(until):
            self._copy(cursor, until, reason, time_ms)

    def _copy(self, after: str, until: str, reason: str, time_ms: int) -> None:
        key = self.key(after)
        with store_errors():
            kept: Any = self._client.xrevrange(key, count=1)
            cursor = kept[0][0].decode() if kept else after
            while page := cast("list[Any]", self._client.xrange(self._records, f"({cursor}", until, count=PAGE)):
                pipeline = self._client.pipeline(transaction=True)
                for position, fields in page:
                    if b"r" in fields:
                        pipeline.xadd(key, {b"r": fields[b"r"]}, id=position)
                pipeline.execute()
                cursor = page[-1][0].decode()
            number = int(self._client.hlen(self._cases)) + 1
            case = Case(number, after, until, reason, time_ms, int(self._client.xlen(key)))
            self._client.hset(self._cases, after, json.dumps(asdict(case)))

    def cases(self) -> list[Case]:
        """List what is set aside, oldest first; released ones are listed with no feedback left."""
        with store_errors():
            values: Any = self._client.hvals(self._cases)
            found = sorted((Case(**json.loads(value)) for value in values), key=lambda case: case.number)
            left = [int(self._client.xlen(self.key(case.after))) for case in found]
        return [Case(**(asdict(case) | {"feedback": count})) for case, count in zip(found, left, strict=True)]

    def show(self, number: int, count: int) -> list[FeedbackRecord]:
        """Read the first `count` feedback of one case.

        Raises:
            NotRetained: when there is no such case.
        """
        case = self._case(number)
        with store_errors():
            entries: Any = self._client.xrange(self.key(case.after), count=count)
        records = (parse_record(fields[b"r"]) for _, fields in entries)
        return [record for record in records if record is not None]

    def release(self, number: int) -> int:
        """Append the feedback of one case to the log again, to be learned like any other; return how much it was.

        Each is moved atomically: whatever happens in between, none is lost and none comes twice.

        Raises:
            NotRetained: when there is no such case.
        """
        case = self._case(number)
        moved = 0
        with store_errors():
            while count := int(self._release([self.key(case.after), self._records, self._stats], [PAGE])):
                moved += count
        return moved

    def _case(self, number: int) -> Case:
        cases = {case.number: case for case in self.cases()}
        if number not in cases:
            raise NotRetained(f"there is no case {number} in quarantine; there are {sorted(cases) or 'none'}")
        return cases[number]

    def key(self, after: str) -> str:
        """Name the stream that holds the part of the log behind a position."""
        return f"{self._cases}:{after}"
