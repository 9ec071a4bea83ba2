"""Ids: find rows by the bytes of items' ids in compiled code, many at once; a copy of what ItemRows knows.

Open addressing with linear probing. A row that another item gets leaves its slot behind, which equals no id any more.
Shapes: I rows, R of them, T bytes of text, S slots.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart

# Slots for each row that there is room for, and the share of them that may be taken.
SLOTS, FULL = 3, 0.6
# Of a row that is no item's.
NOBODY = -1


class Index(NamedTuple):
    """What `find` looks at: all ids, where each row's begins and how long it is, rows by slot, the hash's secrets."""

    text_T: NDArray[np.uint8]
    start_I: NDArray[np.int64]
    length_I: NDArray[np.int32]
    slot_S: NDArray[np.int32]
    secret_2: NDArray[np.uint64]


class Ids:
    """Hold the id of each row, "" where it is no item's; with room for an eighth more."""

    def __init__(self, ids: Sequence[str]) -> None:
        """Hold the ids by row."""
        text_T, length_R = _packed(ids)
        rows, room = len(ids), len(ids) + len(ids) // 8 + 64
        # What strangers call their items must not decide which slots they share.
        secret_2 = np.array([secrets.randbits(64), secrets.randbits(64) | 1], np.uint64)
        self.index = Index(
            np.empty(len(text_T) + len(text_T) // 8 + 4096, np.uint8),
            np.zeros(room, np.int64),
            np.full(room, NOBODY, np.int32),
            np.zeros(1 << (SLOTS * room).bit_length(), np.int32),
            secret_2,
        )
        self._used = self._taken = 0
        self._write(np.arange(rows), text_T, length_R)

    def write(self, rows: NDArray[np.integer], ids: Sequence[str]) -> bool:
        """Give rows to items, whoever had them; return False, with nothing changed, where there is no room."""
        text_T, length_R = _packed(ids)
        index = self.index
        if (
            rows.max(initial=0) >= len(index.length_I)
            or self._used + len(text_T) > len(index.text_T)
            or self._taken + len(rows) > FULL * len(index.slot_S)
        ):
            return False
        self._write(rows.astype(np.int64), text_T, length_R)
        return True

    def _write(self, row_R: NDArray[np.int64], text_T: NDArray[np.uint8], length_R: NDArray[np.int32]) -> None:
        end = self._used + len(text_T)
        self.index.text_T[self._used : end] = text_T
        self._taken += _insert(self.index, row_R, length_R, self._used)
        self._used = end


def _packed(ids: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return the ids' bytes, one after the other, and the length of each, NOBODY where it is empty."""
    text = "".join(ids)
    each = ids if text.isascii() else [one.encode() for one in ids]
    length_R = np.fromiter(map(len, each), np.int32, len(ids))
    length_R[length_R == 0] = NOBODY
    return np.frombuffer(text.encode(), np.uint8), length_R


@compiled_apart
def _hash(text_T: NDArray[np.uint8], start: int, length: int, secret_2: NDArray[np.uint64]) -> Any:
    found = secret_2[0]
    for place in range(start, start + length):
        found = (found ^ np.uint64(text_T[place])) * secret_2[1]
        found ^= found >> np.uint64(29)
    return found


@compiled_apart
def find(index: Index, wanted_T: NDArray[np.uint8], start: int, length: int) -> int:
    """Return the row of the id that stands in `wanted_T` from `start` on; 0 where there is none."""
    last = np.uint64(len(index.slot_S) - 1)
    slot = _hash(wanted_T, start, length, index.secret_2) & last
    while index.slot_S[slot]:
        row = index.slot_S[slot]
        if index.length_I[row] == length:
            place, first = 0, index.start_I[row]
            while place < length and index.text_T[first + place] == wanted_T[start + place]:
                place += 1
            if place == length:
                return int(row)
        slot = (slot + np.uint64(1)) & last
    return 0


@compiled_apart
def _insert(index: Index, row_R: NDArray[np.int64], length_R: NDArray[np.int32], start: int) -> int:
    """Take the rows from whoever had them and give them the ids that stand from `start` on; return the slots taken."""
    last, taken = np.uint64(len(index.slot_S) - 1), 0
    for place in range(len(row_R)):
        row, length = row_R[place], length_R[place]
        index.length_I[row] = length
        if length <= 0 or not row:
            continue
        index.start_I[row] = start
        slot = _hash(index.text_T, start, length, index.secret_2) & last
        while index.slot_S[slot] and index.slot_S[slot] != row:
            slot = (slot + np.uint64(1)) & last
        taken += index.slot_S[slot] == 0
        index.slot_S[slot] = row
        start += length
    return taken
