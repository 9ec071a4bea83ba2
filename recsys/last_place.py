"""Last place: what a query per history and head mixes from its entries, and the gradients, in one loop over histories.

The same numbers as the parts of recsys.network, which are for every device, without an array of B x L x D: an entry's
input is summed up while it is looked at. Shapes as there; U item vectors, N classes or gaps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.compiled import compiled

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Flags = NDArray[np.bool_]


def mix(
    q_BHD: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    places: tuple[Tensor, Tensor, Tensor],
    filled_BL: Tensor,
) -> Tensor:
    """Return the inputs of the filled entries, mixed by the softmax of their products with the queries: (B, H, D).

    An input is a sum of four vectors, of the item, the position (the last L), the class and the gap: those of `tables`,
    (., D) each, at `places`, (B, L) each; a position's place is its own. Where nothing is filled every entry counts
    alike. All float32 and on the CPU.
    """
    found: Tensor = _Mix.apply(q_BHD, *tables, *places, filled_BL)  # type: ignore[no-untyped-call]
    return found


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        arrays = [each.detach().contiguous().numpy() for each in given]
        # What comes of it lies in torch's memory: products of matrices may differ in the last bits by its alignment.
        mixed_BHD = torch.zeros_like(given[0], memory_format=torch.contiguous_format)
        ctx.arrays = _forward(*arrays, mixed_BHD.numpy()), *arrays
        return mixed_BHD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = [torch.zeros(array.shape) for array in ctx.arrays[1:6]]
        _backward(gradients[0].contiguous().numpy(), *ctx.arrays, *(each.numpy() for each in found))
        return (*found, None, None, None, None)


@compiled
def _input(
    vectors_UD: Floats,
    position_LD: Floats,
    class_ND: Floats,
    gap_ND: Floats,
    places: tuple[int, int, int, int],
    x_D: Floats,
) -> None:
    u, p, c, g = places
    for column in range(len(x_D)):
        x_D[column] = vectors_UD[u, column] + position_LD[p, column] + class_ND[c, column] + gap_ND[g, column]


@compiled
def _forward(
    q_BHD: Floats,
    vectors_UD: Floats,
    position_LD: Floats,
    class_ND: Floats,
    gap_ND: Floats,
    index_BL: Longs,
    classes_BL: Longs,
    gaps_BL: Longs,
    filled_BL: Flags,
    mixed_BHD: Floats,
) -> Floats:
    """Return the attention, and add up what is mixed by it."""
    users, heads, dimension = q_BHD.shape
    length = index_BL.shape[1]
    first = len(position_LD) - length
    attention_BHL = np.zeros((users, heads, length), np.float32)
    x_LD = np.empty((length, dimension), np.float32)
    for user in range(users):
        silent = not filled_BL[user].any()
        largest_H = np.full(heads, np.float32(-np.inf))
        for place in range(length):
            if silent or filled_BL[user, place]:
                index = index_BL[user, place], first + place, classes_BL[user, place], gaps_BL[user, place]
                _input(vectors_UD, position_LD, class_ND, gap_ND, index, x_LD[place])
                for head in range(heads):
                    total = np.float32(0.0)
                    for column in range(dimension):
                        total += q_BHD[user, head, column] * x_LD[place, column]
                    attention_BHL[user, head, place] = total
                    largest_H[head] = max(largest_H[head], total)
        for head in range(heads):
            sum_ = np.float32(0.0)
            for place in range(length):
                if silent:
                    attention_BHL[user, head, place] = 1.0
                elif filled_BL[user, place]:
                    attention_BHL[user, head, place] = np.exp(attention_BHL[user, head, place] - largest_H[head])
                sum_ += attention_BHL[user, head, place]
            for place in range(length):
                share = attention_BHL[user, head, place] / sum_
                attention_BHL[user, head, place] = share
                if silent or filled_BL[user, place]:
                    for column in range(dimension):
                        mixed_BHD[user, head, column] += share * x_LD[place, column]
    return attention_BHL


@compiled
def _backward(
    gradient_BHD: Floats,
    attention_BHL: Floats,
    q_BHD: Floats,
    vectors_UD: Floats,
    position_LD: Floats,
    class_ND: Floats,
    gap_ND: Floats,
    index_BL: Longs,
    classes_BL: Longs,
    gaps_BL: Longs,
    filled_BL: Flags,
    found_BHD: Floats,
    found_UD: Floats,
    found_PD: Floats,
    found_CD: Floats,
    found_GD: Floats,
) -> None:
    """Add up the gradients of the queries and of the tables in the order of histories and entries."""
    users, heads, dimension = q_BHD.shape
    length = index_BL.shape[1]
    first = len(position_LD) - length
    x_LD, part_HL = np.empty((length, dimension), np.float32), np.empty((heads, length), np.float32)
    moved_D, mean_H = np.empty(dimension, np.float32), np.empty(heads, np.float32)
    for user in range(users):
        silent = not filled_BL[user].any()
        mean_H[:] = 0.0
        for place in range(length):
            if silent or filled_BL[user, place]:
                index = index_BL[user, place], first + place, classes_BL[user, place], gaps_BL[user, place]
                _input(vectors_UD, position_LD, class_ND, gap_ND, index, x_LD[place])
                for head in range(heads):
                    total = np.float32(0.0)
                    for column in range(dimension):
                        total += gradient_BHD[user, head, column] * x_LD[place, column]
                    part_HL[head, place] = total
                    mean_H[head] += attention_BHL[user, head, place] * total
        for place in range(length):
            if silent or filled_BL[user, place]:
                moved_D[:] = 0.0
                for head in range(heads):
                    share = attention_BHL[user, head, place]
                    # The softmax; where nothing is filled its weights are given.
                    logit = np.float32(0.0) if silent else share * (part_HL[head, place] - mean_H[head])
                    for column in range(dimension):
                        found_BHD[user, head, column] += logit * x_LD[place, column]
                        moved_D[column] += share * gradient_BHD[user, head, column] + logit * q_BHD[user, head, column]
                u, p, c, g = index_BL[user, place], first + place, classes_BL[user, place], gaps_BL[user, place]
                for column in range(dimension):
                    found_UD[u, column] += moved_D[column]
                    found_PD[p, column] += moved_D[column]
                    found_CD[c, column] += moved_D[column]
                    found_GD[g, column] += moved_D[column]
