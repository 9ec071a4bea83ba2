from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from grpc_status import rpc_status
from serving import ITEMS, Running, commit_versions, serve

import recsys
from recsys import AsyncClient, CategoryFilter, Client, Feedback, Item, errors
from recsys.client import CallFailed, FeedbackResult, Recommendation, Score
from recsys.service.errors import TABLE, to_refusal, wire_error
from recsys.settings import Settings, load
from recsys.store.embedded import EmbeddedStore
from recsys.v1 import model_pb2, recommender_pb2

SECONDS = 30.0


@pytest.fixture(scope="module")
def shared_server(embedded_store: EmbeddedStore) -> Iterator[Running]:
    with serve(load({"redis_url": embedded_store.url, "port": 0, "metrics_port": 0}, environment={})) as running:
        yield running


@pytest.fixture
def running(shared_server: Running) -> Running:
    """A server that serves version 1 over an empty store."""
    shared_server.reset()
    return shared_server


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(running.target, timeout=SECONDS) as client:
        yield client


def click(item_id: str = "item-7", **fields: Any) -> Feedback:
    return Feedback(**{"user_id": "u", "item_id": item_id, "feedback_class": "click", **fields})


class Scripted(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """A server whose every method answers from a list: a RecsysError fails the call, None answers it empty."""

    def __init__(self, *answers: errors.RecsysError | None) -> None:
        self._answers = list(answers)
        self.requests: list[bytes] = []

    def service(self, call_details: Any) -> Any:
        method = call_details.method

        def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
            self.requests.append(data)
            error = self._answers.pop(0)
            if error is not None:
                refusal = to_refusal(error, wire_error(error), method=method, request_id="r")
                context.abort_with_status(rpc_status.to_status(status_pb2.Status.FromString(refusal.details)))
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def scripted(*answers: errors.RecsysError | None) -> Iterator[tuple[Scripted, str]]:
    script = Scripted(*answers)
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[script])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield script, f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def free_port() -> Iterator[int]:
    """A port where nobody listens, and which nobody else is given meanwhile."""
    with socket.socket() as holder:
        # Lets a server of ours take the port, as this socket does not listen.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


# --- What each method does


def test_recommendations(client: Client) -> None:
    answer = client.recommend("u")
    assert answer.version == 1
    assert answer.recommendation_id
    assert [item.item_id for item in answer.items] == list(ITEMS[:10])
    assert answer.items[1] == Recommendation("item-1", -1.0, "trending", "chosen by many at present")


def test_options_of_recommendations(client: Client, running: Running) -> None:
    client.log_feedback([click("item-0")])
    answer = client.recommend(
        "u",
        2,
        exclude_item_ids=["item-1"],
        allow_seen=True,
        context={"device": "phone"},
        filter=CategoryFilter(any_of=frozenset("ab"), all_of=frozenset("c"), none_of=frozenset("d")),
    )
    assert [(item.item_id, item.source) for item in answer.items] == [("item-0", "transition"), ("item-2", "network")]
    with pytest.raises(errors.InvalidInput, match=r"filter.none_of\[0\]"):
        client.recommend("u", filter=CategoryFilter(none_of=frozenset([""])))


def test_scores(client: Client) -> None:
    answer = client.score("u", ["new", "item-1"])
    assert answer.version == 1
    assert answer.items == [
        Score("new", 0.0, False, {"click": 0.25, "like": 0.75}),
        Score("item-1", -1.0, True, {"click": 0.25, "like": 0.75}),
    ]


def test_feedback_is_accepted_refused_or_a_duplicate(client: Client) -> None:
    results = client.log_feedback([click(feedback_id="f"), click(feedback_class="wave"), click(feedback_id="f")])
    assert results[0] == FeedbackResult(accepted=True)
    assert (results[1].accepted, results[1].field) == (False, "feedback_class")
    assert results[2] == FeedbackResult(accepted=True, duplicate=True)
    assert client.log_feedback([]) == []


def test_long_feedback_lists_are_sent_in_pieces(client: Client) -> None:
    refused = {0, 999, 1000, 2100}
    feedback = [click(user_id="" if n in refused else f"u{n}") for n in range(2101)]
    results = client.log_feedback(feedback)
    assert [n for n, result in enumerate(results) if not result.accepted] == sorted(refused)
    assert len(results) == 2101
    assert client.status().log_records == 2097


def test_large_feedback_is_sent_in_pieces_that_fit_a_message(client: Client) -> None:
    context = {f"key-{n}": "v" * 250 for n in range(20)}
    assert all(result.accepted for result in client.log_feedback([click(context=context)] * 900))
    assert client.status().log_records == 900


def test_items(client: Client) -> None:
    first, second = Item("a", "A", ("x", "y")), Item("b")
    assert client.upsert_items([first, second]) == 2
    assert client.get_items(["b", "none", "a", "b"]) == [second, None, first, second]
    assert client.delete_items(["a", "none"]) == 1
    assert client.get_items(["a"]) == [None]


def test_status_and_all_pages_of_versions(client: Client, running: Running) -> None:
    assert list(client.versions()) == []
    commit_versions(running, 203)
    assert [version.version for version in client.versions()] == list(range(203, 0, -1))
    assert client.status().version == 1


# --- Failures


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_every_error_comes_back_as_itself(kind: type[errors.RecsysError]) -> None:
    violations = [errors.Violation("a", "is bad"), errors.Violation("b", "is worse")]
    error = errors.InvalidInput(violations) if kind is errors.InvalidInput else kind("what happened")
    # Five times, because what is UNAVAILABLE is asked for again.
    with (
        scripted(*[error] * 5) as (_, target),
        Client(target, timeout=SECONDS) as client,
        pytest.raises(errors.RecsysError) as caught,
    ):
        client.status()
    assert type(caught.value) is kind
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert str(caught.value) == TABLE[kind].message or str(caught.value) == str(error)
    if isinstance(caught.value, errors.InvalidInput):
        assert caught.value.violations == violations


def test_nobody_listens() -> None:
    with free_port() as port, Client(f"127.0.0.1:{port}") as client, pytest.raises(CallFailed) as caught:
        client.recommend("u", timeout=0.2)
    # Which of the two depends on whether the time or the attempts were over first.
    assert caught.value.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_a_call_ends_at_its_deadline(running: Running) -> None:
    running.scorer.gate.clear()
    try:
        with Client(running.target, timeout=0.1) as client, pytest.raises(CallFailed) as caught:
            client.recommend("u")
        assert caught.value.code == "DEADLINE_EXCEEDED"
    finally:
        running.scorer.gate.set()


def test_an_unavailable_server_is_asked_again_with_the_same_feedback_id() -> None:
    busy = errors.NotReady("soon")
    with scripted(busy, busy, None) as (script, target), Client(target, timeout=SECONDS) as client:
        client.log_feedback([click()])
    assert len(script.requests) == 3
    assert len(set(script.requests)) == 1
    assert recommender_pb2.LogFeedbackRequest.FromString(script.requests[0]).feedback[0].feedback_id


@pytest.mark.parametrize("kind", [kind for kind, wire in TABLE.items() if wire.code != 14], ids=lambda k: k.__name__)
def test_no_other_failure_is_asked_again(kind: type[errors.RecsysError]) -> None:
    error = errors.InvalidInput([errors.Violation("f", "is bad")]) if kind is errors.InvalidInput else kind("text")
    with scripted(error, None) as (script, target), Client(target, timeout=SECONDS) as client, pytest.raises(kind):
        client.status()
    assert len(script.requests) == 1


def test_a_server_that_comes_up_late_is_reached(settings: Settings) -> None:
    with free_port() as port, Client(f"127.0.0.1:{port}", timeout=SECONDS) as client:
        with pytest.raises(CallFailed):
            client.recommend("u", timeout=0.05)
        with futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.recommend, "u")
            with serve(settings.model_copy(update={"port": port})):
                assert answer.result(SECONDS).version == 1


# --- The asyncio client


def test_the_asyncio_client_does_the_same(running: Running) -> None:
    async def use() -> None:
        async with AsyncClient(running.target, timeout=SECONDS) as client:
            assert [r.accepted for r in await client.log_feedback([click("item-0"), click(user_id="")])] == [
                True,
                False,
            ]
            assert (await client.recommend("u", 1)).items[0].reason == "often follows 'item-0' in your history"
            assert (await client.score("u", ["item-1"])).items[0].item_id == "item-1"
            assert await client.upsert_items([Item("a")]) == 1
            assert await client.get_items(["a", "none"]) == [Item("a"), None]
            assert await client.delete_items(["a"]) == 1
            assert (await client.status()).log_records == 1
            commit_versions(running, 103)
            assert [v.version async for v in client.versions()] == list(range(103, 0, -1))
            with pytest.raises(errors.InvalidInput, match="user_id") as caught:
                await client.recommend("")
            assert isinstance(caught.value.__cause__, grpc.RpcError)

    asyncio.run(use())


def test_the_asyncio_client_asks_an_unavailable_server_again() -> None:
    async def use(target: str) -> model_pb2.GetStatusResponse:
        async with AsyncClient(target, timeout=SECONDS) as client:
            return await client.status()

    with scripted(errors.NotReady("soon"), None) as (script, target):
        assert asyncio.run(use(target)) == model_pb2.GetStatusResponse()
    assert len(script.requests) == 2


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, Any]:
        return {
            name: inspect.signature(function).parameters
            for name, function in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    assert methods(Client) == methods(AsyncClient)


# --- The package


def test_the_package_exports_lazily_and_without_torch() -> None:
    code = "import sys, recsys; print('grpc' in sys.modules); recsys.Client; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == ["False", "False"]
    for name in recsys.__all__:
        assert getattr(recsys, name)
    missing: Callable[[], Any] = lambda: recsys.Oracle  # noqa: E731
    with pytest.raises(AttributeError, match="no attribute 'Oracle'"):
        missing()
