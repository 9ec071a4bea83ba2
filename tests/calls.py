"""Calls that tests make over a socket, and how a refusal is read and checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from serving import Running

from recsys.v1 import recommender_pb2
from recsys.v1.recommender_pb2_grpc import RecommenderServiceStub

Request = recommender_pb2.RecommendRequest
Feedback = recommender_pb2.Feedback
SECONDS = 30


def recommender(running: Running) -> Any:
    return RecommenderServiceStub(running.channel)


def recommend(running: Running, **fields: Any) -> Any:
    return recommender(running).Recommend(Request(**{"user_id": "u", **fields}), timeout=SECONDS)


def log(running: Running, *messages: Feedback) -> Any:
    request = recommender_pb2.LogFeedbackRequest(feedback=messages)
    return recommender(running).LogFeedback(request, timeout=SECONDS)


def click(item_id: str = "item-7", **fields: Any) -> Feedback:
    return Feedback(**{"user_id": "u", "item_id": item_id, "feedback_class": "click", **fields})


def refusal(call: Callable[[], Any]) -> tuple[grpc.RpcError, dict[str, Any]]:
    """Return a failed call and its details by type name; each type at most once."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value, details_of(rpc_status.from_call(caught.value))


def details_of(status: status_pb2.Status | None) -> dict[str, Any]:
    assert status is not None
    found: dict[str, Message] = {}
    for packed in status.details:
        name = packed.TypeName().rpartition(".")[2]
        assert name not in found
        found[name] = getattr(error_details_pb2, name)()
        assert packed.Unpack(found[name])
    return found


def check_refusal(call: Callable[[], Any], code: grpc.StatusCode, reason: str) -> dict[str, Any]:
    error, details = refusal(call)
    assert error.code() == code
    info = details["ErrorInfo"]
    assert (info.reason, info.domain) == (reason, "recsys")
    assert details["RequestInfo"].request_id
    retriable = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert ("RetryInfo" in details) == retriable
    if retriable:
        assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0
    return {"message": error.details(), **details}


def violations(call: Callable[[], Any]) -> dict[str, str]:
    details = check_refusal(call, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")
    found = {v.field: v.description for v in details["BadRequest"].field_violations}
    assert details["ErrorInfo"].metadata["fields"] == ",".join(found)
    return found
