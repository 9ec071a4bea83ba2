"""Responses: the bytes of a ScoreResponse written from columns, without an object for each item or class.

What the items of one set of classes have in common is laid out once, by the protobuf library, with places for numbers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from recsys.scorer import ScoredItem, Scores
from recsys.v1 import recommender_pb2

DOUBLE = struct.Struct("<d")
# Of a length-delimited field, beside its number.
LENGTH_DELIMITED = 2
# Sets of classes whose layout is kept: a server has one.
LAYOUTS_KEPT = 4
# Lengths written as the wire format does that are kept: those of ids and items, mostly.
VARINTS_KEPT = 1024


def score_response(scores: Scores, version: int) -> bytes:
    """Return a serialized ScoreResponse, as the protobuf library reads it."""
    layout = _layout(tuple(scores.classes))
    tails = layout.tails(scores.scores_K, scores.probabilities_KC)
    parts: list[bytes] = []
    for place, (item_id, known) in enumerate(zip(scores.item_ids, scores.known_K.tolist(), strict=True)):
        if known:
            name = item_id.encode()
            body = b"".join((ITEM_ID, _varint(len(name)), name, tails[place]))
        else:
            body = scored_item(scores[place]).SerializeToString()
        parts += (ITEMS, _varint(len(body)), body)
    # Of two messages of one kind, one after the other, a reader makes one.
    parts.append(recommender_pb2.ScoreResponse(version=version).SerializeToString())
    return b"".join(parts)


def scored_item(item: ScoredItem) -> recommender_pb2.ScoredItem:
    """Return the message of one candidate."""
    return recommender_pb2.ScoredItem(
        item_id=item.item_id, score=item.score, known=item.known, class_probabilities=item.class_probabilities
    )


class _Layout:
    """Hold what follows the item's id in a ScoredItem that is known, with the places of its doubles."""

    def __init__(self, classes: Sequence[str]) -> None:
        # Irrational, so that no other bytes look like them.
        marks = [math.sqrt(2 + number) / 3 for number in range(1 + len(classes))]
        filled = recommender_pb2.ScoredItem(
            score=marks[0], known=True, class_probabilities=dict(zip(classes, marks[1:], strict=True))
        ).SerializeToString()
        self._places = [filled.index(DOUBLE.pack(mark)) for mark in marks]
        self._filled = np.frombuffer(filled, np.uint8)

    def tails(self, scores_K: NDArray[np.float64], probabilities_KC: NDArray[np.float64]) -> list[bytes]:
        """Return each item's bytes."""
        count, width = len(scores_K), len(self._filled)
        tails_KT = np.tile(self._filled, (count, 1))
        for place, numbers_K in zip(self._places, (scores_K, *probabilities_KC.T), strict=True):
            written = np.ascontiguousarray(numbers_K, "<f8").view(np.uint8)
            tails_KT[:, place : place + DOUBLE.size] = written.reshape(count, DOUBLE.size)
        whole = tails_KT.tobytes()
        return [whole[start : start + width] for start in range(0, len(whole), width)]


_layout = lru_cache(LAYOUTS_KEPT)(_Layout)


@lru_cache(VARINTS_KEPT)
def _varint(number: int) -> bytes:
    """Write a number as the wire format does: seven bits a byte, lowest first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _tag(message: type, name: str) -> bytes:
    field = message.DESCRIPTOR.fields_by_name[name]  # type: ignore[attr-defined]
    return _varint(field.number << 3 | LENGTH_DELIMITED)


ITEMS = _tag(recommender_pb2.ScoreResponse, "items")
ITEM_ID = _tag(recommender_pb2.ScoredItem, "item_id")
