"""Retrieval: the numbers of the network's score and the order of a full sort, whatever repeats, ties or is hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning import CPU, small
from torch import Tensor

from recsys.item_table import TRANSITION_REACH, ItemTable
from recsys.network import Histories, RecommendationNetwork, build_network
from recsys.scorer.items import Items
from recsys.scorer.retrieval import GROUP, HIDDEN, MASK_FROM, STRETCH, TOGETHER, Hidden, Own, Retrieval, largest
from recsys.settings import Settings
from recsys.standing import STANDINGS


def sorted_in_full(scores_BI: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    values_BI, places_BI = scores_BI.sort(dim=1, descending=True, stable=True)
    return values_BI[:, :keep], places_BI[:, :keep]


@pytest.mark.parametrize("batch", [1, 3, TOGETHER])
@pytest.mark.parametrize("groups", [1, 7, 40])
@pytest.mark.parametrize("different", [1, 2, 5, 200, 1 << 20])
def test_the_largest_are_those_of_a_full_sort(batch: int, groups: int, different: int) -> None:
    """Few different numbers mean that most choices are between equal ones, within groups and between them."""
    draw = torch.Generator().manual_seed(different)
    scores = torch.randint(-different // 2, different // 2 + 1, (batch, groups * GROUP), generator=draw) / 8
    for keep in (1, 2, groups - 1, groups, groups + 1, 100, groups * GROUP):
        if 0 < keep <= scores.shape[1]:
            found = largest(scores, keep)
            for one, other in zip(found, sorted_in_full(scores, keep), strict=True):
                assert torch.equal(one, other), (keep, different)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=3 * GROUP), st.data())
def test_any_numbers_keep_their_order(numbers: list[float], data: st.DataObject) -> None:
    """Either zero, infinities, numbers next to nothing: as a stable sort has them."""
    repeated = data.draw(st.lists(st.sampled_from(numbers), min_size=4 * GROUP, max_size=4 * GROUP))
    scores = torch.tensor([repeated], dtype=torch.float32)
    for keep in (1, 3, len(repeated)):
        expected = sorted(range(len(repeated)), key=lambda place: (-scores[0, place].item(), place))[:keep]
        found, places = largest(scores, keep)
        assert places[0].tolist() == expected
        assert torch.equal(found[0], scores[0, expected])


class World:
    """Random weights: a table whose successors repeat within a user, and users with histories of any length."""

    def __init__(self, settings: Settings, items: int, users: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.table = ItemTable(settings.dimension, settings.successors, CPU, seed)
        self.table.allocate(f"item-{n}" for n in range(items))
        columns = self.table.columns
        rows = self.table.rows
        columns["vector"][1:rows] = torch.from_numpy(draw.standard_normal((items, settings.dimension), np.float32))
        # Of few rows, so that they meet; an empty slot is row 0 without a weight.
        successors = draw.integers(0, min(items, 40) + 1, (items, settings.successors)).astype(np.int32)
        columns["successor"][1:rows] = torch.from_numpy(successors)
        columns["successor_weight"][1:rows] = torch.from_numpy(
            np.where(successors, draw.random(successors.shape), 0).astype(np.float32)
        )
        columns["total"][1:rows] = torch.from_numpy(draw.integers(0, 50, items))
        self.standing = torch.from_numpy(draw.standard_normal((rows, STANDINGS)).astype(np.float32))
        self.network: RecommendationNetwork = build_network(settings).eval()
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter += 0.3 * torch.from_numpy(draw.standard_normal(parameter.shape).astype(np.float32))
        length = settings.history_length
        rows_BL = draw.integers(1, rows, (users, length)) * (
            np.arange(length) >= draw.integers(0, length + 1, (users, 1))
        )
        filled = torch.from_numpy(rows_BL)
        self.histories = Histories(filled, (filled != 0) * 1, (filled != 0) * 3)
        self.transitions = self.table.transitions(self.histories.latest_first(TRANSITION_REACH))

    @torch.inference_mode()
    def expected(self) -> Tensor:
        """Compute every score as the network says."""
        vectors, weights, states = self.users()
        lifts = self.network.lifts(self.transitions, self.table.rows)
        return self.network.scores(weights, states, vectors, self.standing, lifts)

    def items(self) -> Items:
        """Return what a version would hold of the items."""
        vectors = self.table.column("vector")
        return Items(vectors, self.standing, vectors[0], self.standing[0], None, np.zeros(0), None)

    def users(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the vectors, and the mixing weights and states of the users."""
        vectors, rows_BL = self.table.column("vector"), self.histories.rows_BL
        states = self.network.states(vectors, rows_BL, self.histories)
        return vectors, self.network.mixing_weights(self.histories), states


WORLDS = [(1, 1), (5, 2), (GROUP - 1, 3), (GROUP, 1), (700, TOGETHER), (STRETCH + 3, 4)]


@pytest.mark.parametrize(("items", "users"), WORLDS)
def test_scores_are_those_of_the_network(settings: Settings, items: int, users: int) -> None:
    retrieval = Retrieval(CPU)
    for seed in range(3):
        # The same memory serves batch after batch, whatever was left in it.
        world = World(small(settings, dimension=16, history_length=8), items, users, seed)
        expected = world.expected()
        with torch.inference_mode():
            _, weights, states = world.users()
            retrieval.install(world.items(), world.table)
            lifts = retrieval.lifts(world.transitions)
            found = retrieval.scores(weights, states, lifts)
            assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
            top, rows = retrieval.best(10)
            assert torch.equal(rows, sorted_in_full(found, 10)[1])
            best, best_rows = sorted_in_full(expected, 10)
            assert torch.allclose(top, best, atol=1e-5, rtol=1e-5)
            # The same rows, but where two scores are closer than rounding.
            apart = ((best[:, :-1] - best[:, 1:]) > 1e-4).all(1)
            assert torch.equal(rows[apart, :-1], best_rows[apart, :-1])


def test_lifts_of_rows_are_those_of_the_network(settings: Settings) -> None:
    """Of all rows, those that follow nothing too, and with the strongest, latest reason for each."""
    world = World(small(settings, dimension=16, history_length=8), 200, 5, 1)
    dense = world.network.lifts(world.transitions, world.table.rows)
    retrieval = Retrieval(CPU)
    retrieval.install(world.items(), world.table)
    lifts = retrieval.lifts(world.transitions)
    with torch.inference_mode():
        retrieval.scores(*world.users()[1:], lifts)
    rows = torch.arange(world.table.rows).expand(5, -1)
    looks, because = lifts.at(rows)
    for look, expected in zip(looks.unbind(2), dense, strict=True):
        assert torch.allclose(look, expected, atol=1e-6)
    assert len(dense[0].nonzero()) > 50
    found = world.transitions
    each = found.rows_BN.shape[1] // found.history_BK.shape[1]
    for user in range(5):
        for row in range(1, world.table.rows):
            weights = [
                w if r == row else 0.0
                for r, w in zip(*(x[user].tolist() for x in (found.rows_BN, found.weight_BN)), strict=True)
            ]
            reason = found.history_BK[user, weights.index(max(weights)) // each] if max(weights) else 0
            if max(weights):
                assert because[user, row] == reason


@pytest.mark.parametrize("few", [True, False])
def test_hidden_by_list_or_by_mask(few: bool) -> None:
    scores = torch.zeros(3, 20 * MASK_FROM)
    hidden = torch.zeros(scores.shape[1], dtype=torch.bool)
    hidden[torch.arange(5 if few else 40)] = True
    Hidden(hidden, hidden.nonzero()[:, 0]).apply(scores[:2])
    assert torch.equal(scores[0] == HIDDEN, hidden)
    assert torch.equal(scores[1] == HIDDEN, hidden)
    assert not scores[2].any()


def test_own_rows() -> None:
    own = Own.of([[3, 4], [], [9]])
    assert (own.rows_H.tolist(), own.ends_B.tolist(), len(own)) == ([3, 4, 9], [2, 2, 3], 3)
    assert len(Own.of([[], []]).rows_H) == 0
