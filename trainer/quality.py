"""Quality: accuracy measured before learning (prequential), over a recent window and over everything."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trainer.probabilities import Flags, Floats, auc, calibration_error

HIT_AT = (1, 5, 10, 20)
GAIN_AT = 10
RECENT_EVENTS = 2000
SLICE_HIT_AT = 10
# An item that was chosen less often than this is new, a user without any history.
NEW_ITEM_CHOSEN = 10
# In place of a rank: an event that cannot be hit (its item was new), and feedback that is no event (not positive).
MISS = 0
NO_EVENT = -1

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


def gains(rank_B: Rows) -> Array:
    """Turn ranks (1 best, 0 a miss) into what they score: (B, hits at 1, 5, 10, 20, NDCG at 10, MRR at 10)."""
    hits = [gains_at(rank_B, k)[:, 0] for k in HIT_AT]
    return np.concatenate([np.stack(hits, 1), gains_at(rank_B, GAIN_AT)[:, 1:]], 1)


def gains_at(rank_B: Rows, cutoff: int) -> Array:
    """Turn ranks (1 best, 0 a miss) into hits, NDCG and MRR within the first `cutoff`: (B, 3).

    With one relevant item NDCG is 1 / log2(1 + rank), MRR 1 / rank.
    """
    rank = np.where(rank_B > 0, rank_B, np.iinfo(np.int64).max).astype(np.float64)
    within = rank <= cutoff
    return np.stack([within, within / np.log2(1 + rank), within / rank], 1)


LOSSES = ("item_log_loss", "log_loss")
NAMES = (*(f"hr_at_{k}" for k in HIT_AT), f"ndcg_at_{GAIN_AT}", f"mrr_at_{GAIN_AT}")


SLICES = ("new_user", "new_item")
SLICE_NAMES = tuple(f"{name}_{what}" for name in SLICES for what in (f"hr_at_{SLICE_HIT_AT}", "share"))


class Mean:
    """Average rows of numbers over the last `recent` and over all; what is not finite counts as absent."""

    def __init__(self, recent: int) -> None:
        self._recent: deque[Array] = deque(maxlen=recent)
        self._sum: Array | float = 0.0
        self._count: Array | float = 0.0

    def add(self, rows: Array) -> None:
        """Add rows (B, columns)."""
        self._recent.extend(rows)
        self._sum = self._sum + _finite(rows).sum(0)
        self._count = self._count + np.isfinite(rows).sum(0)

    def recent(self) -> Array:
        """Return the means over the recent rows, NaN for columns without a number."""
        rows = np.array(self._recent)
        return _mean(_finite(rows).sum(0), np.isfinite(rows).sum(0))

    def all(self) -> Array:
        """Return the means over all rows, NaN for columns without a number."""
        return _mean(self._sum, self._count)


def _finite(rows: Array) -> Array:
    return np.where(np.isfinite(rows), rows, 0.0)


def _mean(total: Array | float, count: Array | float) -> Array:
    return np.where(np.asarray(count) > 0, total / np.maximum(1, count), np.nan)


class Quality:
    """Gather ranks and losses of events as they are tested; say how good the recommendations have been."""

    def __init__(self, methods: Sequence[str] = ("recsys", "popularity"), recent: int = RECENT_EVENTS) -> None:
        self.events = 0
        self._ranks = {name: Mean(recent) for name in methods}
        self._losses = Mean(recent)
        self._slices = Mean(recent)
        # Whether feedback was positive, and the probability that it would be.
        self._positive: deque[Array] = deque(maxlen=recent)

    def add_ranks(self, method: str, rank_B: npt.NDArray[np.int64]) -> None:
        """Add a batch of ranks of one method: 1 the best, MISS, or NO_EVENT to be left out."""
        events = rank_B[rank_B != NO_EVENT]
        if method == next(iter(self._ranks)):
            self.events += len(events)
        if len(events):
            self._ranks[method].add(gains(events))

    def add_losses(self, item_loss_B: Array, class_loss_B: Array) -> None:
        """Add a batch of cross-entropies in nats, over items (NaN where there was none) and over classes."""
        self._losses.add(np.stack([item_loss_B, class_loss_B], 1))

    def add_slices(self, rank_B: Rows, new_user_B: Flags, new_item_B: Flags) -> None:
        """Add a batch of ranks as add_ranks takes them, and whose users and which items were new then."""
        event_B = rank_B != NO_EVENT
        if event_B.any():
            hit_B = gains_at(rank_B[event_B], SLICE_HIT_AT)[:, 0]
            flags = [flag_B[event_B].astype(np.float64) for flag_B in (new_user_B, new_item_B)]
            columns = [column for flag_B in flags for column in (np.where(flag_B > 0, hit_B, np.nan), flag_B)]
            self._slices.add(np.stack(columns, 1))

    def add_probabilities(self, positive_B: Flags, probability_B: Floats) -> None:
        """Add whether each feedback of a batch was positive, and the probability of that before it was learned."""
        known_B = np.isfinite(probability_B)
        self._positive.extend(np.stack([positive_B[known_B], probability_B[known_B]], 1).astype(np.float64))

    def metrics(self, method: str, *, recent: bool = False) -> dict[str, float]:
        """Return HR, NDCG and MRR of one method, empty before its first event."""
        if not self.events:
            return {}
        mean = self._ranks[method]
        return dict(zip(NAMES, (mean.recent() if recent else mean.all()).tolist(), strict=True))

    def losses(self, *, recent: bool = False) -> dict[str, float]:
        """Return `item_log_loss` and `log_loss` (over classes) in nats; what was never measured is left out."""
        values = np.atleast_1d(self._losses.recent() if recent else self._losses.all())
        return {name: float(value) for name, value in zip(LOSSES, values, strict=False) if np.isfinite(value)}

    def slices(self, *, recent: bool = False) -> dict[str, float]:
        """Return the hit rate among new users and new items, and their share in all; what is unknown is left out."""
        values = np.atleast_1d(self._slices.recent() if recent else self._slices.all())
        return {name: float(value) for name, value in zip(SLICE_NAMES, values, strict=False) if np.isfinite(value)}

    def probabilities(self) -> dict[str, float]:
        """Return `auc` and `calibration_error` of positive feedback over the recent window, as far as there are any."""
        if not self._positive:
            return {}
        positive_B, probability_B = np.array(self._positive).T
        happened_B = positive_B > 0
        found = {
            "auc": auc(happened_B, probability_B),
            "calibration_error": calibration_error(happened_B, probability_B),
        }
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def summary(self, *, recent: bool = False) -> dict[str, float]:
        """Return the metrics of the first method, and of the others with their name before each, losses and slices.

        The recent ones also say how good the probabilities of positive feedback were.
        """
        first, *others = self._ranks
        beside = {f"{name}_{key}": v for name in others for key, v in self.metrics(name, recent=recent).items()}
        mine = self.metrics(first, recent=recent) | self.losses(recent=recent) | self.slices(recent=recent)
        return mine | (self.probabilities() if recent else {}) | beside
