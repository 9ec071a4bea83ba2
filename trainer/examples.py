"""Examples: feedback as arrays of rows and small integers, and the window of earlier ones that replay draws from.

Shapes: B examples, L history length, P context places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from recsys.accounts import NOBODY
from recsys.encoding import Array, RowHistory, encode_contexts, encode_histories, to_histories
from recsys.item_table import PADDING_ROW
from recsys.network import Histories
from recsys.settings import Settings
from trainer.impressions import NONE, Impressions

T = TypeVar("T")
Integers = npt.NDArray[np.integer]
# Examples looked at together for items that are gone, so that it takes little memory.
FORGOTTEN_AT_ONCE = 4096


class Event(NamedTuple):
    """One feedback in rows: its item, class, time, history before it, context, key of its impression, account."""

    row: int
    feedback_class: int
    time_ms: int
    history: RowHistory
    context: Mapping[str, str]
    impression: int = NONE
    # See trainer.trust.
    account: int = NOBODY


@dataclass(frozen=True, slots=True)
class Examples:
    """Hold B examples as integer arrays; see recsys.network.Histories for the first three."""

    rows_BL: Array
    classes_BL: Array
    gaps_BL: Array
    item_B: Array
    class_B: Array
    # Context buckets, -1 where empty.
    context_BP: Array
    # See trainer.impressions.
    impression_B: Array
    # See trainer.trust.
    account_B: Array

    def __len__(self) -> int:
        return len(self.item_B)

    def histories(self, device: torch.device) -> Histories:
        """Return the histories as tensors on `device`."""
        return to_histories((self.rows_BL, self.classes_BL, self.gaps_BL), device)

    def take(self, index: Integers) -> Examples:
        """Return the examples at `index`, in its order."""
        return Examples(*(getattr(self, f.name)[index] for f in fields(self)))

    def without(self, gone_BL: npt.NDArray[np.bool_], gone_B: npt.NDArray[np.bool_]) -> Examples:
        """Return the same without some history entries, over which later ones close up, and without some items."""
        histories = close_up((self.rows_BL, self.classes_BL, self.gaps_BL), gone_BL)
        rows_BL, classes_BL, gaps_BL = histories
        item_B = np.where(gone_B, PADDING_ROW, self.item_B)
        return replace(self, rows_BL=rows_BL, classes_BL=classes_BL, gaps_BL=gaps_BL, item_B=item_B)


def close_up(histories: Sequence[Integers], gone_BL: npt.NDArray[np.bool_]) -> list[Array]:
    """Leave entries out of the rows, classes and gaps of histories, as if they had not been encoded."""
    kept_BL = (histories[0] != PADDING_ROW) & ~gone_BL
    # What is kept stands at the end, in its order.
    order_BL = np.argsort(kept_BL, axis=1, kind="stable")
    return [np.take_along_axis(np.where(kept_BL, each, 0).astype(np.int64), order_BL, 1) for each in histories]


def learnable(
    positive_C: npt.NDArray[np.bool_], item_B: Integers, class_B: Integers, rows_BL: Integers
) -> npt.NDArray[np.bool_]:
    """Tell what a network of histories learns from: choices of an item that has a row, with something before them."""
    found: npt.NDArray[np.bool_] = positive_C[class_B] & (item_B != PADDING_ROW) & (rows_BL[:, -1] != PADDING_ROW)
    return found


def join(parts: Sequence[Examples]) -> Examples:
    """Put examples one after another."""
    return Examples(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Examples)))


def encode(events: Sequence[Event], settings: Settings) -> Examples:
    """Write events as arrays; only the last `history_length` entries of a history are used."""
    return Examples(
        *encode_histories([e.history for e in events], [e.time_ms for e in events], settings.history_length),
        np.array([e.row for e in events], np.int64),
        np.array([e.feedback_class for e in events], np.int64),
        encode_contexts([e.context for e in events], settings),
        np.array([e.impression for e in events], np.int64),
        np.array([e.account for e in events], np.int64),
    )


class Followed(NamedTuple):
    """M examples of a batch that follow an impression of their own: their places in it, and the impressions.

    The example added last is 1 old; at 0 and below are those of the batch itself, in its order.
    """

    place_M: Array
    impressions: Examples
    age_M: Array


class ReplayWindow:
    """Keep the last `capacity` examples; the same examples in the same order give the same draws.

    What is drawn may be without an item: row 0.
    """

    def __init__(self, settings: Settings) -> None:
        capacity, length = settings.replay_capacity, settings.history_length
        self._capacity = capacity
        self._added = 0
        self._impressions = Impressions(settings)
        self._positive_C = np.array([c.positive for c in settings.classes])
        shapes = {
            "rows_BL": ((length,), np.int32),
            "classes_BL": ((length,), np.uint8),
            "gaps_BL": ((length,), np.uint8),
            "item_B": ((), np.int32),
            "class_B": ((), np.uint8),
            "context_BP": ((settings.max_context,), np.int32),
            "impression_B": ((), np.int64),
            "account_B": ((), np.int32),
        }
        self._arrays: dict[str, Integers] = {
            name: np.zeros((capacity, *shape), dtype) for name, (shape, dtype) in shapes.items()
        }

    def __len__(self) -> int:
        return min(self._added, self._capacity)

    def add(self, examples: Examples) -> None:
        """Append examples, over the oldest ones when full."""
        places = (self._added + np.arange(len(examples))) % self._capacity
        for name, array in self._arrays.items():
            array[places] = getattr(examples, name)
        self._impressions.add(examples.impression_B, examples.class_B, self._added)
        self._added += len(examples)

    def followed(self, examples: Examples) -> Followed | None:
        """Return which of the examples, not yet added, follow an impression in the window or among them, if any do."""
        number_B = self._impressions.find(examples.impression_B, examples.class_B, self._added)
        place_M = np.flatnonzero(number_B >= 0)
        if not len(place_M):
            return None
        age_M = self._added - number_B[place_M]
        before_M = age_M > 0
        index_M = np.where(before_M, len(examples) + np.cumsum(before_M) - 1, -age_M)
        return Followed(place_M, join([examples, self._aged(age_M[before_M])]).take(index_M), age_M)

    def newest(self, count: int) -> Examples:
        """Return the newest `count` examples, or all there are, oldest first."""
        return self._aged(np.arange(min(count, len(self)), 0, -1))

    def columns(self, count: int, *names: str) -> list[Integers]:
        """Return arrays of the newest `count` examples, or all there are, oldest first; not to be written to."""
        until = self._added % self._capacity or min(self._added, self._capacity)
        first = until - min(count, len(self))
        if first >= 0:
            return [self._arrays[name][first:until] for name in names]
        return [np.concatenate([self._arrays[name][first:], self._arrays[name][:until]]) for name in names]

    def of_item(self, row: int) -> tuple[Array, Array, Array]:
        """Return ages, classes and impressions' keys of all feedback on an item in the window."""
        places = np.flatnonzero(self._arrays["item_B"][: len(self)] == row)
        class_E, key_E = (self._arrays[name][places].astype(np.int64) for name in ("class_B", "impression_B"))
        return self._age(places), class_E, key_E

    def _age(self, places: Array) -> Array:
        ages: Array = (self._added - 1 - places) % self._capacity + 1
        return ages

    def _aged(self, age_M: Array) -> Examples:
        places = (self._added - age_M) % self._capacity
        return Examples(**{name: array[places].astype(np.int64) for name, array in self._arrays.items()})

    def forget(self, gone_I: npt.NDArray[np.bool_]) -> None:
        """Leave the items of some rows out of all that is kept; `gone_I` tells of each row of the table."""
        size = len(self)
        for first in range(0, size, FORGOTTEN_AT_ONCE):
            here = slice(first, min(first + FORGOTTEN_AT_ONCE, size))
            item_B, rows_BL = self._arrays["item_B"][here], self._arrays["rows_BL"][here]
            item_B[gone_I[item_B]] = PADDING_ROW
            gone_BL = gone_I[rows_BL]
            lines = np.flatnonzero(gone_BL.any(1))
            histories = [self._arrays[name][here] for name in ("rows_BL", "classes_BL", "gaps_BL")]
            for array, closed in zip(
                histories, close_up([each[lines] for each in histories], gone_BL[lines]), strict=True
            ):
                array[lines] = closed

    def draw(self, count: int, random: np.random.Generator) -> Examples:
        """Draw `count` examples uniformly, with replacement; none when there are none."""
        # By age, so that a window rebuilt from the log alone gives the same draws whatever its first place was.
        return self._aged(random.integers(1, len(self) + 1, count if len(self) else 0))

    def draw_choices(self, count: int, random: np.random.Generator, newest: int | None = None) -> Examples:
        """Draw likewise, but of what is `learnable` alone, among the `newest` examples (default all)."""
        if not count:
            return self._aged(np.zeros(0, np.int64))
        known = (self._arrays[name][: len(self)] for name in ("item_B", "class_B", "rows_BL"))
        place_E = np.flatnonzero(learnable(self._positive_C, *known))
        # The newest first: places ascend with time but where the oldest were written over.
        turn = np.searchsorted(place_E, self._added % self._capacity)
        age_E = self._age(np.concatenate([place_E[:turn][::-1], place_E[turn:][::-1]]))
        if newest is not None:
            age_E = age_E[: np.searchsorted(age_E, newest, side="right")]
        return self._aged(age_E[random.integers(0, max(1, len(age_E)), count if len(age_E) else 0)])


def batches(stream: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut a stream into lists of `size` events; the last may be shorter."""
    batch: list[T] = []
    for one in stream:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
