"""Crowd: items that newcomers push and hardly anybody else chooses are found; what their crowd chooses is not counted.

Accounts that are new have no habits that they could leave (see trainer.trust), and one choice says nothing of who made
it. An item says more: who chose it lately, newcomers or others, beside how often either chooses anything. Where so few
of the others did that chance does not explain it (Chernoff's bound, for all items together; others who had it before
left out, as they could not), it is **pushed**. Whoever chose pushed items in a good part of all choices, as the history
shows, pushes: counts as a newcomer however much it has chosen, and is not counted anywhere else. An item is pushed no
longer when that crowd is gone, or others choose it too.

Of accounts nothing is kept: histories and the replay window tell all but which items are pushed. Where nearly all are
newcomers there is nobody to compare them with, and nothing is pushed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from recsys.errors import CorruptWeights
from recsys.item_table import PADDING_ROW

# What is remembered is called so in the trainer's payload.
CROWD = "crowd"
# Of the replay window, the newest feedback, in which items are compared.
RECENT = 2048
# Who has chosen less before is a newcomer.
NEWCOMER = 3
# Of all choices of one who pushes, so many are of pushed items.
PUSHING = 0.2
# The chance that any item is taken for pushed at one look where all choose alike.
MISTAKEN = 1e-4
# So many items are remembered, those that are surest.
MOST_PUSHED = 64
# Keeps logarithms finite.
LEAST_SHARE = 1e-9

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Integers = NDArray[np.integer]
Rows = NDArray[np.int64]


class Crowd:
    """Tell which items are pushed, and whose feedback counts; a pure function of the replay window and of the past."""

    def __init__(self, on: bool = True) -> None:
        """With `on` false nothing is ever pushed, or remembered."""
        self._on = on
        # How many accounts pushed lately; the rows of pushed items, 0 in places that are left.
        self._memory = np.zeros(1 + MOST_PUSHED, np.int64)
        self._pushed_P = self._memory[1:]

    @property
    def pushed(self) -> Rows:
        """Return the rows of the items that are pushed."""
        pushed: Rows = self._pushed_P[self._pushed_P != PADDING_ROW]
        return pushed

    @property
    def attacked(self) -> bool:
        """Return whether any item is pushed."""
        return bool(self._pushed_P.any())

    @property
    def accounts(self) -> int:
        """Return how many accounts pushed lately."""
        return int(self._memory[0])

    def trusted(self, rows_BL: Integers, item_B: Integers) -> Flags:
        """Tell which feedback counts, by its history and the item that it chooses, if it does."""
        return ~self._pushes(rows_BL, item_B)

    def _pushes(self, rows_BL: Integers, item_B: Integers) -> Flags:
        if not self.attacked or not len(item_B):
            return np.zeros(len(item_B), np.bool_)
        pushed_I = np.zeros(1 + max(self._pushed_P.max(), rows_BL.max(), item_B.max()), np.bool_)
        pushed_I[self.pushed] = True
        given_B = pushed_I[rows_BL].sum(1) + pushed_I[item_B]
        pushes_B: Flags = (given_B > 0) & (given_B >= PUSHING * (1 + (rows_BL != PADDING_ROW).sum(1)))
        return pushes_B

    def observe(self, rows_BL: Integers, item_B: Integers, account_B: Integers, asked_B: Flags) -> None:
        """Look at the newest feedback, oldest first: histories, items, accounts, and what was chosen."""
        if not self._on:
            return
        chosen_B = np.where(asked_B, item_B, PADDING_ROW)
        pushes_B = self._pushes(rows_BL, chosen_B)
        # What histories hold stands at their end.
        newcomer_B = pushes_B | (rows_BL[:, -min(NEWCOMER, rows_BL.shape[1])] == PADDING_ROW)
        asked = np.flatnonzero(asked_B)
        account_A, of_B = np.unique(account_B[asked], return_inverse=True)
        first_A, last_A = (np.zeros(len(account_A), np.int64) for _ in range(2))
        # Of equal places the last is written last.
        first_A[of_B[::-1]], last_A[of_B] = asked[::-1], asked
        # Who chooses an item again is counted once.
        pair_B = np.sort((item_B[asked].astype(np.int64) << 32) | of_B)
        pair_N = pair_B[np.diff(pair_B, prepend=-1) > 0]
        row_N, account_N = pair_N >> 32, pair_N & ((1 << 32) - 1)
        # An account is for all its choices what the last one shows.
        self._judge(row_N, account_N, ~newcomer_B[last_A], rows_BL[first_A])
        self._memory[0] = self._pushes(rows_BL[last_A], chosen_B[last_A]).sum()

    def _judge(self, row_N: Rows, account_N: Rows, other_A: Flags, before_AL: Integers) -> None:
        """Find what is pushed, from the items, ascending, and accounts of all choices.

        Of the accounts, who is other than a newcomer, and their histories before the first of these choices.
        """
        self._pushed_P[:] = PADDING_ROW
        other_N = other_A[account_N]
        if not other_N.any():
            return
        first_I = np.flatnonzero(np.diff(row_N, prepend=PADDING_ROW))
        chosen_I = np.diff(first_I, append=len(row_N))
        others_I, enough = np.add.reduceat(other_N, first_I, dtype=np.int64), math.log(len(first_I) / MISTAKEN)
        sure_I = _sure(others_I, chosen_I, other_N.mean())
        for place in np.flatnonzero(sure_I > enough):
            # Others who had the item before are left out: they would have chosen it had they come later.
            row = row_N[first_I[place]]
            asked_N = ~other_N | ~(before_AL == row).any(1)[account_N]
            other_M, chose_M = other_N[asked_N], row_N[asked_N] == row
            sure_I[place] = _sure((other_M & chose_M).sum(), chose_M.sum(), other_M.mean())
        found = np.flatnonzero(sure_I > enough)
        surest = found[np.argsort(-sure_I[found], kind="stable")][:MOST_PUSHED]
        self._pushed_P[: len(surest)] = row_N[first_I[surest]]

    def free(self, rows_R: Rows) -> None:
        """Let go of rows that lose their items."""
        kept = self.pushed[~np.isin(self.pushed, rows_R)]
        self._pushed_P[:] = PADDING_ROW
        self._pushed_P[: len(kept)] = kept

    def write(self) -> dict[str, Rows]:
        """Copy all that is remembered, by name."""
        return {CROWD: self._memory.copy()} if self._on else {}

    def check(self, dense: Mapping[str, NDArray[np.generic]], rows_R: Integers) -> None:
        """Refuse what does not fit a table of these rows; what an earlier release wrote has nothing of it.

        Raises:
            CorruptWeights: nothing was changed.
        """
        if CROWD not in dense:
            return
        found = dense[CROWD]
        fits = found.shape == self._memory.shape and found.dtype == self._memory.dtype
        if fits:
            accounts, pushed_P = found.astype(np.int64)[0], found[1:]
            fits = accounts >= 0 and bool((np.isin(pushed_P, rows_R) | (pushed_P == PADDING_ROW)).all())
        if not fits:
            raise CorruptWeights(f"{CROWD} does not fit: {found.dtype.name}{found.shape}")

    def restore(self, dense: Mapping[str, NDArray[np.generic]]) -> None:
        """Set everything to what `check` has let pass, or begin anew where there is nothing."""
        if self._on:
            self._memory[:] = dense.get(CROWD, 0)


def _sure(others_I: Integers, chosen_I: Integers, usual: float) -> Floats:
    """Return how sure it is that fewer others than usual made so many of all choices of items, in nats, 0 for more.

    The negative logarithm of what Chernoff's bound leaves to chance: choices times the divergence of the shares.
    """
    share_I, usual = others_I / chosen_I, min(max(usual, LEAST_SHARE), 1 - LEAST_SHARE)
    rest_I = np.maximum(1 - share_I, LEAST_SHARE)
    divergence_I = share_I * np.log(np.maximum(share_I, LEAST_SHARE) / usual) + rest_I * np.log(rest_I / (1 - usual))
    found_I: Floats = np.where(share_I < usual, chosen_I * divergence_I, 0.0)
    return found_I
