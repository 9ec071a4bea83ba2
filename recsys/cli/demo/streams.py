"""Streams: who comes next and what they do with the recommendations: a simulated audience, or a file played back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from recsys.audience import BEST_CLICK, LOOK_FADING, Audience
from recsys.catalog import Item
from recsys.client import Recommendations
from recsys.feedback import Feedback
from recsys.feedback_file import BadRow, FeedbackFile
from recsys.settings import FeedbackClass, Settings
from recsys.v1 import catalog_pb2

# Recommendations asked for before each event.
COUNT = 10
# The audience: one visit in so many is to look at recommendations, this many of them; the others are own choices.
LOOK_EVERY = 5
SHELF = 5
# So many events a user makes few enough that nobody runs out of items and users keep arriving.
EVENTS_PER_USER = 40
# How far a file is read ahead to find users whose turn it is: a single user may fill pages of it.
READ_AHEAD = 256


@dataclass(frozen=True, slots=True)
class Act:
    """Hold what a user did on one visit.

    `chosen` is the item that the user took of their own accord: what the recommendations are tested against. `best_hit`
    is the probability that the best possible ten hold it. `best_clicks` is how many clicks the best possible shelf
    would have got in place of the one shown.
    """

    feedback: Sequence[Feedback]
    chosen: str | None = None
    best_hit: float | None = None
    best_clicks: float | None = None
    arrived: Sequence[Item] = ()


@dataclass(frozen=True, slots=True)
class Visit:
    """Hold a visit of a user; `act` is called with the recommendations made to them, None where none are `wanted`."""

    user_id: str
    act: Callable[[Recommendations | None], Act]
    wanted: bool = True


class Stream(Protocol):
    """What a demo needs of a stream; `ahead` is how many visits may be begun before the first of them is over."""

    name: str
    ahead: int
    total: int
    bad_rows: int

    @property
    def done(self) -> int:
        """Count the events that are over."""

    def items(self) -> list[Item]:
        """List the items that are known beforehand."""

    def __iter__(self) -> Iterator[Visit]:
        """Go through the visits in the order in which they begin."""


class AudienceStream:
    """Let made-up users visit until they have chosen and clicked `events` times.

    Most visits end with an own choice. On one in LOOK_EVERY the user looks at the first SHELF recommendations, of which
    each becomes an impression or a click.
    """

    name = "simulated audience"
    bad_rows = 0

    def __init__(self, seed: int, events: int, in_flight: int) -> None:
        # Users are drawn among those present at the time, so never far ahead.
        self.ahead = in_flight
        self.total = events
        self._audience = Audience(seed, users=max(50, events // EVENTS_PER_USER), events=events)
        self._known_until = 0

    @property
    def done(self) -> int:
        """Count choices and clicks."""
        return self._audience.step

    def items(self) -> list[Item]:
        """List the items that are there from the start."""
        return [_item(each) for each in self._audience.items()]

    def __iter__(self) -> Iterator[Visit]:
        """Draw the next user as long as there are events to come."""
        visit = 0
        while self._audience.step < self.total:
            visit += 1
            user_id = self._audience.next_user()
            yield Visit(user_id, partial(self._look if visit % LOOK_EVERY == 0 else self._choose, user_id))

    def _choose(self, user_id: str, recommendations: Recommendations | None) -> Act:
        best = self._audience.best_hit_rate(user_id, COUNT)
        item_id = self._audience.choose(user_id)
        return Act([Feedback(user_id, item_id, "click")], item_id, best_hit=best, arrived=self._arrived())

    def _look(self, user_id: str, recommendations: Recommendations | None) -> Act:
        assert recommendations is not None
        best = self._best_clicks(user_id)
        answers = self._audience.respond(user_id, [i.item_id for i in recommendations.items[:SHELF]])
        feedback = [
            Feedback(
                user_id,
                item_id,
                "click" if clicked else "impression",
                recommendation_id=recommendations.recommendation_id,
            )
            for item_id, clicked in answers
        ]
        return Act(feedback, best_clicks=best if answers else None, arrived=self._arrived())

    def _best_clicks(self, user_id: str) -> float:
        likely = np.sort(self._audience.choice_probabilities(user_id))[::-1][:SHELF]
        looks = LOOK_FADING ** np.arange(len(likely))
        return float(np.sum(looks * BEST_CLICK * np.sqrt(likely / max(likely[0], 1e-300))))

    def _arrived(self) -> list[Item]:
        arrived = [_item(each) for each in self._audience.new_items(self._known_until)]
        self._known_until = self._audience.step
        return arrived


class FileStream:
    """Play a file back: each feedback is a visit; recommendations are wanted before those of positive classes."""

    ahead = READ_AHEAD

    def __init__(self, path: Path, file: FeedbackFile, settings: Settings, events: int | None) -> None:
        self.name = f"{path.name} ({file.layout})"
        self.total = min(events or file.rows, file.rows)
        self.done = 0
        self.bad_rows = 0
        self._file = file
        self._positive = {c.name for c in settings.classes if c.positive}

    def items(self) -> list[Item]:
        """Read the titles that stand beside the file."""
        return [_item(each) for each in self._file.titles()]

    def __iter__(self) -> Iterator[Visit]:
        """Go through the file's feedback in time order."""
        begun = 0
        for row in self._file:
            if begun == self.total:
                return
            if isinstance(row, BadRow):
                self.bad_rows += 1
                continue
            begun += 1
            yield Visit(row.user_id, partial(self._act, row), wanted=row.feedback_class in self._positive)

    def _act(self, feedback: Feedback, recommendations: Recommendations | None) -> Act:
        self.done += 1
        return Act([feedback], feedback.item_id if feedback.feedback_class in self._positive else None)


def holds_audience_classes(classes: Sequence[FeedbackClass]) -> bool:
    """Tell whether an audience's feedback can be logged under these classes."""
    return {"impression", "click"} <= {c.name for c in classes}


def _item(item: catalog_pb2.Item) -> Item:
    return Item(item.item_id, item.title, tuple(item.categories))
