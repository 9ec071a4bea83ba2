"""Baselines: ranks by popularity equal counting from scratch, before every event."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trainer.baselines import LARGEST_INCREMENT, Popularity
from trainer.quality import MISS

# (user, item)
choices = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=40)


def _seen(*rows: int) -> np.ndarray:
    return np.array(rows, np.int64)


def _rank(chosen: list[int], row: int, seen: set[int], decay: Fraction) -> int:
    """Count all choices anew, exactly: each is worth `decay` times the one after it."""
    worth: dict[int, Fraction] = {}
    for age, item in enumerate(reversed(chosen)):
        worth[item] = worth.get(item, Fraction(0)) + decay**age
    if row not in worth or row in seen:
        return MISS
    order = sorted((item for item in worth if item not in seen), key=lambda item: (-worth[item], item))
    return 1 + order.index(row)


@pytest.mark.parametrize("decay", [Fraction(1), Fraction(3, 4), Fraction(1, 8)])
@hypothesis_settings(max_examples=60, deadline=None)
@given(made=choices)
def test_ranks_equal_counting_anew_at_every_prefix(decay: Fraction, made: list[tuple[int, int]]) -> None:
    popularity = Popularity(float(decay))
    rows: dict[int, int] = {}
    chosen: list[int] = []
    seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for user, item in made:
        row = rows.setdefault(item, len(rows) + 1)
        for asked in (*rows.values(), len(rows) + 1, 5000):
            for has in seen.values():
                assert popularity.rank(asked, _seen(*has)) == _rank(chosen, asked, has, decay)
        popularity.add(row)
        chosen.append(row)
        seen[user].add(row)


def test_ranks_by_hand() -> None:
    popularity = Popularity()
    assert popularity.rank(1, _seen()) == MISS
    for row in (1, 2, 3, 3, 2):
        popularity.add(row)
    # 2 and 3 were chosen twice, and 2 is older.
    assert [popularity.rank(row, _seen()) for row in (1, 2, 3, 4)] == [3, 1, 2, MISS]
    assert [popularity.rank(row, _seen(2)) for row in (1, 2, 3)] == [2, MISS, 1]
    assert [popularity.rank(row, _seen(1)) for row in (1, 2, 3)] == [MISS, 1, 2]
    assert popularity.rank(3, _seen(1, 2)) == 1


def test_decay_prefers_the_latest() -> None:
    popularity = Popularity(0.5)
    for row in (1, 1, 2):
        popularity.add(row)
    # 1/4 + 1/2 against 1.
    assert [popularity.rank(row, _seen()) for row in (1, 2)] == [2, 1]
    undecayed = Popularity()
    for row in (1, 1, 2):
        undecayed.add(row)
    assert [undecayed.rank(row, _seen()) for row in (1, 2)] == [1, 2]


def test_counts_scaled_down_keep_the_order() -> None:
    random = np.random.default_rng(0)
    popularity, chosen = Popularity(0.5), []
    # A hundred doublings are a factor of 10^30: the increment passes its bound after 333 events, and again after 666.
    assert 2.0**333 > LARGEST_INCREMENT > 2.0**332
    for step in range(700):
        row = int(random.integers(1, 8))
        popularity.add(row)
        chosen.append(row)
        if step % 20 == 0 or 325 < step < 345 or 660 < step < 675:
            found = [popularity.rank(row, _seen()) for row in range(1, 9)]
            assert found == [_rank(chosen, row, set(), Fraction(1, 2)) for row in range(1, 9)]


def test_many_items() -> None:
    popularity = Popularity()
    for row in range(1, 3001):
        popularity.add(row)
    popularity.add(2999)
    assert [popularity.rank(row, _seen()) for row in (2999, 1, 3000)] == [1, 2, 3000]
    assert popularity.rank(3000, np.arange(1, 3000)) == 1
