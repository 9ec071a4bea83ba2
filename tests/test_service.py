"""RecommenderService over a socket: what it answers and what it refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from calls import (
    SECONDS,
    Request,
    click,
    log,
    recommend,
    recommender,
    violations,
)
from serving import ITEMS, WAYS, Running, serve

from recsys.histories import Histories
from recsys.recommendation_id import Place, parse
from recsys.settings import load
from recsys.store.embedded import EmbeddedStore
from recsys.v1 import catalog_pb2, model_pb2, recommender_pb2
from recsys.v1.catalog_pb2_grpc import CatalogServiceStub
from recsys.v1.model_pb2_grpc import ModelServiceStub


@pytest.fixture(scope="module", params=WAYS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shared_server(embedded_store: EmbeddedStore, transport: str) -> Iterator[Running]:
    flags = {"redis_url": embedded_store.url, "port": 0, "metrics_port": 0, **WAYS[transport]}
    with serve(load(flags, environment={})) as running:
        yield running


@pytest.fixture
def running(shared_server: Running) -> Running:
    """A server that serves version 1 over an empty store."""
    shared_server.reset()
    return shared_server


def test_a_new_user_is_served_with_what_is_trending(running: Running) -> None:
    answer = recommend(running)
    assert [item.item_id for item in answer.items] == list(ITEMS[:10])
    assert [item.score for item in answer.items] == [-float(rank) for rank in range(10)]
    assert {(item.source, item.reason) for item in answer.items} == {
        (recommender_pb2.SOURCE_TRENDING, "chosen by many at present")
    }
    assert answer.version == 1
    found = parse(answer.recommendation_id)
    assert found is not None
    assert found.version == answer.version
    assert [found.place(item.item_id) for item in answer.items] == [
        Place(position, item.source) for position, item in enumerate(answer.items)
    ]
    assert recommend(running).recommendation_id != answer.recommendation_id


def test_feedback_is_counted_by_where_its_item_stood(running: Running) -> None:
    answer = recommend(running, user_id="new", count=12)

    def count(**labels: str) -> float:
        return running.value("recsys_recommendation_feedback_total", **labels)

    trending = {"source": "trending", "outcome": "positive"}
    before = [
        count(position="1", **trending),
        count(position="11+", **trending),
        count(source="trending", outcome="not_positive", position="4-5"),
        count(source="other", outcome="positive", position="other"),
        running.value("recsys_recommendation_version_feedback_total", versions_behind="0", outcome="positive"),
        running.value("recsys_recommendation_version_feedback_total", versions_behind="unknown", outcome="positive"),
    ]
    first, fourth, last = (answer.items[position].item_id for position in (0, 3, 11))
    of = {"recommendation_id": answer.recommendation_id}
    log(
        running,
        click(item_id=first, feedback_id="f", **of),
        click(item_id=last, **of),
        click(item_id=fourth, feedback_class="impression", **of),
        click(item_id="never shown", **of),
        # Not issued by this software; of no recommendation; refused; and sent once more.
        click(item_id=first, recommendation_id="0f" * 16),
        click(item_id=first),
        click(item_id=first, feedback_class="nonsense", **of),
    )
    log(running, click(item_id=first, feedback_id="f", **of))
    after = [
        count(position="1", **trending),
        count(position="11+", **trending),
        count(source="trending", outcome="not_positive", position="4-5"),
        count(source="other", outcome="positive", position="other"),
        running.value("recsys_recommendation_version_feedback_total", versions_behind="0", outcome="positive"),
        running.value("recsys_recommendation_version_feedback_total", versions_behind="unknown", outcome="positive"),
    ]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1, 1, 2, 3, 1]


def test_requests_are_counted_by_what_is_known_of_the_user(running: Running) -> None:
    def counts() -> list[float]:
        return [running.value("recsys_scored_requests_total", history=known) for known in ("known", "empty")]

    before = counts()
    recommend(running, user_id="somebody")
    log(running, click(user_id="somebody"))
    recommend(running, user_id="somebody")
    recommend(running, user_id="nobody")
    assert [new - old for new, old in zip(counts(), before, strict=True)] == [1, 2]


def test_a_click_changes_the_next_answer_and_is_its_reason(running: Running) -> None:
    log(running, click("item-0"))
    first, second, third = recommend(running, count=3).items
    assert [first.item_id, second.item_id, third.item_id] == ["item-1", "item-2", "item-3"]
    assert first.reason == "often follows 'item-0' in your history"
    assert second.reason == "fits what you chose recently"
    assert third.reason == "chosen by many at present"
    CatalogServiceStub(running.channel).UpsertItems(
        catalog_pb2.UpsertItemsRequest(items=[catalog_pb2.Item(item_id="item-0", title="Toy Story (1995)")])
    )
    assert running.mirror.refresh()
    assert recommend(running).items[0].reason == "often follows 'Toy Story (1995)' in your history"


def test_every_option_reaches_the_scorer(running: Running) -> None:
    log(running, click("item-0"))
    answer = recommend(running, count=2, exclude_item_ids=["item-1"], allow_seen=True)
    assert [item.item_id for item in answer.items] == ["item-0", "item-2"]
    assert len(recommend(running, count=1000).items) == 1000


def test_answers_of_one_batch_reach_their_callers(running: Running) -> None:
    stub = recommender(running)
    calls = [
        stub.Recommend.future(Request(user_id=f"u{n}", count=1, exclude_item_ids=ITEMS[:n]), timeout=SECONDS)
        for n in range(40)
    ]
    assert [call.result().items[0].item_id for call in calls] == list(ITEMS[:40])
    assert sum(running.scorer.batches) == 40
    assert max(running.scorer.batches) <= running.settings.max_score_batch


def test_candidates_are_scored_in_the_order_asked_for(running: Running) -> None:
    request = recommender_pb2.ScoreRequest(user_id="u", item_ids=["new", "item-1"])
    answer = recommender(running).Score(request, timeout=SECONDS)
    assert [(i.item_id, i.score, i.known, dict(i.class_probabilities)) for i in answer.items] == [
        ("new", 0.0, False, {"click": 0.25, "like": 0.75}),
        ("item-1", -1.0, True, {"click": 0.25, "like": 0.75}),
    ]
    assert answer.version == 1


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({"user_id": ""}, "user_id", "is empty; give 1 to 256 bytes"),
        ({"user_id": "é" * 129}, "user_id", "has 258 bytes; at most 256 are allowed"),
        ({"count": 1001}, "count", "is 1001; at most 1000 is allowed"),
        ({"count": 0}, "count", "is 0; give 1 to 1000, or leave it out for the default"),
        ({"exclude_item_ids": ["a"] * 10_001}, "exclude_item_ids", "has 10001 entries; at most 10000 are allowed"),
        ({"exclude_item_ids": ["a", ""]}, "exclude_item_ids[1]", "is empty; give 1 to 256 bytes"),
        ({"filter": {"any_of": ["c"] * 101}}, "filter.any_of", "has 101 entries; at most 100 are allowed"),
        ({"filter": {"all_of": [""]}}, "filter.all_of[0]", "is empty; give 1 to 256 bytes"),
        ({"filter": {"none_of": ["c" * 257]}}, "filter.none_of[0]", "has 257 bytes; at most 256 are allowed"),
        ({"context": {str(n): "" for n in range(21)}}, "context", "has 21 pairs; at most 20 are allowed"),
        ({"context": {"k": "v" * 257}}, "context", "has a key or value of 257 bytes; at most 256 are allowed"),
    ],
)
def test_recommend_refuses(running: Running, fields: dict[str, Any], field: str, text: str) -> None:
    assert violations(lambda: recommend(running, **fields)) == {field: text}
    assert running.scorer.batches == []


def test_every_fault_of_a_request_is_named_up_to_a_bound(running: Running) -> None:
    assert list(violations(lambda: recommend(running, user_id="", count=5000))) == ["user_id", "count"]
    assert len(violations(lambda: recommend(running, exclude_item_ids=[""] * 5000))) == 20


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"user_id": ""}, "user_id"),
        ({"item_ids": []}, "item_ids"),
        ({"item_ids": ["a"] * 1001}, "item_ids"),
        ({"item_ids": ["a", "b" * 257]}, "item_ids[1]"),
        ({"context": {"k" * 257: "v"}}, "context"),
    ],
)
def test_score_refuses(running: Running, fields: dict[str, Any], field: str) -> None:
    request = recommender_pb2.ScoreRequest(**{"user_id": "u", "item_ids": ["a"], **fields})
    assert list(violations(lambda: recommender(running).Score(request, timeout=SECONDS))) == [field]


# --- LogFeedback


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({"user_id": ""}, "user_id", "empty"),
        ({"item_id": "i" * 257}, "item_id", "257 bytes"),
        ({"feedback_id": "f" * 257}, "feedback_id", "257 bytes"),
        ({"recommendation_id": "r" * 257}, "recommendation_id", "257 bytes"),
        ({"feedback_class": "wave"}, "feedback_class", "allowed are impression, click, like, purchase"),
        ({"feedback_class": ""}, "feedback_class", "unknown"),
        ({"value": float("nan")}, "value", "nan is not a finite number"),
        ({"value": float("-inf")}, "value", "-inf is not a finite number"),
        ({"time": {"seconds": int(time.time()) + 100_000}}, "time", "ahead of the server's clock"),
        ({"time": {"seconds": -1}}, "time", "before 1970"),
        ({"time": {"seconds": 10**18}}, "time", "outside the years 1 to 9999"),
        ({"time": {"nanos": -5}}, "time", "nanoseconds are outside"),
        ({"context": {str(n): "" for n in range(21)}}, "context", "21 pairs"),
    ],
)
def test_a_faulty_feedback_is_refused_alone(running: Running, fields: dict[str, Any], field: str, text: str) -> None:
    before = running.value("recsys_feedback_refused_total", field=field)
    answer = log(running, click("item-1"), click(**fields), click("item-2"))
    assert (answer.accepted, answer.refused) == (2, 1)
    assert [(r.index, r.accepted) for r in answer.results] == [(0, True), (1, False), (2, True)]
    assert answer.results[1].field == field
    assert text in answer.results[1].refusal
    assert running.value("recsys_feedback_refused_total", field=field) == before + 1
    assert [e.item_id for e in Histories(running.store, running.settings).read(["u"])[0]] == ["item-1", "item-2"]


def test_a_call_with_nothing_to_accept_reaches_no_log(running: Running) -> None:
    answer = log(running, click(user_id=""))
    assert (answer.accepted, answer.refused, answer.results[0].field) == (0, 1, "user_id")
    assert running.store.dbsize() == 0


@pytest.mark.parametrize("count", [0, 1001])
def test_an_empty_or_oversized_list_is_refused(running: Running, count: int) -> None:
    assert list(violations(lambda: log(running, *[click()] * count))) == ["feedback"]
    assert running.store.dbsize() == 0


def test_a_feedback_id_counts_once(running: Running) -> None:
    accepted = running.value("recsys_feedback_accepted_total")
    duplicate = running.value("recsys_feedback_duplicate_total")
    once = click(feedback_id="f-1")
    assert [(r.accepted, r.duplicate) for r in log(running, once, once).results] == [(True, False), (True, True)]
    assert [(r.accepted, r.duplicate) for r in log(running, once).results] == [(True, True)]
    assert ModelServiceStub(running.channel).GetStatus(model_pb2.GetStatusRequest()).log_records == 1
    assert running.value("recsys_feedback_accepted_total") == accepted + 1
    assert running.value("recsys_feedback_duplicate_total") == duplicate + 2


def test_results_of_concurrent_calls_reach_their_callers(running: Running) -> None:
    stub = recommender(running)
    log(running, *[click(feedback_id=f"old-{n}") for n in range(0, 30, 3)])
    calls = [
        stub.LogFeedback.future(
            recommender_pb2.LogFeedbackRequest(feedback=[click(), click(feedback_id=f"old-{n}"), click(item_id="")]),
            timeout=SECONDS,
        )
        for n in range(30)
    ]
    for n, call in enumerate(calls):
        results = [(r.accepted, r.duplicate) for r in call.result().results]
        assert results == [(True, False), (True, n % 3 == 0), (False, False)]
