"""Edge: what every call passes on its way in and out: request id, numbers, permission, parsing, deadline and errors."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from recsys.errors import DeadlinePassed, InvalidInput, NotReady, Overloaded, Violation
from recsys.metrics import ServerMetrics
from recsys.service.auth import Guard
from recsys.service.errors import to_status, wire_error

Context = grpc.aio.ServicerContext[Any, Any]

# A caller that sets no deadline would otherwise wait for ever.
DEFAULT_DEADLINE_SECONDS = 10.0
REQUEST_ID_HEADER = "x-request-id"
MAX_REQUEST_ID_LENGTH = 128
# As the metrics name what turned a call away before any work on it.
_REJECTIONS: dict[type[Exception], str] = {
    Overloaded: "overloaded",
    DeadlinePassed: "deadline_passed",
    NotReady: "not_ready",
}

_log = logging.getLogger(__name__)


def deadline_of(context: Context) -> float:
    """Return when the call must be answered, in seconds of time.monotonic().

    Raises:
        DeadlinePassed: when that moment is over, so that no work is begun.
    """
    remaining = context.time_remaining()
    seconds = DEFAULT_DEADLINE_SECONDS if remaining is None else remaining
    if seconds <= 0:
        raise DeadlinePassed("the deadline passed before work on the call began")
    return time.monotonic() + seconds


class Edge(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Wrap every method of our own services; health and reflection pass as they are, and need no token.

    Whether the caller may call at all is asked before its message is looked at.
    """

    def __init__(self, services: Sequence[str], metrics: ServerMetrics, guard: Guard, *, max_answer_bytes: int) -> None:
        self._services = frozenset(services)
        self._metrics = metrics
        self._guard = guard
        self._max_answer_bytes = max_answer_bytes
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a call, wrapped once per method."""
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is not None:
            return known
        handler = await continuation(handler_call_details)
        # No handler: an unknown method, whose name the caller chose; it must not grow the cache.
        if handler is None or method.split("/")[1] not in self._services:
            return handler
        return self._wrapped.setdefault(method, self._wrap(method, handler))

    def _wrap(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        service, name = method.removeprefix("/").split("/")
        parse: Any = handler.request_deserializer
        serialize: Any = handler.response_serializer
        behavior: Any = handler.unary_unary

        async def call(data: bytes, context: Context) -> bytes:
            started = time.perf_counter()
            self._metrics.rpc_started(service, name)

            def handled(code: grpc.StatusCode) -> None:
                self._metrics.rpc_handled(service, name, code.name, time.perf_counter() - started)

            try:
                self._guard.check(method, context.invocation_metadata() or ())
                answer: bytes = serialize(await behavior(_parse(parse, data), context))
                self._check_size(answer)
            except asyncio.CancelledError:
                # The library cancels the handler both when the caller hangs up and when its deadline passes.
                late = context.time_remaining() == 0
                handled(grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED)
                raise
            except Exception as error:
                status = rpc_status.to_status(self._explain(error, method, context))
                # Before the caller hears of it: who reads the numbers after a call finds it counted.
                handled(status.code)
                await _abort(context, status)
            handled(grpc.StatusCode.OK)
            return answer

        # No deserializer: the library answers UNKNOWN to bytes that do not parse, where the fault is the caller's. No
        # serializer: it ends a call whose answer is too large without a reason, and after it was counted as OK.
        behavior_of_bytes: Any = call
        return grpc.unary_unary_rpc_method_handler(behavior_of_bytes)

    def _check_size(self, answer: bytes) -> None:
        if len(answer) > self._max_answer_bytes:
            given = f"asks for an answer of {len(answer)} bytes; at most {self._max_answer_bytes} fit a message"
            raise InvalidInput([Violation("request", f"{given}; ask for less at a time")])

    def _explain(self, error: Exception, method: str, context: Context) -> Any:
        request_id = _request_id(context)
        wire = wire_error(error)
        if wire.code == grpc.StatusCode.INTERNAL.value[0]:
            _log.error("%s failed, request id %s", method, request_id, exc_info=error)
        elif wire.message is not None:
            _log.warning("%s refused, request id %s: %s", method, request_id, error)
        if type(error) in _REJECTIONS:
            self._metrics.rejected(_REJECTIONS[type(error)])
        return to_status(error, method=method, request_id=request_id)


async def _abort(context: Context, status: grpc.Status) -> NoReturn:
    """End a call with an error; quietly when the caller has gone meanwhile, as many do while a server is overloaded."""
    try:
        await context.abort(status.code, status.details, status.trailing_metadata)
    except grpc.aio.AbortError:
        raise
    except Exception:
        if not context.done():
            raise
        raise asyncio.CancelledError from None


def _parse(parse: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return parse(data)
    except DecodeError:
        raise InvalidInput([Violation("request", "is not a valid protobuf message of this method")]) from None


def _request_id(context: Context) -> str:
    """Return the caller's request id where it sent a sound one, else a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_HEADER and isinstance(value, str) and 0 < len(value) <= MAX_REQUEST_ID_LENGTH:
            return value
    return uuid.uuid4().hex
