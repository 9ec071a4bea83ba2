"""Histories against a real store: order, the cap, and forgetting."""

from __future__ import annotations

import redis

from recsys.feedback import Feedback
from recsys.feedback_log import BEGINNING, FeedbackLog
from recsys.histories import Histories
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.v1.log_pb2 import History, HistoryEntry


def test_everything_kept_comes_back_oldest_first(store: redis.Redis, settings: Settings) -> None:
    FeedbackLog(store, settings).append(
        [
            Feedback("u", "a", "click", time_ms=5),
            Feedback("v", "x", "like", time_ms=6),
            Feedback("u", "shown", "impression", time_ms=7),
            # Order is that of acceptance, not of the times given.
            Feedback("u", "b", "purchase", time_ms=3),
        ]
    )
    assert Histories(store, settings).read(["v", "nobody", "u", "v"]) == [
        [HistoryEntry(item_id="x", feedback_class="like", time_ms=6)],
        [],
        [
            HistoryEntry(item_id="a", feedback_class="click", time_ms=5),
            HistoryEntry(item_id="b", feedback_class="purchase", time_ms=3),
        ],
        [HistoryEntry(item_id="x", feedback_class="like", time_ms=6)],
    ]


def test_reading_nobody_asks_nobody(store: redis.Redis, settings: Settings) -> None:
    assert Histories(store, settings).read([]) == []


def test_past_the_cap_the_oldest_fall_off(store: redis.Redis, settings: Settings) -> None:
    capped = settings.model_copy(update={"history_limit": 4, "history_length": 2})
    log = FeedbackLog(store, capped)
    histories = Histories(store, capped)
    log.append([Feedback("u", str(i), "click") for i in range(4)])
    assert [h.item_id for h in histories.read(["u"])[0]] == ["0", "1", "2", "3"]
    log.append([Feedback("u", str(i), "click") for i in range(4, 7)])
    assert [h.item_id for h in histories.read(["u"])[0]] == ["3", "4", "5", "6"]


def test_a_user_can_be_forgotten(store: redis.Redis, settings: Settings) -> None:
    log = FeedbackLog(store, settings)
    histories = Histories(store, settings)
    log.append([Feedback("u", "a", "click"), Feedback("u", "b", "click"), Feedback("v", "c", "click")])
    assert histories.forget("u") == 2
    assert histories.forget("u") == 0
    assert [[h.item_id for h in history] for history in histories.read(["u", "v"])] == [[], ["c"]]
    log.append([Feedback("u", "d", "click")])
    record = log.read_after(BEGINNING, 10)[-1].record
    assert record is not None
    assert list(record.history) == []


def test_a_connection_that_the_store_has_closed_is_replaced(store: redis.Redis, settings: Settings) -> None:
    FeedbackLog(store, settings).append([Feedback("u", "a", "click")])
    with connect(settings) as own:
        histories = Histories(own, settings)
        (before,) = histories.read_serialized(["u"])
        assert [each.item_id for each in History.FromString(before).history] == ["a"]
        # All but the one that says so; and what the store knows of scripts goes as it does when it starts again.
        assert store.client_kill_filter(_type="normal", skipme=True)
        store.script_flush()
        assert histories.read_serialized(["u", "nobody"]) == [before, b""]
