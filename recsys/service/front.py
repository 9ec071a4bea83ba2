"""Front: connections, over TLS or not, passed on in the clear to a Unix socket that nobody else can reach.

For a transport that knows no TLS, and not what one peer may take of it. The TLS is asyncio's, OpenSSL that is; there
clients must agree to speak HTTP/2.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from typing import Any

from recsys.service.grpcio_transport import HANDSHAKE_SECONDS, KEEPALIVE_SECONDS, KEEPALIVE_TIMEOUT_SECONDS, taken
from recsys.service.passage import GOODBYE_SECONDS, Passage
from recsys.settings import Settings, bracketed, is_loopback
from recsys.tls import Named, read_pem

# How long nobody is let in when the system has no descriptors left, and how often that is said.
PAUSE_SECONDS = 0.1
SAY_SECONDS = 60.0
BACKLOG = 1024
UNREAD_MS = (KEEPALIVE_SECONDS + KEEPALIVE_TIMEOUT_SECONDS) * 1000
# An answer does not wait until its client has acknowledged the one before, 40 ms often (asyncio sees to that only where
# it made the socket); and a client that acknowledges nothing for so long is gone, or reads nothing.
OPTIONS = {
    socket.TCP_NODELAY: 1,
    **({socket.TCP_USER_TIMEOUT: UNREAD_MS} if hasattr(socket, "TCP_USER_TIMEOUT") else {}),
}
# All gRPC speaks.
PROTOCOL = "h2"
# Hosts that stand for every address of the machine.
WILD = ("0.0.0.0", "::")
# Addresses of an interface that is not there: what else a name stands for will do.
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

# Limits that such a transport does not have. By default they bound those who call from elsewhere.
LIMITS = ("max_connections", "max_idle_seconds", "min_ping_seconds")

_log = logging.getLogger(__name__)


def needed(settings: Settings) -> bool:
    """Return whether callers pass a Front: who is on this machine does so where TLS or a limit is asked for alone."""
    asked = any(name in settings.model_fields_set and getattr(settings, name) for name in LIMITS)
    return asked or bool(settings.tls_certificate) or not is_loopback(settings.host)


class Front:
    """Listen from the moment it is made, on `port`.

    Enforces max_connections, from a connection's first packet on, and what Passage does.
    """

    def __init__(self, settings: Settings, *, share_port: bool = False) -> None:
        """Listen.

        Raises:
            SettingsError: when the settings name TLS files that cannot be used.
            AddressInUse: when the port is taken.
        """
        self._context = _context(settings) if settings.tls_certificate else None
        self._settings = settings
        self._sockets = _listen(settings, share_port)
        self.port = int(self._sockets[0].getsockname()[1])
        self._serving: dict[asyncio.Task[None], Passage] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._said = float("-inf")

    def start(self, path: str) -> None:
        """Begin to pass connections on to the Unix socket at `path`, on the event loop that runs."""
        self._path, self._loop = path, asyncio.get_running_loop()
        for each in self._sockets:
            self._loop.add_reader(each, self._accept, each)

    def refuse(self) -> None:
        """Let nobody else in, and ask those who are to take their next calls elsewhere."""
        for each in self._sockets:
            if self._loop is not None:
                self._loop.remove_reader(each)
            each.close()
        for passage in self._serving.values():
            passage.leave()

    async def close(self, grace: float) -> None:
        """Close what connections there are, some time after `refuse`; their clients have `grace` seconds to do it.

        They do when they have their answers: what is closed here before may be lost to them.
        """
        if self._serving:
            await asyncio.wait(self._serving, timeout=grace)
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _accept(self, listening: socket.socket) -> None:
        assert self._loop is not None
        try:
            connection, _ = listening.accept()
        except (BlockingIOError, ConnectionError):
            # Nobody, or somebody who has gone again.
            return
        except OSError as error:
            self._wait(listening, error)
            return
        if len(self._serving) >= self._settings.max_connections:
            connection.close()
            return
        connection.setblocking(False)
        passage = Passage(self._settings)
        task = self._loop.create_task(self._serve(connection, passage))
        self._serving[task] = passage
        task.add_done_callback(self._served)

    def _wait(self, listening: socket.socket, error: OSError) -> None:
        assert self._loop is not None
        if self._loop.time() - self._said >= SAY_SECONDS:
            self._said = self._loop.time()
            _log.warning("no connection can be accepted: %s", error)
        self._loop.remove_reader(listening)
        self._loop.call_later(PAUSE_SECONDS, self._go_on, listening)

    def _go_on(self, listening: socket.socket) -> None:
        # Meanwhile it may have been closed.
        if self._loop is not None and listening.fileno() >= 0:
            self._loop.add_reader(listening, self._accept, listening)

    def _served(self, task: asyncio.Task[None]) -> None:
        del self._serving[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a connection came to nothing", exc_info=error)

    async def _serve(self, connection: socket.socket, passage: Passage) -> None:
        """Pass on all that either side of a connection says until one of them is gone."""
        try:
            if await self._open(connection, passage):
                await passage.run()
        except asyncio.CancelledError:
            passage.abort()
        finally:
            await passage.close()

    async def _open(self, connection: socket.socket, passage: Passage) -> bool:
        """Connect both ends."""
        assert self._loop is not None
        timeouts = {"ssl_handshake_timeout": HANDSHAKE_SECONDS, "ssl_shutdown_timeout": GOODBYE_SECONDS}
        try:
            transport, _ = await self._loop.connect_accepted_socket(
                lambda: passage.outer, connection, ssl=self._context, **(timeouts if self._context else {})
            )
        except OSError as error:
            # Strangers that speak no TLS, or show no certificate, are nothing to trouble anybody with.
            _log.debug("a connection came to nothing: %s", error)
            return False
        if self._context and transport.get_extra_info("ssl_object").selected_alpn_protocol() != PROTOCOL:
            return False
        try:
            await self._loop.create_unix_connection(lambda: passage.inner, self._path)
        except OSError as error:
            _log.warning("a connection cannot be passed on: %s", error)
            return False
        return True


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
        # Whoever is named is trusted: an authority between the root's and the clients' too.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _listen(settings: Settings, share_port: bool) -> list[socket.socket]:
    """Listen on every address that the host has; on all there are, of IPv4 and IPv6, where it says so."""
    found = list[socket.socket]()
    try:
        if settings.host in WILD and socket.has_dualstack_ipv6():
            found = _bind("::", settings.port, share_port, both=True)
        found = found or _bind(settings.host, settings.port, share_port)
    except OSError as error:
        raise taken(f"{bracketed(settings.host)}:{settings.port}") from error
    if not found:
        raise taken(f"{bracketed(settings.host)}:{settings.port}")
    return found


def _bind(host: str, port: int, share_port: bool, *, both: bool = False) -> list[socket.socket]:
    """Listen on each address of a host that this machine has; on IPv4 too where an address of IPv6 stands for both."""
    found = list[socket.socket]()
    try:
        # Where several names are one address it is told several times.
        for family, _, _, _, (address, _, *scope) in dict.fromkeys(
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        ):
            at: Any = (address, port, *scope)
            try:
                each = socket.create_server(
                    at, family=family, backlog=BACKLOG, reuse_port=share_port, dualstack_ipv6=both
                )
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                continue
            each.setblocking(False)
            for option, value in OPTIONS.items():
                # Whoever is accepted has them too.
                each.setsockopt(socket.IPPROTO_TCP, option, value)
            found.append(each)
            # Where the system chooses the port, one for all.
            port = each.getsockname()[1]
    except OSError:
        for each in found:
            each.close()
        raise
    return found
