"""HttpServer: one small HTTP server with a bound on its threads, and on how long a peer may hold one of them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from recsys.errors import AddressInUse
from recsys.settings import bracketed

# Prometheus takes one, an open page one now and then: more at a time are refused, and ask again later.
MAX_CONNECTIONS = 16
# A peer that sends or takes nothing for so long is gone; nobody holds a thread for longer than the second, whatever
# they send.
SILENT_SECONDS = 5.0
CONNECTION_SECONDS = 30.0
# How often connections are looked through for those that last too long.
LOOK_SECONDS = 0.5

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

_BUSY = (
    b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\n"
    b"too many connections at a time; try again\n"
)


class _Handler(WSGIRequestHandler):
    timeout = SILENT_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a line for each scrape and poll would hide what matters."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, family: socket.AddressFamily, address: tuple[str, int]) -> None:
        self.address_family = family
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._until: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            with suppress(OSError):
                request.settimeout(0)
                request.send(_BUSY)
            self.shutdown_request(request)
            return
        with self._lock:
            self._until[request] = time.monotonic() + CONNECTION_SECONDS
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._until[request]
            self._free.release()

    def service_actions(self) -> None:
        """Cut off who has held a thread for too long; called between connections and twice a second."""
        now = time.monotonic()
        with self._lock:
            for request in [each for each, until in self._until.items() if until <= now]:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of peers that hang up or fall silent: that is theirs to do."""


class HttpServer:
    """Serve a WSGI application from threads of its own until closed; `port` is the real one."""

    def __init__(self, host: str, port: int, app: App) -> None:
        """Listen and begin to serve.

        Raises:
            AddressInUse: when the port is taken.
        """
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, (str(address[0]), int(address[1])))
        except OSError as error:
            where = f"{bracketed(host)}:{port}"
            raise AddressInUse(
                f"cannot serve metrics on {where} (host, metrics_port): {error.strerror or error}"
            ) from error
        self._server.set_app(app)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": LOOK_SECONDS}, name="recsys-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening and wait for the thread that does."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
