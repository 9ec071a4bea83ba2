"""Search: the rows and the order of a full sort, though next to none is looked at closely, whatever repeats or ties."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learning import CPU
from numba.core.codegen import get_host_cpu_features
from numpy.typing import NDArray

from recsys.item_table import PADDING_ROW, ItemTable
from recsys.network import LIFTS, TRANSITION_FLOOR, Histories
from recsys.scorer import lanes, scan, shortlist
from recsys.scorer.encoder import Encoder
from recsys.scorer.items import Ahead, Items
from recsys.scorer.marks import END, Marks
from recsys.scorer.parts import contested, in_final_order, log_worth
from recsys.scorer.ranking import Ranking
from recsys.scorer.retrieval import HIDDEN, Hidden, Own, Retrieval
from recsys.scorer.rough import LARGEST, Rough, whole_weights
from recsys.scorer.search import Search
from recsys.scorer.user_rates import UserRates
from recsys.settings import Settings
from recsys.standing import STANDINGS, Standing, by_tensors
from recsys.weights import WeightPayload
from recsys.weights.replica import Replica

pytestmark = pytest.mark.skipif(not lanes.available(), reason="no AVX2 here: nothing is looked at roughly")

DIMENSION, REACH, SUCCESSORS = 16, 4, 6


def made_up(items: int, seed: int, different: int = 0) -> ItemTable:
    """Fill a table at random; with `different`, of so many different vectors and standings, so that most scores tie."""
    draw = np.random.default_rng(seed)
    table = ItemTable(DIMENSION, SUCCESSORS, CPU, seed, classes=3)
    table.allocate(f"item-{n}" for n in range(items))
    rows, columns = table.rows, table.columns
    table.clock = 5000
    kind = draw.integers(0, different, rows) if different else np.arange(rows)
    kinds = int(kind.max()) + 1

    def put(name: str, values: NDArray[np.generic]) -> None:
        columns[name][1:rows] = torch.from_numpy(values[kind])[1:].to(columns[name].dtype)

    put("vector", draw.standard_normal((kinds, DIMENSION)))
    put("trend", draw.random((kinds, 6)) * draw.integers(0, 2, (kinds, 1)))
    put("touched", draw.integers(0, 5001, kinds))
    put("first", draw.integers(0, 5001, kinds))
    put("total", draw.integers(0, 50, kinds))
    put("classes", draw.integers(0, 9, (kinds, 3)))
    successors = draw.integers(0, min(items, 30) + 1, (rows, SUCCESSORS))
    columns["successor"][1:rows] = torch.from_numpy(successors.astype(np.int32))[1:]
    weights = np.where(successors, draw.random(successors.shape), 0)
    columns["successor_weight"][1:rows] = torch.from_numpy(weights.astype(np.float32))[1:]
    return table


def in_full(
    table: ItemTable, items: Items, weights_BP: torch.Tensor, states_BD: torch.Tensor, history_BK: torch.Tensor
) -> NDArray[np.float32]:
    """Score every row for every user with the same sums, one by one."""
    users_BV = torch.cat([weights_BP[:, :1] * states_BD, weights_BP[:, 1:-LIFTS]], 1).numpy()
    vectors, standing = items.vectors_ID.numpy(), items.standing_IS.numpy()
    scores = np.array(
        [
            [shortlist.exact(vectors, standing, row, users_BV, user) for row in range(table.rows)]
            for user in range(len(users_BV))
        ],
        np.float32,
    )
    known = Search()
    known.install(items, table)
    marks = known.look_up(history_BK)
    lifts_BN = marks.weighted(weights_BP[:, -LIFTS:].numpy())
    for user, rows in enumerate(marks.rows_BN):
        there = rows != END
        scores[user, rows[there]] += lifts_BN[user, there]
    return scores


def nothing_hidden(rows: int) -> Hidden:
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[PADDING_ROW] = True
    return Hidden(mask, mask.nonzero()[:, 0])


CASES = [(1, 1, 0), (5, 2, 0), (16, 3, 0), (700, 5, 0), (9000, 33, 0), (900, 4, 1), (4000, 6, 3), (9000, 2, 1)]


@pytest.mark.parametrize(("items", "users", "different"), CASES)
@pytest.mark.parametrize("keep", [1, 10, 100])
def test_the_best_are_those_of_a_full_sort(items: int, users: int, different: int, keep: int) -> None:
    table = made_up(items, items + users, different)
    draw = np.random.default_rng(keep)
    found = Items.of(table)
    weights = torch.from_numpy(draw.standard_normal((users, 1 + STANDINGS + LIFTS)).astype(np.float32))
    if different:
        # The users alike in what they want, so that ties are between all rows of a kind.
        weights[:, 1:-LIFTS] = 0
    states = torch.from_numpy(draw.standard_normal((users, DIMENSION)).astype(np.float32))
    history = torch.from_numpy(draw.integers(0, table.rows, (users, REACH)))
    own = [draw.integers(0, table.rows, int(draw.integers(0, 9))).tolist() for _ in range(users)]
    half = torch.from_numpy(draw.random(table.rows) < 0.5)
    half[PADDING_ROW] = True
    masks = [nothing_hidden(table.rows), Hidden(half, half.nonzero()[:, 0])]
    hidden = [masks[int(draw.integers(2))] for _ in range(users)]
    search = Search()
    search.install(found, table)
    top, rows, _ = search.find(weights, states, history, hidden, Own.of(own), keep)
    scores = in_full(table, found, weights, states, history)
    for user in range(users):
        scores[user, hidden[user].mask_I.numpy()] = HIDDEN
        scores[user, own[user]] = HIDDEN
        order = np.argsort(-scores[user], kind="stable")[: min(keep, table.rows)]
        expected = [row for row in order.tolist() if scores[user, row] > HIDDEN / 2]
        assert rows[user, : len(expected)].tolist() == expected
        assert np.array_equal(top[user, : len(expected)].numpy(), scores[user, expected])
        assert (top[user, len(expected) :] == HIDDEN).all()


@pytest.mark.parametrize("users", [1, 7])
def test_both_ways_of_retrieval_agree(users: int) -> None:
    table = made_up(3000, 4)
    draw = np.random.default_rng(3)
    weights = torch.from_numpy(draw.standard_normal((users, 1 + STANDINGS + LIFTS)).astype(np.float32))
    states = torch.from_numpy(draw.standard_normal((users, DIMENSION)).astype(np.float32))
    history = torch.from_numpy(draw.integers(0, table.rows, (users, REACH)))
    items = Items.of(table)
    answers = []
    for way in (Search(), Retrieval(CPU)):
        way.install(items, table)
        top, rows, known = way.find(
            weights, states, history, [nothing_hidden(table.rows)] * users, Own.of([()] * users), 50
        )
        answers.append((top, *known.at(rows)))
    for one, other in zip(*answers, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_who_is_misled_by_the_sample_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows that are far better lie where the sample is taken, but they are fewer than are asked for."""
    items, keep = 9000, 100
    table = made_up(items, 6)
    every = table.rows // (lanes.ROWS * scan.SAMPLED)
    better = np.arange(1, 75) // 8 * lanes.ROWS * every + np.arange(1, 75) % 8
    assert every > 1
    states = torch.ones(5, DIMENSION)
    table.columns["vector"][1 : table.rows] *= 0.01
    table.columns["vector"][better] = 1.0
    found = Items.of(table)
    weights = torch.zeros(5, 1 + STANDINGS + LIFTS)
    weights[:, 0] = 1.0
    # One of them is not misled.
    weights[3, 0] = 0.0
    history = torch.zeros(5, REACH, dtype=torch.int64)
    asked: list[tuple[Any, ...]] = []
    real = scan.best
    monkeypatch.setattr(scan, "best", lambda *given: asked.append(given) or real(*given))
    search = Search()
    search.install(found, table)
    top, rows, _ = search.find(weights, states, history, [nothing_hidden(table.rows)] * 5, Own.of([()] * 5), keep)
    scores = in_full(table, found, weights, states, history)
    scores[:, PADDING_ROW] = HIDDEN
    for user in range(5):
        assert rows[user].tolist() == np.argsort(-scores[user], kind="stable")[:keep].tolist()
    _, _, vectors, standing, _, words, constant, step, error, _, _, hidden, _ = asked[0]
    guess = scan._guess(vectors, standing, words, constant, step, error, hidden, keep, lanes.USERS)
    assert (guess > top[:, -1].numpy() - error).tolist() == [True, True, True, False, True]


def adversarial(width: int, draw: np.random.Generator) -> NDArray[np.float32]:
    """Draw vectors whose products are the largest there can be, or would be if all that is added had one sign."""
    alternating = np.where(np.arange(width) % 2, 1, -1)
    signs = draw.choice([-1.0, 1.0], (40, width))
    one = np.eye(width)[: min(width, 8)]
    spread = draw.standard_normal((60, width)) * draw.random((60, width)) ** 8
    whole = np.concatenate([np.ones((1, width)), -np.ones((1, width)), [alternating, -alternating], signs, one, spread])
    return np.concatenate([whole, -whole, 1e-3 * whole]).astype(np.float32)


@pytest.mark.parametrize("width", [1, 3, 16, 64, 200, 1024])
@pytest.mark.parametrize("together", [1, lanes.USERS])
def test_no_sum_goes_round_and_no_score_is_further_off_than_is_said(width: int, together: int) -> None:
    """Against doubles, for users whose weights are the rows themselves as well."""
    draw = np.random.default_rng(width)
    vectors, standing = adversarial(width, draw), (9 * draw.standard_normal((1, STANDINGS))).astype(np.float32)
    standing = np.concatenate([standing + each for each in 30 * adversarial(STANDINGS, draw)])
    rows = max(len(vectors), len(standing))
    vectors, standing = np.resize(vectors, (rows, width)), np.resize(standing, (rows, STANDINGS))
    packed = Rough.of(vectors, centred=False), Rough.of(standing, centred=True)
    users = np.concatenate([vectors, 0.1 * standing * draw.random((rows, 1)).astype(np.float32)], 1)
    users[::5, width:] = 0
    users[1::5, :width] = 0
    users[7] = 0
    words, constant, step, error = whole_weights(
        users,
        *(np.concatenate([getattr(each, name) for each in packed]) for name in ("centre_D", "scale_D")),
        width,
        *(tuple(getattr(each, name) for each in packed) for name in ("lost", "longest", "widest")),
        together,
    )
    truth = np.concatenate([vectors, standing], 1).astype(np.float64) @ users.T.astype(np.float64)
    blocks = np.arange(-(-rows // lanes.ROWS), dtype=np.int32)
    sums, above = np.empty((len(blocks), together * lanes.ROWS), np.int32), np.empty(len(blocks), np.uint64)
    limits = np.zeros((len(words), together), np.int32)
    for tile in range(len(words)):
        scan.look(packed[0].blocks_GP, packed[1].blocks_GP, blocks, words, tile, limits, sums, above)
        bits = above[:, None] >> np.arange(together * lanes.ROWS, dtype=np.uint64) & np.uint64(1)
        assert np.array_equal(bits == 1, sums > 0)
        for user in range(tile * together, min(tile * together + together, rows)):
            first = lanes.ROWS * (user - tile * together)
            rough = constant[user] + step[user] * sums[:, first : first + lanes.ROWS].reshape(-1)[:rows]
            assert (np.abs(rough - truth[:, user]) <= error[user] + 1e-9 * np.abs(truth[:, user])).all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
@settings(deadline=None)
def test_keys_are_in_the_order_of_scores(numbers: list[float]) -> None:
    """Either zero, numbers next to nothing, equal ones: as a stable sort has them."""
    keys = np.array([[shortlist._key(np.float32(number), row) for row, number in enumerate(numbers)]])
    scores, rows = shortlist.in_order(keys, np.array([len(numbers)]), len(numbers))
    expected = sorted(range(len(numbers)), key=lambda row: (-numbers[row], row))
    assert rows[0].tolist() == expected
    assert scores[0].tolist() == [numbers[row] for row in expected]


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (15, 3), (40, 16), (500, 7)])
def test_what_is_lost_of_a_row_is_no_more_than_is_said(rows: int, width: int) -> None:
    draw = np.random.default_rng(rows)
    truth = (draw.standard_normal((rows, width)) * draw.random(width) * 9 + draw.random(width)).astype(np.float32)
    rough = Rough.of(truth, centred=True)
    assert np.allclose(unpacked(rough, rows, width), truth, atol=rough.lost)
    # Written singly and out of range: it is clipped, and said to be.
    truth[rows // 2] *= 50
    rough.write(truth, np.array([rows // 2]))
    lost = np.linalg.norm(unpacked(rough, rows, width) - truth, axis=1)
    assert lost.max() == pytest.approx(rough.lost, rel=1e-3)
    assert np.abs(rough.blocks_GP - float(lanes.ZERO)).max() <= LARGEST + 1
    assert rough.longest == pytest.approx(np.linalg.norm(truth, axis=1).max(), rel=1e-5)


def unpacked(rough: Rough, rows: int, width: int) -> NDArray[np.float32]:
    blocks = rough.blocks_GP.reshape(len(rough.blocks_GP), -1, lanes.ROWS, lanes.QUAD).transpose(0, 2, 1, 3)
    numbers = blocks.reshape(len(rough.blocks_GP) * lanes.ROWS, -1)[:rows, :width] - float(lanes.ZERO)
    found: NDArray[np.float32] = rough.centre_D + rough.scale_D * numbers
    return found


def test_standing_is_that_of_the_table() -> None:
    for seed in range(3):
        table = made_up(300, seed)
        table.clock += 10 ** (2 * seed)
        columns = {name: column.numpy() for name, column in table.columns.items()}
        found = Standing.of(columns, table.rows, table.clock)
        expected = by_tensors(table.columns, table.rows, table.clock)
        assert np.allclose(found.rows_IS, expected.numpy(), atol=2e-6)
        assert np.allclose(found.mean_S, expected[1:].mean(0).numpy(), atol=1e-5)


def first_version() -> Replica:
    replica = Replica(Settings(dimension=DIMENSION), CPU)
    replica.table.allocate(f"item-{n}" for n in range(200))
    replica.table.columns["vector"][1:201] = torch.randn(200, DIMENSION)
    return replica


def _ahead(items: Items, replica: Replica, payload: WeightPayload) -> Items:
    ahead = Ahead.of(items, replica.table, payload)
    assert ahead is not None
    replica.apply(payload)
    return ahead.land(replica.table)


def _moved(items: Items, replica: Replica, payload: WeightPayload) -> Items:
    replica.apply(payload)
    return items.moved(replica.table, payload.rows.astype(np.int64))


@pytest.mark.parametrize("follow", [_ahead, _moved], ids=["ahead of it", "behind it"])
def test_what_is_computed_of_changed_rows_is_what_the_version_has(
    follow: Callable[[Items, Replica, WeightPayload], Items],
) -> None:
    """Rows that changed, that are new, and that are far larger than any before: the same as computed from nothing."""
    draw = torch.Generator().manual_seed(5)
    replica, source = first_version(), Replica(Settings(dimension=DIMENSION), CPU)
    items = Items.of(replica.table)
    source.apply(replica.write_all())
    written_anew = 0
    for step in range(8):
        first = source.table.rows
        source.table.allocate(f"new-{step}-{n}" for n in range(40))
        changed = torch.unique(torch.cat([torch.randint(1, first, (30,)), torch.arange(first, source.table.rows)]))
        # Behind the large ones rows have to be written anew.
        vectors = torch.randn(len(changed), DIMENSION, generator=draw) * (3 * step if step in (3, 5) else 1)
        source.table.columns["vector"][changed] = vectors
        source.table.columns["total"][changed] += 1
        source.table.clock += 100
        new_items = list(zip(source.table.item_ids[first:], range(first, source.table.rows), strict=True))
        before = items.rough
        items = follow(items, replica, source.write(changed, new_items))
        afresh = Items.of(replica.table)
        assert torch.equal(items.vectors_ID, afresh.vectors_ID)
        assert torch.equal(items.standing_IS, afresh.standing_IS)
        assert torch.allclose(items.mean_vector_D, afresh.mean_vector_D, atol=1e-5)
        assert torch.allclose(items.mean_standing_S, afresh.mean_standing_S, atol=1e-6)
        assert before is not None
        assert items.rough is not None
        assert afresh.rough is not None
        written_anew += items.rough[0] is not before[0]
        truth = items.vectors_ID.numpy()
        lost = np.linalg.norm(unpacked(items.rough[0], len(truth), DIMENSION) - truth, axis=1)
        assert lost.max() <= items.rough[0].lost * 1.001
    assert items.rough[0].lost < 2 * afresh.rough[0].lost
    assert 0 < written_anew < 8


def test_a_rollback_is_computed_afresh() -> None:
    replica = first_version()
    assert Ahead.of(Items.of(replica.table), replica.table, replica.write_all()) is None


def test_the_class_head_gives_the_numbers_of_the_network() -> None:
    network = Replica(Settings(dimension=DIMENSION), CPU).network.eval()
    draw = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        network.rates.class_counts.copy_(torch.tensor([90.0, 7.0, 0.0, 1.0]))
        users, count, classes = 5, 9, len(network.rates.class_counts)
        states, context = torch.randn(users, DIMENSION), torch.randn(users, 16)
        known = torch.randn(users, network.rates.user_width)
        table = ItemTable(DIMENSION, SUCCESSORS, CPU, 0, classes=classes)
        table.allocate(f"item-{n}" for n in range(30))
        table.column("vector").copy_(torch.randn(table.rows, DIMENSION))
        table.column("classes").copy_(torch.randint(0, 400, (table.rows, classes)).float())
        every_standing = torch.randn(table.rows, STANDINGS)
        rows = torch.randint(0, table.rows, (users, count))
        vectors, standing, item_counts = (
            table.column("vector")[rows],
            every_standing[rows],
            table.column("classes")[rows],
        )
        ranking = Ranking(network)
        ranking.install(table, every_standing)
        found = ranking.logits(states, context, known, rows)
        shape = (-1, count, -1)
        expected = network.class_logits(
            states[:, None].expand(shape),
            vectors,
            standing,
            context[:, None].expand(shape),
            torch.cat([known[:, None].expand(shape), network.rates.item(item_counts)], 2),
        )
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-4)


def test_marks_are_the_sums_of_what_follows() -> None:
    table = made_up(60, 8)
    history = torch.randint(0, table.rows, (6, REACH))
    successor, weight, total = (table.column(name).numpy() for name in ("successor", "successor_weight", "total"))
    marks = Marks.of((successor, weight, total), history.numpy(), Own.of([[3, 3, 7]] + [[]] * 5))
    dense = table.transitions(history).lifts(table.rows, TRANSITION_FLOOR)
    for user, rows in enumerate(marks.rows_BN):
        there = rows != END
        assert (np.diff(rows[there]) >= 0).all()
        for look, expected in zip(marks.lifts_3BN[:, user], dense, strict=True):
            shown = there & ~marks.hidden_BN[user]
            assert np.allclose(look[shown], expected[user, rows[shown]].numpy(), atol=1e-6)
            other = expected[user].numpy().copy()
            other[rows[there]] = 0
            assert not other.any()
    assert marks.hidden_BN[0].sum() == 3
    assert np.isneginf(marks.weighted(np.ones((6, LIFTS), np.float32))[0]).sum() == 3


@pytest.mark.parametrize("blocks", [1, 2])
def test_states_and_weights_are_those_of_the_network(blocks: int) -> None:
    """Of full histories, short ones, ones with a gap in them, and none."""
    length = 12
    network = Replica(Settings(dimension=DIMENSION, history_length=length, blocks=blocks), CPU).network.eval()
    draw = torch.Generator().manual_seed(2)
    rows = torch.randint(1, 50, (40, length), generator=draw)
    rows[torch.arange(length) < torch.randint(0, length + 1, (40, 1), generator=draw)] = 0
    rows[0], rows[1, -1], rows[2, 3] = 0, 0, 0
    histories = Histories(
        rows,
        torch.randint(1, 5, rows.shape, generator=draw) * (rows != 0),
        torch.randint(0, 32, rows.shape, generator=draw) * (rows != 0),
    )
    vectors = torch.randn(50, DIMENSION, generator=draw)
    vectors[0] = 0
    with torch.inference_mode():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.4)
        found = Encoder(network)(vectors, histories)
        states = network.states(vectors, rows, histories)
        expected = states, network.mixing_weights(histories)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("histories_tell", [False, True])
def test_what_counting_says_of_users_is_what_the_network_says(histories_tell: bool) -> None:
    """Of full histories, short ones and none, with and without a context."""
    given = Settings(dimension=DIMENSION, history_length=14)
    if histories_tell:
        given = given.model_copy(
            update={"classes": tuple(c.model_copy(update={"history": True}) for c in given.classes)}
        )
    network = Replica(given, CPU).network.eval()
    assert network.rates.histories_tell == histories_tell
    classes, draw = len(given.classes), torch.Generator().manual_seed(4)
    table = ItemTable(DIMENSION, SUCCESSORS, CPU, 0, classes=classes)
    table.allocate(f"item-{n}" for n in range(50))
    for name in ("classes", "audience"):
        table.column(name).copy_(torch.randint(0, 40, (table.rows, classes), generator=draw).float())
    rows = torch.randint(1, table.rows, (30, 14), generator=draw)
    rows[torch.arange(14) < torch.randint(0, 15, (30, 1), generator=draw)] = 0
    rows[0], rows[1, -1] = 0, 0
    filled = (rows != 0).long()
    histories = Histories(
        rows, torch.randint(1, classes + 1, rows.shape, generator=draw) * filled, torch.zeros_like(rows)
    )
    buckets = torch.randint(0, given.context_buckets, (30, 3), generator=draw)
    buckets[torch.rand(buckets.shape, generator=draw) < 0.5] = -1
    with torch.inference_mode():
        network.rates.class_counts.copy_(torch.rand(classes, generator=draw) * 90)
        network.rates.context_counts.copy_(torch.rand(network.rates.context_counts.shape, generator=draw) * 9)
        user_rates = UserRates(network)
        user_rates.install(table)
        context, rates = user_rates(histories, buckets)
        assert torch.allclose(context, network.context_vectors(buckets), atol=1e-6)
        assert torch.allclose(rates, network.user_rates(histories, table, buckets), atol=1e-4, rtol=1e-4)


def test_the_last_order_is_by_score_and_worth_and_ties_keep_the_order_of_scores() -> None:
    scores = np.array([[5, 4, 4, 3, HIDDEN], [5, 4, 3, 2, 1]], np.float32)
    worth = np.array([[-2, 0, 0, 1.5, 9], [0, 0, 0, 9, 9]], np.float32)
    rows = np.array([[7, 3, 8, 2, 0], [1, 2, 3, 4, 5]])
    final, chosen = in_final_order(scores, worth, rows, np.array([5, 3]), 4)
    # The second user has three candidates: what others want more for is not its own.
    assert chosen[0].tolist() == [2, 3, 8, 7]
    assert chosen[1, :3].tolist() == [1, 2, 3]
    assert final[0].tolist() == [4.5, 4, 4, 3]
    assert final[1, 3] <= HIDDEN / 2


def test_the_weighted_log_of_worth_is_the_networks() -> None:
    logits, worth = torch.randn(3, 4, 5), torch.tensor([0.0, 1.0, 2.0, 0.5, 4.0])
    network = Replica(Settings(dimension=DIMENSION), CPU).network
    expected = 0.5 * network.log_worth(logits, worth)
    assert np.allclose(log_worth(logits.numpy(), worth.numpy(), 0.5), expected.numpy(), atol=1e-5)


def test_candidates_that_worth_could_bring_forward_are_judged_and_no_others() -> None:
    scores = np.array([[5, 4, 3, 2], [5, 4, 3.9, 2], [5, 4, HIDDEN, HIDDEN], [5, 4, 3.9, 2]], np.float32)
    worth = np.array([[-0.5, 0], [-0.5, 0], [-9, -9], [-0.5, 0]], np.float32)
    own, wanted = np.array([4, 4, 4, 2]), np.array([2, 2, 2, 2])
    # The second best stands at 4: a candidate at 3 needs a worth above 1, one at 3.9 above 0.1; the last has two only.
    assert contested(scores, worth, own, wanted, 0.5).tolist() == [1]
    assert contested(scores, worth, own, wanted, 1.1).tolist() == [0, 1]
    assert contested(scores, worth, own, wanted, 0.05).tolist() == []
    assert contested(scores, worth, own, np.array([1, 1, 1, 1]), 0.05).tolist() == []


@pytest.mark.filterwarnings("ignore:(overflow|invalid):RuntimeWarning")
@pytest.mark.parametrize("parted", [True, False])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 3e38, 1e-38])
def test_numbers_beyond_all_bounds_end_and_harm_no_other_user(number: float, parted: bool) -> None:
    table = made_up(3000, 3)
    with torch.inference_mode():
        search, draw = Search(), torch.Generator().manual_seed(4)
        search.install(Items.of(table, parted=parted), table)
        mask = torch.zeros(table.rows, dtype=torch.bool)
        mask[PADDING_ROW] = True
        hidden = Hidden(mask, mask.nonzero()[:, 0])
        weights = torch.randn(5, 1 + STANDINGS + LIFTS, generator=draw)
        states = torch.randn(5, DIMENSION, generator=draw)
        history, own = torch.zeros(5, REACH, dtype=torch.int64), Own(np.empty(0, np.int64), np.zeros(5, np.int64))
        expected = search.find(weights, states, history, [hidden] * 5, own, 10)
        states[2, 1] = weights[2, 3] = number
        found = search.find(weights, states, history, [hidden] * 5, own, 10)
    others = [0, 1, 3, 4]
    assert torch.equal(found.rows_BK[others], expected.rows_BK[others])
    assert torch.equal(found.scores_BK[others], expected.scores_BK[others])


@pytest.mark.skipif(not lanes.WIDE, reason="no AVX-512 VNNI here: the other tests are of AVX2 already")
def test_processors_without_wide_sums_find_the_same() -> None:
    """The same tests as they run where there is AVX2 alone."""
    features = get_host_cpu_features().replace("+avx512vnni", "-avx512vnni")
    same = "no_sum_goes_round or best_are_those or lost_of_a_row"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", same],
        env={**os.environ, "NUMBA_CPU_FEATURES": features},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
