"""Retrieval: the best rows of the item table for each user, exactly, of equal ones the lower row first.

Only the products with all items pass over users x items. What the transition memory adds and what must not come back
touch few rows each, and the selection looks at the largest of each group of rows before it looks at rows.
Shapes as in recsys.network; N successors as in Transitions; W rows padded to whole groups, of G groups; K rows found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.item_table import ItemTable, Transitions
from recsys.network import LIFTS, TRANSITION_FLOOR
from recsys.scorer.items import Items

# Below any real score; marks rows that must not come back.
HIDDEN = -1e9
# Users whose scores of all items are in memory at a time.
TOGETHER = 32
# Rows looked at as one before they are looked at one by one. Of 16 to 96 the fastest, by a little.
GROUP = 64
# Rows of products that are still in the processor's cache when the standing is added.
STRETCH = 16_384
# Where more than one in so many rows is hidden from everyone, a mask over all rows is faster than a list of them.
MASK_FROM = 64


@dataclass(frozen=True, slots=True)
class Own:
    """Hold the rows that must not come back to each of a batch of users, one user's after the other's."""

    rows_H: NDArray[np.int64]
    # Where each user's end.
    ends_B: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Own:
        """Take a list of rows for each user."""
        ends_B = np.cumsum([len(each) for each in rows], dtype=np.int64)
        return cls(np.fromiter(chain.from_iterable(rows), np.int64, int(ends_B[-1]) if len(rows) else 0), ends_B)

    def __len__(self) -> int:
        """Count the users."""
        return len(self.ends_B)


@dataclass(frozen=True, slots=True)
class Hidden:
    """Hold which rows must not come back, as a mask and as a list."""

    mask_I: Tensor
    rows_H: Tensor

    def apply(self, scores_BI: Tensor) -> None:
        """Hide the rows from all of these users."""
        if len(self.rows_H) * MASK_FROM > len(self.mask_I):
            scores_BI.masked_fill_(self.mask_I, HIDDEN)
        else:
            scores_BI.index_fill_(1, self.rows_H, HIDDEN)


class Known(Protocol):
    """What the transition memory says of a batch of users."""

    def at(self, rows_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return all looks on a log scale (B, K, 3), and the row of the history item that leads here most (B, K)."""


class Found(NamedTuple):
    """The best rows of each user, best first, with their scores: (B, K) each; HIDDEN where there are no more."""

    scores_BK: Tensor
    rows_BK: Tensor
    known: Known


class Lifts:
    """Look up what the transition memory says of rows; the few sums per user are made once."""

    def __init__(self, transitions: Transitions, board: Board) -> None:
        self._transitions, self._board = transitions, board
        self.rows_BN = rows_BN = transitions.rows_BN
        # One slot of each row stands for all of its slots.
        self._owner_BN = board.slots(rows_BN, rows_BN)
        self._lifts_BN = [
            torch.zeros_like(weight_BN).scatter_add_(1, self._owner_BN, weight_BN).div_(TRANSITION_FLOOR).log1p_()
            for weight_BN in transitions.looks
        ]

    def weighted(self, weights_B3: Tensor) -> Tensor:
        """Return what each slot adds to the score of its row: (B, N)."""
        added_BN = torch.zeros_like(self._lifts_BN[0])
        for weight_B, lift_BN in zip(weights_B3.unbind(1), self._lifts_BN, strict=True):
            added_BN.addcmul_(weight_B[:, None], lift_BN)
        return added_BN

    def at(self, rows_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return all looks on a log scale (B, K, 3), and the row of the history item that leads here most (B, K)."""
        found = self._transitions
        count, places = found.rows_BN.shape[1], found.history_BK.shape[1]
        slot_BK = self._board.slots(found.rows_BN, rows_BK).clamp_(0, count - 1)
        slot_BK = self._owner_BN.gather(1, slot_BK)
        # Where a row is no slot's, the board holds anything at all.
        there_BK = found.rows_BN.gather(1, slot_BK) == rows_BK
        lifts_BK3 = torch.stack([lift_BN.gather(1, slot_BK) for lift_BN in self._lifts_BN], 2) * there_BK[:, :, None]
        strongest_BN = torch.zeros_like(found.weight_BN).scatter_reduce_(1, self._owner_BN, found.weight_BN, "amax")
        slots_N = torch.arange(count, device=rows_BK.device)
        most_BN = slots_N.where(found.weight_BN == strongest_BN.gather(1, self._owner_BN), count - 1)
        first_BN = torch.full_like(self._owner_BN, count - 1).scatter_reduce_(1, self._owner_BN, most_BN, "amin")
        because_BK = found.history_BK.gather(1, first_BN.gather(1, slot_BK) // (count // places))
        return lifts_BK3, because_BK * there_BK


class Board:
    """Keep memory for a number per user and row; what was written holds until the next call."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.empty(0, device=device)
        self._shape = (0, 0)

    def resize(self, users: int, rows: int) -> None:
        """Make room; memory that was had is kept, so that pages are not zeroed by the kernel again and again."""
        width = -(-rows // GROUP) * GROUP
        if users * width > len(self._memory):
            # With room for some more rows, so that a growing catalogue does not have it moved with every version.
            self._memory = torch.empty(users * (width + width // 8), device=self._memory.device)
        self._shape = (users, width)

    def scores(self) -> Tensor:
        """Return the whole board: (B, W)."""
        users, width = self._shape
        return self._memory[: users * width].view(users, width)

    def slots(self, rows_BN: Tensor, wanted_BK: Tensor) -> Tensor:
        """Return for each wanted row one n with rows_BN[:, n] equal to it, or any number where there is none."""
        board_BW = self.scores().view(torch.int32)
        slots_N = torch.arange(rows_BN.shape[1], dtype=torch.int32, device=rows_BN.device)
        board_BW.scatter_(1, rows_BN, slots_N.expand_as(rows_BN))
        return board_BW.gather(1, wanted_BK).to(torch.int64)


class Retrieval:
    """Score all items for up to TOGETHER users at a time, and find the best; not for several threads at once."""

    def __init__(self, device: torch.device) -> None:
        self.board, self._device = Board(device), device
        self._vectors_ID = self._standing_IS = torch.empty(0, 0, device=device)

    def install(self, items: Items, table: ItemTable) -> None:
        """Take the items of a version; they are looked at where they are, not copied."""
        self._vectors_ID, self._standing_IS, self._table = items.vectors_ID, items.standing_IS, table

    def look_up(self, history_BK: Tensor) -> Lifts:
        """Sum what the transition memory says of histories, latest first; holds until the next batch."""
        return self.lifts(self._table.transitions(history_BK))

    def find(
        self,
        weights_BP: Tensor,
        states_BD: Tensor,
        history_BK: Tensor,
        hidden: Sequence[Hidden],
        own: Own,
        keep: int,
    ) -> Found:
        """Find the `keep` rows with the largest scores, without those hidden from each user and its `own` rows.

        `history_BK` holds the latest rows of the histories, latest first.
        """
        lifts = self.look_up(history_BK)
        scores_BI = self.scores(weights_BP, states_BD, lifts)
        alike = {id(each): each for each in hidden}.values()
        for each in alike:
            if len(alike) == 1:
                each.apply(scores_BI)
                continue
            for place, other in enumerate(hidden):
                if other is each:
                    each.apply(scores_BI[place : place + 1])
        users_H = np.repeat(np.arange(len(own)), np.diff(own.ends_B, prepend=0))
        scores_BI[torch.from_numpy(users_H).to(self._device), torch.from_numpy(own.rows_H).to(self._device)] = HIDDEN
        return Found(*self.best(keep), lifts)

    def lifts(self, transitions: Transitions) -> Lifts:
        """Sum what the transition memory says of a batch; holds until the next batch."""
        self.board.resize(len(transitions.rows_BN), len(self._vectors_ID))
        return Lifts(transitions, self.board)

    def scores(self, weights_BP: Tensor, states_BD: Tensor, lifts: Lifts) -> Tensor:
        """Return what network.scores does, in memory that is kept: (B, I)."""
        rows = len(self._vectors_ID)
        padded_BW = self.board.scores()
        padded_BW[:, rows:] = HIDDEN
        scores_BI = padded_BW[:, :rows]
        self._products(weights_BP[:, :1] * states_BD, weights_BP[:, 1:-LIFTS].contiguous(), scores_BI)
        # Of the slots of one row all but one hold zero.
        scores_BI.scatter_add_(1, lifts.rows_BN, lifts.weighted(weights_BP[:, -LIFTS:]))
        return scores_BI

    def _products(self, users_BD: Tensor, weights_BS: Tensor, scores_BI: Tensor) -> None:
        vectors_ID, standing_IS = self._vectors_ID, self._standing_IS
        if scores_BI.device.type != "cpu":
            torch.mm(users_BD, vectors_ID.T, out=scores_BI)
            scores_BI.addmm_(weights_BS, standing_IS.T)
            return
        users, vectors, scores = users_BD.numpy(), vectors_ID.numpy(), scores_BI.numpy()
        for first in range(0, len(vectors), STRETCH):
            here = slice(first, first + STRETCH)
            # numpy's product: torch's, of few users with many items, takes up to twice as long on some processors.
            np.matmul(users, vectors[here].T, out=scores[:, here])
            scores_BI[:, here].addmm_(weights_BS, standing_IS[here].T)

    def best(self, keep: int) -> tuple[Tensor, Tensor]:
        """Return the `keep` largest scores on the board, largest first, and their rows: (B, K) each."""
        return largest(self.board.scores(), min(keep, len(self._vectors_ID)))


def largest(scores_BW: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return each row's `keep` largest numbers, of equal ones the first, and their places; W is whole groups.

    Groups with the largest maxima, of equal ones the first, hold all of them: whatever lies in another group has at
    least `keep` before it, the maxima of those.
    """
    batch, width = scores_BW.shape
    device = scores_BW.device
    groups = width // GROUP
    places_BM = torch.arange(width, device=device).expand(batch, -1)
    scores_BM = scores_BW
    if keep < groups:
        maxima_BG = scores_BW.view(batch, groups, GROUP).amax(2)
        group_BK = _order(maxima_BG, torch.arange(groups, device=device)).topk(keep, dim=1, sorted=False).indices
        start_B1 = torch.arange(0, batch * groups, groups, device=device)[:, None]
        scores_BM = scores_BW.view(batch * groups, GROUP)[(group_BK + start_B1).view(-1)].view(batch, -1)
        places_BM = (group_BK[:, :, None] * GROUP + torch.arange(GROUP, device=device)).view(batch, -1)
    found_BK = _order(scores_BM, places_BM).topk(keep, dim=1).indices
    return scores_BM.gather(1, found_BK), places_BM.gather(1, found_BK)


def _order(scores_BM: Tensor, places: Tensor) -> Tensor:
    """Return whole numbers, no two equal, that are larger where the score is, and of equal ones at the lower place."""
    # A float's bits are in its order once those of negative ones but the sign are turned round; zero has two signs.
    bits_BM = (scores_BM + 0.0).view(torch.int32)
    ordered_BM = (bits_BM >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits_BM)
    return ordered_BM.to(torch.int64).bitwise_left_shift_(32).sub_(places)
