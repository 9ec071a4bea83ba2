"""Poison: what served accuracy loses while part of the feedback is adversarial, with the gate and without it.

The learner and the gate run over a file as the trainer runs them, without a store. For a while adversarial feedback is
mixed in: `random` users choosing at random, `promote` many users choosing a few items over and over, `shuffle` real
users with items swapped among them. Accuracy is that of the version being served, on the clean events alone, each
tested before it is learned. Prints one JSON object; with no poison it gives the gate's false holds on a clean stream.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from recsys.feedback import Feedback, to_record
from recsys.feedback_file import BadRow, open_feedback_file
from recsys.feedback_log import LogEntry
from recsys.settings import Settings, load
from recsys.store.v1.log_pb2 import HistoryEntry
from recsys.weights import VersionRecord
from recsys.weights.replica import SERVED_COLUMNS, Replica
from trainer.examples import batches, encode
from trainer.log_learner import LogLearner, Outcome
from trainer.metrics import TrainerMetrics
from trainer.prequential import Prequential
from trainer.quality import MISS

# The part of the stream during which poison is mixed in.
FROM, UNTIL = 0.5, 0.7
PROMOTED_ITEMS = 5
# After the poison, accuracy counts as recovered over this share of the stream.
AFTER = 0.1


def mixed(clean: list[Feedback], kind: str, share: float) -> Iterator[tuple[Feedback, bool]]:
    """Yield the stream with poison in its middle, and whether each feedback is clean."""
    random = np.random.default_rng(7)
    targets = [f"promoted-{n}" for n in range(PROMOTED_ITEMS)]
    owed = 0.0
    known: list[str] = []
    seen: set[str] = set()
    for index, each in enumerate(clean):
        yield each, True
        if each.item_id not in seen:
            seen.add(each.item_id)
            known.append(each.item_id)
        if share == 0.0 or not FROM * len(clean) <= index < UNTIL * len(clean):
            continue
        owed += share / (1 - share)
        while owed >= 1.0:
            owed -= 1.0
            user = f"bot-{random.integers(500)}"
            # Of those seen so far: others would tell of items that are yet to come.
            item = (
                clean[random.integers(index + 1)].item_id if kind == "shuffle" else known[random.integers(len(known))]
            )
            if kind == "promote":
                item = targets[random.integers(PROMOTED_ITEMS)]
            elif kind == "shuffle":
                user = clean[random.integers(index + 1)].user_id
            yield Feedback(user, item, each.feedback_class, each.time_ms), False


class Run:
    """One pass over a stream: learn, gate, and test what is served."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._learning = self._new()
        self._served = Replica(settings, torch.device("cpu"))
        self._take_over(None)
        self._test = Prequential(settings, self._served.network, self._served.table)
        self._good = self._learning.learner.write_all()
        # What was learned, and what the version in the making is made of.
        self._past: deque[LogEntry] = deque(maxlen=settings.replay_capacity)
        self._version: list[LogEntry] = []
        self.held = self.spoiled = self.versions = self.set_aside = 0

    def _new(self) -> LogLearner:
        return LogLearner(self._settings, TrainerMetrics(CollectorRegistry()), torch.device("cpu"))

    def _take_over(self, rows: torch.Tensor | None) -> None:
        own = self._learning.learner.replica
        if rows is None:
            self._served.table.clear()
            rows = torch.arange(own.table.rows)
        self._served.table.allocate(own.table.item_ids[self._served.table.rows :])
        self._served.table.write(rows, {name: own.table.columns[name][rows] for name in SERVED_COLUMNS}, ())
        self._served.table.clock = own.table.clock
        self._served.network.load_state_dict(own.network.state_dict())

    def take(self, entry: LogEntry, number: int) -> None:
        """Learn one entry; publish, hold or go back as the trainer does."""
        learning = self._learning
        self._version.append(entry)
        outcome = learning.take(entry)
        if outcome is Outcome.COMPLETE:
            self.versions += 1
            changed = learning.learner.take_changed()
            self._take_over(changed)
            self._good = learning.learner.write_all()
            self._past.extend(self._version)
            self._version = []
            learning.begin(VersionRecord(version=self.versions, position=entry.position), changed)
        elif outcome is Outcome.HELD:
            self.held += 1
            print(f"held at {number}: {learning.objections[-1]}", file=sys.stderr)
        elif outcome is Outcome.SPOILED:
            self.held, self.spoiled = self.held + 1, self.spoiled + 1
            self.set_aside += learning.consumed
            print(f"set aside at {number}: {learning.objections[-1]}", file=sys.stderr)
            self._learning = self._new()
            self._learning.learner.restore(*self._good)
            events = [event for each in self._past if each.record and (event := self._learning._event(each.record))]
            self._learning.learner.window.add(encode(events, self._settings))
            self._learning.learner.take_changed()
            self._version = []
            self._learning.begin(VersionRecord(version=self.versions, position=entry.position))
            self._take_over(None)

    def ranks(self, entries: list[LogEntry]) -> np.ndarray:
        """Rank the items of clean entries with the version being served."""
        known = [e for e in entries if e.record is not None]
        for entry in known:
            assert entry.record is not None
            self._learning.learner.allocate([*(h.item_id for h in entry.record.history), entry.record.item_id])
        self._served.table.allocate(self._learning.learner.table.item_ids[self._served.table.rows :])
        events = [event for e in known if e.record and (event := self._learning._event(e.record)) is not None]
        with torch.no_grad():
            report, _ = self._test.test(encode(events, self._settings), None, self._served.table.log_trend())
        return report.rank_B


def run(clean: list[Feedback], settings: Settings, kind: str, share: float) -> dict[str, object]:
    """Run over the stream; return accuracy before, during and after the poison."""
    one = Run(settings)
    histories: dict[str, deque[HistoryEntry]] = {}
    hits: list[bool] = []
    # As many as the learner takes at once: each is tested before any of them is learned.
    for batch in batches(enumerate(mixed(clean, kind, share), 1), settings.batch_size):
        entries = []
        for number, (each, _) in batch:
            history = histories.setdefault(each.user_id, deque(maxlen=settings.history_length))
            entries.append(LogEntry(f"{number}-0", number, to_record(each, history), False))
            history.append(HistoryEntry(item_id=each.item_id, feedback_class=each.feedback_class, time_ms=each.time_ms))
        of_clean = [entry for entry, (_, (_, is_clean)) in zip(entries, batch, strict=True) if is_clean]
        if of_clean:
            hits.extend(((rank := one.ranks(of_clean)) > MISS) & (rank <= 10))
        for entry, (number, _) in zip(entries, batch, strict=True):
            one.take(entry, number)
    found = np.array(hits)
    begin, end = int(FROM * len(clean)), int(UNTIL * len(clean))
    recovered = end + int(AFTER * len(clean))
    return {
        "poison": kind if share else "none",
        "share": share,
        "gate": settings.gate,
        "hr_at_10_before": round(float(found[:begin].mean()), 4),
        "hr_at_10_during": round(float(found[begin:end].mean()), 4),
        "hr_at_10_after": round(float(found[end:recovered].mean()), 4),
        "versions": one.versions,
        "held": one.held,
        "set_aside": one.set_aside,
    }


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--events", type=int, default=30_000)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--kinds", nargs="+", default=["random", "promote", "shuffle"])
    parser.add_argument("--gates", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = open_feedback_file(arguments.data)
    clean = [row for row in islice(file, arguments.events) if not isinstance(row, BadRow)]
    results = []
    for gate in arguments.gates:
        settings = load({"classes": file.classes, "gate": bool(gate)}, environment={})
        for kind, share in [("none", 0.0), *((k, s) for k in arguments.kinds for s in arguments.shares)]:
            results.append(run(clean, settings, kind, share))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
