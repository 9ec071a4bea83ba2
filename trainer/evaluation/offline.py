"""Offline protocols: taught on one part of the file, tested on another; what each does stands in its docstring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from recsys.errors import InputFileError
from trainer.evaluation import measures
from trainer.evaluation.contest import Contest, Teaching
from trainer.evaluation.stream import Case
from trainer.evaluation.tally import Tally

# Of what is learned from, the latest part says when to stop.
VALIDATION_SHARE = 0.1
PERIOD_CUTOFF = 20


def leave_one_out(contest: Contest, teaching: Teaching, limit: int | None = None) -> dict[str, Any]:
    """Test on each user's last event, stop by the last but one, learn from all the others.

    All items are ranked but those that the user has. Users of fewer than three events are learned from alone. What is
    learned from may be later than what is tested on: figures are those of the literature on sequences, not those of a
    system in use.
    """
    cases = contest.cases(limit)
    last: dict[int, list[int]] = {}
    for place, case in enumerate(cases):
        if case.positive:
            last.setdefault(case.user, []).append(place)
    tested = {places[-1] for places in last.values() if len(places) > 2}
    kept = {places[-2] for places in last.values() if len(places) > 2}
    if not tested:
        raise InputFileError("no user of the file has three events")
    apart = tested | kept
    contest.teach(
        [case for place, case in enumerate(cases) if place not in apart],
        [cases[place] for place in sorted(kept)],
        replace(teaching, timeless=True),
    )
    tally = contest.test([cases[place] for place in sorted(tested)])
    return contest.result("leave-one-out", _methods(contest, tally), tally)


def temporal(contest: Contest, teaching: Teaching, share: float, limit: int | None = None) -> dict[str, Any]:
    """Learn from the first `share` of the file, predict every later event: once frozen, once learning on.

    Frozen, a user's history goes on, but nothing is learned any more.
    """
    cases = contest.cases(limit)
    split = round(share * len(cases))
    if not 0 < split < len(cases):
        raise InputFileError("the file holds too little feedback to be cut in two")
    _teach_part(contest, cases[:split], teaching)
    frozen = contest.test(cases[split:])
    found = [method | {"name": f"{method['name']}, frozen"} for method in _methods(contest, frozen)]
    learning = contest.test(cases[split:], learn=True)
    found += [method | {"name": f"{method['name']}, learning on"} for method in _methods(contest, learning)]
    return contest.result("temporal", found, learning, learned_first=split)


def periods(contest: Contest, teaching: Teaching, count: int, limit: int | None = None) -> dict[str, Any]:
    """Learn from one period of time alone, going on from the weights before; test on every event of the next.

    Accuracy is the mean over the periods tested (Mi, Lin and Faltings, ADER, RecSys 2020: Recall@20 and MRR@20).
    Periods are equal spans of time; those in which nothing happened are left out.
    """
    cases = contest.cases(limit)
    parts = _periods(cases, count)
    if len(parts) < 2:
        raise InputFileError("the file's feedback lies in a single period of time")
    tallies = []
    for before, after in pairwise(parts):
        _teach_part(contest, before, teaching)
        tallies.append(contest.test(after))
    return contest.result(
        "periods", [_mean_over(contest, name, tallies) for name in contest.names], tallies[-1], periods=len(parts)
    )


def _teach_part(contest: Contest, cases: Sequence[Case], teaching: Teaching) -> None:
    """Teach on the first part, stop by the rest, and learn that too."""
    kept = round(VALIDATION_SHARE * len(cases))
    contest.teach(cases[: len(cases) - kept], cases[len(cases) - kept :], teaching)
    contest.learn(cases[len(cases) - kept :])


def _periods(cases: Sequence[Case], count: int) -> list[list[Case]]:
    if not cases:
        return []
    times = np.array([case.event.time_ms for case in cases])
    edges = np.linspace(times[0], times[-1] + 1, count + 1)
    places = np.searchsorted(times, edges)
    return [list(cases[start:end]) for start, end in pairwise(places.tolist()) if end > start]


def _methods(contest: Contest, tally: Tally) -> list[dict[str, Any]]:
    return [{"name": name, **contest.summary(name, tally)} for name in contest.names]


def _mean_over(contest: Contest, name: str, tallies: Sequence[Tally]) -> dict[str, Any]:
    """Sum up one method by the mean of its accuracy in each period, each weighing the same."""
    ranks = [tally.ranks(name) for tally in tallies]
    found = [measures.accuracy(each) for each in ranks if each is not None and len(each)]
    mean = {key: float(np.mean([one[key] for one in found])) for key in (found[0] if found else {})}
    last = contest.summary(name, tallies[-1])
    by_period = [{key: one[key] for key in ("hr_at_20", "mrr_at_20")} for one in found]
    return {"name": name, **{key: last[key] for key in ("seconds", "bytes")}, **mean, "by_period": by_period}
