"""Who may connect and call, that secrets stay secret, and what one peer may take of the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
import redis
from calls import SECONDS, Feedback, check_refusal, click, recommend
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from serving import TRANSPORTS, Running, serve

import recsys
from recsys import AsyncClient, Client, errors
from recsys.cli import main
from recsys.client import CallFailed, TlsOptions
from recsys.client.channel import is_local
from recsys.metrics import METHODS
from recsys.server import check_exposure
from recsys.service.auth import Guard, digest_of, read_tokens
from recsys.settings import Settings, is_loopback, load, masked
from recsys.store.connection import connect, store_errors
from recsys.v1 import catalog_pb2, recommender_pb2

SECRET = "s3cret/p@ss:word"
# As it stands in a URL.
QUOTED = "s3cret%2Fp%40ss%3Aword"
TOKENS = {role: f"token-of-{role}" for role in ("recommend", "feedback", "admin")}
CODE = grpc.StatusCode
CLICK = recsys.Feedback("u", "item-1", "click")


def changed(settings: Settings, **changes: Any) -> Settings:
    return Settings.model_validate(settings.model_dump(exclude_unset=True) | changes)


def write_tokens(path: Path, tokens: dict[str, str]) -> None:
    """Write a tokens file: role -> token."""
    entries = (
        f'[[token]]\nname = "the {role} token"\nsha256 = "{digest_of(token)}"\nroles = ["{role}"]\n'
        for role, token in tokens.items()
    )
    path.write_text("\n".join(entries))


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, `ca` and `other`; certificates of the first for a server and a client."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make certificates with")
    directory = tmp_path_factory.mktemp("pki")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        openssl(
            "req", "-x509", *key, "-days", "1", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"
        )
    for name in ("server", "client"):
        (directory / "ext").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
        openssl("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed_by = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1", "-extfile", "ext")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed_by, "-out", f"{name}.pem")
    openssl("ec", "-aes128", "-passout", "pass:x", "-in", "server.key", "-out", "locked.key")
    (directory / "garbage.pem").write_text("no certificate")
    return directory


def server_tls(pki: Path) -> dict[str, str]:
    return {"tls_certificate": str(pki / "server.pem"), "tls_key": str(pki / "server.key")}


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "tokens.toml", TOKENS)
    return tmp_path / "tokens.toml"


@pytest.fixture
def guarded(settings: Settings, tokens_file: Path) -> Iterator[Running]:
    """A server that asks for tokens."""
    with serve(changed(settings, tokens_file=str(tokens_file))) as running:
        yield running


def send(running: Running, method: str, data: bytes = b"", authorization: str | None = None) -> Any:
    metadata = [("authorization", authorization)] if authorization is not None else []
    return running.channel.unary_unary(method)(data, timeout=SECONDS, metadata=metadata)


# --- TLS


@pytest.fixture(params=TRANSPORTS)
def over_tls(settings: Settings, pki: Path, request: pytest.FixtureRequest) -> Settings:
    """Settings with TLS for each transport."""
    return changed(settings, **server_tls(pki), transport=request.param)


def test_a_client_that_trusts_the_server_calls_it_over_tls(over_tls: Settings, pki: Path) -> None:
    with serve(over_tls) as running:
        trusting = TlsOptions(ca=str(pki / "ca.pem"))

        async def use() -> int:
            async with AsyncClient(running.target, timeout=SECONDS, tls=trusting) as client:
                return (await client.recommend("u")).version

        with Client(running.target, timeout=SECONDS, tls=trusting) as client:
            assert client.recommend("u").version == 1
        assert asyncio.run(use()) == 1
        for tls in (None, TlsOptions(), TlsOptions(ca=str(pki / "other.pem"))):
            with Client(running.target, timeout=0.5, tls=tls) as client, pytest.raises(CallFailed):
                client.recommend("u")


def test_a_client_without_a_certificate_is_refused_when_one_is_asked_for(over_tls: Settings, pki: Path) -> None:
    ca = str(pki / "ca.pem")
    with serve(changed(over_tls, tls_client_ca=ca)) as running:
        own = TlsOptions(ca, str(pki / "client.pem"), str(pki / "client.key"))
        with Client(running.target, timeout=SECONDS, tls=own) as client:
            assert client.recommend("u").version == 1
        foreign = TlsOptions(ca, str(pki / "other.pem"), str(pki / "other.key"))
        for tls in (TlsOptions(ca), foreign):
            with Client(running.target, timeout=0.5, tls=tls) as client, pytest.raises(CallFailed):
                client.recommend("u")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tls_certificate": "none.pem"}, "tls_certificate: cannot read .*none.pem: No such file"),
        ({"tls_key": "none.key"}, "tls_key: cannot read"),
        ({"tls_key": "client.key"}, "tls_certificate, tls_key: .* are not a PEM certificate and its private key"),
        ({"tls_key": "locked.key"}, "tls_certificate, tls_key: .* without a passphrase"),
        ({"tls_certificate": "garbage.pem"}, "tls_certificate, tls_key"),
        ({"tls_client_ca": "garbage.pem"}, "tls_client_ca: .* holds no PEM certificate"),
        ({"tls_client_ca": "."}, "tls_client_ca: cannot read"),
    ],
)
def test_files_that_cannot_be_used_stop_the_server_from_starting(
    over_tls: Settings, pki: Path, changes: dict[str, str], text: str
) -> None:
    paths = {name: str(pki / file) for name, file in changes.items()}
    with pytest.raises(errors.SettingsError, match=text), serve(changed(over_tls, **paths)):
        pass


@pytest.fixture
def fronted(settings: Settings, pki: Path) -> Settings:
    """Settings for the transport that knows no TLS itself."""
    return changed(settings, **server_tls(pki), transport="native")


@contextlib.contextmanager
def tls_connection(running: Running, pki: Path, *protocols: str) -> Iterator[ssl.SSLSocket]:
    """Connect as far as TLS goes."""
    context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    if protocols:
        context.set_alpn_protocols(list(protocols))
    with (
        socket.create_connection(("127.0.0.1", running.server.port), SECONDS) as connection,
        context.wrap_socket(connection, server_hostname="127.0.0.1") as secure,
    ):
        yield secure


def test_calls_beside_each_other_and_large_ones_pass_over_tls(fronted: Settings, pki: Path) -> None:
    with (
        serve(fronted) as running,
        Client(running.target, timeout=SECONDS, tls=TlsOptions(str(pki / "ca.pem"))) as client,
    ):
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(lambda number: client.recommend(f"u{number}", count=100), range(200))
            assert all(len(each.items) == 100 for each in found)
        # More than any buffer on the way holds, there and back.
        items = [f"{number:06}-{'x' * 240}" for number in range(1000)]
        assert len(client.score("u", items).items) == len(items)
        assert client.status().version == 1


def test_over_tls_health_and_reflection_are_served_too(fronted: Settings, pki: Path) -> None:
    credentials = grpc.ssl_channel_credentials((pki / "ca.pem").read_bytes())
    with serve(fronted) as running, grpc.secure_channel(running.target, credentials) as channel:
        assert HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        assert next(iter(ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=SECONDS)))


def test_who_speaks_no_tls_or_no_http2_is_left_alone_and_troubles_nobody(fronted: Settings, pki: Path) -> None:
    with serve(fronted) as running:
        with raw(running) as clear, contextlib.suppress(ConnectionError):
            # An alert of TLS at most; no frames.
            assert not clear.makefile("rb").read().startswith(b"\x00\x00")
        for protocols in ((), ("http/1.1",)):
            with contextlib.suppress(ConnectionError, ssl.SSLError), tls_connection(running, pki, *protocols) as other:
                assert other.recv(1) == b""
        with tls_connection(running, pki, "h2") as connection:
            connection.sendall(PREFACE)
            assert connection.recv(1)
        with Client(running.target, timeout=SECONDS, tls=TlsOptions(str(pki / "ca.pem"))) as client:
            assert client.recommend("u").version == 1


def test_over_tls_connections_are_bounded_from_their_first_packet_on(fronted: Settings, pki: Path) -> None:
    with serve(changed(fronted, max_connections=2)) as running:
        address = ("127.0.0.1", running.server.port)
        with (
            socket.create_connection(address, SECONDS),
            tls_connection(running, pki, "h2"),
            socket.create_connection(address, SECONDS) as third,
            contextlib.suppress(ConnectionError),
        ):
            assert third.recv(1) == b""
        # Those that have gone are none any more.
        with Client(running.target, timeout=SECONDS, tls=TlsOptions(str(pki / "ca.pem"))) as client:
            assert client.recommend("u").version == 1


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def sent_until_disconnected(connection: ssl.SSLSocket, pieces: Iterable[bytes]) -> int:
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


def test_over_tls_a_peer_that_pings_all_the_time_is_disconnected(fronted: Settings, pki: Path) -> None:
    ping = frame(6, 0, 0, b"12345678")
    with serve(changed(fronted, min_ping_seconds=30.0)) as running:
        with tls_connection(running, pki, "h2") as connection:
            connection.sendall(PREFACE)
            assert sent_until_disconnected(connection, [ping] * 100) < 100
        # In pieces that end anywhere.
        with tls_connection(running, pki, "h2") as connection:
            everything = PREFACE + ping * 100
            pieces = [everything[first : first + 7] for first in range(0, len(everything), 7)]
            assert sent_until_disconnected(connection, pieces) < len(pieces)
        with Client(running.target, timeout=SECONDS, tls=TlsOptions(str(pki / "ca.pem"))) as client:
            assert client.recommend("u").version == 1
    with serve(changed(fronted, min_ping_seconds=0.0)) as running, tls_connection(running, pki, "h2") as connection:
        connection.sendall(PREFACE)
        assert sent_until_disconnected(connection, [ping] * 100) == 100


def test_over_tls_calls_between_pings_are_no_strikes(fronted: Settings, pki: Path) -> None:
    ping = frame(6, 0, 0, b"12345678")
    names = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/none",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(
        bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in names.items()
    )
    calls = [frame(1, 5, 1 + 2 * number, block) + ping for number in range(20)]
    with serve(changed(fronted, min_ping_seconds=30.0)) as running, tls_connection(running, pki, "h2") as connection:
        connection.sendall(PREFACE)
        told = frames(connection)
        for call in calls:
            connection.sendall(call)
            # Both are answered before the next are sent: HEADERS, and what is no ping but the answer to one.
            left = {1, 6}
            while left:
                left.discard(next(told)[0])


def test_over_tls_a_message_that_is_far_too_large_is_not_received(fronted: Settings, pki: Path) -> None:
    limit = 1 << 20
    method = "/recsys.v1.RecommenderService/Recommend"
    with serve(changed(fronted, max_message_bytes=limit)) as running:
        credentials = grpc.ssl_channel_credentials((pki / "ca.pem").read_bytes())
        with grpc.secure_channel(running.target, credentials) as channel:
            for size, codes in ((limit + 1, {CODE.RESOURCE_EXHAUSTED}), (20 * limit, {CODE.UNAVAILABLE})):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(method)(bytes(size), timeout=SECONDS)
                assert caught.value.code() in codes
        with Client(running.target, timeout=SECONDS, tls=TlsOptions(str(pki / "ca.pem"))) as client:
            assert client.recommend("u").version == 1


def test_over_tls_a_connection_that_says_nothing_is_closed(fronted: Settings, pki: Path) -> None:
    with serve(changed(fronted, max_idle_seconds=1.0)) as running, tls_connection(running, pki, "h2") as connection:
        connection.sendall(PREFACE)
        while connection.recv(1 << 16):
            pass


def test_over_tls_a_stopping_server_finishes_what_is_in_flight(fronted: Settings, pki: Path) -> None:
    with (
        serve(fronted) as running,
        Client(running.target, timeout=SECONDS, tls=TlsOptions(str(pki / "ca.pem"))) as client,
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


def test_over_tls_a_taken_port_is_an_error(fronted: Settings) -> None:
    with (
        serve(fronted) as running,
        pytest.raises(errors.AddressInUse, match="the port is taken"),
        serve(changed(fronted, port=running.server.port)),
    ):
        pass


def test_files_that_a_client_cannot_use_are_named() -> None:
    with pytest.raises(errors.SettingsError, match=r"tls\.ca: cannot read"):
        Client("localhost:1", tls=TlsOptions(ca="/none"))
    with pytest.raises(errors.SettingsError, match=r"tls\.certificate, tls\.key: give both or neither"):
        Client("localhost:1", tls=TlsOptions(certificate=__file__))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"tls_certificate": "a"}, "tls_certificate, tls_key: give both"),
        ({"tls_client_ca": "a"}, "tls_client_ca: needs tls_certificate"),
        ({"redis_tls_key": "a"}, "redis_tls_certificate, redis_tls_key: give both"),
        ({"redis_tls_ca": "a"}, "redis_tls_ca.*rediss://"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, str], text: str) -> None:
    with pytest.raises(errors.SettingsError, match=text):
        load(given, environment={})


# --- Tokens


def allowed_roles(method: str) -> set[str]:
    """Say who may call a method, written down a second time."""
    service, _, name = method.rpartition("/")
    if name in ("GetStatus", "ListVersions", "GetVersion"):
        return {"recommend", "admin"}
    if name in ("Recommend", "Score", "Explain", "GetItems"):
        return {"recommend"}
    return {"feedback"} if (service, name) == ("/recsys.v1.RecommenderService", "LogFeedback") else {"admin"}


def test_every_method_takes_its_roles_and_no_others_before_it_looks_at_the_message(guarded: Running) -> None:
    malformed = b"\xff\xff\xff"
    for service, name in METHODS:
        method = f"/{service}/{name}"
        for role, token in TOKENS.items():
            call = partial(send, guarded, method, malformed, f"Bearer {token}")
            if role in allowed_roles(method):
                check_refusal(call, CODE.INVALID_ARGUMENT, "INVALID_INPUT")
            else:
                details = check_refusal(call, CODE.PERMISSION_DENIED, "PERMISSION_DENIED")
                assert token not in details["message"]


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer guess", "Basic dTpw", "token-of-admin"]
)
def test_a_call_without_a_known_token_is_refused_and_counted(guarded: Running, authorization: str | None) -> None:
    method = "/recsys.v1.RecommenderService/Recommend"
    check_refusal(lambda: send(guarded, method, b"\xff", authorization), CODE.UNAUTHENTICATED, "UNAUTHENTICATED")
    labels = {"grpc_type": "unary", "grpc_service": "recsys.v1.RecommenderService", "grpc_method": "Recommend"}
    assert guarded.value("grpc_server_handled_total", grpc_code="UNAUTHENTICATED", **labels) == 1


def test_two_tokens_at_once_are_refused(guarded: Running) -> None:
    metadata = [("authorization", f"Bearer {TOKENS[role]}") for role in ("recommend", "admin")]
    call = guarded.channel.unary_unary("/recsys.v1.RecommenderService/Recommend")
    check_refusal(lambda: call(b"", timeout=SECONDS, metadata=metadata), CODE.UNAUTHENTICATED, "UNAUTHENTICATED")


def test_health_and_reflection_need_no_token(guarded: Running) -> None:
    assert HealthStub(guarded.channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = ServerReflectionStub(guarded.channel)
    assert next(iter(stub.ServerReflectionInfo(iter([request]), timeout=SECONDS)))


def test_clients_send_their_token_to_this_machine_and_over_tls(
    settings: Settings, pki: Path, tokens_file: Path, guarded: Running
) -> None:
    token = TOKENS["recommend"]
    with Client(guarded.target, timeout=SECONDS, token=token) as client:
        assert client.recommend("u").version == 1
        with pytest.raises(errors.PermissionDenied, match=r"'the recommend token' has none of the roles feedback"):
            client.log_feedback([CLICK])
    with Client(guarded.target, timeout=SECONDS) as client, pytest.raises(errors.Unauthenticated):
        client.recommend("u")
    tls = TlsOptions(ca=str(pki / "ca.pem"))

    async def use(target: str) -> int:
        async with AsyncClient(target, timeout=SECONDS, tls=tls, token=token) as client:
            return (await client.recommend("u")).version

    with serve(changed(settings, **server_tls(pki), tokens_file=str(tokens_file))) as running:
        with Client(running.target, timeout=SECONDS, tls=tls, token=token) as client:
            assert client.recommend("u").version == 1
        assert asyncio.run(use(running.target)) == 1


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_token_never_crosses_a_network_in_the_clear(kind: type[Any]) -> None:
    with pytest.raises(errors.SettingsError, match=r"token: .* in the clear; give tls=") as caught:
        kind("recsys.example:50051", token="a-secret")
    assert "a-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "local"),
    [
        *((t, True) for t in ("localhost:1", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "::1", "ipv4:127.0.0.1:1")),
        *((t, True) for t in ("dns:///localhost:1", "ipv6:[::1]:1", "unix:/tmp/s", "ipv4:127.0.0.1:1,127.0.0.2:1")),
        *((t, False) for t in ("example.org:1", "10.0.0.1:1", "[::]:1", "0.0.0.0:1", "localhost.example:1", "")),
        *((t, False) for t in ("dns://localhost/example.org:1", "ipv4:127.0.0.1:1,10.0.0.1:1", "xds:///127.0.0.1")),
    ],
)
def test_what_is_on_this_machine(target: str, local: bool) -> None:
    assert is_local(target) is local


def test_a_changed_tokens_file_is_read_again_and_a_broken_one_is_not(
    tokens_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = Guard(str(tokens_file))
    method = "/recsys.v1.RecommenderService/Recommend"

    def passes(token: str) -> bool:
        try:
            guard.check(method, [("authorization", f"Bearer {token}")])
        except errors.Unauthenticated:
            return False
        return True

    assert passes(TOKENS["recommend"])
    write_tokens(tokens_file, {"recommend": "a-newer-token"})
    assert (passes(TOKENS["recommend"]), passes("a-newer-token")) == (False, True)
    with caplog.at_level(logging.ERROR):
        tokens_file.write_text("[[token]]\nname = 'half")
        assert [passes("a-newer-token") for _ in range(3)] == [True] * 3
        tokens_file.unlink()
        assert [passes("a-newer-token") for _ in range(3)] == [True] * 3
    assert [record.message.partition(":")[0] for record in caplog.records] == ["the tokens of before stay valid"] * 2
    write_tokens(tokens_file, {"recommend": "the-newest"})
    assert (passes("a-newer-token"), passes("the-newest")) == (False, True)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "token: Field required"),
        ("token = []", "token: Tuple should have at least 1 item"),
        ("[[token]]\nname = 'a'\nsha256 = 'a-token-by-mistake'\nroles = ['admin']", "token.0.sha256: "),
        (f"[[token]]\nname = 'a'\nsha256 = '{'0' * 64}'\nroles = ['root']", "token.0.roles.0: "),
        (f"[[token]]\nname = 'a'\nsha256 = '{'0' * 64}'\nroles = []", "token.0.roles: "),
        (f"[[token]]\nname = 'a'\nsha256 = '{'0' * 64}'\nroles = ['admin']\n" * 2, "two tokens have the same name"),
        ("a-token-by-mistake", "is not TOML"),
    ],
)
def test_a_tokens_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(errors.SettingsError) as caught:
        read_tokens(path)
    assert str(caught.value).startswith(f"tokens_file: {path}")
    assert fault in str(caught.value)
    assert "by-mistake" not in str(caught.value)


def test_a_server_does_not_start_without_its_tokens_file(settings: Settings, tmp_path: Path) -> None:
    missing = changed(settings, tokens_file=str(tmp_path / "none"))
    with pytest.raises(errors.SettingsError, match="tokens_file: cannot read"), serve(missing):
        pass


# --- Safe by default


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "recsys.example", "[::]", ""])
def test_a_server_for_other_machines_needs_tls_and_tokens(settings: Settings, host: str) -> None:
    assert not is_loopback(host)
    exposed = settings.model_copy(update={"host": host})
    with pytest.raises(errors.SettingsError, match=r"set tls_certificate and tokens_file .*insecure = true"):
        check_exposure(exposed)
    with pytest.raises(errors.SettingsError, match="set tokens_file "):
        check_exposure(exposed.model_copy(update={"tls_certificate": "a"}))
    check_exposure(exposed.model_copy(update={"tls_certificate": "a", "tokens_file": "b"}))
    check_exposure(exposed.model_copy(update={"insecure": True}))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_a_server_for_this_machine_needs_neither(settings: Settings, host: str) -> None:
    check_exposure(settings.model_copy(update={"host": host}))


def test_an_exposed_server_is_refused_at_start(settings: Settings) -> None:
    with pytest.raises(errors.SettingsError, match="insecure"), serve(changed(settings, host="0.0.0.0")):
        pass
    with serve(changed(settings, host="0.0.0.0", insecure=True)) as running:
        assert send(
            running,
            "/recsys.v1.RecommenderService/Recommend",
            recommender_pb2.RecommendRequest(user_id="u").SerializeToString(),
        )


# --- The store's password and TLS


@pytest.fixture
def user(store: redis.Redis) -> Iterator[str]:
    """A user of the store whose password is SECRET."""
    store.execute_command("ACL", "SETUSER", "app", "on", f">{SECRET}", "~*", "+@all")
    yield "app"
    store.execute_command("ACL", "DELUSER", "app")


def with_user(settings: Settings, credentials: str, **changes: Any) -> Settings:
    return changed(settings, redis_url=settings.redis_url.replace("redis://", f"redis://{credentials}@"), **changes)


def test_user_and_password_in_the_url(settings: Settings, user: str) -> None:
    with connect(with_user(settings, f"{user}:{QUOTED}")) as client:
        assert client.execute_command("ACL", "WHOAMI") == b"app"


def test_the_password_of_a_file_is_read_at_every_connect(
    settings: Settings, user: str, store: redis.Redis, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    with connect(with_user(settings, user, redis_password_file=str(file))) as client:
        assert client.execute_command("ACL", "WHOAMI") == b"app"
        store.execute_command("ACL", "SETUSER", "app", "resetpass", ">another")
        file.write_text("another")
        client.connection_pool.disconnect()
        assert client.execute_command("ACL", "WHOAMI") == b"app"
        file.unlink()
        client.connection_pool.disconnect()
        with pytest.raises(errors.StoreUnavailable, match="redis_password_file: cannot read"), store_errors():
            client.ping()
    file.write_text("")
    with pytest.raises(errors.SettingsError, match=r"redis_password_file: .* is empty"):
        connect(changed(settings, redis_password_file=str(file)))
    with pytest.raises(errors.SettingsError, match="redis_password_file: cannot read"):
        connect(changed(settings, redis_password_file=str(tmp_path / "none")))
    file.write_text("x")
    with pytest.raises(errors.SettingsError, match="stands in both"):
        connect(with_user(settings, f"{user}:{QUOTED}", redis_password_file=str(file)))


@contextlib.contextmanager
def tls_before(url: str, context: ssl.SSLContext) -> Iterator[int]:
    """Take TLS connections on a port and pass what they hold on to a store that has none."""
    address = (urlsplit(url).hostname, urlsplit(url).port)
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def pass_on(plain: socket.socket) -> None:
        with (
            plain,
            contextlib.suppress(OSError),
            context.wrap_socket(plain, server_side=True) as client,
            socket.create_connection(address) as store,
        ):
            back = threading.Thread(target=pump, args=(store, client))
            back.start()
            pump(client, store)
            back.join()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=pass_on, args=(listener.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        acceptor.join()
        for thread in threads:
            thread.join()


def test_the_store_over_tls_with_certificates_on_both_sides(settings: Settings, pki: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "server.pem", pki / "server.key")
    context.load_verify_locations(pki / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    # With 1.3 a client learns only from its first read that its certificate was refused.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with tls_before(settings.redis_url, context) as port:
        url = f"rediss://127.0.0.1:{port}/0"
        own = {"redis_tls_certificate": str(pki / "client.pem"), "redis_tls_key": str(pki / "client.key")}
        ca = {"redis_tls_ca": str(pki / "ca.pem")}
        with connect(changed(settings, redis_url=url, **ca, **own)) as client:
            assert client.ping()
        for missing in (own, ca):
            refused = connect(changed(settings, redis_url=url, **missing))
            with refused as client, pytest.raises(errors.StoreUnavailable), store_errors():
                client.ping()
        with pytest.raises(errors.SettingsError, match="redis_tls_ca: cannot read"):
            connect(changed(settings, redis_url=url, redis_tls_ca="/none"))


# --- Secrets


@pytest.mark.parametrize(
    "url",
    [
        f"redis://{SECRET}@host/0",
        f"redis://:{SECRET}@host:1/0",
        f"redis://user:{QUOTED}@host/0",
        f"rediss://user:{SECRET}@host:notaport/0",
        f"redis:/user:{SECRET}@host",
        f"unix:///tmp/s?db=0&password={QUOTED}&x=1",
        f"redis://host/0?x=1&PASSWORD={QUOTED}",
        f"user:{SECRET}@host",
    ],
)
def test_no_part_of_a_password_is_in_what_is_shown_of_settings(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load({"redis_url": url}, environment={})
    shown = [repr(settings), str(settings), str(settings.redacted()), masked(url)]
    try:
        connect(settings).close()
    except errors.SettingsError as error:
        shown += ["".join(traceback.format_exception(error))]
    for text in (*shown, *capsys.readouterr()):
        assert "s3cret" not in text
        assert "ss:word" not in text


def test_no_password_in_what_the_command_line_shows(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["config"], ["config", "--json"]):
        assert main([*arguments, "--redis-url", f"redis://app:{QUOTED}@127.0.0.1:6379/0"]) == 0
    assert main(["config", "--redis-url", f"redis://app:{QUOTED}@127.0.0.1:6379/0", "--dimension", "x"]) == 2
    shown = "".join(capsys.readouterr())
    assert "app:***@127.0.0.1" in shown
    assert "s3cret" not in shown


def test_a_failing_connection_tells_no_password(
    settings: Settings, user: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = with_user(settings, f"{user}:{QUOTED}-and-more")
    gone = changed(settings, redis_url=f"redis://{user}:{QUOTED}@127.0.0.1:1/0")
    texts = []
    log_one = recommender_pb2.LogFeedbackRequest(feedback=[click()]).SerializeToString()
    get_one = catalog_pb2.GetItemsRequest(item_ids=["a"]).SerializeToString()
    with caplog.at_level(logging.DEBUG):
        for bad in (wrong, gone):
            with serve(bad) as running:
                assert recommend(running).version == 1
                for method, data in (("RecommenderService/LogFeedback", log_one), ("CatalogService/GetItems", get_one)):
                    call = partial(send, running, f"/recsys.v1.{method}", data)
                    texts.append(str(check_refusal(call, CODE.UNAVAILABLE, "STORE_UNAVAILABLE")))
    assert "answering without histories" in caplog.text
    for text in (caplog.text, *texts, *capfd.readouterr()):
        assert "s3cret" not in text


# --- What one peer may take


def test_an_answer_that_fits_no_message_is_the_callers_to_split(settings: Settings) -> None:
    with serve(changed(settings, max_message_bytes=1 << 16)) as running:
        request = recommender_pb2.ScoreRequest(user_id="u", item_ids=["i" * 30] * 1000).SerializeToString()
        method = "/recsys.v1.RecommenderService/Score"
        details = check_refusal(lambda: send(running, method, request), CODE.INVALID_ARGUMENT, "INVALID_INPUT")
        assert "at most 65536 fit a message" in details["message"]
        large = recommender_pb2.LogFeedbackRequest(feedback=[Feedback(user_id="u" * 70_000)]).SerializeToString()
        with pytest.raises(grpc.RpcError) as caught:
            send(running, "/recsys.v1.RecommenderService/LogFeedback", large)
        assert caught.value.code() == CODE.RESOURCE_EXHAUSTED


def test_metadata_over_the_limit_is_refused(settings: Settings) -> None:
    with serve(changed(settings, max_metadata_bytes=1024, transport="grpcio")) as running:
        with pytest.raises(grpc.RpcError) as caught:
            send(running, "/recsys.v1.RecommenderService/Recommend", b"", "x" * 1024)
        assert caught.value.code() == CODE.RESOURCE_EXHAUSTED


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">I", 0)[1:] + b"\x04\x00" + struct.pack(">I", 0)


def frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Read a peer's frames, type and payload, until it closes."""
    with connection.makefile("rb") as stream, contextlib.suppress(ConnectionError):
        while len(head := stream.read(9)) == 9:
            yield head[3], stream.read(int.from_bytes(head[:3], "big"))


@contextlib.contextmanager
def raw(running: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.server.port), SECONDS) as connection:
        connection.sendall(PREFACE)
        yield connection


def test_calls_in_flight_on_one_connection_are_bounded(settings: Settings) -> None:
    with serve(changed(settings, max_concurrent_streams=7)) as running, raw(running) as connection:
        payload = next(payload for kind, payload in frames(connection) if kind == 4)
        announced = dict(struct.iter_unpack(">HI", payload))
        assert announced[3] == 7


def test_a_peer_that_pings_all_the_time_is_disconnected(settings: Settings) -> None:
    with serve(changed(settings, min_ping_seconds=30.0)) as running:
        with raw(running) as connection:
            ping = struct.pack(">I", 8)[1:] + b"\x06\x00" + struct.pack(">I", 0) + b"12345678"
            with contextlib.suppress(ConnectionError):
                connection.sendall(ping * 10)
            # GOAWAY: the last stream, then why: ENHANCE_YOUR_CALM.
            reasons = [struct.unpack(">I", payload[4:8])[0] for kind, payload in frames(connection) if kind == 7]
            assert reasons == [11]
        with Client(running.target, timeout=SECONDS) as client:
            assert client.recommend("u").version == 1


def test_connections_are_bounded(settings: Settings) -> None:
    with (
        serve(changed(settings, max_connections=2)) as running,
        raw(running) as first,
        raw(running) as second,
    ):
        for taken in (first, second):
            assert next(frames(taken))
        with contextlib.suppress(ConnectionError), raw(running) as third:
            assert list(frames(third)) == []
