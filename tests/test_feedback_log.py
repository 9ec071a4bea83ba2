"""The feedback log against a real store: order, histories inside records, bounds, trimming and reading."""

from __future__ import annotations

import itertools
import socket
import threading
from collections import defaultdict
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys.errors import StoreFull, StoreUnavailable
from recsys.feedback import Feedback, to_entry, to_record
from recsys.feedback_log import BEGINNING, PAGE, Appended, FeedbackLog, LogEntry, LogUsage, position_key
from recsys.histories import Histories, log_key
from recsys.settings import Settings
from recsys.store.connection import connect

NOW = 1_700_000_000_000


def click(user: str, item: str, *, feedback_id: str = "", time_ms: int = NOW) -> Feedback:
    return Feedback(user, item, "click", time_ms=time_ms, feedback_id=feedback_id)


def seen(entry: LogEntry) -> list[str]:
    assert entry.record is not None
    return [h.item_id for h in entry.record.history]


def items(entries: list[LogEntry]) -> list[str]:
    return [entry.record.item_id for entry in entries if entry.record is not None]


def everything(log: FeedbackLog) -> list[LogEntry]:
    return log.read_after(BEGINNING, 100_000)


@pytest.fixture
def log(store: redis.Redis, settings: Settings) -> FeedbackLog:
    return FeedbackLog(store, settings)


def with_settings(store: redis.Redis, settings: Settings, **changes: object) -> FeedbackLog:
    return FeedbackLog(store, settings.model_copy(update=changes))


def test_a_record_is_what_was_appended(log: FeedbackLog) -> None:
    feedback = Feedback(
        "Zoë", "i1", "purchase", time_ms=NOW, value=2.5, feedback_id="f1", recommendation_id="r1", context={"a": "b"}
    )
    [appended] = log.append([feedback])
    [entry] = everything(log)
    assert entry == LogEntry(appended.position, int(appended.position.split("-")[0]), to_record(feedback), tick=False)
    assert not appended.duplicate


def test_a_record_carries_exactly_the_last_entries_in_order(store: redis.Redis, settings: Settings) -> None:
    log = with_settings(store, settings, history_length=3)
    log.append([click("u", "a", time_ms=1), click("v", "x", time_ms=2), click("u", "b", time_ms=3)])
    log.append([click("u", "c", time_ms=4), click("u", "d", time_ms=5)])
    log.append([click("u", "e", time_ms=6)])
    entries = everything(log)
    assert [seen(entry) for entry in entries] == [[], [], ["a"], ["a", "b"], ["a", "b", "c"], ["b", "c", "d"]]
    assert entries[-1].record is not None
    assert [(h.feedback_class, h.time_ms) for h in entries[-1].record.history] == [
        ("click", 3),
        ("click", 4),
        ("click", 5),
    ]


def test_feedback_without_a_time_gets_the_time_of_appending(store: redis.Redis, log: FeedbackLog) -> None:
    log.append([click("u", "a", time_ms=0), click("u", "b", time_ms=7)], now_ms=NOW)
    log.append([click("u", "c", time_ms=0)])
    records = [entry.record for entry in everything(log)]
    assert [record.time_ms for record in records[:2] if record] == [NOW, 7]
    assert records[2] is not None
    assert [h.time_ms for h in records[2].history] == [NOW, 7]
    server_seconds, _ = store.time()
    assert abs(records[2].time_ms / 1000 - server_seconds) < 60


def test_positions_rise_in_the_order_of_the_batch(log: FeedbackLog) -> None:
    positions = [appended.position for appended in log.append([click("u", str(i)) for i in range(20)])]
    assert positions == [entry.position for entry in everything(log)]
    assert sorted(positions, key=position_key) == positions
    assert len(set(positions)) == 20


def test_positions_are_compared_as_numbers() -> None:
    assert position_key("9-11") == (9, 11)
    assert position_key("10") == (10, 0)
    assert sorted(["10-0", "9-10", "9-9"], key=position_key) == ["9-9", "9-10", "10-0"]


def test_duplicates_touch_nothing(store: redis.Redis, settings: Settings, log: FeedbackLog) -> None:
    first = log.append([click("u", "a", feedback_id="1"), click("u", "b", feedback_id="1"), click("u", "c")])
    usage = log.usage()
    # The id alone decides, whoever the user is.
    again = log.append([click("v", "a", feedback_id="1")])
    assert [appended.duplicate for appended in first] == [False, True, False]
    assert first[1] == again[0] == Appended("", duplicate=True)
    assert items(everything(log)) == ["a", "c"]
    assert log.appended() == 2
    assert log.usage() == usage
    assert [[h.item_id for h in history] for history in Histories(store, settings).read(["u", "v"])] == [
        ["a", "c"],
        [],
    ]


def test_feedback_without_an_id_always_counts(log: FeedbackLog) -> None:
    log.append([click("u", "a"), click("u", "a")])
    log.append([click("u", "a")])
    assert items(everything(log)) == ["a", "a", "a"]


def test_an_id_is_remembered_for_the_time_set(store: redis.Redis, settings: Settings, log: FeedbackLog) -> None:
    log.append([click("u", "a", feedback_id="1")])
    [key] = store.keys(log_key(settings, "id:*"))
    assert len(key) == len(log_key(settings, "id:")) + 16
    assert settings.deduplication_seconds - 60 < store.ttl(key) <= settings.deduplication_seconds


def test_a_class_without_history_is_logged_with_history_but_leaves_none(log: FeedbackLog) -> None:
    log.append([click("u", "a"), Feedback("u", "b", "impression"), click("u", "c")], now_ms=NOW)
    assert [seen(entry) for entry in everything(log)] == [[], ["a"], ["a"]]


def test_an_empty_batch_appends_nothing(log: FeedbackLog) -> None:
    assert log.append([]) == []
    assert log.last_position() == BEGINNING


def test_every_key_shares_the_hash_tag(store: redis.Redis, settings: Settings, log: FeedbackLog) -> None:
    log.append([click("u", "a", feedback_id="}{")])
    keys = store.keys("*")
    assert len(keys) == 4
    assert store.keys(f"{settings.key_prefix}:{{log}}:*") == keys


def test_appending_survives_a_store_that_forgot_the_script(store: redis.Redis, log: FeedbackLog) -> None:
    log.append([click("u", "a")])
    store.script_flush()
    log.append([click("u", "b")])
    assert items(everything(log)) == ["a", "b"]


def test_usage_counts_exactly_what_is_held(log: FeedbackLog) -> None:
    assert log.usage() == LogUsage(0, 0, 1 << 30, BEGINNING, BEGINNING)
    first, second = log.append([click("u", "a"), click("u", "b")])
    tick = log.tick()
    a, b = click("u", "a"), click("u", "b")
    first_bytes = len(to_record(a).SerializeToString())
    second_bytes = len(to_record(b).SerializeToString()) + len(to_entry(a))
    assert log.usage() == LogUsage(2, first_bytes + second_bytes, 1 << 30, first.position, tick)
    log.trim(second.position)
    assert log.usage() == LogUsage(1, second_bytes, 1 << 30, second.position, tick)
    assert log.appended() == 2


def test_a_full_log_refuses_the_whole_batch(store: redis.Redis, settings: Settings) -> None:
    log = with_settings(store, settings, log_max_bytes=1)
    [kept] = log.append([click("u", "a", feedback_id="1")])
    used = log.usage().bytes
    with pytest.raises(StoreFull) as refusal:
        log.append([click("u", "b", feedback_id="2"), click("v", "c")])
    assert str(refusal.value) == (
        f"the feedback log holds {used} bytes and its bound is 1 (log_max_bytes); "
        "let the trainer catch up so that learned feedback is trimmed, or raise log_max_bytes"
    )
    assert items(everything(log)) == ["a"]
    assert log.usage() == LogUsage(1, used, 1, kept.position, kept.position)
    assert [len(history) for history in Histories(store, settings).read(["u", "v"])] == [1, 0]
    # Trimming makes room, and the refused feedback is no duplicate of itself.
    log.trim(f"{kept.position}1")
    assert not log.append([click("u", "b", feedback_id="2")])[0].duplicate


@pytest.mark.parametrize("feedback_id", ["", "2"])
def test_a_store_out_of_memory_refuses_the_whole_batch(
    store: redis.Redis, settings: Settings, log: FeedbackLog, feedback_id: str
) -> None:
    [kept] = log.append([click("u", "a", feedback_id="1")])
    before = log.usage()
    keys = sorted(store.keys("*"))
    store.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreFull):
            log.append([click("u", "b", feedback_id=feedback_id), click("v", "c")])
        with pytest.raises(StoreFull):
            log.tick()
        assert sorted(store.keys("*")) == keys
        assert log.usage() == before
        # What makes room still works.
        assert log.trim(f"{kept.position}1") == 1
        assert log.usage().bytes == 0
    finally:
        store.config_set("maxmemory", 0)
    assert not log.append([click("u", "b", feedback_id=feedback_id)])[0].duplicate


def test_a_store_that_is_gone_is_unavailable(settings: Settings) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"redis://:secret@127.0.0.1:{unused.getsockname()[1]}/0"
        gone = settings.model_copy(update={"redis_url": url})
        with connect(gone) as client:
            log = FeedbackLog(client, gone)
            for call in (
                lambda: log.append([click("u", "a")]),
                lambda: log.tick(),
                lambda: log.read_after(BEGINNING, 1),
                lambda: log.read_after(BEGINNING, 1, wait_seconds=1),
                lambda: log.read_before("1-0", 1),
                lambda: log.trim("1-0"),
                lambda: log.usage(),
            ):
                with pytest.raises(StoreUnavailable) as refusal:
                    call()
                assert "secret" not in str(refusal.value)


def test_ticks_stand_between_feedback_and_are_not_counted(log: FeedbackLog) -> None:
    log.append([click("u", "a")])
    position = log.tick()
    log.append([click("u", "b")])
    entries = everything(log)
    assert [entry.tick for entry in entries] == [False, True, False]
    assert entries[1] == LogEntry(position, position_key(position)[0], None, tick=True)
    assert seen(entries[2]) == ["a"]
    assert log.appended() == 2


@pytest.mark.parametrize("fields", [{"r": b"\xff\xff"}, {"r": b""}, {"x": b"y"}, {"r": b"\x12\x01u"}])
def test_malformed_entries_are_told_apart_and_skipped_by_none(
    store: redis.Redis, settings: Settings, log: FeedbackLog, fields: dict[Any, Any]
) -> None:
    log.append([click("u", "a")])
    store.xadd(log_key(settings, "records"), fields)
    log.append([click("u", "b")])
    malformed = everything(log)[1]
    assert malformed.record is None
    assert not malformed.tick
    assert len(everything(log)) == 3
    assert items(log.read_before(log.last_position(), 10)) == ["a", "b"]


def test_reading_continues_after_any_position(log: FeedbackLog) -> None:
    log.append([click("u", str(i)) for i in range(10)])
    position, read = BEGINNING, []
    while page := log.read_after(position, 3):
        assert len(page) <= 3
        read += items(page)
        position = page[-1].position
    assert read == [str(i) for i in range(10)]
    assert position == log.last_position()


def test_a_waiting_read_returns_when_something_arrives(store: redis.Redis, settings: Settings) -> None:
    log = FeedbackLog(store, settings)

    def append_when_blocked() -> None:
        with connect(settings) as client:
            while not client.info("clients")["blocked_clients"]:
                pass
            FeedbackLog(client, settings).append([click("u", "a")])

    thread = threading.Thread(target=append_when_blocked)
    thread.start()
    # Far beyond the socket timeout and the test's own.
    entries = log.read_after(BEGINNING, 10, wait_seconds=100_000)
    thread.join()
    assert items(entries) == ["a"]


def test_a_wait_longer_than_the_socket_timeout_is_not_an_outage(settings: Settings) -> None:
    impatient = settings.model_copy(update={"store_timeout_seconds": 1.0})
    with connect(impatient) as client:
        assert FeedbackLog(client, impatient).read_after(BEGINNING, 1, wait_seconds=1.1) == []


def test_trimming_never_passes_the_position_and_reading_continues(log: FeedbackLog) -> None:
    count = 2 * PAGE + 7
    positions = [appended.position for appended in log.append([click("u", str(i)) for i in range(count)])]
    last_read = log.read_after(BEGINNING, 5)[-1].position
    tick = log.tick()
    assert log.trim(BEGINNING) == 0
    assert log.trim(positions[0]) == 0
    assert log.trim(positions[3]) == 3
    assert log.trim(positions[3]) == 0
    # In the middle of a slice's end, and over several slices.
    assert log.trim(positions[3 + PAGE]) == PAGE
    assert log.usage().first_position == positions[3 + PAGE]
    assert items(log.read_after(last_read, 1)) == [str(3 + PAGE)]
    assert log.trim(positions[-1]) == count - PAGE - 4
    assert [entry.position for entry in everything(log)] == [positions[-1], tick]
    assert log.usage().records == 1
    # A position that no entry has: everything goes, yet the log goes on behind it.
    assert log.trim(f"{position_key(tick)[0] + 1}-0") == 2
    assert log.usage() == LogUsage(0, 0, 1 << 30, BEGINNING, tick)
    [after] = log.append([click("u", "new")])
    assert position_key(after.position) > position_key(tick)


def test_reading_backwards_leaves_ticks_out(log: FeedbackLog) -> None:
    positions = []
    for i in range(6):
        positions.append(log.append([click("u", str(i))])[0].position)
        log.tick()
    end = log.last_position()
    assert items(log.read_before(end, 3)) == ["3", "4", "5"]
    assert items(log.read_before(positions[2], 2)) == ["1", "2"]
    assert items(log.read_before(end, 100)) == list("012345")
    assert log.read_before(BEGINNING, 5) == []
    assert log.read_before(end, 0) == []


def test_reading_backwards_goes_over_pages_of_ticks(log: FeedbackLog) -> None:
    log.append([click("u", "a"), click("u", "b")])
    for _ in range(PAGE):
        log.tick()
    log.append([click("u", "c")])
    assert items(log.read_before(log.last_position(), 2)) == ["b", "c"]


EXAMPLES = itertools.count()
ONE_FEEDBACK = st.tuples(
    st.sampled_from(["ann", "bob", "zoë"]),
    st.sampled_from(["a", "b", "c", "d"]),
    st.sampled_from(["click", "impression", "purchase"]),
    st.sampled_from(["", "", "", "1", "2", "3"]),
)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(ONE_FEEDBACK, min_size=1, max_size=8), max_size=6), length=st.integers(1, 4))
def test_histories_and_records_equal_a_simple_model(
    store: redis.Redis, settings: Settings, batches: list[list[tuple[str, str, str, str]]], length: int
) -> None:
    limit = length + 1
    own = settings.model_copy(
        update={"key_prefix": f"example{next(EXAMPLES)}", "history_length": length, "history_limit": limit}
    )
    log = FeedbackLog(store, own)
    histories: dict[str, list[str]] = defaultdict(list)
    known: set[str] = set()
    expected = []
    for batch in batches:
        duplicates = []
        for user, item, name, feedback_id in batch:
            duplicates.append(feedback_id in known)
            if feedback_id in known:
                continue
            known |= {feedback_id} - {""}
            expected.append((user, item, name, histories[user][-length:]))
            if name != "impression":
                histories[user] = [*histories[user], item][-limit:]
        appended = log.append([Feedback(u, i, n, feedback_id=f) for u, i, n, f in batch], now_ms=NOW)
        assert [a.duplicate for a in appended] == duplicates
    entries = everything(log)
    assert [
        (entry.record.user_id, entry.record.item_id, entry.record.feedback_class, seen(entry))
        for entry in entries
        if entry.record is not None
    ] == expected
    users = sorted(histories)
    assert [[h.item_id for h in kept] for kept in Histories(store, own).read(users)] == [histories[u] for u in users]
    usage = log.usage()
    assert usage.records == log.appended() == len(expected)
    assert usage.bytes == sum(entry.record.ByteSize() for entry in entries if entry.record is not None)
