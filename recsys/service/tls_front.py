"""TlsFront: connections over TLS, passed on in the clear to a Unix socket that nobody else can reach.

For a transport that knows no TLS. What it says of HTTP/2 is that clients must agree to speak it (ALPN "h2"), nothing
else is looked at; the TLS itself is asyncio's, OpenSSL that is.
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

# A peer that connects and does not finish its handshake holds a connection for this long, and for that long one that
# is closed and does not say goodbye.
HANDSHAKE_SECONDS = 10.0
SHUTDOWN_SECONDS = 5.0
# How long nobody is let in when the system has no descriptors left.
PAUSE_SECONDS = 0.1
BACKLOG = 1024
# All gRPC speaks.
PROTOCOL = "h2"

_log = logging.getLogger(__name__)


class TlsFront:
    """Listen from the moment it is made, on `port`; enforces max_connections and max_idle_seconds.

    A connection is one from its first packet on, and idle while nothing at all is said, pings included.
    """

    def __init__(self, settings: Settings, *, share_port: bool = False) -> None:
        """Listen.

        Raises:
            SettingsError: when the settings name TLS files that cannot be used.
            AddressInUse: when the port is taken.
        """
        self._context = _context(settings)
        self._most, self._idle_seconds = settings.max_connections, settings.max_idle_seconds
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
        """Close what connections there are, some time after `refuse`."""
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

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
        if len(self._serving) >= self._most:
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
        loop, outer, inner = self._loop, _Side(), _Side()
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
        finally:
            outer.close()
            inner.close()

    async def _pass_on(self, outer: _Side, inner: _Side) -> None:
        outer.join(inner)
        inner.join(outer)
        left = self._idle_seconds
        ends = {outer.ended, inner.ended}
        while left > 0:
            if (await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED))[0]:
                return
            left = max(outer.heard, inner.heard) + self._idle_seconds - self._loop.time()


class _Side(asyncio.Protocol):
    """One end of a connection; what it hears goes to the other, and no faster than that takes it."""

    transport: asyncio.Transport
    _other: asyncio.Transport

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        # When it last said anything, by the loop's clock.
        self.heard = 0.0

    def join(self, other: _Side) -> None:
        """Begin to listen, and pass on what is heard to another that has a transport too."""
        self._other, self.heard = other.transport, self._loop.time()
        self.transport.resume_reading()

    def close(self) -> None:
        """Close it, where it ever was open."""
        if hasattr(self, "transport"):
            self.transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # Until there is somebody to tell.
        self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self.heard = self._loop.time()
        self._other.write(data)

    def pause_writing(self) -> None:
        self._other.pause_reading()

    def resume_writing(self) -> None:
        self._other.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


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
