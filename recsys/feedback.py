"""Feedback: one user-item event, validated, to and from the wire and the log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from recsys.errors import Violation
from recsys.settings import Settings
from recsys.store.v1 import log_pb2
from recsys.v1 import recommender_pb2

# Of what is refused, as much is quoted.
ECHOED_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Feedback:
    """Hold what one user did with one item; `time_ms` is milliseconds since 1970, 0 = not given."""

    user_id: str
    item_id: str
    feedback_class: str
    time_ms: int = 0
    value: float | None = None
    feedback_id: str = ""
    recommendation_id: str = ""
    context: Mapping[str, str] = field(default_factory=dict)
    # The span that appends it, by W3C Trace Context; "" where nothing is traced.
    traceparent: str = ""


def from_wire(message: recommender_pb2.Feedback) -> Feedback:
    """Read a Feedback message as it came over gRPC; nothing is checked yet."""
    return Feedback(
        user_id=message.user_id,
        item_id=message.item_id,
        feedback_class=message.feedback_class,
        time_ms=message.time.ToMilliseconds() if message.HasField("time") else 0,
        value=message.value if message.HasField("value") else None,
        feedback_id=message.feedback_id,
        recommendation_id=message.recommendation_id,
        context=dict(message.context),
    )


def to_wire(feedback: Feedback) -> recommender_pb2.Feedback:
    """Write a Feedback as the message that LogFeedback takes."""
    message = recommender_pb2.Feedback(
        feedback_id=feedback.feedback_id,
        user_id=feedback.user_id,
        item_id=feedback.item_id,
        feedback_class=feedback.feedback_class,
        value=feedback.value,
        recommendation_id=feedback.recommendation_id,
        context=feedback.context,
    )
    if feedback.time_ms:
        message.time.FromMilliseconds(feedback.time_ms)
    return message


def to_record(feedback: Feedback, history: Iterable[log_pb2.HistoryEntry] = ()) -> log_pb2.FeedbackRecord:
    """Write a Feedback as the log's record, with the history it was given in, oldest first."""
    return log_pb2.FeedbackRecord(
        feedback_id=feedback.feedback_id,
        user_id=feedback.user_id,
        item_id=feedback.item_id,
        feedback_class=feedback.feedback_class,
        value=feedback.value,
        time_ms=feedback.time_ms,
        recommendation_id=feedback.recommendation_id,
        context=feedback.context,
        traceparent=feedback.traceparent or None,
        history=history,
    )


def parse_record(data: bytes) -> log_pb2.FeedbackRecord | None:
    """Parse a record of the log; None when the bytes are not one or it lacks its user, item or class."""
    try:
        record = log_pb2.FeedbackRecord.FromString(data)
    except DecodeError:
        return None
    return record if record.user_id and record.item_id and record.feedback_class else None


def parse_item(data: bytes) -> log_pb2.ItemRecord | None:
    """Parse what the log says of an item; None when the bytes do not."""
    try:
        record = log_pb2.ItemRecord.FromString(data)
    except DecodeError:
        return None
    return record if record.item_id else None


def to_entry(feedback: Feedback) -> bytes:
    """Write the history entry that a feedback leaves: bytes that join with others into a History."""
    entry = log_pb2.HistoryEntry(
        item_id=feedback.item_id, feedback_class=feedback.feedback_class, time_ms=feedback.time_ms
    )
    return log_pb2.History(history=[entry]).SerializeToString()


def check_id(name: str, value: str, limit: int, *, empty: bool = False) -> Violation | None:
    """Check one id: present (unless `empty` is allowed) and at most `limit` bytes."""
    if not value:
        return None if empty else Violation(name, "is empty; give 1 to " + f"{limit} bytes")
    size = len(value.encode())
    return Violation(name, f"has {size} bytes; at most {limit} are allowed") if size > limit else None


def check_context(context: Mapping[str, str], settings: Settings) -> Violation | None:
    """Check the number of pairs and their sizes."""
    if len(context) > settings.max_context:
        return Violation("context", f"has {len(context)} pairs; at most {settings.max_context} are allowed")
    for key, value in context.items():
        for part in (key, value):
            if len(part.encode()) > settings.max_id_bytes:
                return Violation(
                    "context",
                    f"has a key or value of {len(part.encode())} bytes; at most {settings.max_id_bytes} are allowed",
                )
    return None


def check(feedback: Feedback, settings: Settings, now_ms: int) -> Violation | None:
    """Return the first thing wrong with a feedback, or None.

    `now_ms` is the server's clock in milliseconds since 1970.
    """
    limit = settings.max_id_bytes
    violation = (
        check_id("user_id", feedback.user_id, limit)
        or check_id("item_id", feedback.item_id, limit)
        or check_id("feedback_id", feedback.feedback_id, limit, empty=True)
        or check_id("recommendation_id", feedback.recommendation_id, limit, empty=True)
        or check_context(feedback.context, settings)
    )
    if violation:
        return violation
    if feedback.feedback_class not in settings.class_index:
        allowed = ", ".join(c.name for c in settings.classes)
        given = feedback.feedback_class[:ECHOED_CHARACTERS]
        return Violation("feedback_class", f"{given!r} is unknown; allowed are {allowed}")
    if feedback.value is not None and not math.isfinite(feedback.value):
        return Violation("value", f"{feedback.value} is not a finite number")
    if feedback.time_ms < 0:
        return Violation("time", "lies before 1970")
    ahead = (feedback.time_ms - now_ms) / 1000
    if ahead > settings.max_future_seconds:
        return Violation(
            "time",
            f"lies {ahead:.0f} s ahead of the server's clock; at most {settings.max_future_seconds:.0f} s are allowed",
        )
    return None
