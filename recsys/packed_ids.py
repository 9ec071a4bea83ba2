"""PackedIds: ids as places in one buffer of bytes, without an object for each.

Shapes: N ids, T bytes of text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from operator import eq
from typing import overload

import numpy as np
from numpy.typing import NDArray

from recsys.compiled import compiled_apart

Bytes = NDArray[np.uint8]
# Ids made strings at a time.
STRETCH = 1 << 14


class PackedIds(Sequence[str]):
    """Hold ids in their order, "" where there is none; of compiled code it asks that nothing else writes to its arrays.

    `text_T` is UTF-8, of which the id at place n is the `length_N[n]` bytes from `start_N[n]` on. Equal to a list of
    the same strings.
    """

    __slots__ = ("length_N", "start_N", "text_T")

    def __init__(self, text_T: Bytes, start_N: NDArray[np.int64], length_N: NDArray[np.int32]) -> None:
        self.text_T, self.start_N, self.length_N = text_T, start_N, length_N

    @classmethod
    def of(cls, ids: Iterable[str]) -> PackedIds:
        """Return the same ids in this form."""
        if isinstance(ids, cls):
            return ids
        each: Sequence[str | bytes] = ids if isinstance(ids, list | tuple) else list(ids)
        text = "".join(each).encode()  # type: ignore[arg-type]  # strings still
        # Its length is in bytes.
        if not text.isascii():
            each = [one.encode() for one in each]  # type: ignore[union-attr]
        return cls.joined(text, np.fromiter(map(len, each), np.int32, len(each)))

    @classmethod
    def joined(cls, text: bytes | Bytes, length_N: NDArray[np.int32]) -> PackedIds:
        """Return the ids that stand one after the other in `text`, which have so many bytes each."""
        # What may not be written to is of another kind to the compiler, which would begin anew.
        text_T = np.frombuffer(bytearray(text), np.uint8) if isinstance(text, bytes) else text
        return cls(text_T, np.cumsum(length_N, dtype=np.int64) - length_N, length_N)

    def __len__(self) -> int:
        """Count the ids."""
        return len(self.length_N)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> PackedIds: ...
    def __getitem__(self, place: int | slice) -> str | PackedIds:
        """Return the id at a place, or some ids, which are not copied."""
        start, length = self.start_N[place], self.length_N[place]
        if isinstance(place, slice):
            return PackedIds(self.text_T, np.ascontiguousarray(start), np.ascontiguousarray(length))
        return self.text_T[start : start + length].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        """Go through the ids as strings."""
        # Not all ends at once: as Python's numbers they take more than the ids.
        for first in range(0, len(self), STRETCH):
            yield from self[first : first + STRETCH].strings()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) or not isinstance(other, Sequence):
            return False
        return len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have none

    def __add__(self, other: PackedIds) -> PackedIds:
        """Return these ids and then the others."""
        text_T = np.concatenate([self.text(), other.text()])
        return PackedIds.joined(text_T, np.concatenate([self.length_N, other.length_N]))

    def take(self, place_N: NDArray[np.integer]) -> PackedIds:
        """Return the ids at some places; they stay what they are, whatever becomes of these."""
        return PackedIds(self.text_T, self.start_N[place_N], self.length_N[place_N])

    def strings(self) -> list[str]:
        """Return the ids as strings."""
        text, ends = self.text().tobytes(), np.cumsum(self.length_N).tolist()
        if not text.isascii():
            return [text[start:end].decode() for start, end in pairwise([0, *ends])]
        whole = text.decode()
        return [whole[start:end] for start, end in pairwise([0, *ends])]

    def text(self) -> Bytes:
        """Return all ids, one after the other."""
        found_T: Bytes = _text(self.text_T, self.start_N, self.length_N)
        return found_T


@compiled_apart
def _text(text_T: Bytes, start_N: NDArray[np.int64], length_N: NDArray[np.int32]) -> Bytes:
    size = np.int64(0)
    for place in range(len(length_N)):
        size += length_N[place]
    found_T = np.empty(size, np.uint8)
    end = np.int64(0)
    for place in range(len(length_N)):
        start = start_N[place]
        for byte in range(length_N[place]):
            found_T[end + byte] = text_T[start + byte]
        end += length_N[place]
    return found_T
