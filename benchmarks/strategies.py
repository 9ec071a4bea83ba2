"""Strategies: what each does to accuracy, forgetting, published bytes and time, on one stream.

The first half of the stream is learned with the default settings; each strategy goes on from those weights, as where a
trainer is started again with other settings, over the second half, test-then-train. A tenth of the users is kept apart:
nothing of theirs is ever learned. What they chose in the first half, as far as those items were known at its end, is
ranked at that moment (`then`, the same for all) and again at the end of the stream (`end`): the difference is what was
forgotten. `bytes` is the mean size of a version, for servers and for the trainer alone, without new items' ids.
`seconds` are of the processor: what else runs on the machine counts less. All of it is done once for each seed; beside
each mean stands how far the seeds scatter (standard deviation). What settings add to the network begins without effect,
so that every strategy starts from the same scores. Prints a table on standard error and one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys.device import choose
from recsys.feedback_file import open_feedback_file
from recsys.settings import Settings, load
from recsys.weights import encode as encode_payload
from trainer.evaluation.stream import Case, Stream
from trainer.examples import batches, encode
from trainer.learner import Learner
from trainer.prequential import StepReport
from trainer.quality import MISS, NO_EVENT

CUTOFF = 10
HELD_OUT = 10
STRATEGIES: dict[str, dict[str, Any]] = {
    "default": {},
    "head": {"trainable": "head"},
    "bias": {"trainable": "bias"},
    "lora": {"trainable": "lora"},
    "adapter": {"trainable": "adapter", "adapter_width": 8},
    "prompt": {"trainable": "prompt", "prompt_length": 8},
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.01},
    "average": {"average_decay": 0.98},
    "l2sp": {"l2sp_weight": 0.1},
    "ewc": {"ewc_weight": 10.0},
    "distillation": {"distillation_weight": 1.0},
    "follow_loss": {"follow_loss": True},
    "squared_error": {"squared_error_weight": 1.0},
    "bayesian_head": {"bayesian_head": True},
    "average+distillation": {"average_decay": 0.98, "distillation_weight": 1.0},
}


def held_out(case: Case) -> bool:
    """Tell whether a case is of a user of whom nothing is learned."""
    return zlib.crc32(case.user_id.encode()) % HELD_OUT == 0


def step(learner: Learner, cases: Sequence[Case]) -> StepReport:
    """Test and learn a batch."""
    return learner.step(encode([case.event for case in cases], learner.settings), [case.seen for case in cases])


@torch.no_grad()
def ranks(learner: Learner, cases: Sequence[Case]) -> np.ndarray:
    """Rank the items of cases without learning from them."""
    found = []
    for batch in batches(cases, learner.settings.batch_size):
        examples = encode([case.event for case in batch], learner.settings)
        report, _ = learner.prequential.test(examples, [case.seen for case in batch], learner.table.standing())
        found.append(report.rank_B)
    return np.concatenate(found)


def hits(rank_B: np.ndarray) -> float:
    """Return the share of events within the cutoff."""
    events = rank_B[rank_B != NO_EVENT]
    return float(((events != MISS) & (events <= CUTOFF)).mean())


class Start:
    """Own the weights after the first half of a stream, and what comes after it."""

    def __init__(self, path: Path, events: int, device: str, seed: int) -> None:
        file = open_feedback_file(path)
        self.settings = load({"classes": file.classes, "device": device, "seed": seed}, environment={})
        self.learner = Learner(self.settings, choose(device))
        cases = list(Stream(file, self.settings, self.learner).cases(events))
        half = len(cases) // 2
        for batch in batches([case for case in cases[:half] if not held_out(case)], self.settings.batch_size):
            step(self.learner, batch)
        self.learner.take_changed()
        self.rest = [case for case in cases[half:] if not held_out(case)]
        kept = [case for case in cases[:half] if held_out(case) and case.positive]
        rank_B = ranks(self.learner, kept)
        self.kept = [case for case, rank in zip(kept, rank_B.tolist(), strict=True) if rank != MISS]
        self.then = hits(rank_B[rank_B != MISS])

    def go_on(self, changes: dict[str, Any]) -> dict[str, float]:
        """Learn the second half with other settings; return what was measured."""
        settings = Settings(**{**self.settings.model_dump(), **changes})
        learner = Learner(settings, self.learner.device)
        learner.restore(*self.learner.write_all())
        learner.window = copy.deepcopy(self.learner.window)
        reports, seconds, sizes = [], 0.0, []
        for number, batch in enumerate(batches(self.rest, settings.batch_size), start=1):
            started = time.process_time()
            reports.append(step(learner, batch))
            seconds += time.process_time() - started
            if number % settings.batches_per_version == 0:
                payloads = learner.write(learner.take_changed(), len(learner.table) + 1)
                sizes.append([len(encode_payload(payload)) for payload in payloads])
        losses = np.concatenate([report.class_loss_B for report in reports])
        served, own = np.mean(sizes, 0)
        end = hits(ranks(learner, self.kept))
        return {
            "hr_at_10": hits(np.concatenate([report.rank_B for report in reports])),
            "class_log_loss": float(losses.mean()),
            "then": self.then,
            "end": end,
            "forgotten": self.then - end,
            "bytes_served": float(served),
            "bytes_trainer": float(own),
            "seconds": seconds,
            "skipped_batches": sum(not report.learned for report in reports),
        }


# What is shown, with how many digits.
COLUMNS = {
    **{"hr_at_10": 4, "class_log_loss": 4, "then": 4, "end": 4, "forgotten": 4},
    **{"bytes_served": 0, "bytes_trainer": 0, "seconds": 1, "skipped_batches": 0},
}


def line(name: str, found: Sequence[dict[str, float]]) -> str:
    """Write the means of what was measured and how far they scatter."""
    cells = []
    for column, digits in COLUMNS.items():
        values = [each[column] for each in found]
        spread = f"+-{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.{digits}f}{spread}")
    return f"{name:20}" + "".join(f"{cell:>17}" for cell in cells)


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of feedback")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.strategies}
    for seed in arguments.seeds:
        start = Start(arguments.data, arguments.events, arguments.device, seed)
        for name, measured in found.items():
            measured.append(start.go_on(STRATEGIES[name]))
            print(line(f"{name} seed {seed}", measured[-1:]), file=sys.stderr, flush=True)
    print(f"{'':20}" + "".join(f"{column:>17}" for column in COLUMNS), file=sys.stderr)
    for name, measured in found.items():
        print(line(name, measured), file=sys.stderr)
    print(
        json.dumps(
            {
                "stream": arguments.data.name,
                "feedback": arguments.events,
                "learned_in_second_half": len(start.rest),
                "held_out_events": len(start.kept),
                "items": len(start.learner.table),
                "seeds": arguments.seeds,
                "settings": {name: STRATEGIES[name] for name in found},
                "strategies": found,
            }
        )
    )


if __name__ == "__main__":
    main()
