"""Standing: what is known of every item whoever asks, on log scales.

log(decayed count + floor) less the largest at each speed, of positive and of all feedback, as of the clock; log of the
positive feedback ever; log of the age in feedback, less that of the oldest there may be.

Written twice: in tensors, for every device, and for the CPU as loops, which give the same numbers several times sooner:
most items have been idle for so long that their decayed counts are nothing beside the floor, and of those no
exponential and next to no logarithm is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.compiled import compiled

# Per feedback; a count halves after 69, 693 and 6,931 feedback.
TREND_DECAYS = (0.99, 0.999, 0.9999)
# Where the slowest trend of positive feedback stands in what is known of an item.
SLOWEST_TREND = len(TREND_DECAYS) - 1
# Below this decayed count all items trend alike.
TREND_FLOOR = 0.02
# Decayed counts of positive feedback and of all feedback at each speed, positive feedback ever, and age.
STANDINGS = 2 * len(TREND_DECAYS) + 2
# Logarithms of counts and ages are brought to the scale of the rest.
TOTAL_SCALE = 0.5
AGE_SCALE = 0.5
SPEEDS = len(TREND_DECAYS)
LOG_DECAYS = np.log(np.array(TREND_DECAYS))
COLUMNS = ("trend", "touched", "first", "total")
# A count that has decayed by more than e to this does not change the logarithm of its sum with the floor, unless it
# was far larger than any that decays can reach: 1 / (1 - the slowest decay).
LEAST_EXPONENT = -40.0

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Standing:
    """Hold the standing of all rows (I, S), and the mean over items, which row 0 is none of.

    `largest_T` is what each trend's is less by, the logarithm of the largest decayed count and the floor.
    """

    rows_IS: Floats
    mean_S: Floats
    largest_T: Floats

    @classmethod
    def of(
        cls,
        columns: Mapping[str, NDArray[np.generic]],
        rows: int,
        clock: int,
        changed: Changed | None = None,
        *,
        known: int | None = None,
        largest_T: Floats | None = None,
    ) -> Standing:
        """Compute it at a clock from the columns of a table, of which the first `known` rows count (default: all).

        `changed` rows count in place of those of the table. `largest_T` is given where these are some rows of many.
        """
        found_IS = np.ones((rows, STANDINGS), np.float32)
        places = np.arange(rows if known is None else known)
        _fill(*(columns[name] for name in COLUMNS), places, clock, LOG_DECAYS, found_IS)
        if changed is not None:
            _fill(*(changed.columns[name] for name in COLUMNS), changed.rows, clock, LOG_DECAYS, found_IS)
        # torch's logarithm does eight at a time.
        torch.from_numpy(found_IS).log_()
        if largest_T is None:
            largest_T = _largest(found_IS)
        return cls(found_IS, _settle(found_IS, largest_T, AGE_SCALE * math.log1p(clock)), largest_T)


@dataclass(frozen=True, slots=True)
class Changed:
    """Hold rows that a version changes, with the columns that they will have."""

    rows: NDArray[np.int64]
    columns: Mapping[str, NDArray[np.generic]]


def by_tensors(columns: Mapping[str, Tensor], rows: int, clock: int) -> Tensor:
    """Compute the standing of the first `rows` rows of a table on its device: (I, STANDINGS)."""
    trend_IT, touched_I, first_I, total_I = (columns[name][:rows] for name in COLUMNS)
    log_decay_T = torch.from_numpy(LOG_DECAYS).to(trend_IT.device).repeat(2)
    exponent_IT = (clock - touched_I).to(torch.float64)[:, None] * log_decay_T
    decay_IT = exponent_IT.clamp_(min=LEAST_EXPONENT).exp_().to(torch.float32)
    found_IT = torch.log(trend_IT * decay_IT + TREND_FLOOR)
    known_I2 = torch.stack([TOTAL_SCALE * total_I.log1p(), AGE_SCALE * (clock - first_I).to(torch.float32).log1p()], 1)
    known_I2[:, 1] -= AGE_SCALE * math.log1p(clock)
    return torch.cat([found_IT - found_IT.amax(0), known_I2], 1)


@compiled
def _fill(
    trend_RT: Floats,
    touched_R: NDArray[np.int64],
    first_R: NDArray[np.int64],
    total_R: Floats,
    places_R: NDArray[np.int64],
    clock: int,
    log_decay: NDArray[np.float64],
    found_IS: Floats,
) -> None:
    """Write what the logarithms are to be taken of."""
    floor = np.float32(TREND_FLOOR)
    for place in range(len(places_R)):
        row = places_R[place]
        idle = np.float64(clock - touched_R[place])
        for speed in range(SPEEDS):
            exponent = log_decay[speed] * idle
            if exponent < LEAST_EXPONENT:
                found_IS[row, speed] = found_IS[row, SPEEDS + speed] = floor
                continue
            decay = np.exp(exponent)
            for column in (speed, SPEEDS + speed):
                found_IS[row, column] = trend_RT[place, column] * np.float32(decay) + floor
        found_IS[row, 2 * SPEEDS] = total_R[place] + np.float32(1.0)
        found_IS[row, 2 * SPEEDS + 1] = np.float32(clock - first_R[place]) + np.float32(1.0)


@compiled
def _largest(found_IS: Floats) -> Floats:
    """Return the largest logarithm of each trend."""
    largest_T = np.full(2 * SPEEDS, np.float32(-np.inf))
    for row in range(len(found_IS)):
        for column in range(2 * SPEEDS):
            largest_T[column] = max(largest_T[column], found_IS[row, column])
    return largest_T


@compiled
def _settle(found_IS: Floats, largest_T: Floats, oldest: float) -> Floats:
    """Bring logarithms to their scales, less the largest of each trend; return the mean over items."""
    rows, width = found_IS.shape
    scale_S, shift_S, total_S = np.ones(width, np.float32), np.zeros(width, np.float32), np.zeros(width)
    scale_S[2 * SPEEDS], scale_S[2 * SPEEDS + 1] = TOTAL_SCALE, AGE_SCALE
    shift_S[: 2 * SPEEDS], shift_S[2 * SPEEDS + 1] = largest_T, oldest
    for row in range(rows):
        for column in range(width):
            found_IS[row, column] = found_IS[row, column] * scale_S[column] - shift_S[column]
            total_S[column] += found_IS[row, column] if row else 0.0
    mean_S: Floats = (total_S / max(rows - 1, 1)).astype(np.float32)
    return mean_S
