"""Trust: when many accounts leave their users' habits at once, feedback of those that did is not counted.

An account that was taken over chooses what has little to do with its history. For each choice the test tells how much
likelier what followed the history's items made it than popularity alone; taken with some mistrust, the logarithm of
that is the evidence that its user chose. Its sum over an account's choices, bounded both ways (a CUSUM, Page 1954),
rises as long as histories explain what is chosen, and falls soon after that ends. An account has earned trust once the
sum was high, and lost it while it is below 0.

One user's tastes may change, and histories may explain little: nothing comes of that. But where the share of accounts
that lost their trust, of those that had earned it and chose something lately, is surely above what is usual, that is
an attack, and as long as it lasts what lost accounts choose counts nowhere. New accounts have nothing to lose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from recsys.accounts import NOBODY, PLACES
from recsys.errors import CorruptWeights

# What all that is remembered is called in the trainer's payload.
TRUST, ACCOUNTS = "trust", "trust_accounts"
# Spread evenly over all items, so that what nothing leads to has a share: see recsys.network.TRANSITION_FLOOR, times
# some thousand items.
SPREAD = 100.0
# Of the choices of an account's own user, so many may be anybody's; and in nats, what histories must say for a choice
# before it speaks for its user.
ANYBODY, LEAST_TOLD = 0.1, 0.2
# Bounds of one choice's evidence and of the sum, in nats; the sum that earns trust.
STRONGEST, LEAST, MOST, EARNED = 3.0, -6.0, 4.0, 3.5
# Feedback after which an account that chose nothing is not looked at any more.
LATELY = 1000
# Shares are unusual from so many standard errors above the usual on, until they are below so many. The usual share
# is that of so much feedback, an attack's too, so that a lasting change is none for long; it is taken for no less and
# no more than this. Of 100,836 clean ratings 0.6% were left out that way, of the first 30,000 none.
BEGINS, ENDS = 5.0, 2.5
USUAL_MEMORY, LEAST_USUAL, MOST_USUAL = 12_000, 0.2, 0.9

Floats = NDArray[np.float64]
Integers = NDArray[np.integer]


class Trust:
    """Sum the evidence for each account of late; a pure function of what the test of each batch found."""

    def __init__(self, on: bool = True) -> None:
        """With `on` false nothing is remembered, and everything trusted."""
        self._on = on
        # Whether there is an attack, the usual share of lost accounts, of how much feedback; each place's evidence.
        self._memory = np.zeros(3 + PLACES)
        self._evidence_A = self._memory[3:]
        # Of each place its account, the clock at that one's last choice, and whether it had earned trust.
        self._accounts = np.zeros((3, PLACES), np.int64)
        self._account_A, self._last_A, self._earned_A = self._accounts

    @property
    def attacked(self) -> bool:
        """Return whether feedback of accounts that lost their trust is left out."""
        return bool(self._memory[0])

    @property
    def distrusted(self) -> int:
        """Return how many accounts lost their trust, where there is an attack."""
        return int(self._lost().sum()) if self.attacked else 0

    def trusted(self, account_B: Integers) -> NDArray[np.bool_]:
        """Tell whose feedback counts; what is nobody's does."""
        if not self.attacked:
            return np.ones(len(account_B), np.bool_)
        place_B = account_B % PLACES
        trusted_B: NDArray[np.bool_] = ~(self._lost()[place_B] & (self._account_A[place_B] == account_B))
        return trusted_B

    def _lost(self) -> NDArray[np.bool_]:
        lost_A: NDArray[np.bool_] = (self._earned_A > 0) & (self._evidence_A < 0)
        return lost_A

    def observe(self, account_B: Integers, told_B: Floats, clock: int) -> None:
        """Take in a batch after which so much feedback was learned: whose it is, and what `told` says of it.

        NaN where there is nothing to say.
        """
        asked = np.flatnonzero(np.isfinite(told_B) & (account_B != NOBODY)) if self._on else np.empty(0, np.int64)
        if not len(asked):
            return
        evidence_E = np.log(ANYBODY + (1 - ANYBODY) * np.exp(np.minimum(told_B[asked] - LEAST_TOLD, STRONGEST)))
        for number, evidence in zip(account_B[asked].tolist(), evidence_E.tolist(), strict=True):
            self._take(number, evidence, clock)
        active_A = (self._earned_A > 0) & (self._last_A > clock - LATELY)
        self._judge(int(active_A.sum()), int((self._evidence_A[active_A] < 0).sum()), len(account_B))

    def _take(self, number: int, evidence: float, clock: int) -> None:
        place = number % PLACES
        if self._account_A[place] != number:
            self._account_A[place], self._earned_A[place], self._evidence_A[place] = number, 0, 0.0
        found = min(MOST, max(LEAST, self._evidence_A[place] + evidence))
        self._evidence_A[place], self._last_A[place] = found, clock
        if found >= EARNED:
            self._earned_A[place] = 1

    def forget(self, place: int) -> bool:
        """Let go of whose the place is; return whether it was anyone's. That account begins anew."""
        known = bool(self._account_A[place] != NOBODY)
        self._accounts[:, place] = 0
        self._evidence_A[place] = 0.0
        return known

    def _judge(self, active: int, lost: int, count: int) -> None:
        """Tell whether so many lost accounts of the active ones are an attack, and follow what is usual."""
        if not active:
            self._memory[0] = 0
            return
        self._memory[2] = seen = min(USUAL_MEMORY, self._memory[2] + count)
        self._memory[1] += (lost / active - self._memory[1]) * count / max(count, seen)
        usual = min(MOST_USUAL, max(LEAST_USUAL, float(self._memory[1])))
        errors = (lost - usual * active) / math.sqrt(active * usual * (1 - usual))
        self._memory[0] = errors > (ENDS if self.attacked else BEGINS)

    def write(self) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
        """Copy all that is remembered, by name."""
        return {TRUST: self._memory.copy(), ACCOUNTS: self._accounts.copy()} if self._on else {}

    def check(self, dense: Mapping[str, NDArray[np.generic]]) -> None:
        """Refuse what does not fit; what an earlier release wrote has nothing of it.

        Raises:
            CorruptWeights: nothing was changed.
        """
        for name, memory in ((TRUST, self._memory), (ACCOUNTS, self._accounts)):
            found = dense.get(name, memory)
            if found.shape != memory.shape or found.dtype != memory.dtype or not np.isfinite(found).all():
                raise CorruptWeights(f"{name} does not fit: {found.dtype.name}{found.shape}")

    def restore(self, dense: Mapping[str, NDArray[np.generic]]) -> None:
        """Set everything to what `check` has let pass, or begin anew where there is nothing."""
        if self._on:
            self._memory[:] = dense.get(TRUST, 0)
            self._accounts[:] = dense.get(ACCOUNTS, 0)


def told(led_B: Floats, anywhere_B: Floats, popular_B: Floats, items: int) -> Floats:
    """Return how much likelier, in nats, histories made choices than popularity did.

    What leads to each choice and to all of `items`, and the logarithm of the item's share of late choices; NaN where
    nothing leads anywhere, or was not asked.
    """
    led_B = np.where(anywhere_B > 0, led_B, np.nan)
    found_B: Floats = np.log((led_B + SPREAD / max(1, items)) / (anywhere_B + SPREAD)) - popular_B
    return found_B
