"""Rows are passed from item to item: beside a dictionary, and in all that remembers rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import redis
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning import CPU, small

from recsys.catalog import Catalog, CatalogMirror
from recsys.encoding import RowHistory
from recsys.errors import CorruptWeights
from recsys.following import forget
from recsys.item_table import ItemTable, _forget_in_tensors
from recsys.scorer import Query, Scorer
from recsys.settings import Settings
from recsys.store.v1.log_pb2 import HistoryEntry
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights import decode, encode
from recsys.weights.replica import Replica, items_of
from trainer.admission import SHARE, Admission
from trainer.examples import Event, Examples, ReplayWindow
from trainer.examples import encode as encode_events
from trainer.learner import SQUARED_GRADIENT, Learner

ids = st.lists(st.integers(0, 30).map("item-{}".format), max_size=8)
steps = st.lists(st.tuples(ids, st.sets(st.integers(0, 30)), st.integers(0, 40)), max_size=12)


def _table(items: int = 0, **columns: list[float]) -> ItemTable:
    table = ItemTable(4, 3)
    table.allocate(f"item-{i}" for i in range(1, items + 1))
    for name, values in columns.items():
        table.column(name)[1:] = torch.tensor(values)
    return table


# The table


@given(steps)
def test_rows_are_those_of_a_dictionary(made: list[tuple[list[str], set[int], int]]) -> None:
    table, model = _table(), dict[str, int]()
    copy = _table()
    rows = 1
    for new, gone, cut in made:
        expected = []
        for item_id in new:
            free = sorted({*range(1, rows)} - {*model.values()})
            if item_id not in model:
                model[item_id] = free[0] if free else rows
                rows = max(rows, model[item_id] + 1)
                expected.append((item_id, model[item_id]))
        assert table.allocate(new) == expected
        leaving = sorted(row for row in gone if row in model.values())
        table.remove(np.array(leaving, np.int64))
        model = {item_id: row for item_id, row in model.items() if row not in gone}
        if 1 <= cut < rows:
            table.truncate(cut)
            copy.truncate(min(cut, copy.rows))
            model, rows = {item_id: row for item_id, row in model.items() if row < cut}, cut
        assert {item_id: table.row(item_id) for item_id in model} == model
        assert (len(table), table.rows) == (len(model), rows)
        assert sorted(table.free_rows.tolist()) == sorted({*range(1, rows)} - {*model.values()})
        assert table.used_rows(np.arange(1, len(model) + 1)).tolist() == sorted(model.values())
        # Another table that is told of each row what it holds is the same.
        copy.assign(range(1, rows), table.item_ids[1:])
        assert copy.item_ids == table.item_ids
        assert copy.free_rows.tolist() == table.free_rows.tolist()
        assert {item_id: copy.row(item_id) for item_id in model} == model


def test_a_removed_item_leaves_nothing_behind() -> None:
    table = _table(4)
    table.columns["mine"] = torch.ones(len(table.columns["total"]))
    table.column("successor")[:] = torch.tensor([[0, 0, 0], [2, 3, 4], [1, 3, 0], [4, 1, 0], [1, 0, 0]])
    table.column("successor_weight")[:] = torch.tensor([[0, 0, 0], [2, 3, 4], [1, 3, 0], [4, 1, 0], [1, 0, 0.0]])
    changed = table.remove(np.array([2, 4]))
    assert changed.tolist() == [1, 2, 3, 4]
    assert table.column("successor").tolist() == [[0, 0, 0], [0, 3, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert table.column("successor_weight").tolist() == [[0, 0, 0], [0, 3, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert table.columns["mine"][:5].tolist() == [1, 1, 0, 1, 0]
    assert not table.column("vector")[[2, 4]].any()
    first = _table(4).column("vector")[2]
    assert table.allocate(["new"]) == [("new", 2)]
    assert torch.equal(table.column("vector")[2], first)
    assert table.remove(np.array([1])).tolist() == [1, 3]


def test_loop_and_tensors_forget_the_same() -> None:
    draw = np.random.default_rng(2)
    successor_IM = draw.integers(0, 500, (500, 6)).astype(np.int32) * (draw.random((500, 6)) < 0.3)
    weight_IM = (successor_IM * draw.random((500, 6))).astype(np.float32)
    gone_I = draw.random(500) < 0.1
    gone_I[0] = False
    loop, tensors = (successor_IM.astype(np.int32), weight_IM.copy()), (successor_IM.astype(np.int32), weight_IM.copy())
    lost_I = forget(*loop, gone_I)
    assert lost_I.tolist() == _forget_in_tensors(*map(torch.from_numpy, (*tensors, gone_I))).tolist()
    for one, other, before in zip(loop, tensors, (successor_IM, weight_IM), strict=True):
        assert one.tolist() == other.tolist() == np.where(gone_I[successor_IM], 0, before).tolist()
    assert 0 < lost_I.sum() < 250


def test_feedback_without_a_row_moves_the_clock_alone() -> None:
    one, other = _table(3), _table(3)
    history = torch.tensor([[1, 2], [2, 0], [3, 1]])
    every = torch.tensor([True, True, True])
    one.count(history, torch.tensor([2, 0, 1]), every, every.long())
    kept = torch.tensor([0, 2])
    other.count(history[kept], torch.tensor([2, 1]), every[kept], every[kept].long())
    assert (one.clock, other.clock) == (3, 2)
    assert not any(column[0].any() for column in one.columns.values())
    for name in ("successor", "successor_weight", "total", "classes"):
        assert torch.equal(one.columns[name], other.columns[name]), name


def test_of_more_successors_than_slots_the_heaviest_get_in() -> None:
    table = _table(6)
    # Item 6 follows 5, 4, ..., 1 at the distances 1, 2, ..., 5, and leads back to the nearest most.
    table.count(torch.tensor([[5, 4, 3, 2, 1]]), torch.tensor([6]), torch.tensor([True]), torch.tensor([1]))
    assert table.column("successor")[6].tolist() == [5, 4, 3]


# Versions


def _passed_on() -> tuple[Replica, bytes, bytes]:
    """Make a version, and what leads to the next, in which rows were freed, passed on, and added."""
    replica = Replica(Settings(dimension=4, successors=3, context_buckets=4), CPU)
    replica.table.allocate("abcdef")
    replica.table.column("total")[1:] = 1
    before = encode(replica.write_all())
    changed = replica.table.remove(np.array([2, 3, 5]))
    replica.table.allocate("xb")
    replica.table.allocate("yz")
    rows = torch.unique(torch.cat([changed, torch.arange(1, replica.table.rows)]))
    return replica, before, encode(replica.write(rows, items_of(replica.table)))


def test_a_replica_follows_rows_that_are_passed_on() -> None:
    replica, before, delta = _passed_on()
    assert replica.table.item_ids == ["", "a", "x", "b", "d", "y", "f", "z"]
    follower = Replica(Settings(dimension=4, successors=3, context_buckets=4), CPU)
    follower.apply(decode(before))
    follower.apply(decode(delta))
    assert encode(follower.write_all()) == encode(replica.write_all())
    assert [follower.table.row(each) for each in "abcdefxyz"] == [1, 3, 0, 4, 0, 6, 2, 5, 7]
    freed = follower.table.remove(np.array([1, 7]))
    whole = encode(follower.write_all())
    replica.apply(replace(decode(whole), whole=False, kept_rows=1))
    assert (encode(replica.write_all()), replica.table.free_rows.tolist()) == (whole, [1, 7])
    assert freed.tolist() == [1, 7]


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ([("d", 2)], "already has a row"),
        ([("x", 0)], "do not continue"),
        ([("x", 2), ("y", 8)], "do not continue"),
        ([("y", 7), ("x", 2)], "do not continue"),
    ],
)
def test_rows_that_cannot_be_passed_on_are_refused(items: list[tuple[str, int]], problem: str) -> None:
    _, before, delta = _passed_on()
    follower = Replica(Settings(dimension=4, successors=3, context_buckets=4), CPU)
    follower.apply(decode(before))
    with pytest.raises(CorruptWeights, match=problem):
        follower.apply(replace(decode(delta), new_items=items))
    untold = replace(decode(delta), rows=decode(delta).rows[3:])
    columns = {name: column[3:] for name, column in untold.columns.items()}
    with pytest.raises(CorruptWeights, match="another item"):
        follower.apply(replace(untold, columns=columns))
    assert encode(follower.write_all()) == before


def test_nothing_is_recommended_from_a_free_row(store: redis.Redis, settings: Settings) -> None:
    learner = Learner(small(settings, max_items=100), CPU)
    learner.allocate("abcdefgh")
    learner.free(np.array([2, 3, 7]))
    scorer = Scorer(learner.settings, CatalogMirror(Catalog(store, settings)), CPU)
    scorer.load(VersionRecord(version=1), learner.write_all()[0])
    (answer,) = scorer.answer([Query(history=(), count=8)], 0)
    assert sorted(item.item_id for item in answer.items) == ["a", "d", "e", "f", "h"]
    learner.take_changed()
    learner.allocate("xb")
    learner.free(np.array([1]))
    scorer.apply(VersionRecord(version=2), learner.write(learner.take_changed(), learner.table.rows)[0])
    (answer,) = scorer.answer([Query(history=(), count=8)], 0)
    assert sorted(item.item_id for item in answer.items) == ["b", "d", "e", "f", "h", "x"]
    assert scorer.status.items == 6
    history = tuple(HistoryEntry(item_id=each, feedback_class="click") for each in "abc")
    (answer,) = scorer.answer([Query(history=history, count=8)], 0)
    assert sorted(item.item_id for item in answer.items) == ["d", "e", "f", "h", "x"]


# What remembers rows


def _lines(examples: Examples) -> list[tuple[str, ...]]:
    columns = [getattr(examples, f.name).tolist() for f in fields(Examples)]
    return [tuple(map(str, line)) for line in zip(*columns, strict=True)]


@given(st.lists(st.lists(st.integers(1, 6), max_size=7), min_size=1, max_size=9), st.sets(st.integers(1, 6)))
def test_a_window_forgets_as_if_items_had_never_been_known(histories: list[list[int]], gone: set[int]) -> None:
    settings = small(Settings(), replay_capacity=7)
    window, expected = ReplayWindow(settings), ReplayWindow(settings)

    def event(number: int, rows: list[int], *, known: bool) -> Event:
        entries = [(row, number % 3, 1000 * k) for k, row in enumerate(rows[-5:]) if known or row not in gone]
        item = rows[0] if rows and (known or rows[0] not in gone) else 0
        history = RowHistory(*zip(*entries, strict=True)) if entries else RowHistory((), (), ())
        return Event(item, number % 4, 9000, history, {})

    window.add(encode_events([event(n, rows, known=True) for n, rows in enumerate(histories)], settings))
    expected.add(encode_events([event(n, rows, known=False) for n, rows in enumerate(histories)], settings))
    window.forget(np.isin(np.arange(7), list(gone)))
    draws = [each.draw(60, np.random.default_rng(1)) for each in (window, expected)]
    assert _lines(draws[0]) == _lines(draws[1])


@given(st.lists(st.lists(st.integers(0, 5).map(str), min_size=1, max_size=5), max_size=20), st.integers(1, 4))
def test_items_are_admitted_by_their_count_in_the_window(batches: list[list[str]], needed: int) -> None:
    settings = small(Settings(), item_admission=needed, replay_capacity=6)
    admission, learned = Admission(settings), list[str]()
    for batch in batches:
        expected = [
            item
            for place, item in enumerate(batch)
            if Counter(learned[-6:])[item] + Counter(batch[: place + 1])[item] >= needed
        ]
        assert admission.admitted(batch) == expected
        admission.learned(batch)
        learned += batch


def test_what_was_unused_for_longest_expires_an_eighth_at_once() -> None:
    table = _table(17, touched=[float(touched) for touched in (*range(20, 11, -1), *range(12, 20))])
    table.clock = 30
    table.remove(np.array([1]))
    assert Admission(Settings(max_items=16)).expired(table).tolist() == []
    # Two at the least, of 12, 12, 13, 13, 14, ... in rows 9, 10, 8, 11, 7.
    assert Admission(Settings(max_items=15)).expired(table).tolist() == [9, 10]
    assert Admission(Settings(max_items=12)).expired(table).tolist() == [7, 8, 9, 10, 11]
    assert Admission(Settings(item_expiry=17)).expired(table).tolist() == [9, 10]
    assert Admission(Settings(item_expiry=18)).expired(table).tolist() == []
    assert len(Admission(Settings(item_expiry=17)).expired(table)) * SHARE >= len(table)
    assert Admission(Settings()).expired(table).tolist() == []


def test_what_learns_meets_no_row_that_is_free() -> None:
    learner = Learner(small(Settings(), max_items=100, negatives=300), CPU)
    learner.allocate(map(str, range(20)))
    events = [Event(row, 1, 9000, RowHistory((row - 1,), (1,), (0,)), {}) for row in range(2, 20)]
    learner.step(encode_events(events, learner.settings))
    gone = np.array([2, 3, 4, 11])
    learner.free(gone)
    learner.take_changed()
    unknown = [Event(0, 1, 9000, RowHistory((7,), (1,), (0,)), {}), *events[11:]]
    for _ in range(3):
        report = learner.step(encode_events(unknown, learner.settings))
        assert report.learned
        assert report.rank_B[0] == 0
    assert not set(learner.take_changed().tolist()) & {0, *gone.tolist()}
    assert not any(column[[0, *gone]].any() for column in learner.table.columns.values())
    drawn = learner.window.draw(1000, np.random.default_rng(1))
    assert not np.isin(drawn.item_B, gone).any()
    assert not np.isin(drawn.rows_BL, gone).any()
    learner.allocate(["new"])
    assert learner.table.row("new") == 2
    assert learner.table.columns[SQUARED_GRADIENT][2] == 0


def test_negatives_are_drawn_from_all_items_alike() -> None:
    table = _table(10)
    table.remove(np.array([1, 4, 5, 10]))
    rows, counts = np.unique(table.used_rows(np.random.default_rng(1).integers(1, 7, 60_000)), return_counts=True)
    assert rows.tolist() == [2, 3, 6, 7, 8, 9]
    # 10,000 of each expected, standard deviation 91.
    assert np.abs(counts - 10_000).max() < 5 * 91
