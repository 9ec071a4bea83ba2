"""Forgetting: remove what was logged of one user, for good, and remember where the log has gaps since.

The weights are not touched: they hold sums over all users. What the trainer keeps by account, a hash and how well the
history explained what was chosen, it is told in the log to let go of, by a place that many accounts share. What was
learned from removed records cannot be made again from the log, so their positions are kept, without anything of the
user.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from recsys.accounts import place
from recsys.feedback import parse_record
from recsys.feedback_log import BEGINNING, PAGE, FeedbackLog, position_key
from recsys.histories import Histories, log_key
from recsys.quarantine import Quarantine
from recsys.settings import Settings
from recsys.store.connection import store_errors
from recsys.store.durability import Durability

# KEYS: records, stats, forgotten positions. ARGV: for each record its position, the position's milliseconds, and 1 if
# no version has learned it, else 0.
# Returns how many records were still there, and how many of them no version has learned. XDEL comes first: a store out
# of memory allows it, and what follows it.
FORGET = """
local records, bytes, unlearned = 0, 0, 0
for i = 1, #ARGV, 3 do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if entry then
    redis.call('XDEL', KEYS[1], ARGV[i])
    redis.call('ZADD', KEYS[3], ARGV[i + 1], ARGV[i])
    records = records + 1
    bytes = bytes + #entry[2][2]
    unlearned = unlearned + tonumber(ARGV[i + 2])
  end
end
if records > 0 then
  redis.call('HINCRBY', KEYS[2], 'trimmed', records)
  redis.call('HINCRBY', KEYS[2], 'trimmed_bytes', bytes)
  redis.call('HINCRBY', KEYS[2], 'forgotten_unlearned', unlearned)
end
return {records, unlearned}
"""

# KEYS: records. ARGV: the place of the user's account. Has the trainer let go of what it keeps there; see LogEntry.
# XDEL comes first, of nothing: a store out of memory allows it, and what follows it.
FORGET_ACCOUNT = """
redis.call('XDEL', KEYS[1], '0-1')
return redis.call('XADD', KEYS[1], '*', 'f', ARGV[1])
"""

# KEYS: a part that was set aside. ARGV: positions. Returns how many were still there.
FORGET_SET_ASIDE = "return redis.call('XDEL', KEYS[1], unpack(ARGV))"

# Field number and wire type of FeedbackRecord.user_id, which stand before its length and its bytes.
USER_ID_TAG = b"\x12"


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Tell what was removed of a user, and in `remains`, a sentence each, what was not."""

    history_entries: int
    # From the feedback log.
    log_records: int
    # Of those, records that no version had learned.
    unlearned_records: int
    # From the quarantine.
    set_aside_records: int
    remains: Sequence[str]


class Forgetting:
    """Forget users, and tell how many records a part of the log has lost that way.

    Every method raises StoreUnavailable when the store does not answer.
    """

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._client, self._settings = client, settings
        self._records, self._stats = log_key(settings, "records"), log_key(settings, "stats")
        self._forgotten = log_key(settings, "forgotten")
        self._log, self._histories = FeedbackLog(client, settings), Histories(client, settings)
        self._quarantine = Quarantine(client, settings)
        self._durability = Durability(client, settings)
        self._forget = client.register_script(FORGET)
        self._forget_account = client.register_script(FORGET_ACCOUNT)
        self._forget_set_aside = client.register_script(FORGET_SET_ASIDE)

    def forget(self, user_id: str, learned_position: str) -> Forgotten:
        """Remove a user's history, then the user's records in the log and in the quarantine.

        `learned_position` is that of the last version. Goes through all of the log, page by page, between which the
        store serves others. Feedback that comes meanwhile may be removed too; what comes later is a new user's. Doing
        it again removes what is left.

        Raises:
            NotDurable: what was removed may be there again should the store die at once.
        """
        # The history first: records that are written from now on do not hold it any more.
        entries = self._histories.forget(user_id)
        records = unlearned = 0
        keys: list[str | bytes] = [self._records, self._stats, self._forgotten]
        for page in self._pages(self._records, user_id, self._log.last_position()):
            arguments: list[str | int] = []
            for position in page:
                behind = position_key(position) > position_key(learned_position)
                arguments += (position, position_key(position)[0], int(behind))
            removed = self._durability.run(self._forget, keys, arguments)
            records, unlearned = records + int(removed[0]), unlearned + int(removed[1])
        # Behind the user's last record, so that what was read before it was removed cannot bring the account back.
        self._durability.run(self._forget_account, [self._records], [place(user_id)])
        set_aside = 0
        # Behind the log, from which a trainer may have set some aside meanwhile.
        for case in self._quarantine.cases():
            key = self._quarantine.key(case.after)
            for page in self._pages(key, user_id, case.until):
                set_aside += int(self._durability.run(self._forget_set_aside, [key], page))
        return Forgotten(entries, records, unlearned, set_aside, self._remains())

    def lost(self, after: str, until: str) -> int:
        """Count the records removed behind `after`, up to and including `until`, but for those trimmed since."""
        first, last = position_key(after), position_key(until)
        with store_errors():
            found: Any = self._client.zrangebyscore(self._forgotten, first[0], last[0])
        return sum(first < position_key(position.decode()) <= last for position in found)

    def _pages(self, key: str, user_id: str, until: str) -> Iterator[list[str]]:
        """Go through a stream up to a position; give the positions of the user's records, those of a page at a time."""
        name = user_id.encode()
        assert len(name) < 1 << 14
        length = bytes([len(name)]) if len(name) < 1 << 7 else bytes([len(name) & 0x7F | 0x80, len(name) >> 7])
        # Parsing every record of a large log would take many times as long as reading it.
        needle = USER_ID_TAG + length + name
        cursor = BEGINNING
        while True:
            with store_errors():
                page: Any = self._client.xrange(key, f"({cursor}", until, count=PAGE)
            found = [
                position.decode()
                for position, fields in page
                if needle in fields.get(b"r", b"")
                and (record := parse_record(fields[b"r"])) is not None
                and record.user_id == user_id
            ]
            if found:
                yield found
            if len(page) < PAGE:
                return
            cursor = page[-1][0].decode()

    def _remains(self) -> list[str]:
        settings = self._settings
        remains = [
            "the weights keep what they learned: sums over all users; items stay, also those that nobody else chose",
            "a short hash of the id, and how well the history explained what was chosen, is gone from the next version "
            "of the weights on; earlier ones hold it until they are let go of",
            f"a trainer at work replays its examples, which hold such a hash and no id, until "
            f"{settings.replay_capacity:,} newer feedback have taken their place or it is started again",
            "versions that learned or replayed the removed records cannot be rebuilt from the log",
            f"digests of the feedback's ids are kept for at most {settings.deduplication_seconds:,} seconds",
            "the store's append-only file holds the records until it is rewritten (BGREWRITEAOF), and so do copies and "
            "backups until they are deleted",
        ]
        with store_errors():
            shared = self._client.exists(self._records) and self._shares_nodes()
        if shared:
            remains.append(
                "the store frees the removed records' bytes only with those beside them, when the log is trimmed; with "
                "stream-node-max-entries 1 it would free them at once"
            )
        return remains

    def _shares_nodes(self) -> bool:
        """Tell whether the store keeps several records in one piece of memory."""
        stream: Any = self._client.xinfo_stream(self._records)
        return int(stream["radix-tree-keys"]) < int(stream["length"])
