"""The item table: rows grow and stay, and counting agrees with its formulas at every prefix."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys.item_table import (
    CHOSEN_PRIOR,
    MINIMUM_CAPACITY,
    NEXT_POWER,
    TRANSITION_BACK,
    TRANSITION_DECAY,
    TRANSITION_REACH,
    VECTOR_SCALE,
    ItemTable,
    Transitions,
)
from recsys.standing import AGE_SCALE, STANDINGS, TOTAL_SCALE, TREND_DECAYS, TREND_FLOOR

ITEMS = 7
USERS = 3
FLOOR = 0.01
# (user, item, positive) in order; what is positive enters the user's history.
choices = st.lists(
    st.tuples(st.integers(0, USERS - 1), st.integers(1, ITEMS), st.integers(0, 3).map(bool)), min_size=1, max_size=40
)
sizes = st.integers(1, 12)


def _table(items: int = ITEMS, successors: int = 16, dimension: int = 4, seed: int = 1) -> ItemTable:
    table = ItemTable(dimension, successors, seed=seed)
    table.allocate(f"item-{i}" for i in range(1, items + 1))
    return table


def _padded(histories: Sequence[Sequence[int]], reach: int = TRANSITION_REACH) -> torch.Tensor:
    """Histories latest first, as the table takes them."""
    return torch.tensor([[*h[:reach], *[0] * (reach - len(h[:reach]))] for h in histories], dtype=torch.int64)


def _count(
    table: ItemTable, histories: Sequence[Sequence[int]], items: Sequence[int], positive: Sequence[bool] = ()
) -> list[int]:
    """Count a batch, all of it positive unless said otherwise; what is positive is of class 1."""
    positive_B = torch.tensor(positive or [True] * len(items))
    return table.count(_padded(histories), torch.tensor(items), positive_B, positive_B.long()).tolist()


def _successors(table: ItemTable, row: int) -> dict[int, float]:
    rows, weights = table.columns["successor"][row].tolist(), table.columns["successor_weight"][row].tolist()
    found = [(other, weight) for other, weight in zip(rows, weights, strict=True) if other]
    assert len(dict(found)) == len(found), "an item has two slots"
    return dict(found)


Feedback = tuple[list[int], int, bool]


def _batches(made: Sequence[tuple[int, int, bool]], size: int) -> Iterator[list[Feedback]]:
    """Give each choice with its user's history at the time, latest first, in batches."""
    histories: list[list[int]] = [[] for _ in range(USERS)]
    feedback = []
    for user, item, positive in made:
        feedback.append((list(histories[user]), item, positive))
        if positive:
            histories[user].insert(0, item)
    for start in range(0, len(feedback), size):
        yield feedback[start : start + size]


def _count_batch(table: ItemTable, batch: Sequence[Feedback]) -> list[int]:
    histories, items, positive = zip(*batch, strict=True)
    return _count(table, histories, items, positive)


class _Memory:
    """What followed what, in a dictionary: C[a, b] sums 1/sqrt(distance), fading whenever something follows a."""

    def __init__(self) -> None:
        self.pairs: defaultdict[tuple[int, int], float] = defaultdict(float)

    def add(self, batch: Sequence[Feedback]) -> None:
        """Add a batch: all that was known fades first."""
        found = [
            (before, item, 1 / math.sqrt(distance))
            for history, item, positive in batch
            for distance, before in enumerate(history[:TRANSITION_REACH], 1)
            if positive and before != item
        ]
        for before, _, _ in found:
            for pair in self.pairs:
                self.pairs[pair] *= TRANSITION_DECAY if pair[0] == before else 1.0
        for before, item, weight in found:
            self.pairs[before, item] += weight
            self.pairs[item, before] += TRANSITION_BACK * weight

    def score(self, history: Sequence[int], item: int, power: float) -> float:
        """Sum what followed each of the history, latest first, over its distance to a power."""
        near = enumerate(history[:TRANSITION_REACH], 1)
        return sum(self.pairs.get((before, item), 0.0) / k**power for k, before in near)


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


# Standing


def test_standing_by_hand() -> None:
    table = _table(3)
    for item, positive in ((1, True), (2, False), (1, False)):
        _count(table, [[]], [item], [positive])
    assert table.clock == 3
    found = table.standing().numpy()
    assert found.shape == (4, STANDINGS) == (4, 8)
    for s, d in enumerate(TREND_DECAYS):
        positive_counts, counts = np.array([0, d**2, 0, 0]), np.array([0, d**2 + 1, d, 0])
        for column, expected in ((s, positive_counts), (len(TREND_DECAYS) + s, counts)):
            logs = np.log(expected + TREND_FLOOR)
            np.testing.assert_allclose(found[:, column], logs - logs[1], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[:, -2], [0, TOTAL_SCALE * math.log(2), 0, 0], rtol=1e-6)
    # Item 1 is two feedback old, item 2 one; what had none counts as being as old as can be.
    ages = [0, AGE_SCALE * math.log(3 / 4), AGE_SCALE * math.log(2 / 4), 0]
    np.testing.assert_allclose(found[:, -1], ages, rtol=1e-6, atol=1e-7)
    assert found[:, : 2 * len(TREND_DECAYS)].max() == 0.0


def test_standing_in_an_empty_table_is_zero() -> None:
    assert ItemTable(4, 2).standing().tolist() == [[0.0] * STANDINGS]


@hypothesis_settings(max_examples=40, deadline=None)
@given(choices, sizes)
def test_standing_is_its_closed_form_at_every_prefix(made: list[tuple[int, int, bool]], size: int) -> None:
    table = _table()
    done: list[Feedback] = []
    first = [0] * table.rows
    for batch in _batches(made, size):
        _count_batch(table, batch)
        done += batch
        for _, item, _ in batch:
            first[item] = first[item] or len(done)
        assert table.clock == len(done)
        counts = np.array(
            [
                [
                    sum(
                        d ** (len(done) - 1 - t) for t, (_, i, yes) in enumerate(done) if i == row and (yes or not only)
                    )
                    for only in (True, False)
                    for d in TREND_DECAYS
                ]
                for row in range(table.rows)
            ]
        )
        totals = [sum(yes for _, item, yes in done if item == row) for row in range(table.rows)]
        logs = np.log(counts + TREND_FLOOR)
        found = table.standing().numpy()
        np.testing.assert_allclose(found[:, :-2], logs - logs.max(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[:, -2], TOTAL_SCALE * np.log1p(totals), rtol=1e-5)
        ages = np.log1p(len(done) - np.array(first)) - math.log1p(len(done))
        np.testing.assert_allclose(found[:, -1], AGE_SCALE * ages, rtol=1e-5, atol=1e-6)
        assert table.column("total").tolist() == totals
        others = [sum(not yes for _, item, yes in done if item == row) for row in range(table.rows)]
        assert table.column("classes").tolist() == [list(pair) for pair in zip(others, totals, strict=True)]
        assert table.column("first").tolist() == first


# Transitions


@hypothesis_settings(max_examples=40, deadline=None)
@given(choices, sizes)
def test_transitions_are_fading_cooccurrence_at_every_prefix(made: list[tuple[int, int, bool]], size: int) -> None:
    table, memory = _table(), _Memory()
    for batch in _batches(made, size):
        histories = [history for history, _, _ in batch]
        transitions = table.transitions(_padded(histories))
        share_I = CHOSEN_PRIOR / (CHOSEN_PRIOR + table.column("total").numpy())
        looks = (0.5, 1.0), (0.5 + NEXT_POWER, 1.0), (0.5, share_I)
        for found, (power, times) in zip(transitions.lifts(table.rows, FLOOR), looks, strict=True):
            expected = times * np.array([[memory.score(h, row, power) for row in range(table.rows)] for h in histories])
            np.testing.assert_allclose(found, np.log1p(expected / FLOOR), atol=1e-4)
        _count_batch(table, batch)
        memory.add(batch)
        for row in range(1, table.rows):
            expected_row = {b: w for (a, b), w in memory.pairs.items() if a == row}
            assert _successors(table, row) == pytest.approx(expected_row, rel=1e-5)


@hypothesis_settings(max_examples=40, deadline=None)
@given(choices, sizes)
def test_a_batch_touches_what_its_feedback_touches_one_by_one(made: list[tuple[int, int, bool]], size: int) -> None:
    batched, single = _table(), _table()
    for batch in _batches(made, size):
        touched = _count_batch(batched, batch)
        one_by_one: set[int] = set()
        for one in batch:
            one_by_one.update(_count_batch(single, [one]))
        assert touched == sorted(one_by_one)
        assert batched.clock == single.clock
        assert torch.equal(batched.columns["total"], single.columns["total"])
        for row in range(1, batched.rows):
            assert _successors(batched, row).keys() == _successors(single, row).keys()
        # All but the age, which begins with the batch's end.
        np.testing.assert_allclose(batched.standing()[:, :-1], single.standing()[:, :-1], rtol=1e-5, atol=1e-6)


def test_count_tells_exactly_the_rows_that_it_touched() -> None:
    table = _table()
    before = {name: column.clone() for name, column in table.columns.items()}
    touched = _count(table, [[5, 3], [3], [], [4]], [2, 2, 7, 6], [True, True, True, False])
    assert touched == [2, 3, 5, 6, 7]
    changed = torch.zeros(len(before["total"]), dtype=torch.bool)
    for name, column in before.items():
        changed |= (table.columns[name] != column).reshape(len(column), -1).any(1)
    assert changed.nonzero().flatten().tolist() == touched


def test_what_is_not_positive_follows_nothing_and_fades_nothing() -> None:
    table = _table()
    _count(table, [[1]], [2])
    before = {name: table.columns[name].clone() for name in ("successor", "successor_weight", "total")}
    assert _count(table, [[1], [1, 2]], [2, 3], [False, False]) == [2, 3]
    for name, column in before.items():
        assert torch.equal(table.columns[name], column), name


def test_reach_and_weights_by_hand() -> None:
    table = _table(30, successors=TRANSITION_REACH + 1)
    history = list(range(1, 26))
    _count(table, [history], [30])
    for row in range(1, 30):
        expected = {30: pytest.approx(1 / math.sqrt(row), rel=1e-6)} if row <= TRANSITION_REACH else {}
        assert _successors(table, row) == expected
    assert _successors(table, 30) == {
        row: pytest.approx(TRANSITION_BACK / math.sqrt(row), rel=1e-6) for row in range(1, TRANSITION_REACH + 1)
    }


def test_all_looks_by_hand() -> None:
    table = _table()
    _count(table, [[1], [2]], [3, 3])
    found = table.transitions(_padded([[1, 7, 2]]))
    weight, following, rare = (lift[0].exp() - 1 for lift in found.lifts(table.rows, 1.0))
    assert weight.tolist() == pytest.approx([0, 0, 0, 1 + 1 / math.sqrt(3), 0, 0, 0, 0], abs=1e-6)
    assert following.tolist() == pytest.approx([0, 0, 0, 1 + 3**-2.5, 0, 0, 0, 0], abs=1e-6)
    # Chosen twice.
    chosen = CHOSEN_PRIOR / (CHOSEN_PRIOR + 2)
    assert rare.tolist() == pytest.approx([0, 0, 0, chosen * (1 + 1 / math.sqrt(3)), 0, 0, 0, 0], abs=1e-6)


def test_of_what_follows_as_often_the_rarer_has_the_larger_third_look() -> None:
    table = _table()
    _count(table, [[1], [1], [], [], []], [3, 2, 2, 2, 2])
    weight, following, rare = (lift[0] for lift in table.transitions(_padded([[1]])).lifts(table.rows, 1.0))
    # Of the two the second was counted in the same batch, with the same nearness.
    assert weight[2] == weight[3]
    assert following[2] == following[3]
    assert rare[2] < rare[3] < weight[3]


def test_an_item_does_not_follow_itself() -> None:
    table = _table()
    _count(table, [[1, 2, 1]], [1])
    assert _successors(table, 1) == {2: pytest.approx(TRANSITION_BACK / math.sqrt(2), rel=1e-6)}
    assert _successors(table, 2) == {1: pytest.approx(1 / math.sqrt(2), rel=1e-6)}


# Making room


def test_the_weakest_successor_makes_room() -> None:
    table = _table(successors=2)
    for item in (2, 3, 3):
        _count(table, [[1]], [item])
    f = TRANSITION_DECAY
    assert _successors(table, 1) == pytest.approx({2: f**2, 3: f + 1}, rel=1e-6)
    # What is lighter than all that is in stays out.
    _count(table, [[7, 1]], [4])
    assert _successors(table, 1) == pytest.approx({2: f**3, 3: f * (f + 1)}, rel=1e-6)
    _count(table, [[1]], [5])
    assert _successors(table, 1) == pytest.approx({3: f**2 * (f + 1), 5: 1}, rel=1e-6)
    # What had to go starts anew.
    _count(table, [[1]], [2])
    assert _successors(table, 1) == pytest.approx({3: f**3 * (f + 1), 2: 1}, rel=1e-6)


def test_what_is_lighter_gets_in_once_what_is_in_has_faded() -> None:
    table = _table(successors=2)
    for item in (2, 3, 3, 3):
        _count(table, [[1]], [item])
    tries = 0
    while 4 not in _successors(table, 1):
        _count(table, [[7, 1]], [4])
        tries += 1
    # After so many further uses the weakest is no heavier than 1 / sqrt(2).
    assert TRANSITION_DECAY ** (3 + tries) <= 1 / math.sqrt(2) < TRANSITION_DECAY ** (2 + tries)


def test_new_successors_of_one_batch_take_the_weakest_slots_in_turn() -> None:
    table = _table(successors=3)
    _count(table, [[1]] * 6, [2, 2, 2, 3, 4, 4])
    assert _successors(table, 1) == {2: 3.0, 3: 1.0, 4: 2.0}
    # 5 takes the place of 3, 6 that of 4, 7 finds none; 2 fades six times, grows and stays.
    _count(table, [[1]] * 6, [7, 6, 6, 5, 5, 2])
    assert _successors(table, 1) == pytest.approx({2: 3 * TRANSITION_DECAY**6 + 1, 5: 2.0, 6: 2.0}, rel=1e-6)
    # 8 takes the place of 6, faded to less; 9 would have to take the place of something heavier.
    _count(table, [[1]] * 3, [9, 8, 8])
    assert _successors(table, 1).keys() == {2, 5, 8}
    # More than there are slots: the first rows get in.
    other = _table(successors=2)
    _count(other, [[1]] * 4, [5, 4, 3, 2])
    assert _successors(other, 1) == {2: 1.0, 3: 1.0}


def _by_the_rule(held: list[tuple[int, float]], added: dict[int, float]) -> list[tuple[int, float]]:
    """Return an item's slots after one feedback: the known grow, new ones take the weakest where no lighter than it."""
    slots = [(row, weight + added.get(row, 0.0)) if row else (row, weight) for row, weight in held]
    weakest = sorted(range(len(slots)), key=lambda s: slots[s][1])
    new = sorted(added.keys() - {row for row, _ in held}, key=lambda row: (-added[row], row))
    for slot, row in zip(weakest, new, strict=False):
        if np.float32(added[row]) >= np.float32(slots[slot][1]):
            slots[slot] = (row, added[row])
    return slots


@hypothesis_settings(max_examples=40, deadline=None)
@given(choices, st.integers(1, 3))
def test_few_slots_follow_their_rule_at_every_prefix(made: list[tuple[int, int, bool]], slots: int) -> None:
    table = _table(successors=slots)
    expected = {row: [(0, 0.0)] * slots for row in range(1, table.rows)}
    for batch in _batches(made, 1):
        ((history, item, positive),) = batch
        added: defaultdict[int, defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
        for distance, before in enumerate(history[:TRANSITION_REACH], 1):
            if positive and before != item:
                expected[before] = [(row, weight * TRANSITION_DECAY) for row, weight in expected[before]]
                added[before][item] += 1 / math.sqrt(distance)
                added[item][before] += TRANSITION_BACK / math.sqrt(distance)
        for row, weights in added.items():
            expected[row] = _by_the_rule(expected[row], weights)
        _count_batch(table, batch)
        for row, pairs in expected.items():
            assert table.columns["successor"][row].tolist() == [other for other, _ in pairs]
            weights_found = table.columns["successor_weight"][row].tolist()
            assert weights_found == pytest.approx([weight for _, weight in pairs], rel=1e-5)


# Lifts

weights = st.floats(0, 10, width=32)


slots = st.tuples(st.integers(0, 5), weights, weights, weights)


@given(st.lists(st.lists(slots, min_size=4, max_size=4), min_size=1, max_size=3), st.floats(1e-3, 10))
def test_lifts_are_the_dense_sums_on_a_log_scale(
    lines: list[list[tuple[int, float, float, float]]], floor: float
) -> None:
    # Row 0 is where empty slots point to, always with nothing.
    rows = torch.tensor([[row for row, *_ in line] for line in lines])
    made = [torch.tensor([[pair[look] if pair[0] else 0.0 for pair in line] for line in lines]) for look in (1, 2, 3)]
    found = Transitions(rows[:, :1], rows, *made).lifts(6, floor)
    for lift, given_weights in zip(found, made, strict=True):
        expected = np.zeros((len(lines), 6))
        for b, line in enumerate(lines):
            for place, (row, *_) in enumerate(line):
                expected[b, row] += float(given_weights[b, place])
        np.testing.assert_allclose(lift, np.log1p(expected / floor), rtol=1e-5, atol=1e-6)


def test_without_history_nothing_follows() -> None:
    table = _table()
    _count(table, [[1]], [2])
    transitions = table.transitions(_padded([[], [1]]))
    for lift in transitions.lifts(table.rows, FLOOR):
        assert not lift[0].any()
        assert lift[1].nonzero().tolist() == [[2]]


@pytest.mark.parametrize("successors", [2, 5, 64])
def test_the_loop_counts_what_follows_as_tensors_do(successors: int) -> None:
    """Every batch, with more new successors than slots, items that repeat, ties and empty histories among them."""
    tables = [ItemTable(4, successors) for _ in range(2)]
    draw = torch.Generator().manual_seed(successors)
    for _ in range(30):
        histories = torch.randint(0, 31, (40, 6), generator=draw) * (torch.rand(40, 1, generator=draw) < 0.9)
        items = torch.randint(1, 31, (40,), generator=draw)
        positive = torch.rand(40, generator=draw) < 0.7
        given = histories[positive], items[positive]
        nearness = torch.rsqrt(torch.arange(1.0, 7.0))
        touched = [tables[0]._count_transitions(*given), tables[1]._follow_in_tensors(*given, nearness)]
        assert touched[0].tolist() == touched[1].tolist()
        assert torch.equal(*(t.columns["successor"] for t in tables))
        torch.testing.assert_close(*(t.columns["successor_weight"] for t in tables))
