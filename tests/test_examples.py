"""Examples: what replay draws is what was added, and the same whatever the window forgot."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys.encoding import RowHistory
from recsys.settings import Settings, load
from trainer.examples import Event, Examples, ReplayWindow, batches, encode, join

CAPACITY = 7
Line = tuple[Any, ...]


def _settings(**values: Any) -> Settings:
    small = {"history_length": 3, "max_context": 2, "context_buckets": 1 << 20, "replay_capacity": CAPACITY}
    return load({**small, **values}, environment={})


def _events(count: int, first: int = 0) -> list[Event]:
    """Events that all differ, in every column."""
    return [
        Event(
            row=70_000 + n,
            feedback_class=n % 4,
            time_ms=10_000 + n,
            history=RowHistory(tuple(range(n, n + n % 5)), (3,) * (n % 5), tuple(range(n % 5))),
            context={"n": str(n)} if n % 3 else {},
        )
        for n in range(first, first + count)
    ]


def _lines(examples: Examples) -> list[Line]:
    columns = [getattr(examples, f.name).tolist() for f in fields(Examples)]
    return [tuple(map(str, line)) for line in zip(*columns, strict=True)]


def _random(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_encode_by_hand() -> None:
    event = Event(9, 2, 8000, RowHistory((4, 5, 6, 7), (0, 1, 2, 3), (0, 4000, 6000, 7000)), {})
    found = encode([event], _settings())
    assert found.rows_BL.tolist() == [[5, 6, 7]]
    assert found.classes_BL.tolist() == [[2, 3, 4]]
    assert found.gaps_BL.tolist() == [[3, 2, 1]]
    assert (found.item_B.tolist(), found.class_B.tolist(), found.context_BP.tolist()) == ([9], [2], [[-1, -1]])
    assert len(found) == 1


def test_take_and_join() -> None:
    whole = encode(_events(6), _settings())
    lines = _lines(whole)
    assert len(set(lines)) == 6
    assert _lines(whole.take(np.array([4, 0, 4]))) == [lines[4], lines[0], lines[4]]
    assert _lines(whole.take(np.array([], np.int64))) == []
    parts = [whole.take(np.arange(2)), whole.take(np.array([], np.int64)), whole.take(np.arange(2, 6))]
    assert _lines(join(parts)) == lines
    assert all(getattr(join(parts), f.name).dtype == np.int64 for f in fields(Examples))


def test_histories_are_tensors() -> None:
    examples = encode(_events(5), _settings())
    histories = examples.histories(torch.device("cpu"))
    assert len(histories) == 5
    assert histories.rows_BL.tolist() == examples.rows_BL.tolist()
    assert histories.classes_BL.tolist() == examples.classes_BL.tolist()
    assert histories.gaps_BL.tolist() == examples.gaps_BL.tolist()


def test_an_empty_window_draws_nothing() -> None:
    drawn = ReplayWindow(_settings()).draw(5, _random())
    assert len(drawn) == 0
    assert drawn.rows_BL.shape == (0, 3)
    assert drawn.context_BP.shape == (0, 2)


def test_nothing_asked_nothing_drawn() -> None:
    window = ReplayWindow(_settings())
    window.add(encode(_events(3), _settings()))
    assert len(window.draw(0, _random())) == 0


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(0, 2**31))
def test_draws_are_the_last_added_and_nothing_else(sizes: list[int], seed: int) -> None:
    settings = _settings()
    window, added = ReplayWindow(settings), 0
    for size in sizes:
        window.add(encode(_events(size, added), settings))
        added += size
        kept = set(_lines(encode(_events(added)[-CAPACITY:], settings)))
        assert len(window) == len(kept) == min(added, CAPACITY)
        drawn = _lines(window.draw(200, _random(seed)))
        assert len(drawn) == 200
        # 200 draws of 7 miss one of them once in 10^12.
        assert set(drawn) == kept


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))
def test_a_rebuilt_window_draws_the_same(count: int, size: int, other_size: int, seed: int) -> None:
    settings, events = _settings(), _events(30)[:count]
    old, rebuilt = ReplayWindow(settings), ReplayWindow(settings)
    for part in batches(events, size):
        old.add(encode(part, settings))
    for part in batches(events[-CAPACITY:], other_size):
        rebuilt.add(encode(part, settings))
    assert _lines(old.draw(20, _random(seed))) == _lines(rebuilt.draw(20, _random(seed)))
    for window in (old, rebuilt):
        window.add(encode(_events(3, 100), settings))
    assert _lines(old.draw(20, _random(seed))) == _lines(rebuilt.draw(20, _random(seed)))


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**31))
def test_choices_are_drawn_that_have_something_before_them(count: int, size: int, newest: int, seed: int) -> None:
    settings, events = _settings(), _events(30)[:count]
    old, rebuilt = ReplayWindow(settings), ReplayWindow(settings)
    for part in batches(events, size):
        old.add(encode(part, settings))
    rebuilt.add(encode(events[-CAPACITY:], settings))
    drawn = _lines(old.draw_choices(200, _random(seed), newest))
    # Row 0 is nobody's: what has it alone before it has nothing.
    kept = [event for event in events[-min(newest, CAPACITY) :] if event.feedback_class and any(event.history.rows)]
    assert set(drawn) == set(_lines(encode(kept, settings)))
    assert drawn == _lines(rebuilt.draw_choices(200, _random(seed), newest))


def test_draws_are_uniform() -> None:
    settings = _settings()
    window = ReplayWindow(settings)
    for part in batches(_events(17), 5):
        window.add(encode(part, settings))
    rows, counts = np.unique(window.draw(70_000, _random()).item_B, return_counts=True)
    assert rows.tolist() == list(range(70_010, 70_017))
    # 10,000 of each expected, standard deviation 93.
    assert np.abs(counts - 10_000).max() < 5 * 93


def test_draws_depend_on_the_generator_alone() -> None:
    settings = _settings()
    window = ReplayWindow(settings)
    window.add(encode(_events(6), settings))
    first = _lines(window.draw(50, _random(1)))
    assert _lines(window.draw(50, _random(1))) == first
    assert _lines(window.draw(50, _random(2))) != first


def test_what_is_drawn_keeps_the_largest_values() -> None:
    settings = _settings(classes='[{"name":"c0","positive":true,"history":true,"worth":1}]')
    extreme = Examples(
        rows_BL=np.array([[0, 1, 2**31 - 1]]),
        classes_BL=np.array([[0, 1, 100]]),
        gaps_BL=np.array([[0, 0, 31]]),
        item_B=np.array([2**31 - 1]),
        class_B=np.array([99]),
        context_BP=np.array([[(1 << 20) - 1, -1]]),
        impression_B=np.array([-(2**63)]),
        account_B=np.array([2**31 - 1]),
    )
    window = ReplayWindow(settings)
    window.add(extreme)
    assert _lines(window.draw(1, _random())) == _lines(extreme)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [[0]]), (3, [[0, 1, 2]]), (7, [[0, 1, 2], [3, 4, 5], [6]])]
)
def test_batches(count: int, expected: list[list[int]]) -> None:
    assert list(batches(range(count), 3)) == expected


def test_batches_read_no_further_than_they_give() -> None:
    stream = iter(range(100))
    assert next(batches(stream, 3)) == [0, 1, 2]
    assert next(stream) == 3
