"""The replica: a version written and read is the same version, deltas add up, and what does not fit changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from recsys.errors import CorruptWeights
from recsys.settings import Settings, load
from recsys.weights import WeightPayload, decode, encode
from recsys.weights.replica import CLOCK, SERVED_COLUMNS, Replica, items_of, to_array, to_tensor

CPU = torch.device("cpu")


def _settings(**values: Any) -> Settings:
    small = {"dimension": 8, "history_length": 4, "successors": 3, "context_buckets": 16}
    return load({**small, **values}, environment={})


def _learned(seed: int, items: int = 6) -> Replica:
    """A replica in which nothing is as it was made."""
    replica = Replica(_settings(), CPU)
    replica.table.allocate(f"item-{i}" for i in range(1, items + 1))
    _learn(replica, seed)
    return replica


def _learn(replica: Replica, seed: int, rows: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in replica.network.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    table = replica.table
    changed = torch.tensor(rows or range(1, table.rows))
    for name in SERVED_COLUMNS:
        column = table.columns[name]
        values = torch.randint(1, 100, (len(changed), *column.shape[1:]), generator=generator)
        column[changed] = values.to(column.dtype)
    table.clock += seed


def _bytes(replica: Replica) -> bytes:
    return encode(replica.write_all())


def test_a_version_written_and_read_is_the_same() -> None:
    replica, other = _learned(3), Replica(_settings(seed=99), CPU)
    assert _bytes(other) != _bytes(replica)
    other.apply(decode(_bytes(replica)))
    assert _bytes(other) == _bytes(replica)
    assert other.table.clock == 3
    assert other.table.item_ids == replica.table.item_ids
    assert [other.table.row(f"item-{i}") for i in range(8)] == [0, 1, 2, 3, 4, 5, 6, 0]
    for name, tensor in replica.network.state_dict().items():
        assert torch.equal(other.network.state_dict()[name], tensor), name
    for name in SERVED_COLUMNS:
        assert torch.equal(other.table.column(name), replica.table.column(name)), name


def test_everything_in_the_table_is_served() -> None:
    assert set(SERVED_COLUMNS) == set(Replica(_settings(), CPU).table.columns)


def test_two_replicas_start_the_same() -> None:
    assert _bytes(Replica(_settings(), CPU)) == _bytes(Replica(_settings(batch_size=9), CPU))
    assert _bytes(Replica(_settings(), CPU)) != _bytes(Replica(_settings(seed=2), CPU))


def test_deltas_add_up() -> None:
    replica = _learned(1)
    follower = Replica(_settings(), CPU)
    follower.apply(decode(_bytes(replica)))
    published = len(replica.table)
    for seed, rows, new in [(2, (1, 4), []), (3, (2, 7, 8), ["a", "b"]), (4, (9,), ["c"]), (5, (), [])]:
        replica.table.allocate(new)
        _learn(replica, seed, rows or (1,))
        changed = torch.tensor(sorted({*(rows or (1,)), *range(published + 1, replica.table.rows)}))
        delta = encode(replica.write(changed, items_of(replica.table, published + 1)))
        published = len(replica.table)
        follower.apply(decode(delta))
        assert _bytes(follower) == _bytes(replica)
    assert len(delta) < len(_bytes(replica))


def test_what_is_made_ready_changes_nothing_until_it_is_put() -> None:
    learner, one, other = _learned(3), Replica(_settings(), CPU), Replica(_settings(), CPU)
    for replica in (one, other):
        replica.apply(decode(_bytes(learner)))
    for step in range(4):
        new = learner.table.allocate([f"new-{step}"])
        rows = (2, 5, learner.table.rows - 1)
        _learn(learner, 7 + step, rows)
        payload = decode(encode(learner.write(torch.tensor(rows), new)))
        before, network = _bytes(one), one.network
        one.check(payload)
        ready = one.ready(payload)
        assert _bytes(one) == before
        one.put(payload, ready)
        # Whoever still holds the network of the version before has all of it.
        assert one.network is not network
        other.apply(payload)
        assert _bytes(one) == _bytes(other) == _bytes(learner) != before


def test_a_delta_holds_the_given_rows_and_items() -> None:
    replica = _learned(1)
    payload = replica.write(torch.tensor([2, 5]), [("item-6", 6)])
    assert payload.rows.tolist() == [2, 5]
    assert payload.new_items == [("item-6", 6)]
    for name in SERVED_COLUMNS:
        np.testing.assert_array_equal(payload.columns[name], replica.table.columns[name][[2, 5]].numpy())
    assert payload.dense[CLOCK].tolist() == [1]
    assert set(payload.dense) == {*replica.network.state_dict(), CLOCK}


def test_what_is_written_no_longer_changes() -> None:
    replica = _learned(1)
    payload = replica.write_all()
    before = encode(payload)
    _learn(replica, 2)
    assert encode(payload) == before


def test_what_was_read_may_change() -> None:
    replica = Replica(_settings(), CPU)
    data = _bytes(_learned(1))
    replica.apply(decode(data))
    _learn(replica, 2)
    assert _bytes(_learned(1)) == data


def test_items_of() -> None:
    table = _learned(1, items=3).table
    assert items_of(table) == [("item-1", 1), ("item-2", 2), ("item-3", 3)]
    assert items_of(table, 3) == [("item-3", 3)]
    assert items_of(table, 4) == []


def test_arrays_and_tensors() -> None:
    read_only = np.frombuffer(np.array([1, 2], ">i4").tobytes(), ">i4")
    tensor = to_tensor(read_only, CPU)
    tensor += 1
    assert tensor.tolist() == [2, 3]
    array = to_array(tensor)
    tensor += 1
    assert array.tolist() == [2, 3]


def _without(part: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {k: v for k, v in part.items() if k != name}


WRONG: dict[str, tuple[Callable[[WeightPayload], WeightPayload], str]] = {
    "dense missing": (lambda p: replace(p, dense=_without(p.dense, "position")), "position"),
    "dense too much": (lambda p: replace(p, dense={**p.dense, "x": np.zeros(1, np.float32)}), "'x'"),
    "clock missing": (lambda p: replace(p, dense=_without(p.dense, CLOCK)), CLOCK),
    "clock shape": (lambda p: replace(p, dense={**p.dense, CLOCK: np.zeros(2, np.int64)}), CLOCK),
    "clock dtype": (lambda p: replace(p, dense={**p.dense, CLOCK: np.zeros(1)}), CLOCK),
    "dense shape": (lambda p: replace(p, dense={**p.dense, "position": np.zeros((5, 8), np.float32)}), "position"),
    "dense dtype": (lambda p: replace(p, dense={**p.dense, "position": np.zeros((4, 8), np.float64)}), "position"),
    "column missing": (lambda p: replace(p, columns=_without(p.columns, "total")), "total"),
    "column too much": (lambda p: replace(p, columns={**p.columns, "x": p.columns["total"]}), "'x'"),
    "column width": (lambda p: replace(p, columns={**p.columns, "vector": p.columns["vector"][:, :7]}), "vector"),
    "column dtype": (lambda p: replace(p, columns={**p.columns, "total": p.columns["touched"]}), "total"),
    "column length": (lambda p: replace(p, columns={**p.columns, "total": p.columns["total"][:1]}), "total"),
    "row not in use": (lambda p: replace(p, rows=np.array([2, 8], np.int32)), "row 8 is not in use"),
    "gap in new items": (lambda p: replace(p, new_items=[("new", 8)]), "do not continue"),
    "item known": (lambda p: replace(p, new_items=[("item-2", 7)]), "already has a row"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_fit_is_refused_and_changes_nothing(kind: str) -> None:
    change, problem = WRONG[kind]
    source = _learned(2)
    source.table.allocate(["new"])
    good = source.write(torch.tensor([2, 5]), [("new", 7)])
    replica = _learned(1)
    before = _bytes(replica)
    with pytest.raises(CorruptWeights, match=problem):
        replica.apply(change(good))
    assert _bytes(replica) == before
    replica.apply(good)
    assert replica.table.row("new") == 7
