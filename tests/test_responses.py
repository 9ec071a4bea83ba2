"""Responses written as bytes are what the protobuf library makes of the same columns."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys.scorer import Scores
from recsys.service.responses import score_response, scored_item
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
