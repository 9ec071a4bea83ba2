"""ItemRows and PackedIds: the items of rows, beside a dictionary, whoever gets a row and however often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.item_rows import FULL, ItemRows, find
from recsys.packed_ids import PackedIds

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from(["x" * 200, "\0", "a\0", "ü"])
some_ids = st.sampled_from(["a", "b", "bb", "ccc", "ünïcödé", "x" * 200, "x" * 199, "\0", "a\0"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.lists(some_ids, max_size=6)),
        st.tuples(st.just("remove"), st.sets(st.integers(1, 9))),
        st.tuples(st.just("truncate"), st.integers(1, 9)),
        st.tuples(st.just("assign"), st.dictionaries(st.integers(1, 9), some_ids | st.just(""))),
        st.tuples(st.just("extend"), st.lists(some_ids | st.just(""), max_size=4)),
    ),
    max_size=20,
)


class Model:
    """What ItemRows promises, as a list."""

    def __init__(self) -> None:
        self.ids = [""]

    def allocate(self, ids: Sequence[str]) -> list[tuple[str, int]]:
        new = []
        for item_id in dict.fromkeys(ids):
            if item_id not in self.ids:
                free = [row for row, held in enumerate(self.ids) if row and not held]
                row = free[0] if free else len(self.ids)
                self.ids[row : row + 1] = [item_id]
                new.append((item_id, row))
        return new

    def assign(self, rows: Sequence[int], ids: Sequence[str]) -> list[int]:
        new = [row for row in rows if row >= len(self.ids)]
        after = [*self.ids, *[""] * len(new)]
        if new != list(range(len(self.ids), len(after))):
            raise ValueError("do not continue")
        for row, item_id in zip(rows, ids, strict=True):
            after[row] = item_id
        named = [item_id for item_id in after if item_id]
        if len(set(named)) < len(named):
            raise ValueError("already has a row")
        changed = [row for row in rows if row in new or after[row] != self.ids[row]]
        self.ids = after
        return changed


@settings(deadline=None)
@given(steps)
def test_rows_are_those_of_a_list_whatever_happens(made: list[tuple[str, object]]) -> None:
    rows, model = ItemRows(), Model()
    for name, given_ in made:
        held = [row for row, item_id in enumerate(model.ids) if item_id]
        if name == "allocate":
            assert rows.allocate(iter(given_)) == model.allocate(given_)  # type: ignore[call-overload, arg-type]
        elif name == "remove":
            gone = sorted(set(held) & given_)  # type: ignore[operator]
            rows.remove(np.array(gone, np.int64))
            model.ids = ["" if row in gone else item_id for row, item_id in enumerate(model.ids)]
        elif name == "truncate":
            rows.truncate(given_)  # type: ignore[arg-type]
            del model.ids[given_:]  # type: ignore[misc]
        else:
            named = dict(enumerate(given_, len(model.ids))) if name == "extend" else dict(sorted(given_.items()))  # type: ignore[call-overload, attr-defined]
            revision = rows.revision
            try:
                expected = model.assign(list(named), list(named.values()))
            except ValueError as error:
                with pytest.raises(ValueError, match=str(error)):
                    rows.assign(list(named), list(named.values()))
                assert rows.revision == revision
            else:
                assert rows.assign(list(named), list(named.values())).tolist() == expected
        _same(rows, model.ids)


def _same(rows: ItemRows, ids: list[str]) -> None:
    assert rows.item_ids == ids
    assert (rows.end, len(rows)) == (len(ids), sum(map(bool, ids)))
    assert rows.free_rows.tolist() == [row for row, item_id in enumerate(ids) if row and not item_id]
    known = {item_id: row for row, item_id in enumerate(ids) if item_id}
    wanted = ["a", "b", "bb", "ccc", "ünïcödé", "x" * 200, "x" * 199, "\0", "a\0", "", "nobody's"]
    expected = [known.get(item_id, 0) for item_id in wanted]
    assert rows.look_up(wanted).tolist() == [rows.row(item_id) for item_id in wanted] == expected
    # Anywhere in other bytes.
    texts = [item_id.encode() for item_id in wanted]
    inside = [int(find(rows.index, np.frombuffer(b"." + each + b".", np.uint8), 1, len(each))) for each in texts]
    assert inside == expected


def test_an_item_may_go_to_the_row_that_another_leaves() -> None:
    rows = ItemRows()
    rows.extend(["a", "b", "c"])
    assert rows.assign([1, 2, 3], ["b", "c", "a"]).tolist() == [1, 2, 3]
    _same(rows, ["", "b", "c", "a"])
    assert rows.assign([1, 2, 4], ["", "c", "b"]).tolist() == [1, 4]
    _same(rows, ["", "", "c", "a", "b"])


def test_what_many_rows_leave_behind_is_let_go_of() -> None:
    rows, every = ItemRows(), np.arange(1, 1001)
    rows.extend([f"0 {n}" for n in range(1000)])
    sizes = set()
    for turn in range(1, 30):
        rows.assign(every, [f"{turn} {n}" for n in range(1000)])
        sizes.add(sum(array.nbytes for array in rows.index))
        assert np.count_nonzero(rows.index.slot_S) <= FULL * len(rows.index.slot_S)
    assert max(sizes) < 100_000
    assert rows.look_up(["29 7", "28 7", "0 7"]).tolist() == [8, 0, 0]
    rows.clear()
    _same(rows, [""])
    assert sum(array.nbytes for array in rows.index) < 10_000


def test_ids_that_were_taken_stay_what_they_are() -> None:
    rows = ItemRows()
    rows.extend(["a", "b", "c"])
    taken = rows.item_ids.take(np.array([2, 0, 3]))
    rows.assign([2, 3], ["x", "y"])
    rows.extend([f"many {n}" * 20 for n in range(500)])
    assert taken == ["b", "", "c"]


@settings(deadline=None)
@given(st.lists(texts), st.slices(9), st.lists(st.integers(0, 8)))
def test_packed_ids_are_a_list_of_strings(ids: list[str], part: slice, places: list[int]) -> None:
    packed = PackedIds.of(ids)
    assert packed == ids
    assert list(packed) == [packed[place] for place in range(len(packed))] == ids
    assert packed[part] == ids[part]
    assert PackedIds.of(packed[part]) is not packed
    assert packed[part].text().tobytes() == "".join(ids[part]).encode()
    inside = [place for place in places if place < len(ids)]
    assert packed.take(np.array(inside, np.int64)) == [ids[place] for place in inside]
    assert packed != [*ids, "more"]
    assert not ids or packed != ["other", *ids[1:]]
