"""The scorer: every answer is what the arithmetic says of one whole version, and nothing hidden comes back."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import redis
import torch
from learning import CPU, START_MS, small
from numpy.typing import NDArray

from recsys.catalog import Catalog, CatalogMirror, CategoryFilter, Item
from recsys.encoding import RowHistory, encode_contexts
from recsys.errors import CorruptWeights, NotReady
from recsys.item_table import ItemTable
from recsys.network import Histories
from recsys.scorer import Answer, Query, ScoredItem, Scorer, search
from recsys.scorer.items import Items, looked_at_roughly
from recsys.scorer.partitions import Partitions
from recsys.settings import Settings
from recsys.standing import TREND_DECAYS
from recsys.store.v1.log_pb2 import HistoryEntry
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.v1.recommender_pb2 import SOURCE_NETWORK, SOURCE_TRANSITION, SOURCE_TRENDING
from recsys.weights import WeightPayload, encode
from recsys.weights import shared as shared_module
from recsys.weights.replica import Replica
from recsys.weights.shared import SharedWeights, create
from trainer.examples import Event
from trainer.examples import encode as encode_events
from trainer.learner import Learner

CYCLE = 30
ITEMS = 150
NOW_MS = START_MS + 10_000
VERSIONS = 4
SECONDS = 60


def walked(start: int, length: int) -> tuple[HistoryEntry, ...]:
    """Return the history of a user who went round the circle, item by item, second by second, until just now."""
    return tuple(
        HistoryEntry(
            item_id=f"item-{(start + place) % CYCLE}",
            feedback_class="click",
            time_ms=NOW_MS - 1000 * (length - place),
        )
        for place in range(length)
    )


def example(learner: Learner, history: tuple[HistoryEntry, ...], item: int, kind: int = 1) -> Event:
    row = learner.table.row
    rows = RowHistory([row(e.item_id) for e in history], [1] * len(history), [e.time_ms for e in history])
    return Event(row(f"item-{item}"), kind, NOW_MS, rows, {"page": "a"} if item % 2 else {})


def planted(settings: Settings) -> list[tuple[VersionRecord, WeightPayload, WeightPayload]]:
    """Learn a world where item n + 1 follows item n; return each version as a record, a delta and a whole copy."""
    learner = Learner(settings, CPU)
    draw = np.random.default_rng(5)
    versions: list[tuple[VersionRecord, WeightPayload, WeightPayload]] = []
    for version in range(1, VERSIONS + 1):
        first_new = learner.table.rows
        # Twenty more items are there from version 2 on, and so on: every version brings new rows.
        learner.allocate(f"item-{n}" for n in range(min(ITEMS, 90 + 20 * version)))
        for _ in range(40 if version == 1 else 3):
            events = []
            for _ in range(settings.batch_size):
                start = int(draw.integers(CYCLE))
                events.append(example(learner, walked(start, 5), (start + 5) % CYCLE, int(draw.integers(1, 4))))
            events[0] = example(learner, (), int(draw.integers(learner.table.rows - 1)))
            events[1] = example(learner, walked(3, 2), int(draw.integers(learner.table.rows - 1)), 0)
            learner.step(encode_events(events, settings))
        rows = learner.take_changed() if versions else torch.arange(learner.table.rows)
        delta, _ = learner.write(rows, first_new)
        record = VersionRecord(version=version, committed_ms=version, feedback_learned=version)
        versions.append((record, delta, learner.replica.write_all()))
        learner.take_changed()
    return versions


@pytest.fixture(scope="module")
def learning_settings() -> Settings:
    return small(
        Settings(),
        **{"dimension": 16, "batch_size": 16, "replay_size": 16, "replay_every": 16, "negatives": 32},
        **{"row_learning_rate": 0.2, "worth_weight": 0.75},
    )


@pytest.fixture(scope="module")
def versions(learning_settings: Settings) -> list[tuple[VersionRecord, WeightPayload, WeightPayload]]:
    return planted(learning_settings)


@pytest.fixture
def catalog(store: redis.Redis, settings: Settings) -> Catalog:
    return Catalog(store, settings)


@pytest.fixture
def mirror(catalog: Catalog) -> CatalogMirror:
    mirror = CatalogMirror(catalog)
    mirror.refresh()
    return mirror


Versions = list[tuple[VersionRecord, WeightPayload, WeightPayload]]


@pytest.fixture
def empty(learning_settings: Settings, mirror: CatalogMirror) -> Scorer:
    return Scorer(learning_settings, mirror, CPU)


@pytest.fixture
def scorer(empty: Scorer, versions: Versions) -> Scorer:
    record, _, whole = versions[-1]
    empty.load(record, whole)
    return empty


def ask(scorer: Scorer, **fields: object) -> list[ScoredItem]:
    query = Query(**{"history": walked(3, 5), **fields})  # type: ignore[arg-type]
    return list(scorer.answer([query], NOW_MS)[0].items)


def ids(items: list[ScoredItem]) -> list[str]:
    return [item.item_id for item in items]


def part(scorer: Scorer) -> None:
    """Prepare until no partitions are being found."""
    scorer.prepare()
    while scorer._parting is not None:
        wait([scorer._parting.found], SECONDS)
        scorer.prepare()


@pytest.fixture
def pair(learning_settings: Settings, mirror: CatalogMirror, request: pytest.FixtureRequest) -> Iterator[list[Scorer]]:
    """Two scorers that share weights, with a way of retrieval."""
    settings = learning_settings.model_copy(update={"retrieval": getattr(request, "param", "auto")})
    descriptors = create()
    shared = [SharedWeights(settings, descriptors) for _ in range(2)]
    yield [Scorer(settings, mirror, CPU, each) for each in shared]
    for each in shared:
        each.close()
    for descriptor in descriptors:
        os.close(descriptor)


def test_processes_that_share_weights_answer_alike(
    pair: list[Scorer], learning_settings: Settings, mirror: CatalogMirror, versions: Versions
) -> None:
    """One moves them; another, which looks at some versions only, finds the changed rows and the new items."""
    first, second = pair
    lone = Scorer(learning_settings, mirror, CPU)
    queries = [Query(history=walked(start, 4)) for start in range(6)]
    assert first.leads()
    for place, (record, delta, whole) in enumerate(versions):
        for each in (first, lone):
            if place:
                each.apply(record, delta)
            else:
                each.load(record, whole)
        # The one before the last goes by unseen.
        looking = [first] if place == len(versions) - 2 else [first, second]
        expected = lone.answer(queries, NOW_MS)
        for each in looking:
            assert [answer.version for answer in each.answer(queries, NOW_MS)] == [record.version] * len(queries)
            for found, answer in zip(each.answer(queries, NOW_MS), expected, strict=True):
                assert_same(list(found.items), [(item.item_id, item.score) for item in answer.items], 1e-5)


@pytest.mark.parametrize("pair", ["exact", "partitioned"], indirect=True)
@pytest.mark.parametrize("slow", [False, True])
def test_processes_that_share_weights_foresee_the_next(
    pair: list[Scorer], slow: bool, mirror: CatalogMirror, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All compute what they need of it before it is in place; what one has no time for it computes afterwards."""
    settings = pair[0]._settings
    moved: list[int] = []
    behind = Items.moved

    def counted(items: Items, table: ItemTable, changed_R: NDArray[np.int64]) -> Items:
        moved.append(len(changed_R))
        return behind(items, table, changed_R)

    monkeypatch.setattr(Items, "moved", counted)
    monkeypatch.setattr(shared_module, "READY_SECONDS", 0.05 if slow else SECONDS)
    monkeypatch.setattr(search, "SPREADS", 1e6)
    first, second = pair
    lone = Scorer(settings, mirror, CPU)
    queries = [Query(history=walked(start, 4)) for start in range(6)]
    assert first.leads()
    record, _, whole = versions[0]
    for each in (first, lone):
        each.load(record, whole)
    for each in pair:
        each.refresh()
        part(each)
    parted = settings.retrieval == "partitioned" and looked_at_roughly(CPU)
    assert len(moved) == (2 if parted else 0), "what was parted meanwhile is moved to where the weights are by then"
    moved.clear()
    done, one_at_a_time = threading.Event(), threading.Lock()

    def follow() -> None:
        while not done.wait(0.001):
            with one_at_a_time:
                if second.called() and not slow:
                    second.prepare()

    thread = threading.Thread(target=follow)
    thread.start()
    for record, delta, _ in versions[1:]:
        for each in (first, lone):
            each.apply(record, delta)
        expected = lone.answer(queries, NOW_MS)
        for each in pair:
            for found, answer in zip(each.answer(queries, NOW_MS), expected, strict=True):
                assert found.version == record.version
                assert_same(list(found.items), [(item.item_id, item.score) for item in answer.items], 1e-5)
            # More rows have come than there was room for in partitions.
            with one_at_a_time:
                part(each)
            assert each._items is not None
            assert (each._items.partitions is not None) == parted
    done.set()
    thread.join()
    if not parted:
        assert len(moved) == (VERSIONS - 1 if slow else 0)
    for each in pair:
        each.leave()


@pytest.mark.skipif(not looked_at_roughly(CPU), reason="no AVX2 here: nothing is looked at in partitions")
@pytest.mark.parametrize("pair", ["partitioned"], indirect=True)
@pytest.mark.parametrize("way", ["alone", "leads", "follows", "follows, and is late", "follows, and has foreseen it"])
def test_versions_go_on_while_partitions_are_found(
    pair: list[Scorer], mirror: CatalogMirror, way: str, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair if way != "alone" else [Scorer(pair[0]._settings, mirror, CPU)] * 2
    parting = first if way == "leads" else second
    (record, _, whole), (after, delta, _) = versions[-2:]
    first.load(record, whole)
    second.refresh()
    # Few enough to have room among so few.
    columns = {name: column[:20] for name, column in delta.columns.items()}
    delta = replace(delta, rows=delta.rows[:20], columns=columns)
    find, go_on = Partitions.of, threading.Event()

    def late(*arguments: Any) -> Partitions:
        assert go_on.wait(SECONDS)
        return find(*arguments)

    monkeypatch.setattr(Partitions, "of", late)
    parting.prepare()
    assert parting._items is not None
    assert parting._items.partitions is None
    if way == "follows, and has foreseen it":
        # They are found, and put in place while the version waits for what was foreseen without them.
        go_on.set()
        assert parting._parting is not None
        wait([parting._parting.found], SECONDS)
        foresee = first._foresee
        monkeypatch.setattr(first, "_foresee", lambda shared: (foresee(shared), parting.prepare()))
        first.apply(after, delta)
        parting.refresh()
        assert parting._parting is None, "else they are looked for again"
    parting.leave()
    if way == "follows, and is late":
        # The version comes while what changed is moved.
        move = Items.moved

        def moved(items: Items, table: ItemTable, changed_R: NDArray[np.int64]) -> Items:
            monkeypatch.setattr(Items, "moved", move)
            threading.Thread(target=first.apply, args=(after, delta)).start()
            until(lambda: first.version == after.version)
            return move(items, table, changed_R)

        monkeypatch.setattr(Items, "moved", moved)
        monkeypatch.setattr(shared_module, "READY_SECONDS", 0.0)
    elif first.version < after.version:
        first.apply(after, delta)
    go_on.set()
    if parting._parting is not None:
        part(parting)
    assert parting._items.partitions is not None
    assert parting.version == after.version
    assert parting._replica is not None
    assert parting._items.rough is not None
    places, vectors = parting._items.partitions.places, parting._replica.table.column("vector").numpy()
    known = parting._items.rough[0].read(np.arange(1, len(vectors)), places)
    assert np.linalg.norm(known - vectors[1:], axis=1).max() <= parting._items.rough[0].lost * 1.001
    # Rows are put in place as long as it takes, but not in place of another copy of the weights.
    if way == "alone":
        go_on.clear()
        first.load(record, whole)
        first.prepare()
        first.load(record, whole)
        go_on.set()
        assert first._parting is None
        part(first)
        assert first._items is not None
        assert first._items.partitions is not None


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# The arithmetic, item by item


class Plain:
    """Compute answers one item at a time; of the network only the layers' outputs are taken over."""

    def __init__(self, settings: Settings, whole: WeightPayload) -> None:
        self.settings = settings
        self.replica = Replica(settings, CPU)
        self.replica.apply(whole)
        self.replica.network.eval()
        self.columns = {name: tensor.tolist() for name, tensor in self.replica.table.columns.items()}
        self.ids = self.replica.table.item_ids

    def standing(self) -> list[list[float]]:
        """Return each row's log trends less the largest, of positive and of all feedback; its total and its age."""
        clock, columns = self.replica.table.clock, self.columns
        logs = [
            [
                math.log(count * TREND_DECAYS[s % 3] ** (clock - columns["touched"][row]) + 0.02)
                for s, count in enumerate(columns["trend"][row])
            ]
            for row in range(len(self.ids))
        ]
        return [
            [
                *(value - max(log[s] for log in logs) for s, value in enumerate(each)),
                0.5 * math.log(1 + columns["total"][row]),
                0.5 * math.log((1 + clock - columns["first"][row]) / (1 + clock)),
            ]
            for row, each in enumerate(logs)
        ]

    def follows(self, history: list[int], power: float = 0.5) -> dict[int, dict[int, float]]:
        """Return for each item that follows one of the history by how much it follows which."""
        found: dict[int, dict[int, float]] = {}
        for distance, row in enumerate(reversed(history[-20:]), 1):
            for item, weight in zip(self.columns["successor"][row], self.columns["successor_weight"][row], strict=True):
                if item:
                    by = weight / distance**power
                    found.setdefault(item, {})[row] = found.get(item, {}).get(row, 0.0) + by
        return found

    def rates(self, entries: list[int], buckets: list[int], row: int) -> list[float]:
        """Return how often each class comes, and how much more often with these entries, this context and item."""
        counts = self.replica.network.rates.class_counts.tolist()
        among = [(count + 1) / (sum(counts) + len(counts)) for count in counts]

        def above(own: list[float]) -> list[float]:
            return [math.log((n / rate + 5) / (sum(own) + 5)) for n, rate in zip(own, among, strict=True)]

        def mean(rows: list[list[float]]) -> list[float]:
            return [sum(each) / len(rows) for each in zip(*rows, strict=True)] if rows else [0.0] * len(among)

        audience = mean([above(self.columns["audience"][each]) for each in entries[-10:]])
        context = mean([above(self.replica.network.rates.context_counts[bucket].tolist()) for bucket in buckets])
        own, worth = self.columns["classes"][row], [c.worth for c in self.settings.classes]
        mean_worth = sum(rate * each for rate, each in zip(among, worth, strict=True))
        variance = sum(rate * (each - mean_worth) ** 2 for rate, each in zip(among, worth, strict=True))
        smooth = [(n + 5 * rate) / (sum(own) + 5) for n, rate in zip(own, among, strict=True)]
        deviation = (sum(rate * each for rate, each in zip(smooth, worth, strict=True)) - mean_worth) / variance
        of_user = [*map(math.log, among), *audience, *context, 0.0, math.log1p(len(entries)) / 4]
        return [*of_user, *above(own), deviation, math.log1p(sum(own)) / 4]

    @torch.no_grad()
    def scores(self, query: Query) -> tuple[list[float], list[float], list[list[float]]]:
        """Return each row's score, its final score with the log of its expected worth, and the score's parts.

        Parts are the network's, what follows and what stands, each less its average over items.
        """
        network, table, settings = self.replica.network, self.replica.table, self.settings
        length = settings.history_length
        known = [
            e for e in query.history[-length:] if table.row(e.item_id) and e.feedback_class in settings.class_index
        ]
        rows = [table.row(e.item_id) for e in known]
        empty = [0] * (length - len(known))
        histories = Histories(
            torch.tensor([empty + rows]),
            torch.tensor([empty + [1 + settings.class_index[e.feedback_class] for e in known]]),
            torch.tensor([empty + [((NOW_MS - e.time_ms) // 1000).bit_length() for e in known]]),
        )
        vectors = table.columns["vector"][: len(self.ids)]
        state = network.states(vectors, histories.rows_BL, histories)[0]
        weights = network.mixing_weights(histories)[0].tolist()
        encoded = torch.from_numpy(encode_contexts([query.context], settings))
        context, buckets = (
            network.context_vectors(encoded)[0],
            [bucket for bucket in encoded[0].tolist() if bucket >= 0],
        )
        standing, near, nearest = self.standing(), self.follows(rows, 0.5), self.follows(rows, 2.5)
        scores, final, parts = [], [], []
        for row in range(len(self.ids)):
            network_part = weights[0] * float(state.double() @ vectors[row].double())
            standing_part = sum(weight * value for weight, value in zip(weights[1:-3], standing[row], strict=True))
            often, next_to = (sum(follows.get(row, {}).values()) for follows in (near, nearest))
            looks = often, next_to, often * 10 / (10 + float(self.columns["total"][row]))
            follows_part = sum(w * math.log1p(look / 0.1) for w, look in zip(weights[-3:], looks, strict=True))
            parts.append([network_part, follows_part, standing_part])
            score = network_part + follows_part + standing_part
            rates = torch.tensor(self.rates(rows, buckets, row))
            logits = network.class_logits(state, vectors[row], torch.tensor(standing[row]), context, rates)
            worth = sum(p * c.worth for p, c in zip(logits.softmax(0).tolist(), settings.classes, strict=True))
            scores.append(score)
            final.append(score + settings.worth_weight * math.log(worth + 1e-6))
        for part in (0, 2):
            average = sum(each[part] for each in parts[1:]) / (len(parts) - 1)
            for each in parts:
                each[part] -= average
        return scores, final, parts

    def answer(self, query: Query) -> list[tuple[str, float]]:
        """Return the best items and their scores."""
        scores, final, _ = self.scores(query)
        table = self.replica.table
        hidden = {0, *map(table.row, query.exclude)}
        hidden |= set() if query.allow_seen else {table.row(entry.item_id) for entry in query.history}
        shown = sorted((row for row in range(len(self.ids)) if row not in hidden), key=lambda row: -scores[row])
        best = sorted(shown[: max(100, query.count)], key=lambda row: -final[row])[: query.count]
        return [(self.ids[row], final[row]) for row in best]


def assert_same(items: list[ScoredItem], expected: list[tuple[str, float]], tolerance: float = 2e-4) -> None:
    """Compare scores, and items wherever the next score is not as good as equal."""
    assert len(items) == len(expected)
    assert [item.score for item in items] == pytest.approx([score for _, score in expected], abs=tolerance)
    for place, (item, (_, score)) in enumerate(zip(items, expected, strict=True)):
        near = [other for other, value in expected if abs(value - score) < 2 * tolerance]
        assert item.item_id in near or place == len(items) - 1


QUERIES = (
    Query(walked(3, 5)),
    Query(walked(28, 5), count=25, context={"page": "a"}),
    Query(walked(11, 2), exclude=frozenset({"item-13", "item-77", "no such item"})),
    Query(walked(0, 12), count=3, allow_seen=True),
    Query((), count=40),
    Query((*walked(7, 2), HistoryEntry(item_id="gone", feedback_class="click", time_ms=NOW_MS)), count=5),
    Query((HistoryEntry(item_id="item-4", feedback_class="purchase", time_ms=NOW_MS - 86_400_000),)),
)


def test_answers_are_what_the_arithmetic_says(scorer: Scorer, versions: Versions, learning_settings: Settings) -> None:
    plain = Plain(learning_settings, versions[-1][2])
    together = scorer.answer(QUERIES, NOW_MS)
    for query, answer in zip(QUERIES, together, strict=True):
        assert_same(list(answer.items), plain.answer(query))
        assert [a.score >= b.score for a, b in pairwise(answer.items)] == [True] * (len(answer.items) - 1)


def test_an_answer_does_not_depend_on_who_else_asks(
    mirror: CatalogMirror, versions: Versions, learning_settings: Settings
) -> None:
    """What one user gets is not chosen from the more candidates that another one's answer needs."""
    scorer = Scorer(learning_settings.model_copy(update={"worth_weight": 10.0}), mirror, CPU)
    scorer.load(versions[-1][0], versions[-1][2])
    query = Query(walked(3, 5), count=100)
    alone = scorer.answer([query], NOW_MS)[0]
    greedy = Query(walked(20, 3), count=ITEMS)
    for others in ([Query(())] * 7, [replace(query, candidates=("item-1",))], [greedy], [greedy, *QUERIES]):
        beside = scorer.answer([*others, query], NOW_MS)[-1]
        assert ids(list(beside.items)) == ids(list(alone.items))
        assert [i.score for i in beside.items] == pytest.approx([i.score for i in alone.items], abs=1e-4)
        assert [(i.source, i.because) for i in beside.items] == [(i.source, i.because) for i in alone.items]


# What must not come back


def test_what_the_user_has_is_not_shown_again(scorer: Scorer) -> None:
    """All of the history counts, not only the part that the network sees."""
    history = walked(0, 20)
    found = ids(ask(scorer, history=history, count=ITEMS))
    assert len(found) == len(set(found)) == ITEMS - 20
    assert not {e.item_id for e in history} & set(found)
    assert len(ids(ask(scorer, history=history, count=ITEMS, allow_seen=True))) == ITEMS
    excluded = frozenset(found[:5])
    assert set(ids(ask(scorer, history=history, count=ITEMS, exclude=excluded))) == set(found) - excluded


@pytest.mark.parametrize(("count", "length"), [(1, 1), (7, 7), (ITEMS + 50, ITEMS - 5), (10_000, ITEMS - 5)])
def test_as_many_as_there_are(scorer: Scorer, count: int, length: int) -> None:
    assert len(ask(scorer, count=count)) == length


def test_no_items_at_all(empty: Scorer, learning_settings: Settings) -> None:
    empty.load(VersionRecord(version=1), Replica(learning_settings, CPU).write_all())
    assert empty.answer([Query(walked(0, 3)), Query(())], NOW_MS) == [Answer(1, []), Answer(1, [])]
    (item,) = empty.answer([Query((), candidates=("x",))], NOW_MS)[0].items
    assert not item.known


def numbers(items: list[ScoredItem]) -> set[int]:
    return {int(item.item_id.removeprefix("item-")) for item in items}


@pytest.mark.parametrize(
    ("categories", "passes"),
    [
        (CategoryFilter(any_of=frozenset({"three", "five"})), lambda n: n < 60 and (n % 3 == 0 or n % 5 == 0)),
        (CategoryFilter(all_of=frozenset({"three", "five"})), lambda n: n < 60 and n % 15 == 0),
        (CategoryFilter(none_of=frozenset({"three"})), lambda n: n >= 60 or n % 3 != 0),
        (
            CategoryFilter(frozenset({"three"}), frozenset({"low"}), frozenset({"five"})),
            lambda n: n < 30 and n % 3 == 0 and n % 5 != 0,
        ),
        (CategoryFilter(any_of=frozenset({"nothing"})), lambda n: False),
        (CategoryFilter(none_of=frozenset({"nothing"})), lambda n: True),
        (CategoryFilter(), lambda n: True),
    ],
)
def test_filters(
    scorer: Scorer, catalog: Catalog, mirror: CatalogMirror, categories: CategoryFilter, passes: object
) -> None:
    assert callable(passes)
    catalog.upsert(
        [
            Item(
                f"item-{n}",
                categories=tuple(
                    name for name, true in (("three", n % 3 == 0), ("five", n % 5 == 0), ("low", n < 30)) if true
                ),
            )
            for n in range(60)
        ]
    )
    catalog.upsert([Item("item-without-feedback", categories=("three", "five", "low"))])
    # The mask of this filter from before the catalogue was filled must not be used after it.
    ask(scorer, filter=categories)
    mirror.refresh()
    for _ in range(2):
        found = ask(scorer, history=(), count=ITEMS, filter=categories)
        assert numbers(found) == {n for n in range(ITEMS) if passes(n)}
    seen = ask(scorer, history=walked(0, 4), count=ITEMS, filter=categories)
    assert numbers(seen) == {n for n in range(4, ITEMS) if passes(n)}


def test_deleted_items_never_come_back(scorer: Scorer, catalog: Catalog, mirror: CatalogMirror) -> None:
    best = ids(ask(scorer, count=20))
    catalog.upsert([Item(best[1], categories=("c",)), Item(best[2], categories=("c",))])
    catalog.delete(best[:2])
    assert ids(ask(scorer, count=20)) == best
    mirror.refresh()
    assert ids(ask(scorer, count=20))[:18] == best[2:]
    assert ids(ask(scorer, count=20, allow_seen=True, filter=CategoryFilter(any_of=frozenset({"c"})))) == best[2:3]
    catalog.upsert([Item(best[0])])
    mirror.refresh()
    assert ids(ask(scorer, count=19)) == [best[0], *best[2:]]


# Sources and reasons


@pytest.mark.parametrize(
    "history", [(), (HistoryEntry(item_id="item-of-nobody", feedback_class="click", time_ms=NOW_MS),)]
)
def test_who_is_unknown_gets_what_is_trending(scorer: Scorer, history: tuple[HistoryEntry, ...]) -> None:
    items = ask(scorer, history=history, count=ITEMS)
    assert len(items) == ITEMS
    assert {(item.source, item.because) for item in items} == {(SOURCE_TRENDING, None)}


def test_a_planted_habit_is_found_and_explained(
    scorer: Scorer, versions: Versions, learning_settings: Settings
) -> None:
    plain = Plain(learning_settings, versions[-1][2])
    sources, first = [], []
    for start in range(CYCLE):
        history = walked(start, 5)
        items = ask(scorer, history=history, count=10)
        first.append((items[0].item_id == f"item-{(start + 5) % CYCLE}", items[0].source))
        rows = [plain.replica.table.row(e.item_id) for e in history]
        follows = plain.follows(rows)
        parts = plain.scores(Query(history))[2]
        for item in items:
            row = plain.replica.table.row(item.item_id)
            sources.append(item.source)
            said = dict(zip((SOURCE_NETWORK, SOURCE_TRANSITION, SOURCE_TRENDING), parts[row], strict=True))
            if row not in follows:
                del said[SOURCE_TRANSITION]
            assert said[item.source] == pytest.approx(max(said.values()), abs=2e-4)
            if item.source == SOURCE_TRANSITION:
                assert follows[row], f"{item.item_id} never followed anything in the history"
                most = max(follows[row], key=follows[row].__getitem__)
                assert item.because == plain.ids[most]
            else:
                assert item.because is None
    assert {SOURCE_TRANSITION, SOURCE_NETWORK} <= set(sources)
    assert sum(hit and source in (SOURCE_NETWORK, SOURCE_TRANSITION) for hit, source in first) > 0.8 * CYCLE


def test_no_reason_is_made_up(scorer: Scorer, versions: Versions, learning_settings: Settings) -> None:
    """Whatever is said to follow something of the history has followed it, for every item there is."""
    plain = Plain(learning_settings, versions[-1][2])
    for length in (1, 3, 5):
        history = walked(8, length)
        follows = plain.follows([plain.replica.table.row(e.item_id) for e in history])
        for item in ask(scorer, history=history, count=ITEMS, allow_seen=True):
            if item.source == SOURCE_TRANSITION:
                assert plain.replica.table.row(item.item_id) in follows


# Candidates


def test_candidates(scorer: Scorer, versions: Versions, learning_settings: Settings) -> None:
    plain = Plain(learning_settings, versions[-1][2])
    wanted = ("item-9", "never seen", "item-4", "item-9", "item-140")
    answer = scorer.answer([Query(walked(3, 5)), Query(walked(3, 5), candidates=wanted), Query(())], NOW_MS)[1]
    assert ids(list(answer.items)) == list(wanted)
    assert [item.known for item in answer.items] == [True, False, True, True, True]
    _, final, _ = plain.scores(Query(walked(3, 5)))
    for item in answer.items:
        assert list(item.class_probabilities) == [c.name for c in learning_settings.classes]
        assert sum(item.class_probabilities.values()) == pytest.approx(1.0, abs=1e-5)
        if item.known:
            assert item.score == pytest.approx(final[plain.replica.table.row(item.item_id)], abs=2e-4)
    recommended = {item.item_id: item.score for item in ask(scorer, count=ITEMS, allow_seen=True)}
    assert answer.items[0].score == pytest.approx(recommended["item-9"], abs=1e-5)


# Versions


def test_nothing_is_answered_before_the_first_version(empty: Scorer) -> None:
    assert (empty.version, empty.status.items) == (0, 0)
    with pytest.raises(NotReady):
        empty.answer([Query(())])


def test_status(scorer: Scorer) -> None:
    status = scorer.status
    assert (status.version, status.committed_ms) == (VERSIONS, VERSIONS)
    assert (status.items, status.feedback_learned) == (ITEMS, VERSIONS)


def test_the_first_answer_of_a_version_is_told_once(empty: Scorer, versions: Versions) -> None:
    told: list[int] = []
    empty.on_first_answer = told.append
    for record, delta, whole in versions[:2]:
        empty.load(record, whole) if record.version == 1 else empty.apply(record, delta)
        assert told == list(range(1, record.version))
        for _ in range(3):
            empty.answer([Query(()), Query(())])
        assert told == list(range(1, record.version + 1))


def test_deltas_lead_to_the_same_bits_as_a_whole_copy(
    empty: Scorer, mirror: CatalogMirror, versions: Versions, learning_settings: Settings
) -> None:
    replica = Replica(learning_settings, CPU)
    for record, delta, whole in versions:
        replica.apply(delta)
        assert encode(replica.write_all()) == encode(whole)
        empty.load(record, delta) if record.version == 1 else empty.apply(record, delta)
        other = Scorer(learning_settings, mirror, CPU)
        other.load(record, whole)
        assert empty.answer(QUERIES, NOW_MS) == other.answer(QUERIES, NOW_MS)
    assert len(versions[1][1].rows) < len(versions[1][2].rows)


@pytest.mark.parametrize("from_whole", [True, False])
def test_items_in_partitions_give_the_same_answers(
    empty: Scorer, mirror: CatalogMirror, versions: Versions, learning_settings: Settings, from_whole: bool
) -> None:
    """So few items have one partition, at which everyone looks."""
    parted = Scorer(learning_settings.model_copy(update={"retrieval": "partitioned"}), mirror, CPU)
    for record, delta, whole in versions:
        for each in (empty, parted):
            if record.version == 1 or from_whole:
                each.load(record, whole)
            else:
                each.apply(record, delta)
        part(parted)
        assert parted._items is not None
        assert (parted._items.partitions is not None) == looked_at_roughly(CPU)
        assert parted.answer(QUERIES, NOW_MS) == empty.answer(QUERIES, NOW_MS)


def damaged(payload: WeightPayload) -> Iterator[tuple[str, WeightPayload]]:
    dense, columns = dict(payload.dense), dict(payload.columns)
    yield "a dense tensor is missing", replace(payload, dense={k: v for k, v in dense.items() if k != "mix.bias"})
    yield "a dense tensor is unknown", replace(payload, dense={**dense, "other": np.zeros(1, np.float32)})
    yield "a shape is wrong", replace(payload, dense={**dense, "mix.bias": np.zeros(1, np.float32)})
    yield "a dtype is wrong", replace(payload, dense={**dense, "mix.bias": dense["mix.bias"].astype(np.float64)})
    yield "a column is missing", replace(payload, columns={k: v for k, v in columns.items() if k != "total"})
    yield "a row is not in use", replace(payload, rows=[*payload.rows[:-1].tolist(), 5000])  # type: ignore[arg-type]
    yield "a new row leaves a gap", replace(payload, new_items=[("new", 4000)])
    yield "an item is not new", replace(payload, new_items=[("item-0", len(columns["total"]) + 1)])


def test_what_does_not_fit_is_refused_and_changes_nothing(
    empty: Scorer, versions: Versions, learning_settings: Settings
) -> None:
    (first, _, whole), (second, delta, _), *_ = versions
    empty.load(first, whole)
    before, status = empty.answer(QUERIES, NOW_MS), empty.status
    for what, payload in damaged(delta):
        bad = replace(payload, rows=np.asarray(payload.rows, np.int32))
        with pytest.raises(CorruptWeights):
            empty.apply(second, bad)
        assert empty.answer(QUERIES, NOW_MS) == before, what
        assert empty.status == status
    for what, payload in damaged(whole):
        bad = replace(payload, rows=np.asarray(payload.rows, np.int32))
        if what == "an item is not new":
            # To a whole copy every item is new.
            continue
        with pytest.raises(CorruptWeights):
            empty.load(second, bad)
        assert empty.answer(QUERIES, NOW_MS) == before, what
    empty.apply(second, delta)
    assert empty.version == 2


def test_a_version_of_the_same_number_and_other_items(scorer: Scorer, versions: Versions) -> None:
    """What was kept for a version is not used for another of its number, as after a store that began anew."""
    assert len(ask(scorer, history=(), count=ITEMS)) == ITEMS
    scorer.load(versions[-1][0], versions[0][2])
    assert numbers(ask(scorer, history=(), count=ITEMS)) == set(range(110))
    assert scorer.status.items == 110


def test_a_whole_version_may_follow_changes(
    empty: Scorer, mirror: CatalogMirror, versions: Versions, learning_settings: Settings
) -> None:
    """As after a rollback, and changes after it again; each answers as if it had been the first."""
    empty.load(versions[0][0], versions[0][2])
    for place, payload in ((1, versions[1][1]), (0, versions[0][2]), (1, versions[1][1]), (2, versions[2][1])):
        empty.apply(versions[place][0], payload)
        alone = Scorer(learning_settings, mirror, CPU)
        alone.load(versions[place][0], versions[place][2])
        assert empty.answer(QUERIES, NOW_MS) == alone.answer(QUERIES, NOW_MS)


def test_an_answer_comes_from_one_version(
    empty: Scorer, mirror: CatalogMirror, versions: Versions, learning_settings: Settings
) -> None:
    """Move between versions as fast as possible while others ask: each answer is that of the version it names."""
    expected: dict[int, Answer] = {}
    for record, _, whole in versions:
        offline = Scorer(learning_settings, mirror, CPU)
        offline.load(record, whole)
        (expected[record.version],) = offline.answer(QUERIES[:1], NOW_MS)
    assert len({str(answer.items) for answer in expected.values()}) == VERSIONS
    empty.load(versions[0][0], versions[0][2])
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            for record, delta, _ in versions[1:]:
                empty.apply(record, delta)
            empty.load(versions[0][0], versions[0][2])

    mover = threading.Thread(target=move)
    mover.start()
    try:
        found = [empty.answer(QUERIES[:1], NOW_MS)[0] for _ in range(300)]
    finally:
        stop.set()
        mover.join()
    for answer in found:
        assert answer == expected[answer.version]
    assert len({answer.version for answer in found}) > 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: the scorer's answers on CUDA are not compared")
def test_cuda_answers_alike(
    scorer: Scorer, mirror: CatalogMirror, versions: Versions, learning_settings: Settings
) -> None:
    other = Scorer(learning_settings, mirror, torch.device("cuda"))
    for record, delta, whole in versions:
        other.load(record, whole) if record.version == 1 else other.apply(record, delta)
    wanted = Query(walked(3, 5), candidates=("item-9", "never seen"))
    for ours, theirs in zip(
        scorer.answer([*QUERIES, wanted], NOW_MS), other.answer([*QUERIES, wanted], NOW_MS), strict=True
    ):
        assert_same(list(theirs.items), [(item.item_id, item.score) for item in ours.items], tolerance=2e-3)
