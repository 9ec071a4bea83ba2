"""Transport: what brings calls to the edge. Two of them, alike but for speed and for what is said at some limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

from recsys.batcher import Batcher
from recsys.errors import SettingsError
from recsys.service.edge import Edge
from recsys.service.gathering import GatheringLoop
from recsys.service.grpcio_transport import GrpcioTransport
from recsys.settings import Settings

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
        SettingsError: when the transport that is asked for is not installed, or cannot use what the settings name.
        AddressInUse: when the port is taken.
    """
    if chosen(settings) == "grpcio":
        return GrpcioTransport(settings, edge, add_services, share_port=share_port)
    # Imported only where it is used: it is an optional part.
    from recsys.service.native_transport import NativeTransport

    return NativeTransport(settings, edge, receiver, add_services, share_port=share_port)


def event_loop(settings: Settings) -> asyncio.AbstractEventLoop:
    """Make the event loop that a transport is to be used on.

    Calls over grpcio are answered on it. Beside the native one it is a front's, and must not keep the thread that
    scores from its work.

    Raises:
        SettingsError: as open_transport does.
    """
    return asyncio.new_event_loop() if chosen(settings) == "grpcio" else GatheringLoop()


def chosen(settings: Settings) -> str:
    """Return "grpcio" or "native", as the setting says or, for auto, as what is installed allows.

    Raises:
        SettingsError: as open_transport does.
    """
    installed = find_spec("pygrpc_native") is not None
    if settings.transport == "native" and not installed:
        raise SettingsError("transport: native needs the package pygrpc-native: pip install 'recsys[native]'")
    return "native" if installed and settings.transport != "grpcio" else "grpcio"
