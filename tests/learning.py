"""A small world to learn in: quick settings, feedback, trainers, and a store that fails on demand."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import hiredis
import pytest
import redis
import torch
from prometheus_client import CollectorRegistry

from recsys.feedback import Feedback
from recsys.feedback_log import FeedbackLog
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import WeightStore, encode
from recsys.weights.replica import Replica
from trainer.daemon import Daemon
from trainer.metrics import TrainerMetrics

CPU = torch.device("cpu")
SMALL = {
    **{"dimension": 8, "history_length": 5, "heads": 2, "successors": 4, "context_buckets": 8, "max_context": 2},
    **{"batch_size": 4, "replay_size": 6, "replay_every": 6, "replay_capacity": 1000, "negatives": 8},
    **{"batches_per_version": 2, "publish_seconds": 1.0, "device": "cpu", "batch_growth": 1},
}
START_MS = 1_700_000_000_000


def small(settings: Settings, **changes: Any) -> Settings:
    """Shrink the network and the batches: a batch is 4 feedback however fast they come, a version 2 batches."""
    return settings.model_copy(update={**SMALL, **changes})


def still() -> float:
    """Be a clock that stands still, so that no tick is ever due."""
    return 0.0


def make_feedback(count: int, seed: int = 1, *, first: int = 0) -> list[Feedback]:
    """Make feedback of all classes by a few users on a few items, some of it with context."""
    draw = random.Random(seed)
    classes = ["impression", "click", "click", "like", "purchase"]
    return [
        Feedback(
            user_id=f"user-{draw.randrange(7)}",
            item_id=f"item-{draw.randrange(25)}",
            feedback_class=draw.choice(classes),
            time_ms=START_MS + 1000 * (first + number),
            context={"page": draw.choice("ab")} if draw.random() < 0.3 else {},
        )
        for number in range(count)
    ]


def append(settings: Settings, feedback: Sequence[Feedback]) -> list[str]:
    """Append feedback; return the positions."""
    with connect(settings) as client:
        return [appended.position for appended in FeedbackLog(client, settings).append(feedback)]


def tick(settings: Settings) -> str:
    """Append a tick; return its position."""
    with connect(settings) as client:
        return FeedbackLog(client, settings).tick()


def fork(settings: Settings, prefix: str) -> Settings:
    """Copy the feedback log, every position and byte of it, to where another trainer learns it from the beginning."""
    other = settings.model_copy(update={"key_prefix": prefix})
    with connect(settings) as client:
        for name in ("records", "stats"):
            client.copy(f"{settings.key_prefix}:{{log}}:{name}", f"{prefix}:{{log}}:{name}", replace=True)
    return other


@contextmanager
def trainer(
    settings: Settings, *, clock: Callable[[], float] = still, registry: CollectorRegistry | None = None
) -> Iterator[Daemon]:
    """Make a daemon that has not started."""
    daemon = Daemon(settings, TrainerMetrics(registry or CollectorRegistry()), CPU, clock)
    try:
        yield daemon
    finally:
        daemon.close()


def learn_all(settings: Settings) -> bytes:
    """Start a trainer, let it go through all of the log, and return the weights that it then holds."""
    with trainer(settings) as daemon:
        daemon.start()
        while daemon.step():
            pass
        return encode(daemon.learner.replica.write_all())


def learn_with_restarts(settings: Settings, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Learn all of the log by a trainer that stops twice behind so many records, within whatever goes on there."""
    monkeypatch.setattr("trainer.daemon.READ_COUNT", count)
    for _ in range(2):
        with trainer(settings) as daemon:
            daemon.start()
            daemon.step()
    learn_all(settings)


def versions(settings: Settings) -> list[tuple[int, bytes, str, int, int]]:
    """List the retained versions but the first, oldest first: version, chain, position, feedback learned and added."""
    with connect(settings) as client:
        records = WeightStore(client, settings).versions(100_000)
    return [
        (r.version, r.chain, r.position, r.feedback_learned, r.feedback_added)
        for r in reversed(records)
        if r.version > 1
    ]


def newest_metrics(settings: Settings) -> dict[str, float]:
    """Return the metrics of the newest version."""
    with connect(settings) as client:
        record = WeightStore(client, settings).head()
    assert record is not None
    return dict(record.metrics)


def head(settings: Settings) -> tuple[int, bytes, str, int]:
    """Return the last version, its chain, position, and feedback learned."""
    with connect(settings) as client:
        record = WeightStore(client, settings).head()
    assert record is not None
    return record.version, record.chain, record.position, record.feedback_learned


def replica(settings: Settings) -> Replica:
    """Read the last version from the store, as a server does."""
    found = Replica(settings, CPU)
    with connect(settings) as client:
        store = WeightStore(client, settings)
        version = 0
        if snapshot := store.load_snapshot():
            found.apply(snapshot.payload)
            version = snapshot.record.version
        while deltas := store.read_after(version):
            for delta in deltas:
                found.apply(delta.payload)
                version = delta.record.version
    return found


def held(settings: Settings) -> bytes:
    """Return the weights of the last version as bytes."""
    return encode(replica(settings).write_all())


# What becomes of a command: it passes, its connection is cut before the store sees it, after the store did it, or in
# the middle of the answer.
PASS, CUT, DONE_AND_CUT, TORN = "pass", "cut", "done and cut", "torn"
HANDSHAKE = {b"CLIENT", b"HELLO", b"SELECT", b"AUTH"}


class Proxy:
    """Stand between clients and a real store and decide, command by command, what becomes of each.

    `fate` is asked with the command and its number, from 1 on; handshakes are not counted. It may be replaced at
    any time, and so may `port`, that of the store.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.port = parts.port
        self.commands: list[bytes] = []
        self.fate: Callable[[int, list[bytes]], str] = lambda number, command: PASS
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = urlunsplit(parts._replace(netloc=f"127.0.0.1:{self._listener.getsockname()[1]}"))
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            for one in self._sockets:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def restart(self, fate: Callable[[int, list[bytes]], str]) -> None:
        """Count from 1 again, with another fate."""
        with self._lock:
            self.commands.clear()
            self.fate = fate

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                store = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                return
            with store:
                for one in (client, store):
                    # Else each of several small answers in a row waits for the other side's acknowledgement.
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._sockets |= {client, store}
                with suppress(OSError):
                    self._relay(client, store)
                with self._lock:
                    self._sockets -= {client, store}

    def _relay(self, client: socket.socket, store: socket.socket) -> None:
        commands = hiredis.Reader()
        while data := client.recv(1 << 16):
            commands.feed(data)
            while (command := commands.gets()) is not False:
                fate = self._fate(command)
                if fate == CUT:
                    return
                store.sendall(_pack(command))
                answer = _read_answer(store)
                if fate == DONE_AND_CUT or not answer:
                    return
                if fate == TORN:
                    client.sendall(answer[: len(answer) // 2])
                    return
                client.sendall(answer)

    def _fate(self, command: list[bytes]) -> str:
        if command[0] in HANDSHAKE:
            return PASS
        with self._lock:
            self.commands.append(command[0])
            return self.fate(len(self.commands), command)


def _pack(command: list[bytes]) -> bytes:
    return b"*%d\r\n" % len(command) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in command)


def _read_answer(store: socket.socket) -> bytes:
    reader, answer = hiredis.Reader(), b""
    while data := store.recv(1 << 16):
        answer += data
        reader.feed(data)
        if reader.gets() is not False:
            return answer
    return b""


def script_sha(client: redis.Redis, name: str) -> bytes:
    """Return what EVALSHA calls a script of the weights by."""
    source = files("recsys.weights").joinpath(name).read_text(encoding="utf-8")
    return str(client.register_script(source).sha).encode()
