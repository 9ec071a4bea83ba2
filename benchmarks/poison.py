"""Poison: what served accuracy loses while part of the feedback is adversarial, and how soon it is back.

The learner and the gate run over a file as the trainer runs them, without a store. For a while adversarial feedback is
mixed in. Accuracy is that of the version being served, on the clean events alone, each tested before it is learned, and
is compared event by event with a run that met no poison, and with an oracle that learns the clean feedback only, from
the same histories: what the oracle loses no defence can save. Attacks, all of them giving positive feedback:

    random      new accounts choose at random
    promote     new accounts choose five new items over and over
    obscure     new accounts choose five old items that hardly anybody chose
    camouflage  as promote, and every other time what real users chose lately
    shuffle     accounts of real users of all times are taken over and choose what anybody ever chose
    takeover    the same with the accounts and the choices of the last RECENT events

Prints one JSON object. Losses are relative; "at_most" bounds them from above with 95% confidence (from the differences
of blocks of events, as events of one session are alike).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

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
from trainer.examples import batches
from trainer.log_learner import LogLearner, Outcome
from trainer.metrics import TrainerMetrics
from trainer.prequential import Prequential
from trainer.quality import MISS, NO_EVENT

# The part of the stream during which poison is mixed in, and the part after it that is compared as well.
FROM, UNTIL, AFTER = 0.5, 0.7, 0.1
PROMOTED_ITEMS = 5
BOTS = 500
RECENT = 5000
KINDS = ("random", "promote", "obscure", "camouflage", "shuffle", "takeover")
# Events of one block of differences, and of the window in which accuracy is looked at for recovery.
BLOCK = 200
WINDOW = 1000
TOLERATED = 0.05
ONE_SIDED_95 = 1.645

Hits = np.ndarray


@dataclass(frozen=True, slots=True)
class Scenario:
    """Say what is mixed in; `oracle`: it enters the histories, and is not learned."""

    kind: str = "none"
    share: float = 0.0
    seed: int = 0
    oracle: bool = False


class Attack:
    """Make the feedback of one scenario."""

    def __init__(self, scenario: Scenario, clean: list[Feedback], begin: int) -> None:
        self._kind, self._clean = scenario.kind, clean
        self._random = np.random.default_rng(scenario.seed)
        chosen: dict[str, int] = {}
        for each in clean[:begin]:
            chosen[each.item_id] = chosen.get(each.item_id, 0) + 1
        self._known = list(chosen)
        obscure = sorted(chosen, key=lambda item: chosen[item])[:PROMOTED_ITEMS]
        self._promoted = obscure if self._kind == "obscure" else [f"promoted-{n}" for n in range(PROMOTED_ITEMS)]

    def feedback(self, index: int, feedback_class: str) -> Feedback:
        """Make one feedback at the time of the clean one at `index`, from what was seen by then."""
        random, clean = self._random, self._clean
        first = max(0, index - RECENT) if self._kind in ("takeover", "camouflage") else 0
        user, item = f"bot-{random.integers(BOTS)}", self._promoted[random.integers(PROMOTED_ITEMS)]
        if self._kind == "random":
            item = self._known[random.integers(len(self._known))]
        elif self._kind in ("shuffle", "takeover") or (self._kind == "camouflage" and random.random() < 0.5):
            item = clean[random.integers(first, index + 1)].item_id
        if self._kind in ("shuffle", "takeover"):
            user = clean[random.integers(first, index + 1)].user_id
        return Feedback(user, item, feedback_class, clean[index].time_ms)


class Run:
    """One pass over a stream: learn, gate, and test what is served."""

    def __init__(self, clean: list[Feedback], settings: Settings) -> None:
        self._clean, self._settings = clean, settings
        self._positive = {c.name for c in settings.classes if c.positive}
        self._feedback_class = next(c.name for c in settings.classes if c.positive)
        self._learning = self._new()
        self._served = Replica(settings, torch.device("cpu"))
        self._take_over(None)
        self._test = Prequential(settings, self._served.network, self._served.table)
        self._good = self._learning.learner.write_all()
        self._histories: dict[str, deque[HistoryEntry]] = {}
        # What was learned, and what the version in the making is made of.
        self._past: deque[LogEntry] = deque(maxlen=settings.replay_capacity)
        self._version: list[LogEntry] = []
        self._number = 0
        self.held = self.versions = self.set_aside = 0

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

    def run(self, scenario: Scenario, begin: int, end: int) -> Hits:
        """Take the clean events from `begin` to `end` with the poison among them; return for each 1 hit, 0 miss, NaN
        where it is no event."""
        found = np.full(end - begin, np.nan)
        for batch in batches(self._mixed(scenario, begin, end), self._settings.batch_size):
            entries = [(index, self._entry(each)) for index, each in batch]
            clean = [(index, entry) for index, entry in entries if index is not None]
            if clean:
                ranks = self._ranks([entry for _, entry in clean])
                hits = np.where(ranks == NO_EVENT, np.nan, (ranks > MISS) & (ranks <= 10))
                found[[index - begin for index, _ in clean]] = hits
            for index, entry in entries:
                if index is not None or not scenario.oracle:
                    self._take(entry)
        return found

    def _mixed(self, scenario: Scenario, begin: int, end: int) -> Iterator[tuple[int | None, Feedback]]:
        """Yield clean feedback with its index and, as long as the attack lasts, poison with None."""
        attack, owed = Attack(scenario, self._clean, begin), 0.0
        until = int(UNTIL * len(self._clean))
        for index in range(begin, end):
            each = self._clean[index]
            if each.feedback_class in self._positive:
                self._feedback_class = each.feedback_class
            yield index, each
            if scenario.share and index < until:
                owed += scenario.share / (1 - scenario.share)
                while owed >= 1.0:
                    owed -= 1.0
                    yield None, attack.feedback(index, self._feedback_class)

    def _entry(self, each: Feedback) -> LogEntry:
        self._number += 1
        history = self._histories.setdefault(each.user_id, deque(maxlen=self._settings.history_length))
        # A second apart, so that batches are of usual size.
        entry = LogEntry(f"{self._number}-0", 1000 * self._number, to_record(each, history), False)
        if any(c.history for c in self._settings.classes if c.name == each.feedback_class):
            history.append(HistoryEntry(item_id=each.item_id, feedback_class=each.feedback_class, time_ms=each.time_ms))
        return entry

    def _take(self, entry: LogEntry) -> None:
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
        elif outcome is not Outcome.GOING_ON:
            self.held += 1
            print(f"held at {self._number}: {learning.objections[-1]}", file=sys.stderr)
        if outcome is Outcome.SPOILED:
            self.set_aside += learning.consumed
            self._learning = self._new()
            self._learning.learner.restore(*self._good)
            past = self._learning._examples([each.record for each in self._past if each.record])
            self._learning.learner.window.add(past)
            self._learning.learner.take_changed()
            self._version = []
            self._learning.begin(VersionRecord(version=self.versions, position=entry.position))
            self._take_over(None)

    def _ranks(self, entries: list[LogEntry]) -> np.ndarray:
        """Rank the items of clean entries with the version being served."""
        examples = self._learning._examples([entry.record for entry in entries if entry.record])
        self._served.table.allocate(self._learning.learner.table.item_ids[self._served.table.rows :])
        with torch.no_grad():
            report, _ = self._test.test(examples, None, self._served.table.standing())
        return report.rank_B


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Hold what one scenario came to from the beginning of the attack on."""

    hits: Hits
    versions: int
    held: int
    set_aside: int


# The run up to the attack: each scenario goes on from it in a forked process of its own.
_before: Run


def _go_on(scenario: Scenario) -> Outcomes:
    run, count = _before, len(_before._clean)
    versions, held, set_aside = run.versions, run.held, run.set_aside
    hits = run.run(scenario, int(FROM * count), int((UNTIL + AFTER) * count))
    return Outcomes(hits, run.versions - versions, run.held - held, run.set_aside - set_aside)


def loss(hits: Hits, clean: Hits) -> tuple[float, float]:
    """Return the relative loss of accuracy, negative where it rose, and its upper bound with 95% confidence."""
    events = ~np.isnan(clean)
    difference, level = (clean - hits)[events], clean[events].mean()
    blocks = np.array([block.mean() for block in np.array_split(difference, max(2, len(difference) // BLOCK))])
    error = blocks.std(ddof=1) / np.sqrt(len(blocks))
    return float(difference.mean() / level), float((difference.mean() + ONE_SIDED_95 * error) / level)


def recovery(hits: Hits, clean: Hits) -> int | None:
    """Count the events after the attack until a window of them is within TOLERATED of the clean run's; None: never."""
    events = ~np.isnan(clean)
    hits, clean = hits[events], clean[events]
    for start in range(0, max(1, len(clean) - WINDOW + 1), WINDOW // 10):
        if hits[start : start + WINDOW].mean() >= (1 - TOLERATED) * clean[start : start + WINDOW].mean():
            return start
    return None


def compare(scenario: Scenario, attacked: list[Outcomes], oracle: Outcomes, clean: Outcomes) -> dict[str, Any]:
    """Describe one attack, over all its seeds and, during it, for each of them."""
    hits = np.mean([outcome.hits for outcome in attacked], 0)
    split = round(len(clean.hits) * (UNTIL - FROM) / (UNTIL + AFTER - FROM))
    described: dict[str, Any] = {"poison": scenario.kind, "share": scenario.share}
    for name, part in (("during", slice(0, split)), ("after", slice(split, None))):
        described[name] = {
            "clean": round(float(np.nanmean(clean.hits[part])), 4),
            "attacked": round(float(np.nanmean(hits[part])), 4),
            "oracle": round(float(np.nanmean(oracle.hits[part])), 4),
        }
        for against, reference in (("loss", clean), ("loss_beside_oracle", oracle)):
            mean, at_most = loss(hits[part], reference.hits[part])
            described[name] |= {against: round(mean, 4), f"{against}_at_most": round(at_most, 4)}
    return described | {
        "recovery_events": recovery(hits[split:], clean.hits[split:]),
        "seeds": [
            {
                "loss": round(loss(one.hits[:split], clean.hits[:split])[0], 4),
                "recovery_events": recovery(one.hits[split:], clean.hits[split:]),
            }
            for one in attacked
        ],
        "versions": sum(outcome.versions for outcome in attacked),
        "held": sum(outcome.held for outcome in attacked),
        "set_aside": sum(outcome.set_aside for outcome in attacked),
    }


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--events", type=int, default=30_000)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.5], help="none: false holds alone")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each attack")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--positive", action="store_true", help="leave out what is not positive; it teaches classes alone"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = open_feedback_file(arguments.data)
    changes = dict(change.split("=", 1) for change in arguments.set)
    settings = load({"classes": file.classes, **changes}, environment={})
    wanted = {c.name for c in settings.classes if c.positive or not arguments.positive}
    rows = (row for row in file if not isinstance(row, BadRow) and row.feedback_class in wanted)
    clean = list(islice(rows, arguments.events))
    global _before
    _before = Run(clean, settings)
    before = _before.run(Scenario(), 0, int(FROM * len(clean)))
    attacks = [Scenario(kind, share) for kind in arguments.kinds for share in arguments.shares]
    results = []
    with get_context("fork").Pool(arguments.processes, maxtasksperchild=1) as pool:
        clean_outcome = pool.apply_async(_go_on, (Scenario(),))
        waiting = [
            (
                attack,
                [
                    pool.apply_async(_go_on, (Scenario(attack.kind, attack.share, seed),))
                    for seed in range(arguments.seeds)
                ],
                pool.apply_async(_go_on, (Scenario(attack.kind, attack.share, oracle=True),)),
            )
            for attack in attacks
        ]
        reference = clean_outcome.get()
        for attack, attacked, oracle in waiting:
            results.append(compare(attack, [one.get() for one in attacked], oracle.get(), reference))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    summary = {
        "stream": file.layout,
        "events": len(clean),
        "settings": changes,
        "hr_at_10_before": round(float(np.nanmean(before)), 4),
        "clean_versions": _before.versions + reference.versions,
        "false_holds": _before.held + reference.held,
        "results": results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
