"""Histories: what each user did lately, for the network to see and for never showing the same item again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import redis
from google.protobuf.message import DecodeError

from recsys.settings import Settings
from recsys.store.connection import ReadingScript, store_errors
from recsys.store.durability import Durability
from recsys.store.v1.log_pb2 import History, HistoryEntry

# KEYS: a history. Returns how many entries it had.
FORGET = """
local entries = redis.call('LLEN', KEYS[1])
redis.call('DEL', KEYS[1])
return entries
"""

# KEYS: histories. Returns each as one string, which is a serialized History: an object for each of its entries would
# cost the reader more than the entries cost the store.
READ = """
local found = {}
for place, key in ipairs(KEYS) do
  found[place] = table.concat(redis.call('LRANGE', key, 0, -1))
end
return found
"""

_log = logging.getLogger(__name__)


def log_key(settings: Settings, name: str) -> str:
    """Name a key of the feedback log; histories carry the log's hash tag, so that one script may write both."""
    return f"{settings.key_prefix}:{{log}}:{name}"


def history_key(settings: Settings, user_id: str) -> str:
    """Name the list of a user's entries, oldest first; FeedbackLog.append writes it."""
    return log_key(settings, f"history:{user_id}")


class Histories:
    """Read and forget what is kept of users; writing is the feedback log's part, atomic with its record.

    At most `history_limit` entries are kept per user, of the classes whose settings say `history`. Past that the
    oldest fall off for good: their items no longer count as seen and may be recommended again.
    """

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._client = client
        self._settings = settings
        self._durability = Durability(client, settings)
        self._forget = client.register_script(FORGET)
        self._read = ReadingScript(client, READ)

    def read(self, user_ids: Sequence[str]) -> list[list[HistoryEntry]]:
        """Read everything kept of each user, oldest first, in one round trip; unknown users have nothing."""
        if not user_ids:
            return []
        with store_errors():
            pipeline = self._client.pipeline(transaction=False)
            for user_id in user_ids:
                pipeline.lrange(history_key(self._settings, user_id), 0, -1)
            return [_parsed(entries) for entries in pipeline.execute()]

    def read_serialized(self, user_ids: Sequence[str]) -> list[bytes]:
        """Read as `read` does, but each as it is stored: a serialized History, nothing of it looked at."""
        if not user_ids:
            return []
        with store_errors():
            found: list[bytes] = self._read([history_key(self._settings, user_id) for user_id in user_ids])
        return found

    def forget(self, user_id: str) -> int:
        """Delete a user's history; return how many entries it had.

        Records that are already in the feedback log keep the history they were given in: Forgetting removes them too.

        Raises:
            NotDurable: it is deleted, but may be there again should the store die at once.
        """
        return int(self._durability.run(self._forget, [history_key(self._settings, user_id)], []))


def _parsed(entries: list[bytes]) -> list[HistoryEntry]:
    """Parse stored entries; those that are none, which nothing of ours writes, are left out."""
    try:
        return list(History.FromString(b"".join(entries)).history)
    except DecodeError:
        _log.error("a history holds entries that cannot be parsed; they are left out")
    found: list[HistoryEntry] = []
    for entry in entries:
        with suppress(DecodeError):
            found.extend(History.FromString(entry).history)
    return found
