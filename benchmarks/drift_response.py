"""Drift response: how soon recommendations are good again after a planted change, by `drift_fading`.

Up to the change all runs are one: a process for each response goes on from there. Changes: the items known by then
exchange their names (`items`), as when a shop gives its ids out anew; `back` does the same and takes it back as much
feedback later; the users exchange theirs (`users`); the tastes of all simulated users turn (`tastes`).

Responses: none; `fading`, the setting's default; `boost`, `drift_boost` at 2 without fading; `always`, fading by the
same factor every 1,024 feedback whatever is found. Reported of the events after the change: HR@10 of the first 1,000,
2,000, 4,000 and all; after how many the mean of 500 first reaches 95% of what the first response ends at (its last
2,000); after how many it was found that what followed items misleads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drift import Feed, settings_for, simulated

from recsys.feedback_file import open_feedback_file
from recsys.feedback_file.stream import Chunk
from trainer.drift import TRANSITIONS
from trainer.evaluation.stream import Stream
from trainer.examples import batches, encode
from trainer.learner import Learner
from trainer.quality import MISS, NO_EVENT

RESPONSES: dict[str, dict[str, float]] = {
    "none": {"drift_fading": 1.0},
    "fading": {},
    "boost": {"drift_fading": 1.0, "drift_boost": 2.0},
    "always": {"drift_fading": 1.0},
}
ALWAYS_EVERY = 1024
AVERAGED, PLATEAU, RECOVERED = 500, 2000, 0.95
# How much was learned, what of a batch was hit, what was found in it.
Steps = Iterator[tuple[int, np.ndarray, frozenset[str]]]


def read(path: Path, feedback: int) -> Feed:
    """Read the beginning of a file."""
    file = open_feedback_file(path)
    chunks = list(file.chunks())
    contexts = [context for chunk in chunks for context in islice(file.contexts(chunk), len(chunk))]
    names = ("user_ids", "item_ids", "classes", "times_ms")
    columns = {name: np.concatenate([getattr(chunk, name) for chunk in chunks])[:feedback] for name in names}
    return Feed(file.classes, Chunk(np.arange(len(columns["classes"])), **columns), contexts[:feedback])


def exchanged(ids: np.ndarray, first: int, end: int, seed: int) -> np.ndarray:
    """Let the ids known before `first` exchange their names from there to `end`."""
    known = np.unique(ids[:first].astype(str))
    names = dict(zip(known.tolist(), np.random.default_rng(seed).permutation(known).tolist(), strict=True))
    changed = ids.copy()
    changed[first:end] = [names.get(each, each) for each in ids[first:end].tolist()]
    return changed


def planted(feed: Feed, change: str, first: int, after: int, seed: int) -> Feed:
    """Plant a change in a stream."""
    (chunk,) = feed.chunks()
    end = first + (after // 2 if change == "back" else after)
    if change == "users":
        chunk = replace(chunk, user_ids=exchanged(chunk.user_ids, first, end, seed))
    elif change in ("items", "back"):
        chunk = replace(chunk, item_ids=exchanged(chunk.item_ids, first, end, seed))
    return Feed(feed.classes, chunk, feed.contexts(chunk))


def learned(feed: Feed, learner: Learner, first: int) -> Steps:
    """Go over a stream; at `first` and after each batch yield how much was learned, what was hit, what was found."""
    feedback = 0
    for batch in batches(Stream(feed, learner.settings, learner).cases(), learner.settings.batch_size):
        if feedback == first:
            yield feedback, np.zeros(0), frozenset()
        report = learner.step(encode([case.event for case in batch], learner.settings), [case.seen for case in batch])
        feedback += len(batch)
        rank_P = report.rank_B[report.rank_B != NO_EVENT]
        if feedback > first:
            yield feedback, (rank_P != MISS) & (rank_P <= 10), report.drifted


def respond(feed: Feed, learner: Learner, first: int, responses: list[str]) -> dict[str, dict[str, Any]]:
    """Learn up to the change, then go on with each response in a process of its own; return what came of it."""
    steps = learned(feed, learner, first)
    next(steps)
    came: dict[str, dict[str, Any]] = {}
    for name in responses:
        reading, writing = os.pipe()
        if process := os.fork():
            os.close(writing)
            with open(reading) as pipe:
                came[name] = json.load(pipe)
            os.waitpid(process, 0)
            continue
        learner.settings = learner.settings.model_copy(update=RESPONSES[name])
        with open(writing, "w") as pipe:
            json.dump(followed(steps, learner, first, always=name == "always"), pipe)
        os._exit(0)
    plateau = np.mean(came[responses[0]]["hits"][-PLATEAU:])
    return {
        name: summary(np.array(each["hits"]), float(plateau)) | {"found": each["found"]} for name, each in came.items()
    }


def followed(steps: Steps, learner: Learner, first: int, *, always: bool) -> dict[str, list[int]]:
    """Go on to the end; return each event's hit, and after how many of them it was found that something misleads."""
    hits: list[int] = []
    found: list[int] = []
    for feedback, hit_P, drifted in steps:
        hits.extend(hit_P.astype(int).tolist())
        if always and (feedback - first) % ALWAYS_EVERY == 0:
            learner.fade(0.2)
        if TRANSITIONS in drifted:
            found.append(len(hits))
    return {"hits": hits, "found": found}


def summary(hit_P: np.ndarray, plateau: float) -> dict[str, Any]:
    """Return what is reported of hits in order."""
    running = np.convolve(hit_P, np.full(AVERAGED, 1 / AVERAGED), "valid")
    back = np.flatnonzero(running >= RECOVERED * plateau)
    means = {f"first_{n}": round(float(hit_P[:n].mean()), 4) for n in (1000, 2000, 4000) if n <= len(hit_P)}
    recovered = int(back[0]) + AVERAGED if len(back) else None
    return {**means, "all": round(float(hit_P.mean()), 4), "events": len(hit_P), "recovered_after": recovered}


def main() -> None:
    """Parse the command line and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of feedback; without one the simulator")
    parser.add_argument("--change", choices=("items", "back", "users", "tastes"), nargs="+", default=["items"])
    parser.add_argument("--first", type=int, default=12_032, help="feedback before the change: whole batches")
    parser.add_argument("--after", type=int, default=8000, help="feedback after it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--responses", choices=RESPONSES, nargs="+", default=list(RESPONSES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, after = arguments.first, arguments.after
    for change in arguments.change:
        for seed in arguments.seeds:
            if arguments.data:
                feed = read(arguments.data, first + after)
            else:
                feed = simulated(
                    seed, first + after, lambda step, change=change: float(change == "tastes" and step >= first)
                )
            feed = planted(feed, change, first, after, seed)
            learner = Learner(settings_for(feed), torch.device("cpu"))
            for name, found in respond(feed, learner, first, arguments.responses).items():
                where = arguments.data.name if arguments.data else "simulator"
                print(json.dumps({"stream": where, "change": change, "seed": seed, "response": name, **found}))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
