"""What both clients' channels share: how calls are repeated, their methods, and errors read back from the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from recsys import errors
from recsys.v1 import catalog_pb2, model_pb2, recommender_pb2

DETAILS_HEADER = "grpc-status-details-bin"
DOMAIN = "recsys"

# gRFC A6. Only UNAVAILABLE: whatever else fails may have been done, or would fail again.
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
OPTIONS = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    # The library waits a second before it connects again, as long as a call may take.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class CallFailed(errors.RecsysError):
    """Tell that a call failed on its way: nobody listens, or its deadline passed; `code` is the gRPC status's name.

    A call that writes may have been done all the same when `code` is not "UNAVAILABLE".
    """

    reason = "CALL_FAILED"

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(f"{code}: {message}")


def multicallables(channel: Any) -> dict[str, Any]:
    """Make what sends each method's requests, by the method's full name; for both kinds of channel."""
    return {
        f"/{service.full_name}/{method.name}": channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            request_serializer=method.input_type._concrete_class.SerializeToString,
            response_deserializer=method.output_type._concrete_class.FromString,
        )
        for file in (recommender_pb2, catalog_pb2, model_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def to_error(failure: grpc.RpcError) -> errors.RecsysError:
    """Read the error back that the server raised; CallFailed for what did not come from there."""
    call: Any = failure
    text = str(call.details())
    status = _status(call)
    if status is not None:
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        for detail in status.details:
            # Unpack fills the message only when the types agree.
            detail.Unpack(info)
            detail.Unpack(bad_request)
        kind = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
        if kind is errors.InvalidInput:
            return errors.InvalidInput([errors.Violation(v.field, v.description) for v in bad_request.field_violations])
        if kind is not None:
            return kind(text)
    return CallFailed(call.code().name, text)


def _status(call: Any) -> status_pb2.Status | None:
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_HEADER:
            return status_pb2.Status.FromString(value)
    return None


def _tree(kind: type[errors.RecsysError]) -> Iterator[type[errors.RecsysError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


_BY_REASON = {kind.reason: kind for kind in _tree(errors.RecsysError) if kind is not CallFailed}
