"""Who may connect and call, that secrets stay secret, and what one peer may take of the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import struct
import threading
import traceback
from collections.abc import Iterator
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
from http2 import frames, raw
from serving import Running, changed, serve, server_tls

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


def write_tokens(path: Path, tokens: dict[str, str]) -> None:
    """Write a tokens file: role -> token."""
    entries = (
        f'[[token]]\nname = "the {role} token"\nsha256 = "{digest_of(token)}"\nroles = ["{role}"]\n'
        for role, token in tokens.items()
    )
    path.write_text("\n".join(entries))


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
    return running.channel.unary_unary(method, None, None)(data, timeout=SECONDS, metadata=metadata)


# --- TLS


@pytest.fixture(params=["grpcio", "native"])
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
    call = guarded.channel.unary_unary("/recsys.v1.RecommenderService/Recommend", None, None)
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


def test_calls_in_flight_on_one_connection_are_bounded(settings: Settings) -> None:
    with serve(changed(settings, max_concurrent_streams=7)) as running, raw(running) as connection:
        payload = next(payload for kind, payload in frames(connection) if kind == 4)
        announced = dict(struct.iter_unpack(">HI", payload))
        assert announced[3] == 7


def test_a_peer_that_pings_all_the_time_is_disconnected(settings: Settings) -> None:
    with serve(changed(settings, min_ping_seconds=30.0, transport="grpcio")) as running:
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
        serve(changed(settings, max_connections=2, transport="grpcio")) as running,
        raw(running) as first,
        raw(running) as second,
    ):
        for taken in (first, second):
            assert next(frames(taken))
        with contextlib.suppress(ConnectionError), raw(running) as third:
            assert list(frames(third)) == []
