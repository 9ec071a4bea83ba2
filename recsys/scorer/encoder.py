"""Encoder: users' states and mixing weights, as RecommendationNetwork computes them, in one loop over users.

A batch of short histories is little work and many small steps: one by one they cost more to call than to do.
Shapes as in recsys.network; W a head's width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsys.compiled import compiled_apart
from recsys.network import GAP_BUCKETS, LIFTS, Histories, RecommendationNetwork
from recsys.scorer.lanes import prefetch

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]


class Encoder:
    """Hold the part of one version's network that sees a history alone."""

    def __init__(self, network: RecommendationNetwork) -> None:
        self._network = network
        # With several blocks all places but the last are needed of all blocks but the last: that is work for torch.
        # What settings may add to a block is as well.
        block: Any = network.blocks[0]
        plain = len(network.blocks) == 1 and block.adapter is None and block.prompt is None
        self._compiled = plain and network.position.device.type == "cpu"
        if not self._compiled:
            return
        self._heads = int(block.heads)
        self._eps = float(block.attention_norm.eps)
        self._tables = tuple(
            _array(each) for each in (network.position, network.entry_class.weight, network.gap.weight)
        )
        layers = (block.query, block.value, block.output, block.expand, block.contract)
        self._maps = (_array(block.key.weight), *(_array(layer.weight) for layer in layers))
        self._mix = _array(network.mix.weight), _array(network.mix.bias)
        norms = cast("tuple[nn.LayerNorm, ...]", (block.attention_norm, block.feed_norm))
        self._biases = (
            *(_array(layer.bias) for layer in layers),
            *(_array(each) for norm in norms for each in (norm.weight, norm.bias)),
        )

    def __call__(self, vectors_ID: Tensor, histories: Histories) -> tuple[Tensor, Tensor]:
        """Return the states (B, D) and the weights of the score's parts (B, P)."""
        rows_BL = histories.rows_BL
        if not self._compiled:
            states_BD = self._network.states(vectors_ID, rows_BL, histories)
            return states_BD, self._network.mixing_weights(histories)
        places = (rows_BL.numpy(), histories.classes_BL.numpy(), histories.gaps_BL.numpy())
        # In torch's memory: by the alignment of others the last bits of products would differ from batch to batch.
        states_BD = torch.empty(len(rows_BL), vectors_ID.shape[1])
        weights_BP = torch.empty(len(rows_BL), len(self._mix[1]))
        _states(
            *(vectors_ID.numpy(), *places, *self._tables, *self._maps, *self._biases, self._heads, self._eps),
            *(*self._mix, states_BD.numpy(), weights_BP.numpy()),
        )
        return states_BD, weights_BP


def _array(tensor: Tensor) -> Floats:
    found: Floats = np.array(tensor.detach().numpy())
    return found


@compiled_apart
def _apply(map_OI: Floats, bias_O: Floats, x_I: Floats, found_O: Floats) -> None:
    for row in range(map_OI.shape[0]):
        total = np.float32(0.0)
        for column in range(map_OI.shape[1]):
            total += map_OI[row, column] * x_I[column]
        found_O[row] = total + bias_O[row]


@compiled_apart
def _normalise(x_D: Floats, scale_D: Floats, bias_D: Floats, eps: float) -> None:
    mean = np.float32(0.0)
    for column in range(len(x_D)):
        mean += x_D[column]
    mean /= len(x_D)
    variance = np.float32(0.0)
    for column in range(len(x_D)):
        variance += (x_D[column] - mean) * (x_D[column] - mean)
    inverse = np.float32(1.0 / np.sqrt(variance / len(x_D) + eps))
    for column in range(len(x_D)):
        x_D[column] = (x_D[column] - mean) * inverse * scale_D[column] + bias_D[column]


@compiled_apart
def _attend(x_LD: Floats, used: int, query_D: Floats, key_DD: Floats, heads: int, mixed_HD: Floats) -> None:
    """Mix the used places for each head as the query asks."""
    width = len(query_D) // heads
    asked_D, weight_L = np.empty(len(query_D), np.float32), np.empty(used, np.float32)
    for head in range(heads):
        asked_D[:] = 0.0
        for row in range(head * width, (head + 1) * width):
            scaled = query_D[row] / np.float32(math.sqrt(width))
            for column in range(len(query_D)):
                asked_D[column] += scaled * key_DD[row, column]
        largest = np.float32(-1e30)
        for place in range(used):
            total = np.float32(0.0)
            for column in range(len(query_D)):
                total += asked_D[column] * x_LD[place, column]
            weight_L[place] = total
            largest = max(largest, total)
        sum_ = np.float32(0.0)
        for place in range(used):
            weight_L[place] = np.exp(weight_L[place] - largest)
            sum_ += weight_L[place]
        for column in range(len(query_D)):
            mixed_HD[head, column] = 0.0
        for place in range(used):
            share = weight_L[place] / sum_
            for column in range(len(query_D)):
                mixed_HD[head, column] += share * x_LD[place, column]


@compiled_apart
def _states(
    vectors_ID: Floats,
    rows_BL: Longs,
    classes_BL: Longs,
    gaps_BL: Longs,
    position_LD: Floats,
    class_ND: Floats,
    gap_ND: Floats,
    key_DD: Floats,
    query_DD: Floats,
    value_DD: Floats,
    output_DD: Floats,
    expand_ED: Floats,
    contract_DE: Floats,
    query_D: Floats,
    value_D: Floats,
    output_D: Floats,
    expand_E: Floats,
    contract_D: Floats,
    scale_D: Floats,
    shift_D: Floats,
    feed_scale_D: Floats,
    feed_shift_D: Floats,
    heads: int,
    eps: float,
    mix_PF: Floats,
    mix_P: Floats,
    states_BD: Floats,
    weights_BP: Floats,
) -> None:
    """Write the states and the mixing weights."""
    users, length = rows_BL.shape
    dimension = vectors_ID.shape[1]
    first = len(position_LD) - length
    x_LD, mixed_HD = np.empty((length, dimension), np.float32), np.empty((heads, dimension), np.float32)
    q_D, v_D, o_D = (np.empty(dimension, np.float32), np.empty(dimension, np.float32), np.empty(dimension, np.float32))
    wide_E, last_D = np.empty(len(expand_E), np.float32), np.empty(dimension, np.float32)
    context_F = np.empty(mix_PF.shape[1], np.float32)
    width = dimension // heads
    for place in range(length if users else 0):
        prefetch(vectors_ID, rows_BL[0, place])
    for user in range(users):
        # Those of the next come from memory while this one's are worked on.
        for place in range(length if user + 1 < users else 0):
            prefetch(vectors_ID, rows_BL[user + 1, place])
        filled = 0
        for place in range(length):
            filled += rows_BL[user, place] != 0
        used = 0
        for place in range(length):
            row = rows_BL[user, place]
            # Of a history without entries all places count alike, as if there were any.
            if row or not filled or place == length - 1:
                for column in range(dimension):
                    last_D[column] = (
                        vectors_ID[row, column]
                        + position_LD[first + place, column]
                        + class_ND[classes_BL[user, place], column]
                        + gap_ND[gaps_BL[user, place], column]
                    )
            if row or not filled:
                for column in range(dimension):
                    x_LD[used, column] = last_D[column]
                used += 1
        _apply(query_DD, query_D, last_D, q_D)
        if not filled:
            q_D[:] = 0.0
        _attend(x_LD, used, q_D, key_DD, heads, mixed_HD)
        for row in range(dimension):
            total = np.float32(0.0)
            for column in range(dimension):
                total += value_DD[row, column] * mixed_HD[row // width, column]
            v_D[row] = total + value_D[row]
        _apply(output_DD, output_D, v_D, o_D)
        for column in range(dimension):
            o_D[column] += last_D[column]
        _normalise(o_D, scale_D, shift_D, eps)
        _apply(expand_ED, expand_E, o_D, wide_E)
        for column in range(len(wide_E)):
            value = wide_E[column]
            wide_E[column] = np.float32(0.5) * value * np.float32(1.0 + math.erf(value * 0.7071067811865476))
        _apply(contract_DE, contract_D, wide_E, v_D)
        for column in range(dimension):
            v_D[column] += o_D[column]
        _normalise(v_D, feed_scale_D, feed_shift_D, eps)
        states_BD[user] = v_D
        # What the mixing weights depend on.
        context_F[0], context_F[1] = 1.0, np.log1p(np.float32(filled)) / np.float32(4.0)
        context_F[2] = 0.0 if filled else 1.0
        context_F[3] = np.float32(gaps_BL[user, length - 1]) / np.float32(GAP_BUCKETS) if filled else 0.0
        _apply(mix_PF, mix_P, context_F, weights_BP[user])
        if not filled:
            # Without a history the network and the transition memory have nothing to say.
            weights_BP[user, 0] = 0.0
            weights_BP[user, len(mix_P) - LIFTS :] = 0.0
