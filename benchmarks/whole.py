"""Whole: check that every answer is computed from one whole version, while versions change as fast as they can.

A few contents of the weights are made up, different in every tensor, and what each answers is computed beforehand.
Versions with these contents in turn are committed to a real store while threads ask a scorer in this process, and
clients one or several server processes over gRPC; several share one copy of the weights. An answer that is not the one
of the version it names is torn; a version lower than the one before on the same connection goes backwards. First the
check itself is tried: mixtures of two contents, tensor by tensor, must not pass. Prints one JSON object; exit code 1 if
anything is torn or goes backwards.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from faults import SMALL, free_port
from killable import Store
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from recsys import Client, Feedback
from recsys.catalog import Catalog, CatalogMirror
from recsys.cli.system import environment_of
from recsys.errors import RecsysError
from recsys.feedback_log import FeedbackLog
from recsys.follower import Follower
from recsys.metrics import ServerMetrics
from recsys.scorer import Answer, Query, Scorer
from recsys.server import SWITCH_SECONDS
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.v1.log_pb2 import HistoryEntry
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights import Lineage, WeightPayload, WeightStore, encode
from recsys.weights.replica import Replica

CPU = torch.device("cpu")
# A prime, so that neighbours differ however many versions are skipped between two answers.
CONTENTS = 7
ITEMS = [f"item-{number}" for number in range(24)]
USERS, HISTORY, CONTEXT = 6, 5, {"page": "home"}
IN_PROCESS_THREADS, CONNECTIONS = 2, 6
SNAPSHOT_EVERY = 500
# The publisher waits for the scorer when it is this far ahead: what nobody serves tears nothing.
FARTHEST_AHEAD = 32
LARGEST_CLOCK = 10_000
# Tells how likely an answer was, and never which it is.
TEMPERATURE = "mix.log_temperature"
UNCERTAIN = 0.2
# Scores over gRPC come from batches of any size, whose sums are rounded differently; contents differ by far more.
TOLERANCE = 1e-3
CALL_SECONDS = 10.0
# Far longer than it takes on a machine with nothing else to do.
START_SECONDS = 300.0
PAUSE_SECONDS, PROGRESS_SECONDS = 0.001, 0.2
DAY_MS = 86_400_000

Seen = dict[str, float]


@dataclass
class Count:
    """Count answers; each thread has its own."""

    answers: int = 0
    torn: int = 0
    backwards: int = 0
    last: int = 0
    versions: set[int] = field(default_factory=set)

    def note(self, version: int, whole: bool) -> None:
        """Count one answer."""
        self.answers += 1
        self.torn += not whole
        self.backwards += version < self.last
        self.last = version
        self.versions.add(version)


def content(settings: Settings, seed: int) -> WeightPayload:
    """Make up all of a version, every number at random."""
    replica = Replica(settings, CPU)
    generator = torch.Generator().manual_seed(seed)
    table = replica.table
    table.allocate(ITEMS)
    table.clock = LARGEST_CLOCK + seed
    for name, column in table.columns.items():
        used = column[: table.rows]
        if name in ("successor", "touched", "first"):
            highest = table.rows if name == "successor" else LARGEST_CLOCK
            used.copy_(torch.randint(highest, used.shape, generator=generator))
        else:
            used.copy_(torch.rand(used.shape, generator=generator) + (0.0 if name == "vector" else 1.0))
    for name, tensor in replica.network.state_dict().items():
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            # Of a class head that is certain, no bias would be seen.
            if name.startswith(("rank.", "rates.weigh.")):
                tensor.mul_(UNCERTAIN)
    # A count is not negative.
    replica.network.rates.class_counts.abs_()
    replica.network.rates.context_counts.abs_()
    return replica.write_all()


def histories() -> dict[str, list[HistoryEntry]]:
    """Make up what users did; in the future, so that the time since then stays 0."""
    draw, when = random.Random(1), time.time_ns() // 1_000_000 + DAY_MS
    return {
        f"user-{user}": [
            HistoryEntry(item_id=draw.choice(ITEMS), feedback_class="click", time_ms=when)
            for _ in range(user and HISTORY)
        ]
        for user in range(USERS)
    }


def queries(users: dict[str, list[HistoryEntry]]) -> list[Query]:
    """Ask for all items, and for the scores of all items, for each user."""
    asked = [Query(history, count=len(ITEMS), allow_seen=True, context=CONTEXT) for history in users.values()]
    return asked + [Query(history, candidates=ITEMS, context=CONTEXT) for history in users.values()]


def seen(answer: Answer) -> Seen:
    """Return what an answer shows: each item's score."""
    return {item.item_id: item.score for item in answer.items}


def close(one: Seen, other: Seen) -> bool:
    """Tell whether two answers differ by rounding alone."""
    return one.keys() == other.keys() and all(
        math.isclose(score, other[item_id], rel_tol=TOLERANCE, abs_tol=TOLERANCE) for item_id, score in one.items()
    )


def answers_of(settings: Settings, payload: WeightPayload, asked: Sequence[Query]) -> list[Seen]:
    """Answer from one content, put in place as a whole."""
    scorer = Scorer(settings, CatalogMirror(Catalog(connect(settings), settings)), CPU)
    scorer.load(VersionRecord(version=1), payload)
    return [seen(answer) for answer in scorer.answer(asked)]


def unseen(settings: Settings, contents: Sequence[WeightPayload], asked: Sequence[Query]) -> list[str]:
    """Name the tensors that could be another version's without any answer showing it."""
    one, other = contents[:2]
    expected = answers_of(settings, one, asked)
    mixtures = {name: replace(one, dense={**one.dense, name: tensor}) for name, tensor in other.dense.items()}
    mixtures |= {name: replace(one, columns={**one.columns, name: column}) for name, column in other.columns.items()}
    return [
        name
        for name, mixture in mixtures.items()
        if name != TEMPERATURE and all(map(close, expected, answers_of(settings, mixture, asked)))
    ]


class Publisher(threading.Thread):
    """Commit the contents in turn, version after version; `last` is the newest."""

    def __init__(self, settings: Settings, contents: Sequence[WeightPayload], scorer: Scorer) -> None:
        super().__init__(daemon=True)
        self._settings, self._scorer = settings, scorer
        self._whole = [encode(each) for each in contents]
        self._changes = [encode(replace(each, whole=False, new_items=[])) for each in contents]
        self.over = threading.Event()
        self.last = 0

    def run(self) -> None:
        """Publish until `over`."""
        with connect(self._settings) as client:
            store = WeightStore(client, self._settings)
            epoch = store.acquire()
            while not self.over.is_set():
                if self.last > self._scorer.version + FARTHEST_AHEAD:
                    time.sleep(PAUSE_SECONDS)
                    continue
                version = self.last + 1
                payload = (self._changes if self.last else self._whole)[version % CONTENTS]
                store.commit(epoch, self.last, payload, b"", lineage(version))
                self.last = version
                if version % SNAPSHOT_EVERY == 1:
                    store.write_snapshot(epoch, version, self._whole[version % CONTENTS], b"")


def lineage(version: int) -> Lineage:
    """Describe a made-up version."""
    return Lineage(
        position=f"{version}-0",
        feedback_learned=version,
        feedback_added=1,
        settings_digest="",
        metrics={},
        accepted_ms=[],
        committed_ms=time.time_ns() // 1_000_000,
    )


@contextmanager
def following(settings: Settings) -> Iterator[Scorer]:
    """Run a scorer that follows the store in this process."""
    mirror = CatalogMirror(Catalog(connect(settings), settings))
    scorer = Scorer(settings, mirror, CPU)
    follower = Follower(settings, scorer, mirror, ServerMetrics(CollectorRegistry()))
    follower.start()
    try:
        yield scorer
    finally:
        follower.stop()


class Whole:
    """Ask, in this process and over gRPC, until there are enough answers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._users = histories()
        self._queries = queries(self._users)
        self._contents = [content(settings, seed) for seed in range(CONTENTS)]
        self._expected = [answers_of(settings, each, self._queries) for each in self._contents]
        self.unseen = unseen(settings, self._contents, self._queries)
        self._over = threading.Event()
        self.in_process = [Count() for _ in range(IN_PROCESS_THREADS)]
        self.over_grpc = [Count() for _ in range(CONNECTIONS)]

    def run(self, answers: int, over_grpc: int, progress: Callable[[int], None]) -> int:
        """Ask until `answers` are checked, `over_grpc` of them over gRPC; return how many versions were published."""
        with connect(self._settings) as client:
            log = FeedbackLog(client, self._settings)
            for user_id, history in self._users.items():
                log.append([Feedback(user_id, each.item_id, each.feedback_class, each.time_ms) for each in history])
        with following(self._settings) as scorer:
            publisher = Publisher(self._settings, self._contents, scorer)
            threads: list[threading.Thread] = [publisher]
            threads += [threading.Thread(target=self._ask, args=(scorer, each)) for each in self.in_process]
            threads += [
                threading.Thread(target=self._call, args=(each, seed)) for seed, each in enumerate(self.over_grpc)
            ]
            for thread in threads:
                thread.start()
            while not self._enough(answers, over_grpc) and all(thread.is_alive() for thread in threads):
                time.sleep(PROGRESS_SECONDS)
                progress(min(answers, sum(each.answers for each in (*self.in_process, *self.over_grpc))))
            self._over.set()
            for thread in threads[1:]:
                thread.join()
            publisher.over.set()
            publisher.join()
        if not self._enough(answers, over_grpc):
            raise SystemExit("a thread ended too soon")
        return publisher.last

    def _enough(self, answers: int, over_grpc: int) -> bool:
        called = sum(each.answers for each in self.over_grpc)
        return called >= over_grpc and called + sum(each.answers for each in self.in_process) >= answers

    def _ask(self, scorer: Scorer, counted: Count) -> None:
        """Ask the scorer of this process; batches are those that `expected` comes from, and must be equal to it."""
        # Else a thread's first product takes as many threads as there are cores, and its last bits may be others.
        torch.set_num_threads(1)
        while not self._over.is_set():
            if not scorer.version:
                time.sleep(PAUSE_SECONDS)
                continue
            answers = scorer.answer(self._queries)
            for number, answer in enumerate(answers):
                expected = self._expected[answer.version % CONTENTS][number]
                counted.note(answer.version, seen(answer) == expected and answer.version == answers[0].version)

    def _call(self, counted: Count, seed: int) -> None:
        """Call the server over a connection."""
        draw = random.Random(seed)
        deadline = time.monotonic() + START_SECONDS
        with Client(f"127.0.0.1:{self._settings.port}", timeout=CALL_SECONDS) as client:
            while not self._over.is_set():
                number = draw.randrange(len(self._queries))
                user_id = f"user-{number % USERS}"
                try:
                    answer = (
                        client.recommend(user_id, len(ITEMS), allow_seen=True, context=CONTEXT)
                        if number < USERS
                        else client.score(user_id, ITEMS, context=CONTEXT)
                    )
                except RecsysError:
                    if counted.answers or time.monotonic() > deadline:
                        raise
                    continue
                given = {item.item_id: item.score for item in answer.items}
                counted.note(answer.version, close(given, self._expected[answer.version % CONTENTS][number]))


@contextmanager
def serving(settings: Settings) -> Iterator[None]:
    """Run a server of one or several processes."""
    with subprocess.Popen(
        [sys.executable, "-m", "recsys", "serve"], env=environment_of(settings), stdout=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.terminate()


def measure(arguments: argparse.Namespace, directory: Path, progress: Callable[[int], None]) -> dict[str, object]:
    """Check `arguments.answers` answers."""
    torch.set_num_threads(1)
    # As in a server.
    sys.setswitchinterval(SWITCH_SECONDS)
    with Store(directory) as store:
        made_up = {"redis_url": store.url, "port": free_port(), "metrics_port": 0, **SMALL}
        settings = load(made_up | {"server_processes": arguments.processes}, environment={})
        with connect(settings) as client:
            # Nothing here depends on what a crash leaves.
            client.config_set("appendfsync", "no")
        started = time.monotonic()
        whole = Whole(settings)
        with serving(settings):
            published = whole.run(arguments.answers, arguments.over_grpc, progress)
    counts = [*whole.in_process, *whole.over_grpc]
    return {
        "processes": arguments.processes,
        "answers": sum(each.answers for each in counts),
        "over_grpc": sum(each.answers for each in whole.over_grpc),
        "torn": sum(each.torn for each in counts),
        "backwards": sum(each.backwards for each in counts),
        "versions": published,
        "versions_answered_from": len(set[int]().union(*(each.versions for each in counts))),
        "unseen_tensors": whole.unseen,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    """Parse the command line, run, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--over-grpc", type=int, default=10_000, help="answers over gRPC, at least")
    parser.add_argument("--processes", type=int, default=1, help="server processes")
    parser.add_argument("--json", action="store_true", help="print the result on one line")
    arguments = parser.parse_args()
    columns = TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar, tempfile.TemporaryDirectory() as directory:
        task = bar.add_task("answers", total=arguments.answers)
        found = measure(arguments, Path(directory), lambda done: bar.update(task, completed=done))
    print(json.dumps(found, indent=None if arguments.json else 2))
    return 1 if found["torn"] or found["backwards"] or found["unseen_tensors"] else 0


if __name__ == "__main__":
    sys.exit(main())
