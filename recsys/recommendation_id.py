"""RecommendationId: name an answer so that any server, also after a restart, can tell what feedback on it was about.

The id itself says which version answered and, for the first MOST_POSITIONS items, where each came from and a short hash
of its id. Nothing is remembered, nobody is named, and what was not issued here is unknown rather than an error.
"""

from __future__ import annotations

import random
import struct
from base64 import urlsafe_b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart

FORMAT = 1
# 24 characters and 8 more for three items: 195 with this many, of the 256 that a recommendation_id may have.
MOST_POSITIONS = 64
# The format in the highest byte and the version below it; a random number; a check over all else.
_HEAD = struct.Struct(">QQH")
_HEAD_BYTES = _HEAD.size
_VERSION_BITS = 56
_RANDOM_BITS = 64
# An item takes 16 bits: its source (a recsys.v1.Source) above as much of its id's CRC-32 as is left. Two of ten items
# are taken for each other in 3 of 1,000 answers, and feedback on one that was not shown for one of ten in 6 of 10,000.
_HASH_BITS = 14
_HASH = (1 << _HASH_BITS) - 1
_SOURCE = (1 << (16 - _HASH_BITS)) - 1
# What a byte does to a CRC-32, of which the last bit comes first; and the digits of base64 that may stand in an URL.
_POLYNOMIAL = 0xEDB88320
_DIGITS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8)


def _remainders() -> NDArray[np.uint32]:
    found = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        found = (found >> np.uint32(1)) ^ (found & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return found


_REMAINDERS = _remainders()


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


def most_items(max_bytes: int) -> int:
    """Return how many items an id tells of that may have so many bytes, of which 24 are taken by the rest."""
    return max(0, min(MOST_POSITIONS, (max_bytes * 6 // 8 - _HEAD_BYTES) // 2))


def numbers(count: int) -> NDArray[np.uint64]:
    """Draw what makes ids different, for so many of them."""
    return np.array([random.getrandbits(_RANDOM_BITS) for _ in range(count)], np.uint64)


@compiled_apart
def size(items: int) -> int:
    """Return the bytes of an id that tells of so many items."""
    return ((_HEAD_BYTES + 2 * items) * 8 + 5) // 6


@compiled_apart
def write(
    out_N: NDArray[np.uint8],
    at: int,
    version: int,
    number: np.uint64,
    text_T: NDArray[np.uint8],
    starts_M: NDArray[np.int64],
    lengths_M: NDArray[np.integer],
    sources_M: NDArray[np.int64],
    items: int,
) -> Any:
    """Write the id of an answer at a place, and return where it ends.

    It tells of the first `items` items, best first, whose ids stand in a text, each with its recsys.v1.Source.
    """
    bytes_H = np.zeros(_HEAD_BYTES + 2 * items + 2, np.uint8)
    first = np.uint64(FORMAT << _VERSION_BITS) | np.uint64(version)
    for byte in range(8):
        shift = np.uint64(8 * (7 - byte))
        bytes_H[byte], bytes_H[8 + byte] = (first >> shift) & np.uint64(255), (number >> shift) & np.uint64(255)
    for place in range(items):
        hashed = _crc32(text_T, starts_M[place], lengths_M[place], np.uint32(0))
        item = np.int64(hashed) & _HASH | (sources_M[place] & _SOURCE) << _HASH_BITS
        bytes_H[_HEAD_BYTES + 2 * place], bytes_H[_HEAD_BYTES + 2 * place + 1] = item >> 8, item & 255
    both = first ^ number
    check = _crc32(bytes_H, _HEAD_BYTES, 2 * items, np.uint32(both & np.uint64(0xFFFFFFFF) ^ both >> np.uint64(32)))
    bytes_H[_HEAD_BYTES - 2], bytes_H[_HEAD_BYTES - 1] = (check >> 8) & 255, check & 255
    end = at + size(items)
    for place in range(0, _HEAD_BYTES + 2 * items, 3):
        three = np.int64(bytes_H[place]) << 16 | np.int64(bytes_H[place + 1]) << 8 | np.int64(bytes_H[place + 2])
        for digit in range(4):
            if at < end:
                out_N[at] = _DIGITS[(three >> (18 - 6 * digit)) & 63]
                at += 1
    return end


@compiled_apart
def _crc32(text_T: NDArray[np.uint8], start: int, length: int, before: np.uint32) -> Any:
    """Go on with a CRC-32 over so many bytes from `start` on."""
    found = ~before
    for place in range(start, start + length):
        found = _REMAINDERS[(found ^ text_T[place]) & np.uint32(255)] ^ (found >> np.uint32(8))
    return ~found


def issue(version: int, item_ids: Sequence[str], sources: Sequence[int], max_bytes: int = 256) -> str:
    """Make the id of one answer: its items best first, each with its recsys.v1.Source; no two ids are alike.

    As many items are in it as `max_bytes` leaves room for.
    """
    items = min(len(item_ids), most_items(max_bytes))
    each = [item_id.encode() for item_id in item_ids[:items]]
    lengths_M = np.array([len(one) for one in each], np.int64)
    text_T = np.frombuffer(b"".join(each), np.uint8)
    out_N = np.empty(size(items), np.uint8)
    starts_M, sources_M = lengths_M.cumsum() - lengths_M, np.array(sources[:items], np.int64)
    write(out_N, 0, version, numbers(1)[0], text_T, starts_M, lengths_M, sources_M, items)
    return out_N.tobytes().decode()


def parse(text: str) -> RecommendationId | None:
    """Read an id; None for any text that `issue` or `write` did not make."""
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
