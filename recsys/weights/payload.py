"""WeightPayload: a full copy or a change of the weights, to and from bytes.

The same content gives the same bytes everywhere; bytes that are not a payload give CorruptWeights and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from recsys.errors import CorruptWeights
from recsys.store.v1 import weights_pb2

# What may stand in a payload. An allow-list: a dtype from the store must never name an object or a structure.
DTYPES = {
    name: np.dtype(name).newbyteorder("<") for name in ("float32", "float64", "float16", "int32", "int64", "uint8")
}
ROW = DTYPES["int32"]


def _no_rows() -> NDArray[np.int32]:
    return np.empty(0, ROW)


@dataclass(frozen=True, slots=True, eq=False)
class WeightPayload:
    """Hold whole dense tensors by name, and the changed rows of the item table.

    `rows` are the changed rows, int32, ascending; each of `columns` has one entry of its first axis for each of them.
    `new_items` are the items that got a row, with that row. `whole` says that this is all of a version, so that what
    was held before is dropped. `kept_rows`, unless 0, says that of what was held before only the rows below it stay.
    Two payloads are equal when their `encode` is.
    """

    dense: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    rows: NDArray[np.int32] = field(default_factory=_no_rows)
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    new_items: list[tuple[str, int]] = field(default_factory=list)
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
    message = weights_pb2.WeightPayload(
        dense=_pack(payload.dense),
        rows=payload.rows.astype(ROW, copy=False).tobytes(),
        columns=_pack(payload.columns),
        new_item_ids=[item_id for item_id, _ in payload.new_items],
        new_item_rows=np.array([row for _, row in payload.new_items], ROW).tobytes(),
        whole=payload.whole,
        kept_rows=payload.kept_rows,
    )
    return message.SerializeToString(deterministic=True)


def decode(data: bytes) -> WeightPayload:
    """Unpack a payload; the arrays are read-only views of the bytes.

    Raises:
        CorruptWeights: whatever is wrong with the bytes.
    """
    try:
        message = weights_pb2.WeightPayload.FromString(data)
    except DecodeError as error:
        raise CorruptWeights(f"the payload cannot be parsed: {error}") from None
    # The message is a copy, and so are the arrays: three would be held at once.
    del data
    new_rows = _unpack_rows("new_item_rows", message.new_item_rows)
    if len(new_rows) != len(message.new_item_ids):
        raise CorruptWeights(f"{len(message.new_item_ids)} new items have {len(new_rows)} rows")
    payload = WeightPayload(
        dense=_unpack(message.dense),
        rows=_unpack_rows("rows", message.rows),
        columns=_unpack(message.columns),
        new_items=list(zip(message.new_item_ids, new_rows.tolist(), strict=True)),
        whole=message.whole,
        kept_rows=message.kept_rows,
    )
    if problem := _problem(payload):
        raise CorruptWeights(problem)
    return payload


def _problem(payload: WeightPayload) -> str | None:
    """Say what keeps rows, columns and new items from fitting together, if anything does."""
    rows = payload.rows
    if len(rows) and (rows[0] < 0 or not np.all(rows[1:] > rows[:-1])):
        return "rows: negative, repeated or not ascending"
    for name, column in payload.columns.items():
        if column.ndim == 0 or len(column) != len(rows):
            return f"column {name!r}: shape {column.shape} for {len(rows)} rows"
    new_rows = {row for _, row in payload.new_items}
    if min(new_rows, default=0) < 0:
        return "new items: a row is negative"
    if not len(payload.new_items) == len(new_rows) == len({item_id for item_id, _ in payload.new_items}):
        return "new items: an item or a row is repeated"
    if payload.kept_rows < 0 or (payload.kept_rows and payload.whole):
        return f"kept rows: {payload.kept_rows}{' of what is dropped' if payload.whole else ''}"
    return None


def _pack(tensors: Mapping[str, NDArray[Any]]) -> list[weights_pb2.Tensor]:
    return [
        weights_pb2.Tensor(
            name=name,
            dtype=tensor.dtype.name,
            shape=tensor.shape,
            data=tensor.astype(DTYPES[tensor.dtype.name], copy=False).tobytes(),
        )
        for name, tensor in sorted(tensors.items())
    ]


def _unpack(tensors: Iterable[weights_pb2.Tensor]) -> dict[str, NDArray[Any]]:
    unpacked: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        if tensor.name in unpacked:
            raise CorruptWeights(f"tensor {tensor.name!r} stands twice")
        dtype, shape, data = DTYPES.get(tensor.dtype), tuple(tensor.shape), tensor.data
        if dtype is None:
            raise CorruptWeights(f"tensor {tensor.name!r}: dtype {tensor.dtype!r} is not allowed")
        if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise CorruptWeights(f"tensor {tensor.name!r}: {len(data)} bytes for {tensor.dtype} of shape {shape}")
        try:
            unpacked[tensor.name] = np.ndarray(shape, dtype, buffer=data)
        except ValueError as error:  # more axes, or longer ones beside an empty one, than numpy has
            raise CorruptWeights(f"tensor {tensor.name!r}: {error}") from None
    return unpacked


def _unpack_rows(name: str, data: bytes) -> NDArray[np.int32]:
    if len(data) % ROW.itemsize:
        raise CorruptWeights(f"{name}: {len(data)} bytes are no int32")
    return np.ndarray(len(data) // ROW.itemsize, ROW, buffer=data)
