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
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from killable import MOMENTS, Point, Store, Template, learn_all
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from uninterrupted import copy_log, final, reference_of, same, torn
from witnesses import Reader, Tail, Writer, make_feedback

from recsys.feedback_log import FeedbackLog, LogEntry
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.v1.log_pb2 import HistoryEntry
from recsys.weights import WeightStore

# A cycle of reading, learning and publishing takes milliseconds with these.
SMALL: dict[str, Any] = {
    **{"dimension": 8, "history_length": 8, "heads": 2, "successors": 4, "context_buckets": 8, "max_context": 2},
    **{"batch_size": 4, "replay_size": 8, "replay_every": 8, "negatives": 8, "device": "cpu", "metrics_port": 0},
    **{"trainer_metrics_port": 0},
}
# What differs between rounds: how often the log is trimmed, how far back a restart has to read, how batches grow.
VARIANTS: tuple[dict[str, Any], ...] = (
    {
        **{"snapshot_every_bytes": 1 << 16, "snapshots_retained": 1, "replay_capacity": 64},
        **{"batches_per_version": 1, "batch_growth": 1},
    },
    {
        **{"snapshot_every_bytes": 1 << 18, "snapshots_retained": 3, "replay_capacity": 512},
        **{"batches_per_version": 2, "batch_growth": 4},
    },
    {
        **{"snapshot_every_bytes": 1 << 26, "snapshots_retained": 2, "replay_capacity": 4096},
        **{"batches_per_version": 3, "batch_growth": 2},
    },
)
KINDS = {"trainer": 0.6, "server": 0.25, "store": 0.15}
KILLS_PER_ROUND = 50
# Of all kills, those at numbered messages.
SWEPT = 0.3
SWEEP_FEEDBACK = 22
# In every other sweep each version has a snapshot.
ALWAYS_BYTES = 1
# Between two kills: log-uniform, so that some strike a process that has just begun and some one at work.
SHORTEST_SECONDS, LONGEST_SECONDS = 0.002, 1.2
PUBLISH_SECONDS = 0.05
WRITERS = 2
SETTLE_SECONDS, POLL_SECONDS = 120.0, 0.02


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
    # Acknowledgements of a part of a batch, or of feedback as new that had been acknowledged before.
    wrong_acknowledgements: int = 0
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

    def learned(self, number: int, feedback: int) -> None:
        """Compare how much a trainer says it has learned with what there was to learn."""
        self.lost += max(0, feedback - number)
        self.duplicated += max(0, number - feedback)

    @property
    def right(self) -> bool:
        """Return whether everything held."""
        wrong = self.lost, self.duplicated, self.wrong_histories, self.wrong_acknowledgements, self.torn, self.backwards
        return self.bitwise_equal and not any(wrong) and not self.ended_by_themselves


def base_settings(url: str, seed: int) -> Settings:
    """Make the settings of the smallest system."""
    given = {"redis_url": url, "port": free_port(), "publish_seconds": PUBLISH_SECONDS, "seed": seed, **SMALL}
    return load(given, environment={})


def free_port() -> int:
    """Find a port to serve on: clients must find a restarted server where the last one was."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


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
        self._settle(len(acknowledged), reader)
        reader.over.set()
        reader.join()
        self._stop()
        tail.finish()
        found.feedback += len(acknowledged)
        found.resent += sum(writer.resent for writer in writers)
        found.wrong_acknowledgements += sum(writer.wrong_answers for writer in writers)
        check_log(acknowledged, [entry for entry, _ in tail.entries], settings, found)
        self._check_learned(len(acknowledged))
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

    def _settle(self, feedback: int, reader: Reader) -> None:
        """Wait until all feedback is learned, and answers come; what is not learned by then is lost."""
        deadline = time.monotonic() + SETTLE_SECONDS
        with connect(self._settings) as client:
            weights = WeightStore(client, self._settings)
            while time.monotonic() < deadline:
                head = weights.head()
                # A server's first start on a machine takes long: it compiles.
                if head is not None and head.feedback_learned >= feedback and reader.answers:
                    return
                time.sleep(POLL_SECONDS)

    def _stop(self) -> None:
        for part, template in self._templates.items():
            self._found.ended_by_themselves += template.end(self._pids[part], signal.SIGTERM) != 0

    def _check_learned(self, feedback: int) -> None:
        record, _ = final(self._settings)
        self._found.versions += record.version
        self._found.learned(record.feedback_learned, feedback)

    def _check_weights(self, tail: Tail) -> None:
        reference = reference_of(self._settings)
        copy_log([(entry.position, fields) for entry, fields in tail.entries], reference)
        learn_all(reference)
        self._found.runs_compared += 1
        self._found.bitwise_equal &= same(self._settings, reference)


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
            done = HistoryEntry(item_id=record.item_id, feedback_class=record.feedback_class, time_ms=record.time_ms)
            history.append(done)
    found.lost += sum(not counted[name] for name in acknowledged)
    found.duplicated += sum(number - 1 for number in counted.values())


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
        found.learned(record.feedback_learned, SWEEP_FEEDBACK)
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
            settings = settings.model_copy(update={"key_prefix": f"run-{number}", **VARIANTS[number % len(VARIANTS)]})
            with connect(settings) as client:
                client.flushall()
            if found.kills < swept:
                if number % 2 == 0:
                    settings = settings.model_copy(update={"snapshot_every_bytes": ALWAYS_BYTES})
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
        task = bar.add_task("kills", total=arguments.kills)
        found = measure(arguments.kills, arguments.seed, lambda: bar.advance(task), Path(directory))
    result = {**asdict(found), "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(result, indent=None if arguments.json else 2))
    return 0 if found.right else 1


if __name__ == "__main__":
    sys.exit(main())
