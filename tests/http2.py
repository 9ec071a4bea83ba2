"""HTTP/2 by hand: what no client of gRPC says."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Generator, Iterator

from calls import SECONDS
from serving import Running


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")


def frames(connection: socket.socket) -> Generator[tuple[int, bytes], None, None]:
    """Read a peer's frames, type and payload, until it closes."""
    with connection.makefile("rb") as stream, contextlib.suppress(ConnectionError):
        while len(head := stream.read(9)) == 9:
            yield head[3], stream.read(int.from_bytes(head[:3], "big"))


@contextlib.contextmanager
def raw(running: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.server.port), SECONDS) as connection:
        connection.sendall(PREFACE)
        yield connection
