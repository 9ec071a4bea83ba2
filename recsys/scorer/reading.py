"""reading: histories as the store holds them, as arrays, without an object for each entry.

The same as recsys.encoding makes of the entries. Shapes: B users, L history length, N bytes, H rows of all histories.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart
from recsys.item_rows import Index, find, find_all, same
from recsys.network import GAP_BUCKETS
from recsys.store.v1.log_pb2 import History, HistoryEntry

Longs = NDArray[np.int64]
Bytes = NDArray[np.uint8]
_fields = HistoryEntry.DESCRIPTOR.fields_by_name
_ENTRIES = History.DESCRIPTOR.fields_by_name["history"].number
_ITEM_ID, _CLASS, _TIME = (_fields[name].number for name in ("item_id", "feedback_class", "time_ms"))
# Wire types of protobuf's encoding.
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10
_DAMAGED = -1
# Times before it count as it: their distance from now would not fit a number.
_LONG_AGO_MS = 2**62

_log = logging.getLogger(__name__)


class Read(NamedTuple):
    """Hold histories: rows, classes and gaps as network.Histories has them, and the rows of all that was ever done."""

    rows_BL: Longs
    classes_BL: Longs
    gaps_BL: Longs
    # One user's after the other's, and where each user's end.
    seen_H: Longs
    ends_B: Longs


def read(histories: Sequence[bytes], items: Index, classes: Index, now_ms: int, length: int) -> Read:
    """Read serialized Histories at the time `now_ms`; of one that is damaged counts what stands before the damage.

    `classes` are the names of the feedback classes from row 1 on.
    """
    ends_B = np.cumsum([len(each) for each in histories], dtype=np.int64)
    data_N = np.frombuffer(b"".join(histories), np.uint8)
    *found, damaged = _read(data_N, ends_B, items, classes, now_ms, length)
    if damaged:
        _log.error("%d histories hold entries that cannot be parsed; they and what follows them are left out", damaged)
    return Read(*found)


@compiled_apart
def _varint(data_N: Bytes, at: Any, end: int) -> tuple[Any, Any]:
    """Return a number and where it ends, _DAMAGED where it does not."""
    found, shift = np.uint64(0), np.uint64(0)
    for place in range(at, min(end, at + _LONGEST_VARINT)):
        found |= np.uint64(data_N[place] & 0x7F) << shift
        shift += np.uint64(7)
        if data_N[place] < 0x80:
            return np.int64(found), place + 1
    return np.int64(0), _DAMAGED


@compiled_apart
def _field(data_N: Bytes, at: Any, end: int) -> tuple[Any, Any, Any, Any, Any]:
    """Return a field's number, its wire type, its value or where that begins, and where it ends; _DAMAGED there."""
    tag, at = _varint(data_N, at, end)
    number, kind = tag >> 3, tag & 7
    start, value = at, np.int64(0)
    if at == _DAMAGED:
        return number, kind, value, start, _DAMAGED
    if kind == _VARINT:
        value, at = _varint(data_N, at, end)
    elif kind == _LENGTH:
        value, start = _varint(data_N, at, end)
        # Compared before it is added: a length of nearly 64 bits would pass the end unseen.
        at = start + value if start != _DAMAGED and 0 <= value <= end - start else np.int64(_DAMAGED)
    elif kind == _FIXED64:
        at += 8
    elif kind == _FIXED32:
        at += 4
    else:
        at = np.int64(_DAMAGED)
    return number, kind, value, start, at if at <= end else np.int64(_DAMAGED)


@compiled_apart
def _entry(data_N: Bytes, at: Any, end: int) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Return where an entry's item id and class begin and how long they are, its time, and its end; _DAMAGED."""
    item, item_size, class_, class_size, time_ms = at, np.int64(0), at, np.int64(0), np.int64(0)
    while at < end:
        number, kind, value, start, at = _field(data_N, at, end)
        if at == _DAMAGED:
            break
        if number == _ITEM_ID and kind == _LENGTH:
            item, item_size = start, value
        elif number == _CLASS and kind == _LENGTH:
            class_, class_size = start, value
        elif number == _TIME and kind == _VARINT:
            time_ms = value
    return item, item_size, class_, class_size, time_ms, at


@compiled_apart
def _read(
    data_N: Bytes, ends_B: Longs, items: Index, classes: Index, now_ms: int, length: int
) -> tuple[Longs, Longs, Longs, Longs, Longs, int]:
    users, damaged = len(ends_B), 0
    rows_BL, classes_BL = np.zeros((users, length), np.int64), np.zeros((users, length), np.int64)
    gaps_BL, seen_ends_B = np.zeros((users, length), np.int64), np.zeros(users, np.int64)
    # No entry is shorter than its tag and its length.
    room = len(data_N) // 2 + 1
    item_E, size_E, row_E = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    class_E, time_E = np.empty(room, np.int64), np.empty(room, np.int64)
    seen_H = np.empty(room, np.int64)
    at, seen = np.int64(0), 0
    # The class looked up last: most entries have that of the one before.
    class_, class_size, known = np.int64(0), np.int64(0), np.int64(0)
    for user in range(users):
        end, entries = ends_B[user], 0
        while at < end:
            number, kind, _, start, at = _field(data_N, at, end)
            if at != _DAMAGED and number == _ENTRIES and kind == _LENGTH:
                item_E[entries], size_E[entries], first, size, time_E[entries], after = _entry(data_N, start, at)
                if after == _DAMAGED:
                    at = np.int64(_DAMAGED)
                else:
                    if size != class_size or not same(data_N, first, data_N, class_, size):
                        class_, class_size, known = first, size, find(classes, data_N, first, size)
                    class_E[entries] = known
                    entries += 1
            if at == _DAMAGED:
                damaged += 1
                break
        find_all(items, data_N, item_E, size_E, row_E[:entries])
        for entry in range(entries):
            if row_E[entry]:
                seen_H[seen] = row_E[entry]
                seen += 1
        at, seen_ends_B[user] = end, seen
        place = length - 1
        for entry in range(entries - 1, max(entries - length, 0) - 1, -1):
            if row_E[entry] and class_E[entry]:
                seconds, bucket = max(now_ms - max(time_E[entry], -_LONG_AGO_MS), 0) // 1000, 0
                # The number of bits, as in recsys.encoding.
                while seconds and bucket < GAP_BUCKETS - 1:
                    seconds >>= 1
                    bucket += 1
                rows_BL[user, place], classes_BL[user, place], gaps_BL[user, place] = (
                    row_E[entry],
                    class_E[entry],
                    bucket,
                )
                place -= 1
    return rows_BL, classes_BL, gaps_BL, seen_H[:seen].copy(), seen_ends_B, damaged
