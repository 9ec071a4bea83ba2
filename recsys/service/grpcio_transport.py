"""GrpcioTransport: calls over grpcio's asyncio server, with TLS and every limit of the settings."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import grpc
import grpc.aio

from recsys.errors import AddressInUse
from recsys.service.edge import Edge, Ending
from recsys.service.errors import Refusal
from recsys.settings import Settings, bracketed
from recsys.tls import Named, read_pem

Context = grpc.aio.ServicerContext[Any, Any]

# A peer that connects and then says nothing holds a connection for this long; the library's two minutes are many.
HANDSHAKE_SECONDS = 10
# How long a connection may be silent with calls in flight before it is asked whether it lives, and then to answer.
KEEPALIVE_SECONDS = 60
KEEPALIVE_TIMEOUT_SECONDS = 20
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class GrpcioTransport:
    """Serve on the event loop that calls `start`.

    Enforces max_message_bytes while a message arrives, max_metadata_bytes, max_concurrent_streams, max_connections,
    max_idle_seconds and min_ping_seconds.
    """

    def __init__(
        self, settings: Settings, edge: Edge, add_services: Callable[[Any], None], *, share_port: bool = False
    ) -> None:
        """Listen.

        Raises:
            SettingsError: when the settings name TLS files that cannot be used.
            AddressInUse: when the port is taken.
        """
        credentials = _credentials(settings)
        self._edge = edge
        self._server = grpc.aio.server(options=[*limits(settings), *_listening(settings, share_port)])
        self.port = _listen(self._server, settings, credentials)
        services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
        for method in edge.methods.values():
            # No deserializer and no serializer: the library answers UNKNOWN to bytes that do not parse, where the
            # fault is the caller's, and ends a call whose answer is too large without a reason.
            behavior: Any = partial(self._serve, method.path)
            services.setdefault(method.service, {})[method.name] = grpc.unary_unary_rpc_method_handler(behavior)
        for name, handlers in services.items():
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        add_services(self._server)
        # Calls that other threads have ended, until the loop takes them over: all of a batch at once.
        self._ended: list[tuple[asyncio.Future[Ending], Ending]] = []
        self._ended_lock = threading.Lock()

    async def start(self) -> None:
        """Begin to bring calls."""
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give those in flight `grace` seconds, and close every connection."""
        await self._server.stop(grace)

    async def _serve(self, path: str, data: bytes, context: Context) -> bytes:
        ending: asyncio.Future[Ending] = self._loop.create_future()
        metadata: Any = context.invocation_metadata() or ()
        call = self._edge.call(path, metadata, context.time_remaining(), partial(self._end, ending))
        call.begin(data)
        try:
            found = await ending
        except asyncio.CancelledError:
            call.cancel()
            raise
        if isinstance(found, Refusal):
            await _abort(context, found)
        assert found is not None
        return found

    def _end(self, ending: asyncio.Future[Ending], found: Ending) -> None:
        if threading.get_ident() == self._thread:
            _set(ending, found)
            return
        with self._ended_lock:
            self._ended.append((ending, found))
            first = len(self._ended) == 1
        if first:
            self._loop.call_soon_threadsafe(self._take_over)

    def _take_over(self) -> None:
        with self._ended_lock:
            ended, self._ended = self._ended, []
        for ending, found in ended:
            _set(ending, found)


def _set(ending: asyncio.Future[Ending], found: Ending) -> None:
    # A caller that has gone took its future with it.
    if not ending.done():
        ending.set_result(found)


async def _abort(context: Context, refusal: Refusal) -> NoReturn:
    """End a call with an error; quietly when the caller has gone meanwhile, as many do while a server is overloaded."""
    try:
        await context.abort(_CODES[refusal.code], refusal.message, tuple(refusal.trailers))
    except grpc.aio.AbortError:
        raise
    except Exception:
        if not context.done():
            raise
        raise asyncio.CancelledError from None


def limits(settings: Settings) -> list[tuple[str, int]]:
    """Return what bounds a call's message and its metadata."""
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Both: between the two the library refuses at random.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
    ]


def _listening(settings: Settings, share_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_connection_idle_ms", round(settings.max_idle_seconds * 1000)),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        ("grpc.http2.min_ping_interval_without_data_ms", round(settings.min_ping_seconds * 1000)),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        # With the library's default a taken port is shared in silence, and each server gets half the calls.
        ("grpc.so_reuseport", int(share_port)),
    ]


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Read the certificates that the settings name; None without TLS."""
    pem = read_pem(
        Named("tls_client_ca", settings.tls_client_ca),
        Named("tls_certificate", settings.tls_certificate),
        Named("tls_key", settings.tls_key),
    )
    if pem.certificate is None or pem.key is None:
        return None
    return grpc.ssl_server_credentials(
        [(pem.key, pem.certificate)], root_certificates=pem.ca, require_client_auth=pem.ca is not None
    )


def _listen(server: grpc.aio.Server, settings: Settings, credentials: grpc.ServerCredentials | None) -> int:
    address = f"{bracketed(settings.host)}:{settings.port}"
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise taken(address) from error


def taken(address: str) -> AddressInUse:
    """Say that one cannot listen there."""
    return AddressInUse(
        f"cannot listen on {address} (host, port): the port is taken or the address is not this machine's"
    )
