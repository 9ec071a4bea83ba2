"""reading: what is made of stored histories is what recsys.encoding makes of their entries, bad bytes too."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learning import CPU

from recsys.encoding import encode_histories, row_history
from recsys.item_rows import Index, ItemRows
from recsys.item_table import ItemTable
from recsys.scorer.reading import read
from recsys.store.v1.log_pb2 import History, HistoryEntry

NOW_MS, LENGTH = 1_700_000_000_000, 4
CLASSES = {"view": 0, "click": 1}
ITEMS = ["a", "bb", "ccc", "ünïcödé", "x" * 200]

ids = st.sampled_from([*ITEMS, "nobody knows it", ""])
entries = st.builds(
    HistoryEntry,
    item_id=ids,
    feedback_class=st.sampled_from([*CLASSES, "gone", ""]),
    time_ms=st.integers(-(2**63), 2**63 - 1) | st.integers(NOW_MS - 10**9, NOW_MS + 10),
)
histories = st.lists(st.lists(entries, max_size=9), min_size=1, max_size=4)


def table_of(items: list[str]) -> ItemTable:
    table = ItemTable(4, 2, CPU)
    table.allocate(items)
    return table


def index_of(ids: list[str]) -> Index:
    rows = ItemRows()
    rows.extend(ids)
    return rows.index


def stored(history: list[HistoryEntry]) -> bytes:
    return History(history=history).SerializeToString()


@settings(deadline=None)
@given(histories)
def test_what_is_read_is_what_encoding_makes_of_the_entries(each_of: list[list[HistoryEntry]]) -> None:
    table = table_of(ITEMS)
    found = read(list(map(stored, each_of)), table.index, index_of([*CLASSES]), NOW_MS, LENGTH)
    rows = [row_history(each[-LENGTH:], table, CLASSES) for each in each_of]
    kept = [row._replace(times_ms=[max(time, NOW_MS - 2**62) for time in row.times_ms]) for row in rows]
    expected = encode_histories(kept, [NOW_MS] * len(each_of), LENGTH)
    for one, other in zip((found.rows_BL, found.classes_BL, found.gaps_BL), expected, strict=True):
        assert np.array_equal(one, other)
    seen = [[row for row in table.look_up(entry.item_id for entry in each) if row] for each in each_of]
    assert [each.tolist() for each in np.split(found.seen_H, found.ends_B[:-1])] == seen


def test_fields_that_are_not_known_here_are_passed_over() -> None:
    entry = HistoryEntry(item_id="bb", feedback_class="click", time_ms=NOW_MS - 5000).SerializeToString()
    # A number, four bytes, eight bytes and a text of a later version, before and behind what is known.
    later = b"\x50\x96\x01" + b"\x5d1234" + b"\x6112345678" + b"\x6a\x03new"
    whole = later + b"\x7a" + bytes([len(later + entry + later)]) + later + entry + later
    found = read([whole, b""], index_of(ITEMS), index_of([*CLASSES]), NOW_MS, LENGTH)
    assert found.rows_BL.tolist() == [[0, 0, 0, 2], [0, 0, 0, 0]]
    assert found.classes_BL.tolist()[0] == [0, 0, 0, 2]
    assert found.gaps_BL.tolist()[0] == [0, 0, 0, 3]


@settings(deadline=None)
@given(histories, st.integers(0, 400), st.binary(max_size=30))
def test_damage_is_survived_and_others_are_whole(each_of: list[list[HistoryEntry]], at: int, damage: bytes) -> None:
    whole = stored([HistoryEntry(item_id="ccc", feedback_class="view", time_ms=NOW_MS)])
    first = stored(each_of[0])
    found = read([first[:at] + damage, whole], index_of(ITEMS), index_of([*CLASSES]), NOW_MS, LENGTH)
    assert found.rows_BL[1].tolist() == [0, 0, 0, 3]
    assert found.rows_BL.max() <= len(ITEMS)


@pytest.mark.parametrize("length", [2**63 - 1, 2**63 - 20, 2**64 - 1, 2**31, 200])
def test_a_length_beyond_the_end_reaches_nothing(length: int) -> None:
    def varint(number: int) -> bytes:
        digits = [number >> shift & 0x7F for shift in range(0, max(7, number.bit_length()), 7)]
        return bytes([digit | 0x80 for digit in digits[:-1]] + digits[-1:])

    whole = stored([HistoryEntry(item_id="ccc", feedback_class="view", time_ms=NOW_MS)])
    # Of the entry, and of the item's id inside an entry.
    inside = b"\x0a" + varint(length) + b"abc"
    for bad in (b"\x7a" + varint(length) + b"abc", b"\x7a" + varint(len(inside)) + inside):
        found = read([whole + bad, whole], index_of(ITEMS), index_of([*CLASSES]), NOW_MS, LENGTH)
        assert found.rows_BL[:, -1].tolist() == [3, 3]


def test_damage_is_told(caplog: pytest.LogCaptureFixture) -> None:
    whole = stored([HistoryEntry(item_id="ccc", feedback_class="view", time_ms=NOW_MS)])
    with caplog.at_level(logging.ERROR):
        found = read([whole + b"\x7a\x7f", whole], index_of(ITEMS), index_of([*CLASSES]), NOW_MS, LENGTH)
    assert found.rows_BL[:, -1].tolist() == [3, 3]
    assert "1 histories hold entries that cannot be parsed" in caplog.text
