"""Marks: what is known of a user's rows beyond the item table, found by row.

What follows the user's latest items, summed per row, and what must not come back.
Shapes: B users, K latest items, M successors of each, N marks, G buckets of rows, W words of their bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.compiled import compiled_apart
from recsys.item_table import CHOSEN_PRIOR, nearness
from recsys.network import LIFTS, TRANSITION_FLOOR
from recsys.scorer.lanes import prefetch, trailing_zeros
from recsys.scorer.retrieval import Own

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Longs = NDArray[np.int64]
# Buckets that rows are put into to bring them in order, at most; a power of two of rows to each, at least so many.
BUCKETS, LEAST_IN_BUCKET = 4096, 4
# Buckets that a whole number of 64 bits tells the use of, as a power of two.
WORD = 6
# Items of a history before one is looked at that what follows it is fetched.
AHEAD = 2
PRIOR = np.float32(CHOSEN_PRIOR)
# Above any row.
END = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Marks:
    """Hold each user's marks by ascending row; past the last one rows are END."""

    rows_BN: Integers
    hidden_BN: NDArray[np.bool_]
    # All looks into the transition memory on a log scale, and the row of the history that leads here most.
    lifts_3BN: Floats
    because_BN: Integers

    @classmethod
    def of(cls, successors: tuple[Integers, Floats, Floats], history_BK: Longs, own: Own | None = None) -> Marks:
        """Mark what follows the histories, latest first, and hide each user's `own` rows.

        `successors` are the rows (I, M) that followed each row, how much they weigh, and how often each row was chosen.
        """
        own = own or Own(np.empty(0, np.int64), np.zeros(len(history_BK), np.int64))
        rows_BN, hidden_BN, sums_3BN, because_BN = _mark(
            *successors,
            history_BK,
            nearness(history_BK.shape[1]),
            own.rows_H,
            own.ends_B,
        )
        # torch's logarithm does eight at a time.
        lifts_3BN = torch.from_numpy(sums_3BN).div_(TRANSITION_FLOOR).log1p_().numpy()
        return cls(rows_BN, hidden_BN, lifts_3BN, because_BN)

    def weighted(self, weights_B3: Floats) -> Floats:
        """Return what each mark adds to the score of its row, below HIDDEN where that must not come back: (B, N)."""
        found_BN: Floats = _weigh(self.lifts_3BN, self.hidden_BN, weights_B3)
        return found_BN

    def at(self, rows_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return all lifts of rows (B, K, 3) and the row of the history item that leads there most (B, K); 0: none."""
        lifts_BK3, because_BK = _at(self.rows_BN, self.lifts_3BN, self.because_BN, rows_BK.numpy())
        return torch.from_numpy(lifts_BK3), torch.from_numpy(because_BK)


@compiled_apart
def _weigh(lifts_3BN: Floats, hidden_BN: NDArray[np.bool_], weights_B3: Floats) -> Floats:
    found_BN = np.empty(hidden_BN.shape, np.float32)
    for user in range(hidden_BN.shape[0]):
        for mark in range(hidden_BN.shape[1]):
            lift = np.float32(0.0)
            for look in range(LIFTS):
                lift += weights_B3[user, look] * lifts_3BN[look, user, mark]
            found_BN[user, mark] = -np.inf if hidden_BN[user, mark] else lift
    return found_BN


@compiled_apart
def _mark(
    successor_IM: Integers,
    weight_IM: Floats,
    total_I: Floats,
    history_BK: Longs,
    scale_2K: Floats,
    own_H: Longs,
    ends_B: Longs,
) -> tuple[Integers, NDArray[np.bool_], Floats, Integers]:
    users, reach = history_BK.shape
    successors = successor_IM.shape[1]
    most = 0
    for user in range(users):
        most = max(most, ends_B[user] - (ends_B[user - 1] if user else 0))
    room = most + reach * successors
    rows_BN = np.full((users, room + 1), END, np.int32)
    hidden_BN, because_BN = np.zeros((users, room + 1), np.bool_), np.zeros((users, room + 1), np.int32)
    sums_3BN = np.zeros((LIFTS, users, room + 1), np.float32)
    # Of each bucket of rows one more than the number of its first mark; of each mark its row and the next one alike.
    # Shifted rather than divided: a division takes as long as all else that is done for a successor.
    shift = LEAST_IN_BUCKET
    while successor_IM.shape[0] >> shift >= BUCKETS:
        shift += 1
    head_G, chain_N2 = np.zeros((successor_IM.shape[0] >> shift) + 1, np.int32), np.empty((room, 2), np.int32)
    # A bit for each bucket that holds anything: most hold nothing, and to ask each is a guess for the processor.
    used_W = np.zeros((len(head_G) >> WORD) + 1, np.uint64)
    hidden_N, because_N = np.empty(room, np.bool_), np.empty(room, np.int32)
    # The sums by distance, and the largest part of the first.
    sums_N3 = np.empty((room, 3), np.float32)
    for user in range(users):
        count = 0
        for place in range(ends_B[user - 1] if user else 0, ends_B[user]):
            count = _chain(head_G, used_W, shift, chain_N2, own_H[place], count)
            hidden_N[count - 1], because_N[count - 1], sums_N3[count - 1] = True, 0, 0.0
        for place in range(reach):
            source = history_BK[user, place]
            ahead = history_BK[user, min(place + AHEAD, reach - 1)]
            prefetch(successor_IM, ahead)
            prefetch(weight_IM, ahead)
            for slot in range(successors if source else 0):
                row, weight = successor_IM[source, slot], weight_IM[source, slot]
                if not row or not weight:
                    continue
                mark = head_G[row >> shift] - 1
                while mark >= 0 and chain_N2[mark, 0] != row:
                    mark = chain_N2[mark, 1] - 1
                if mark < 0:
                    mark, count = count, _chain(head_G, used_W, shift, chain_N2, row, count)
                    hidden_N[mark], because_N[mark], sums_N3[mark] = False, 0, 0.0
                by = weight * scale_2K[0, place]
                sums_N3[mark, 0] += by
                sums_N3[mark, 1] += weight * scale_2K[1, place]
                # Of equal ones the latest.
                if by > sums_N3[mark, 2]:
                    sums_N3[mark, 2], because_N[mark] = by, source
        done = 0
        for word in range(len(used_W)):
            bits, used_W[word] = used_W[word], 0
            while bits:
                bucket = (word << WORD) + trailing_zeros(np.int64(bits))
                bits &= bits - np.uint64(1)
                first, mark = done, head_G[bucket] - 1
                head_G[bucket] = 0
                while mark >= 0:
                    row, place = chain_N2[mark, 0], done
                    while place > first and rows_BN[user, place - 1] > row:
                        _move(rows_BN[user], hidden_BN[user], because_BN[user], sums_3BN[:, user], place)
                        place -= 1
                    rows_BN[user, place], hidden_BN[user, place] = row, hidden_N[mark]
                    because_BN[user, place] = because_N[mark]
                    sums_3BN[0, user, place], sums_3BN[1, user, place] = sums_N3[mark, 0], sums_N3[mark, 1]
                    mark, done = chain_N2[mark, 1] - 1, done + 1
        for place in range(done):
            sums_3BN[2, user, place] = sums_3BN[0, user, place] * (PRIOR / (total_I[rows_BN[user, place]] + PRIOR))
    return rows_BN, hidden_BN, sums_3BN, because_BN


@compiled_apart
def _chain(head_G: Integers, used_W: NDArray[np.uint64], shift: int, chain_N2: Integers, row: int, count: int) -> int:
    """Add a mark to its bucket's chain; return how many there are."""
    bucket = row >> shift
    chain_N2[count, 0], chain_N2[count, 1] = row, head_G[bucket]
    head_G[bucket] = count + 1
    used_W[bucket >> WORD] |= np.uint64(1) << np.uint64(bucket & (1 << WORD) - 1)
    return count + 1


@compiled_apart
def _move(rows_N: Integers, hidden_N: NDArray[np.bool_], because_N: Integers, sums_3N: Floats, place: int) -> None:
    """Move the mark before `place` there."""
    rows_N[place], hidden_N[place], because_N[place] = rows_N[place - 1], hidden_N[place - 1], because_N[place - 1]
    sums_3N[0, place], sums_3N[1, place] = sums_3N[0, place - 1], sums_3N[1, place - 1]


@compiled_apart
def _at(rows_BN: Integers, lifts_3BN: Floats, because_BN: Integers, rows_BK: Longs) -> tuple[Floats, Longs]:
    users, count = rows_BK.shape
    lifts_BK3, because_BK = np.zeros((users, count, LIFTS), np.float32), np.zeros((users, count), np.int64)
    for user in range(users):
        for place in range(count):
            row = rows_BK[user, place]
            mark = np.searchsorted(rows_BN[user], row)
            if rows_BN[user, mark] == row:
                for look in range(LIFTS):
                    lifts_BK3[user, place, look] = lifts_3BN[look, user, mark]
                because_BK[user, place] = because_BN[user, mark]
    return lifts_BK3, because_BK
