"""Drift: how often each detector is wrong on streams without a change, and how late it is on planted ones.

A learner goes over simulated users whose tastes stay, and over files in random order at an even pace; what it finds is
kept as a trace for each monitored stream. False alarms are counted over these traces as they ran, the time included in
which everything is new to the learner (`as run`), and over their last three quarters in random orders (`permuted`), per
million feedback.

Changes are planted in two ways. In traces, where a block begins: numbers are drawn again, and after the change those of
the upper half of their range are three times as likely; at once (sudden), over 8,192 feedback (gradual), or back and
forth every 8,192 (recurring: each turn is a change, and is found if an alarm comes before the next one; a level looks
for rises alone, so not for the turn back). In the simulator: the users' tastes turn in the same three ways, and a
learner goes over it. Delays are medians, over the changes found, in numbers of the stream or, in the simulator, in
feedback. An always-firing detector fires after each block, a never-firing one never.

With `--response` a learner goes over streams whose change is known, or over the files as they are, with `drift_boost`
and without; HR@10 before the change, in the first 2,000 and 4,000 feedback after it and from then on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from recsys.audience import Audience
from recsys.feedback_file import open_feedback_file
from recsys.feedback_file.stream import Chunk
from recsys.settings import CLASS_PRESETS, load
from trainer.drift import LEVELS, MEASURES, MIXES
from trainer.drift.drift import ACCURACY, levels, mixes
from trainer.drift.level import BLOCK as LEVEL_BLOCK
from trainer.drift.level import DELTA, THRESHOLD, Level
from trainer.drift.mix import BLOCK as MIX_BLOCK
from trainer.drift.mix import JS, PSI, Mix
from trainer.evaluation.stream import Stream
from trainer.examples import batches, encode
from trainer.learner import Learner
from trainer.quality import MISS, NO_EVENT

# Users and items of the simulator: enough that few users run out of what they like.
USERS, ITEMS = 3000, 800
# Of feedback in traces with planted changes: before the change, and how long each phase is.
BEFORE, PHASE = 12_288, 8192
LIKELIER = 3.0
SHAPES = ("sudden", "gradual", "recurring")
NEVER = float("inf")
# Never reached, yet its logarithm is finite.
UNREACHED = 1e-300
Plan = Callable[[int], float]


class Turning(Audience):
    """An audience whose tastes are turned with probability `plan(step)` at each choice."""

    plan: Plan

    def choice_probabilities(self, user_id: str, step: int | None = None) -> np.ndarray:
        """Return each item's probability to be the user's next choice."""
        turned = self._random.random() < self.plan(self.step)
        return super().choice_probabilities(user_id, self.events if turned else 0)


class Feed:
    """A stream of feedback in memory, as a file would be."""

    def __init__(
        self,
        classes: Any,
        chunk: Chunk,
        contexts: list[dict[str, str]],
        contents: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """`contents` are the categories of items, as a catalogue would tell them beforehand."""
        self.classes, self._chunk, self._contexts, self.contents = classes, chunk, contexts, contents

    def chunks(self) -> Iterator[Chunk]:
        """Yield all of it."""
        yield self._chunk

    def contexts(self, chunk: Chunk) -> list[dict[str, str]]:
        """Return the context of each feedback."""
        return self._contexts


def simulated(seed: int, events: int, plan: Plan) -> Feed:
    """Let simulated users choose."""
    audience = Turning(seed, USERS, ITEMS, events=events, late_items=0.0, drifting=1.0)
    audience.plan = plan
    rows = []
    for _ in range(events):
        user = audience.next_user()
        rows.append((user, audience.choose(user)))
    user_ids, item_ids = (np.array(column, object) for column in zip(*rows, strict=True))
    lines = np.arange(events)
    return Feed(
        CLASS_PRESETS["clicks"],
        Chunk(lines, user_ids, item_ids, np.ones(events, np.int64), 10_000 * (1 + lines)),
        [{}] * events,
        {item.item_id: list(item.categories) for item in audience.items()},
    )


def shuffled(path: Path, seed: int) -> Feed:
    """Read a file in random order, at an even pace."""
    file = open_feedback_file(path)
    chunks = list(file.chunks())
    # Where a file has no contexts they go on for ever.
    contexts = [context for chunk in chunks for context in islice(file.contexts(chunk), len(chunk))]
    order = np.random.default_rng(seed).permutation(sum(map(len, chunks)))
    columns = {
        name: np.concatenate([getattr(c, name) for c in chunks])[order] for name in ("user_ids", "item_ids", "classes")
    }
    lines = np.arange(len(order))
    feedback = Chunk(lines, **columns, times_ms=10_000 * (1 + lines))
    return Feed(file.classes, feedback, [contexts[i] for i in order])


@dataclass
class Trace:
    """What a learner found: by stream its numbers or bins, and after how much feedback each came."""

    values: dict[str, np.ndarray]
    at: dict[str, np.ndarray]
    feedback: int


def settings_for(feed: Any, **changes: Any) -> Any:
    """Load the default settings for what the stream holds."""
    return load({"classes": feed.classes, "device": "cpu", **changes}, environment={})


def record(feed: Any, events: int, batch_size: int) -> Trace:
    """Let a learner go over a stream."""
    settings = settings_for(feed, batch_size=batch_size)
    learner = Learner(settings, torch.device("cpu"))
    known = 1
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*MIXES, *LEVELS)}
    done: dict[str, list[np.ndarray]] = {name: [] for name in parts}
    feedback = 0
    for batch in batches(Stream(feed, settings, learner).cases(events), settings.batch_size):
        examples = encode([case.event for case in batch], settings)
        report = learner.step(examples, [case.seen for case in batch])
        numbers = levels(examples, report, len(learner.table))
        categories_BK = learner.contents.digests(examples.item_B)
        for name, values in {**mixes(examples, numbers["item_loss"], categories_BK), **numbers}.items():
            parts[name].append(values)
            # Within a batch by its share: what is left out of a stream is spread evenly enough.
            done[name].append(feedback + len(batch) * (1 + np.arange(len(values))) // max(1, len(values)))
        # Told of an item when it has its row, so that what is unknown stays so.
        learner.catalogue({item_id: feed.contents.get(item_id, ()) for item_id in learner.table.item_ids[known:]})
        known = learner.table.rows
        feedback += len(batch)
    join = {name: np.concatenate(part) for name, part in parts.items()}
    return Trace(join, {name: np.concatenate(part) for name, part in done.items()}, feedback)


def alarms(stream: str, measure: str, values: np.ndarray) -> np.ndarray:
    """Return after how many values one detector alone fires."""
    if stream in MIXES:
        bins, block = int(values.max()) + 1, MIX_BLOCK
        limits = (PSI, NEVER) if measure == "psi" else (NEVER, JS)
        detector: Mix | Level = Mix(bins, np.zeros(Mix.size(bins)), *limits)
    else:
        block = LEVEL_BLOCK
        chances = (DELTA, NEVER) if measure == "adwin" else (UNREACHED, THRESHOLD)
        detector = Level(np.zeros(Level.SIZE), *chances)
    ends = range(block, len(values) + 1, block)
    return np.array([end for end in ends if detector.add(values[end - block : end])], np.int64)


def block_of(stream: str) -> int:
    """Return after how many values a detector judges."""
    return MIX_BLOCK if stream in MIXES else LEVEL_BLOCK


def changing(values: np.ndarray, shape: str, random: np.random.Generator) -> tuple[np.ndarray, list[int]] | None:
    """Draw values anew with a planted change; return them and where changes begin, None where all are alike."""
    upper = values > np.median(values) if values.min() < np.median(values) < values.max() else values > values.min()
    share = upper.mean()
    if not 0 < share < 1:
        return None
    raised = LIKELIER * share / (LIKELIER * share + 1 - share)
    time = np.arange(BEFORE + 3 * PHASE) - BEFORE
    turned = {
        "sudden": time >= 0,
        "gradual": np.clip(time / PHASE, 0, 1),
        "recurring": (time >= 0) & (time // PHASE % 2 == 0),
    }[shape]
    from_upper = random.random(len(time)) < share + (raised - share) * turned
    drawn = np.where(from_upper, random.choice(values[upper], len(time)), random.choice(values[~upper], len(time)))
    return drawn, [BEFORE + PHASE * n for n in range(3)] if shape == "recurring" else [BEFORE]


def found(fired: np.ndarray, changes: list[int], end: int) -> list[float]:
    """Return the delay of the first alarm after each change and before the next, NaN where there is none."""
    delays = []
    for change, until in zip(changes, [*changes[1:], end], strict=True):
        within = fired[(fired > change) & (fired <= until)]
        delays.append(float(within[0] - change) if len(within) else np.nan)
    return delays


def per_million(count: float, feedback: float) -> float:
    """Return a rate per million feedback."""
    return round(1e6 * count / max(feedback, 1), 1)


def summary(delays: list[float]) -> dict[str, Any]:
    """Return the share found and the median delay."""
    known = [delay for delay in delays if np.isfinite(delay)]
    return {
        "changes": len(delays),
        "detected": round(len(known) / max(1, len(delays)), 3),
        "delay": round(float(np.median(known))) if known else None,
    }


def plans(events: int) -> dict[str, tuple[Plan, list[int]]]:
    """Return how tastes turn, by shape, and where changes begin."""
    half, quarter = events // 2, events // 4
    return {
        "sudden": (lambda step: float(step >= half), [half]),
        "gradual": (lambda step: min(1.0, max(0.0, (step - half) / quarter)), [half]),
        "recurring": (lambda step: float(step // quarter % 2), [quarter, 2 * quarter, 3 * quarter]),
    }


def false_alarms(traces: list[Trace], stream: str, measure: str, permutations: int) -> dict[str, float]:
    """Count alarms on traces without a change."""
    random = np.random.default_rng(1)
    run = permuted = seen = seen_permuted = 0.0
    for trace in traces:
        values = trace.values[stream]
        run += len(alarms(stream, measure, values)) if len(values) else 0
        seen += trace.feedback
        rest = values[len(values) // 4 :]
        for _ in range(permutations if len(rest) else 0):
            permuted += len(alarms(stream, measure, random.permutation(rest)))
            seen_permuted += 0.75 * trace.feedback
    return {"as_run": per_million(run, seen), "permuted": per_million(permuted, seen_permuted)}


def planted(traces: list[Trace], stream: str, measure: str, trials: int) -> dict[str, Any]:
    """Plant changes in traces."""
    random = np.random.default_rng(2)
    delays: dict[str, list[float]] = {shape: [] for shape in SHAPES}
    for trace in traces:
        values = trace.values[stream][len(trace.values[stream]) // 4 :]
        for shape in SHAPES if len(values) else ():
            for _ in range(trials):
                if (drawn := changing(values, shape, random)) is not None:
                    delays[shape] += found(alarms(stream, measure, drawn[0]), drawn[1], len(drawn[0]))
    return {shape: summary(each) for shape, each in delays.items()}


def turned(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Turn the tastes of simulated users, and say what the detectors of accuracy find."""
    delays: dict[tuple[str, str], dict[str, list[float]]] = {}
    for seed in range(arguments.seeds):
        for shape, (plan, changes) in plans(arguments.events).items():
            trace = record(simulated(100 + seed, arguments.events, plan), arguments.events, arguments.batch_size)
            for stream in ("item_loss", "miss_at_10", "score"):
                for measure in MEASURES[stream]:
                    fired = trace.at[stream][alarms(stream, measure, trace.values[stream]) - 1]
                    into = delays.setdefault((stream, measure), {shape: [] for shape in SHAPES})
                    into[shape] += found(fired, changes, trace.feedback)
    return {f"{s}_{m}": {shape: summary(each) for shape, each in of.items()} for (s, m), of in delays.items()}


def respond(feed: Any, arguments: argparse.Namespace, boost: float, change: int) -> dict[str, Any]:
    """Let a learner go over a stream with a response; return its accuracy around `change`."""
    settings = settings_for(feed, drift_boost=boost)
    learner = Learner(settings, torch.device("cpu"))
    hits, responding, detected = [], [], []
    for batch in batches(Stream(feed, settings, learner).cases(arguments.events), settings.batch_size):
        report = learner.step(encode([c.event for c in batch], settings), [c.seen for c in batch])
        hit = (report.rank_B != MISS) & (report.rank_B <= 10)
        hits.append(np.where(report.rank_B == NO_EVENT, np.nan, hit))
        responding.append(learner.drift.responding)
        detected += [len(np.concatenate(hits))] if report.drifted & ACCURACY else []
    hit_B = np.concatenate(hits)
    edges = {"before": (change - 2000, change), "first_2000": (change, change + 2000)}
    edges |= {"first_4000": (change, change + 4000), "later": (change + 4000, len(hit_B)), "all": (0, len(hit_B))}
    means = {name: round(float(np.nanmean(hit_B[first:end])), 4) for name, (first, end) in edges.items()}
    return {**means, "responding": round(float(np.mean(responding)), 3), "detected_at": detected}


def responses(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare learners with and without a response."""
    feeds: list[tuple[str, Any, int]] = []
    for seed in range(arguments.seeds):
        plan, (change,) = plans(arguments.events)["sudden"]
        feeds.append((f"simulator, tastes turn, seed {seed}", simulated(100 + seed, arguments.events, plan), change))
    feeds += [(path.name, open_feedback_file(path), arguments.events // 2) for path in arguments.data]
    results = []
    for name, feed, change in feeds:
        for boost in (1.0, *arguments.boosts):
            results.append({"stream": name, "drift_boost": boost, **respond(feed, arguments, boost, change)})
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def calibrate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every detector."""
    feeds = [simulated(seed, arguments.events, lambda step: 0.0) for seed in range(arguments.seeds)]
    feeds += [shuffled(path, 0) for path in arguments.data]
    traces = [record(feed, arguments.events, arguments.batch_size) for feed in feeds]
    detectors: dict[str, Any] = {}
    for stream in (*MIXES, *LEVELS):
        for measure in MEASURES[stream]:
            name = f"{stream}_{measure}"
            detectors[name] = false_alarms(traces, stream, measure, arguments.permutations)
            detectors[name] |= planted(traces, stream, measure, arguments.trials)
            print(f"{name:28}{json.dumps(detectors[name])}", file=sys.stderr, flush=True)
    for stream, name in (("item_loss", "levels"), ("item_mix", "mixes")):
        block = block_of(stream)
        at_once = {shape: {"detected": 1.0, "delay": block} for shape in SHAPES}
        missed = {shape: {"detected": 0.0, "delay": None} for shape in SHAPES}
        rate = per_million(1, block)
        detectors[f"always ({name})"] = {"as_run": rate, "permuted": rate, **at_once}
        detectors[f"never ({name})"] = {"as_run": 0.0, "permuted": 0.0, **missed}
    return {
        "stationary_feedback": sum(trace.feedback for trace in traces),
        "permuted_feedback": round(0.75 * arguments.permutations * sum(trace.feedback for trace in traces)),
        "detectors": detectors,
        "turned_tastes": turned(arguments),
    }


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="files of feedback")
    parser.add_argument("--events", type=int, default=24_000, help="of each stream")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--permutations", type=int, default=10)
    parser.add_argument("--trials", type=int, default=3, help="planted changes of each shape in each trace")
    parser.add_argument("--batch-size", type=int, default=256, help="of the learner whose findings are kept")
    parser.add_argument("--response", action="store_true", help="measure what a response brings, and nothing else")
    parser.add_argument("--boosts", type=float, nargs="+", default=[2.0], help="values of drift_boost")
    parser.add_argument("--json", action="store_true", help="print one JSON object alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {"responses": responses(arguments)} if arguments.response else calibrate(arguments)
    if not arguments.json:
        for name, row in result.get("detectors", {}).items():
            print(f"{name:28}{row['as_run']:>10}{row['permuted']:>10}  " + "  ".join(str(row[s]) for s in SHAPES))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
