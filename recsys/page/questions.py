"""Questions: what the page asks the services, by the same edge as any gRPC call: roles, limits, deadlines, numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from google.protobuf.message import Message
from google.rpc import code_pb2

from recsys.service.edge import Edge, Ending
from recsys.service.errors import Refusal
from recsys.v1 import catalog_pb2, recommender_pb2

ANSWER_SECONDS = 5.0
# Titles are an adornment: without them ids are shown.
TITLE_SECONDS = 1.0
MAX_ANSWER_BYTES = 1 << 20
RECOMMEND, EXPLAIN = "/api/recommendations", "/api/explanations"
# What a gRPC code becomes; others are the server's fault.
HTTP_STATUS = {
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.NOT_FOUND: 404,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DEADLINE_EXCEEDED: 504,
}

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """Hold an HTTP status and the object that goes with it."""

    status: int
    body: Body


class Questions(Protocol):
    """Answer what the page asks about one user."""

    def ask(self, path: str, question: Body, authorization: str | None) -> Reply:
        """Answer a question (checked: of the right types) put to RECOMMEND or EXPLAIN."""


class Refused(Exception):
    """Carry the reply that says why there is no answer."""

    def __init__(self, status: int, message: str) -> None:
        self.reply = refusal(status, message)
        super().__init__(message)


def refusal(status: int, message: str) -> Reply:
    """Make the reply of every request that has no answer."""
    return Reply(status, {"error": {"status": status, "message": message}})


class InProcess:
    """Put questions to the services of this process."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    def ask(self, path: str, question: Body, authorization: str | None) -> Reply:
        """Answer, or say why not."""
        metadata = [("authorization", authorization)] if authorization else []
        try:
            body = (self._recommend if path == RECOMMEND else self._explain)(question, metadata)
        except Refused as refused:
            return refused.reply
        return Reply(200, body)

    def _recommend(self, question: Body, metadata: list[tuple[str, str]]) -> Body:
        request = recommender_pb2.RecommendRequest(user_id=question["user_id"], count=question["count"])
        response = recommender_pb2.RecommendResponse()
        self._call("RecommenderService/Recommend", request, response, metadata)
        titles = self._titles([item.item_id for item in response.items], metadata)
        return {
            "recommendation_id": response.recommendation_id,
            "version": response.version,
            "items": [
                {
                    "item_id": item.item_id,
                    "title": titles.get(item.item_id, ""),
                    "score": item.score,
                    "source": recommender_pb2.Source.Name(item.source).removeprefix("SOURCE_").lower(),
                    "reason": item.reason,
                }
                for item in response.items
            ],
        }

    def _explain(self, question: Body, metadata: list[tuple[str, str]]) -> Body:
        request = recommender_pb2.ExplainRequest(user_id=question["user_id"], item_id=question["item_id"])
        response = recommender_pb2.ExplainResponse()
        self._call("RecommenderService/Explain", request, response, metadata)
        titles = self._titles(list({entry.item_id: None for entry in response.history}), metadata)
        parts = response.parts
        return {
            "item_id": request.item_id,
            "version": response.version,
            "known": response.item.known,
            "score": response.item.score,
            "parts": {field.name: getattr(parts, field.name) for field in parts.DESCRIPTOR.fields},
            "class_probabilities": dict(response.item.class_probabilities),
            "history": [
                {
                    "item_id": entry.item_id,
                    "title": titles.get(entry.item_id, ""),
                    "feedback_class": entry.feedback_class,
                    "time_ms": entry.time.ToMilliseconds(),
                    "influence": entry.influence,
                }
                for entry in response.history
            ],
        }

    def _titles(self, item_ids: list[str], metadata: list[tuple[str, str]]) -> dict[str, str]:
        response = catalog_pb2.GetItemsResponse()
        if item_ids:
            try:
                request = catalog_pb2.GetItemsRequest(item_ids=item_ids)
                self._call("CatalogService/GetItems", request, response, metadata, TITLE_SECONDS)
            except Refused:
                return {}
        return {item.item_id: item.title for item in response.items}

    def _call(
        self,
        method: str,
        request: Message,
        response: Message,
        metadata: list[tuple[str, str]],
        seconds: float = ANSWER_SECONDS,
    ) -> None:
        """Make a call and read its answer into `response`.

        Raises:
            Refused: as a gRPC caller would be.
        """
        ended: Future[Ending] = Future()
        call = self._edge.call(f"/recsys.v1.{method}", metadata, seconds, ended.set_result)
        call.begin(request.SerializeToString())
        try:
            # What waits is ended at its deadline by whoever works on it; a little later something is wrong.
            ending = ended.result(2 * seconds)
        except TimeoutError:
            call.cancel()
            raise Refused(504, "no answer came in time") from None
        if ending is None:
            raise Refused(504, "the answer came too late")
        if isinstance(ending, Refusal):
            raise Refused(HTTP_STATUS.get(ending.code, 500), ending.message)
        response.ParseFromString(ending)


class Forwarded:
    """Pass questions on to the HTTP ports of the processes that serve; each is asked in turn."""

    def __init__(self, addresses: Callable[[], Mapping[str, str]]) -> None:
        """`addresses` gives the URL of each process's metrics by its name."""
        self._addresses = addresses
        self._turn = count()
        # Never by way of a proxy that the environment names.
        self._open = build_opener(ProxyHandler({})).open

    def ask(self, path: str, question: Body, authorization: str | None) -> Reply:
        """Answer with what the first process that can be reached says."""
        addresses = list(self._addresses().values())
        turn = next(self._turn)
        headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
        for number in range(len(addresses)):
            url = addresses[(turn + number) % len(addresses)].removesuffix("/metrics") + path
            request = Request(url, json.dumps(question).encode(), headers)
            try:
                with self._open(request, timeout=2 * ANSWER_SECONDS) as answer:
                    return Reply(answer.status, json.loads(answer.read(MAX_ANSWER_BYTES)))
            except HTTPError as error:
                with error:
                    return Reply(error.code, json.loads(error.read(MAX_ANSWER_BYTES)))
            except (OSError, ValueError):
                continue
        return refusal(503, "no server process can be reached; try again")
