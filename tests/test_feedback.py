"""Feedback: what is refused and why, and that nothing changes on the way through messages and records."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import Violation
from recsys.feedback import Feedback, check, from_wire, parse_record, to_entry, to_record, to_wire
from recsys.settings import load
from recsys.store.v1.log_pb2 import FeedbackRecord, History, HistoryEntry
from recsys.v1 import recommender_pb2

NOW = 1_700_000_000_000
SETTINGS = load(environment={})
GOOD = Feedback("u", "i", "click", time_ms=NOW)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ID = TEXT.filter(bool)
FEEDBACK = st.builds(
    Feedback,
    user_id=ID,
    item_id=ID,
    feedback_class=ID,
    time_ms=st.integers(0, 253_402_300_799_999),
    value=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    feedback_id=TEXT,
    recommendation_id=TEXT,
    context=st.dictionaries(TEXT, TEXT, max_size=4),
)


@pytest.mark.parametrize(
    "feedback",
    [
        GOOD,
        replace(GOOD, time_ms=0),
        replace(GOOD, time_ms=NOW + 300_000),
        replace(GOOD, user_id="ä" * 128, item_id="x" * 256, feedback_id="x" * 256, recommendation_id="x" * 256),
        replace(GOOD, value=-1.5),
        replace(GOOD, context={str(i): "x" * 256 for i in range(20)}),
        *(replace(GOOD, feedback_class=name) for name in ("impression", "like", "purchase")),
    ],
)
def test_good_feedback_passes(feedback: Feedback) -> None:
    assert check(feedback, SETTINGS, NOW) is None


@pytest.mark.parametrize(
    ("feedback", "field", "description"),
    [
        (replace(GOOD, user_id=""), "user_id", "is empty; give 1 to 256 bytes"),
        (replace(GOOD, item_id=""), "item_id", "is empty; give 1 to 256 bytes"),
        (replace(GOOD, user_id="ä" * 129), "user_id", "has 258 bytes; at most 256 are allowed"),
        (replace(GOOD, item_id="x" * 257), "item_id", "has 257 bytes; at most 256 are allowed"),
        (replace(GOOD, feedback_id="x" * 257), "feedback_id", "has 257 bytes; at most 256 are allowed"),
        (replace(GOOD, recommendation_id="x" * 257), "recommendation_id", "has 257 bytes; at most 256 are allowed"),
        (
            replace(GOOD, context={str(i): "" for i in range(21)}),
            "context",
            "has 21 pairs; at most 20 are allowed",
        ),
        (
            replace(GOOD, context={"k": "x" * 257}),
            "context",
            "has a key or value of 257 bytes; at most 256 are allowed",
        ),
        (
            replace(GOOD, context={"x" * 257: "v"}),
            "context",
            "has a key or value of 257 bytes; at most 256 are allowed",
        ),
        (
            replace(GOOD, feedback_class="klick"),
            "feedback_class",
            "'klick' is unknown; allowed are impression, click, like, purchase",
        ),
        (replace(GOOD, value=math.nan), "value", "nan is not a finite number"),
        (replace(GOOD, value=-math.inf), "value", "-inf is not a finite number"),
        (replace(GOOD, time_ms=-1), "time", "lies before 1970"),
        (
            replace(GOOD, time_ms=NOW + 301_000),
            "time",
            "lies 301 s ahead of the server's clock; at most 300 s are allowed",
        ),
    ],
)
def test_bad_feedback_is_refused_with_the_reason(feedback: Feedback, field: str, description: str) -> None:
    assert check(feedback, SETTINGS, NOW) == Violation(field, description)


@given(FEEDBACK)
def test_messages_keep_everything(feedback: Feedback) -> None:
    message = recommender_pb2.Feedback.FromString(to_wire(feedback).SerializeToString())
    assert from_wire(message) == feedback


def test_a_message_tells_absent_from_zero() -> None:
    assert from_wire(recommender_pb2.Feedback()) == Feedback("", "", "")
    assert from_wire(to_wire(replace(GOOD, value=0.0))).value == 0.0
    assert not to_wire(replace(GOOD, time_ms=0)).HasField("time")
    assert not to_wire(GOOD).HasField("value")


@given(FEEDBACK, st.lists(FEEDBACK, max_size=5))
def test_entries_behind_a_record_are_its_history(feedback: Feedback, earlier: list[Feedback]) -> None:
    data = to_record(feedback).SerializeToString() + b"".join(to_entry(e) for e in earlier)
    record = parse_record(data)
    entries = [HistoryEntry(item_id=e.item_id, feedback_class=e.feedback_class, time_ms=e.time_ms) for e in earlier]
    assert record == to_record(feedback, entries)
    assert list(History.FromString(b"".join(to_entry(e) for e in earlier)).history) == entries


@given(FEEDBACK)
def test_records_keep_everything(feedback: Feedback) -> None:
    record = parse_record(to_record(feedback).SerializeToString())
    assert record is not None
    assert (
        Feedback(
            record.user_id,
            record.item_id,
            record.feedback_class,
            time_ms=record.time_ms,
            value=record.value if record.HasField("value") else None,
            feedback_id=record.feedback_id,
            recommendation_id=record.recommendation_id,
            context=dict(record.context),
        )
        == feedback
    )


@pytest.mark.parametrize("field", ["user_id", "item_id", "feedback_class"])
def test_a_record_without_what_it_is_about_is_malformed(field: str) -> None:
    record = to_record(GOOD)
    record.ClearField(field)
    assert parse_record(record.SerializeToString()) is None


@given(st.binary(max_size=40))
def test_any_bytes_are_a_record_or_none(data: bytes) -> None:
    record = parse_record(data)
    assert record is None or isinstance(record, FeedbackRecord)
