"""Encoding: histories and context as integer arrays. The same code for learning and for serving, so neither is skewed.

Shapes: B examples, L history length, P context places.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from recsys.item_table import PADDING_ROW, ItemTable
from recsys.network import GAP_BUCKETS, Histories
from recsys.settings import Settings
from recsys.store.v1.log_pb2 import HistoryEntry

Array = npt.NDArray[np.int64]
Numbers = Sequence[int] | Array


class RowHistory(NamedTuple):
    """A history in rows, class indices and milliseconds since 1970, oldest first."""

    rows: Numbers
    classes: Numbers
    times_ms: Numbers


def row_history(entries: Iterable[HistoryEntry], table: ItemTable, class_index: Mapping[str, int]) -> RowHistory:
    """Look up a history's rows and classes; entries of unknown items or classes are left out."""
    entries = list(entries)
    return known_history(entries, table.look_up(entry.item_id for entry in entries).tolist(), class_index)


def known_history(entries: Sequence[HistoryEntry], rows: list[int], class_index: Mapping[str, int]) -> RowHistory:
    """Return a history whose items have these rows; entries of unknown items or classes are left out."""
    classes: list[int | None] = [class_index.get(entry.feedback_class) for entry in entries]
    times_ms = [entry.time_ms for entry in entries]
    if PADDING_ROW in rows or None in classes:
        known = [row != PADDING_ROW and index is not None for row, index in zip(rows, classes, strict=True)]
        rows, times_ms = list(compress(rows, known)), list(compress(times_ms, known))
        classes = list(compress(classes, known))
    return RowHistory(tuple(rows), cast("tuple[int, ...]", tuple(classes)), tuple(times_ms))


def encode_histories(histories: Sequence[RowHistory], now_ms: Sequence[int], length: int) -> tuple[Array, Array, Array]:
    """Write the last `length` entries of each history as rows, classes and gaps (B, L); see network.Histories."""
    rows_BL = np.zeros((len(histories), length), np.int64)
    classes_BL = np.zeros_like(rows_BL)
    times_BL = np.zeros_like(rows_BL)
    for i, history in enumerate(histories):
        if taken := min(len(history.rows), length):
            rows_BL[i, -taken:] = history.rows[-taken:]
            classes_BL[i, -taken:] = history.classes[-taken:]
            times_BL[i, -taken:] = history.times_ms[-taken:]
    filled_BL = rows_BL != PADDING_ROW
    seconds_BL = np.maximum(np.array(now_ms, np.int64)[:, None] - times_BL, 0) // 1000
    # frexp's exponent of a whole number is its bit length: 0 s is bucket 0, 1 s is 1, 2-3 s are 2, 4-7 s are 3.
    gaps_BL = np.minimum(np.frexp(seconds_BL.astype(np.float64))[1], GAP_BUCKETS - 1).astype(np.int64)
    return rows_BL, (classes_BL + 1) * filled_BL, gaps_BL * filled_BL


def encode_contexts(contexts: Sequence[Mapping[str, str]], settings: Settings) -> Array:
    """Hash each context's pairs to buckets, the same on every machine: (B, P), -1 where empty."""
    buckets_BP = np.full((len(contexts), settings.max_context), -1, np.int64)
    for i, context in enumerate(contexts):
        for j, (key, value) in enumerate(sorted(context.items())[: settings.max_context]):
            buckets_BP[i, j] = zlib.crc32(f"{key}={value}".encode()) % settings.context_buckets
    return buckets_BP


def to_tensor(array: npt.NDArray[np.integer], device: torch.device) -> torch.Tensor:
    """Return an integer array as an int64 tensor on `device`."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)


def to_histories(arrays: Sequence[npt.NDArray[np.integer]], device: torch.device) -> Histories:
    """Return rows, classes and gaps as tensors on `device`."""
    return Histories(*(to_tensor(array, device) for array in arrays))
