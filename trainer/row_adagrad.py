"""RowAdagrad: Adagrad with one accumulator an item row, on the rows of a step alone.

Written twice: in tensors, for every device, and for the CPU as one loop over rows. U distinct rows, I all, D dimension.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recsys.compiled import compiled
from recsys.item_table import PADDING_ROW

# Keeps the first step of a row finite.
EPSILON = 1e-10

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]


def move(vector_ID: Tensor, squares_I: Tensor, rows_U: Tensor, gradient_UD: Tensor, rate: float) -> Tensor:
    """Move the rows' vectors by their gradients, in place; return the rows that moved.

    `squares_I` sums up the mean squares of a row's gradients. What neither follows nor is followed in anything positive
    has no gradient, and stays as it is.
    """
    if vector_ID.device.type != "cpu":
        return _by_tensors(vector_ID, squares_I, rows_U, gradient_UD, rate)
    moved_U = gradient_UD.new_zeros(len(rows_U)).bool()
    _by_loop(
        vector_ID.numpy(),
        squares_I.numpy(),
        rows_U.numpy(),
        gradient_UD.contiguous().numpy(),
        np.float32(rate),
        moved_U.numpy(),
    )
    return rows_U[moved_U]


def _by_tensors(vector_ID: Tensor, squares_I: Tensor, rows_U: Tensor, gradient_UD: Tensor, rate: float) -> Tensor:
    moved_U = (rows_U != PADDING_ROW) & gradient_UD.any(1)
    rows_U, gradient_UD = rows_U[moved_U], gradient_UD[moved_U]
    squares_U = squares_I[rows_U] + gradient_UD.square().mean(1)
    squares_I.index_copy_(0, rows_U, squares_U)
    rate_U1 = rate / (squares_U.sqrt() + EPSILON)[:, None]
    vector_ID.index_copy_(0, rows_U, vector_ID[rows_U] - rate_U1 * gradient_UD)
    return rows_U


@compiled
def _by_loop(
    vector_ID: Floats,
    squares_I: Floats,
    rows_U: Longs,
    gradient_UD: Floats,
    rate: np.float32,
    moved_U: NDArray[np.bool_],
) -> None:
    dimension = vector_ID.shape[1]
    for place in range(len(rows_U)):
        row = rows_U[place]
        if row != PADDING_ROW and gradient_UD[place].any():
            total = np.float32(0.0)
            for column in range(dimension):
                total += gradient_UD[place, column] * gradient_UD[place, column]
            squares_I[row] += total / np.float32(dimension)
            step = rate / (np.sqrt(squares_I[row]) + np.float32(EPSILON))
            for column in range(dimension):
                vector_ID[row, column] -= step * gradient_UD[place, column]
            moved_U[place] = True
