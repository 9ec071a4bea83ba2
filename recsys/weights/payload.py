"""WeightPayload: a full copy or a change of the weights, to and from bytes.

The same content gives the same bytes everywhere; bytes that are not a payload give CorruptWeights and nothing else.
A header says what follows; behind it stand the arrays as they are in memory, little-endian, each at a multiple of
eight bytes, so that they are read straight to where they stay.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from recsys.compiled import compiled_apart
from recsys.errors import CorruptWeights
from recsys.item_rows import ItemRows
from recsys.packed_ids import PackedIds
from recsys.store.v1.weights_pb2 import PayloadHeader, Tensor

# What may stand in a payload. An allow-list: a dtype from the store must never name an object or a structure.
DTYPES = {
    name: np.dtype(name).newbyteorder("<") for name in ("float32", "float64", "float16", "int32", "int64", "uint8")
}
ROW = DTYPES["int32"]
# What the bytes begin with, and the length of the header behind it.
_START = struct.Struct("<4sI")
_MAGIC = b"RWP1"
_ALIGNMENT = 8

# Asked for the memory that columns of a whole payload are to be read to; those left out get memory of their own. It
# must be zeros; pages where nothing else is to stand are not written to, and so take no memory.
Place = Callable[[PayloadHeader], Mapping[str, NDArray[Any]]]


class NewItems(Sequence[tuple[str, int]]):
    """Hold items with the rows they got, (item_id, row), without an object for each; "" where a row is free now."""

    def __init__(self, ids: Sequence[str], rows: Sequence[int] | NDArray[np.integer]) -> None:
        self.ids = PackedIds.of(ids)
        self.rows = np.asarray(rows, ROW)

    @classmethod
    def of(cls, items: Sequence[tuple[str, int]]) -> NewItems:
        """Return the same items in this form."""
        return items if isinstance(items, cls) else cls([i for i, _ in items], [row for _, row in items])

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> tuple[str, int]: ...
    @overload
    def __getitem__(self, index: slice) -> NewItems: ...
    def __getitem__(self, index: int | slice) -> tuple[str, int] | NewItems:
        if isinstance(index, slice):
            return NewItems(self.ids[index], self.rows[index])
        return self.ids[index], int(self.rows[index])

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return zip(self.ids, self.rows.tolist(), strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have none

    def __add__(self, other: NewItems) -> NewItems:
        """Return these items and then the others."""
        return NewItems(self.ids + other.ids, np.concatenate([self.rows, other.rows])) if len(self) else other

    def split(self, row: int) -> tuple[NewItems, NewItems]:
        """Return what is up to the first that has this row or a higher one, and what comes from there on."""
        place = int(np.argmax(self.rows >= row)) if np.any(self.rows >= row) else len(self.ids)
        return self[:place], self[place:]

    def continue_from(self, first: int) -> bool:
        """Tell whether the rows are `first`, `first` + 1 and so on."""
        return bool(np.array_equal(self.rows, np.arange(first, first + len(self.ids), dtype=ROW)))


def _no_rows() -> NDArray[np.int32]:
    return np.empty(0, ROW)


@dataclass(frozen=True, slots=True, eq=False)
class WeightPayload:
    """Hold whole dense tensors by name, and the changed rows of the item table.

    `rows` are the changed rows, int32, ascending; each of `columns` has one entry of its first axis for each of them.
    `new_items` are the items that got a row, with that row, and "" with each that lost its item. `whole` says that this
    is all of a version, so that what was held before is dropped. `kept_rows`, unless 0, says that of what was held
    before only the rows below it stay.
    Two payloads are equal when their `encode` is.
    """

    dense: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    rows: NDArray[np.int32] = field(default_factory=_no_rows)
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    new_items: Sequence[tuple[str, int]] = ()
    whole: bool = False
    kept_rows: int = 0


def encode(payload: WeightPayload) -> bytes:
    """Pack a payload; the order of names in its mappings does not show in the bytes.

    Raises:
        ValueError: when the payload breaks what WeightPayload or `decode` demands.
    """
    for name, tensor in (*payload.dense.items(), *payload.columns.items()):
        if tensor.dtype.name not in DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype.name} is none of {', '.join(DTYPES)}")
    if payload.rows.ndim != 1 or payload.rows.dtype.name != "int32":
        raise ValueError(f"rows: {payload.rows.ndim} axes of {payload.rows.dtype.name}, not one of int32")
    if problem := _problem(payload):
        raise ValueError(problem)
    items = NewItems.of(payload.new_items)
    text = items.ids.text()
    header = PayloadHeader(
        rows=len(payload.rows),
        new_items=len(items),
        id_bytes=len(text),
        dense=_describe(payload.dense),
        columns=_describe(payload.columns),
        whole=payload.whole,
        kept_rows=payload.kept_rows,
    )
    arrays = [payload.rows, items.rows, _characters(text, items.ids.length_N), text]
    arrays += [tensors[name] for tensors in (payload.dense, payload.columns) for name in sorted(tensors)]
    packed = header.SerializeToString(deterministic=True)
    parts: list[bytes | memoryview] = [_START.pack(_MAGIC, len(packed)), packed]
    parts.append(bytes(-(_START.size + len(packed)) % _ALIGNMENT))
    for array in arrays:
        plain = np.ascontiguousarray(array, DTYPES[array.dtype.name])
        parts += [_view(plain), bytes(-plain.nbytes % _ALIGNMENT)]
    return b"".join(parts)


def decode(data: bytes) -> WeightPayload:
    """Unpack a payload; the arrays are read-only.

    Raises:
        CorruptWeights: whatever is wrong with the bytes.
    """
    receiver = Receiver(len(data))
    receiver.feed(data)
    return receiver.payload()


class Receiver:
    """Take the `size` bytes of a payload piece by piece, each array's straight to where it stays.

    Every method raises CorruptWeights whatever is wrong with the bytes.
    """

    def __init__(self, size: int, place: Place | None = None) -> None:
        self._size, self._place = size, place
        self._start = b""
        self._header: PayloadHeader | None = None
        self._missing = size
        # Where the bytes behind the header go, in their order, and whether `place` gave that; which of these is being
        # filled, and how far.
        self._targets: list[tuple[memoryview, bool]] = []
        self._target = self._filled = 0

    def feed(self, piece: bytes) -> None:
        """Take the next bytes."""
        if len(piece) > self._missing:
            raise CorruptWeights(f"there are more than {self._size} bytes")
        self._missing -= len(piece)
        view = memoryview(piece)
        if self._header is None:
            self._start += piece
            if (length := self._header_length()) is None:
                return
            view = memoryview(self._start)[length:]
            self._read_header(self._start[_START.size : length], self._size - length)
            self._start = b""
        while len(view):
            target, placed = self._targets[self._target]
            part = view[: len(target) - self._filled]
            write = _write_pages if placed else _write
            write(target[self._filled : self._filled + len(part)], part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == len(target):
                self._target, self._filled = self._target + 1, 0

    def payload(self) -> WeightPayload:
        """Return what all the bytes make."""
        if self._header is None or self._missing:
            raise CorruptWeights(f"{self._missing} bytes of {self._size} are missing")
        rows, new_rows, lengths, text = self._fixed
        payload = WeightPayload(
            dense=self._dense,
            rows=rows,
            columns=self._columns,
            new_items=NewItems(_split(text, lengths), new_rows),
            whole=self._header.whole,
            kept_rows=self._header.kept_rows,
        )
        if problem := _problem(payload):
            raise CorruptWeights(problem)
        for array in (rows, *self._dense.values(), *(self._columns[name] for name in self._own)):
            array.flags.writeable = False
        return payload

    def _header_length(self) -> int | None:
        """Return where the arrays begin, once the header is there."""
        if len(self._start) < _START.size:
            return None
        magic, length = _START.unpack_from(self._start)
        if magic != _MAGIC:
            raise CorruptWeights("the payload does not begin as one of this version of the software does")
        end = _START.size + length
        end += -end % _ALIGNMENT
        if end > self._size:
            raise CorruptWeights(f"a header of {length} bytes does not fit {self._size}")
        return end if len(self._start) >= end else None

    def _read_header(self, packed: bytes, left: int) -> None:
        try:
            # Without the padding behind it.
            header = PayloadHeader.FromString(packed[: _START.unpack_from(self._start)[1]])
        except DecodeError as error:
            raise CorruptWeights(f"the payload cannot be parsed: {error}") from None
        counts = (header.rows, header.new_items, header.new_items, header.id_bytes)
        dense, columns = _shapes(header.dense), _shapes(header.columns)
        # Before anything is allocated: what a header asks for must be what follows.
        needed = sum(_padded(count * size) for count, size in zip(counts, (4, 4, 4, 1), strict=True))
        shapes = (*dense.values(), *columns.values())
        needed += sum(_padded(math.prod(shape) * dtype.itemsize) for shape, dtype in shapes)
        if min(counts) < 0 or needed != left:
            raise CorruptWeights(f"the header tells of {needed} bytes and {left} follow")
        placed = self._place(header) if self._place is not None else {}
        self._own = [name for name in columns if name not in placed]
        self._fixed = [np.empty(n, dtype) for n, dtype in zip(counts, (ROW, ROW, ROW, DTYPES["uint8"]), strict=True)]
        self._dense = {name: _empty(name, *each) for name, each in dense.items()}
        self._columns = {name: placed[name] if name in placed else _empty(name, *columns[name]) for name in columns}
        for array in (*self._fixed, *self._dense.values(), *self._columns.values()):
            padding = memoryview(bytearray(-array.nbytes % _ALIGNMENT))
            given = any(array is each for each in placed.values())
            self._targets += [(each, given) for each in (_view(array), padding) if len(each)]
        self._header = header


def _problem(payload: WeightPayload) -> str | None:
    """Say what keeps rows, columns and new items from fitting together, if anything does."""
    rows = payload.rows
    if len(rows) and (rows[0] < 0 or not np.all(rows[1:] > rows[:-1])):
        return "rows: negative, repeated or not ascending"
    for name, column in payload.columns.items():
        if column.ndim == 0 or len(column) != len(rows):
            return f"column {name!r}: shape {column.shape} for {len(rows)} rows"
    items = NewItems.of(payload.new_items)
    if len(items) and items.rows.min() < 0:
        return "new items: a row is negative"
    # The usual case first: it needs no sorting.
    distinct = len(items) if np.all(items.rows[1:] > items.rows[:-1]) else len(np.unique(items.rows))
    if len(items) != distinct or not _differ(items.ids):
        return "new items: an item or a row is repeated"
    if payload.kept_rows < 0 or (payload.kept_rows and payload.whole):
        return f"kept rows: {payload.kept_rows}{' of what is dropped' if payload.whole else ''}"
    return None


def _differ(ids: PackedIds) -> bool:
    """Tell whether no id, but the empty one, stands there twice."""
    if len(ids):
        try:
            ItemRows().extend(ids)
        except ValueError:
            return False
    return True


def _describe(tensors: Mapping[str, NDArray[Any]]) -> list[Tensor]:
    return [Tensor(name=name, dtype=tensor.dtype.name, shape=tensor.shape) for name, tensor in sorted(tensors.items())]


def _shapes(tensors: Iterable[Tensor]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    for tensor in tensors:
        if tensor.name in shapes:
            raise CorruptWeights(f"tensor {tensor.name!r} stands twice")
        if tensor.dtype not in DTYPES:
            raise CorruptWeights(f"tensor {tensor.name!r}: dtype {tensor.dtype!r} is not allowed")
        if any(size < 0 for size in tensor.shape):
            raise CorruptWeights(f"tensor {tensor.name!r}: shape {list(tensor.shape)} is none")
        shapes[tensor.name] = tuple(tensor.shape), DTYPES[tensor.dtype]
    return shapes


def _empty(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        return np.empty(shape, dtype)
    except ValueError as error:  # more axes, or longer ones beside an empty one, than numpy has
        raise CorruptWeights(f"tensor {name!r}: {error}") from None


def _split(text_T: NDArray[np.uint8], length_N: NDArray[np.int32]) -> PackedIds:
    """Cut UTF-8 into ids of these lengths, in characters."""
    begins_T = _beginnings(text_T)
    characters = len(text_T) if begins_T is None else int(begins_T.sum())
    if np.any(length_N < 0) or int(length_N.sum(dtype=np.int64)) != characters:
        raise CorruptWeights("the new items' ids do not have the lengths that they should have")
    if begins_T is None:
        return PackedIds.joined(text_T, length_N)
    try:
        text_T.tobytes().decode()
    except UnicodeDecodeError as error:
        raise CorruptWeights(f"the new items' ids are not UTF-8: {error.reason}") from None
    place_C = np.append(np.flatnonzero(begins_T), len(text_T))
    end_N = place_C[np.cumsum(length_N, dtype=np.int64)]
    return PackedIds.joined(text_T, np.diff(end_N, prepend=0).astype(ROW))


def _characters(text_T: NDArray[np.uint8], length_N: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the lengths in characters of ids that have so many bytes each."""
    begins_T = _beginnings(text_T)
    if begins_T is None:
        return length_N
    before_T = np.concatenate([np.zeros(1, ROW), np.cumsum(begins_T, dtype=ROW)])
    return np.diff(before_T[np.cumsum(length_N, dtype=np.int64)], prepend=ROW.type(0))


def _beginnings(text_T: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """Tell where characters of UTF-8 begin, None where each is a byte."""
    if not len(text_T) or text_T.max() < 0x80:
        return None
    begins_T: NDArray[np.bool_] = (text_T & 0xC0) != 0x80
    return begins_T


def _write(target: memoryview, part: memoryview) -> None:
    target[:] = part


def _write_pages(target: memoryview, part: memoryview) -> None:
    """Write to memory of zeros, but to no page of it where nothing else would be written."""
    _write_each(np.frombuffer(target, np.uint8), np.frombuffer(part, np.uint8), mmap.PAGESIZE)


@compiled_apart
def _write_each(target_N: NDArray[np.uint8], part_N: NDArray[np.uint8], page: int) -> None:
    first, end = np.int64(0), -np.int64(target_N.ctypes.data) % page
    while first < len(part_N):
        if end > len(part_N):
            end = np.int64(len(part_N))
        # Indices from nought on, or each byte is asked whether its place is negative; one assignment goes byte by byte.
        from_P, to_P, bits = part_N[first:end], target_N[first:end], np.uint8(0)
        for place in range(len(from_P)):
            bits |= from_P[place]
        if bits:
            for place in range(len(from_P)):
                to_P[place] = from_P[place]
        first, end = end, end + page


def _padded(size: int) -> int:
    return size + -size % _ALIGNMENT


def _view(array: NDArray[Any]) -> memoryview:
    flat: Any = array.reshape(-1).view(np.uint8)
    return memoryview(flat) if array.size else memoryview(b"")
