"""Passage: one connection, passed on between a client and the transport inside, and what the client may take of it.

All bytes go through as they come. The heads of the frames of HTTP/2 (RFC 9113) are looked at on the way, to know which
calls are open; GOAWAY is the one thing that is said here and not passed on.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import cast

from recsys.service.grpcio_transport import HANDSHAKE_SECONDS
from recsys.settings import Settings

# One that is told to go, or that something is closed for, has this long to say goodbye.
GOODBYE_SECONDS = 5.0
# What a client begins with.
PREFACE_BYTES = 24
# Of a frame: its head, and kinds and flags in it.
HEAD_BYTES, STREAM_BITS = 9, 0x7FFFFFFF
DATA, HEADERS, RST_STREAM, PING, GOAWAY, CONTINUATION = 0, 1, 3, 6, 7, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
# Graceful (section 6.8): no error, and whatever call is on its way is still taken.
LEAVE = (8).to_bytes(3) + bytes([GOAWAY, 0]) + bytes(4) + STREAM_BITS.to_bytes(4) + bytes(4)
# A message up to so many times too large is received, so that its sender can be told; nobody sends one that is larger.
TOO_LARGE = 2
# Clients may begin more calls than are taken until they have heard how many are; nobody has so many times as many open.
TOO_MANY = 10
# Pings too soon after the last one, with no call answered between them, before a client is disconnected; as grpcio
# counts.
STRIKES = 2


class Passage:
    """Pass on between two protocols that each wait for a transport: `outer` for the client's, `inner` for the other.

    Enforces max_idle_seconds and min_ping_seconds, and bounds what a call sends to TOO_LARGE times max_message_bytes.
    A connection is idle while no call is open on it.
    """

    def __init__(self, settings: Settings) -> None:
        """Make both ends, on the event loop that runs."""
        self._idle_seconds = settings.max_idle_seconds
        self._calls = _Calls(settings)
        self.outer, self.inner = _Outer(self._calls), _Inner(self._calls)

    async def run(self) -> None:
        """Pass on until one end is gone, or the client has shown nothing in time, or no call is open for too long.

        Both ends must have their transports.
        """
        outer, inner = self.outer, self.inner
        outer.join(inner)
        inner.join(outer)
        ends, told = {outer.ended, inner.ended}, False
        left = min(float(HANDSHAKE_SECONDS), self._idle_seconds)
        while left > 0:
            if (await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED))[0] or not outer.spoke:
                return
            left = self._calls.quiet_seconds(self._idle_seconds)
            if left <= 0 and not told:
                # A call may be on its way.
                self.leave()
                left, told = GOODBYE_SECONDS, True

    def leave(self) -> None:
        """Ask the client to begin no more calls on this connection, and to close it after those that are open."""
        self.inner.leave()

    async def close(self) -> None:
        """Close both ends and wait for it; what is on its way to the client may be lost if it says anything more."""
        self.inner.abort()
        await self.outer.close()
        await self.inner.close()

    def abort(self) -> None:
        """Close both ends at once."""
        self.outer.abort()
        self.inner.abort()


class _Calls:
    """What is open on a connection, and what its client does that it may not."""

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.get_running_loop()
        self._largest = TOO_LARGE * settings.max_message_bytes
        self._most, self._ping_seconds = TOO_MANY * settings.max_concurrent_streams, settings.min_ping_seconds
        # Bytes that have come of what each open call sends, and the last call that was begun: numbers only rise.
        self._sent: dict[int, int] = {}
        self._last = 0
        # When the last one was over, by the loop's clock, and whether an answer was begun since the last ping.
        self._over, self._answered = self._loop.time(), True
        self._pinged, self._strikes = float("-inf"), 0

    def quiet_seconds(self, idle: float) -> float:
        """Return how long it takes from now until no call has been open for `idle` seconds, if none is begun."""
        return idle if self._sent else self._over + idle - self._loop.time()

    def asked(self, kind: int, flags: int, stream: int, size: int) -> bool:
        """Take in the head of a frame from the client; return False when that is more than its share."""
        if kind == HEADERS and stream > self._last:
            self._last, self._sent[stream] = stream, 0
            return len(self._sent) <= self._most
        if kind == DATA and stream in self._sent:
            self._sent[stream] += size
            return self._sent[stream] <= self._largest
        if kind == RST_STREAM:
            self._end(stream)
        return kind != PING or bool(flags & ACK) or self._patient()

    def answered(self, kind: int, flags: int, stream: int, size: int) -> bool:
        """Take in the head of a frame to the client."""
        if kind in (HEADERS, DATA):
            self._answered = True
        if kind == RST_STREAM or (kind in (HEADERS, DATA) and flags & END_STREAM):
            self._end(stream)
        return True

    def _end(self, stream: int) -> None:
        if self._sent.pop(stream, None) is not None:
            self._over = self._loop.time()

    def _patient(self) -> bool:
        """Take in a ping. Clients send them to learn how fast answers come, too."""
        now = self._loop.time()
        if self._answered:
            self._strikes = 0
        elif now - self._pinged < self._ping_seconds:
            self._strikes += 1
        self._pinged, self._answered = now, False
        return self._strikes <= STRIKES


class _End(asyncio.Protocol):
    """One end of a connection; what it hears goes to the other, and no faster than that takes it."""

    transport: asyncio.Transport
    _other: _End

    def __init__(self, calls: _Calls, skip: int) -> None:
        self._calls = calls
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Whether a frame has come.
        self.spoke = False
        # Bytes to come of the frame that is being received, and what has come of the next one's head.
        self._left, self._head = skip, b""

    def join(self, other: _End) -> None:
        """Begin to listen, and pass on what is heard to another that has a transport too."""
        self._other = other
        self.transport.resume_reading()

    async def close(self) -> None:
        """Send what is left, for GOODBYE_SECONDS at most, and close, if it ever was open; at once if cancelled."""
        if not hasattr(self, "transport"):
            return
        # A second time it would forget, over TLS, what it has not sent, and then could not be ended any more.
        if not self.transport.is_closing():
            self.transport.close()
        with suppress(asyncio.CancelledError):
            await asyncio.wait({self.ended}, timeout=GOODBYE_SECONDS)
        self.abort()
        await asyncio.wait({self.ended})

    def abort(self) -> None:
        """Close it at once, if it is open."""
        if hasattr(self, "transport") and not self.ended.done():
            self.transport.abort()

    def write(self, data: bytes) -> None:
        """Send something, unless it is closed or about to be."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # Until there is somebody to tell.
        self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        if self._head:
            data = self._head + data
        size, at = len(data), self._left
        while size - at >= HEAD_BYTES:
            stream = int.from_bytes(data[at + 5 : at + HEAD_BYTES]) & STREAM_BITS
            length = int.from_bytes(data[at : at + 3])
            if not self._take(data[at + 3], data[at + 4], stream, length):
                self.transport.abort()
                return
            self.spoke = True
            at += HEAD_BYTES + length
        # A part of a head is of no use to anybody yet.
        whole = min(at, size)
        self._left, self._head = at - whole, data[whole:]
        self._other.write(data[:whole])

    def _take(self, kind: int, flags: int, stream: int, size: int) -> bool:
        """Take in the head of a frame; return False to hang up."""
        raise NotImplementedError

    def pause_writing(self) -> None:
        if not self._other.ended.done():
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._other.ended.done():
            self._other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class _Outer(_End):
    """The client's end."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__(calls, PREFACE_BYTES)

    def _take(self, kind: int, flags: int, stream: int, size: int) -> bool:
        return self._calls.asked(kind, flags, stream, size)


class _Inner(_End):
    """The end of the transport inside."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__(calls, 0)
        self._leaving = False
        # Whether more of a block of headers is to come, which nothing else may come between.
        self._unfinished = False

    def leave(self) -> None:
        """Tell the client to leave, as soon as nothing is half passed on."""
        self._leaving = True
        self._say_so()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._leaving:
            self._say_so()

    def _say_so(self) -> None:
        # Its first frame must be its own.
        if self.spoke and not self._left and not self._unfinished:
            self._leaving = False
            self._other.write(LEAVE)

    def _take(self, kind: int, flags: int, stream: int, size: int) -> bool:
        if kind in (HEADERS, CONTINUATION):
            self._unfinished = not flags & END_HEADERS
        return self._calls.answered(kind, flags, stream, size)
