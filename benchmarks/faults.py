"""Faults: SIGKILL trainer, server and store over and over, and count what was lost, repeated, torn or went back.

Real processes over a Valkey with appendfsync always, so that what it acknowledges it has on disk. A round kills them at
random instants while clients log feedback over gRPC, repeating whatever was not acknowledged, and ask for
recommendations. A sweep kills a trainer at every one of its messages to the store: before it, half-way, and after it.

Afterwards each acknowledged feedback must stand in the log once, with the history that it was given in; an
uninterrupted trainer over a copy of the log must come to the same weights, bit for bit; and each answer must be the one
that the uninterrupted trainer's version of the same number gives. Ends with one JSON object; exit code 1 if any of this
does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import redis
import torch
from killable import MOMENTS, Point, Store, Template, learn_all
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from recsys import Client, Feedback
from recsys.catalog import Catalog, CatalogMirror
from recsys.client import Recommendations
from recsys.errors import RecsysError
from recsys.feedback_log import BEGINNING, FeedbackLog, LogEntry
from recsys.scorer import Query, Scorer
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.v1.log_pb2 import HistoryEntry
from recsys.weights import VersionRecord, WeightStore, encode
from recsys.weights.replica import Replica

# A cycle of reading, learning and publishing takes milliseconds with these.
SMALL: dict[str, Any] = {
    **{"dimension": 8, "history_length": 8, "heads": 2, "successors": 4, "context_buckets": 8, "max_context": 2},
    **{"batch_size": 4, "replay_size": 8, "negatives": 8, "device": "cpu", "metrics_port": 0},
    **{"trainer_metrics_port": 0},
}
# What differs between rounds: how often the log is trimmed and how far back a restart has to read.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"snapshot_every_bytes": 1 << 16, "snapshots_retained": 1, "replay_capacity": 64, "batches_per_version": 1},
    {"snapshot_every_bytes": 1 << 18, "snapshots_retained": 3, "replay_capacity": 512, "batches_per_version": 2},
    {"snapshot_every_bytes": 1 << 26, "snapshots_retained": 2, "replay_capacity": 4096, "batches_per_version": 3},
)
NEVER_BYTES = 1 << 60
KINDS = {"trainer": 0.6, "server": 0.25, "store": 0.15}
KILLS_PER_ROUND = 50
# Of all kills, those at numbered messages.
SWEPT = 0.3
SWEEP_FEEDBACK = 22
# Between two kills: log-uniform, so that some strike a process that has just begun and some one at work.
SHORTEST_SECONDS, LONGEST_SECONDS = 0.002, 0.8
PUBLISH_SECONDS = 0.05
USERS, ITEMS, CLASSES = 9, 40, ("impression", "click", "click", "like", "purchase")
PER_CALL = 6
WRITERS = 2
WRITE_PAUSE_SECONDS, READ_PAUSE_SECONDS, RETRY_SECONDS = 0.05, 0.01, 0.02
# How often a client sends again what was acknowledged, as one that lost the answer would.
REPEATED = 0.1
CALL_SECONDS = 2.0
SETTLE_SECONDS = 120.0
# A user without a history: the answer depends on the weights alone.
NOBODY, ANSWER_ITEMS = "nobody", 20
TAIL_COUNT = 1000

Shown = tuple[tuple[str, float], ...]


@dataclass
class Found:
    """Count what was done and what went wrong."""

    kills: int = 0
    bitwise_equal: bool = True
    # Acknowledged feedback that is not in the log, or was not learned.
    lost: int = 0
    # Feedback that is in the log twice, or was learned twice.
    duplicated: int = 0
    # Records whose history is not what the user did before.
    wrong_histories: int = 0
    answers: int = 0
    # Answers that are not the whole of one version.
    torn: int = 0
    # Answers from an earlier version than the same server process had given before.
    backwards: int = 0
    # Answers of a restarted server from an earlier version than the one before it had given.
    behind_after_restart: int = 0
    # Processes that ended without being killed.
    ended_by_themselves: int = 0
    feedback: int = 0
    resent: int = 0
    versions: int = 0
    runs_compared: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def killed(self, kind: str) -> None:
        """Count one kill."""
        self.kills += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    @property
    def right(self) -> bool:
        """Return whether everything held."""
        wrong = self.lost, self.duplicated, self.wrong_histories, self.torn, self.backwards, self.ended_by_themselves
        return self.bitwise_equal and not any(wrong)


def base_settings(url: str, seed: int) -> Settings:
    """Make the settings of the smallest system."""
    given = {"redis_url": url, "port": free_port(), "publish_seconds": PUBLISH_SECONDS, "seed": seed, **SMALL}
    return load(given, environment={})


def free_port() -> int:
    """Find a port to serve on: clients must find a restarted server where the last one was."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def make_feedback(draw: random.Random, feedback_id: str) -> Feedback:
    """Make up one feedback; some have a context."""
    context = {"page": draw.choice("ab")} if draw.random() < 0.3 else {}
    user_id, item_id = f"user-{draw.randrange(USERS)}", f"item-{draw.randrange(ITEMS)}"
    return Feedback(user_id, item_id, draw.choice(CLASSES), feedback_id=feedback_id, context=context)


class Tail(threading.Thread):
    """Copy the log while it is written: what is learned is trimmed sooner or later."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self._settings = settings
        self._over = threading.Event()
        self.entries: list[tuple[LogEntry, dict[bytes, bytes]]] = []

    def run(self) -> None:
        """Read until `finish`, through kills of the store."""
        position = BEGINNING
        key = f"{self._settings.key_prefix}:{{log}}:records"
        with connect(self._settings) as client:
            log = FeedbackLog(client, self._settings)
            while True:
                last = self._over.is_set()
                try:
                    found = log.read_after(position, TAIL_COUNT, 0 if last else CALL_SECONDS / 4)
                    raw: Any = client.xrange(key, found[0].position, found[-1].position) if found else []
                except (RecsysError, redis.exceptions.RedisError):
                    time.sleep(RETRY_SECONDS)
                    continue
                if len(raw) == len(found):
                    self.entries += [(entry, fields) for entry, (_, fields) in zip(found, raw, strict=True)]
                    position = found[-1].position if found else position
                if last and not found:
                    return

    def finish(self) -> None:
        """Read what is left and stop."""
        self._over.set()
        self.join()


class Writer(threading.Thread):
    """Log feedback over gRPC, the same again and again until it is acknowledged, and now and then once more."""

    def __init__(self, settings: Settings, name: str, seed: int) -> None:
        super().__init__(daemon=True)
        self._settings, self._name, self._draw = settings, name, random.Random(f"{name}-{seed}")
        self.over = threading.Event()
        self.acknowledged: list[str] = []
        self.resent = self.wrong_answers = 0

    def run(self) -> None:
        """Write until `over`; what was begun is acknowledged then."""
        ids = count()
        with Client(f"127.0.0.1:{self._settings.port}", timeout=CALL_SECONDS) as client:
            while not self.over.wait(self._draw.uniform(0, 2 * WRITE_PAUSE_SECONDS)):
                names = [f"{self._name}-{next(ids)}" for _ in range(self._draw.randint(1, PER_CALL))]
                self._write(client, [make_feedback(self._draw, name) for name in names])
                self.acknowledged += names

    def _write(self, client: Client, batch: Sequence[Feedback]) -> None:
        again, repeated = True, False
        while again:
            try:
                results = client.log_feedback(batch)
            except RecsysError:
                self.resent += len(batch)
                time.sleep(RETRY_SECONDS)
                continue
            # A batch counts as a whole or not at all; what was acknowledged is a duplicate from then on.
            self.wrong_answers += len({each.duplicate for each in results}) != 1
            self.wrong_answers += sum(not each.accepted or (repeated and not each.duplicate) for each in results)
            again = repeated = not repeated and self._draw.random() < REPEATED


class Reader(threading.Thread):
    """Ask for the same recommendations over and over; `lives` counts the server's, from `killed`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self._settings = settings
        self.over = threading.Event()
        self.lives = 0
        self.seen: dict[int, Counter[Shown]] = {}
        self.answers = self.backwards = self.behind = 0

    def run(self) -> None:
        """Ask until `over`."""
        newest: Counter[int] = Counter()
        with Client(f"127.0.0.1:{self._settings.port}", timeout=CALL_SECONDS) as client:
            while not self.over.wait(READ_PAUSE_SECONDS):
                life = self.lives
                try:
                    answer = client.recommend(NOBODY, ANSWER_ITEMS)
                except RecsysError:
                    continue
                self.answers += 1
                self.seen.setdefault(answer.version, Counter())[shown(answer)] += 1
                if life == self.lives:
                    self.behind += newest[life] == 0 and answer.version < max(newest.values(), default=0)
                    self.backwards += answer.version < newest[life]
                    newest[life] = max(newest[life], answer.version)


def shown(answer: Recommendations) -> Shown:
    """Return the items of an answer with their scores."""
    return tuple((item.item_id, item.score) for item in answer.items)


class Round:
    """Run the system over an empty store and kill its parts at random instants."""

    def __init__(self, store: Store, templates: dict[str, Template], settings: Settings, found: Found) -> None:
        self._store, self._templates, self._settings, self._found = store, templates, settings, found
        self._pids: dict[str, int] = {}

    def run(self, kills: int, draw: random.Random, progress: Callable[[], None]) -> None:
        """Kill `kills` times, let what is left be learned, and check."""
        found, settings = self._found, self._settings
        for part in self._templates:
            self._start(part)
        tail, reader = Tail(settings), Reader(settings)
        writers = [Writer(settings, f"{settings.key_prefix}-{number}", settings.seed) for number in range(WRITERS)]
        for thread in (tail, reader, *writers):
            thread.start()
        for _ in range(kills):
            time.sleep(math.exp(draw.uniform(math.log(SHORTEST_SECONDS), math.log(LONGEST_SECONDS))))
            (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
            self._kill(kind, reader)
            found.killed(kind)
            progress()
        for writer in writers:
            writer.over.set()
        for writer in writers:
            writer.join()
        acknowledged = [name for writer in writers for name in writer.acknowledged]
        settled = self._settle(len(acknowledged))
        reader.over.set()
        reader.join()
        self._stop()
        tail.finish()
        found.feedback += len(acknowledged)
        found.resent += sum(writer.resent for writer in writers)
        found.duplicated += sum(writer.wrong_answers for writer in writers)
        check_log(acknowledged, [entry for entry, _ in tail.entries], settings, found)
        self._check_learned(len(acknowledged), settled)
        self._check_weights(tail)
        found.answers += reader.answers
        found.backwards += reader.backwards
        found.behind_after_restart += reader.behind
        found.torn += torn(reader.seen, reference_of(settings))

    def _start(self, part: str) -> None:
        self._pids[part] = self._templates[part].start(part, self._settings)

    def _kill(self, kind: str, reader: Reader) -> None:
        if kind == "store":
            self._store.kill()
            self._store.start()
            return
        if kind == "server":
            reader.lives += 1
        template, pid = self._templates[kind], self._pids[kind]
        self._found.ended_by_themselves += not template.alive(pid)
        template.end(pid)
        self._start(kind)

    def _settle(self, feedback: int) -> bool:
        """Wait until all feedback is learned."""
        deadline = time.monotonic() + SETTLE_SECONDS
        with connect(self._settings) as client:
            weights = WeightStore(client, self._settings)
            while time.monotonic() < deadline:
                head = weights.head()
                if head is not None and head.feedback_learned >= feedback:
                    return True
                time.sleep(RETRY_SECONDS)
        return False

    def _stop(self) -> None:
        for part, template in self._templates.items():
            self._found.ended_by_themselves += template.end(self._pids[part], signal.SIGTERM) != 0

    def _check_learned(self, feedback: int, settled: bool) -> None:
        record, _ = final(self._settings)
        self._found.versions += record.version
        self._found.lost += max(0, feedback - record.feedback_learned)
        self._found.duplicated += max(0, record.feedback_learned - feedback)
        assert settled or record.feedback_learned < feedback

    def _check_weights(self, tail: Tail) -> None:
        reference = reference_of(self._settings)
        copy_log([(entry.position, fields) for entry, fields in tail.entries], reference)
        learn_all(reference)
        self._found.runs_compared += 1
        self._found.bitwise_equal &= same(self._settings, reference)


def reference_of(settings: Settings) -> Settings:
    """Return the settings of an uninterrupted trainer that keeps every version."""
    return settings.model_copy(
        update={"key_prefix": f"{settings.key_prefix}-reference", "snapshot_every_bytes": NEVER_BYTES}
    )


def copy_log(entries: Sequence[tuple[str, dict[bytes, bytes]]], settings: Settings) -> None:
    """Write a copy of a log, position by position."""
    with connect(settings) as client, client.pipeline(transaction=False) as pipeline:
        for position, fields in entries:
            pipeline.xadd(f"{settings.key_prefix}:{{log}}:records", fields, id=position)  # type: ignore[arg-type]
        pipeline.execute()


def check_log(acknowledged: Sequence[str], entries: Sequence[LogEntry], settings: Settings, found: Found) -> None:
    """Count what is missing from the log or stands in it twice, and histories other than what users did before."""
    counted: Counter[str] = Counter()
    histories: dict[str, list[HistoryEntry]] = {}
    remembered = {each.name for each in settings.classes if each.history}
    for entry in entries:
        record = entry.record
        if record is None:
            continue
        counted[record.feedback_id] += 1
        history = histories.setdefault(record.user_id, [])
        found.wrong_histories += list(record.history) != history[-settings.history_length :]
        if record.feedback_class in remembered:
            done = HistoryEntry(
                item_id=record.item_id, feedback_class=record.feedback_class, time_ms=record.time_ms
            )
            history.append(done)
    found.lost += sum(not counted[name] for name in acknowledged)
    found.duplicated += sum(number - 1 for number in counted.values())


def final(settings: Settings) -> tuple[VersionRecord, bytes]:
    """Read the last version as a server does: its record, and all of its weights as bytes."""
    replica = Replica(settings, torch.device("cpu"))
    record = VersionRecord()
    with connect(settings) as client:
        weights = WeightStore(client, settings)
        if snapshot := weights.load_snapshot():
            replica.apply(snapshot.payload)
            record = snapshot.record
        while deltas := weights.read_after(record.version, chain=record.chain or None):
            for delta in deltas:
                replica.apply(delta.payload)
                record = delta.record
    return record, encode(replica.write_all())


def same(one: Settings, other: Settings) -> bool:
    """Tell whether two trainers came to the same version, weights, optimizer state and all that led there."""
    (record, weights), (expected, expected_weights) = final(one), final(other)
    return weights == expected_weights and (
        (record.version, record.chain, record.position, record.feedback_learned)
        == (expected.version, expected.chain, expected.position, expected.feedback_learned)
    )


def torn(seen: dict[int, Counter[Shown]], reference: Settings) -> int:
    """Count answers that differ from the one that the reference's version of that number gives."""
    wrong = 0
    query = Query(history=(), count=ANSWER_ITEMS)

    def check(version: int) -> int:
        given = seen.pop(version, None)
        if given is None:
            return 0
        expected = tuple((item.item_id, item.score) for item in scorer.answer([query])[0].items)
        return sum(number for answer, number in given.items() if answer != expected)

    with connect(reference) as client:
        scorer = Scorer(reference, CatalogMirror(Catalog(client, reference)), torch.device("cpu"))
        weights = WeightStore(client, reference)
        snapshot = weights.load_snapshot()
        assert snapshot is not None
        scorer.load(snapshot.record, snapshot.payload, 0)
        wrong += check(snapshot.record.version)
        while deltas := weights.read_after(scorer.version):
            for delta in deltas:
                scorer.apply(delta.record, delta.payload, 0)
                wrong += check(delta.record.version)
    # Versions that never were.
    return wrong + sum(sum(given.values()) for given in seen.values())


class Sweep:
    """Kill a trainer at its messages one by one; each time over a copy of the same log, which another one finishes."""

    def __init__(self, template: Template, settings: Settings, draw: random.Random, found: Found) -> None:
        self._template, self._settings, self._draw, self._found = template, settings, draw, found

    def run(self, kills: int, progress: Callable[[], None]) -> int:
        """Kill at most `kills` times; return how often there was a message to be killed at."""
        settings, done = self._settings, 0
        with connect(settings) as client:
            log = FeedbackLog(client, settings)
            log.append([make_feedback(self._draw, f"{settings.key_prefix}-{n}") for n in range(SWEEP_FEEDBACK)])
            log.tick()
            entries: Any = client.xrange(f"{settings.key_prefix}:{{log}}:records")
            entries = [(position.decode(), fields) for position, fields in entries]
        reference = reference_of(settings)
        copy_log(entries, reference)
        learn_all(reference)
        for number in count(1):
            for moment in MOMENTS:
                if done == kills:
                    return done
                if not self._kill_at(Point(number, moment), entries, reference):
                    return done
                done += 1
                progress()
        raise AssertionError

    def _kill_at(self, point: Point, entries: Sequence[tuple[str, dict[bytes, bytes]]], reference: Settings) -> bool:
        """Kill at one point and compare; False when the trainer is done before it."""
        found = self._found
        prefix = f"{self._settings.key_prefix}-{point.number}-{point.moment}"
        settings = self._settings.model_copy(update={"key_prefix": prefix})
        copy_log(entries, settings)
        code = self._template.wait(self._template.start("through", settings, point))
        if code == 0:
            return False
        found.killed(f"trainer {point.moment} a message")
        found.ended_by_themselves += code > 0
        found.ended_by_themselves += self._template.wait(self._template.start("through", settings)) != 0
        found.runs_compared += 1
        record, _ = final(settings)
        found.lost += max(0, SWEEP_FEEDBACK - record.feedback_learned)
        found.duplicated += max(0, record.feedback_learned - SWEEP_FEEDBACK)
        found.bitwise_equal &= same(settings, reference)
        return True


def measure(kills: int, seed: int, progress: Callable[[], None], directory: Path) -> Found:
    """Kill `kills` times in sweeps and rounds, and check after each of them."""
    torch.set_num_threads(1)
    found, draw = Found(), random.Random(seed)
    swept = round(SWEPT * kills)
    with (
        Store(directory) as store,
        Template(directory / "trainer.log") as trainers,
        Template(directory / "server.log") as servers,
    ):
        for number in count():
            if found.kills == kills:
                break
            settings = base_settings(store.url, seed + number)
            settings = settings.model_copy(
                update={"key_prefix": f"run-{number}", **VARIANTS[number % len(VARIANTS)]}
            )
            with connect(settings) as client:
                client.flushall()
            if found.kills < swept:
                Sweep(trainers, settings, draw, found).run(swept - found.kills, progress)
            else:
                templates = {"trainer": trainers, "server": servers}
                wanted = min(KILLS_PER_ROUND, kills - found.kills)
                Round(store, templates, settings, found).run(wanted, draw, progress)
            if not found.right:
                report(found, number, seed + number, directory)
    return found


def report(found: Found, number: int, seed: int, directory: Path) -> None:
    """Say on stderr in which part something went wrong, with what the processes said last."""
    print(f"part {number} (seed {seed}): {asdict(found)}", file=sys.stderr)
    for name in ("trainer.log", "server.log"):
        print(f"--- {name}", (directory / name).read_text()[-4000:], sep="\n", file=sys.stderr)


def main() -> int:
    """Parse the command line, run, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of what is killed and when, and of the feedback")
    parser.add_argument("--json", action="store_true", help="print the result on one line")
    arguments = parser.parse_args()
    started = time.monotonic()
    columns = TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar, tempfile.TemporaryDirectory() as directory:
        task: TaskID = bar.add_task("kills", total=arguments.kills)
        found = measure(arguments.kills, arguments.seed, lambda: bar.advance(task), Path(directory))
    result = {**asdict(found), "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(result, indent=None if arguments.json else 2))
    return 0 if found.right else 1


if __name__ == "__main__":
    sys.exit(main())
