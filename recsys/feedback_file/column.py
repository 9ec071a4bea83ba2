"""Column values: read text, numbers and times out of Arrow columns, a whole column at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from recsys.errors import InputFileError

Array = npt.NDArray[Any]

# What a protobuf Timestamp can hold: the end of the year 9999.
LATEST_MS = 253_402_300_799_999


def as_texts(column: Any) -> Any:
    """Cast a column to text; whole numbers without ".0", as blanks make floats of integers in many files."""
    if pa.types.is_nested(column.type):
        raise InputFileError(f"a column holds {column.type}, where ids, classes or numbers are expected")
    if not pa.types.is_floating(column.type):
        return column.cast(pa.string())
    numbers = as_numbers(column).tolist()
    return pa.array(
        [f"{x:.0f}" if x.is_integer() else str(x) if math.isfinite(x) else None for x in numbers], pa.string()
    )


def as_numbers(column: Any) -> Array:
    """Read a column as float64, NaN where it is none."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        try:
            column = column.cast(pa.float64())
        except pa.ArrowInvalid:
            texts = column.to_numpy(zero_copy_only=False)
            return np.asarray(pd.to_numeric(texts, errors="coerce"), dtype=np.float64)
    try:
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise InputFileError(f"a column holds {column.type}, where numbers are expected") from None


def guess_time_scale(column: Any) -> tuple[float | None, bool]:
    """Return milliseconds per unit (None = dates), and whether nothing here could be read, so look further.

    Dates, if more values are dates than numbers. Else the median tells: under 1e11 are seconds (until the year 5138),
    under 1e14 milliseconds, under 1e17 microseconds, above nanoseconds.
    """
    if pa.types.is_temporal(column.type):
        return None, False
    numbers = as_numbers(column)
    numbers = numbers[np.isfinite(numbers)]
    if 2 * len(numbers) < len(column) and np.sum(~np.isnan(as_times_ms(column, None))) > len(numbers):
        return None, False
    if not len(numbers):
        return 1e3, True
    size = float(np.median(numbers))
    return next((scale for top, scale in ((1e11, 1e3), (1e14, 1.0), (1e17, 1e-3)) if size < top), 1e-6), False


def as_times_ms(column: Any, scale: float | None) -> Array:
    """Read times as whole milliseconds in float64 (exact until the year 9999), NaN outside 1970 to 9999."""
    if scale is not None:
        times = np.rint(as_numbers(column) * scale)
    elif pa.types.is_temporal(column.type):
        times = as_numbers(column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()))
    else:
        texts = pd.Series(as_texts(column).to_numpy(zero_copy_only=False), dtype=object)
        texts = texts.str.replace(r"\s*UTC$", "Z", regex=True)
        found = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce").dt.as_unit("ms")
        times = np.where(found.isna(), np.nan, found.astype("int64").to_numpy())
    return np.where((times >= 0) & (times <= LATEST_MS), times, np.nan)


def is_blank(column: Any) -> Array:
    """Mark values that are null, empty or white space."""
    column = as_texts(column)
    empty = pc.equal(pc.utf8_trim_whitespace(column), "")
    mask: Array = pc.or_kleene(pc.is_null(column), pc.fill_null(empty, True)).to_numpy(zero_copy_only=False)
    return mask


def row_digests(columns: dict[str, Any]) -> Array:
    """Hash whole rows to 64 bits."""
    total = np.zeros(1, np.uint64)
    for column in columns.values():
        number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        values = as_numbers(column) if number else as_texts(column).fill_null("").to_numpy(zero_copy_only=False)
        total = total * np.uint64(0x9E3779B97F4A7C15) + np.asarray(pd.util.hash_array(values), np.uint64)
    return total


class Codes:
    """Number texts in order of appearance."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def encode(self, texts: Array) -> Array:
        """Return the number of each text."""
        codes, found = pd.factorize(texts)
        return np.array([self._codes.setdefault(text, len(self._codes)) for text in found], np.int32)[codes]

    def texts(self) -> Array:
        """List the texts by number."""
        return np.array(list(self._codes), object)
