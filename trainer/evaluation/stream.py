"""Stream: a file's feedback in time order, each with what was known before it; the same cases for every method."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from recsys.accounts import account
from recsys.encoding import RowHistory
from recsys.feedback_file import FeedbackFile
from recsys.settings import Settings
from trainer.arrivals import Arrivals
from trainer.examples import Event
from trainer.quality import Rows

NOT_CHOSEN = -1


@dataclass(slots=True)
class Case:
    """One feedback, and what was known when it came.

    `event` has rows as the learner counts them. Items that were chosen have numbers beside, in the order of their first
    choice: `item` is this one's (`known` if nobody chose it before and it is chosen now, else NOT_CHOSEN), `chosen` the
    user's earlier choices, `hidden` the distinct ones that the user has. `seen` are the rows that the user has.

    Arrays are views of what grows on: all cases of a file take little more than the file.
    """

    event: Event
    positive: bool
    value: float
    user_id: str
    user: int
    item: int
    known: int
    chosen: Rows
    seen: Rows
    # Of every row, the item's number by now.
    numbers: Rows
    # How often the item was chosen before; milliseconds since the user's last history entry, -1 without one.
    choices: int
    idle_ms: int

    @property
    def new(self) -> bool:
        """Return whether nobody has chosen the item before."""
        return self.choices == 0

    @property
    def hidden(self) -> Rows:
        """Return the numbers of the items that the user has."""
        number = self.numbers[self.seen]
        # What others chose later was no choice yet.
        found: Rows = number[(number != NOT_CHOSEN) & (number < self.known)]
        return found


class _Growing:
    """An array that grows at its end; earlier views of it stay as they were."""

    def __init__(self) -> None:
        self._values = np.empty(8, np.int64)
        self._size = 0

    def append(self, value: int) -> None:
        if self._size == len(self._values):
            self._values = np.concatenate([self._values, np.empty_like(self._values)])
        self._values[self._size] = value
        self._size += 1

    def view(self, last: int | None = None) -> Rows:
        return self._values[0 if last is None else max(0, self._size - last) : self._size]


class _User:
    def __init__(self, number: int, user_id: str) -> None:
        self.number, self.account = number, account(user_id)
        self.rows, self.classes, self.times_ms = _Growing(), _Growing(), _Growing()
        # When the last entry of the history was, None without one.
        self.last_ms: int | None = None
        self.has: set[int] = set()
        self.seen, self.chosen = _Growing(), _Growing()

    def history(self, length: int) -> RowHistory:
        return RowHistory(self.rows.view(length), self.classes.view(length), self.times_ms.view(length))

    def add(self, event: Event) -> None:
        """Take a feedback into the history."""
        self.rows.append(event.row)
        self.classes.append(event.feedback_class)
        self.times_ms.append(event.time_ms)
        self.last_ms = event.time_ms
        if event.row not in self.has:
            self.has.add(event.row)
            self.seen.append(event.row)


class Numbering(Protocol):
    """Know which row is which item's."""

    def row(self, item_id: str) -> int:
        """Return the item's row, a new one if it has none."""


class Stream:
    """Go through one file once; rows are allotted as items appear.

    By a learner where what is read is learned next, by its Arrivals where the file is read ahead of it.
    """

    def __init__(self, file: FeedbackFile, settings: Settings, items: Numbering | None = None) -> None:
        self._file, self._settings = file, settings
        self._items: Numbering = Arrivals() if items is None else items
        self._users: dict[str, _User] = {}
        self._numbers = np.full(1024, NOT_CHOSEN)
        self._choices = array("q")
        self.feedback = 0
        self.bad_rows = 0

    @property
    def items(self) -> int:
        """Return how many items were chosen so far."""
        return len(self._choices)

    @property
    def users(self) -> int:
        """Return how many users there were so far."""
        return len(self._users)

    def cases(self, limit: int | None = None) -> Iterator[Case]:
        """Yield the first `limit` feedback (default all)."""
        for chunk in self._file.chunks():
            self.bad_rows += len(chunk.bad)
            columns = (chunk.user_ids, chunk.item_ids, chunk.classes, chunk.times_ms)
            rows = zip(*(column.tolist() for column in columns), self._file.contexts(chunk), strict=False)
            for user_id, item_id, index, time_ms, context in rows:
                if limit is not None and self.feedback >= limit:
                    return
                self.feedback += 1
                user = self._users.get(user_id)
                if user is None:
                    user = _User(len(self._users), user_id)
                    self._users[user_id] = user
                history = user.history(self._settings.history_length)
                event = Event(self._row(item_id), index, time_ms, history, context, account=user.account)
                yield self._case(user_id, user, event)

    def _case(self, user_id: str, user: _User, event: Event) -> Case:
        feedback_class = self._settings.classes[event.feedback_class]
        row, known = event.row, self.items
        number = int(self._numbers[row])
        case = Case(
            event=event,
            positive=feedback_class.positive,
            value=feedback_class.worth,
            user_id=user_id,
            user=user.number,
            item=known if number == NOT_CHOSEN and feedback_class.positive else number,
            known=known,
            chosen=user.chosen.view(),
            seen=user.seen.view(),
            numbers=self._numbers,
            choices=0 if number == NOT_CHOSEN else self._choices[number],
            idle_ms=-1 if user.last_ms is None else event.time_ms - user.last_ms,
        )
        if feedback_class.positive:
            if number == NOT_CHOSEN:
                self._numbers[row] = known
                self._choices.append(0)
            self._choices[case.item] += 1
            user.chosen.append(case.item)
        if feedback_class.history:
            user.add(event)
        return case

    def _row(self, item_id: str) -> int:
        row = self._items.row(item_id)
        if row >= len(self._numbers):
            self._numbers = np.concatenate([self._numbers, np.full(max(row, len(self._numbers)), NOT_CHOSEN)])
        return row
