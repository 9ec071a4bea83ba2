"""The weight store: payloads as bytes, commits whole or not at all, snapshots, followers."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import mmap
import struct
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis.backoff import NoBackoff
from redis.retry import Retry

from recsys.errors import CorruptWeights, FencedOff, StoreUnavailable
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.v1 import weights_pb2
from recsys.weights import Lineage, WeightPayload, WeightStore, decode, encode
from recsys.weights.payload import DTYPES, Receiver
from recsys.weights.retention import LEAST_SNAPSHOT_BYTES, snapshot_due

CHUNK = 64
lineage = Lineage("7-0", 640, 64, "digest", {"loss": 0.5}, [1000, 1001], 2000)


def _payload(seed: int, rows: int = 5) -> WeightPayload:
    random = np.random.default_rng(seed)
    return WeightPayload(
        dense={"a": random.normal(size=(3, 2)).astype(np.float32), "scalar": np.array(seed, np.int64)},
        rows=np.arange(rows, dtype=np.int32) * 2,
        columns={"row": random.normal(size=(rows, 4)).astype(np.float32), "count": np.full(rows, seed, np.int32)},
        new_items=[(f"item-{seed}", seed)],
    )


def _bytes(seed: int, rows: int = 5) -> bytes:
    return encode(_payload(seed, rows))


def _trainer(seed: int) -> bytes:
    return encode(WeightPayload(dense={"moment": np.full(40, seed, np.float32)}))


def _commit(weights: WeightStore, epoch: int, parent: int) -> weights_pb2.VersionRecord:
    return weights.commit(epoch, parent, _bytes(parent + 1), _trainer(parent + 1), lineage)


@pytest.fixture
def weights(store: redis.Redis, settings: Settings) -> WeightStore:
    return WeightStore(store, settings, chunk_bytes=CHUNK)


# Payloads


@st.composite
def payloads(draw: st.DrawFn) -> WeightPayload:
    names = st.text(st.characters(codec="utf-8"), max_size=5)
    dtypes = st.sampled_from([np.dtype(name) for name in DTYPES])
    rows = sorted(draw(st.sets(st.integers(0, 2**31 - 1), max_size=4)))
    tensors = dtypes.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=3)))
    tails = st.lists(st.integers(0, 3), max_size=2).map(tuple)
    columns = st.tuples(dtypes, tails).flatmap(lambda of: hnp.arrays(of[0], (len(rows), *of[1])))
    new_rows = draw(st.lists(st.integers(0, 2**31 - 1), unique=True, max_size=3))
    items = draw(st.lists(names, unique=True, min_size=len(new_rows), max_size=len(new_rows)))
    return WeightPayload(
        dense=draw(st.dictionaries(names, tensors, max_size=3)),
        rows=np.array(rows, np.int32),
        columns=draw(st.dictionaries(names, columns, max_size=3)),
        new_items=list(zip(items, new_rows, strict=True)),
    )


@hypothesis_settings(max_examples=50, deadline=None)
@given(payloads())
def test_payload_round_trip(payload: WeightPayload) -> None:
    found = decode(encode(payload))
    for given_, back in ((payload.dense, found.dense), (payload.columns, found.columns)):
        assert {k: (v.dtype, v.shape, v.tobytes()) for k, v in given_.items()} == {
            k: (v.dtype, v.shape, v.tobytes()) for k, v in back.items()
        }
        assert not any(array.flags.writeable for array in back.values())
    assert found.rows.dtype == np.int32
    assert found.rows.tolist() == payload.rows.tolist()
    assert found.new_items == payload.new_items
    assert encode(found) == encode(payload)


def test_same_content_gives_the_same_bytes_whatever_the_layout() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    a = WeightPayload(
        dense={"x": values, "y": values}, rows=np.array([1, 4], np.int32), columns={"c": values, "b": values}
    )
    other = np.asfortranarray(values).astype(">f4")
    b = WeightPayload(dense={"y": other, "x": other}, rows=np.array([1, 4], ">i4"), columns={"b": other, "c": other})
    assert encode(a) == encode(b)
    assert hashlib.blake2b(encode(a), digest_size=16).hexdigest() == "7131b49bca732be7e92a7021ad2a689e"


@given(st.binary(max_size=200))
def test_random_bytes_decode_or_are_corrupt(data: bytes) -> None:
    with contextlib.suppress(CorruptWeights):
        decode(data)


@given(st.data())
def test_flipped_bits_decode_or_are_corrupt(data: st.DataObject) -> None:
    encoded = bytearray(_bytes(1))
    for position in data.draw(st.lists(st.integers(0, 8 * len(encoded) - 1), min_size=1, max_size=4)):
        encoded[position // 8] ^= 1 << position % 8
    with contextlib.suppress(CorruptWeights):
        decode(bytes(encoded))


def _tensor(**changes: Any) -> weights_pb2.Tensor:
    return weights_pb2.Tensor(**{"name": "t", "dtype": "int32", "shape": [2], **changes})


def _ints(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def _made(*parts: bytes, **fields: Any) -> bytes:
    """Put a payload together by hand from a header's fields and the arrays behind it."""
    header = weights_pb2.PayloadHeader(**fields).SerializeToString()
    start = b"RWP1" + struct.pack("<I", len(header)) + header
    return b"".join(part + bytes(-len(part) % 8) for part in (start, *parts))


def _items(*ids: str, rows: tuple[int, ...], lengths: tuple[int, ...] | None = None) -> bytes:
    text = "".join(ids).encode()
    arrays = (_ints(*rows), _ints(*(lengths or tuple(map(len, ids)))), text)
    return _made(*arrays, new_items=len(ids), id_bytes=len(text))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (_made(bytes(8), dense=[_tensor(dtype="object")]), "dtype 'object' is not allowed"),
        (_made(bytes(8), dense=[_tensor(dtype="<f4")]), "dtype '<f4' is not allowed"),
        (_made(bytes(8), dense=[_tensor(shape=[3])]), "16 bytes and 8 follow"),
        (_made(bytes(8), dense=[_tensor(shape=[2**40])]), "bytes and 8 follow"),
        (_made(bytes(8), dense=[_tensor(shape=[-1, -2])]), "is none"),
        (_made(dense=[_tensor(shape=[0, 2**62])]), "tensor 't'"),
        (_made(bytes(8), dense=[_tensor(shape=[2] + [1] * 100)]), "tensor 't'"),
        (_made(bytes(16), dense=[_tensor(), _tensor()]), "stands twice"),
        (_made(rows=-2, id_bytes=8), "bytes and 0 follow"),
        (_made(_ints(-1, 2), rows=2), "rows: negative"),
        (_made(_ints(1, 1), rows=2), "repeated"),
        (_made(_ints(2, 1), rows=2), "not ascending"),
        (_made(_ints(1), bytes(8), rows=1, columns=[_tensor()]), "for 1 rows"),
        (_made(bytes(8), columns=[_tensor(shape=[])]), "for 0 rows"),
        (_items("a", rows=(-1,)), "negative"),
        (_items("a", "a", rows=(1, 2)), "repeated"),
        (_items("a", "b", rows=(1, 1)), "repeated"),
        (_items("a", "b", rows=(2, 1), lengths=(3, -1)), "lengths"),
        (_items("a", "b", rows=(1, 2), lengths=(1, 2)), "lengths"),
        (_made(_ints(1), _ints(1), b"\xff", new_items=1, id_bytes=1), "not UTF-8"),
        (_made(b"", b"", b"a", id_bytes=1), "lengths"),
        (b"", "0 bytes of 0 are missing"),
        (b"RWP1", "4 bytes are missing|bytes of 4"),
        (b"RWP0" + bytes(12), "does not begin as one"),
        (b"RWP1" + struct.pack("<I", 99), "a header of 99 bytes"),
        (b"RWP1" + struct.pack("<I", 8) + b"\xff" * 8, "cannot be parsed"),
    ],
)
def test_malformed_payload_is_corrupt(data: bytes, says: str) -> None:
    with pytest.raises(CorruptWeights, match=says):
        decode(data)


@given(payloads(), st.lists(st.integers(1, 40), min_size=1))
def test_a_payload_comes_in_pieces_of_any_size(payload: WeightPayload, sizes: list[int]) -> None:
    data, start = encode(payload), 0
    receiver = Receiver(len(data))
    for size in itertools.cycle(sizes):
        receiver.feed(data[start : start + size])
        start += size
        if start >= len(data):
            break
        with pytest.raises(CorruptWeights, match="are missing"):
            receiver.payload()
    assert encode(receiver.payload()) == data
    with pytest.raises(CorruptWeights, match="more than"):
        receiver.feed(b"x")


@pytest.mark.parametrize("shift", [0, 1, 4088])
@pytest.mark.parametrize("size", [4096, 5000, 1 << 17])
def test_pages_of_nothing_but_zeros_are_not_written_to(shift: int, size: int) -> None:
    rows, pages = 16, 64
    column = np.zeros((rows, mmap.PAGESIZE // 4 * pages // rows), np.int32)
    # In the second page, at its last place, and at the beginning of the column.
    column.reshape(-1)[[0, 2 * mmap.PAGESIZE // 4 - 1]] = 1, 1 << 24
    data = encode(WeightPayload(rows=np.arange(rows, dtype=np.int32), columns={"row": column}))
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    placed = np.frombuffer(memory, np.uint8)[shift : shift + column.nbytes].view(np.int32).reshape(column.shape)
    receiver = Receiver(len(data), lambda header: {"row": placed})
    for start in range(0, len(data), size):
        receiver.feed(data[start : start + size])
    # To look at a page gives it memory, too.
    assert _resident_pages(placed) <= 4
    assert encode(receiver.payload()) == data


def _resident_pages(array: np.ndarray) -> int:
    """Count the pages that take memory."""
    address, page = array.ctypes.data // mmap.PAGESIZE, 8
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(address * page)
        entries = np.frombuffer(pagemap.read(page * (1 + array.nbytes // mmap.PAGESIZE)), np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(63)))


def test_columns_are_read_to_where_the_caller_says() -> None:
    payload = _payload(3)
    memory = np.zeros((9, 4), np.float32)
    receiver = Receiver(len(_bytes(3)), lambda header: {"row": memory[: header.rows]})
    receiver.feed(_bytes(3))
    found = receiver.payload()
    np.testing.assert_array_equal(memory[:5], payload.columns["row"])
    assert not memory[5:].any()
    assert np.shares_memory(found.columns["row"], memory)
    assert encode(found) == _bytes(3)


@pytest.mark.parametrize(
    "payload",
    [
        WeightPayload(dense={"a": np.array(["text"])}),
        WeightPayload(dense={"a": np.array([object()])}),
        WeightPayload(rows=np.array([1], np.int64)),  # type: ignore[arg-type]
        WeightPayload(rows=np.array([[1]], np.int32)),
        WeightPayload(rows=np.array([2, 1], np.int32)),
        WeightPayload(columns={"a": np.zeros(3)}),
    ],
)
def test_encode_refuses_what_decode_would(payload: WeightPayload) -> None:
    with pytest.raises(ValueError, match=r"dtype|rows|column"):
        encode(payload)


# Commits


def test_commit_and_follow(weights: WeightStore) -> None:
    assert weights.head() is None
    assert weights.read_after(0) == []
    epoch = weights.acquire()
    records = [_commit(weights, epoch, parent) for parent in range(3)]
    assert weights.head() == records[-1]
    assert weights.versions(10) == records[::-1]
    assert weights.versions(1, before=3) == [records[1]]
    first = records[0]
    assert (first.version, first.parent, first.epoch, first.position) == (1, 0, epoch, "7-0")
    assert (first.feedback_learned, first.feedback_added, first.settings_digest) == (640, 64, "digest")
    assert (dict(first.metrics), list(first.accepted_ms), first.committed_ms) == ({"loss": 0.5}, [1000, 1001], 2000)
    assert first.chunks == -(-len(_bytes(1)) // CHUNK) > 2

    deltas = weights.read_after(0, trainer=True)
    assert [delta.record for delta in deltas] == records
    for version, delta in enumerate(deltas, start=1):
        assert encode(delta.payload) == _bytes(version)
        assert delta.trainer_payload is not None
        assert encode(delta.trainer_payload) == _trainer(version)
    assert [delta.record.version for delta in weights.read_after(1, count=1)] == [2]
    assert weights.read_after(2)[0].trainer_payload is None
    assert weights.read_after(3) == []
    assert weights.usage() == sum(len(_bytes(v)) + len(_trainer(v)) for v in (1, 2, 3))


def test_chain_hashes_all_that_led_to_a_version(weights: WeightStore) -> None:
    epoch = weights.acquire()
    chain = b""
    for version in (1, 2, 3):
        parts = [hashlib.sha256(part).digest()[:16] for part in (_bytes(version), _trainer(version))]
        chain = hashlib.sha256(chain + b"".join(parts)).digest()[:16]
        assert _commit(weights, epoch, version - 1).chain == chain


def test_newer_trainer_fences_off_the_older(weights: WeightStore, store: redis.Redis, settings: Settings) -> None:
    other = WeightStore(store, settings, chunk_bytes=CHUNK)
    old = weights.acquire()
    _commit(weights, old, 0)
    new = other.acquire()
    assert new > old
    with pytest.raises(FencedOff, match=f"epoch {old} is not the current one: the store is at epoch {new}"):
        weights.commit(old, 1, _bytes(99), _trainer(99), lineage)
    with pytest.raises(FencedOff, match="epoch"):
        weights.write_snapshot(old, 1, _bytes(1), _trainer(1))
    _commit(other, new, 1)
    for parent in (0, 1, 3):
        with pytest.raises(FencedOff, match=f"version {parent} is not the last: the store stands at version 2"):
            weights.commit(new, parent, _bytes(99), _trainer(99), lineage)
    with pytest.raises(FencedOff):
        weights.commit(0, 2, _bytes(99), _trainer(99), lineage)
    assert [encode(delta.payload) for delta in weights.read_after(0)] == [_bytes(1), _bytes(2)]
    assert _passing(store) == 0


def test_commit_without_an_epoch_is_refused(weights: WeightStore) -> None:
    with pytest.raises(FencedOff, match="epoch 0 is not the current one"):
        weights.commit(0, 0, _bytes(1), _trainer(1), lineage)


def test_repeated_commit_is_the_same_version(weights: WeightStore, store: redis.Redis) -> None:
    epoch = weights.acquire()
    record = _commit(weights, epoch, 0)
    before = set(store.keys())
    assert _commit(weights, epoch, 0) == record
    assert set(store.keys()) == before
    with pytest.raises(FencedOff):
        weights.commit(epoch, 0, _bytes(2), _trainer(1), lineage)
    assert weights.acquire() == epoch + 1
    assert _commit(weights, epoch, 0) == record, "it was committed, though the next one will be refused"
    assert encode(weights.read_after(0)[0].payload) == _bytes(1)


def test_stream_refuses_a_version_when_the_head_is_lost(weights: WeightStore, store: redis.Redis) -> None:
    epoch = weights.acquire()
    record = _commit(weights, epoch, 0)
    store.delete("recsys:{weights}:head")
    with pytest.raises(FencedOff, match="version 1 is among the deltas already"):
        weights.commit(epoch, 0, _bytes(2), _trainer(2), lineage)
    assert weights.versions(5) == [record]


@pytest.mark.parametrize("script", ["_commit_script", "_snapshot_script"])
def test_scripts_change_nothing_when_staged_chunks_have_lapsed(
    weights: WeightStore, store: redis.Redis, script: str
) -> None:
    epoch = weights.acquire()
    names = ["epoch", "head", "deltas"] if script == "_commit_script" else ["epoch", "snapshots"]
    store.set("recsys:{weights}:staged", b"", ex=60)
    keys = [f"recsys:{{weights}}:{name}" for name in (*names, "staged", "lapsed")]
    args = [epoch, 0, 1, b"", "", b""] if script == "_commit_script" else [epoch, 1, b"", 2, 60]
    assert getattr(weights, script)(keys=keys, args=args) == [b"lapsed"]
    assert {*store.scan_iter()} == {b"recsys:{weights}:epoch", b"recsys:{weights}:staged"}
    assert store.ttl("recsys:{weights}:staged") > 0


class DyingConnection(redis.Connection):
    """Break after `sends` more bytes have left, or after `answers` more answers have come."""

    _sock: Any
    sends: float = float("inf")
    answers: float = float("inf")

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        for part in [command] if isinstance(command, str | bytes) else command:
            data = memoryview(part)
            if DyingConnection.sends < len(data):
                self._sock.sendall(data[: int(DyingConnection.sends)])
                DyingConnection.sends = 0
                self._die()
            DyingConnection.sends -= len(data)
            super().send_packed_command([part], check_health=False)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        response = super().read_response(*args, **kwargs)
        if DyingConnection.answers <= 0:
            self._die()
        DyingConnection.answers -= 1
        return response

    def _die(self) -> None:
        self.disconnect()
        raise redis.ConnectionError("killed")


@pytest.fixture
def dying(store: redis.Redis) -> Iterator[redis.Redis]:
    """A client whose connection can be made to break; its pool keeps one connection that has said hello."""
    options = store.connection_pool.connection_kwargs
    DyingConnection.sends = DyingConnection.answers = float("inf")
    pool = redis.ConnectionPool(
        connection_class=DyingConnection,
        host=options["host"],
        port=options["port"],
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=2,
    )
    with redis.Redis(connection_pool=pool) as client:
        yield client
    DyingConnection.sends = DyingConnection.answers = float("inf")
    pool.disconnect()


def _passing(store: redis.Redis) -> int:
    """Count chunks that will go by themselves."""
    return sum(store.ttl(key) > 0 for key in store.scan_iter())


def _check_whole(weights: WeightStore, store: redis.Redis, seeds: list[int]) -> None:
    """Assert that versions of these contents read back, and that no chunk stands for ever outside them."""
    deltas = weights.read_after(0, trainer=True)
    assert [encode(delta.payload) for delta in deltas] == [_bytes(seed) for seed in seeds]
    standing = {key for key in store.scan_iter() if store.ttl(key) < 0 and b":chunk:" in key}
    assert len(standing) == sum(delta.record.chunks + delta.record.trainer_chunks for delta in deltas)


@pytest.mark.parametrize("kind", ["sends", "answers"])
def test_commit_killed_anywhere_leaves_a_whole_chain(
    dying: redis.Redis, store: redis.Redis, settings: Settings, kind: str
) -> None:
    """The trainer dies after every few bytes that it sends, or after each answer; the next takes over."""
    committed = []
    for budget in itertools.count(step=97 if kind == "sends" else 1):
        store.flushdb()
        victim = WeightStore(dying, settings, chunk_bytes=CHUNK)
        epoch = victim.acquire()
        dying.script_load(victim._commit_script.script)  # type: ignore[attr-defined]
        setattr(DyingConnection, kind, budget)
        try:
            victim.commit(epoch, 0, _bytes(50), _trainer(50), lineage)
            break
        except StoreUnavailable:
            pass
        finally:
            setattr(DyingConnection, kind, float("inf"))
        heir = WeightStore(store, settings, chunk_bytes=CHUNK)
        new = heir.acquire()
        head = heir.head()
        committed.append(head is not None)
        _commit(heir, new, head.version if head else 0)
        _check_whole(heir, store, [50, 2] if head else [1])
    assert committed == sorted(committed), "only the script commits"
    assert len(committed) > 8
    assert kind == "sends" or committed[-1], "the answer to the script was lost"


def test_commit_whose_answer_was_lost_is_resolved_by_repeating(
    dying: redis.Redis, store: redis.Redis, settings: Settings
) -> None:
    for answers in itertools.count():
        store.flushdb()
        weights = WeightStore(dying, settings, chunk_bytes=CHUNK)
        epoch = weights.acquire()
        DyingConnection.answers = answers
        try:
            _commit(weights, epoch, 0)
            break
        except StoreUnavailable:
            DyingConnection.answers = float("inf")
        record = _commit(weights, epoch, 0)
        assert weights.head() == record
        _commit(weights, epoch, 1)
        _check_whole(weights, store, [1, 2])
    assert answers > 8


# Damage


def _chunk(store: redis.Redis, pattern: str) -> bytes:
    return min(key for key in store.scan_iter() if pattern.encode() in key)


def _flip(store: redis.Redis, key: bytes) -> None:
    data = bytearray(store.get(key))  # type: ignore[arg-type]
    data[len(data) // 2] ^= 16
    store.set(key, bytes(data))


def test_damaged_delta_is_corrupt(weights: WeightStore, store: redis.Redis) -> None:
    epoch = weights.acquire()
    for parent in range(3):
        _commit(weights, epoch, parent)
    _flip(store, _chunk(store, ":chunk:w:2:"))
    store.delete(_chunk(store, ":chunk:t:3:"))
    assert len(weights.read_after(0, count=1)) == 1
    with pytest.raises(CorruptWeights, match="version 2: the checksum"):
        weights.read_after(1)
    assert len(weights.read_after(2)) == 1, "a server does not read what only the trainer needs"
    with pytest.raises(CorruptWeights, match=r"version 3: chunk 1 of \d is gone"):
        weights.read_after(2, trainer=True)


def test_gap_is_corrupt(weights: WeightStore, store: redis.Redis) -> None:
    epoch = weights.acquire()
    for parent in range(3):
        _commit(weights, epoch, parent)
    store.xdel("recsys:{weights}:deltas", "2-0")
    assert len(weights.read_after(2)) == 1
    for version in (0, 1):
        with pytest.raises(CorruptWeights, match="version 3 of parent 2 follows version 1"):
            weights.read_after(version)
    store.xtrim("recsys:{weights}:deltas", maxlen=0, approximate=False)
    with pytest.raises(CorruptWeights, match="version 2 is gone: the store stands at 3"):
        weights.read_after(1)
    assert weights.read_after(3) == []


def test_reader_of_a_past_that_the_store_forgot_is_told(weights: WeightStore) -> None:
    epoch = weights.acquire()
    first, second = _commit(weights, epoch, 0), _commit(weights, epoch, 1)
    assert weights.read_after(2, chain=second.chain) == []
    with pytest.raises(CorruptWeights, match="another than the one held"):
        weights.read_after(2, chain=b"forgotten")
    assert len(weights.read_after(1, chain=first.chain)) == 1
    with pytest.raises(CorruptWeights, match="does not continue"):
        weights.read_after(1, chain=b"forgotten")
    assert weights.read_after(9, chain=b"ahead") == [], "the trainer that restarts will learn up to here again"


def test_unreadable_records_are_corrupt(weights: WeightStore, store: redis.Redis) -> None:
    store.xadd("recsys:{weights}:deltas", {"record": b"\xff"}, id="1-0")
    store.hset("recsys:{weights}:head", "record", b"\xff")
    store.zadd("recsys:{weights}:snapshots", {b"\xff": 1})
    for read in (weights.head, lambda: weights.read_after(0), lambda: weights.versions(1), weights.load_snapshot):
        with pytest.raises(CorruptWeights, match="cannot be parsed"):
            read()


# Snapshots


def _snapshot(weights: WeightStore, epoch: int, version: int) -> None:
    weights.write_snapshot(epoch, version, _bytes(100 + version), _trainer(version))


def test_snapshots_are_retained_and_deltas_behind_the_oldest_trimmed(
    weights: WeightStore, store: redis.Redis, settings: Settings
) -> None:
    assert weights.load_snapshot() is None
    epoch = weights.acquire()
    for version in range(1, 11):
        _commit(weights, epoch, version - 1)
        if version % 2 == 0:
            _snapshot(weights, epoch, version)
    assert settings.snapshots_retained == 3
    assert weights.snapshot_versions() == [10, 8, 6]
    assert [record.version for record in weights.versions(100)] == [10, 9, 8, 7]
    assert _passing(store) == 0
    assert {int(key.split(b":")[4]) for key in store.scan_iter() if b":chunk:" in key} == {7, 8, 9, 10}
    assert {int(key.split(b":")[4]) for key in store.scan_iter() if b":snapshot:" in key} == {6, 8, 10}
    expected = [_bytes(v) + _trainer(v) for v in (7, 8, 9, 10)] + [_bytes(100 + v) + _trainer(v) for v in (6, 8, 10)]
    assert weights.usage() == sum(map(len, expected))

    snapshot = weights.load_snapshot(trainer=True)
    assert snapshot is not None
    assert snapshot.trainer_payload is not None
    assert snapshot.record == weights.head()
    assert snapshot.skipped == ()
    assert (encode(snapshot.payload), encode(snapshot.trainer_payload)) == (_bytes(110), _trainer(10))
    assert weights.read_after(10) == []
    with pytest.raises(CorruptWeights, match="follows version 3"):
        weights.read_after(3)
    with pytest.raises(FencedOff, match="version 4 cannot be snapshotted"):
        _snapshot(weights, epoch, 4)
    _snapshot(weights, epoch, 7)
    assert weights.snapshot_versions() == [10, 8, 7]


def _retained(store: redis.Redis, settings: Settings, versions: int = 12) -> tuple[list[int], list[int], int]:
    """Commit versions of one size, with a snapshot of every other; return what is retained of both, and the bytes."""
    weights = WeightStore(store, settings, chunk_bytes=CHUNK)
    epoch = weights.acquire()
    for version in range(1, versions + 1):
        weights.commit(epoch, version - 1, _bytes(9), _trainer(9), lineage)
        if version % 2 == 0:
            weights.write_snapshot(epoch, version, _bytes(9), _trainer(9))
    return weights.snapshot_versions(), [r.version for r in weights.versions(100)], sum(weights.sizes())


def test_versions_and_bytes_are_bounded_too(store: redis.Redis, settings: Settings) -> None:
    one = len(_bytes(9)) + len(_trainer(9))
    many = settings.model_copy(update={"snapshots_retained": 5})
    assert _retained(store, many) == ([12, 10, 8, 6, 4], [12, 11, 10, 9, 8, 7, 6, 5], 13 * one)
    store.flushdb()
    assert _retained(store, many.model_copy(update={"versions_retained": 5}))[:2] == ([12, 10, 8], [12, 11, 10, 9])
    store.flushdb()
    # Three copies with two versions between any two, and as much again as the next copy and its versions may take.
    bound = many.model_copy(update={"weights_max_bytes": 9 * one})
    assert _retained(store, bound) == ([12, 10, 8], [12, 11, 10, 9], 7 * one)
    store.flushdb()
    assert _retained(store, many.model_copy(update={"weights_max_bytes": 9 * one - 1}))[0] == [12, 10]
    store.flushdb()
    assert _retained(store, many.model_copy(update={"weights_max_bytes": 1})) == ([12], [], one)


@pytest.mark.parametrize(
    ("versions", "bytes_", "snapshot_bytes", "due"),
    [
        (1, LEAST_SNAPSHOT_BYTES - 1, 0, False),
        (1, LEAST_SNAPSHOT_BYTES, 0, True),
        (1, LEAST_SNAPSHOT_BYTES, LEAST_SNAPSHOT_BYTES + 1, False),
        (2499, 0, 0, False),
        (2500, 0, 0, True),
    ],
)
def test_a_snapshot_is_due(settings: Settings, versions: int, bytes_: int, snapshot_bytes: int, due: bool) -> None:
    assert snapshot_due(settings, versions, bytes_, snapshot_bytes) == due
    own = settings.model_copy(update={"snapshot_every_bytes": 100})
    assert snapshot_due(own, 1, 99, 1 << 40) is False
    assert snapshot_due(own, 1, 100, 1 << 40) is True


def test_reader_left_behind_by_a_trim_of_everything_is_told(store: redis.Redis, settings: Settings) -> None:
    weights = WeightStore(store, settings.model_copy(update={"snapshots_retained": 1}), chunk_bytes=CHUNK)
    epoch = weights.acquire()
    for parent in range(3):
        _commit(weights, epoch, parent)
    _snapshot(weights, epoch, 3)
    assert weights.versions(5) == []
    with pytest.raises(CorruptWeights, match="version 2 is gone"):
        weights.read_after(1)
    _commit(weights, epoch, 3)
    assert [delta.record.version for delta in weights.read_after(3)] == [4]


def test_damaged_snapshot_falls_back_to_the_older(weights: WeightStore, store: redis.Redis) -> None:
    epoch = weights.acquire()
    for version in (1, 2, 3):
        _commit(weights, epoch, version - 1)
        _snapshot(weights, epoch, version)
    _flip(store, _chunk(store, ":snapshot:w:3:"))
    store.delete(_chunk(store, ":snapshot:t:2:"))
    snapshot = weights.load_snapshot()
    assert snapshot is not None
    assert (snapshot.record.version, snapshot.skipped) == (2, (3,))
    snapshot = weights.load_snapshot(trainer=True)
    assert snapshot is not None
    assert (snapshot.record.version, snapshot.skipped) == (1, (3, 2))
    assert [delta.record.version for delta in weights.read_after(1)] == [2, 3]
    store.delete(_chunk(store, ":snapshot:w:1:"))
    with pytest.raises(CorruptWeights, match=r"none of the snapshots \[3, 2, 1\] is whole"):
        weights.load_snapshot(trainer=True)


def test_snapshot_of_the_same_version_is_replaced(weights: WeightStore, store: redis.Redis) -> None:
    epoch = weights.acquire()
    _commit(weights, epoch, 0)
    _snapshot(weights, epoch, 1)
    _flip(store, _chunk(store, ":snapshot:w:1:"))
    newer = weights.acquire()
    _snapshot(weights, newer, 1)
    assert weights.snapshot_versions() == [1]
    assert weights.load_snapshot() is not None
    assert {int(key.split(b":")[5]) for key in store.scan_iter() if b":snapshot:" in key} == {newer}


def test_snapshot_killed_anywhere_leaves_one_that_is_whole(
    dying: redis.Redis, store: redis.Redis, settings: Settings
) -> None:
    settings = settings.model_copy(update={"snapshots_retained": 1})
    heir = WeightStore(store, settings, chunk_bytes=CHUNK)
    for answers in itertools.count():
        store.flushdb()
        victim = WeightStore(dying, settings, chunk_bytes=CHUNK)
        epoch = victim.acquire()
        for version in (1, 2):
            _commit(victim, epoch, version - 1)
            DyingConnection.answers = answers if version == 2 else float("inf")
            try:
                _snapshot(victim, epoch, version)
            except StoreUnavailable:
                DyingConnection.answers = float("inf")
        died = DyingConnection.answers == float("inf")
        snapshot = heir.load_snapshot(trainer=True)
        assert snapshot is not None
        assert encode(snapshot.payload) == _bytes(100 + snapshot.record.version)
        assert [d.record.version for d in heir.read_after(snapshot.record.version)] == [2][
            snapshot.record.version - 1 :
        ]
        standing = {key for key in store.scan_iter() if store.ttl(key) < 0 and b":snapshot:" in key}
        assert {int(key.split(b":")[4]) for key in standing} == {snapshot.record.version}
        _snapshot(heir, heir.acquire(), 2)
        assert (heir.snapshot_versions(), heir.versions(5)) == ([2], [])
        if not died:
            break
    assert answers > 8


# Waiting


def test_waiting_reader_wakes_when_a_version_comes(store: redis.Redis, weights: WeightStore) -> None:
    epoch = weights.acquire()
    found: list[int] = []
    reader = threading.Thread(target=lambda: found.extend(d.record.version for d in weights.read_after(0, 20)))
    reader.start()
    while store.info("clients")["blocked_clients"] == 0:  # type: ignore[index]
        assert reader.is_alive()
    _commit(weights, epoch, 0)
    reader.join(timeout=10)
    assert found == [1]


def test_wait_may_be_longer_than_the_connection_waits(settings: Settings) -> None:
    settings = settings.model_copy(update={"store_timeout_seconds": 0.4})
    with connect(settings) as client:
        assert WeightStore(client, settings).read_after(0, wait_seconds=0.45) == []


def test_unreachable_store_is_unavailable(settings: Settings) -> None:
    settings = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    with connect(settings) as client:
        weights = WeightStore(client, settings)
        for call in (
            weights.acquire,
            weights.head,
            weights.load_snapshot,
            weights.usage,
            lambda: weights.read_after(0),
        ):
            with pytest.raises(StoreUnavailable):
                call()


# Against a model


class StoreMachine(RuleBasedStateMachine):
    """Two trainers, a reader and a plain list of what was committed."""

    client: redis.Redis
    base: Settings
    prefixes = itertools.count()

    @initialize(retained=st.integers(1, 3))
    def start(self, retained: int) -> None:
        update = {"key_prefix": f"machine-{next(self.prefixes)}", "snapshots_retained": retained}
        self.settings = self.base.model_copy(update=update)
        self.weights = WeightStore(self.client, self.settings, chunk_bytes=CHUNK)
        self.epochs = [0, 0]
        self.epoch = 0
        self.contents: list[int] = []
        self.snapshots: list[int] = []
        self.reader = 0
        self.serial = 0

    @rule(trainer=st.integers(0, 1))
    def acquire(self, trainer: int) -> None:
        self.epoch += 1
        self.epochs[trainer] = self.weights.acquire()
        assert self.epochs[trainer] == self.epoch

    @rule(trainer=st.integers(0, 1), lag=st.sampled_from([0, 0, 0, 1, -1]))
    def commit(self, trainer: int, lag: int) -> None:
        self.serial += 1
        epoch, parent = self.epochs[trainer], len(self.contents) - lag
        allowed = epoch == self.epoch > 0 and lag == 0
        try:
            self.weights.commit(epoch, parent, _bytes(self.serial), _trainer(self.serial), lineage)
        except FencedOff:
            assert not allowed
        else:
            assert allowed
            self.contents.append(self.serial)

    @rule(trainer=st.integers(0, 1), behind=st.integers(0, 2))
    def snapshot(self, trainer: int, behind: int) -> None:
        version = len(self.contents) - behind
        oldest = min(self.snapshots, default=0)
        has = version > oldest or version == len(self.contents) > 0
        allowed = self.epochs[trainer] == self.epoch > 0 and version > 0 and has
        try:
            self.weights.write_snapshot(self.epochs[trainer], version, _bytes(1000 + version), b"")
        except FencedOff:
            assert not allowed
        else:
            assert allowed
            self.snapshots = sorted({*self.snapshots, version})[-self.settings.snapshots_retained :]

    @rule(count=st.integers(1, 4))
    def follow(self, count: int) -> None:
        try:
            deltas = self.weights.read_after(self.reader, count=count)
        except CorruptWeights:
            assert self.reader < min(self.snapshots)
            snapshot = self.weights.load_snapshot()
            assert snapshot is not None
            self.reader = snapshot.record.version
            return
        got = [encode(delta.payload) for delta in deltas]
        assert got == [_bytes(serial) for serial in self.contents[self.reader : self.reader + count]]
        self.reader += len(deltas)

    @rule()
    def load(self) -> None:
        snapshot = self.weights.load_snapshot()
        assert (snapshot is None) == (not self.snapshots)
        if snapshot is not None:
            assert snapshot.record.version == max(self.snapshots)
            assert encode(snapshot.payload) == _bytes(1000 + snapshot.record.version)

    @invariant()
    def stands_as_the_model_says(self) -> None:
        if not hasattr(self, "weights"):
            return
        head = self.weights.head()
        assert (head.version if head else 0) == len(self.contents)
        oldest = min(self.snapshots, default=0)
        kept = list(range(len(self.contents), oldest, -1))
        assert [record.version for record in self.weights.versions(100)] == kept
        assert self.weights.snapshot_versions() == self.snapshots[::-1]


def test_store_follows_its_model(store: redis.Redis, settings: Settings) -> None:
    StoreMachine.client, StoreMachine.base = store, settings
    run_state_machine_as_test(
        StoreMachine,
        settings=hypothesis_settings(
            max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
