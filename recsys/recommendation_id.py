"""RecommendationId: name an answer so that any server, also after a restart, can tell what feedback on it was about.

The id itself says which version answered and, for the first MOST_POSITIONS items, where each came from and a short hash
of its id. Nothing is remembered, nobody is named, and what was not issued here is unknown rather than an error.
"""

from __future__ import annotations

import random
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

FORMAT = 1
# 24 characters and 8 more for three items: 195 with this many, of the 256 that a recommendation_id may have.
MOST_POSITIONS = 64
# The format in the highest byte and the version below it; a random number; a check over all else.
_HEAD = struct.Struct(">QQH")
_VERSION_BITS = 56
_RANDOM_BITS = 64
# An item takes 16 bits: its source (a recsys.v1.Source) above as much of its id's CRC-32 as is left. Two of ten items
# are taken for each other in 3 of 1,000 answers, and feedback on one that was not shown for one of ten in 6 of 10,000.
_HASH_BITS = 14
_HASH = (1 << _HASH_BITS) - 1
_SOURCE = (1 << (16 - _HASH_BITS)) - 1
# By how many items are in it.
_BODIES = [struct.Struct(f">{count}H") for count in range(MOST_POSITIONS + 1)]


@dataclass(frozen=True, slots=True)
class Place:
    """Say where in an answer an item stood: its position, from 0, and its recsys.v1.Source."""

    position: int
    source: int


@dataclass(frozen=True, slots=True)
class RecommendationId:
    """Hold what an id says; `items` are opaque."""

    version: int
    items: Sequence[int]

    def place(self, item_id: str) -> Place | None:
        """Tell where the item stood; None when it was not among the first items."""
        wanted = crc32(item_id.encode()) & _HASH
        for position, item in enumerate(self.items):
            if item & _HASH == wanted:
                return Place(position, item >> _HASH_BITS)
        return None


def issue(version: int, item_ids: Sequence[str], sources: Sequence[int], max_bytes: int = 256) -> str:
    """Make the id of an answer: its items best first, each with its recsys.v1.Source; no two ids are alike.

    As many items are in it as `max_bytes` leaves room for, of which 24 are taken by the rest.
    """
    most = max(0, min(MOST_POSITIONS, (max_bytes * 6 // 8 - _HEAD.size) // 2))
    places = zip(item_ids[:most], sources, strict=False)
    items = [crc32(item_id.encode()) & _HASH | (source & _SOURCE) << _HASH_BITS for item_id, source in places]
    body = _BODIES[len(items)].pack(*items)
    first, second = FORMAT << _VERSION_BITS | version, random.getrandbits(_RANDOM_BITS)
    return urlsafe_b64encode(_HEAD.pack(first, second, _check(first, second, body)) + body).rstrip(b"=").decode()


def parse(text: str) -> RecommendationId | None:
    """Read an id; None for any text that `issue` did not make."""
    try:
        data = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return None
    if len(data) < _HEAD.size or len(data) % 2:
        return None
    first, second, check = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if first >> _VERSION_BITS != FORMAT or check != _check(first, second, body):
        return None
    return RecommendationId(first & (1 << _VERSION_BITS) - 1, struct.unpack(f">{len(body) // 2}H", body))


def _check(first: int, second: int, body: bytes) -> int:
    return crc32(body, (first ^ second) & 0xFFFFFFFF ^ (first ^ second) >> 32) & 0xFFFF
