"""Edge: what every call passes on its way in and out, whichever transport brings it.

Request id, numbers, permission, parsing, deadline and errors. Nothing here waits: a call that cannot be answered at
once is ended by the thread that has its answer.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2

from recsys import traces
from recsys.errors import DeadlinePassed, InvalidInput, NotReady, Overloaded, Violation
from recsys.metrics import CODES, ServerMetrics
from recsys.service.auth import Guard
from recsys.service.errors import Refusal, to_refusal, wire_error

# A caller that sets no deadline would otherwise wait for ever.
DEFAULT_DEADLINE_SECONDS = 10.0
REQUEST_ID_HEADER = "x-request-id"
MAX_REQUEST_ID_LENGTH = 128
REQUEST_ID_BITS = 128
# As the metrics name what turned a call away before any work on it.
_REJECTIONS: dict[type[Exception], str] = {
    Overloaded: "overloaded",
    DeadlinePassed: "deadline_passed",
    NotReady: "not_ready",
}

_log = logging.getLogger(__name__)

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Pending:
    """Promise a response: `make` turns what `future` ends with into it, in the thread that ends the future.

    A message, or the bytes of one.
    """

    future: Future[Any]
    make: Callable[[Any], Message | bytes]


@dataclass(frozen=True, slots=True)
class Method:
    """Hold one method: `behavior` takes the request and the deadline, in seconds of time.monotonic().

    `refusal`, where there is one, is asked before, with the deadline, and tells why the call is refused; None where it
    is not.
    """

    service: str
    name: str
    parse: Callable[[bytes], Message]
    behavior: Callable[[Any, float], Message | Pending]
    refusal: Callable[[float], Exception | None] | None
    # The method's full name, such as /recsys.v1.X/Y.
    path: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", f"/{self.service}/{self.name}")


def methods_of(service: ServiceDescriptor, servicer: object) -> Iterator[Method]:
    """Go through a service's methods, each with the servicer's attribute of that name, and that in its `refusals`."""
    refusals = getattr(servicer, "refusals", {})
    for method in service.methods:
        name, parse = method.name, message_factory.GetMessageClass(method.input_type).FromString
        yield Method(service.full_name, name, parse, getattr(servicer, name), refusals.get(name))


# None: the caller has gone, and nothing is sent.
Ending: TypeAlias = bytes | Refusal | None


class Edge:
    """Make a Call of what a transport receives; `methods` holds every method of our own services by its path."""

    def __init__(
        self, methods: Iterable[Method], metrics: ServerMetrics, guard: Guard, *, max_answer_bytes: int
    ) -> None:
        self.methods: Mapping[str, Method] = {method.path: method for method in methods}
        self.metrics = metrics
        self.guard = guard
        self.max_answer_bytes = max_answer_bytes

    def call(self, path: str, metadata: Metadata, remaining: float | None, end: Callable[[Ending], None]) -> Call:
        """Prepare the call of a method in `methods`; `remaining` is the time until its deadline, None without one.

        `end` is called once, with what the caller shall get: while the call begins or later, from any thread.
        """
        return Call(self, self.methods[path], metadata, remaining, end)


class Call:
    """One call, from its arrival to its end; `begin` and `cancel` belong to one thread.

    Whether the caller may call at all is asked before its message is looked at.
    """

    __slots__ = ("_deadline", "_edge", "_end", "_given_up", "_metadata", "_method", "_pending", "_span", "_started")

    def __init__(
        self,
        edge: Edge,
        method: Method,
        metadata: Metadata,
        remaining: float | None,
        end: Callable[[Ending], None],
    ) -> None:
        self._started = time.perf_counter()
        self._edge = edge
        self._method = method
        self._metadata = metadata
        seconds = DEFAULT_DEADLINE_SECONDS if remaining is None else remaining
        self._deadline = time.monotonic() + seconds
        self._end = end
        self._pending: Pending | None = None
        self._given_up = False

    def begin(self, data: bytes) -> None:
        """Check and parse the message and start the work, or refuse it."""
        method = self._method
        self._edge.metrics.rpc_started(method.service, method.name)
        self._span = traces.call(method.path, self._metadata)
        try:
            found: Pending | Exception | None = self._work(method, data)
        except Exception as error:
            found = error
        if isinstance(found, Exception):
            self._refuse(found)
        elif found is not None:
            self._pending = found
            found.future.add_done_callback(self._finish)

    def _work(self, method: Method, data: bytes) -> Pending | Exception | None:
        """Begin the work and return it, or why it is refused; None where the call has its answer already."""
        self._edge.guard.check(method.path, self._metadata)
        if self._deadline <= time.monotonic():
            return DeadlinePassed("the deadline passed before work on the call began")
        # Not raised, and before the message is read: an overloaded server does little else.
        if method.refusal is not None and (refused := method.refusal(self._deadline)) is not None:
            return refused
        with traces.within(self._span):
            found = method.behavior(_parse(method.parse, data), self._deadline)
        if isinstance(found, Message):
            self._answer(found)
            return None
        return found

    def cancel(self) -> None:
        """Note that the caller has gone; work that has not begun never will."""
        self._given_up = True
        pending = self._pending
        if pending is not None:
            pending.future.cancel()

    def _finish(self, work: Future[Any]) -> None:
        pending, self._pending = self._pending, None
        # A future keeps its callbacks: without this each call would be a cycle, left to the garbage collector.
        assert pending is not None
        if self._given_up or work.cancelled():
            # Transports cancel both when the caller hangs up and when its deadline passes.
            late = time.monotonic() >= self._deadline
            self._handled(code_pb2.DEADLINE_EXCEEDED if late else code_pb2.CANCELLED)
            self._end(None)
            return
        try:
            self._answer(pending.make(work.result()))
        except Exception as error:
            self._refuse(error)

    def _answer(self, response: Message | bytes) -> None:
        answer = response if isinstance(response, bytes) else response.SerializeToString()
        limit = self._edge.max_answer_bytes
        if len(answer) > limit:
            given = f"asks for an answer of {len(answer)} bytes; at most {limit} fit a message"
            raise InvalidInput([Violation("request", f"{given}; ask for less at a time")])
        # Counted before the caller hears of it: who reads the numbers after a call finds it there.
        self._handled(code_pb2.OK)
        self._end(answer)

    def _refuse(self, error: Exception) -> None:
        path, request_id, wire = self._method.path, _request_id(self._metadata), wire_error(error)
        if wire.code == code_pb2.INTERNAL:
            _log.error("%s failed, request id %s", path, request_id, exc_info=error)
        elif wire.message is not None:
            _log.warning("%s refused, request id %s: %s", path, request_id, error)
        if type(error) in _REJECTIONS:
            self._edge.metrics.rejected(_REJECTIONS[type(error)])
        self._handled(wire.code)
        self._end(to_refusal(error, wire, method=path, request_id=request_id))

    def _handled(self, code: int) -> None:
        method = self._method
        self._edge.metrics.rpc_handled(method.service, method.name, CODES[code], time.perf_counter() - self._started)
        if self._span is not None:
            self._span.answered(CODES[code])


def _parse(parse: Callable[[bytes], Message], data: bytes) -> Message:
    """Read a message here: libraries answer UNKNOWN or INTERNAL to bytes that are the caller's fault."""
    try:
        return parse(data)
    except DecodeError:
        raise InvalidInput([Violation("request", "is not a valid protobuf message of this method")]) from None


def _request_id(metadata: Metadata) -> str:
    """Return the caller's request id where it sent a sound one, else a new one."""
    for key, value in metadata:
        if key == REQUEST_ID_HEADER and isinstance(value, str) and 0 < len(value) <= MAX_REQUEST_ID_LENGTH:
            return value
    return f"{random.getrandbits(REQUEST_ID_BITS):0{REQUEST_ID_BITS // 4}x}"
