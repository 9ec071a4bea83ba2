"""Baselines: every method's scores equal counting from scratch, or plain loops, before every event."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trainer.baselines import (
    BiasedFactorisation,
    ClickRegression,
    IncrementalFactorisation,
    ItemNeighbours,
    ItemScorer,
    Popularity,
    SequentialCooccurrence,
    best,
    place,
)
from trainer.baselines.pairs import LEAST_ENTRIES, Pairs
from trainer.baselines.popularity import LARGEST_INCREMENT
from trainer.full_ranking import ranks
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


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_a_place_is_that_of_the_learners_ranking(scores: list[int], data: st.DataObject) -> None:
    item = data.draw(st.integers(0, len(scores) - 1))
    found = place(np.array(scores, np.float64), item)
    assert found == sorted(range(len(scores)), key=lambda i: (-scores[i], i)).index(item) + 1
    assert found == ranks(torch.tensor([scores], dtype=torch.float32), torch.tensor([item])).item()


def test_what_is_not_ranked_has_no_place() -> None:
    scores = np.array([1.0, -np.inf, np.nan, 2.0, 3.0])
    assert [place(scores, item) for item in (0, 1, 2, 3)] == [3, MISS, MISS, 2]
    assert set(best(np.array([1.0, -np.inf, 2.0, 3.0]), 2)) == {2, 3}
    assert set(best(np.array([1.0, -np.inf, 2.0, 3.0]), 4)) == {0, 2, 3}
    assert set(best(np.array([1.0, -np.inf]), 5)) == {0}


def test_pairs_equal_a_matrix_at_every_step() -> None:
    random = np.random.default_rng(0)
    pairs, matrix = Pairs(), np.zeros((5, 8))
    pairs.reserve(5)
    for step in range(6 * LEAST_ENTRIES):
        rows, items = random.integers(0, 5, 4), random.integers(0, 8, 4)
        weights = random.random(4)
        pairs.add(rows.tolist(), items.tolist(), weights.tolist())
        np.add.at(matrix, (rows, items), weights)
        if step % 10 == 0:
            asked, factors = random.integers(0, 5, 3), random.random(3)
            np.testing.assert_allclose(pairs.weighted(asked, factors, 8), factors @ matrix[asked], rtol=1e-9)
    np.testing.assert_array_equal(pairs.weighted(np.array([], np.int64), np.array([]), 8), np.zeros(8))


def _cooccurrence(chosen: dict[int, list[int]], counts: list[int], user: int, item: int) -> float:
    """Score by the formula alone, from the whole past."""
    latest, score = chosen.get(user, [])[::-1][:20], 0.0
    for k, before in enumerate(latest, 1):
        together = sum(
            1 / (there - here)
            for sequence in chosen.values()
            for here, a in enumerate(sequence)
            for there in range(here + 1, min(here + 21, len(sequence)))
            if a == before and sequence[there] == item and item != before
        )
        score += together / k / (math.sqrt(counts[before] + 10) * (counts[item] + 10) ** 0.25)
    return score + 1e-12 * counts[item]


def _neighbours(chosen: dict[int, list[int]], counts: list[int], user: int, item: int) -> float:
    score = 0.0
    for before in chosen.get(user, [])[-20:]:
        together = sum(
            len({before, item} - {last}) == 1 and bool({before, item} - {last} <= {*sequence[max(0, n - 20) : n]})
            for sequence in chosen.values()
            for n, last in enumerate(sequence)
            if before != item and last in (before, item)
        )
        score += together / math.sqrt(counts[before] * counts[item])
    return score + 1e-12 * counts[item]


@pytest.mark.parametrize(
    ("make", "reference"), [(SequentialCooccurrence, _cooccurrence), (ItemNeighbours, _neighbours)]
)
@pytest.mark.parametrize(("seed", "items"), [(0, 4), (1, 12), (2, 30)])
def test_company_equals_the_formula_at_every_prefix(
    make: Callable[[], ItemScorer],
    reference: Callable[[dict[int, list[int]], list[int], int, int], float],
    seed: int,
    items: int,
) -> None:
    random = np.random.default_rng(seed)
    method, numbers = make(), dict[int, int]()
    chosen: dict[int, list[int]] = {}
    counts: list[int] = []
    for _ in range(90):
        user = int(random.integers(0, 3))
        drawn = int(random.integers(0, items))
        had = np.array(chosen.get(user, []), np.int64)
        scores = np.full(len(counts), np.nan)
        method.score(user, had, scores)
        expected = [reference(chosen, counts, user, item) for item in range(len(counts))]
        np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-15)
        item = numbers.setdefault(drawn, len(numbers))
        method.learn(user, item, had)
        if item == len(counts):
            counts.append(0)
        counts[item] += 1
        chosen.setdefault(user, []).append(item)


def test_what_follows_is_scored_first() -> None:
    method = SequentialCooccurrence()
    for user in range(5):
        for place_, item in enumerate((0, 1, 2)):
            method.learn(user, item, np.arange(place_))
    scores = np.empty(3)
    method.score(9, _seen(0), scores)
    assert scores.argmax() == 1
    assert scores[0] < 1e-9 < scores[2]


def test_factorisation_equals_plain_passes_at_every_prefix() -> None:
    random = np.random.default_rng(3)
    method = IncrementalFactorisation()
    method._users.reserve(4)
    method._items.reserve(6)
    users, items = method._users.values[:4].copy(), method._items.values[:6].copy()
    had: dict[int, list[int]] = {}
    for _ in range(60):
        user, item = int(random.integers(0, 4)), int(random.integers(0, 6))
        scores = np.empty(6)
        method.score(user, np.array(had.get(user, []), np.int64), scores)
        np.testing.assert_allclose(scores, -np.abs(1 - items @ users[user]) if user in had else np.zeros(6))
        method.learn(user, item, np.array(had.get(user, []), np.int64))
        for _ in range(IncrementalFactorisation.PASSES):
            error = 1 - users[user] @ items[item]
            users[user] += 0.01 * (error * items[item] - 0.1 * users[user])
            items[item] += 0.01 * (error * users[user] - 0.1 * items[item])
        had.setdefault(user, []).append(item)


def test_factorisation_finds_the_halves_of_a_world() -> None:
    """Users of each half choose items of their half alone; what they have not chosen yet of it ranks first."""
    random = np.random.default_rng(0)
    method = IncrementalFactorisation()
    for _ in range(4000):
        user = int(random.integers(0, 20))
        item = int(random.integers(0, 9)) + 10 * (user % 2)
        method.learn(user, item if item % 10 != user // 2 else (item + 1) % 10 + 10 * (user % 2), _seen(0))
    right = 0
    for user in range(20):
        scores = np.empty(20)
        method.score(user, _seen(0), scores)
        right += {*np.argsort(-scores)[:8].tolist()} <= {*range(10 * (user % 2), 10 * (user % 2) + 10)}
    assert right >= 18


def test_ratings_approach_mean_and_biases() -> None:
    random = np.random.default_rng(1)
    model = BiasedFactorisation()
    users, items = random.normal(0, 0.7, 12), random.normal(0, 0.7, 15)
    errors = []
    for _ in range(6000):
        user, item = int(random.integers(0, 12)), int(random.integers(0, 15))
        value = 3 + users[user] + items[item]
        errors.append(abs(model.predict(user, item) - value))
        model.learn(user, item, value)
    assert np.mean(errors[:100]) > 0.4
    assert np.mean(errors[-1000:]) < 0.1


def test_clicks_equal_the_papers_algorithm_at_every_step() -> None:
    random = np.random.default_rng(2)
    model = ClickRegression()
    sums: dict[int, float] = {}
    squares: dict[int, float] = {}

    def weight(bucket: int) -> float:
        return -sums.get(bucket, 0.0) / ((1 + math.sqrt(squares.get(bucket, 0.0))) / 0.05 + 1)

    for _ in range(300):
        chosen = tuple(random.integers(1, 9, random.integers(0, 14)).tolist())
        features = model.features(int(random.integers(1, 6)), chosen, None if not chosen else 7.5, {"tab": "1"})
        expected = 1 / (1 + math.exp(-sum(weight(bucket) for bucket in features)))
        assert model.predict(features) == pytest.approx(expected, abs=1e-12)
        happened = bool(random.random() < 0.3)
        model.learn(features, happened)
        gradient = expected - happened
        for bucket in features:
            old = squares.get(bucket, 0.0)
            rise = (math.sqrt(old + gradient**2) - math.sqrt(old)) / 0.05
            sums[bucket] = sums.get(bucket, 0.0) + gradient - rise * weight(bucket)
            squares[bucket] = old + gradient**2


def test_features_tell_what_differs_apart() -> None:
    model = ClickRegression()
    events = [
        model.features(1, (2, 3), 5.0, {"tab": "1"}),
        model.features(2, (2, 3), 5.0, {"tab": "1"}),
        model.features(1, (3, 2), 5.0, {"tab": "1"}),
        model.features(1, (2, 3), 50.0, {"tab": "1"}),
        model.features(1, (2, 3), 5.0, {"tab": "2"}),
        model.features(1, (2,), 5.0, {"tab": "1"}),
        model.features(1, (), None, {}),
    ]
    assert all(first != second for first, second in pairwise(events))
    assert events[0] == model.features(1, (2, 3), 5.0, {"tab": "1"})


def test_click_probabilities_are_those_of_the_world() -> None:
    random = np.random.default_rng(4)
    model, said = ClickRegression(), list[tuple[float, float]]()
    for _ in range(8000):
        item = int(random.integers(1, 4))
        features = model.features(item, (), None, {})
        said.append((model.predict(features), item / 5))
        model.learn(features, bool(random.random() < item / 5))
    assert all(abs(probability - truth) < 0.12 for probability, truth in said[-500:])
