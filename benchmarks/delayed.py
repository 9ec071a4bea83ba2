"""Delayed: how well clicks are foretold when every impression is logged at once and its click later.

A file of outcomes, one feedback for each impression, is turned into what a shop would log: an impression, and where
another class came of it that feedback, with the same recommendation_id, after as much other feedback as an exponential
distribution of this mean says. At each impression, before it is learned, the probabilities are noted and measured
against the outcome. `at once` learns the file's outcomes themselves: what the others would reach without a delay. The
first fifth is not measured.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys.device import choose
from recsys.feedback_file import open_feedback_file
from recsys.settings import Settings, load
from trainer.evaluation.stream import Case, Stream
from trainer.examples import Event, batches, encode
from trainer.learner import Learner
from trainer.probabilities import auc, calibration_error

AT_ONCE = "at once"
WAYS = (AT_ONCE, "none", "weighted", "corrected")
SHARE_LEFT_OUT = 0.2


def delayed(cases: Iterator[Case], impression: int, mean_delay: float, seed: int) -> Iterator[tuple[Event, int]]:
    """Yield what is logged with the class that comes of it in the end, -1 where that was asked already."""
    random = np.random.default_rng(seed)
    waiting: list[tuple[float, int, Event]] = []
    for number, case in enumerate(cases, start=1):
        while waiting and waiting[0][0] <= number:
            yield heapq.heappop(waiting)[2], -1
        event = case.event._replace(impression=number)
        if event.feedback_class != impression:
            heapq.heappush(waiting, (number + random.exponential(mean_delay), number, event))
        yield event._replace(feedback_class=impression), event.feedback_class


def measure(path: Path, settings: Settings, events: int, mean_delay: float | None) -> dict[str, float]:
    """Learn the file and return how well its outcomes were foretold; without a delay they are learned themselves."""
    file = open_feedback_file(path)
    learner = Learner(settings, choose(settings.device))
    cases = Stream(file, settings, learner).cases(events)
    impression = next(i for i, c in enumerate(settings.classes) if not c.positive and not c.history)
    stream = (
        delayed(cases, impression, mean_delay, settings.seed)
        if mean_delay is not None
        else ((case.event, case.event.feedback_class) for case in cases)
    )
    happened, said = [], []
    for batch in batches(stream, settings.batch_size):
        report = learner.step(encode([event for event, _ in batch], settings))
        outcome_B = np.array([outcome for _, outcome in batch])
        happened.append(outcome_B[outcome_B >= 0] != impression)
        said.append(1 - report.class_probability_BC[outcome_B >= 0, impression])
    # What comes first is foretold badly in any case.
    first = int(SHARE_LEFT_OUT * events)
    happened_B, said_B = np.concatenate(happened)[first:], np.concatenate(said)[first:].astype(np.float64)
    right_B = np.where(happened_B, said_B, 1 - said_B)
    return {
        "auc": round(auc(happened_B, said_B), 4),
        "log_loss": round(float(-np.log(right_B).mean()), 4),
        "calibration_error": round(calibration_error(happened_B, said_B), 4),
        "mean_probability": round(float(said_B.mean()), 4),
        "share_that_happened": round(float(happened_B.mean()), 4),
    }


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of feedback, one for each impression")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--delay", type=float, default=1000.0, help="mean delay of a click, in impressions")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    classes: Any = open_feedback_file(arguments.data).classes
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in arguments.seeds:
        for way, measured in found.items():
            correction = {} if way == AT_ONCE else {"delayed_feedback": way}
            settings = load(
                {"classes": classes, "device": arguments.device, "seed": seed, **correction}, environment={}
            )
            mean_delay = None if way == AT_ONCE else arguments.delay
            measured.append(measure(arguments.data, settings, arguments.events, mean_delay))
            print(way, seed, measured[-1], file=sys.stderr, flush=True)
    print(json.dumps({**{k: str(v) for k, v in vars(arguments).items()}, "found": found}))


if __name__ == "__main__":
    main()
