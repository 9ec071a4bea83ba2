"""A feedback file as a stream: in time order, in bounded memory where the file's order is that of time.

Another file is sorted once, ties in file order, in compact arrays: about 35 bytes a row beside the distinct ids.
"""

from __future__ import annotations

import csv
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.errors import InputFileError
from recsys.feedback import Feedback
from recsys.feedback_file.column import Array, Codes, as_numbers, as_texts, as_times_ms, is_blank, row_digests
from recsys.feedback_file.layout import Columns, Layout, LayoutName, recognise
from recsys.feedback_file.source import ROWS, SUBSTITUTE, BadRow, Batch, Source, open_source
from recsys.feedback_file.titles import read_titles
from recsys.v1.catalog_pb2 import Item


@dataclass(frozen=True, slots=True)
class Chunk:
    """Hold consecutive feedback of a stream as arrays of equal length, and the bad rows met while reading them.

    `classes` are indices into the file's `classes`, `times_ms` is 0 and `values` NaN where the file gives none,
    `contexts` are values of the file's one context column. `digests` identify rows where copies are dropped.
    """

    lines: Array
    user_ids: Array
    item_ids: Array
    classes: Array
    times_ms: Array
    values: Array | None = None
    contexts: Array | None = None
    digests: Array | None = None
    bad: list[BadRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lines)

    def take(self, index: Array) -> Chunk:
        """Pick rows by a mask or by positions; the bad rows stay."""
        picked: dict[str, Any] = {name: array[index] for name, array in self.arrays().items()}
        return replace(self, **picked)

    def arrays(self) -> dict[str, Array]:
        """List the arrays that are there."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "bad"}
        return {name: array for name, array in found.items() if array is not None}


def open_feedback_file(path: Path, columns: Columns | None = None) -> FeedbackFile:
    """Open a file of feedback: .csv, .tsv, .parquet, or MovieLens' .dat and .data.

    The layout is known by the columns; `columns` makes it plain with these. Times may be seconds, milliseconds,
    microseconds or nanoseconds since 1970 (the size of the first ones tells) or ISO 8601 dates, UTC unless they say.

    Raises:
        InputFileError: when there is no such file, or it cannot be read, is empty or lacks columns.
    """
    try:
        source = open_source(path)
        if not source.rows:
            raise InputFileError(f"{path} holds no feedback: it has no rows")
        return FeedbackFile(path, source, recognise(path, source, columns))
    except (pa.ArrowException, OSError, csv.Error, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


class FeedbackFile:
    """Be one file's feedback in time order; made by `open_feedback_file`, read as often as wanted.

    `classes` is what the settings must hold for this file. `rows` counts what may be feedback, for a progress bar.
    KuaiRand's exact copies of a row are left out silently, being artefacts of its export.
    """

    def __init__(self, path: Path, source: Source, layout: Layout) -> None:
        self._path, self._source, self._layout = path, source, layout
        self.layout: LayoutName = layout.name
        self.classes = layout.classifier.classes
        self.rows = source.rows

    def __iter__(self) -> Iterator[Feedback | BadRow]:
        """Yield the stream; bad rows stand where they are in the file, or first if the file must be sorted."""
        names = np.array([c.name for c in self.classes], object)
        for chunk in self.chunks():
            feedback = map(
                Feedback,
                chunk.user_ids.tolist(),
                chunk.item_ids.tolist(),
                names[chunk.classes].tolist(),
                chunk.times_ms.tolist(),
                repeat(None) if chunk.values is None else _with_none(chunk.values),
                repeat(""),
                repeat(""),
                self.contexts(chunk),
            )
            if chunk.bad:
                bad: Iterator[tuple[int, Feedback | BadRow]] = ((row.line, row) for row in chunk.bad)
                good: Iterator[tuple[int, Feedback | BadRow]] = zip(chunk.lines.tolist(), feedback, strict=True)
                yield from (row for _, row in heapq.merge(good, bad, key=itemgetter(0)))
            else:
                yield from feedback

    def chunks(self) -> Iterator[Chunk]:
        """Yield the same stream in arrays, several times faster.

        Raises:
            InputFileError: when the file turns out to be damaged beyond single rows.
        """
        latest: Array = np.array([], np.uint64)
        try:
            for chunk in self._parsed() if self._layout.ordered else self._sorted():
                if chunk.digests is None or not len(chunk):
                    yield chunk
                    continue
                _, first = np.unique(chunk.digests, return_index=True)
                fresh = np.zeros(len(chunk), np.bool_)
                fresh[first] = True
                # Digests lie too far apart for a table; NumPy 2.0.0 fails when it looks whether they do.
                fresh &= ~np.isin(chunk.digests, latest, kind="sort")
                # Copies have the same time, so later ones can only be of rows of the latest time.
                same = chunk.digests[chunk.times_ms == chunk.times_ms[-1]]
                latest = np.concatenate([latest, same]) if chunk.times_ms[0] == chunk.times_ms[-1] else same
                yield chunk.take(fresh)
        except (pa.ArrowException, OSError, csv.Error, UnicodeDecodeError) as error:
            raise _damaged(self._path, error) from None

    def titles(self) -> list[Item]:
        """Read the items from the file that MovieLens and KuaiRand have beside the feedback; [] without one."""
        return read_titles(self._path, self.layout)

    def contexts(self, chunk: Chunk) -> Any:
        """Yield the context of each row of a chunk, one dict shared by equal ones."""
        name, texts = self._layout.context, chunk.contexts
        if name is None or texts is None:
            return repeat({})
        shared = {text: {name: text} if text else {} for text in set(texts.tolist())}
        return [shared[text] for text in texts.tolist()]

    def _parsed(self) -> Iterator[Chunk]:
        layout = self._layout
        context = [layout.context] if layout.context else []
        for batch in self._source.batches(
            self._source.names if layout.drop_copies else layout.columns.names() + context
        ):
            yield self._parse(batch)

    def _parse(self, batch: Batch) -> Chunk:
        layout, names, columns = self._layout, self._layout.columns, batch.columns
        reasons = _Reasons(len(batch.lines))
        users, items = as_texts(columns[names.user]), as_texts(columns[names.item])
        reasons.add_ids("user", users)
        reasons.add_ids("item", items)
        times = np.zeros(len(users))
        if names.time is not None:
            times = as_times_ms(columns[names.time], layout.time_scale)
            reasons.add(np.isnan(times), "time {} is not a time from 1970 to 9999", columns[names.time])
        values = None
        if names.value is not None:
            values = as_numbers(columns[names.value]) * layout.value_scale
            wrong = ~np.isfinite(values)
            if names.feedback_class is not None:
                # Only some classes have a value, such as the price of a purchase.
                wrong &= ~is_blank(columns[names.value])
            reasons.add(wrong, "value {} is not a finite number", columns[names.value])
        if names.feedback_class is not None:
            labels = as_texts(columns[names.feedback_class])
            classes = layout.classifier.by_label(labels.to_numpy(zero_copy_only=False))
            reasons.add(classes < 0, "class {} is unknown", labels)
        elif names.value is not None and values is not None:
            classes = layout.classifier.by_value(values)
            reasons.add(classes < 0, "value {} is none of the ratings 0.5, 1.0, ... 5.0", columns[names.value])
        else:
            classes = layout.classifier.by_value(times)
        contexts = as_texts(columns[layout.context]).fill_null("") if layout.context else None
        chunk = Chunk(
            batch.lines,
            users.to_numpy(zero_copy_only=False),
            items.to_numpy(zero_copy_only=False),
            classes,
            np.nan_to_num(times).astype(np.int64),
            values,
            None if contexts is None else contexts.to_numpy(zero_copy_only=False),
            row_digests(columns) if layout.drop_copies else None,
            batch.bad,
        )
        return reasons.drop_from(chunk)

    def _sorted(self) -> Iterator[Chunk]:
        size = 0
        codes = {name: Codes() for name in ("user_ids", "item_ids", "contexts")}
        whole: dict[str, Array] = {}
        for chunk in self._parsed():
            if chunk.bad:
                yield chunk.take(np.arange(0))
            for name, array in chunk.arrays().items():
                if name in codes:
                    array = codes[name].encode(array)
                # `rows` bounds the feedback, so one allocation serves and nothing is held twice.
                if name not in whole:
                    whole[name] = np.empty(self.rows, array.dtype)
                whole[name][size : size + len(chunk)] = array
            size += len(chunk)
        texts = {name: code.texts() for name, code in codes.items()}
        order = np.argsort(whole["times_ms"][:size], kind="stable")
        for start in range(0, size, ROWS):
            index = order[start : start + ROWS]
            picked: dict[str, Any] = {name: array[index] for name, array in whole.items()}
            yield Chunk(**{name: texts[name][array] if name in texts else array for name, array in picked.items()})


def _with_none(values: Array) -> list[float | None]:
    objects = values.astype(object)
    objects[np.isnan(values)] = None
    listed: list[float | None] = objects.tolist()
    return listed


def _damaged(path: Path, error: Exception) -> InputFileError:
    return InputFileError(f"{path} cannot be read: {str(error).splitlines()[0]}")


class _Reasons:
    """Keep the first reason for leaving out each row of a batch."""

    def __init__(self, rows: int) -> None:
        self._reasons: dict[int, str] = {}
        self._good = np.ones(rows, np.bool_)

    def add(self, wrong: Array, template: str, column: Any) -> None:
        """Note `template` with the value of `column` for each row in the mask."""
        for row in np.flatnonzero(wrong & self._good).tolist():
            value = column[row].as_py()
            self._reasons[row] = template.format(repr("" if value is None else str(value)[:40]))
        self._good &= ~wrong

    def add_ids(self, name: str, ids: Any) -> None:
        """Note ids that are missing or could not be decoded."""
        self.add(is_blank(ids), f"has no {name} id", ids)
        undecodable = pc.fill_null(pc.match_substring(ids, SUBSTITUTE), False)
        self.add(undecodable.to_numpy(zero_copy_only=False), f"{name} id {{}} is not UTF-8", ids)

    def drop_from(self, chunk: Chunk) -> Chunk:
        """Leave the rows out and add them to the bad ones."""
        if not self._reasons:
            return chunk
        bad = [BadRow(int(chunk.lines[row]), reason) for row, reason in self._reasons.items()]
        return replace(chunk.take(self._good), bad=sorted(chunk.bad + bad, key=lambda row: row.line))
