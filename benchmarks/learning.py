"""Learning: feedback per second on this machine, and where the time of a step goes.

Runs the learner over a file, test-then-train, with the default settings; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recsys.device import choose
from recsys.feedback_file import open_feedback_file
from recsys.settings import load
from trainer import learner as learner_module
from trainer.evaluation import RECSYS, Evaluation


def timed(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the time that each call takes to `seconds`."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    return wrapped


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of feedback")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = open_feedback_file(arguments.data)
    settings = load({"classes": file.classes, "device": arguments.device}, environment={})
    evaluation = Evaluation(file, settings, choose(settings.device), [RECSYS])
    learner, seconds = evaluation.learner, dict[str, float]()
    assert learner is not None
    for name, part in (("_loss", "forward"), ("_apply", "apply"), ("_count", "count"), ("step", "step")):
        setattr(learner, name, timed(seconds, part, getattr(learner, name)))
    learner.prequential.test = timed(seconds, "test", learner.prequential.test)  # type: ignore[method-assign]
    backward = learner_module.torch.autograd.backward
    learner_module.torch.autograd.backward = timed(seconds, "backward", backward)  # type: ignore[assignment]
    evaluation.run(arguments.events)
    steps = learner.steps
    parts = {name: round(1000 * spent / steps, 2) for name, spent in sorted(seconds.items())}
    parts["rest"] = round(parts["step"] - sum(parts[p] for p in ("forward", "apply", "count", "test", "backward")), 2)
    print(
        json.dumps(
            {
                "device": settings.device,
                "feedback": evaluation.feedback,
                "feedback_per_second": round(evaluation.feedback / seconds["step"]),
                "items": len(learner.table),
                "milliseconds_per_step": parts,
            }
        )
    )


if __name__ == "__main__":
    main()
