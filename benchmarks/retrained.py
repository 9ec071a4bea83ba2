"""Retrained: the ever-updated network beside one trained from scratch on all data so far; what each costs; forgetting.

At each tenth of the stream `updated` has learned it once, as a trainer does, and `retrained` has learned all of it in
epochs, stopped by its last part. From the half on both are tested, frozen, on the next tenth. Forgetting: the accuracy
of the updated one on users who come back after long idleness, beside that on the others of the same tenth, and beside
the retrained one's. Costs are seconds of processor time from the stream's beginning, tests apart. Prints one JSON
object; each tenth goes to standard error as soon as it is done.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys.device import choose
from recsys.feedback_file import FeedbackFile, open_feedback_file
from recsys.settings import Settings, load
from trainer.daemon import warm_up
from trainer.epochs import Epochs
from trainer.evaluation.measures import accuracy
from trainer.evaluation.methods import RECSYS, LearnerMethod
from trainer.evaluation.stream import Case, Stream
from trainer.evaluation.tally import Tally
from trainer.examples import batches
from trainer.learner import Learner

# Accuracy is compared from here on.
FIRST_TENTH = 5
# Of what is learned from, the latest part says when to stop.
VALIDATION_SHARE = 0.1
# A user is idle whose last entry is older than that of so many of the tenth's events.
IDLE_QUANTILE = 0.9


@dataclass(frozen=True, slots=True)
class Teaching:
    """Say how long the retrained one learns: at most so many epochs, until `patience` in a row gained nothing."""

    epochs: int
    patience: int


def begin(file: FeedbackFile, settings: Settings) -> tuple[LearnerMethod, Iterator[Case]]:
    """Make a learner that knows nothing, and read the file for it, so that it meets items when they come."""
    learner = Learner(settings, choose(settings.device))
    return LearnerMethod(learner), Stream(file, settings, learner).cases()


def measured(method: LearnerMethod, cases: Sequence[Case]) -> dict[str, Any]:
    """Test without learning; return accuracy over everything, and of users who were idle for long and of the others."""
    settings = method.learner.settings
    tally = Tally(settings, [RECSYS])
    for batch in batches(cases, settings.batch_size):
        tally.add(batch, {RECSYS: method.run(batch, learn=False)})
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


def retrained(
    file: FeedbackFile, settings: Settings, edge: int, teaching: Teaching
) -> tuple[LearnerMethod, Iterator[Case], dict[str, Any]]:
    """Train from scratch on the first `edge` feedback; return what has learned, what comes next, and the cost."""
    method, stream = begin(file, settings)
    cases = list(islice(stream, edge))
    kept = round(VALIDATION_SHARE * edge)
    started = time.process_time()
    epochs = Epochs(method.learner, cases[: edge - kept], cases[edge - kept :])
    epochs.run(teaching.epochs, teaching.patience)
    method.learn(cases[edge - kept :])
    seconds = time.process_time() - started
    return method, stream, {"seconds": seconds, "epochs": len(epochs.history), "best_epoch": epochs.best}


def compared(tenths: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what share of the retrained one's accuracy, and of its cost, the updated one has."""
    ratios = [t["updated"]["hr_at_10"] / t["retrained"]["hr_at_10"] for t in tenths if "hr_at_10" in t["retrained"]]
    cost = tenths[-1]["updated"]["seconds"] / sum(tenth["retrained"]["seconds"] for tenth in tenths)
    return {"accuracy": float(np.mean(ratios)), "least_accuracy": min(ratios), "cost": cost}


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of feedback")
    parser.add_argument("--events", type=int, help="so much of it; all unless given")
    parser.add_argument(
        "--batch", type=int, help="feedback in a batch of the updated one; a trainer takes 256 where it is behind"
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--patience", type=int, default=2)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = open_feedback_file(arguments.data)
    settings = load({"classes": file.classes, "device": arguments.device}, environment={})
    teaching = Teaching(arguments.epochs, arguments.patience)
    feedback = sum(1 for _ in Stream(file, settings).cases(arguments.events))
    warm_up(settings, choose(settings.device))
    edges = [feedback * n // 10 for n in range(11)]
    batch = arguments.batch or settings.batch_size
    updated, stream = begin(file, settings.model_copy(update={"batch_size": batch}))
    here, spent, tenths = list(islice(stream, edges[1])), 0.0, list[dict[str, Any]]()
    for edge, end in pairwise(edges[1:]):
        started = time.process_time()
        updated.learn(here)
        spent += time.process_time() - started
        here = list(islice(stream, end - edge))
        again, following, cost = retrained(file, settings, edge, teaching)
        tenths.append({"learned": edge, "updated": {"seconds": spent}, "retrained": cost})
        if len(tenths) >= FIRST_TENTH:
            tenths[-1]["tested"] = len(here)
            tenths[-1]["updated"] |= measured(updated, here)
            tenths[-1]["retrained"] |= measured(again, list(islice(following, end - edge)))
        print(json.dumps(tenths[-1]), file=sys.stderr, flush=True)
    found = {"stream": file.layout, "feedback": feedback, "batch": batch}
    print(json.dumps(found | {"compared": compared(tenths), "tenths": tenths}))


if __name__ == "__main__":
    main()
