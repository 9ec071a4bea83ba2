"""Drift: the monitored streams, fed from what the test of each batch found anyway; a pure function of the log.

Mixes are distributions, watched by PSI and Jensen-Shannon; levels are means where higher is worse, watched by ADWIN and
Page-Hinkley. What they remember is part of the trainer's payload.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from recsys.errors import CorruptWeights
from recsys.network import GAP_BUCKETS
from recsys.settings import Settings
from trainer.drift.level import Level
from trainer.drift.misled import Misled
from trainer.drift.mix import Mix
from trainer.drift.names import (
    CATEGORY_MEMORY,
    CATEGORY_MIX,
    DRIFT,
    LEVELS,
    MISLED,
    MIXES,
    TRANSITIONS,
    score_key,
)
from trainer.drift.response import Response
from trainer.examples import Examples
from trainer.prequential import StepReport
from trainer.quality import MISS, NO_EVENT

# What says that recommendations got worse, and not only that the world did.
ACCURACY = {"item_loss", "class_loss", "miss_at_10"}
# Items, context pairs and categories are hashed to so many bins; histories are told apart by the bits of their length;
# scores by nats above chance, of which so many lie below it.
ITEM_BITS, CONTEXT_BINS, LENGTH_BINS, SCORE_BINS, BELOW_CHANCE = 5, 32, 12, 16, 4
CATEGORY_BINS = 32
# Knuth's multiplicative hash.
HASH = 2654435761
HIT_AT = 10

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Drift:
    """Watch the streams of one learner; `responding` tells whether it should learn faster."""

    def __init__(self, settings: Settings) -> None:
        bins = (1 << ITEM_BITS, len(settings.classes), CONTEXT_BINS, LENGTH_BINS, GAP_BUCKETS, SCORE_BINS)
        sizes = [Mix.size(n) for n in bins] + [Level.SIZE] * len(LEVELS) + [Response.SIZE]
        memory = np.zeros(sum(sizes))
        parts = np.split(memory, np.cumsum(sizes)[:-1])
        self._mixes = {name: Mix(n, part) for name, n, part in zip(MIXES, bins, parts, strict=False)}
        categories = np.zeros(Mix.size(CATEGORY_BINS))
        self._mixes[CATEGORY_MIX] = Mix(CATEGORY_BINS, categories)
        levels = parts[len(bins) : -1]
        self._levels = {name: Level(part) for name, part in zip(LEVELS, levels, strict=True)}
        self._response = Response(parts[-1])
        self._misled = Misled(settings.drift_fading, np.zeros(Misled.SIZE))
        self._remembered = {DRIFT: memory, MISLED: self._misled.memory, CATEGORY_MEMORY: categories}

    @property
    def responding(self) -> bool:
        """Return whether accuracy fell and has not come back yet, not longer than a response lasts."""
        return self._response.on

    def observe(self, examples: Examples, report: StepReport, items: int, categories_BK: Integers) -> frozenset[str]:
        """Take a batch as it was tested among `items`; return the streams that were found to have drifted.

        `categories_BK` are the digests of the categories of each item, 0 for none. TRANSITIONS is among the streams
        where what followed items should fade.
        """
        numbers = levels(examples, report, items)
        bins = mixes(examples, numbers["item_loss"], categories_BK)
        found = {name for name, values in bins.items() if self._mixes[name].add(values)}
        found |= {name for name, values in numbers.items() if self._levels[name].add(values)}
        if self._misled.observe(report.led_B, report.led_anywhere_B, items):
            found.add(TRANSITIONS)
        loss = numbers["item_loss"]
        self._response.observe(float(loss.mean()) if len(loss) else np.nan, len(examples), bool(found & ACCURACY))
        return frozenset(found)

    def scores(self) -> dict[str, float]:
        """Return each stream's measures by the keys of a version's metrics.

        PSI and Jensen-Shannon as they are, the others as shares of what a detection takes.
        """
        watched: dict[str, Mix | Level | Misled] = {**self._mixes, **self._levels, TRANSITIONS: self._misled}
        return {score_key(name, measure): v for name, one in watched.items() for measure, v in one.scores().items()}

    def write(self) -> dict[str, Floats]:
        """Copy all that is remembered, by name."""
        return {name: memory.copy() for name, memory in self._remembered.items()}

    def check(self, dense: Mapping[str, NDArray[np.generic]]) -> None:
        """Refuse what does not fit; what an earlier release wrote has nothing of it.

        Raises:
            CorruptWeights: nothing was changed.
        """
        for name, memory in self._remembered.items():
            found = dense.get(name, memory)
            if found.shape != memory.shape or found.dtype != memory.dtype or not np.isfinite(found).all():
                raise CorruptWeights(f"{name} does not fit: {found.dtype.name}{found.shape}")

    def restore(self, dense: Mapping[str, NDArray[np.generic]]) -> None:
        """Set everything to what `check` has let pass, or begin anew where there is nothing."""
        for name, memory in self._remembered.items():
            memory[:] = dense.get(name, 0)


def mixes(examples: Examples, losses: Floats, categories_BK: Integers) -> dict[str, Integers]:
    """Return for each of MIXES the bins of a batch, in order; where something was not given there is none.

    `losses` are the item losses as `levels` has them, `categories_BK` the digests of the items' categories.
    """
    lengths_B = (examples.rows_BL != 0).sum(1)
    bins = (
        (examples.item_B * HASH % (1 << 32)) >> (32 - ITEM_BITS),
        examples.class_B,
        examples.context_BP[examples.context_BP >= 0] % CONTEXT_BINS,
        np.minimum(np.frexp(lengths_B.astype(np.float64))[1], LENGTH_BINS - 1),
        examples.gaps_BL[lengths_B > 0, -1],
        (BELOW_CHANCE - losses).clip(0, SCORE_BINS - 1).astype(np.int64),
        categories_BK[categories_BK != 0] % CATEGORY_BINS,
    )
    return dict(zip(MIXES, bins, strict=True))


def levels(examples: Examples, report: StepReport, items: int) -> dict[str, Floats]:
    """Return for each of LEVELS the numbers of a batch, in order.

    The loss over items less that of a guess among `items`: it must not rise because there are more of them.
    """
    rank_P, loss_P = (numbers[report.rank_B != NO_EVENT] for numbers in (report.rank_B, report.item_loss_B))
    known_P = np.isfinite(loss_P)
    numbers = (
        loss_P[known_P] - math.log(max(items, 1)),
        report.class_loss_B[np.isfinite(report.class_loss_B)],
        ((rank_P == MISS) | (rank_P > HIT_AT)).astype(np.float64),
        (~known_P).astype(np.float64),
        (examples.rows_BL[:, -1] == 0).astype(np.float64),
    )
    return dict(zip(LEVELS, numbers, strict=True))
