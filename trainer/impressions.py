"""Impressions: which feedback follows an impression of its own that was learned before, by recommendation, user, item.

A pure function of the examples in the replay window and of the batch asked about.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from recsys.settings import Settings

Array = npt.NDArray[np.integer]

# What belongs to no recommendation follows nothing and is not followed.
NONE = 0


def impression_key(recommendation_id: str, user_id: str, item_id: str) -> int:
    """Return what an item's impression in one answer to one user and all feedback that follows it have in common.

    NONE without a recommendation_id. 64 bits: among a million, two are mistaken for each other once in 37 million.
    """
    if not recommendation_id:
        return NONE
    parts = [part.encode() for part in (recommendation_id, user_id, item_id)]
    text = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True)


class Impressions:
    """Know the impressions among the last `replay_capacity` feedback that nothing has followed, by their keys.

    Feedback is numbered as it is added, whatever the first number; numbers ever matter by their distance alone.
    """

    def __init__(self, settings: Settings) -> None:
        self._provisional, self._capacity = settings.provisional_class, settings.replay_capacity
        self._open: dict[int, int] = {}

    def find(self, key_B: Array, class_B: Array, first: int) -> npt.NDArray[np.int64]:
        """Return the number of the impression that each feedback of a batch follows, -1 where there is none: (B).

        `first` is the number of the batch's first feedback, which later ones in it may follow. Nothing is taken in.
        """
        number_B = np.full(len(key_B), -1, np.int64)
        # What the batch itself opens, and -1 for what it closes.
        here: dict[int, int] = {}
        for place, key, index in _given(key_B, class_B):
            if index == self._provisional:
                here[key] = first + place
            else:
                number = here[key] if key in here else self._open.get(key, -1)
                number_B[place] = number if number >= first - self._capacity else -1
                here[key] = -1
        return number_B

    def add(self, key_B: Array, class_B: Array, first: int) -> None:
        """Take in a batch that was learned; feedback other than an impression closes the one that it follows."""
        for place, key, index in _given(key_B, class_B):
            if index == self._provisional:
                self._open[key] = first + place
            else:
                self._open.pop(key, None)
        if len(self._open) > 2 * self._capacity:
            oldest = first + len(key_B) - self._capacity
            self._open = {key: number for key, number in self._open.items() if number >= oldest}


def _given(key_B: Array, class_B: Array) -> Iterator[tuple[int, int, int]]:
    given = np.flatnonzero(key_B != NONE)
    return zip(given.tolist(), key_B[given].tolist(), class_B[given].tolist(), strict=True)
