"""Sources: read the columns of a CSV or Parquet file in batches of bounded size, with every row's line number."""

from __future__ import annotations

import codecs
import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from recsys.errors import InputFileError
from recsys.feedback_file.column import Array

BLOCK_BYTES = 1 << 21
ROWS = 1 << 16
# ASCII's own mark for what could not be decoded; one byte, so that no block grows.
SUBSTITUTE = "\x1a"
# MovieLens' older files have no header.
HEADERLESS = ("userId", "movieId", "rating", "timestamp")


@dataclass(frozen=True, slots=True)
class BadRow:
    """Tell why a row was left out; `line` counts from 1 with the header (in Parquet: the row, from 1)."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Hold rows as the file has them, by column, with the malformed lines among them."""

    lines: Array
    columns: dict[str, Any]
    bad: list[BadRow]


class _Utf8:
    """Pass a file's bytes on with SUBSTITUTE for what is not UTF-8, so that a bad byte costs its row, not the file."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")

    def read(self, size: int) -> bytes:
        # Up to three bytes of a character may be left from the block before, and the result must not exceed `size`.
        block = self._file.read(max(4, size - 3))
        text = self._decoder.decode(block, final=not block)
        return (text if text.isascii() else re.sub("[\udc80-\udcff]", SUBSTITUTE, text)).encode()

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True, slots=True)
class CsvSource:
    """Read delimited text; `names` are its columns in order, `header` the lines before the first row."""

    path: Path
    names: list[str]
    delimiter: str
    header: int
    rows: int
    quote: bool = True

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        """Read the named columns, in the file's order."""
        malformed: deque[BadRow] = deque()
        # "::" is read as ":" with an empty column between any two.
        width = len(self.delimiter)
        names = [part for name in self.names for part in ([name] if width == 1 else [name, f"\0{name}"])]
        names = names if width == 1 else names[:-1]

        def skip(row: Any) -> str:
            found, expected = (-(-n // width) for n in (row.actual_columns, row.expected_columns))
            malformed.append(BadRow(row.number, f"has {found} fields where {expected} are expected"))
            return "skip"

        # Only a single thread numbers the malformed lines.
        read_options = pyarrow.csv.ReadOptions(
            use_threads=False, block_size=BLOCK_BYTES, column_names=names, skip_rows=self.header
        )
        parse_options = pyarrow.csv.ParseOptions(
            delimiter=self.delimiter[0],
            quote_char='"' if self.quote else False,
            newlines_in_values=self.quote,
            ignore_empty_lines=False,
            invalid_row_handler=skip,
        )
        convert_options = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), include_columns=list(wanted), check_utf8=False
        )
        with (
            self.path.open("rb") as file,
            pyarrow.csv.open_csv(
                pa.PythonFile(_Utf8(file), mode="r"), read_options, parse_options, convert_options
            ) as reader,
        ):
            line = self.header
            for batch in reader:
                skipped = np.array([bad.line for bad in malformed], np.int64)
                lines = np.arange(line + 1, line + 1 + len(batch) + len(skipped))
                lines = lines[~np.isin(lines, skipped)][: len(batch)]
                line = int(lines[-1]) if len(lines) else line
                # The reader may be ahead of the batch that it hands out.
                bad = [malformed.popleft() for _ in range(int(np.sum(skipped < line)))]
                # An empty line is no row, neither feedback nor bad; the reader gives it as one of empty values.
                full = np.zeros(len(batch), np.bool_)
                for column in batch.columns:
                    full |= pc.not_equal(column, "").to_numpy(zero_copy_only=False)
                rows = batch if full.all() else batch.filter(pa.array(full))
                yield Batch(lines[full], dict(zip(wanted, rows.columns, strict=True)), bad)
        empty = pa.array([], pa.string())
        yield Batch(np.arange(0), dict.fromkeys(wanted, empty), list(malformed))


@dataclass(frozen=True, slots=True)
class ParquetSource:
    """Read Parquet."""

    path: Path
    names: list[str]
    rows: int

    def batches(self, wanted: Sequence[str]) -> Iterator[Batch]:
        """Read the named columns, in the file's order."""
        row = 1
        with pyarrow.parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=ROWS, columns=list(wanted)):
                yield Batch(np.arange(row, row + len(batch)), {name: decoded(batch[name]) for name in wanted}, [])
                row += len(batch)


Source = CsvSource | ParquetSource


def open_source(path: Path) -> Source:
    """Open a file by its suffix, and count its rows.

    Raises:
        InputFileError: when there is no such file or it cannot hold feedback.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise InputFileError(f"{path} is a directory; give a file of feedback")
    if suffix not in {".csv", ".tsv", ".dat", ".data", ".parquet"}:
        raise InputFileError(f"{path} has an unknown suffix; known are .csv, .tsv, .dat, .data and .parquet")
    if not path.exists():
        raise InputFileError(f"{path} does not exist")
    if suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            return ParquetSource(path, file.schema_arrow.names, file.metadata.num_rows)
    with path.open("rb") as stream:
        first = stream.readline(BLOCK_BYTES).decode("utf-8-sig", errors="replace").rstrip("\r\n")
        stream.seek(0)
        ends, last = 0, b""
        while block := stream.read(BLOCK_BYTES):
            ends, last = ends + block.count(b"\n"), block
    lines = ends + (last[-1:] not in (b"", b"\n"))
    if suffix in {".dat", ".data"}:
        delimiter = "::" if suffix == ".dat" else "\t"
        if len(first.split(delimiter)) != len(HEADERLESS):
            raise InputFileError(f"{path} does not hold user, item, rating and time separated by {delimiter!r}")
        return CsvSource(path, [*HEADERLESS], delimiter, 0, lines, quote=False)
    delimiter = "\t" if suffix == ".tsv" else max(",;\t|", key=first.count)
    names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
    return CsvSource(path, names, delimiter, 1, max(0, lines - 1))


def decoded(column: Any) -> Any:
    """Return a column as plain values where the file keeps it as indices into a dictionary."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
