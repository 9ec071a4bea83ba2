"""Retrained: the ever-updated network beside one trained from scratch on all data so far; what each costs; forgetting.

At each tenth of the stream from the half on, both are tested, frozen, on the next tenth: `updated` has learned the
stream once, as a trainer does, `retrained` has learned all of it in epochs, stopped by its last part. Forgetting: the
accuracy of the updated one on users who come back after long idleness, beside that on the others of the same tenth, and
beside the retrained one's. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys.device import choose
from recsys.feedback_file import FeedbackFile, open_feedback_file
from recsys.settings import Settings, load
from trainer.evaluation import RECSYS, Contest, Teaching
from trainer.evaluation.measures import accuracy
from trainer.evaluation.stream import Case
from trainer.evaluation.tally import Tally

FIRST_TENTH = 5
# Of what is learned from, the latest part says when to stop.
VALIDATION_SHARE = 0.1
# A user is idle whose last entry is older than that of so many of the tenth's events.
IDLE_QUANTILE = 0.9


def contest(file: FeedbackFile, settings: Settings) -> Contest:
    """Make a contest of the learner alone."""
    return Contest(file, settings, choose(settings.device), [RECSYS], lambda done: None)


def measured(tally: Tally, cases: Sequence[Case]) -> dict[str, Any]:
    """Return accuracy over everything, and of users who were idle for long and of the others."""
    ranks = tally.ranks(RECSYS)
    assert ranks is not None
    idle = np.array([case.idle_ms for case in cases if case.positive])
    known = idle >= 0
    found: dict[str, Any] = accuracy(ranks, (10,))
    if known.any():
        bound = float(np.quantile(idle[known], IDLE_QUANTILE))
        for name, part in (("idle", known & (idle >= bound)), ("active", known & (idle < bound))):
            found[name] = {"events": int(part.sum()), **accuracy(ranks[part], (10,))}
        found["idle_seconds"] = bound / 1000
    return found


def retrained(file: FeedbackFile, settings: Settings, edge: int, end: int, teaching: Teaching) -> dict[str, Any]:
    """Train from scratch on the first `edge` feedback, test on those up to `end`."""
    fresh = contest(file, settings)
    cases = fresh.cases(end)
    started = time.perf_counter()
    kept = round(VALIDATION_SHARE * edge)
    fresh.teach(cases[: edge - kept], cases[edge - kept : edge], teaching)
    fresh.learn(cases[edge - kept : edge])
    seconds = time.perf_counter() - started
    return measured(fresh.test(cases[edge:end]), cases[edge:end]) | {"seconds": round(seconds, 2)}


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of feedback")
    parser.add_argument("--events", type=int, help="so much of it; all unless given")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--patience", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = open_feedback_file(arguments.data)
    settings = load({"classes": file.classes, "device": arguments.device}, environment={})
    teaching = Teaching(arguments.epochs, arguments.patience)
    updated = contest(file, settings)
    cases = updated.cases(arguments.events)
    edges = [len(cases) * n // 10 for n in range(FIRST_TENTH, 11)]
    done, spent, tenths = 0, 0.0, []
    for edge, end in pairwise(edges):
        started = time.perf_counter()
        updated.learn(cases[done:edge])
        spent += time.perf_counter() - started
        done = edge
        here = cases[edge:end]
        tenths.append(
            {
                "learned": edge,
                "tested": end - edge,
                "updated": measured(updated.test(here), here) | {"seconds": round(spent, 2)},
                "retrained": retrained(file, settings, edge, end, teaching),
            }
        )
    print(json.dumps({"stream": file.layout, "feedback": len(cases), "epochs": arguments.epochs, "tenths": tenths}))


if __name__ == "__main__":
    main()
