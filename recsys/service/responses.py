"""Responses: the bytes of answers written from columns, without an object for each item or class.

RecommendResponses are written for all users of a batch in one compiled loop. What the items of a ScoreResponse with one
set of classes have in common is laid out once, by the protobuf library, with places for numbers.
Shapes: B users, M items of each, U different reasons, T bytes of text.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recsys.catalog import CatalogMirror
from recsys.compiled import compiled_apart
from recsys.recommendation_id import most_items, numbers, size, write
from recsys.scorer import Answer, Lists, RankedItems, ScoredItem, Scores
from recsys.scorer.lists import Named
from recsys.v1 import recommender_pb2

DOUBLE = struct.Struct("<d")
# How a field's value is written, which stands beside its number.
VARINT, SIXTY_FOUR_BITS, LENGTH_DELIMITED = 0, 1, 2
# Sets of classes whose layout is kept: a server has one.
LAYOUTS_KEPT = 4
# Lengths written as the wire format does that are kept: those of ids and items, mostly.
VARINTS_KEPT = 1024


class _Titled(NamedTuple):
    """Hold the titles of items by row, ascending, one after the other in a text; an empty one where there is none."""

    rows_U: NDArray[np.int64]
    text_T: NDArray[np.uint8]
    # Of each, and where the last ends.
    starts_U: NDArray[np.int64]


def _bytes(text: bytes) -> NDArray[np.uint8]:
    return np.array(memoryview(text), np.uint8)


_UNTITLED = _Titled(np.zeros(0, np.int64), _bytes(b""), np.zeros(1, np.int64))


class RecommendResponses:
    """Write what is recommended; the answers to a batch come one after the other, and are written with the first."""

    def __init__(self, mirror: CatalogMirror, max_id_bytes: int) -> None:
        self._mirror, self._most = mirror, most_items(max_id_bytes)
        self._last: tuple[Lists, list[bytes]] | None = None

    def of(self, answer: Answer) -> bytes:
        """Return a serialized RecommendResponse, as the protobuf library reads it."""
        items = answer.items
        assert isinstance(items, RankedItems)
        last = self._last
        if last is None or last[0] is not items.lists:
            last = self._last = items.lists, self._written(items.lists, answer.version)
        return last[1][items.user]

    def _written(self, lists: Lists, version: int) -> list[bytes]:
        titled = self._titles(lists) if len(self._mirror) else _UNTITLED
        out_N, ends_B = _write_all(*lists, version, numbers(len(lists.counts_B)), self._most, titled)
        whole, ends = out_N[: ends_B[-1]].tobytes(), ends_B.tolist()
        return [whole[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _titles(self, lists: Lists) -> _Titled:
        """Look up what the items that others often follow are called."""
        rows_U, first_U = np.unique(lists.because.rows_BM, return_index=True)
        places = (column_BM.ravel()[first_U].tolist() for column_BM in lists.because[1:])
        ids = [lists.text_T[start : start + length].tobytes() for start, length in zip(*places, strict=True)]
        titles = [(self._mirror.title(item_id.decode()) or "").encode() for item_id in ids]
        ends_U = np.cumsum([len(title) for title in titles], dtype=np.int64)
        return _Titled(rows_U, _bytes(b"".join(titles)), np.append(np.int64(0), ends_U))


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


def _tag(message: type, name: str, kind: int = LENGTH_DELIMITED) -> bytes:
    field = message.DESCRIPTOR.fields_by_name[name]  # type: ignore[attr-defined]
    return _varint(field.number << 3 | kind)


ITEMS = _tag(recommender_pb2.ScoreResponse, "items")
ITEM_ID = _tag(recommender_pb2.ScoredItem, "item_id")
# All of them numbers of one byte.
(_RESPONSE_ID,), (_RESPONSE_ITEMS,), (_RESPONSE_VERSION,) = (
    _tag(recommender_pb2.RecommendResponse, name, kind)
    for name, kind in (("recommendation_id", LENGTH_DELIMITED), ("items", LENGTH_DELIMITED), ("version", VARINT))
)
(_ID,), (_SCORE,), (_SOURCE,), (_REASON,) = (
    _tag(recommender_pb2.RecommendedItem, name, kind)
    for name, kind in (
        ("item_id", LENGTH_DELIMITED),
        ("score", SIXTY_FOUR_BITS),
        ("source", VARINT),
        ("reason", LENGTH_DELIMITED),
    )
)
_NETWORK, _TRANSITION = int(recommender_pb2.SOURCE_NETWORK), int(recommender_pb2.SOURCE_TRANSITION)


# Of an item its four tags, the score and the source; more than all numbers, tags and fixed words of an item take.
SCORE_AND_SOURCE, BESIDE = 13, 96
# Why an item is here, for a person.
_FITS, _TRENDS = _bytes(b"fits what you chose recently"), _bytes(b"chosen by many at present")
_FOLLOWS = _bytes(b"often follows what is in your history")
_FOLLOWS_ONE, _IN_HISTORY = _bytes(b"often follows '"), _bytes(b"' in your history")
_NOTHING = _bytes(b"")


@compiled_apart
def _write_all(
    text_T: NDArray[np.uint8],
    items: Named,
    because: Named,
    scores_BM: NDArray[np.float32],
    sources_BM: NDArray[np.int64],
    counts_B: NDArray[np.int64],
    version: int,
    number_B: NDArray[np.uint64],
    most: int,
    titled: _Titled,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Write a RecommendResponse for each user, one after the other; return the bytes and where each ends."""
    users, room = len(counts_B), 0
    for user in range(users):
        room += size(min(most, counts_B[user])) + BESIDE
        for place in range(counts_B[user]):
            _, _, length = _name(text_T, because, titled, user, place)
            room += items.lengths_BM[user, place] + length + BESIDE
    out_N, ends_B, at = np.empty(room, np.uint8), np.empty(users, np.int64), 0
    score_1 = np.empty(1, np.float64)
    score_8 = score_1.view(np.uint8)
    for user in range(users):
        told = min(most, counts_B[user])
        out_N[at] = _RESPONSE_ID
        at = _write_number(out_N, at + 1, size(told))
        named = text_T, items.starts_BM[user], items.lengths_BM[user], sources_BM[user]
        at = write(out_N, at, version, number_B[user], *named, told)
        for place in range(counts_B[user]):
            start, length = items.starts_BM[user, place], items.lengths_BM[user, place]
            source, why = sources_BM[user, place], because.rows_BM[user, place]
            before, behind = _reason(source, why)
            name_T, first, name = _name(text_T, because, titled, user, place)
            reason = len(before) + name + len(behind)
            out_N[at] = _RESPONSE_ITEMS
            at = _write_number(out_N, at + 1, _digits(length) + length + _digits(reason) + reason + SCORE_AND_SOURCE)
            out_N[at] = _ID
            at = _copy(out_N, _write_number(out_N, at + 1, length), text_T, start, length)
            out_N[at] = _SCORE
            score_1[0] = scores_BM[user, place]
            at = _copy(out_N, at + 1, score_8, 0, len(score_8))
            out_N[at], out_N[at + 1], out_N[at + 2] = _SOURCE, source, _REASON
            at = _copy(out_N, _write_number(out_N, at + 3, reason), before, 0, len(before))
            at = _copy(out_N, at, name_T, first, name)
            at = _copy(out_N, at, behind, 0, len(behind))
        out_N[at] = _RESPONSE_VERSION
        at = ends_B[user] = _write_number(out_N, at + 1, version)
    return out_N, ends_B


@compiled_apart
def _reason(source: int, why: int) -> Any:
    """Return why an item is here: what stands before the name of the item that it often follows, and behind it."""
    if source == _TRANSITION:
        return (_FOLLOWS_ONE, _IN_HISTORY) if why else (_FOLLOWS, _NOTHING)
    return (_FITS, _NOTHING) if source == _NETWORK else (_TRENDS, _NOTHING)


@compiled_apart
def _name(text_T: NDArray[np.uint8], because: Named, titled: _Titled, user: int, place: int) -> Any:
    """Return what the item is called that another often follows: in which text, where it begins, how long it is."""
    why = because.rows_BM[user, place]
    of = np.searchsorted(titled.rows_U, why)
    if of < len(titled.rows_U) and titled.rows_U[of] == why and titled.starts_U[of] < titled.starts_U[of + 1]:
        return titled.text_T, titled.starts_U[of], titled.starts_U[of + 1] - titled.starts_U[of]
    return text_T, because.starts_BM[user, place], because.lengths_BM[user, place]


@compiled_apart
def _digits(number: int) -> int:
    """Return the bytes that a number takes."""
    found = 1
    while number > 0x7F:
        number >>= 7
        found += 1
    return found


@compiled_apart
def _write_number(out_N: NDArray[np.uint8], at: int, number: int) -> int:
    """Write a number at a place, and return where it ends."""
    while number > 0x7F:
        out_N[at] = number & 0x7F | 0x80
        number >>= 7
        at += 1
    out_N[at] = number
    return at + 1


@compiled_apart
def _copy(out_N: NDArray[np.uint8], at: int, text_T: NDArray[np.uint8], start: int, length: int) -> Any:
    """Copy so many bytes from a place in a text to a place, and return where they end."""
    for each in range(length):
        out_N[at + each] = text_T[start + each]
    return at + length
