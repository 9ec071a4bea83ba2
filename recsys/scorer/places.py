"""Places: where rows lie when those of a partition lie together: in blocks of ROWS that are the partition's own.

Of a partition's blocks only the first may have room; what leaves a place is followed there by the last row of that
block, so that nothing else moves.
Shapes: I rows, P places, G blocks, L partitions, R rows that move.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart
from recsys.scorer.lanes import QUAD, QUAD_BYTES, ROWS

NOBODY = -1

Integers = NDArray[np.int32]
Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Places:
    """Hold the place of each row, the row at each place, and the chain of each partition's blocks."""

    place_I: Integers
    row_P: Integers
    next_G: Integers
    first_L: Integers
    # Rows in the partition's first block.
    held_L: Integers
    # The partition each row lies in.
    partition_I: Integers
    # The first of the chain of blocks that are nobody's, and how many there are.
    free_2: Integers

    @classmethod
    def of(cls, partition_I: Integers, partitions: int, capacity: int) -> Places:
        """Give places to all rows, with room for `capacity` rows and two blocks begun in each partition."""
        blocks = -(-capacity // ROWS) + 2 * partitions
        found = cls(
            np.full(capacity, NOBODY, np.int32),
            np.full(blocks * ROWS, NOBODY, np.int32),
            np.arange(1, blocks + 1, dtype=np.int32),
            np.full(partitions, NOBODY, np.int32),
            np.full(partitions, ROWS, np.int32),
            np.zeros(capacity, np.int32),
            np.array([0, blocks], np.int32),
        )
        # In the order of partitions, so that the blocks of each follow one another.
        order_R = np.argsort(partition_I, kind="stable")
        nothing = np.zeros((0, 0), np.uint8)
        _move(*found._arrays(), order_R, partition_I[order_R], nothing, nothing)
        return found

    @property
    def blocks(self) -> int:
        """Return the number of blocks."""
        return len(self.next_G)

    def fit(self, rows: int, changed: int) -> bool:
        """Tell whether so many rows have room, wherever those that change may go."""
        needed = min(changed, changed // ROWS + len(self.first_L))
        return rows <= len(self.place_I) and needed <= int(self.free_2[1])

    def move(
        self, which_R: Longs, to_R: Integers, vectors_GP: NDArray[np.uint8], standing_GP: NDArray[np.uint8]
    ) -> None:
        """Move rows to these partitions; what follows to the places that they leave is moved in the blocks too."""
        _move(*self._arrays(), which_R, to_R, vectors_GP, standing_GP)

    def _arrays(self) -> tuple[Integers, ...]:
        return self.place_I, self.row_P, self.next_G, self.first_L, self.held_L, self.partition_I, self.free_2


@compiled_apart
def _move(
    place_I: Integers,
    row_P: Integers,
    next_G: Integers,
    first_L: Integers,
    held_L: Integers,
    partition_I: Integers,
    free_2: Integers,
    which_R: Longs,
    to_R: Integers,
    vectors_GP: NDArray[np.uint8],
    standing_GP: NDArray[np.uint8],
) -> None:
    for number in range(len(which_R)):
        row, target = which_R[number], to_R[number]
        place = place_I[row]
        if place != NOBODY:
            source = partition_I[row]
            if source == target:
                continue
            held_L[source] -= 1
            block = first_L[source]
            last = block * ROWS + held_L[source]
            follower = row_P[last]
            row_P[place], place_I[follower] = follower, place
            row_P[last] = NOBODY
            for blocks_GP in (vectors_GP, standing_GP):
                _copy(blocks_GP, last, place)
            if not held_L[source]:
                first_L[source], held_L[source] = next_G[block], ROWS
                next_G[block], free_2[0] = free_2[0], block
                free_2[1] += 1
        if held_L[target] == ROWS:
            block = free_2[0]
            free_2[0] = next_G[block]
            free_2[1] -= 1
            next_G[block], first_L[target], held_L[target] = first_L[target], block, 0
        place = first_L[target] * ROWS + held_L[target]
        held_L[target] += 1
        place_I[row], row_P[place], partition_I[row] = place, row, target


@compiled_apart
def _copy(blocks_GP: NDArray[np.uint8], source: int, target: int) -> None:
    """Copy what a block says of one row to another row's place."""
    for quad in range(0, blocks_GP.shape[1], QUAD_BYTES):
        for column in range(QUAD):
            value = blocks_GP[source // ROWS, quad + QUAD * (source % ROWS) + column]
            blocks_GP[target // ROWS, quad + QUAD * (target % ROWS) + column] = value
