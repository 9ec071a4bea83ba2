"""Before the native transport, over TLS and in the clear: what passes, what does not, how a connection ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from calls import SECONDS
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from http2 import PREFACE, frame, frames, raw
from serving import Running, changed, serve, server_tls

from recsys import Client, errors
from recsys.client import TlsOptions
from recsys.service import front, native_transport, passage
from recsys.settings import Settings
from recsys.v1 import recommender_pb2

CODE = grpc.StatusCode
RECOMMEND = "/recsys.v1.RecommenderService/Recommend"
PING = frame(6, 0, 0, b"12345678")


@pytest.fixture
def encrypted(settings: Settings, pki: Path) -> Settings:
    """Settings for the transport that knows no TLS itself."""
    return changed(settings, **server_tls(pki), transport="native")


@pytest.fixture(params=["over TLS", "in the clear"])
def fronted(request: pytest.FixtureRequest, settings: Settings, encrypted: Settings) -> Settings:
    """Settings for the transport that hardly bounds what a peer takes."""
    return encrypted if request.param == "over TLS" else changed(settings, transport="native", max_connections=100)


def client_of(running: Running, pki: Path) -> Client:
    tls = TlsOptions(str(pki / "ca.pem")) if running.settings.tls_certificate else None
    return Client(running.target, timeout=SECONDS, tls=tls)


def channel_to(running: Running, pki: Path) -> grpc.Channel:
    if not running.settings.tls_certificate:
        return grpc.insecure_channel(running.target)
    return grpc.secure_channel(running.target, grpc.ssl_channel_credentials((pki / "ca.pem").read_bytes()))


def secured(running: Running, pki: Path, connection: socket.socket, name: str = "127.0.0.1") -> socket.socket:
    """Go as far as TLS goes, where there is any."""
    if not running.settings.tls_certificate:
        return connection
    context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(connection, server_hostname=name)


@contextlib.contextmanager
def connected(running: Running, pki: Path) -> Iterator[socket.socket]:
    with (
        socket.create_connection(("127.0.0.1", running.server.port), SECONDS) as connection,
        secured(running, pki, connection) as found,
    ):
        yield found


def test_calls_beside_each_other_and_large_ones_pass(fronted: Settings, pki: Path) -> None:
    with (
        serve(fronted) as running,
        client_of(running, pki) as client,
    ):
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(lambda number: client.recommend(f"u{number}", count=100), range(200))
            assert all(len(each.items) == 100 for each in found)
        # More than any buffer on the way holds, there and back.
        items = [f"{number:06}-{'x' * 240}" for number in range(1000)]
        assert len(client.score("u", items).items) == len(items)
        assert client.status().version == 1


def test_health_and_reflection_are_served_too(fronted: Settings, pki: Path) -> None:
    with serve(fronted) as running, channel_to(running, pki) as channel:
        assert HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        assert next(iter(ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=SECONDS)))


def test_who_speaks_no_tls_or_no_http2_is_left_alone_and_troubles_nobody(encrypted: Settings, pki: Path) -> None:
    with serve(encrypted) as running:
        with raw(running) as clear, contextlib.suppress(ConnectionError):
            # An alert of TLS at most; no frames.
            assert not clear.makefile("rb").read().startswith(b"\x00\x00")
        for protocols in ([], ["http/1.1"]):
            context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
            if protocols:
                context.set_alpn_protocols(protocols)
            with (
                contextlib.suppress(ConnectionError, ssl.SSLError),
                socket.create_connection(("127.0.0.1", running.server.port), SECONDS) as connection,
                context.wrap_socket(connection, server_hostname="127.0.0.1") as other,
            ):
                assert other.recv(1) == b""
        with connected(running, pki) as connection:
            connection.sendall(PREFACE)
            assert connection.recv(1)
        with client_of(running, pki) as client:
            assert client.recommend("u").version == 1


def test_connections_are_bounded_from_their_first_packet_on(fronted: Settings, pki: Path) -> None:
    with serve(changed(fronted, max_connections=2)) as running:
        address = ("127.0.0.1", running.server.port)
        with (
            socket.create_connection(address, SECONDS),
            connected(running, pki),
            socket.create_connection(address, SECONDS) as third,
            contextlib.suppress(ConnectionError),
        ):
            assert third.recv(1) == b""
        # Those that have gone are none any more.
        with client_of(running, pki) as client:
            assert client.recommend("u").version == 1


def call_to(path: str) -> bytes:
    """Return the headers of a call, as the payload of a frame."""
    names = {":method": "POST", ":scheme": "http", ":path": path, "te": "trailers", "content-type": "application/grpc"}
    return b"".join(
        bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in names.items()
    )


def sent_until_disconnected(connection: socket.socket, pieces: Iterable[bytes]) -> int:
    """Send piece after piece; count those that went before the peer hung up, and all where it does not."""
    connection.settimeout(SECONDS)
    for number, piece in enumerate(pieces):
        try:
            connection.sendall(piece)
            # What nobody has answered yet is read on the way.
            connection.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1 << 16):
                    return number
            connection.settimeout(SECONDS)
        except OSError:
            return number
    return number + 1


def test_a_peer_that_pings_all_the_time_is_disconnected(fronted: Settings, pki: Path) -> None:
    with serve(changed(fronted, min_ping_seconds=30.0)) as running:
        with connected(running, pki) as connection:
            connection.sendall(PREFACE)
            assert sent_until_disconnected(connection, [PING] * 100) < 100
        # In pieces that end anywhere.
        with connected(running, pki) as connection:
            everything = PREFACE + PING * 100
            pieces = [everything[first : first + 7] for first in range(0, len(everything), 7)]
            assert sent_until_disconnected(connection, pieces) < len(pieces)
        with client_of(running, pki) as client:
            assert client.recommend("u").version == 1
    with serve(changed(fronted, min_ping_seconds=0.0)) as running, connected(running, pki) as connection:
        connection.sendall(PREFACE)
        assert sent_until_disconnected(connection, [PING] * 100) == 100


def test_calls_between_pings_are_no_strikes(fronted: Settings, pki: Path) -> None:
    calls = [frame(1, 5, 1 + 2 * number, call_to("/none")) + PING for number in range(20)]
    with serve(changed(fronted, min_ping_seconds=30.0)) as running, connected(running, pki) as connection:
        connection.sendall(PREFACE)
        with contextlib.closing(frames(connection)) as told:
            for call in calls:
                connection.sendall(call)
                # Both are answered before the next are sent: HEADERS, and what is no ping but the answer to one.
                left = {1, 6}
                while left:
                    left.discard(next(told)[0])


def test_a_message_that_is_far_too_large_is_not_received(fronted: Settings, pki: Path) -> None:
    limit = 1 << 20
    with serve(changed(fronted, max_message_bytes=limit)) as running:
        with channel_to(running, pki) as channel:
            for size, codes in ((limit + 1, {CODE.RESOURCE_EXHAUSTED}), (20 * limit, {CODE.UNAVAILABLE})):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(RECOMMEND, None, None)(bytes(size), timeout=SECONDS)
                assert caught.value.code() in codes
        with client_of(running, pki) as client:
            assert client.recommend("u").version == 1


def test_a_connection_without_calls_is_asked_to_go_and_closed(
    fronted: Settings, pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passage, "GOODBYE_SECONDS", 0.5)
    with serve(changed(fronted, max_idle_seconds=1.0, min_ping_seconds=0.0)) as running:
        with connected(running, pki) as connection:
            connection.sendall(PREFACE + frame(1, 5, 1, call_to("/none")))
            # Pings are no calls.
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                sent, told = time.monotonic(), []
                for kind, payload in frames(connection):
                    told.append((kind, payload))
                    time.sleep(0.01)
                    connection.sendall(PING)
            assert time.monotonic() - sent >= 1.0
            last, reason = next(struct.unpack(">II", payload[:8]) for kind, payload in told if kind == 7)
            assert (last, reason) == (2**31 - 1, 0)
        # A client of gRPC goes on with another connection, and does not notice.
        with client_of(running, pki) as client:
            for _ in range(2):
                assert client.recommend("u").version == 1
                time.sleep(1.2)


def test_a_connection_with_a_call_is_not_idle(fronted: Settings, pki: Path) -> None:
    with (
        serve(changed(fronted, max_idle_seconds=1.0)) as running,
        channel_to(running, pki) as channel,
    ):
        watch = HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        time.sleep(2.5)
        assert watch.is_active()
        watch.cancel()


def test_who_shows_nothing_is_disconnected(fronted: Settings, pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage, "HANDSHAKE_SECONDS", 2.0)
    with serve(fronted) as running:
        for said in (b"", PREFACE[:24], PREFACE[:30]):
            with connected(running, pki) as connection:
                connection.sendall(said)
                while connection.recv(1 << 16):
                    pass
        with connected(running, pki) as connection:
            connection.sendall(PREFACE)
            time.sleep(2.5)
            connection.sendall(frame(1, 5, 1, call_to("/none")))
            assert any(kind == 1 for kind, _ in frames(connection))


def stuck(running: Running) -> bool:
    """Tell whether there is anything to be sent that a client does not take."""
    transport = running.server._transport
    assert isinstance(transport, native_transport.NativeTransport)
    assert transport._front is not None
    ends: list[Any] = [passing.outer for passing in transport._front._serving.values()]
    # What is encrypted and lies before the socket; asyncio does not tell of it otherwise.
    below = [end.transport._ssl_protocol._transport for end in ends if hasattr(end, "transport")]
    return any(each is not None and each.get_write_buffer_size() for each in below)


@pytest.mark.parametrize("way", ["closed", "half closed", "said goodbye", "stays"])
def test_who_reads_nothing_holds_no_place(
    fronted: Settings, pki: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "said goodbye" and not fronted.tls_certificate:
        pytest.skip("in the clear nobody says goodbye")
    for module in (passage, front):
        monkeypatch.setattr(module, "GOODBYE_SECONDS", 0.5)
    # One that is half closed is as idle as one that is not: nobody hears it hang up.
    idle = {"closed": 60.0, "half closed": 1.0, "said goodbye": 4.0, "stays": 60.0}[way]
    if way == "stays":
        monkeypatch.setitem(front.OPTIONS, socket.TCP_USER_TIMEOUT, 1000)
    with (
        serve(changed(fronted, max_connections=1, min_ping_seconds=0.0, max_idle_seconds=idle)) as running,
        socket.socket() as small,
    ):
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.connect(("127.0.0.1", running.server.port))
        with secured(running, pki, small) as connection:
            # With a call open it is never idle.
            connection.sendall(PREFACE + (frame(1, 4, 1, call_to(RECOMMEND)) if way == "stays" else b""))
            connection.settimeout(0.5)
            with contextlib.suppress(OSError):
                # Goodbye is only heard as long as it is read at all: not when too much is stuck.
                while way != "said goodbye" or not stuck(running):
                    connection.sendall(PING * 4000)
                    time.sleep(0.05 if way == "said goodbye" else 0)
            with contextlib.suppress(OSError):
                if isinstance(connection, ssl.SSLSocket) and way == "said goodbye":
                    connection.settimeout(0.0)
                    connection.unwrap()
                elif way == "half closed":
                    connection.shutdown(socket.SHUT_WR)
                elif way == "closed":
                    connection.close()
            until = time.monotonic() + SECONDS
            while True:
                with contextlib.suppress(OSError), connected(running, pki) as next_one:
                    next_one.sendall(PREFACE)
                    if next_one.recv(1):
                        break
                assert time.monotonic() < until
                time.sleep(0.1)
            running.stop()


def test_answers_wait_for_no_acknowledgement_and_that_not_for_ever(settings: Settings) -> None:
    (listening,) = front._listen(changed(settings, host="127.0.0.1", port=0), share_port=False)
    with listening, socket.create_connection(listening.getsockname(), SECONDS):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == front.UNREAD_MS


def test_what_follows_an_answer_opens_no_call(fronted: Settings, pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage, "GOODBYE_SECONDS", 0.5)
    with (
        serve(changed(fronted, max_idle_seconds=1.0)) as running,
        connected(running, pki) as connection,
    ):
        connection.sendall(PREFACE + frame(1, 4, 1, call_to("/none")))
        told = frames(connection)
        while next(told)[0] != 1:
            pass
        # Trailers of a call that was answered before it was all there.
        connection.sendall(frame(1, 5, 1, call_to("/none")))
        assert [kind for kind, _ in told][-1:] == [7]


def test_nothing_comes_between_the_parts_of_a_block_of_headers(settings: Settings) -> None:
    async def told() -> list[int]:
        passing = passage.Passage(settings)
        loop, peers = asyncio.get_running_loop(), []
        for end in (passing.outer, passing.inner):
            ours, theirs = socket.socketpair()
            await loop.create_connection(lambda end=end: end, sock=ours)
            peers.append(theirs)
        running = asyncio.ensure_future(passing.run())
        client, server = peers
        server.sendall(frame(4, 0, 0, b"") + frame(1, 0, 1, b"x"))
        await asyncio.sleep(0.1)
        passing.leave()
        server.sendall(frame(9, 0, 1, b"y"))
        await asyncio.sleep(0.1)
        server.sendall(frame(9, 4, 1, b"z"))
        await asyncio.sleep(0.1)
        server.close()
        await running
        await passing.close()
        with client:
            return [kind for kind, _ in frames(client)]

    assert asyncio.run(told()) == [4, 1, 9, 9, 7]


def test_peers_that_vanish_are_no_errors(fronted: Settings, pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(fronted) as running:
        for number in range(40):
            with connected(running, pki) as connection:
                connection.sendall(PREFACE + b"".join(frame(1, 5, 2 * n + 1, call_to("/none")) for n in range(100)))
                if number % 2:
                    connection.recv(1)
                # A reset, with all that is on its way.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with client_of(running, pki) as client:
            assert client.recommend("u").version == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_stopping_server_finishes_what_is_in_flight(fronted: Settings, pki: Path) -> None:
    with (
        serve(fronted) as running,
        client_of(running, pki) as client,
    ):
        assert client.recommend("u").version == 1
        assert running.scorer.entered.acquire(timeout=SECONDS)
        running.scorer.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            held = pool.submit(client.recommend, "held")
            assert running.scorer.entered.acquire(timeout=SECONDS)
            stopping = pool.submit(running.stop)
            # Nobody is let in while it stops.
            while True:
                try:
                    socket.create_connection(("127.0.0.1", running.server.port), SECONDS).close()
                except ConnectionError:
                    break
            assert not stopping.done()
            running.scorer.gate.set()
            assert held.result(SECONDS).version == 1
            stopping.result(SECONDS)


def test_a_taken_port_is_an_error(fronted: Settings) -> None:
    with (
        serve(fronted) as running,
        pytest.raises(errors.AddressInUse, match="the port is taken"),
        serve(changed(fronted, port=running.server.port)),
    ):
        pass


def test_a_stopping_server_sends_clients_elsewhere(fronted: Settings, pki: Path) -> None:
    """Of calls that follow one another none meets the server as it stops: the next finds nobody who listens."""
    ended: list[grpc.RpcError] = []

    def call(begun: threading.Event) -> None:
        with channel_to(running, pki) as channel:
            method = channel.unary_unary(RECOMMEND, None, None)
            while True:
                try:
                    method(b"\n\x01u", timeout=SECONDS)
                except grpc.RpcError as error:
                    ended.append(error)
                    return
                begun.set()

    with serve(fronted) as running, ThreadPoolExecutor(4) as pool:
        begun = [threading.Event() for _ in range(4)]
        calls = [pool.submit(call, each) for each in begun]
        assert all(each.wait(SECONDS) for each in begun)
        running.stop()
        for each in calls:
            each.result(SECONDS)
    assert all(error.code() == CODE.UNAVAILABLE and "refused" in error.details() for error in ended), ended


def test_a_stopping_server_waits_until_answers_are_taken(fronted: Settings, pki: Path) -> None:
    calls = 60
    with (
        serve(changed(fronted, drain_seconds=SECONDS)) as running,
        socket.socket() as small,
        ThreadPoolExecutor(1) as pool,
    ):
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.connect(("127.0.0.1", running.server.port))
        with secured(running, pki, small) as connection:
            message = recommender_pb2.RecommendRequest(user_id="u", count=100).SerializeToString()
            data = b"\0" + len(message).to_bytes(4) + message
            # Nothing of what the server may send keeps it waiting but the client itself.
            windows = frame(4, 0, 0, struct.pack(">HI", 4, 2**31 - 1)) + frame(8, 0, 0, struct.pack(">I", 2**30))
            asked = (frame(1, 4, n, call_to(RECOMMEND)) + frame(0, 1, n, data) for n in range(1, 2 * calls, 2))
            connection.sendall(PREFACE + windows + b"".join(asked))
            assert connection.recv(1, 0) == b"\0"
            stopping = pool.submit(running.stop)
            time.sleep(2.0)
            assert not stopping.done()
            answered = left = 0
            with connection.makefile("rb") as stream:
                # The first byte was read.
                head = b"\0" + stream.read(8)
                while answered < calls:
                    left = int.from_bytes(head[:3])
                    stream.read(left)
                    answered += head[3] == 1 and bool(head[4] & 1)
                    # As clients do while they read.
                    connection.sendall(frame(8, 0, 0, struct.pack(">I", max(1, left))))
                    if answered < calls:
                        head = stream.read(9)
        stopping.result(SECONDS)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "localhost"])
def test_every_address_of_the_host_is_listened_on(fronted: Settings, pki: Path, host: str) -> None:
    addresses = {found[4][0] for found in socket.getaddrinfo("localhost", None)} | {"127.0.0.1"}
    with serve(changed(fronted, host=host, insecure=True)) as running:
        for address in addresses if host == "localhost" else addresses | {"::1"} if socket.has_ipv6 else addresses:
            with (
                socket.create_connection((address, running.server.port), SECONDS) as connection,
                secured(running, pki, connection, "localhost") as secure,
            ):
                secure.sendall(PREFACE)
                assert secure.recv(1)


def test_an_authority_between_root_and_client_is_enough(encrypted: Settings, pki: Path, tmp_path: Path) -> None:
    for name in ("ca.pem", "ca.key"):
        shutil.copy(pki / name, tmp_path / name)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name, signer, extensions in (("middle", "ca", "basicConstraints=CA:TRUE"), ("of-it", "middle", "")):
        (tmp_path / "ext").write_text(extensions)
        openssl("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ("-CA", f"{signer}.pem", "-CAkey", f"{signer}.key", "-CAcreateserial", "-days", "1", "-extfile", "ext")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    with serve(changed(encrypted, tls_client_ca=str(tmp_path / "middle.pem"))) as running:
        own = TlsOptions(str(pki / "ca.pem"), str(tmp_path / "of-it.pem"), str(tmp_path / "of-it.key"))
        with Client(running.target, timeout=SECONDS, tls=own) as client:
            assert client.recommend("u").version == 1


def test_an_address_with_several_names_is_one(fronted: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: [*found, *found])
    made = front.Front(fronted)
    made.refuse()
    assert made.port


def test_what_does_not_start_leaves_nothing_behind(fronted: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as short:
        folder = Path(short, "é" * 50)
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with pytest.raises(errors.SettingsError, match=r"TMPDIR: .* too long"), serve(changed(fronted, port=port)):
            pass
        monkeypatch.setattr(tempfile, "tempdir", "/proc")
        with pytest.raises(errors.SettingsError, match="TMPDIR: no folder"), serve(changed(fronted, port=port)):
            pass
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        # Found out by the one behind, when the port is open already.
        monkeypatch.setattr(native_transport, "SOCKET_PATH", 1000)
        with pytest.raises(errors.AddressInUse) as caught, serve(changed(fronted, port=port)):
            pass
        assert os.listdir(folder) == []
    with socket.create_server(("127.0.0.1", port)):
        assert caught.value


def test_metadata_over_the_limit_is_refused_before_the_call_is(fronted: Settings, pki: Path) -> None:
    with (
        serve(changed(fronted, max_metadata_bytes=1024)) as running,
        channel_to(running, pki) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary(RECOMMEND, None, None)(b"", timeout=SECONDS, metadata=[("x", "x" * 2048)])
    assert caught.value.code() == CODE.UNKNOWN
    assert "431" in caught.value.details()
