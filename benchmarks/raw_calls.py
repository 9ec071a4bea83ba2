"""Raw calls: a load generator that speaks just enough HTTP/2 for unary gRPC calls, so that it is not the limit.

A call costs it about a twentieth of what a gRPC library in Python takes. Two ways to ask: a fixed number of calls in
flight (closed loop), and calls on schedule whether or not answers come back (open loop), whose times count from the
moment that a call was due. Run as a process of its own by `measure`.
"""

from __future__ import annotations

import json
import os
import select
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections import Counter, deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
# No dynamic table for what the server sends, and windows that never fill while a benchmark lasts.
OUR_SETTINGS = struct.pack(">HIHI", 1, 0, 4, (1 << 31) - 1)
OPEN_WINDOW = struct.pack(">I", (1 << 31) - 1 - 65535)
CANCEL = struct.pack(">I", 8)
# What a socket that does not wait says when it would have to; with TLS it may want to read in order to write.
NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
# RFC 7541, appendix B: the letters that the name and the values of grpc-status are made of.
HUFFMAN = {
    **{"g": "100110", "r": "101100", "p": "101011", "c": "00100", "-": "010110", "s": "01000", "t": "01001"},
    **{"a": "00011", "u": "101101", "0": "00000", "1": "00001", "2": "00010", "3": "011001", "4": "011010"},
    **{"5": "011011", "6": "011100", "7": "011101", "8": "011110", "9": "011111"},
}
CODES = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED"),
    *("INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)
# How long a wait lasts at most, and how long answers are waited for when the last call was sent.
TICK_SECONDS = 0.0005
LAST_SECONDS = 10.0


def huffman(text: str) -> bytes:
    """Encode as HPACK does, padded with ones."""
    bits = "".join(HUFFMAN[letter] for letter in text)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


STATUS_NAMES = {b"grpc-status", huffman("grpc-status")}
STATUS_VALUES = {encode(str(n)): name for n, name in enumerate(CODES) for encode in (str.encode, huffman)}


def literal(name: bytes, value: bytes) -> bytes:
    """Write a header that is not to be remembered; both parts are shorter than 127 bytes."""
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Write a frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def status_in(block: bytes) -> str | None:
    """Find the name of the gRPC status in a block of headers; None when there is none."""
    at = 0
    while at < len(block):
        first = block[at]
        if first & 0x80 or first & 0xE0 == 0x20:
            _, at = integer(block, at, 7 if first & 0x80 else 5)
            continue
        index, at = integer(block, at, 6 if first & 0x40 else 4)
        name = b""
        if not index:
            name, at = text(block, at)
        value, at = text(block, at)
        if name in STATUS_NAMES:
            return STATUS_VALUES[value]
    return None


def integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """Read an HPACK integer; return it and where it ends."""
    limit = (1 << bits) - 1
    value, at = block[at] & limit, at + 1
    if value < limit:
        return value, at
    shift = 0
    while True:
        byte, at = block[at], at + 1
        value += (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, at


def text(block: bytes, at: int) -> tuple[bytes, int]:
    """Read an HPACK string as it stands, Huffman-coded or not; return it and where it ends."""
    length, at = integer(block, at, 7)
    return block[at : at + length], at + length


@dataclass(slots=True)
class Waiting:
    """A call in flight."""

    due: float
    stream: int


class Connection:
    """One connection; `ended` collects (seconds since due, status name) of the calls that have ended."""

    def __init__(self, host: str, port: int, path: str, timeout: float, ca: str | None) -> None:
        self._address = (host, port)
        self._tls = ssl.create_default_context(cafile=ca) if ca else None
        if self._tls:
            self._tls.set_alpn_protocols(["h2"])
        self.ended: list[tuple[float, str]] = []
        self._timeout = timeout
        self._unsent: deque[tuple[float, bytes]] = deque()
        self._connect()
        authority = f"{host}:{port}".encode()
        self._block = b"\x83\x86\x04" + bytes([len(path)]) + path.encode() + b"\x01" + bytes([len(authority)])
        self._block += authority + literal(b"te", b"trailers") + literal(b"content-type", b"application/grpc")
        self._block += literal(b"grpc-timeout", f"{round(timeout * 1e6)}u".encode())

    def _connect(self) -> None:
        self.socket = socket.create_connection(self._address, LAST_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls:
            self.socket = self._tls.wrap_socket(self.socket, server_hostname=self._address[0])
        self.socket.setblocking(False)
        self._open: dict[int, Waiting] = {}
        self._deadlines: deque[Waiting] = deque()
        self._next = 1
        self._window = 65535
        # Until the server says otherwise.
        self._streams = 100
        self._in = bytearray()
        self._out = bytearray(PREFACE + frame(SETTINGS, 0, 0, OUR_SETTINGS) + frame(WINDOW_UPDATE, 0, 0, OPEN_WINDOW))

    def _lose(self) -> None:
        """Connect again, as a client does; the calls in flight are lost."""
        now = time.monotonic()
        self.ended += [(now - waiting.due, "CONNECTION_LOST") for waiting in self._open.values()]
        self.socket.close()
        self._connect()

    def call(self, due: float, message: bytes) -> None:
        """Send a call, or keep it until the server lets more through."""
        self._unsent.append((due, message))
        self._send()

    def tick(self, now: float) -> None:
        """Give up the calls whose deadline has passed, as a client does."""
        while self._deadlines and self._deadlines[0].due + self._timeout <= now:
            late = self._deadlines.popleft()
            if self._open.pop(late.stream, None):
                self._out += frame(RST_STREAM, 0, late.stream, CANCEL)
                self.ended.append((now - late.due, "DEADLINE_EXCEEDED"))
        while self._unsent and self._unsent[0][0] + self._timeout <= now:
            due, _ = self._unsent.popleft()
            self.ended.append((now - due, "NEVER_SENT"))
        self._send()
        self.flush()

    def flush(self) -> None:
        """Write what can be written."""
        while self._out:
            try:
                del self._out[: self.socket.send(self._out)]
            except NOT_NOW:
                return
            except ConnectionError:
                self._lose()

    def receive(self) -> None:
        """Read what has come."""
        while True:
            try:
                data = self.socket.recv(1 << 18)
            except NOT_NOW:
                break
            except ConnectionError:
                data = b""
            if not data:
                self._lose()
                return
            self._in += data
            if not self._tls:
                break
        at = 0
        while len(self._in) - at >= 9:
            length = int.from_bytes(self._in[at : at + 3], "big")
            if len(self._in) - at - 9 < length:
                break
            kind, flags, stream = struct.unpack_from(">BBI", self._in, at + 3)
            self._frame(kind, flags, stream, bytes(self._in[at + 9 : at + 9 + length]))
            at += 9 + length
        del self._in[:at]

    @property
    def idle(self) -> bool:
        """Tell whether nothing is in flight or waiting to be sent."""
        return not self._open and not self._unsent

    def _send(self) -> None:
        while self._unsent and len(self._open) < self._streams and self._window >= len(self._unsent[0][1]) + 5:
            due, message = self._unsent.popleft()
            stream, self._next = self._next, self._next + 2
            self._window -= len(message) + 5
            body = struct.pack(">BI", 0, len(message)) + message
            self._out += frame(HEADERS, END_HEADERS, stream, self._block) + frame(DATA, END_STREAM, stream, body)
            self._open[stream] = waiting = Waiting(due, stream)
            self._deadlines.append(waiting)

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == HEADERS and flags & END_STREAM:
            self._end(stream, status_in(payload) or "UNKNOWN")
        elif kind == RST_STREAM:
            self._end(stream, "RESET")
        elif kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack_from(">HI", payload, at)
                if name == 3:
                    self._streams = value
            self._out += frame(SETTINGS, ACK, 0, b"")
        elif kind == PING and not flags & ACK:
            self._out += frame(PING, ACK, 0, payload)
        elif kind == WINDOW_UPDATE and stream == 0:
            self._window += struct.unpack(">I", payload)[0]

    def _end(self, stream: int, status: str) -> None:
        waiting = self._open.pop(stream, None)
        if waiting is not None:
            elapsed = time.monotonic() - waiting.due
            self.ended.append((elapsed, "LATE" if status == "OK" and elapsed > self._timeout else status))


class Load:
    """Ask one method of a server over some connections, with requests that are used in turn."""

    def __init__(self, order: dict[str, Any]) -> None:
        host, _, port = order["target"].rpartition(":")
        self._requests = [bytes.fromhex(request) for request in order["requests"]]
        self._connections = [
            Connection(host, int(port), order["path"], order["timeout"], order["ca"])
            for _ in range(order["connections"])
        ]
        self._sent = 0
        self.ended: list[tuple[float, str]] = []

    def send(self, due: float) -> None:
        """Send the next request over the next connection."""
        connection = self._connections[self._sent % len(self._connections)]
        connection.call(due, self._requests[self._sent % len(self._requests)])
        self._sent += 1

    def wait(self, seconds: float) -> int:
        """Write, wait for answers, and return how many calls have ended since the last time."""
        for connection in self._connections:
            connection.flush()
        readable, _, _ = select.select([connection.socket for connection in self._connections], [], [], seconds)
        for connection in self._connections:
            if connection.socket in readable:
                connection.receive()
        before, now = len(self.ended), time.monotonic()
        for connection in self._connections:
            connection.tick(now)
            self.ended += connection.ended
            connection.ended.clear()
        return len(self.ended) - before

    @property
    def idle(self) -> bool:
        """Tell whether every call has ended."""
        return all(connection.idle for connection in self._connections)

    def closed_loop(self, in_flight: int, seconds: float) -> float:
        """Keep `in_flight` calls in flight for `seconds`; return the longest that the sender was late, which is 0."""
        until = time.monotonic() + seconds
        for _ in range(in_flight):
            self.send(time.monotonic())
        while time.monotonic() < until:
            for _ in range(self.wait(TICK_SECONDS)):
                self.send(time.monotonic())
        return 0.0

    def open_loop(self, rate: float, seconds: float) -> float:
        """Send on schedule for `seconds`; return the longest that the sender was late."""
        started, lag = time.monotonic(), 0.0
        while (now := time.monotonic() - started) < seconds:
            for number in range(self._sent, int(now * rate) + 1):
                self.send(started + number / rate)
                lag = max(lag, now - number / rate)
            self.wait(min(TICK_SECONDS, max(0.0, started + self._sent / rate - time.monotonic())))
        return lag


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Do what `measure` asks for in this process."""
    load = Load(order)
    seconds = order["seconds"]
    lag = load.open_loop(order["rate"], seconds) if order["rate"] else load.closed_loop(order["in_flight"], seconds)
    # What ends after the time is over belongs to the open loop's calls, and to nothing in a closed one.
    counted = list(load.ended)
    until = time.monotonic() + LAST_SECONDS
    while not load.idle and time.monotonic() < until:
        load.wait(TICK_SECONDS)
    counted = load.ended if order["rate"] else counted
    outcomes = Counter(status for _, status in counted)
    answered = sorted(elapsed for elapsed, status in counted if status == "OK")
    usage = time.process_time() / seconds
    return {
        "sent_per_second": round(len(counted) / seconds, 1),
        "requests_per_second": round(len(answered) / seconds, 1),
        "p50_seconds": at(answered, 0.5),
        "p99_seconds": at(answered, 0.99),
        "outcomes": dict(outcomes),
        "sender_largest_lag_seconds": round(lag, 4),
        "sender_processor_share": round(usage, 2),
    }


def at(ordered: list[float], share: float) -> float | None:
    """Return a quantile of ordered values; None of none."""
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 6) if ordered else None


def measure(
    target: str,
    path: str,
    requests: list[bytes],
    *,
    seconds: float,
    rate: float = 0.0,
    in_flight: int = 1,
    timeout: float = 10.0,
    connections: int = 4,
    ca: str | None = None,
) -> dict[str, Any]:
    """Ask from a process of its own: on schedule where a rate is given, else with calls in flight all the time.

    Over TLS where the file of an authority is given.
    """
    order = {
        "target": target,
        "path": path,
        "requests": [request.hex() for request in requests],
        "seconds": seconds,
        "rate": rate,
        "in_flight": in_flight,
        "timeout": timeout,
        "connections": min(connections, in_flight) if not rate else connections,
        "ca": ca,
    }
    command = [sys.executable, str(Path(__file__).resolve())]
    found = subprocess.run(command, input=json.dumps(order), check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(found)
    return result


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
