"""Recommendation ids: what is put in comes out again, and any other text is unknown."""

from __future__ import annotations

import base64
import uuid

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys.recommendation_id import MOST_POSITIONS, Place, issue, parse
from recsys.settings import Settings
from recsys.v1 import recommender_pb2

SOURCES = [number for number in recommender_pb2.Source.values() if number]
item_ids = st.lists(st.text(min_size=1, max_size=20), unique=True, max_size=MOST_POSITIONS + 10)


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.integers(1, 1 << 50), item_ids, st.data())
def test_an_id_says_what_was_shown(version: int, ids: list[str], data: st.DataObject) -> None:
    sources = data.draw(st.lists(st.sampled_from(SOURCES), min_size=len(ids), max_size=len(ids)))
    found = parse(issue(version, ids, sources))
    assert found is not None
    assert found.version == version
    assert len(found.items) == min(len(ids), MOST_POSITIONS)
    for position, item_id in enumerate(ids[:MOST_POSITIONS]):
        place = found.place(item_id)
        assert place is not None
        # Another item's hash may be the same, rarely: then the first of them counts.
        assert place == Place(position, sources[position]) or place.position < position


def test_ten_items_are_told_apart_and_from_others() -> None:
    shown = [f"item-{number}" for number in range(10)]
    sources = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    found = parse(issue(7, shown, sources))
    assert found is not None
    assert [found.place(item_id) for item_id in shown] == [Place(p, s) for p, s in enumerate(sources)]
    mistaken = sum(found.place(f"item-{number}") is not None for number in range(10, 10_010))
    assert mistaken < 20  # 6 in 10,000 expected


def test_every_source_of_the_protocol_fits() -> None:
    for source in SOURCES:
        found = parse(issue(1, ["a"], [source]))
        assert found is not None
        assert found.place("a") == Place(0, source)


def test_ids_are_short_different_and_fit_the_limit_of_ids() -> None:
    ids, sources = [f"item-{number}" for number in range(1000)], [1] * 1000
    assert len(issue(1, ids[:10], sources)) == 51
    assert len({issue(1, ids[:10], sources) for _ in range(1000)}) == 1000
    assert len(issue(1, ids, sources)) <= Settings().max_id_bytes
    for limit in (24, 25, 30, 64, 100):
        text = issue(1, ids, sources, limit)
        assert len(text) <= limit
        found = parse(text)
        assert found is not None
        assert found.place(ids[0]) == (Place(0, 1) if limit >= 27 else None)


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=300), st.binary(max_size=200).map(lambda b: base64.urlsafe_b64encode(b).decode())))
def test_other_texts_are_unknown(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize("at", range(0, 51, 5))
def test_a_changed_id_is_unknown(at: int) -> None:
    text = issue(5, [f"item-{number}" for number in range(10)], [1] * 10)
    changed = text[:at] + ("B" if text[at] == "A" else "A") + text[at + 1 :]
    assert parse(changed) is None


def test_ids_of_before_are_unknown() -> None:
    assert not any(parse(uuid.uuid4().hex) for _ in range(1000))
