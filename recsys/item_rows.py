"""ItemRows: which row of the item table is which item's; rows that items have left are given to the next new ones.

Ids are bytes in one buffer, and rows are found by them in compiled code: open addressing with linear probing. A slot
holds a row, and above it half of its id's hash, so that few others are looked at. One whose row has no item any more,
or another, equals no id and stays until all slots are written anew.
Shapes: I rows there is room for, R of them, N ids, T bytes of text, S slots.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart
from recsys.packed_ids import PackedIds

PADDING_ROW = 0
# Rows and bytes that there is room for, of those needed: room that nothing is written to takes no memory.
ROOM = 2
LEAST_ROWS, LEAST_BYTES = 64, 1024
# Slots of each row, at least, when they are written, and the share of them that may be taken until they are again.
SLOTS, FULL = 2, 0.7
UPPER, LOWER = np.uint64(0xFFFFFFFF00000000), np.uint64(0xFFFFFFFF)

Longs = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Index(NamedTuple):
    """What `find` looks at: all ids, where each row's begins and how long it is, rows by slot, the hash's secrets."""

    text_T: Bytes
    start_I: Longs
    length_I: NDArray[np.int32]
    slot_S: NDArray[np.uint64]
    secret_2: NDArray[np.uint64]


class ItemRows:
    """Hold the item of each row, and find rows by item; row 0 is never an item's.

    `index` is for compiled code; `free_rows` are ascending; `revision` is another whenever an item gets or loses a row.
    Another thread may look for items while they change; those that change it may miss.
    """

    revision = 0

    def __init__(self) -> None:
        # What strangers call their items must not decide which slots they share; no result depends on it.
        self._secret_2 = np.array([secrets.randbits(64), secrets.randbits(64) | 1], np.uint64)
        self.clear()

    def clear(self) -> None:
        """Forget all items and rows."""
        self.revision += 1
        self.free_rows: Longs = np.empty(0, np.int64)
        self._end, self._items, self._used = 1, 0, 0
        self.index: Index = self._lay_out(PackedIds.of([""]), 0, 0, 0)

    def __len__(self) -> int:
        """Return the number of items."""
        return self._items

    @property
    def end(self) -> int:
        """Return the number of rows, padding and free ones included: row numbers lie below it."""
        return self._end

    @property
    def item_ids(self) -> PackedIds:
        """Return the item of each row, "" where a row is free; good until the next change."""
        text_T, start_I, length_I, *_ = self.index
        return PackedIds(text_T, start_I[: self._end], length_I[: self._end])

    def row(self, item_id: str) -> int:
        """Return the item's row, or 0 when it has none."""
        wanted = item_id.encode()
        return int(_find_one(*self.index, np.frombuffer(wanted, np.uint8), len(wanted)))

    def look_up(self, item_ids: Iterable[str]) -> Longs:
        """Return each item's row, 0 where it has none: (N)."""
        ids = PackedIds.of(item_ids)
        row_N: Longs = _find_all(self.index, ids.text_T, ids.start_N, ids.length_N)
        return row_N

    def used(self, number_N: Longs, without: Longs | None) -> Longs:
        """Return the rows of the items with these numbers, counted from 1 in the order of rows.

        Items whose rows, ascending, are given in `without` are not counted.
        """
        skipped = self.free_rows if without is None else self.left_out(without)
        # Before the k-th row that is skipped stand as many items as its row less k.
        before = skipped - np.arange(len(skipped))
        return number_N + np.searchsorted(before, number_N, side="right")

    def left_out(self, without: Longs) -> Longs:
        """Return, ascending, the free rows and those of some items, whose rows, ascending, are given."""
        if not len(self.free_rows) or not len(without):
            return without if len(without) else self.free_rows
        # A stable sort finds the two runs and merges them: 1 ms for 300,000, where np.union1d takes 100.
        return np.sort(np.concatenate([self.free_rows, without]), kind="stable")

    def allocate(self, item_ids: Iterable[str]) -> list[tuple[str, int]]:
        """Give a row to each item that has none, in the order given, free ones first; return those with their rows."""
        ids = PackedIds.of(item_ids)
        unknown = np.flatnonzero(self.look_up(ids) == PADDING_ROW).tolist()
        if not unknown:
            return []
        new = list(dict.fromkeys(ids[place] for place in unknown if ids[place]))
        reused = self.free_rows[: len(new)]
        row_R = np.concatenate([reused, np.arange(self._end, self._end + len(new) - len(reused))])
        self._give(row_R, PackedIds.of(new))
        self.free_rows = self.free_rows[len(reused) :]
        return list(zip(new, row_R.tolist(), strict=True))

    def extend(self, item_ids: Sequence[str]) -> None:
        """Give the next rows to these items, "" to leave one free.

        Raises:
            ValueError: when an item has a row already or is named twice; nothing is changed then.
        """
        self.assign(np.arange(self._end, self._end + len(item_ids)), item_ids)

    def assign(self, rows: Sequence[int] | NDArray[np.integer], item_ids: Sequence[str]) -> Longs:
        """Give rows, ascending, to items, whoever had them, "" to leave one free; return those that changed hands.

        Raises:
            ValueError: when new rows do not continue those there are, or an item has another row already or is named
                twice; nothing is changed then.
        """
        row_R, ids = np.asarray(rows, np.int64), PackedIds.of(item_ids)
        inside = int(np.searchsorted(row_R, self._end))
        if not np.array_equal(row_R[inside:], np.arange(self._end, self._end + len(row_R) - inside)):
            raise ValueError(f"new rows {row_R[inside:][:3].tolist()}... do not continue {self._end} rows")
        if inside:
            held_K, stays_K = row_R[:inside], ids.length_N[:inside] == 0
            stays_K &= self.index.length_I[held_K] == 0
            stays_K |= self.look_up(ids[:inside]) == held_K
            changed_R = np.concatenate([np.flatnonzero(~stays_K), np.arange(inside, len(row_R))])
            row_R, ids = row_R[changed_R], ids.take(changed_R)
        self._give(row_R, ids)
        taken, freed = row_R[ids.length_N > 0], row_R[ids.length_N == 0]
        if len(freed) or (len(taken) and len(self.free_rows)):
            self.free_rows = np.union1d(np.setdiff1d(self.free_rows, taken), freed)
        return row_R

    def remove(self, rows_R: Longs) -> None:
        """Take rows, ascending, from their items."""
        self.revision += 1
        self._items -= int(np.count_nonzero(self.index.length_I[rows_R]))
        self.index.length_I[rows_R] = 0
        self.free_rows = np.union1d(self.free_rows, rows_R)

    def truncate(self, rows: int) -> None:
        """Forget the rows from `rows` on, and their items."""
        self.revision += 1
        length_I = self.index.length_I[rows : self._end]
        self._items -= int(np.count_nonzero(length_I))
        length_I[:] = 0
        self._end = min(rows, self._end)
        self.free_rows = self.free_rows[self.free_rows < rows]

    def _give(self, row_R: Longs, ids: PackedIds) -> None:
        """Give rows to items, whoever had them; those that are new continue the others."""
        if not len(row_R):
            return
        self._make_room(int(row_R[-1]) + 1, len(ids), int(ids.length_N.sum(dtype=np.int64)))
        index = self.index
        before = index.start_I[row_R], index.length_I[row_R]
        # An item may go to the row that another one leaves.
        index.length_I[row_R] = 0
        used, taken, known = _add(index, self._used, row_R, *(ids.text_T, ids.start_N, ids.length_N))
        self._taken += taken
        if known:
            index.start_I[row_R], index.length_I[row_R] = before
            raise ValueError("a new item already has a row")
        self.revision += 1
        self._used = used
        self._items += int(np.count_nonzero(ids.length_N)) - int(np.count_nonzero(before[1]))
        self._end = max(self._end, int(row_R[-1]) + 1)

    def _make_room(self, end: int, ids: int, size: int) -> None:
        """Lay everything out anew where rows, bytes or slots do not suffice for so many more."""
        text_T, _, length_I, slot_S, _ = self.index
        if end > len(length_I) or self._used + size > len(text_T) or self._taken + ids > FULL * len(slot_S):
            self.index = self._lay_out(self.item_ids, max(0, end - self._end), ids, size)

    def _lay_out(self, ids: PackedIds, more_rows: int, more_ids: int, size: int) -> Index:
        """Write ids by row, with room for so many more rows, ids and bytes, where nobody looks yet."""
        joined = PackedIds.joined(ids.text(), ids.length_N)
        rows = len(ids) + more_rows
        self._used = len(joined.text_T)
        text_T = np.empty(ROOM * (self._used + size) + LEAST_BYTES, np.uint8)
        text_T[: self._used] = joined.text_T
        start_I, length_I = np.zeros(ROOM * rows + LEAST_ROWS, np.int64), np.zeros(ROOM * rows + LEAST_ROWS, np.int32)
        start_I[: len(ids)], length_I[: len(ids)] = joined.start_N, joined.length_N
        slots = SLOTS * max(self._items + more_ids, LEAST_ROWS)
        slot_S = np.zeros(1 << (slots - 1).bit_length(), np.uint64)
        index = Index(text_T, start_I, length_I, slot_S, self._secret_2)
        self._taken: int = _place(index, len(ids))
        return index


@compiled_apart
def _hash(text_T: Bytes, start: Any, length: Any, secret_2: NDArray[np.uint64]) -> Any:
    found = secret_2[0]
    for place in range(start, start + length):
        found = (found ^ np.uint64(text_T[place])) * secret_2[1]
        found ^= found >> np.uint64(29)
    return found


@compiled_apart
def same(one_T: Bytes, first: Any, other_T: Bytes, second: Any, length: Any) -> Any:
    """Tell whether as many bytes from two places on are the same."""
    byte = 0
    while byte < length and one_T[first + byte] == other_T[second + byte]:
        byte += 1
    return byte == length


@compiled_apart
def _seek(index: Index, wanted_T: Bytes, start: Any, length: Any) -> tuple[Any, Any, Any]:
    """Return the row of an id, 0 where there is none, the slot where the look ended, and the id's half of that."""
    last = np.uint64(len(index.slot_S) - 1)
    found = _hash(wanted_T, start, length, index.secret_2)
    slot, half = found & last, found & UPPER
    while index.slot_S[slot]:
        if index.slot_S[slot] & UPPER == half:
            row = np.int64(index.slot_S[slot] & LOWER)
            if index.length_I[row] == length and same(index.text_T, index.start_I[row], wanted_T, start, length):
                return row, slot, half
        slot = (slot + np.uint64(1)) & last
    return np.int64(PADDING_ROW), slot, half


@compiled_apart
def find(index: Index, wanted_T: Bytes, start: Any, length: Any) -> Any:
    """Return the row of the id that stands in `wanted_T` from `start` on; 0 where there is none."""
    return _seek(index, wanted_T, start, length)[0] if length > 0 else np.int64(PADDING_ROW)


@compiled_apart
def find_all(index: Index, wanted_T: Bytes, start_N: Longs, length_N: Any, row_N: Longs) -> None:
    """Do what `find` does for each of several ids, whose first looks wait for the memory together."""
    last, count = np.uint64(len(index.slot_S) - 1), len(row_N)
    found_N, begin_N, size_N = np.empty(count, np.uint64), np.empty(count, np.int64), np.empty(count, np.int64)
    for place in range(count):
        found_N[place] = _hash(wanted_T, start_N[place], length_N[place], index.secret_2)
    for place in range(count):
        # What is not an id's own half is another's, or nobody's.
        taken = index.slot_S[found_N[place] & last]
        row_N[place] = np.int64(taken & LOWER) if taken & UPPER == found_N[place] & UPPER else 0
    for place in range(count):
        begin_N[place], size_N[place] = index.start_I[row_N[place]], index.length_I[row_N[place]]
    for place in range(count):
        start, length = start_N[place], length_N[place]
        if length < 1 or size_N[place] != length or not same(index.text_T, begin_N[place], wanted_T, start, length):
            row_N[place] = find(index, wanted_T, start, length)


@compiled_apart
def _find_one(
    text_T: Bytes,
    start_I: Longs,
    length_I: NDArray[np.int32],
    slot_S: NDArray[np.uint64],
    secret_2: NDArray[np.uint64],
    wanted_T: Bytes,
    length: int,
) -> Any:
    """Do what `find` does; arrays one by one are told apart several times faster than a tuple of them."""
    return find(Index(text_T, start_I, length_I, slot_S, secret_2), wanted_T, 0, length)


@compiled_apart
def _find_all(index: Index, wanted_T: Bytes, start_N: Longs, length_N: NDArray[np.int32]) -> Longs:
    row_N = np.empty(len(length_N), np.int64)
    find_all(index, wanted_T, start_N, length_N, row_N)
    return row_N


@compiled_apart
def _add(
    index: Index, used: int, row_R: Longs, wanted_T: Bytes, start_R: Longs, length_R: NDArray[np.int32]
) -> tuple[Any, int, bool]:
    """Write ids behind the first `used` bytes and give them rows that have none, until one of them has a row already.

    Return where the bytes end, how many slots were taken, and whether it came to that.
    """
    taken, end = 0, np.int64(used)
    for place in range(len(row_R)):
        row, start, length = row_R[place], start_R[place], length_R[place]
        if length > 0:
            known, slot, half = _seek(index, wanted_T, start, length)
            if known:
                return end, taken, True
            for byte in range(length):
                index.text_T[end + byte] = wanted_T[start + byte]
            # In this order: who looks meanwhile reads nothing but text.
            index.start_I[row], index.length_I[row] = end, length
            index.slot_S[slot] = half | np.uint64(row)
            taken += 1
            end += length
    return end, taken, False


@compiled_apart
def _place(index: Index, rows: int) -> int:
    """Write the slots of the first so many rows, of which no two have the same id; return how many they are."""
    last, taken = np.uint64(len(index.slot_S) - 1), 0
    for row in range(rows):
        if index.length_I[row] > 0:
            found = _hash(index.text_T, index.start_I[row], index.length_I[row], index.secret_2)
            slot = found & last
            while index.slot_S[slot]:
                slot = (slot + np.uint64(1)) & last
            index.slot_S[slot] = found & UPPER | np.uint64(row)
            taken += 1
    return taken
