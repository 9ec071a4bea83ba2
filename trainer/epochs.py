"""Epochs: learn the same feedback several times, and stop when what was kept apart gains no more.

The first epoch goes in the order of time and is learned as the trainer learns a log: tested, counted, replayed. Further
ones go through the choices, shuffled, and move the network and the item vectors alone, not the head that tells classes.
The weights that mix the score's parts are learned on feedback that the network has not learned: of the first epoch
before it is, afterwards of what is kept apart.

Where what is asked lies anywhere in the time of what is learned, not behind it, what followed what must not fade: after
the first epoch it is counted anew. The mixing weights then begin anew after every epoch, which makes the epochs alike
but for what they taught the network. And what a user chose later is no sign that it was not liked: further epochs tell
each choice from what the user never chose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from recsys.weights import decode, encode
from trainer.arrivals import Arrivals, held
from trainer.examples import Event, Examples, join, learnable
from trainer.examples import encode as encode_events
from trainer.learner import Learner
from trainer.mixing import fit_mixing
from trainer.prequential import StepReport
from trainer.quality import NO_EVENT, Rows, gains_at

CUTOFF = 10
# No list is as long.
LAST_PLACE = 1 << 40
# Feedback encoded at once.
ENCODED = 4096
# Choices of a further epoch's step, at most, and how many steps it takes at least where there are few: a choice costs a
# third less in a thousand than in two hundred, and as many epochs lead as far.
MOST_CHOICES, LEAST_STEPS = 1024, 64
# Which draws are made: one number a purpose, beside those of learner and gate.
SHUFFLE = 3


class Known(Protocol):
    """A feedback, and the rows that the user had before it."""

    event: Event
    seen: Rows


@dataclass(frozen=True, slots=True)
class Epoch:
    """Say what an epoch did: its mean loss over items while learning, then what was found on what is kept apart."""

    epoch: int
    seconds: float
    loss: float
    hr_at_10: float
    ndcg_at_10: float
    # Over the whole list, which scatters less where feedback is few.
    ndcg: float
    item_log_loss: float
    class_log_loss: float

    def validation_loss(self, *, timeless: bool) -> float:
        """Return what decides which epoch is the best: what is learned, on feedback kept apart.

        Of single choices that are left out it is what their places in the list lack: the log loss goes on falling where
        they rise no more. Their class tells nothing, as of what was no choice none is kept apart.
        """
        return 1 - self.ndcg if timeless else float(np.nansum([self.item_log_loss, self.class_log_loss]))


class Encoded:
    """Hold feedback as small integers, about 350 bytes each with histories of 50."""

    def __init__(self, feedback: Sequence[Known], learner: Learner) -> None:
        parts = [
            _small(encode_events([each.event for each in feedback[start : start + ENCODED]], learner.settings))
            for start in range(0, len(feedback), ENCODED)
        ]
        self.examples = join(parts) if parts else _small(encode_events([], learner.settings))
        self._seen = [each.seen for each in feedback]

    def __len__(self) -> int:
        return len(self._seen)

    def batches(self, size: int, order: Rows | None = None) -> Iterator[tuple[Examples, list[Rows]]]:
        """Yield examples and what each user had, `size` at a time, by default in their order."""
        order = np.arange(len(self)) if order is None else order
        for start in range(0, len(order), size):
            index = order[start : start + size]
            yield self.examples.take(index), [self._seen[i] for i in index.tolist()]


def _small(examples: Examples) -> Examples:
    return Examples(
        examples.rows_BL.astype(np.int32),
        examples.classes_BL.astype(np.uint8),
        examples.gaps_BL.astype(np.uint8),
        examples.item_B,
        examples.class_B,
        examples.context_BP.astype(np.int32),
        examples.impression_B,
        examples.account_B,
    )


class Epochs:
    """Teach one learner in epochs; `history` is what each did.

    `timeless` says that what is asked later lies anywhere in the time of what is learned.
    """

    def __init__(
        self,
        learner: Learner,
        train: Sequence[Known],
        validation: Sequence[Known],
        arrivals: Arrivals | None = None,
        *,
        timeless: bool = False,
    ) -> None:
        self._learner, self._settings, self._arrivals = learner, learner.settings, arrivals
        self._timeless = timeless
        self._train, self._validation = Encoded(train, learner), Encoded(validation, learner)
        examples = self._train.examples
        positive = np.array([c.positive for c in learner.settings.classes])
        self._choices = np.flatnonzero(learnable(positive, examples.item_B, examples.class_B, examples.rows_BL))
        chosen_B = positive[examples.class_B]
        self._own = _by_account(examples.account_B[chosen_B], examples.item_B[chosen_B]) if timeless else None
        self.history: list[Epoch] = []
        self.best = 0

    def run(
        self,
        epochs: int,
        patience: int,
        progress: Callable[[int, int], None] = lambda epoch, done: None,
    ) -> None:
        """Learn at most `epochs` epochs; stop when `patience` in a row gained nothing; leave the best one's weights.

        `progress` is called with the epoch and how much feedback of it is done. An interruption leaves the weights of
        the best epoch that was completed, if any was.
        """
        kept: tuple[bytes, bytes] | None = None
        moved = False
        try:
            for epoch in range(1, epochs + 1):
                moved = True
                self.history.append(self._one(epoch, progress))
                losses = [each.validation_loss(timeless=self._timeless) for each in self.history]
                if epoch == 1 or losses[-1] < min(losses[:-1]):
                    served, own = self._learner.write_all()
                    kept, self.best, moved = (encode(served), encode(own)), epoch, False
                elif epoch - self.best >= patience:
                    break
        finally:
            if kept is not None and moved:
                self._learner.restore(decode(kept[0]), decode(kept[1]))

    def _one(self, epoch: int, progress: Callable[[int, int], None]) -> Epoch:
        started, done, losses = time.perf_counter(), 0, []
        learner, first = self._learner, epoch == 1
        size, order = self._order(epoch)
        for examples, seen in self._train.batches(size, order):
            if first and self._arrivals is not None:
                self._arrivals.reach(examples)
            report = learner.step(examples, seen if first else self._had(examples), again=not first)
            losses.append(report.losses.get("item", np.nan))
            done += len(examples)
            progress(epoch, len(self._train) * done // len(order))
        if first and self._timeless:
            learner.recount(self._train.examples)
        found = self._mixed()
        loss = _mean(np.array(losses))
        return Epoch(epoch, time.perf_counter() - started, loss, **found)

    def _order(self, epoch: int) -> tuple[int, Rows]:
        """Return how much feedback there is in a step of an epoch, and in which order."""
        settings = self._settings
        if epoch == 1:
            # Where the end of the time tells no more than the rest, as fast as a trainer that is far behind.
            return settings.batch_size * (settings.batch_growth if self._timeless else 1), np.arange(len(self._train))
        random = np.random.Generator(np.random.Philox(key=settings.seed, counter=[0, epoch, SHUFFLE, 0]))
        size = max(settings.batch_size, min(MOST_CHOICES, len(self._choices) // LEAST_STEPS))
        return size, random.permutation(self._choices)

    def _had(self, examples: Examples) -> list[Rows] | None:
        """Return all that each example's user ever chose of what is learned, None where time tells."""
        if self._own is None:
            return None
        return [self._own[account] for account in examples.account_B.tolist()]

    def _mixed(self) -> dict[str, float]:
        """Teach the mixing weights on what is kept apart; return what was found there.

        What is asked behind the time of what is learned is gone through once, as the first epoch has taught them what
        counts at its end, and more would make them fit few feedback too well.
        """
        learner, batches = self._learner, self._validation.batches(self._settings.batch_size)
        apart = [held(*batch, learner.table) for batch in batches]
        if self._timeless:
            return summary(fit_mixing(learner, apart))
        return summary([learner.learn_mixing(*batch) for batch in apart])


def _by_account(account_B: Rows, item_B: Rows) -> dict[int, Rows]:
    """Return the distinct items that each account chose."""
    pairs_P2 = np.unique(np.stack([account_B, item_B], 1), axis=0)
    accounts, starts = np.unique(pairs_P2[:, 0], return_index=True)
    return dict(zip(accounts.tolist(), np.split(pairs_P2[:, 1], starts[1:]), strict=True))


def summary(reports: Sequence[StepReport]) -> dict[str, float]:
    """Return the accuracy and the losses, NaN where there is nothing, that reports tell of."""
    if not reports:
        names = ("hr_at_10", "ndcg_at_10", "ndcg", "item_log_loss", "class_log_loss")
        return dict.fromkeys(names, float("nan"))
    ranks = np.concatenate([report.rank_B for report in reports])
    ranks = ranks[ranks != NO_EVENT]
    gained, anywhere = gains_at(ranks, CUTOFF), gains_at(ranks, LAST_PLACE)
    item = np.concatenate([report.item_loss_B for report in reports])
    classes = np.concatenate([report.class_loss_B for report in reports])
    return {
        "hr_at_10": _mean(gained[:, 0]),
        "ndcg_at_10": _mean(gained[:, 1]),
        "ndcg": _mean(anywhere[:, 1]),
        "item_log_loss": _mean(item),
        "class_log_loss": _mean(classes),
    }


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
