"""The item table: rows grow and stay, and counting agrees with its formulas at every prefix."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys.item_table import (
    MINIMUM_CAPACITY,
    TRANSITION_PRIOR,
    TRANSITION_REACH,
    TREND_DECAYS,
    TREND_FLOOR,
    VECTOR_SCALE,
    ItemTable,
    Transitions,
)

ITEMS = 7
# (user, item) in the order of choice.
choices = st.lists(st.tuples(st.integers(0, 2), st.integers(1, ITEMS)), min_size=1, max_size=40)


def _table(items: int = ITEMS, successors: int = 16, dimension: int = 4, seed: int = 1) -> ItemTable:
    table = ItemTable(dimension, successors, seed=seed)
    table.allocate(f"item-{i}" for i in range(1, items + 1))
    return table


def _padded(histories: Sequence[Sequence[int]], reach: int = TRANSITION_REACH) -> torch.Tensor:
    """Histories latest first, as the table takes them."""
    return torch.tensor([[*h[:reach], *[0] * (reach - len(h[:reach]))] for h in histories], dtype=torch.int64)


def _count(table: ItemTable, histories: Sequence[Sequence[int]], items: Sequence[int]) -> list[int]:
    return table.count(_padded(histories), torch.tensor(items)).tolist()


def _successors(table: ItemTable, row: int) -> dict[int, float]:
    rows, weights = table.columns["successor"][row].tolist(), table.columns["successor_weight"][row].tolist()
    found = [(other, weight) for other, weight in zip(rows, weights, strict=True) if other]
    assert len(dict(found)) == len(found), "an item has two slots"
    return dict(found)


class _Cooccurrence:
    """Sequential co-occurrence in dictionaries: C[a, b] sums 1/distance, n counts choices."""

    def __init__(self) -> None:
        self.pairs: defaultdict[tuple[int, int], float] = defaultdict(float)
        self.chosen: Counter[int] = Counter()

    def add(self, history: Sequence[int], item: int) -> None:
        for distance, before in enumerate(history[:TRANSITION_REACH], 1):
            if before != item:
                self.pairs[before, item] += 1 / distance
        self.chosen[item] += 1

    def score(self, history: Sequence[int], item: int) -> float:
        return sum(
            self.pairs[before, item]
            / k
            / math.sqrt(self.chosen[before] + TRANSITION_PRIOR)
            / (self.chosen[item] + TRANSITION_PRIOR) ** 0.25
            for k, before in enumerate(history[:TRANSITION_REACH], 1)
        )


# Rows


def test_rows_are_given_in_order_and_once() -> None:
    table = ItemTable(4, 2)
    assert (len(table), table.rows) == (0, 1)
    assert table.allocate(["b", "a", "b"]) == [("b", 1), ("a", 2)]
    assert table.allocate(["a", "c"]) == [("c", 3)]
    assert table.allocate(["a"]) == []
    assert [table.row(x) for x in ("a", "b", "c", "d", "")] == [2, 1, 3, 0, 0]
    assert table.item_ids == ["", "b", "a", "c"]
    assert (len(table), table.rows) == (3, 4)
    assert table.column("vector").shape == (4, 4)


def test_growth_past_capacity_keeps_content() -> None:
    table = _table(MINIMUM_CAPACITY - 1)
    assert table.columns["total"].shape[0] == MINIMUM_CAPACITY == table.rows
    _count(table, [[1, 2], [MINIMUM_CAPACITY - 1]], [3, MINIMUM_CAPACITY - 2])
    table.columns["mine"] = torch.arange(MINIMUM_CAPACITY)
    before = {name: column.clone() for name, column in table.columns.items()}
    table.allocate(["one more"])
    assert table.columns["total"].shape[0] == 2 * MINIMUM_CAPACITY
    for name, column in before.items():
        assert torch.equal(table.columns[name][:MINIMUM_CAPACITY], column), name
        assert table.columns[name].dtype == column.dtype
        if name != "vector":
            assert not table.columns[name][MINIMUM_CAPACITY:].any(), name
    assert table.column("vector")[-1].any()
    table.allocate(f"many-{i}" for i in range(5 * MINIMUM_CAPACITY))
    assert table.columns["total"].shape[0] == table.rows == 6 * MINIMUM_CAPACITY + 1
    assert torch.equal(table.columns["mine"][:MINIMUM_CAPACITY], before["mine"])


def test_initial_vectors_depend_on_seed_and_row_alone() -> None:
    together = _table(50)
    apart = ItemTable(4, 3, seed=1)
    for start in (0, 1, 3, 30):
        end = {0: 1, 1: 3, 3: 30, 30: 50}[start]
        apart.allocate(f"other-{i}" for i in range(start, end))
    assert torch.equal(together.column("vector"), apart.column("vector"))
    assert not together.column("vector")[0].any()
    assert len(torch.unique(together.column("vector")[1:], dim=0)) == 50
    others = _table(50, seed=2).column("vector")[1:]
    assert not (others == together.column("vector")[1:]).any()


def test_initial_vectors_are_small_and_centred() -> None:
    values = _table(1000, dimension=16).column("vector")[1:].double()
    # 16,000 normal numbers: the mean is within 5 standard errors, the deviation within 3 %.
    assert abs(float(values.mean())) < 5 * VECTOR_SCALE / math.sqrt(16_000)
    assert float(values.std()) == pytest.approx(VECTOR_SCALE, rel=0.03)


# Writing


def test_write_puts_rows_and_items_in_place() -> None:
    table = _table(2)
    table.write(
        torch.tensor([1, 3]),
        {"total": torch.tensor([5.0, 7.0]), "successor": torch.tensor([[9] * 16, [8] * 16], dtype=torch.int32)},
        [("new", 3)],
    )
    assert table.row("new") == 3
    assert table.item_ids[3] == "new"
    assert table.column("total").tolist() == [0, 5, 0, 7]
    assert table.column("successor")[:, 0].tolist() == [0, 9, 0, 8]


def test_write_grows_the_table() -> None:
    table = _table(2)
    new = [(f"n-{row}", row) for row in range(3, 3000)]
    table.write(torch.tensor([2999]), {"total": torch.tensor([4.0])}, new)
    assert table.rows == 3000
    assert table.column("total").nonzero().tolist() == [[2999]]


@pytest.mark.parametrize(
    ("rows", "new_items", "problem"),
    [
        ([1], [("new", 4)], "do not continue 3 rows"),
        ([1], [("new", 2)], "do not continue 3 rows"),
        ([1], [("new", 3), ("newer", 5)], "do not continue"),
        ([1], [("newer", 4), ("new", 3)], "do not continue"),
        ([1], [("item-1", 3)], "already has a row"),
        ([1], [("new", 3), ("new", 4)], "already has a row"),
        ([3], [], "row 3 is not in use"),
        ([1, 4], [("new", 3)], "row 4 is not in use"),
    ],
)
def test_write_refuses_what_does_not_fit_and_changes_nothing(
    rows: list[int], new_items: list[tuple[str, int]], problem: str
) -> None:
    table = _table(2)
    before = {name: column.clone() for name, column in table.columns.items()}
    with pytest.raises(ValueError, match=problem):
        table.write(torch.tensor(rows), {"total": torch.full((len(rows),), 9.0)}, new_items)
    assert table.rows == 3
    assert [table.row(x) for x in ("item-1", "item-2", "new", "newer")] == [1, 2, 0, 0]
    assert all(torch.equal(table.columns[name], column) for name, column in before.items())


# Trend


def test_log_trend_by_hand() -> None:
    table = _table(3)
    for item in (1, 2, 1):
        _count(table, [[]], [item])
    assert table.clock == 3
    for s, d in enumerate(TREND_DECAYS):
        first, second = d**2 + 1, d
        expected = np.log(np.array([TREND_FLOOR, first + TREND_FLOOR, second + TREND_FLOOR, TREND_FLOOR]))
        found = table.log_trend()[:, s].numpy()
        np.testing.assert_allclose(found, expected - expected[1], rtol=1e-6, atol=1e-7)
    assert float(table.log_trend().max()) == 0.0


def test_log_trend_of_an_empty_table_is_zero() -> None:
    assert ItemTable(4, 2).log_trend().tolist() == [[0.0] * len(TREND_DECAYS)]


@hypothesis_settings(max_examples=40, deadline=None)
@given(choices, st.integers(1, 7))
def test_trend_is_its_closed_form_at_every_prefix(made: list[tuple[int, int]], size: int) -> None:
    items = [item for _, item in made]
    table = _table()
    for start in range(0, len(items), size):
        _count(table, [[]] * len(items[start : start + size]), items[start : start + size])
        done = items[: start + size]
        assert table.clock == len(done)
        counts = [
            [sum(d ** (len(done) - 1 - t) for t, item in enumerate(done) if item == row) for d in TREND_DECAYS]
            for row in range(table.rows)
        ]
        expected = np.log(np.array(counts) + TREND_FLOOR)
        np.testing.assert_allclose(table.log_trend().numpy(), expected - expected.max(0), rtol=1e-5, atol=1e-6)
        assert table.column("total").tolist() == [done.count(row) for row in range(table.rows)]


# Transitions


@hypothesis_settings(max_examples=40, deadline=None)
@given(choices)
def test_transitions_are_sequential_cooccurrence_at_every_prefix(made: list[tuple[int, int]]) -> None:
    table, reference = _table(), _Cooccurrence()
    histories: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for user, item in made:
        batch = [histories[u] for u in histories]
        transitions = table.transitions(_padded(batch))
        expected = [[reference.score(h, row) for row in range(table.rows)] for h in batch]
        np.testing.assert_allclose(transitions.lift(table.rows, 0.01), np.log1p(np.array(expected) / 0.01), atol=1e-4)
        _count(table, [histories[user]], [item])
        reference.add(histories[user], item)
        histories[user].insert(0, item)
    for row in range(1, table.rows):
        expected_row = {b: w for (a, b), w in reference.pairs.items() if a == row and w}
        assert _successors(table, row) == pytest.approx(expected_row, rel=1e-5)


@hypothesis_settings(max_examples=40, deadline=None)
@given(choices, st.integers(2, 12))
def test_a_batch_counts_like_its_events_one_by_one(made: list[tuple[int, int]], size: int) -> None:
    batched, single = _table(), _table()
    histories: dict[int, list[int]] = {0: [], 1: [], 2: []}
    events = []
    for user, item in made:
        events.append((list(histories[user]), item))
        histories[user].insert(0, item)
    for start in range(0, len(events), size):
        part = events[start : start + size]
        touched = _count(batched, [h for h, _ in part], [i for _, i in part])
        one_by_one: set[int] = set()
        for history, item in part:
            one_by_one.update(_count(single, [history], [item]))
        assert touched == sorted(one_by_one)
        assert batched.clock == single.clock
        assert torch.equal(batched.columns["total"], single.columns["total"])
        for row in range(1, batched.rows):
            assert _successors(batched, row) == pytest.approx(_successors(single, row), rel=1e-5)
        np.testing.assert_allclose(batched.log_trend(), single.log_trend(), rtol=1e-5, atol=1e-6)


def test_count_tells_exactly_the_rows_that_it_touched() -> None:
    table = _table()
    before = {name: column.clone() for name, column in table.columns.items()}
    touched = _count(table, [[5, 3], [3], []], [2, 2, 7])
    assert touched == [2, 3, 5, 7]
    changed = torch.zeros(len(before["total"]), dtype=torch.bool)
    for name, column in before.items():
        changed |= (table.columns[name] != column).reshape(len(column), -1).any(1)
    assert changed.nonzero().flatten().tolist() == touched


def test_reach_and_weights_by_hand() -> None:
    table = _table(30, successors=4)
    history = list(range(1, 26))
    _count(table, [history], [30])
    followed = {row: _successors(table, row) for row in range(1, 30)}
    assert followed == {
        row: ({30: pytest.approx(1 / row, rel=1e-6)} if row <= TRANSITION_REACH else {}) for row in range(1, 30)
    }


def test_an_item_does_not_follow_itself() -> None:
    table = _table()
    _count(table, [[1, 2, 1]], [1])
    assert _successors(table, 1) == {}
    assert _successors(table, 2) == {1: 0.5}


# Making room


def test_the_weakest_successor_makes_room() -> None:
    table = _table(successors=2)
    for item in (2, 3, 3):
        _count(table, [[1]], [item])
    assert _successors(table, 1) == {2: 1.0, 3: 2.0}
    _count(table, [[7, 1]], [4])
    assert _successors(table, 1) == {3: 2.0, 4: 0.5}
    _count(table, [[1]], [5])
    assert _successors(table, 1) == {3: 2.0, 5: 1.0}
    # What had to go starts anew.
    _count(table, [[1]], [2])
    assert _successors(table, 1) == {3: 2.0, 2: 1.0}


def test_new_successors_of_one_batch_take_the_weakest_slots_in_turn() -> None:
    table = _table(successors=3)
    _count(table, [[1]] * 6, [2, 2, 2, 3, 4, 4])
    assert _successors(table, 1) == {2: 3.0, 3: 1.0, 4: 2.0}
    # 5 takes the place of 3, 6 that of 4; 2 grows and stays.
    _count(table, [[1]] * 3, [6, 5, 2])
    assert _successors(table, 1) == {2: 4.0, 5: 1.0, 6: 1.0}
    # More than there are slots: the first rows get in.
    other = _table(successors=2)
    _count(other, [[1]] * 4, [5, 4, 3, 2])
    assert _successors(other, 1) == {2: 1.0, 3: 1.0}


@hypothesis_settings(max_examples=40, deadline=None)
@given(choices, st.integers(1, 3))
def test_few_slots_follow_their_rule_at_every_prefix(made: list[tuple[int, int]], slots: int) -> None:
    table = _table(successors=slots)
    expected = {row: [(0, np.float32(0))] * slots for row in range(1, table.rows)}
    histories: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for user, item in made:
        added: defaultdict[int, np.float32] = defaultdict(lambda: np.float32(0))
        for distance, before in enumerate(histories[user][:TRANSITION_REACH], 1):
            if before != item:
                added[before] += np.float32(1) / np.float32(distance)
        for before, weight in added.items():
            held = [row for row, _ in expected[before]]
            if item in held:
                slot = held.index(item)
                expected[before][slot] = (item, expected[before][slot][1] + weight)
            else:
                weakest = min(range(slots), key=lambda s, before=before: expected[before][s][1])
                expected[before][weakest] = (item, weight)
        _count(table, [histories[user]], [item])
        histories[user].insert(0, item)
        for row, pairs in expected.items():
            found = (table.columns[name][row].tolist() for name in ("successor", "successor_weight"))
            assert list(zip(*found, strict=True)) == [(other, float(weight)) for other, weight in pairs]


# Lift


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.floats(0, 10, width=32)), min_size=4, max_size=4),
        min_size=1,
        max_size=3,
    ),
    st.floats(1e-3, 10),
)
def test_lift_is_the_dense_sum_on_a_log_scale(pairs: list[list[tuple[int, float]]], floor: float) -> None:
    # Row 0 is where empty slots point to, always with nothing.
    rows = torch.tensor([[row for row, _ in line] for line in pairs])
    weights = torch.tensor([[weight if row else 0.0 for row, weight in line] for line in pairs])
    found = Transitions(rows[:, :1], rows, weights).lift(6, floor)
    expected = np.zeros((len(pairs), 6))
    for b, line in enumerate(pairs):
        for row, weight in line:
            expected[b, row] += weight if row else 0.0
    np.testing.assert_allclose(found, np.log1p(expected / floor), rtol=1e-5, atol=1e-6)


def test_without_history_nothing_follows() -> None:
    table = _table()
    _count(table, [[1]], [2])
    transitions = table.transitions(_padded([[], [1]]))
    lift = transitions.lift(table.rows, 0.01)
    assert not lift[0].any()
    assert lift[1].nonzero().tolist() == [[2]]
