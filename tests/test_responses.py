"""Responses written as bytes are what the protobuf library makes of the same columns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys.catalog import Catalog, CatalogMirror, Item
from recsys.item_rows import ItemRows
from recsys.recommendation_id import MOST_POSITIONS, Place, most_items, parse
from recsys.scorer import Answer, Lists, RankedItems, ScoredItem, Scores
from recsys.service.responses import RecommendResponses, score_response, scored_item
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.v1 import recommender_pb2

NUMBERS = st.floats(allow_nan=False, width=64)
# As long as ids and names may be, in characters of one to four bytes.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64)


@st.composite
def drawn_scores(draw: st.DrawFn) -> Scores:
    item_ids = draw(st.lists(TEXTS, max_size=6))
    classes = draw(st.lists(TEXTS, min_size=1, max_size=5, unique=True))
    shape = len(item_ids), len(classes)
    known_K = np.array(draw(st.lists(st.booleans(), min_size=shape[0], max_size=shape[0])), bool)
    shares = draw(st.lists(NUMBERS, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    parts_KP = np.zeros((shape[0], 5))
    parts_KP[:, 0] = draw(st.lists(NUMBERS, min_size=shape[0], max_size=shape[0]))
    return Scores(item_ids, known_K, classes, np.array(shares).reshape(shape), parts_KP)


@given(scores=drawn_scores(), version=st.integers(0, 2**63 - 1))
def test_the_bytes_of_scores_are_the_library_s(scores: Scores, version: int) -> None:
    expected = recommender_pb2.ScoreResponse(items=map(scored_item, scores), version=version)
    assert recommender_pb2.ScoreResponse.FromString(score_response(scores, version)) == expected


def test_long_ids_and_many_classes_take_longer_lengths() -> None:
    classes = [f"class-{number}-{'x' * 50}" for number in range(400)]
    item_ids = ["i" * 256, "ü" * 128, "a"]
    shares_KC = np.random.default_rng(1).random((3, len(classes)))
    scores = Scores(item_ids, np.array([True, False, True]), classes, shares_KC, np.ones((3, 5)))
    found = recommender_pb2.ScoreResponse.FromString(score_response(scores, 7))
    assert found == recommender_pb2.ScoreResponse(items=map(scored_item, scores), version=7)
    assert [item.item_id for item in found.items] == item_ids
    assert found.items[2].class_probabilities[classes[399]] == shares_KC[2, 399]
    assert found.items[0].score == 4.0


def test_columns_tell_of_each_what_an_object_would() -> None:
    scores = Scores(
        ["a", "b"], np.array([True, False]), ["click"], np.array([[0.25], [0.5]]), np.arange(10.0).reshape(2, 5)
    )
    first, second = scores
    assert (first.item_id, first.score, first.known, first.class_probabilities) == ("a", 6.0, True, {"click": 0.25})
    assert second.parts is not None
    assert (second.parts.network, second.parts.content, second.known) == (5.0, 9.0, False)
    assert list(scores[1:]) == [second]


# By row. Every other one has a title, short or long.
IDS = ["", "a", "item-2", "ü" * 128, "x" * 256, "日本", *(f"item-{row}" for row in range(6, 100))]
TITLES = {item_id: item_id[:3] + "'s title" * (1 + row % 40) for row, item_id in enumerate(IDS) if row % 2}
NETWORK, TRANSITION, TRENDING = (
    recommender_pb2.Source.Value(f"SOURCE_{n}") for n in ("NETWORK", "TRANSITION", "TRENDING")
)


@pytest.fixture(params=[False, True], ids=["without titles", "with titles"])
def mirror(settings: Settings, request: pytest.FixtureRequest) -> CatalogMirror:
    with connect(settings) as client:
        catalog = Catalog(client, settings)
        if request.param:
            catalog.upsert([Item(item_id, TITLES.get(item_id, "")) for item_id in IDS[1:]])
        mirror = CatalogMirror(catalog)
        mirror.refresh()
    return mirror


@st.composite
def drawn_lists(draw: st.DrawFn) -> Lists:
    users, longest = draw(st.integers(1, 4)), draw(st.integers(0, 80))
    rows_BM = np.array([draw(st.permutations(range(1, 100)))[:longest] for _ in range(users)], np.int64)
    shape = users, longest
    draws = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    sources_BM = draws.choice([NETWORK, TRANSITION, TRENDING], shape)
    because_BM = np.where(sources_BM == TRANSITION, draws.integers(0, 100, shape), 0)
    scores_BM = draws.normal(size=shape).astype(np.float32)
    wanted_B = draws.integers(0, longest + 2, users)
    rows = ItemRows()
    rows.extend(IDS[1:])
    return Lists.of(rows.index, rows_BM.reshape(shape), scores_BM, sources_BM, because_BM, wanted_B)


def reason(item: ScoredItem, mirror: CatalogMirror) -> str:
    if item.source == TRANSITION:
        if item.because is None:
            return "often follows what is in your history"
        return f"often follows '{mirror.title(item.because) or item.because}' in your history"
    return "fits what you chose recently" if item.source == NETWORK else "chosen by many at present"


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lists=drawn_lists(), version=st.integers(1, 2**56 - 1), max_bytes=st.sampled_from([24, 51, 256]))
def test_the_bytes_of_recommendations_are_the_library_s(
    mirror: CatalogMirror, lists: Lists, version: int, max_bytes: int
) -> None:
    responses = RecommendResponses(mirror, max_bytes)
    for user in range(len(lists.counts_B)):
        items = RankedItems(lists, user)
        found = recommender_pb2.RecommendResponse.FromString(responses.of(Answer(version, items)))
        assert found == recommender_pb2.RecommendResponse(
            recommendation_id=found.recommendation_id,
            version=version,
            items=[
                recommender_pb2.RecommendedItem(
                    item_id=item.item_id, score=item.score, source=item.source, reason=reason(item, mirror)
                )
                for item in items
            ],
        )
        assert [item.item_id for item in items] == [IDS[row] for row in items.rows]
        told = parse(found.recommendation_id)
        assert told is not None
        assert len(found.recommendation_id) <= max_bytes
        assert (told.version, len(told.items)) == (version, min(len(items), most_items(max_bytes), MOST_POSITIONS))
        for position, item in enumerate(items[: len(told.items)]):
            place = told.place(item.item_id)
            assert place is not None
            assert place == Place(position, item.source) or place.position < position


def test_items_stay_what_they_were_when_others_get_their_rows() -> None:
    rows = ItemRows()
    rows.extend(["a", "b", "c"])
    one = np.ones((1, 1), np.int64)
    lists = Lists.of(rows.index, one, np.zeros((1, 1), np.float32), TRANSITION * one, 2 * one, np.array([1]))
    rows.assign([1, 2], ["another", "more"])
    assert RankedItems(lists, 0) == [ScoredItem("a", 0.0, TRANSITION, "b")]
