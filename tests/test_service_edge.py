"""What calls have in common: counting, deadlines, overload, a store that is away, and the table of errors."""

from __future__ import annotations

import gc
import logging
import os
import queue
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from calls import (
    SECONDS,
    Request,
    check_refusal,
    click,
    details_of,
    log,
    recommend,
    recommender,
    refusal,
    violations,
)
from google.rpc import status_pb2
from prometheus_client import CollectorRegistry
from serving import ITEMS, WAYS, PlainFollower, PlainScorer, Running, serve

from recsys import errors, feedback
from recsys.feedback_log import FeedbackLog
from recsys.histories import Histories
from recsys.metrics import ServerMetrics
from recsys.scorer import Query
from recsys.service import edge
from recsys.service.errors import TABLE, to_refusal, wire_error
from recsys.service.recommender import Question, Scoring
from recsys.settings import Settings, load
from recsys.store.connection import connect
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
def settings(settings: Settings, transport: str) -> Settings:
    return settings.model_copy(update=WAYS[transport])


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def running(shared_server: Running) -> Running:
    """A server that serves version 1 over an empty store."""
    shared_server.reset()
    return shared_server


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"])
def test_bytes_that_do_not_parse_are_the_callers_fault(running: Running, data: bytes) -> None:
    call = running.channel.unary_unary("/recsys.v1.RecommenderService/Recommend", None, None)
    assert list(violations(lambda: call(data, timeout=SECONDS))) == ["request"]


def test_an_unknown_method_is_unimplemented(running: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        running.channel.unary_unary("/recsys.v1.RecommenderService/Guess", None, None)(b"", timeout=SECONDS)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_message_over_the_limit_is_refused(running: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        log(running, click(context={"k": "v" * (5 << 20)}))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_metadata_over_the_limit_is_refused_and_the_next_call_is_served(running: Running) -> None:
    refusals = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
    for size in (9000, 100_000):
        with pytest.raises(grpc.RpcError) as caught:
            recommender(running).Recommend(Request(user_id="u"), timeout=SECONDS, metadata=[("x-much", "m" * size)])
        # Beyond the limit native answers with HTTP's own status, and far beyond it closes the connection.
        assert caught.value.code() in refusals
        assert recommend(running).version == 1


def test_compressed_requests_are_understood(running: Running) -> None:
    request = Request(user_id="u", count=1, exclude_item_ids=ITEMS[:50])
    call = recommender(running).Recommend
    answer = call(request, timeout=SECONDS, compression=grpc.Compression.Gzip)
    assert [item.item_id for item in answer.items] == [ITEMS[50]]


def test_a_message_of_an_error_arrives_as_it_is(running: Running) -> None:
    message = click(feedback_class="é%\n\U0001f600")
    assert "é%\\n\U0001f600" in log(running, message).results[0].refusal
    details = violations(lambda: recommend(running, user_id="é" * 129))
    assert details == {"user_id": "has 258 bytes; at most 256 are allowed"}
    request = recommender_pb2.RecommendRequest(user_id="u", exclude_item_ids=["é" * 200] * 30)
    assert len(violations(lambda: recommender(running).Recommend(request, timeout=SECONDS))) == 20


def test_a_caller_that_hangs_up_is_counted(settings: Settings) -> None:
    with serve(settings) as running:
        labels = {"grpc_type": "unary", "grpc_service": "recsys.v1.RecommenderService", "grpc_method": "Recommend"}

        def counted(code: str) -> float:
            return running.value("grpc_server_handled_total", grpc_code=code, **labels)

        running.scorer.gate.clear()
        held = recommender(running).Recommend.future(Request(user_id="held"), timeout=SECONDS)
        assert running.scorer.entered.acquire(timeout=SECONDS)
        waits = recommender(running).Recommend.future(Request(user_id="waits"), timeout=SECONDS)
        until(lambda: running.value("grpc_server_started_total", **labels) == 2)
        until(lambda: running.value("recsys_queue_requests") == 1)
        waits.cancel()
        until(lambda: counted("CANCELLED") == 1)
        running.scorer.gate.set()
        assert held.result().version == 1
        assert (counted("OK"), running.value("grpc_server_started_total", **labels)) == (1, 2)


def test_calls_that_come_while_a_batch_is_scored_are_scored_together(settings: Settings) -> None:
    with serve(settings) as running:
        running.scorer.gate.clear()
        calls = [recommender(running).Recommend.future(Request(user_id="held"), timeout=SECONDS)]
        assert running.scorer.entered.acquire(timeout=SECONDS)
        calls += [recommender(running).Recommend.future(Request(user_id="u"), timeout=SECONDS) for _ in range(40)]
        until(lambda: running.value("recsys_queue_requests") == 40)
        running.scorer.gate.set()
        assert {call.result().version for call in calls} == {1}
        assert running.scorer.batches[0] == 1
        # By the metric too: 41 calls in batches of 20 on average behind the first.
        assert running.value("recsys_score_batch_requests_sum") == 41
        assert running.value("recsys_score_batch_requests_count") == 3


def test_an_unexpected_failure_is_logged_and_tells_nothing(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    running.scorer.failure = RuntimeError("a secret of ours")
    call = recommender(running).Recommend
    metadata = [("x-request-id", "request-1")]
    with caplog.at_level(logging.ERROR):
        details = check_refusal(
            lambda: call(Request(user_id="u"), timeout=SECONDS, metadata=metadata), grpc.StatusCode.INTERNAL, "INTERNAL"
        )
    assert "secret" not in details["message"]
    assert details["RequestInfo"].request_id == "request-1"
    assert details["ErrorInfo"].metadata["method"] == "/recsys.v1.RecommenderService/Recommend"
    assert "request-1" in caplog.text
    assert "a secret of ours" in caplog.text
    running.scorer.failure = None
    assert recommend(running).version == 1


def test_calls_are_counted_by_service_method_and_code(running: Running) -> None:
    labels = {"grpc_type": "unary", "grpc_service": "recsys.v1.RecommenderService", "grpc_method": "Recommend"}

    def counts() -> list[float]:
        return [
            running.value("grpc_server_started_total", **labels),
            running.value("grpc_server_handled_total", grpc_code="OK", **labels),
            running.value("grpc_server_handled_total", grpc_code="INVALID_ARGUMENT", **labels),
            running.value("grpc_server_handling_seconds_count", **labels),
            sum(running.value("recsys_items_recommended_total", source="trending", position=p) for p in "123"),
            running.value("recsys_recommend_seconds_count"),
        ]

    before = counts()
    recommend(running, count=3)
    refusal(lambda: recommend(running, user_id=""))
    assert [after - old for after, old in zip(counts(), before, strict=True)] == [2, 1, 1, 2, 3, 1]
    assert running.value("recsys_queue_requests") == 0


def test_a_call_without_deadline_gets_one(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recommender(running).Recommend(Request(user_id="u")).version == 1
    before = running.value("recsys_requests_rejected_total", reason="deadline_passed")
    # Over before its turn comes.
    monkeypatch.setattr(edge, "DEFAULT_DEADLINE_SECONDS", 1e-9)
    for call in (
        lambda: recommender(running).Recommend(Request(user_id="u")),
        lambda: recommender(running).LogFeedback(recommender_pb2.LogFeedbackRequest(feedback=[click()])),
        lambda: CatalogServiceStub(running.channel).GetItems(catalog_pb2.GetItemsRequest(item_ids=["a"])),
    ):
        check_refusal(call, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED")
    assert running.scorer.batches == [1]
    assert running.store.dbsize() == 0
    assert running.value("recsys_requests_rejected_total", reason="deadline_passed") == before + 3


def test_a_call_that_is_given_up_while_waiting_is_never_scored(settings: Settings) -> None:
    with serve(settings) as running:
        stub = recommender(running)
        running.scorer.gate.clear()
        held = stub.Recommend.future(Request(user_id="held"), timeout=SECONDS)
        assert running.scorer.entered.acquire(timeout=SECONDS)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Recommend(Request(user_id="late"), timeout=0.1)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        running.scorer.gate.set()
        assert held.result().version == 1
        assert recommend(running).version == 1
        assert running.scorer.batches == [1, 1]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(settings: Settings) -> None:
    with serve(settings.model_copy(update={"queue_limit": 2})) as running:
        stub = recommender(running)
        running.scorer.gate.clear()
        held = stub.Recommend.future(Request(user_id="u"), timeout=SECONDS)
        assert running.scorer.entered.acquire(timeout=SECONDS)
        finished: queue.Queue[Any] = queue.Queue()
        calls = [stub.Recommend.future(Request(user_id="u"), timeout=SECONDS) for _ in range(3)]
        for call in calls:
            call.add_done_callback(finished.put)
        refused = finished.get(timeout=SECONDS)
        details = check_refusal(refused.result, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert details["message"] == "the scoring queue is full: 2 calls are waiting"
        assert running.value("recsys_requests_rejected_total", reason="overloaded") == 1
        running.scorer.gate.set()
        assert [call.result().version for call in (held, *calls) if call is not refused] == [1, 1, 1]


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="the system has no such policy")
def test_what_comes_does_not_interrupt_a_batch_but_is_brought_at_once_otherwise(
    settings: Settings, transport: str
) -> None:
    if transport == "grpcio":
        pytest.skip("the library's threads begin with the library")

    def bringing() -> set[int]:
        found = set()
        for path in Path("/proc/self/task").iterdir():
            # It may have ended meanwhile.
            with suppress(FileNotFoundError, ProcessLookupError):
                if (path / "comm").read_text().startswith("grpc-native"):
                    found.add(int(path.name))
        return found

    others = bringing()
    with serve(settings) as running:

        def policies() -> set[int]:
            return {os.sched_getscheduler(thread) for thread in bringing() - others}

        until(lambda: policies() == {os.SCHED_OTHER})
        running.scorer.gate.clear()
        answer = recommender(running).Recommend.future(Request(user_id="u"), timeout=SECONDS)
        assert running.scorer.entered.acquire(timeout=SECONDS)
        until(lambda: policies() == {os.SCHED_BATCH})
        running.scorer.gate.set()
        answer.result(SECONDS)
        until(lambda: policies() == {os.SCHED_OTHER})


def test_calls_go_without_the_garbage_collector(running: Running, transport: str) -> None:
    """As cycles they would be looked through by the thousand, in everybody's way."""
    if transport == "grpcio":
        pytest.skip("the library's own coroutines are cycles, and hold the call")

    def held() -> int:
        return sum(type(each) is edge.Call for each in gc.get_objects())

    stub = recommender(running)
    gc.collect()
    gc.disable()
    try:
        for place in range(10):
            log(running, click(f"user-{place}"))
            assert stub.Recommend(Request(user_id="u"), timeout=SECONDS).version == 1
        # The threads that work on batches still know their last one.
        until(lambda: held() <= 2)
    finally:
        gc.enable()


def test_before_the_first_weights_feedback_is_taken_and_recommending_is_not(settings: Settings) -> None:
    with serve(settings, ready=False) as running:
        for call in (
            lambda: recommend(running),
            lambda: recommender(running).Score(recommender_pb2.ScoreRequest(user_id="u", item_ids=["a"])),
        ):
            check_refusal(call, grpc.StatusCode.UNAVAILABLE, "WEIGHTS_NOT_LOADED")
        assert log(running, click()).accepted == 1
        status = ModelServiceStub(running.channel).GetStatus(model_pb2.GetStatusRequest())
        assert (status.version, status.HasField("committed_time"), status.backlog) == (0, False, 1)
        assert running.value("recsys_requests_rejected_total", reason="not_ready") == 2


def test_who_asks_while_the_first_weights_are_tried_is_refused_at_once(settings: Settings) -> None:
    """To wait for it could take a minute, and every batch after it would be expected to."""
    with serve(settings) as running:
        running.scorer.warming = True
        check_refusal(lambda: recommend(running), grpc.StatusCode.UNAVAILABLE, "WEIGHTS_NOT_LOADED")
        assert not running.scorer.batches
        running.scorer.warming = False
        assert recommend(running).version == 1


def test_a_full_log_refuses_feedback(settings: Settings) -> None:
    with serve(settings.model_copy(update={"log_max_bytes": 1 << 16})) as running:
        assert log(running, *[click("i" * 200)] * 1000).accepted == 1000
        before = Histories(running.store, running.settings).read(["u"])
        check_refusal(lambda: log(running, click()), grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")
        assert Histories(running.store, running.settings).read(["u"]) == before


def test_without_the_store_recommending_goes_on_and_feedback_is_refused(tmp_path: Path, transport: str) -> None:
    lost = EmbeddedStore(tmp_path)
    lost.start()
    try:
        flags = {"redis_url": lost.url, "port": 0, "metrics_port": 0, **WAYS[transport]}
        settings = load(flags, environment={})
        with serve(settings) as running:
            log(running, click("item-0"))
            assert recommend(running).items[0].source == recommender_pb2.SOURCE_TRANSITION
            lost.stop()
            answer = recommend(running)
            assert [item.item_id for item in answer.items] == list(ITEMS[:10])
            assert {item.source for item in answer.items} == {recommender_pb2.SOURCE_TRENDING}
            assert running.value("recsys_requests_rejected_total", reason="histories_unavailable") == 1

            catalog: Any = CatalogServiceStub(running.channel)
            model: Any = ModelServiceStub(running.channel)
            for call in (
                lambda: log(running, click()),
                lambda: catalog.GetItems(catalog_pb2.GetItemsRequest(item_ids=["a"])),
                lambda: model.ListVersions(model_pb2.ListVersionsRequest()),
            ):
                details = check_refusal(call, grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
                assert "127.0.0.1" not in details["message"]
            status = model.GetStatus(model_pb2.GetStatusRequest())
            assert (status.version, status.store_reachable) == (1, False)
            assert (status.backlog, status.log_records, status.log_bytes) == (-1, -1, -1)
    finally:
        lost.stop()


def test_a_store_that_hangs_is_left_alone_for_five_times_as_long(settings: Settings, store: redis.Redis) -> None:
    scorer = PlainScorer()
    PlainFollower(scorer).load()
    times = iter([0.0, 1.0, 5.9, 6.0])
    impatient = settings.model_copy(update={"store_timeout_seconds": 0.05})
    FeedbackLog(store, settings).append([feedback.Feedback("u", "item-0", "click")])
    with connect(impatient) as client:
        scoring = Scoring(
            Histories(client, impatient), scorer, ServerMetrics(CollectorRegistry()), clock=lambda: next(times)
        )

        def first_item() -> str:
            return scoring([Question("u", Query(history=()))])[0].items[0].item_id

        store.execute_command("CLIENT", "PAUSE", 200, "ALL")
        assert first_item() == "item-0"
        # Answered when the store's pause is over.
        store.ping()
        assert first_item() == "item-0"
        assert first_item() == "item-1"


# --- The table of errors


def test_every_error_has_a_code_a_reason_and_a_delay_where_one_helps() -> None:
    tree: list[type[errors.RecsysError]] = [
        errors.RecsysError,
        *(e for e in vars(errors).values() if isinstance(e, type) and e in _below()),
    ]
    assert set(TABLE) == set(tree)
    assert len({error.reason for error in tree}) == len(tree)
    for kind in tree:
        assert re.fullmatch("[A-Z][A-Z0-9_]+[A-Z0-9]", kind.reason)
        assert len(kind.reason) <= 63
        retriable = (grpc.StatusCode.UNAVAILABLE.value[0], grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert (TABLE[kind].retry_seconds is not None) == (TABLE[kind].code in retriable)
        error = kind([errors.Violation("f", "is bad")]) if kind is errors.InvalidInput else kind("text")
        refusal = to_refusal(error, wire_error(error), method="/s/m", request_id="r")
        status = status_pb2.Status.FromString(refusal.details)
        assert (refusal.code, refusal.message) == (status.code, status.message)
        assert status.code == TABLE[kind].code
        assert status.message
        assert details_of(status)["ErrorInfo"].reason == kind.reason


@pytest.mark.parametrize(
    "request_id", ["r", "é" * 3, "x" * 32, "x" * edge.MAX_REQUEST_ID_LENGTH, "ü" * edge.MAX_REQUEST_ID_LENGTH]
)
def test_a_refusal_names_the_request(request_id: str) -> None:
    error = errors.Overloaded("full")
    refusal = to_refusal(error, wire_error(error), method="/s/m", request_id=request_id)
    details = details_of(status_pb2.Status.FromString(refusal.details))
    assert details["RequestInfo"].request_id == request_id
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 100


def test_an_error_below_a_listed_one_is_answered_as_that_one() -> None:
    class Special(errors.NotReady):
        pass

    assert wire_error(Special("soon")).code == grpc.StatusCode.UNAVAILABLE.value[0]


def _below() -> set[type[errors.RecsysError]]:
    found: set[type[errors.RecsysError]] = set()
    waiting = [errors.RecsysError]
    while waiting:
        children = waiting.pop().__subclasses__()
        found.update(children)
        waiting += children
    return found
