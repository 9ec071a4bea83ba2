"""Examples: feedback as arrays of rows and small integers, and the window of earlier ones that replay draws from.

Shapes: B examples, L history length, P context places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from recsys.encoding import Array, RowHistory, encode_contexts, encode_histories, to_histories
from recsys.network import Histories
from recsys.settings import Settings

T = TypeVar("T")


class Event(NamedTuple):
    """One feedback in rows: its item, class index, time, history before it, and context."""

    row: int
    feedback_class: int
    time_ms: int
    history: RowHistory
    context: Mapping[str, str]


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

    def __len__(self) -> int:
        return len(self.item_B)

    def histories(self, device: torch.device) -> Histories:
        """Return the histories as tensors on `device`."""
        return to_histories((self.rows_BL, self.classes_BL, self.gaps_BL), device)

    def take(self, index: npt.NDArray[np.integer]) -> Examples:
        """Return the examples at `index`, in its order."""
        return Examples(*(getattr(self, f.name)[index] for f in fields(self)))


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
    )


class ReplayWindow:
    """Keep the last `capacity` examples; the same examples in the same order give the same draws."""

    def __init__(self, settings: Settings) -> None:
        capacity, length = settings.replay_capacity, settings.history_length
        self._capacity = capacity
        self._added = 0
        shapes = {
            "rows_BL": ((length,), np.int32),
            "classes_BL": ((length,), np.uint8),
            "gaps_BL": ((length,), np.uint8),
            "item_B": ((), np.int32),
            "class_B": ((), np.uint8),
            "context_BP": ((settings.max_context,), np.int32),
        }
        self._arrays: dict[str, npt.NDArray[np.integer]] = {
            name: np.zeros((capacity, *shape), dtype) for name, (shape, dtype) in shapes.items()
        }

    def __len__(self) -> int:
        return min(self._added, self._capacity)

    def add(self, examples: Examples) -> None:
        """Append examples, over the oldest ones when full."""
        places = (self._added + np.arange(len(examples))) % self._capacity
        for name, array in self._arrays.items():
            array[places] = getattr(examples, name)
        self._added += len(examples)

    def draw(self, count: int, random: np.random.Generator) -> Examples:
        """Draw `count` examples uniformly, with replacement; none while the window is empty."""
        size = len(self)
        # By age, so that a window rebuilt from the log alone gives the same draws whatever its first place was.
        age = random.integers(1, size + 1, count if size else 0)
        places = (self._added - age) % self._capacity
        return Examples(**{name: array[places].astype(np.int64) for name, array in self._arrays.items()})


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
