"""Tally: keep what every method said of every feedback, some 40 bytes each, and sum it up at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recsys.settings import Settings
from trainer.evaluation import measures
from trainer.evaluation.methods import Found, holds_clicks, holds_ratings
from trainer.evaluation.stream import Case
from trainer.quality import NO_EVENT, Rows

# A user with fewer history entries, an item with fewer choices than this is new.
NEW_BELOW = 5
WINDOW_EVENTS, WINDOW_STEP = 2000, 1000
SLICE_CUTOFFS = (10,)


class Tally:
    """Gather what was found of the same cases by several methods."""

    def __init__(self, settings: Settings, methods: Sequence[str]) -> None:
        self._settings = settings
        self._facts: dict[str, list[Any]] = {"class": [], "value": [], "entries": [], "choices": []}
        self._found: dict[str, list[Found]] = {name: [] for name in methods}
        self._shown: dict[str, set[int]] = {name: set() for name in methods}
        self.feedback = 0

    def add(self, cases: Sequence[Case], found: Mapping[str, Found]) -> None:
        """Take a batch of cases and what each method found of them."""
        self._facts["class"].append(np.array([case.event.feedback_class for case in cases], np.uint8))
        self._facts["value"].append(np.array([case.value for case in cases], np.float32))
        self._facts["entries"].append(np.array([len(case.seen) for case in cases], np.int32))
        self._facts["choices"].append(np.array([case.choices for case in cases], np.int32))
        for name, one in found.items():
            self._shown[name] |= one.shown
            one.shown = set()
            self._found[name].append(one)
        # Last: an interruption leaves at most what is not counted yet.
        self.feedback += len(cases)

    @property
    def events(self) -> int:
        """Return how much of the feedback was positive."""
        positive = np.array([c.positive for c in self._settings.classes])
        return int(positive[self._fact("class")].sum())

    def ranks(self, method: str) -> Rows | None:
        """Return a method's rank at every event, in order; None where it does not rank."""
        rank_B = self._all(method, "rank_B")
        return None if rank_B is None else rank_B[rank_B != NO_EVENT]

    def summary(self, method: str, items: int) -> dict[str, Any]:
        """Return all measures of one method; `items` is how many could have been recommended."""
        found: dict[str, Any] = {}
        rank_B = self._all(method, "rank_B")
        if rank_B is not None:
            found |= self._ranking(rank_B) | {"coverage_at_10": len(self._shown[method]) / max(1, items)}
        if holds_clicks(self._settings) and (probability_B := self._all(method, "probability_B")) is not None:
            found["clicks"] = self._clicks(probability_B)
        if holds_ratings(self._settings) and (value_B := self._all(method, "value_B")) is not None:
            median_B = self._all(method, "median_B")
            found["ratings"] = measures.values(self._fact("value"), value_B, value_B if median_B is None else median_B)
        if (loss_B := self._all(method, "class_loss_B")) is not None and len(loss_B):
            found["class_log_loss"] = float(loss_B.mean())
            found |= self._reports(method)
        return found

    def _ranking(self, rank_B: Rows) -> dict[str, Any]:
        event_B = rank_B != NO_EVENT
        ranks = rank_B[event_B]
        found: dict[str, Any] = measures.accuracy(ranks)
        for name, fact in (("new_users", "entries"), ("new_items", "choices")):
            part = ranks[self._fact(fact)[event_B] < NEW_BELOW]
            found[name] = {"events": len(part), **measures.accuracy(part, SLICE_CUTOFFS)}
        ends, rates = measures.moving(ranks, WINDOW_EVENTS, WINDOW_STEP, 10)
        found["moving"] = {"window": WINDOW_EVENTS, "ends": ends, "hr_at_10": rates}
        return found

    def _clicks(self, probability_B: measures.Floats) -> dict[str, Any]:
        positive = np.array([c.positive for c in self._settings.classes])
        happened_B = positive[self._fact("class")]
        parts = measures.tenths(len(happened_B)) if len(happened_B) >= 10 else []
        whole: dict[str, Any] = measures.clicks(happened_B, probability_B) if len(happened_B) else {}
        return whole | {"tenths": [measures.clicks(happened_B[part], probability_B[part]) for part in parts]}

    def _reports(self, method: str) -> dict[str, Any]:
        """Report on the classes over everything, and before and after learning where both were asked."""
        names = [c.name for c in self._settings.classes]
        class_B, said_B = self._fact("class"), self._all(method, "class_B")
        assert said_B is not None
        asked = [found.class_after_B is not None for found in self._found[method]]
        found = {"class_report": measures.class_report(class_B, said_B, names)}
        if any(asked):
            again_B = np.repeat(asked, [len(part) for part in self._facts["class"]])
            after = np.concatenate([f.class_after_B for f in self._found[method] if f.class_after_B is not None])
            found["class_report_before"] = measures.class_report(class_B[again_B], said_B[again_B], names)
            found["class_report_after"] = measures.class_report(class_B[again_B], after, names)
        return found

    def _fact(self, name: str) -> Any:
        parts = self._facts[name]
        return np.concatenate(parts)[: self.feedback] if parts else np.zeros(0, np.uint8)

    def _all(self, method: str, name: str) -> Any:
        parts = [getattr(found, name) for found in self._found[method]]
        return np.concatenate(parts)[: self.feedback] if parts and parts[0] is not None else None
