"""Learning: feedback per second of one core, and where the time of a step goes.

Runs the learner over a file, test-then-train, with the default settings; prints one JSON object. Times are those that
the processor spent (on CUDA: that passed), so that other work on the machine changes them little; the first eighth of
the feedback is not timed. With --items the table holds so many before the file begins, chosen by nobody, as where most
of a catalogue rests; what a step costs should not depend on their number, as beyond 16,384 items the parts named "all
items" look at a sample.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recsys.device import choose
from recsys.feedback_file import open_feedback_file
from recsys.settings import load
from trainer import full_ranking
from trainer.evaluation.stream import Stream
from trainer.examples import batches, encode
from trainer.learner import Learner

# Parts of a step, and what is replayed between steps as a whole; those of the second kind look at every item, the
# ranking within the test.
PARTS = ("test", "forward", "backward", "apply", "count", "replay")
ALL_ITEMS = ("standing", "ranking")
# Items allocated at once.
ALLOCATED_AT_ONCE = 100_000


class Clock:
    """Add up the time that calls take, by name; what a replay calls is within that alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._replaying = False
        self._now = time.perf_counter if torch.cuda.is_available() else time.thread_time

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            if self._replaying:
                return function(*arguments, **named)
            self._replaying, started = name == "replay", self._now()
            try:
                return function(*arguments, **named)
            finally:
                self._replaying = False
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

        return wrapped

    def watch(self, learner: Learner) -> None:
        """Time a learner's steps and their parts."""
        parts = {"_loss": "forward", "_apply": "apply", "_count": "count", "_replay": "replay", "step": "step"}
        for name, part in parts.items():
            setattr(learner, name, self.timed(part, getattr(learner, name)))
        learner.prequential.test = self.timed("test", learner.prequential.test)  # type: ignore[method-assign]
        learner._look = self.timed("standing", learner._look)  # type: ignore[method-assign]
        full_ranking.rank = self.timed("ranking", full_ranking.rank)
        # That of the mixing weights' loss included, which is within the test.
        torch.autograd.backward = self.timed("backward", torch.autograd.backward)


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of feedback")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument(
        "--batch", type=int, default=64, help="feedback in a batch; online up to 256 when it comes fast"
    )
    parser.add_argument("--items", type=int, default=0, help="items in the table before the file begins")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = open_feedback_file(arguments.data)
    given = {"classes": file.classes, "device": arguments.device, "batch_size": arguments.batch}
    settings = load(given, environment={})
    learner, clock, feedback, untimed = Learner(settings, choose(settings.device)), Clock(), 0, 0
    for first in range(0, arguments.items, ALLOCATED_AT_ONCE):
        learner.allocate(f"resting {n}" for n in range(first, min(first + ALLOCATED_AT_ONCE, arguments.items)))
    clock.watch(learner)

    for batch in batches(Stream(file, settings, learner).cases(arguments.events), arguments.batch):
        learner.step(encode([case.event for case in batch], settings), [case.seen for case in batch])
        learner.take_changed()
        feedback += len(batch)
        if not untimed and feedback >= arguments.events // 8:
            clock.seconds.clear()
            untimed = feedback
    feedback -= untimed
    each = {name: round(1000 * spent / feedback * arguments.batch, 2) for name, spent in clock.seconds.items()}
    all_items = {name: each.get(name, 0.0) for name in ALL_ITEMS}
    print(
        json.dumps(
            {
                "device": settings.device,
                "batch": arguments.batch,
                "feedback": feedback,
                "feedback_per_second": round(feedback / clock.seconds["step"]),
                "items": len(learner.table),
                "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
                "milliseconds_per_step": {"step": each["step"]} | {name: each[name] for name in PARTS},
                "milliseconds_of_all_items": all_items,
                "milliseconds_beyond_those": round(each["step"] - sum(all_items.values()), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
