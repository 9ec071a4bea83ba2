"""Encoding: exact buckets and places, and one encoding for learning and for serving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.encoding import RowHistory, encode_contexts, encode_histories, row_history, to_histories, to_tensor
from recsys.item_table import ItemTable
from recsys.network import GAP_BUCKETS
from recsys.settings import load
from recsys.store.v1.log_pb2 import HistoryEntry
from trainer.examples import Event, encode

EMPTY = RowHistory((), (), ())
CLASS_INDEX = {"impression": 0, "click": 1, "like": 2, "purchase": 3}
YEAR = 365 * 86_400
# CRC-32 of "tab=1", "a=ü", "b=2", "c=" in UTF-8, modulo 1000.
GOLDEN = [[-1, -1, -1], [358, -1, -1], [619, 58, -1], [619, 58, 34]]


def _gap(milliseconds: int) -> int:
    _, _, gaps = encode_histories([RowHistory((1,), (0,), (10**12,))], [10**12 + milliseconds], 1)
    return int(gaps[0, 0])


@pytest.mark.parametrize(
    ("milliseconds", "bucket"),
    [
        *[(-1, 0), (-(10**9), 0), (0, 0), (999, 0), (1000, 1), (1999, 1), (2000, 2), (3999, 2), (4000, 3)],
        *[(7999, 3), (8000, 4), (86_400_000, 17), (2**30 * 1000 - 1, 30), (2**30 * 1000, 31)],
        *[(35 * YEAR * 1000, 31), (2000 * YEAR * 1000, 31)],
    ],
)
def test_gap_buckets_at_their_boundaries(milliseconds: int, bucket: int) -> None:
    assert _gap(milliseconds) == bucket


@given(st.integers(-(10**6), 10**13))
def test_gap_buckets_count_bits(milliseconds: int) -> None:
    seconds, bucket = max(milliseconds, 0) // 1000, 0
    while seconds:
        seconds, bucket = seconds // 2, bucket + 1
    assert _gap(milliseconds) == min(bucket, GAP_BUCKETS - 1)


def test_histories_end_at_the_last_place() -> None:
    rows, classes, gaps = encode_histories(
        [
            RowHistory((5, 6), (0, 3), (1000, 9000)),
            EMPTY,
            RowHistory((1, 2, 3, 4, 5), (0, 1, 2, 3, 0), (0, 1000, 2000, 3000, 4000)),
        ],
        [10_000, 20_000, 5000],
        3,
    )
    assert rows.tolist() == [[0, 5, 6], [0, 0, 0], [3, 4, 5]]
    assert classes.tolist() == [[0, 1, 4], [0, 0, 0], [3, 4, 1]]
    # 9 s, 1 s; nothing; 3 s, 2 s, 1 s.
    assert gaps.tolist() == [[0, 4, 1], [0, 0, 0], [2, 2, 1]]
    assert {a.dtype for a in (rows, classes, gaps)} == {np.dtype(np.int64)}


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 9), st.integers(0, 10**6)), max_size=9), st.integers(1, 6))
def test_the_latest_entries_are_kept(entries: list[tuple[int, int, int]], length: int) -> None:
    history = RowHistory(*zip(*entries, strict=True)) if entries else EMPTY
    rows, classes, gaps = encode_histories([history], [10**6], length)
    kept = entries[-length:]
    free = [0] * (length - len(kept))
    assert rows[0].tolist() == free + [row for row, _, _ in kept]
    assert classes[0].tolist() == free + [index + 1 for _, index, _ in kept]
    assert gaps[0].tolist() == free + [((10**6 - time) // 1000).bit_length() for _, _, time in kept]


def test_no_histories() -> None:
    assert [a.shape for a in encode_histories([], [], 4)] == [(0, 4)] * 3


def test_unknown_items_and_classes_are_left_out() -> None:
    table = ItemTable(4, 2)
    table.allocate(["a", "b"])
    entries = [
        HistoryEntry(item_id="a", feedback_class="click", time_ms=1),
        HistoryEntry(item_id="unknown", feedback_class="click", time_ms=2),
        HistoryEntry(item_id="b", feedback_class="unknown", time_ms=3),
        HistoryEntry(item_id="", feedback_class="click", time_ms=4),
        HistoryEntry(item_id="b", feedback_class="impression", time_ms=5),
    ]
    assert row_history(entries, table, CLASS_INDEX) == RowHistory((1, 2), (1, 0), (1, 5))
    assert row_history(entries[1:4], table, CLASS_INDEX) == EMPTY
    assert row_history([], table, CLASS_INDEX) == EMPTY


def test_context_buckets_are_the_same_everywhere() -> None:
    settings = load({"max_context": 3, "context_buckets": 1000}, environment={})
    found = encode_contexts([{}, {"tab": "1"}, {"b": "2", "a": "ü"}, {"d": "", "c": "", "b": "2", "a": "ü"}], settings)
    assert found.tolist() == GOLDEN
    assert encode_contexts([{"a": "ü", "b": "2"}], settings).tolist() == [GOLDEN[2]]
    assert encode_contexts([{"a": "x"}], load({"max_context": 0}, environment={})).shape == (1, 0)


def _crc32(data: bytes) -> int:
    """CRC-32 bit by bit, as IEEE 802.3 has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), st.text(st.characters(codec="utf-8"))))
def test_context_buckets_hash_sorted_pairs(context: dict[str, str]) -> None:
    settings = load({"context_buckets": 77, "max_context": 4}, environment={})
    expected = [_crc32(f"{k}={context[k]}".encode()) % 77 for k in sorted(context)[:4]]
    assert encode_contexts([context], settings)[0].tolist() == expected + [-1] * (4 - len(expected))


def test_learning_and_serving_encode_the_same() -> None:
    settings = load({"history_length": 3}, environment={})
    table = ItemTable(4, 2)
    table.allocate("abcdef")
    entries = [
        HistoryEntry(item_id=item, feedback_class=name, time_ms=1000 * i)
        for i, (item, name) in enumerate(zip("xabcd", ["click", "like", "click", "purchase", "gone"], strict=True))
    ]
    history, context, now_ms = row_history(entries, table, settings.class_index), {"tab": "2"}, 60_000
    learned = encode([Event(6, 1, now_ms, history, context)], settings)
    served = to_histories(encode_histories([history], [now_ms], settings.history_length), torch.device("cpu"))
    found = learned.histories(torch.device("cpu"))
    for name in ("rows_BL", "classes_BL", "gaps_BL"):
        assert torch.equal(getattr(found, name), getattr(served, name)), name
    # a (59 s), b (58 s) and c (57 s) before now; x has no row and "gone" is no class.
    assert served.rows_BL.tolist() == [[1, 2, 3]]
    assert served.classes_BL.tolist() == [[3, 2, 4]]
    assert served.gaps_BL.tolist() == [[6, 6, 6]]
    assert learned.context_BP.tolist() == encode_contexts([context], settings).tolist()
    assert (learned.item_B.tolist(), learned.class_B.tolist()) == ([6], [1])


def test_to_tensor_takes_any_integers_and_layout() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    tensor = to_tensor(array, torch.device("cpu"))
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == array.tolist()
