"""Methods: the learner and those it is compared with, behind one door: test a batch of cases, then learn it."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from recsys.settings import Settings
from trainer.arrivals import Arrivals, held
from trainer.baselines import (
    BiasedFactorisation,
    ClickRegression,
    IncrementalFactorisation,
    ItemNeighbours,
    ItemScorer,
    Popularity,
    SequentialCooccurrence,
    best,
    place,
)
from trainer.evaluation.measures import Floats
from trainer.evaluation.stream import Case
from trainer.examples import Examples, batches, encode
from trainer.full_ranking import MASKED, Ranked
from trainer.learner import Learner
from trainer.prequential import Prequential, StepReport
from trainer.quality import MISS, NO_EVENT, Rows

RECSYS = "recsys"
DECAY = 0.999
# Which items are recommended at all is asked of every so many events, for so many items each.
SHOWN_EVERY, SHOWN = 8, 10
# Every so many batches the classes are asked again after the batch was learned.
ASKED_AGAIN_EVERY = 8


@dataclass(slots=True)
class Found:
    """What a method said of B cases before it learned them; None where it says nothing of the kind.

    `rank_B` is 1 for the best, MISS, or NO_EVENT where feedback is not positive; `class_after_B` what the method says
    of the classes once it has learned the cases, where it was asked.
    """

    rank_B: Rows | None = None
    shown: set[int] = field(default_factory=set)
    probability_B: Floats | None = None
    item_loss_B: Floats | None = None
    class_loss_B: Floats | None = None
    value_B: Floats | None = None
    median_B: Floats | None = None
    class_B: Rows | None = None
    class_after_B: Rows | None = None


class Method(Protocol):
    """Say what will happen, then learn what did."""

    def run(self, cases: Sequence[Case], *, learn: bool = True) -> Found:
        """Test cases in time order, each before it is learned; without `learn` test them alone."""

    def learn(self, cases: Sequence[Case]) -> None:
        """Learn cases in time order without testing them."""


class ItemMethod:
    """Rank items by a scorer, event by event."""

    def __init__(self, scorer: ItemScorer) -> None:
        self._scorer = scorer
        self._scores = np.empty(1024)
        self._known = self._events = 0

    def run(self, cases: Sequence[Case], *, learn: bool = True) -> Found:
        """Test cases in time order, each before it is learned; without `learn` test them alone."""
        found = Found(rank_B=np.full(len(cases), NO_EVENT))
        for b, case in enumerate(cases):
            if case.positive:
                assert found.rank_B is not None
                found.rank_B[b] = self._rank(case, found.shown)
                if learn:
                    self._learn(case)
        return found

    def learn(self, cases: Sequence[Case]) -> None:
        """Learn cases in time order without testing them."""
        for case in cases:
            if case.positive:
                self._learn(case)

    def _learn(self, case: Case) -> None:
        self._scorer.learn(case.user, case.item, case.chosen)
        self._known = max(self._known, case.item + 1)

    def _rank(self, case: Case, shown: set[int]) -> int:
        self._events += 1
        show = self._events % SHOWN_EVERY == 0
        if case.item >= self._known and not show:
            return MISS
        chosen, hidden = case.chosen, case.hidden
        if self._known < case.known:
            # What was chosen since it learned last, it does not know.
            chosen, hidden = chosen[chosen < self._known], hidden[hidden < self._known]
        if self._known > len(self._scores):
            self._scores = np.empty(max(self._known, 2 * len(self._scores)))
        scores = self._scores[: self._known]
        self._scorer.score(case.user, chosen, scores)
        own = scores[case.item] if case.item < self._known else -np.inf
        scores[hidden] = -np.inf
        if show:
            shown.update(best(scores, SHOWN).tolist())
        if case.item >= self._known:
            return MISS
        # Chosen again it is looked for, though it would not be shown.
        scores[case.item] = own
        return place(scores, case.item)


class RatingMethod:
    """Predict values by factorisation."""

    def __init__(self) -> None:
        self._model = BiasedFactorisation()

    def run(self, cases: Sequence[Case], *, learn: bool = True) -> Found:
        """Test cases in time order, each before it is learned; without `learn` test them alone."""
        value_B = np.empty(len(cases))
        for b, case in enumerate(cases):
            value_B[b] = self._model.predict(case.user, case.event.row)
            if learn:
                self._model.learn(case.user, case.event.row, case.value)
        return Found(value_B=value_B)

    def learn(self, cases: Sequence[Case]) -> None:
        """Learn cases in time order without testing them."""
        for case in cases:
            self._model.learn(case.user, case.event.row, case.value)


class ClickMethod:
    """Predict whether feedback is positive by logistic regression."""

    def __init__(self) -> None:
        self._model = ClickRegression()

    def run(self, cases: Sequence[Case], *, learn: bool = True) -> Found:
        """Test cases in time order, each before it is learned; without `learn` test them alone."""
        probability_B = np.empty(len(cases))
        for b, case in enumerate(cases):
            features = self._features(case)
            probability_B[b] = self._model.predict(features)
            if learn:
                self._model.learn(features, case.positive)
        return Found(probability_B=probability_B)

    def learn(self, cases: Sequence[Case]) -> None:
        """Learn cases in time order without testing them."""
        for case in cases:
            self._model.learn(self._features(case), case.positive)

    def _features(self, case: Case) -> Sequence[int]:
        event = case.event
        idle = None if case.idle_ms < 0 else case.idle_ms / 1000
        return self._model.features(event.row, np.asarray(event.history.rows).tolist(), idle, event.context)


class LearnerMethod:
    """Test and learn as the trainer does, a batch at a time.

    `arrivals` give rows to items as learning comes to them; without any all have theirs.
    """

    def __init__(self, learner: Learner, arrivals: Arrivals | None = None) -> None:
        self.learner, self.arrivals = learner, arrivals
        settings = learner.settings
        self._settings = settings
        self._prequential = Prequential(settings, learner.network, learner.table)
        self._positive = np.array([c.positive for c in settings.classes])
        self._worth = np.array([c.worth for c in settings.classes])
        self._events = self._batches = 0
        self.skipped = 0

    def run(self, cases: Sequence[Case], *, learn: bool = True) -> Found:
        """Test cases in time order, all of a call before any is learned; without `learn` test them alone."""
        examples, seen = self._encoded(cases, learn=learn)
        rank_B = np.array([MISS if case.positive else NO_EVENT for case in cases], np.int64)
        found = Found(rank_B=rank_B)
        tester = self.learner.prequential if learn else self._prequential
        tester.watch = self._watcher(cases, rank_B, found.shown)
        try:
            if learn:
                report = self.learner.step(examples, seen)
                self.skipped += not report.learned
            else:
                report = self._test(examples, seen)
        finally:
            tester.watch = None
        probability_BC = report.class_probability_BC.astype(np.float64)
        found.probability_B = probability_BC[:, self._positive].sum(1)
        found.item_loss_B, found.class_loss_B = report.item_loss_B, report.class_loss_B
        found.value_B = probability_BC @ self._worth
        found.median_B = self._median(probability_BC)
        found.class_B = probability_BC.argmax(1)
        if learn:
            self._batches += 1
            if self._batches % ASKED_AGAIN_EVERY == 0:
                found.class_after_B = self._test(examples, seen).class_probability_BC.argmax(1)
        return found

    def learn(self, cases: Sequence[Case]) -> None:
        """Learn cases in time order, in batches as the trainer does."""
        for batch in batches(cases, self._settings.batch_size):
            report = self.learner.step(*self._encoded(batch, learn=True))
            self.skipped += not report.learned

    def _encoded(self, cases: Sequence[Case], *, learn: bool) -> tuple[Examples, list[Rows]]:
        """Return examples and what each user has; what is not learned may be of items without rows, and is without."""
        examples, seen = encode([case.event for case in cases], self._settings), [case.seen for case in cases]
        if self.arrivals is None:
            return examples, seen
        if learn:
            self.arrivals.reach(examples)
        return held(examples, seen, self.learner.table)

    def _median(self, probability_BC: Floats) -> Floats:
        """Return the least worth that is reached with a probability of a half."""
        order_C = self._worth.argsort(kind="stable")
        reached_BC = probability_BC[:, order_C].cumsum(1) >= 0.5
        median_B: Floats = self._worth[order_C][reached_BC.argmax(1)]
        return median_B

    @torch.no_grad()
    def _test(self, examples: Examples, seen: list[Rows]) -> StepReport:
        report, _ = self._prequential.test(examples, seen, self.learner.table.standing())
        return report

    def _watcher(self, cases: Sequence[Case], rank_B: Rows, shown: set[int]) -> Callable[[Rows, Ranked], None]:
        """Take the learner's ranks; where it has none rank by the code of all methods, from the same scores."""

        def watch(part: Rows, found: Ranked) -> None:
            rank_B[part] = found.rank_B
            assert found.scores_BI is not None
            # Synchronises with the GPU: scores leave to be ranked.
            for b, scores in zip(part.tolist(), found.scores_BI.cpu().numpy(), strict=True):
                if rank_B[b] == MISS:
                    # Its own item is among what is ranked, had already or not.
                    rank_B[b] = place(scores, cases[b].event.row)
                self._events += 1
                if self._events % SHOWN_EVERY == 0:
                    rows = best(scores, SHOWN)
                    shown.update(rows[scores[rows] > MASKED].tolist())

        return watch


BASELINES: dict[str, Callable[[], Method]] = {
    "popularity": lambda: ItemMethod(Popularity()),
    "popularity_decayed": lambda: ItemMethod(Popularity(DECAY)),
    "item_knn": lambda: ItemMethod(ItemNeighbours()),
    "cooccurrence": lambda: ItemMethod(SequentialCooccurrence()),
    "isgd": lambda: ItemMethod(IncrementalFactorisation()),
    "biased_mf": RatingMethod,
    "logistic_regression": ClickMethod,
}


def holds_clicks(settings: Settings) -> bool:
    """Tell whether some feedback is positive and some is not."""
    return len({c.positive for c in settings.classes}) == 2


def holds_ratings(settings: Settings) -> bool:
    """Tell whether all feedback is positive and its classes differ in worth."""
    return not holds_clicks(settings) and len({c.worth for c in settings.classes}) > 1


def suitable(settings: Settings) -> list[str]:
    """Name the methods that have something to say on feedback of these classes, the learner first."""
    fits = {"biased_mf": holds_ratings(settings), "logistic_regression": holds_clicks(settings)}
    return [RECSYS, *(name for name in BASELINES if fits.get(name, True))]


def held_bytes(method: object) -> int:
    """Count the bytes of everything that a method holds, tensors and arrays included; what is shared counts too."""
    total, waiting, found = 0, [method], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in found or isinstance(one, type | types.ModuleType | types.FunctionType | types.CodeType):
            continue
        found.add(id(one))
        if isinstance(one, Tensor):
            total += one.untyped_storage().nbytes()
        else:
            total += sys.getsizeof(one)
        waiting.extend(gc.get_referents(one))
    return total
