"""Items come, go and come back in whatever order: an id has its own row or none, on the trainer and on every replica.

The rows' class counts are witnesses: they must be those of the item's own feedback since it got the row, counted from
the log by a model of a few lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import invariant, run_state_machine_as_test
from learning import CPU, START_MS, Proxy, append, replica, small, trainer
from prometheus_client import CollectorRegistry
from test_state_machine import Life

from recsys.feedback import Feedback
from recsys.feedback_log import BEGINNING, position_key
from recsys.item_table import ItemTable
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights import WeightStore, encode
from recsys.weights.earlier import ROLLBACK
from recsys.weights.replica import Replica

EXAMPLES, STEPS = 6, 30
BOUNDED = {"max_items": 5, "item_expiry": 9, "item_admission": 2}


def check_rows(table: ItemTable) -> None:
    """Assert that items and rows find each other, and that nothing is left in free rows or leads to them."""
    ids = table.item_ids
    free = set(table.free_rows.tolist())
    assert table.free_rows.tolist() == sorted(row for row in range(1, table.rows) if not ids[row])
    assert len(table) == table.rows - 1 - len(free)
    assert [table.row(item_id) for item_id in ids if item_id] == [row for row in range(1, table.rows) if ids[row]]
    for row in free:
        assert not any(column[row].any() for column in table.columns.values()), "something is left in a free row"
    assert not free & set(table.column("successor").flatten().tolist()), "a free row is said to follow"


def check_witnesses(table: ItemTable, learned: Sequence[tuple[str, int]]) -> None:
    """Assert that each row counts the feedback learned on its own item since it has the row, and nothing else."""
    assert table.clock == len(learned)
    for row in range(1, table.rows):
        if item_id := table.item_ids[row]:
            since = learned[int(table.columns["first"][row]) :]
            counts = Counter(index for each, index in since if each == item_id)
            expected = [counts[index] for index in range(table.columns["classes"].shape[1])]
            assert table.columns["classes"][row].tolist() == expected, item_id


class ItemLife(Life):
    """Drive what Life drives where items need two feedback to get one of a few rows, and lose it again soon."""

    freed = returned = 0

    def __init__(self) -> None:
        super().__init__()
        kept = {**BOUNDED, "snapshots_retained": 100, "snapshot_every_bytes": 30_000}
        self.base = self.base.model_copy(update=kept)
        self.through = self.through.model_copy(update=kept)
        self.weights = WeightStore(self.client, self.base)
        # Where each version ends, and what it has learned in order: item and class. The first has learned nothing.
        self.ends = {1: position_key(BEGINNING)}
        self.learned: dict[int, list[tuple[str, int]]] = {1: []}
        self.followed, self.followed_version = Replica(self.base, CPU), 0
        self.had: set[str] = set()

    @invariant()
    def every_id_has_its_own_row_or_none(self) -> None:
        if not self.followed_version and (first := self.weights.load_snapshot(at_most=1)):
            self.followed.apply(first.payload)
            self.followed_version = 1
        for delta in self.weights.read_after(self.followed_version, count=1000) if self.followed_version else ():
            before = {*self.followed.table.item_ids}
            self.followed.apply(delta.payload)
            self.followed_version = delta.record.version
            self._learn(delta.record)
            check_rows(self.followed.table)
            check_witnesses(self.followed.table, self.learned[self.followed_version])
            now = {*self.followed.table.item_ids}
            ItemLife.freed += len(before - now)
            ItemLife.returned += len((now - before) & self.had)
            self.had |= before
        if self.followed_version:
            assert encode(replica(self.base).write_all()) == encode(self.followed.write_all())
        if self.daemon is not None:
            check_rows(self.daemon.learner.table)

    def make(self, number: int) -> list[Feedback]:
        """Make feedback on items that come, go, and come back."""
        batch = [
            replace(one, item_id=f"item-{len(self.sent) // 10 % 4 + n % 4}")
            for n, one in enumerate(super().make(number))
        ]
        self.sent |= {one.feedback_id: one for one in batch}
        return batch

    def _learn(self, record: VersionRecord) -> None:
        self.ends[record.version] = end = position_key(record.position)
        if record.kind == ROLLBACK:
            self.learned[record.version] = self.learned[record.restored_version]
            return
        start, index = self.ends[record.parent], self.base.class_index
        entries = zip(self.positions, self.accepted, strict=True)
        new = [self.sent[name] for position, name in entries if start < position_key(position) <= end]
        self.learned[record.version] = [
            *self.learned[record.parent],
            *((each.item_id, index[each.feedback_class]) for each in new),
        ]


@pytest.fixture
def _proxied(embedded_store: EmbeddedStore) -> Iterator[None]:
    with Proxy(embedded_store.url) as proxy, connect(Settings(redis_url=embedded_store.url)) as client:
        client.flushall()
        ItemLife.url, ItemLife.proxy = embedded_store.url, proxy
        yield


@pytest.mark.usefixtures("_proxied")
def test_whatever_happens_an_item_has_its_own_row_or_none() -> None:
    bounded = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(ItemLife, settings=bounded)
    assert min(ItemLife.freed, ItemLife.returned) > 0, "no row was ever passed on"


def test_items_are_admitted_expire_and_come_back_by_hand(settings: Settings) -> None:
    base = small(settings, item_admission=3, item_expiry=4)
    registry, users = CollectorRegistry(), count()

    def learn(items: str) -> tuple[Sequence[str], float | None, float | None]:
        """Have somebody click each of these items, two batches of a version; tell who has rows and what is counted."""
        append(base, [Feedback(f"user-{next(users)}", item, "click", START_MS) for item in items])
        while daemon.step():
            pass
        skipped = registry.get_sample_value("recsys_feedback_skipped_total", {"reason": "not_admitted"})
        return daemon.learner.table.item_ids[1:], skipped, registry.get_sample_value("recsys_items_expired_total")

    with trainer(base, registry=registry) as daemon:
        daemon.start()
        table = daemon.learner.table
        # With its third click an item gets a row, and its clicks count from the batch on that this one is in.
        assert learn("abca" + "abcd") == (["a"], 7, 0)
        assert table.columns["classes"][1].tolist() == [0, 1, 0, 0]
        assert table.clock == 8
        assert learn("dbce" + "dbce") == (["a", "b", "c", "d"], 10, 0)
        # Nothing was on a for more than four feedback when this version begins; it is back at once, and begins anew.
        assert learn("bcda" + "bcda") == (["a", "b", "c", "d"], 10, 1)
        assert table.columns["classes"][1].tolist() == [0, 2, 0, 0]
        assert learn("eeee" + "eeee") == (["a", "b", "c", "d", "e"], 10, 1)
        assert learn("eeee" + "eeee") == (["", "", "", "", "e"], 10, 5)
