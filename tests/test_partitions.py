"""Partitions: where everything is looked at the answers are those of a full look; every row lies in one place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learning import CPU
from numpy.typing import NDArray
from test_search import CASES, DIMENSION, REACH, first_version, made_up, nothing_hidden

from recsys.item_table import PADDING_ROW, ItemTable
from recsys.network import LIFTS
from recsys.scorer import lanes, search
from recsys.scorer.centres import Centres
from recsys.scorer.items import Ahead, Items
from recsys.scorer.lanes import QUAD, ROWS, ZERO
from recsys.scorer.partitions import Partitions
from recsys.scorer.places import NOBODY, Places
from recsys.scorer.retrieval import HIDDEN, Found, Hidden, Own
from recsys.scorer.rough import Rough
from recsys.scorer.search import Search
from recsys.settings import Settings
from recsys.standing import STANDINGS
from recsys.weights.replica import Replica

pytestmark = pytest.mark.skipif(not lanes.available(), reason="no AVX2 here: nothing is looked at roughly")

# So many spreads above its mean no row of a partition lies.
EVERYWHERE = 1e6


class Asked:
    """Random users of a table, who must not see some of its rows again."""

    def __init__(self, table: ItemTable, users: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.weights = torch.from_numpy(draw.standard_normal((users, 1 + STANDINGS + LIFTS)).astype(np.float32))
        self.states = torch.from_numpy(draw.standard_normal((users, DIMENSION)).astype(np.float32))
        self.history = torch.from_numpy(draw.integers(0, table.rows, (users, REACH)))
        self.own = [draw.integers(0, table.rows, int(draw.integers(0, 9))).tolist() for _ in range(users)]
        half = torch.from_numpy(draw.random(table.rows) < 0.5)
        # All but a few: whoever sees only these looks everywhere.
        most = torch.ones(table.rows, dtype=torch.bool)
        most[draw.integers(0, table.rows, 20)] = False
        half[PADDING_ROW] = most[PADDING_ROW] = True
        masks = [nothing_hidden(table.rows), *(Hidden(each, each.nonzero()[:, 0]) for each in (half, most))]
        self.hidden = [masks[int(draw.integers(3))] for _ in range(users)]

    def ask(self, items: Items, table: ItemTable, keep: int) -> Found:
        """Find the best rows of a version's items."""
        found = Search()
        found.install(items, table)
        return found.find(self.weights, self.states, self.history, self.hidden, Own.of(self.own), keep)


@pytest.mark.parametrize(("items", "users", "different"), CASES)
@pytest.mark.parametrize("keep", [1, 10, 100])
def test_who_looks_everywhere_finds_what_a_full_look_does(
    items: int, users: int, different: int, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SPREADS", EVERYWHERE)
    table = made_up(items, items + users, different)
    asked = Asked(table, users, keep)
    exact, parted = (asked.ask(Items.of(table, parted=each), table, keep) for each in (False, True))
    assert torch.equal(exact.rows_BK, parted.rows_BK)
    assert torch.equal(exact.scores_BK, parted.scores_BK)


def clustered(items: int, seed: int) -> ItemTable:
    """Fill a table with items of forty kinds."""
    table = made_up(items, seed)
    draw = np.random.default_rng(seed)
    kinds = draw.standard_normal((40, DIMENSION))[draw.integers(40, size=items)]
    vectors = kinds + 0.4 * draw.standard_normal((items, DIMENSION))
    table.columns["vector"][1 : table.rows] = torch.from_numpy(vectors.astype(np.float32))
    return table


def test_hardly_any_of_the_best_is_missed_and_few_partitions_are_looked_at() -> None:
    table = clustered(40_000, 3)
    users, keep = 16, 50
    asked = Asked(table, users, 2)
    asked.weights[:, 1:-LIFTS] *= 0.2
    parted = Items.of(table, parted=True)
    assert parted.partitions is not None
    exact, found = (asked.ask(items, table, keep) for items in (Items.of(table), parted))
    same = [
        len(set(one) & set(other)) / len(set(one))
        for one, other in zip(*(each.rows_BK.tolist() for each in (exact, found)), strict=True)
    ]
    assert np.mean(same) >= 0.99
    # As many as were asked for, whatever is hidden, and best first.
    assert torch.equal(found.scores_BK > HIDDEN / 2, exact.scores_BK > HIDDEN / 2)
    assert (found.scores_BK[:, 1:] <= found.scores_BK[:, :-1]).all()
    users_BV = torch.cat([asked.weights[:, :1] * asked.states, asked.weights[:, 1:-LIFTS]], 1).numpy()
    hopes = parted.partitions.hopes(users_BV, search.SPREADS)
    open_to_all = [user for user in range(users) if int(asked.hidden[user].mask_I.sum()) == 1]
    reached = hopes[open_to_all] >= exact.scores_BK.numpy()[open_to_all, -1:]
    assert reached.mean() < 0.5


def check_places(items: Items) -> None:
    """Every row lies in one place, in a block of its partition, of which only the first has room."""
    assert items.partitions is not None
    assert items.rough is not None
    places, rows = items.partitions.places, len(items.vectors_ID)
    seen: list[int] = []
    blocks = 0
    for partition, first in enumerate(places.first_L.tolist()):
        block, room = first, int(places.held_L[partition])
        while block != NOBODY:
            here = places.row_P[block * ROWS : (block + 1) * ROWS]
            assert (here[:room] != NOBODY).all()
            assert (here[room:] == NOBODY).all()
            assert (places.partition_I[here[:room]] == partition).all()
            seen += here[:room].tolist()
            block, room, blocks = int(places.next_G[block]), ROWS, blocks + 1
    assert sorted(seen) == list(range(rows))
    assert (places.row_P[places.place_I[:rows]] == np.arange(rows)).all()
    assert blocks + places.free_2[1] == places.blocks
    for rough, truth in zip(items.rough, (items.vectors_ID, items.standing_IS), strict=True):
        lost = np.linalg.norm(at_places(rough, places, truth.shape[1])[:rows] - truth.numpy(), axis=1)
        assert lost.max() <= rough.lost * 1.001 + 1e-6


def at_places(rough: Rough, places: Places, width: int) -> NDArray[np.float32]:
    blocks = rough.blocks_GP.reshape(len(rough.blocks_GP), -1, ROWS, QUAD).transpose(0, 2, 1, 3)
    numbers = blocks.reshape(len(rough.blocks_GP) * ROWS, -1)[places.place_I, :width] - float(ZERO)
    found: NDArray[np.float32] = rough.centre_D + rough.scale_D * numbers
    return found


def check_numbers(items: Items, near: float) -> None:
    """Means and variances are those of the rows."""
    assert items.partitions is not None
    both = np.concatenate([items.vectors_ID.numpy(), items.standing_IS.numpy()], 1)
    partition_I = items.partitions.places.partition_I[: len(both)]
    for partition in np.unique(partition_I).tolist():
        rows = both[partition_I == partition]
        assert np.allclose(items.partitions.mean_LV[partition], rows.mean(0), atol=near)
        assert np.allclose(items.partitions.variance_LV[partition], rows.var(0), atol=10 * near, rtol=10 * near)


@pytest.mark.parametrize("ahead_of_it", [True, False])
def test_rows_move_with_each_version(ahead_of_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed, new and far larger rows; all of them anew where too many come."""
    monkeypatch.setattr(search, "SPREADS", EVERYWHERE)
    draw = torch.Generator().manual_seed(5)
    replica, source = first_version(), Replica(Settings(dimension=DIMENSION), CPU)
    items = Items.of(replica.table, parted=True)
    source.apply(replica.write_all())
    anew = 0
    for step in range(12):
        first = source.table.rows
        source.table.allocate(f"new-{step}-{n}" for n in range(40))
        changed = torch.unique(torch.cat([torch.randint(1, first, (20,)), torch.arange(first, source.table.rows)]))
        vectors = torch.randn(len(changed), DIMENSION, generator=draw) * (3 if step == 6 else 1)
        source.table.columns["vector"][changed] = vectors
        source.table.columns["total"][changed] += 1
        source.table.clock += 100
        new_items = list(zip(source.table.item_ids[first:], range(first, source.table.rows), strict=True))
        payload = source.write(changed, new_items)
        if ahead_of_it:
            ahead = Ahead.of(items, replica.table, payload)
            assert ahead is not None
            # What is answered meanwhile lies where it lay.
            check_places(items)
            replica.apply(payload)
            items = ahead.land(replica.table)
        else:
            replica.apply(payload)
            items = items.moved(replica.table, changed.numpy())
        if items.partitions is None:
            # Too many at once.
            items = Items.of(replica.table, parted=True)
            anew += 1
        check_places(items)
        # What went is known roughly where the version is in place.
        check_numbers(items, 1e-4 if ahead_of_it else 1e-2)
        asked = Asked(replica.table, 3, step)
        exact, parted = (asked.ask(each, replica.table, 30) for each in (Items.of(replica.table), items))
        assert torch.equal(exact.rows_BK, parted.rows_BK)
    assert 0 < anew < 12


def test_partitions_are_worn_before_they_are_full() -> None:
    replica, source = first_version(), Replica(Settings(dimension=DIMENSION), CPU)
    source.apply(replica.write_all())
    items = Items.of(replica.table, parted=True)
    parted, worn = 0, 0
    while items.partitions is not None:
        assert items.lack_partitions(items.rows) == items.partitions.worn(items.rows)
        assert not items.lack_partitions(items.rows + 1)
        parted, worn = parted + 1, worn + items.partitions.worn(items.rows)
        new = source.table.allocate([f"new-{parted}"])
        payload = source.write(torch.arange(source.table.rows - 1, source.table.rows), new)
        ahead = Ahead.of(items, replica.table, payload)
        assert ahead is not None
        replica.apply(payload)
        items = ahead.land(replica.table)
    assert 0 < worn < parted
    assert items.lack_partitions(items.rows)
    found = Items.of(replica.table, parted=True).partitions
    assert found is not None
    assert not found.worn(items.rows)
    assert replace(found, moved=items.rows // 2 + 1).worn(items.rows)


def test_centres_are_those_of_the_kinds_that_rows_are_of() -> None:
    draw = np.random.default_rng(4)
    kinds = 10 * draw.standard_normal((9, 5)).astype(np.float32)
    of = draw.integers(9, size=2000)
    rows = kinds[of] + 0.01 * draw.standard_normal((2000, 5)).astype(np.float32)
    centres = Centres.of(rows, 40)
    nearest, squared = centres.nearest(rows)
    assert np.allclose(squared, ((rows - centres.centres_LV[nearest]) ** 2).sum(1), atol=1e-2)
    assert all(len(np.unique(of[nearest == centre])) <= 1 for centre in range(len(centres)))
    assert np.array_equal(Centres.of(rows, 40).nearest(rows)[0], nearest)


def test_rows_that_are_all_alike_are_parted() -> None:
    rows = np.ones((500, DIMENSION), np.float32)
    parted = Partitions.of(rows, np.zeros((500, STANDINGS), np.float32), 500)
    assert np.bincount(parted.places.partition_I).sum() == 500
    assert not parted.variance_LV.any()
