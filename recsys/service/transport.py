"""Transport: what brings calls to the edge. Two of them, alike but for speed and for the limits that each enforces."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

from recsys.batcher import Batcher
from recsys.errors import SettingsError
from recsys.service.edge import Edge
from recsys.service.grpcio_transport import GrpcioTransport
from recsys.settings import Settings, is_loopback

# What native enforces over TLS alone.
OVER_TLS = ("max_connections", "max_idle_seconds", "min_ping_seconds")
# Adds the services that are not ours, health and reflection, to a grpc.aio server.
AddServices = Callable[[Any], None]


class Transport(Protocol):
    """Listen from the moment it is made, on `port`, and bring calls from `start` to `stop`."""

    port: int

    async def start(self) -> None:
        """Begin to bring calls."""

    async def stop(self, grace: float) -> None:
        """Refuse new calls, give those in flight `grace` seconds, and close every connection."""


def open_transport(
    settings: Settings,
    edge: Edge,
    receiver: Batcher[Any, Any],
    add_services: AddServices,
    *,
    share_port: bool = False,
) -> Transport:
    """Listen on `settings.host` and `settings.port`; `share_port` lets several processes share them.

    `receiver` is the batcher whose thread looks for calls, where the transport lets it.

    Raises:
        SettingsError: when the transport that is asked for cannot do what other settings ask for, or is not installed.
        AddressInUse: when the port is taken.
    """
    if chosen(settings) == "grpcio":
        return GrpcioTransport(settings, edge, add_services, share_port=share_port)
    # Imported only where it is used: it is an optional part.
    from recsys.service.native_transport import NativeTransport

    return NativeTransport(settings, edge, receiver, add_services, share_port=share_port)


def chosen(settings: Settings) -> str:
    """Return "grpcio" or "native", as the setting says or, for auto, as the others allow.

    Raises:
        SettingsError: as open_transport does.
    """
    if settings.transport == "grpcio":
        return "grpcio"
    installed = find_spec("pygrpc_native") is not None
    # A default asks for nothing: max_connections and its like have one.
    missing = () if settings.tls_certificate else OVER_TLS
    asked = [name for name in missing if name in settings.model_fields_set and getattr(settings, name)]
    if settings.transport == "native":
        if not installed:
            raise SettingsError("transport: native needs the package pygrpc-native: pip install 'recsys[native]'")
        if asked:
            raise SettingsError(
                f"transport, {', '.join(asked)}: native cannot do what {' and '.join(asked)} ask for without TLS; set "
                "transport = grpcio, or leave them out"
            )
        return "native"
    # Without TLS it reads a message whole before it looks at its size: not for callers from other machines.
    bounded = is_loopback(settings.host) or settings.tls_certificate
    return "native" if installed and not asked and bounded else "grpcio"
