"""Bytes that nobody meant: whatever arrives is refused by name, and the next caller is served as if nothing was."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet
import pytest
from calls import SECONDS
from hypothesis import HealthCheck, given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from serving import WAYS, Running, serve

from recsys.errors import InputFileError
from recsys.feedback import Feedback, parse_record
from recsys.feedback_file import BadRow, open_feedback_file
from recsys.feedback_log import FeedbackLog
from recsys.histories import log_key
from recsys.metrics import METHODS
from recsys.settings import load
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.store.v1.log_pb2 import FeedbackRecord
from recsys.v1 import catalog_pb2, model_pb2, recommender_pb2

# The files and the store that an example leaves are overwritten by the next. The same examples every time: to look for
# new ones, turn derandomize off and raise max_examples.
few = bounded(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
INPUTS = {
    f"/{service.full_name}/{method.name}": method.input_type
    for file in (recommender_pb2, catalog_pb2, model_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# A server's own faults; everything else is the caller's, or bad luck.
FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@pytest.fixture(scope="module", params=WAYS)
def running(embedded_store: EmbeddedStore, request: pytest.FixtureRequest) -> Iterator[Running]:
    given = {"redis_url": embedded_store.url, "port": 0, "metrics_port": 0, "key_prefix": "fuzz"}
    with serve(load({**given, **WAYS[request.param]}, environment={})) as running:
        yield running


def code_of(running: Running, method: str, data: bytes, metadata: Any = ()) -> grpc.StatusCode:
    try:
        running.channel.unary_unary(method, None, None)(data, timeout=SECONDS, metadata=metadata)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


# --- Calls


texts = st.one_of(st.text(max_size=20), st.just("u"), st.just("click"), st.text("\x00\u2028\U0010ffff ", max_size=300))
numbers = st.one_of(st.integers(0, 3), st.integers(0, 2**31 - 1))


def messages(descriptor: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """Make well-formed messages of a type with anything in their fields."""

    def fill(draw: Any) -> Any:
        message = descriptor._concrete_class()
        for field in descriptor.fields:
            if draw(st.booleans()) or depth > 3:
                continue
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                getattr(message, field.name).update(draw(st.dictionaries(texts, texts, max_size=3)))
            elif field.message_type is not None:
                children = draw(st.lists(messages(field.message_type, depth + 1), min_size=1, max_size=3))
                if field.is_repeated:
                    getattr(message, field.name).extend(children)
                else:
                    getattr(message, field.name).CopyFrom(children[0])
            else:
                values = draw(st.lists(scalars(field), min_size=1, max_size=5))
                if field.is_repeated:
                    getattr(message, field.name).extend(values)
                else:
                    setattr(message, field.name, values[0])
        return message

    return st.composite(fill)()


def scalars(field: Any) -> st.SearchStrategy[Any]:
    kinds = {
        field.CPPTYPE_STRING: texts,
        field.CPPTYPE_BOOL: st.booleans(),
        field.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
        field.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
        field.CPPTYPE_UINT32: st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1)),
        field.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
        field.CPPTYPE_DOUBLE: st.floats(),
        field.CPPTYPE_FLOAT: st.floats(width=32),
    }
    return kinds[field.cpp_type]


def test_every_method_is_fuzzed() -> None:
    assert set(INPUTS) == {f"/{service}/{name}" for service, name in METHODS}


@pytest.mark.parametrize("method", INPUTS)
@few
@given(data=st.binary(max_size=200))
def test_random_bytes_never_are_the_servers_fault(running: Running, method: str, data: bytes) -> None:
    assert code_of(running, method, data) not in FAULTS


@pytest.mark.parametrize("method", INPUTS)
@few
@given(data=st.data())
def test_messages_with_anything_in_their_fields_never_are_the_servers_fault(
    running: Running, method: str, data: st.DataObject
) -> None:
    message = data.draw(messages(INPUTS[method]))
    assert code_of(running, method, message.SerializeToString()) not in FAULTS


@few
@given(value=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=300))
@pytest.mark.parametrize("header", ["x-request-id", "authorization"])
def test_metadata_never_are_the_servers_fault(running: Running, header: str, value: str) -> None:
    request = recommender_pb2.RecommendRequest(user_id="u").SerializeToString()
    assert code_of(running, "/recsys.v1.RecommenderService/Recommend", request, [(header, value)]) not in FAULTS


# --- Frames


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NO_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
frames = st.builds(
    lambda kind, flags, stream, payload, lie: (
        (len(payload) if lie is None else lie).to_bytes(3, "big")
        + bytes([kind, flags])
        + stream.to_bytes(4, "big")
        + payload
    ),
    st.integers(0, 12),
    st.integers(0, 255),
    st.one_of(st.integers(0, 7), st.integers(0, 2**32 - 1)),
    st.binary(max_size=64),
    st.one_of(st.none(), st.integers(0, 2**24 - 1)),
)


@few
@given(data=st.one_of(st.binary(max_size=500), st.lists(frames, max_size=10).map(b"".join)), preface=st.booleans())
def test_whatever_a_connection_brings_the_next_call_is_served(running: Running, data: bytes, preface: bool) -> None:
    with (
        socket.create_connection(("127.0.0.1", running.server.port), SECONDS) as connection,
        # The server may hang up at any byte; a connection that is gone cannot be shut down.
        contextlib.suppress(OSError),
    ):
        connection.sendall((PREFACE + NO_SETTINGS if preface else b"") + data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
    request = recommender_pb2.RecommendRequest(user_id="u").SerializeToString()
    assert code_of(running, "/recsys.v1.RecommenderService/Recommend", request) == grpc.StatusCode.OK


# --- The log


@few
@given(
    entries=st.lists(
        st.dictionaries(st.sampled_from(["r", "t", "x"]), st.binary(max_size=100), min_size=1), max_size=20
    )
)
def test_log_entries_of_random_bytes_are_read_as_malformed(
    embedded_store: EmbeddedStore, entries: list[dict[str, bytes]]
) -> None:
    given = load({"redis_url": embedded_store.url, "key_prefix": "fuzzlog"}, environment={})
    with connect(given) as store:
        store.delete(log_key(given, "records"))
        log = FeedbackLog(store, given)
        for entry in entries:
            store.xadd(log_key(given, "records"), entry)  # type: ignore[arg-type]  # text keys, bytes values
        log.append([Feedback("u", "item", "click")])
        *read, last = log.read_after("0-0", 100)
        assert [(e.record is None, e.tick) for e in read] == [
            (parse_record(e["r"]) is None, False) if "r" in e else (True, "t" in e) for e in entries
        ]
        assert last.record is not None
        assert [e.position for e in log.read_before(last.position, 100)][-1] == last.position


@few
@given(data=st.binary(max_size=200))
def test_what_parses_as_a_record_names_user_item_and_class(data: bytes) -> None:
    record = parse_record(data)
    if record is not None:
        assert all((record.user_id, record.item_id, record.feedback_class))
        assert FeedbackRecord.FromString(record.SerializeToString()) == record


# --- Files


def check_file(path: Path) -> None:
    """Read a file to its end: rows and bad rows, or refused as a whole."""
    with contextlib.suppress(InputFileError):
        for row in open_feedback_file(path):
            assert isinstance(row, Feedback | BadRow)


headers = st.sampled_from(
    [b"", b"userId,movieId,rating,timestamp\n", b"user_id,item_id,time\n", b"user_id,item_id\n1,2\n"]
)
cells = st.one_of(
    st.binary(max_size=12), st.sampled_from([b"1", b"1e999", b"-1", b"nan", b'"', b"2020-01-01", b"\xff"])
)
tables = st.lists(st.lists(cells, max_size=5).map(b",".join), max_size=20).map(b"\n".join)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".dat", ".data"])
@few
@given(header=headers, body=st.one_of(st.binary(max_size=300), tables))
def test_any_text_file_is_read_or_refused(tmp_path: Path, suffix: str, header: bytes, body: bytes) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(header + body)
    check_file(path)


@few
@given(data=st.binary(max_size=300))
def test_random_bytes_as_parquet_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file.parquet"
    path.write_bytes(data)
    with pytest.raises(InputFileError):
        open_feedback_file(path)


@few
@given(
    columns=st.fixed_dictionaries(
        {"user_id": st.integers(0, 3), "item_id": st.integers(0, 3), "time": st.integers(0, 5)}
    ),
    at=st.integers(0, 5000),
    bit=st.integers(0, 7),
    cut=st.booleans(),
)
def test_a_damaged_parquet_file_is_read_or_refused(
    tmp_path: Path, columns: dict[str, int], at: int, bit: int, cut: bool
) -> None:
    path = tmp_path / "file.parquet"
    kinds = [["a", "b"], [1, 2], [1.5, float("nan")], [None, None], [b"\xff", b"x"], [10**18, -1]]
    pa.parquet.write_table(pa.table({name: kinds[kind] for name, kind in columns.items()}), path)
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data[:at]) if cut else bytes(data))
    check_file(path)


# --- What was found


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_lone_carriage_return_in_the_header_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(b"\r\x00")
    with pytest.raises(InputFileError):
        open_feedback_file(path)


def test_a_parquet_file_with_a_damaged_name_in_its_footer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    pa.parquet.write_table(pa.table({name: ["a", "b"] for name in ("user_id", "item_id", "time")}), path)
    data = path.read_bytes()
    damaged = [data[:at] + b"\xe9" + data[at + 1 :] for at in _places(data, b"item_id")]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            open_feedback_file(path)
        except InputFileError:
            refused += 1
    assert refused, "some of the places are those that readers look at"


def _places(data: bytes, name: bytes) -> list[int]:
    return [at for at in range(len(data)) if data.startswith(name, at)]
