"""ClickRegression: online logistic regression over hashed features, as click prediction is done without a network."""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Mapping, Sequence

BUCKETS = 1 << 20
# Of the history, so many latest choices are features; with the item together, so many.
LATEST, LATEST_WITH_ITEM = 10, 3
# Keeps the exponential finite.
LARGEST_LOGIT = 35.0


class ClickRegression:
    """Learn the probability of a class by FTRL-Proximal (McMahan et al. 2013, algorithm 1), event by event.

    The features are those that the network has: the item, the user's latest choices, how many there are and how long
    ago the last one was, the context, and products of these. An event costs some twenty features, whatever came before.
    """

    ALPHA, BETA, L1, L2 = 0.05, 1.0, 0.0, 1.0

    def __init__(self) -> None:
        self._sums = array("d", bytes(8 * BUCKETS))
        self._squares = array("d", bytes(8 * BUCKETS))

    def features(
        self, item: int, chosen: Sequence[int], seconds_since: float | None, context: Mapping[str, str]
    ) -> Sequence[int]:
        """Return the buckets of an event's features; `seconds_since` the last choice is None where there is none."""
        length = len(chosen).bit_length()
        gap = -1 if seconds_since is None else int(max(0.0, seconds_since)).bit_length()
        latest = chosen[: -LATEST - 1 : -1]
        places = [zlib.crc32(f"{key}={value}".encode()) for key, value in sorted(context.items())]
        # Tuples of whole numbers have the same hash in every process.
        found = [(0, 0), (1, item), (2, length), (3, gap), (4, length, gap), (5, item, length)]
        found += [(6, each) for each in latest]
        found += [(7, item, each) for each in latest[:LATEST_WITH_ITEM]]
        for place in places:
            found += [(8, place), (9, place, item), (10, place, length), (11, place, gap)]
        return [hash(each) % BUCKETS for each in found]

    def predict(self, features: Sequence[int]) -> float:
        """Return the probability."""
        logit = sum(map(self._weight, features))
        return 1.0 / (1.0 + math.exp(-max(-LARGEST_LOGIT, min(LARGEST_LOGIT, logit))))

    def learn(self, features: Sequence[int], happened: bool) -> None:
        """Learn what became of it."""
        gradient = self.predict(features) - happened
        for bucket in features:
            squares = self._squares[bucket]
            rise = (math.sqrt(squares + gradient * gradient) - math.sqrt(squares)) / self.ALPHA
            self._sums[bucket] += gradient - rise * self._weight(bucket)
            self._squares[bucket] = squares + gradient * gradient

    def _weight(self, bucket: int) -> float:
        total = self._sums[bucket]
        if abs(total) <= self.L1:
            return 0.0
        shrunk = total - math.copysign(self.L1, total)
        return -shrunk / ((self.BETA + math.sqrt(self._squares[bucket])) / self.ALPHA + self.L2)
