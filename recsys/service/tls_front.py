"""TlsFront: connections over TLS, passed on in the clear to a Unix socket that nobody else can reach.

For a transport that knows no TLS, and not what one peer may take of it. The TLS is asyncio's, OpenSSL that is; of
HTTP/2 (RFC 9113) clients must agree to speak it, and the heads of the frames that they send are looked at.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import cast

from recsys.service.grpcio_transport import taken
from recsys.settings import Settings, bracketed
from recsys.tls import Named, read_pem

# A peer that connects and does not finish its handshake holds a connection for this long, and one that is closed and
# does not say goodbye for that long.
HANDSHAKE_SECONDS = 10.0
SHUTDOWN_SECONDS = 5.0
# How long nobody is let in when the system has no descriptors left.
PAUSE_SECONDS = 0.1
BACKLOG = 1024
# All gRPC speaks, and what a client begins with.
PROTOCOL = "h2"
PREFACE_BYTES = 24
# Of a frame: its head, and kinds and flags in it.
HEAD_BYTES, STREAM_BITS = 9, 0x7FFFFFFF
DATA, RST_STREAM, PING = 0, 3, 6
END_STREAM, ACK = 1, 1
# A message up to so many times too large is received, so that its sender can be told; nobody sends one that is larger.
TOO_LARGE = 2
# Pings too soon after the last one, with nothing said to the client between them but that it came, before a client is
# disconnected; as grpcio counts.
STRIKES = 2
PONG_BYTES = HEAD_BYTES + 8

_log = logging.getLogger(__name__)


class TlsFront:
    """Listen from the moment it is made, on `port`.

    Enforces max_connections, max_idle_seconds and min_ping_seconds, and bounds a message to TOO_LARGE times
    max_message_bytes while it arrives. A connection is one from its first packet on, and idle while nothing at all is
    said, pings included.
    """

    def __init__(self, settings: Settings, *, share_port: bool = False) -> None:
        """Listen.

        Raises:
            SettingsError: when the settings name TLS files that cannot be used.
            AddressInUse: when the port is taken.
        """
        self._context = _context(settings)
        self._settings = settings
        self._socket = _listen(settings, share_port)
        self.port = int(self._socket.getsockname()[1])
        self._serving: set[asyncio.Task[None]] = set()

    def start(self, path: str) -> None:
        """Begin to pass connections on to the Unix socket at `path`, on the event loop that runs."""
        self._path, self._loop = path, asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._accept)

    def refuse(self) -> None:
        """Let nobody else in; connections that there are stay."""
        self._loop.remove_reader(self._socket)
        self._socket.close()

    async def close(self) -> None:
        """Close what connections there are at once, some time after `refuse`."""
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("no connection can be accepted: %s", error)
            self._loop.remove_reader(self._socket)
            self._loop.call_later(PAUSE_SECONDS, self._go_on)
            return
        if len(self._serving) >= self._settings.max_connections:
            connection.close()
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._serve(connection))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    def _go_on(self) -> None:
        # Meanwhile it may have been closed.
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._accept)

    async def _serve(self, connection: socket.socket) -> None:
        """Pass on all that either side of a connection says until one of them is gone or both have been silent."""
        loop, outer, inner = self._loop, _Outer(self._settings), _Side()
        try:
            await loop.connect_accepted_socket(
                lambda: outer,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS,
            )
            if outer.transport.get_extra_info("ssl_object").selected_alpn_protocol() == PROTOCOL:
                await loop.create_unix_connection(lambda: inner, self._path)
                await self._pass_on(outer, inner)
        except OSError as error:
            # Strangers that speak no TLS, or show no certificate, are nothing to trouble anybody with.
            _log.debug("a connection came to nothing: %s", error)
        except asyncio.CancelledError:
            outer.abort()
            inner.abort()
        await outer.close()
        await inner.close()

    async def _pass_on(self, outer: _Side, inner: _Side) -> None:
        outer.join(inner)
        inner.join(outer)
        left = idle = self._settings.max_idle_seconds
        ends = {outer.ended, inner.ended}
        while left > 0:
            if (await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED))[0]:
                return
            left = max(outer.heard, inner.heard) + idle - self._loop.time()


class _Side(asyncio.Protocol):
    """One end of a connection; what it hears goes to the other, and no faster than that takes it."""

    transport: asyncio.Transport
    _other: _Side

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        # When it last said anything, by the loop's clock, and how many bytes it has said.
        self.heard, self.said = 0.0, 0

    def join(self, other: _Side) -> None:
        """Begin to listen, and pass on what is heard to another that has a transport too."""
        self._other, self.heard = other, self._loop.time()
        self.transport.resume_reading()

    async def close(self) -> None:
        """Send what is left, and wait until it is closed, if it ever was open; who is cancelled does not wait."""
        if hasattr(self, "transport"):
            self.transport.close()
            try:
                await asyncio.wait({self.ended})
            except asyncio.CancelledError:
                self.transport.abort()
                await asyncio.wait({self.ended})

    def abort(self) -> None:
        """Close it at once, if it ever was open."""
        if hasattr(self, "transport"):
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # Until there is somebody to tell.
        self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self.heard = self._loop.time()
        self.said += len(data)
        self._other.transport.write(data)

    def pause_writing(self) -> None:
        self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        self._other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class _Outer(_Side):
    """The client's end, which is disconnected when it takes more than its share."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._largest = TOO_LARGE * settings.max_message_bytes
        self._most, self._ping_seconds = settings.max_concurrent_streams, settings.min_ping_seconds
        # Bytes to come of the frame that is being received, and what has come of the next one's head.
        self._left, self._head = PREFACE_BYTES, b""
        # Bytes that have come of each message of which more is to come.
        self._sent: dict[int, int] = {}
        # When it last pinged, how often it has, and how many bytes it was told by then that are no pongs.
        self._pinged, self._pings, self._told, self._strikes = float("-inf"), 0, 0, 0

    def data_received(self, data: bytes) -> None:
        if self._fair(data):
            super().data_received(data)
        else:
            self.transport.abort()

    def _fair(self, data: bytes) -> bool:
        """Follow the frames, and tell whether the client keeps to its share."""
        at = self._left
        if self._head:
            data, at = self._head + data, 0
        while len(data) - at >= HEAD_BYTES:
            size, kind, flags = int.from_bytes(data[at : at + 3]), data[at + 3], data[at + 4]
            stream = int.from_bytes(data[at + 5 : at + HEAD_BYTES]) & STREAM_BITS
            if kind == DATA and not self._room(stream, size, flags):
                return False
            if kind == RST_STREAM:
                self._sent.pop(stream, None)
            if kind == PING and not flags & ACK and not self._patient():
                return False
            at += HEAD_BYTES + size
        self._left = max(0, at - len(data))
        self._head = data[at:]
        return True

    def _room(self, stream: int, size: int, flags: int) -> bool:
        """Take in that so much came of a call's message."""
        sent = self._sent.pop(stream, 0) + size
        if not flags & END_STREAM:
            self._sent[stream] = sent
        # Calls that were answered early may leave a message unfinished; nobody leaves many.
        return sent <= self._largest and len(self._sent) <= 2 * self._most

    def _patient(self) -> bool:
        """Take in a ping."""
        now, told = self._loop.time(), self._other.said - PONG_BYTES * self._pings
        # Clients ping to learn how fast answers come, too. While pongs are due what was told is taken for less.
        soon = now - self._pinged < self._ping_seconds and told <= self._told
        self._strikes = self._strikes + 1 if soon else 0
        self._pinged, self._pings, self._told = now, self._pings + 1, max(told, self._told)
        return self._strikes <= STRIKES


def _context(settings: Settings) -> ssl.SSLContext:
    """Read the certificates that the settings name."""
    read_pem(
        Named("tls_client_ca", settings.tls_client_ca),
        Named("tls_certificate", settings.tls_certificate),
        Named("tls_key", settings.tls_key),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([PROTOCOL])
    context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    if settings.tls_client_ca:
        context.load_verify_locations(settings.tls_client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _listen(settings: Settings, share_port: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[
            0
        ]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if share_port:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listening.bind(address)
            listening.listen(BACKLOG)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise taken(f"{bracketed(settings.host)}:{settings.port}") from error
    listening.setblocking(False)
    return listening
