"""Layouts: recognise what a file's columns mean, and which classes of feedback it holds."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import ValidationError

from recsys.errors import InputFileError
from recsys.feedback_file.column import Array, as_numbers, as_texts, as_times_ms, guess_time_scale
from recsys.feedback_file.source import Source
from recsys.settings import CLASS_PRESETS, FeedbackClass

LayoutName = Literal["movielens", "kuairand", "plain"]

# Compared without case, "_", "-" and blanks; the first that a file has is taken.
GUESSES = {
    "user": "user userid uid visitorid visitor customerid customer memberid sessionid session",
    "item": "item itemid iid movieid movie videoid video productid product articleid article songid trackid bookid",
    "time": "time timestamp ts timems datetime date eventtime createdat",
    "feedback_class": "feedbackclass class event eventtype action behavior",
    "value": "rating value score stars",
}
MOST_LEVELS = 20
BINS = 10
MOST_CLASSES = 100


@dataclass(frozen=True, slots=True)
class Columns:
    """Name the columns of a plain file; without `time` the file's order is the stream's."""

    user: str
    item: str
    time: str | None = None
    feedback_class: str | None = None
    value: str | None = None

    def names(self) -> list[str]:
        """List the columns that are named."""
        return [name for f in fields(self) if (name := getattr(self, f.name)) is not None]


MOVIELENS = Columns("userId", "movieId", time="timestamp", value="rating")
KUAIRAND = Columns("user_id", "video_id", time="time_ms", feedback_class="is_click")
WATCHED, TAB = "play_time_ms", "tab"


@dataclass(frozen=True, slots=True)
class Classifier:
    """Know a row's class: by its label, else by its value's level or bin, else always the last one."""

    classes: tuple[FeedbackClass, ...]
    labels: dict[str, int] | None = None
    levels: Array | None = None
    binned: bool = False

    def by_label(self, texts: Array) -> Array:
        """Return class indices, -1 where a label is unknown."""
        labels = self.labels or {}
        codes, found = pd.factorize(texts)
        # A missing label has code -1 and so takes the last entry.
        return np.array([labels.get(text, -1) for text in found] + [-1], np.int8)[codes]

    def by_value(self, values: Array) -> Array:
        """Return class indices, -1 where a value is at no level."""
        if self.levels is None:
            return np.full(len(values), len(self.classes) - 1, np.int8)
        place = np.clip(np.searchsorted(self.levels, values, side="right") - 1, 0, None).astype(np.int8)
        return place if self.binned else np.where(self.levels[place] == values, place, np.int8(-1))


@dataclass(frozen=True, slots=True)
class Layout:
    """Say what a file's columns are and how they are read.

    `time_scale` is milliseconds per unit, None for dates. `ordered` tells that times never fall.
    """

    name: LayoutName
    columns: Columns
    classifier: Classifier
    time_scale: float | None
    ordered: bool
    value_scale: float = 1.0
    context: str | None = None
    drop_copies: bool = False


def recognise(path: Path, source: Source, columns: Columns | None) -> Layout:
    """Find a file's layout: the one that its columns have, or plain with the columns given or guessed by name.

    Reads the columns of time and class (or value) once.

    Raises:
        InputFileError: naming the columns found, when those needed are not among them.
    """
    if repeated := {name for name in source.names if source.names.count(name) > 1}:
        raise InputFileError(f"{path} has columns of the same name: {', '.join(sorted(repeated))}")
    names = set(source.names)
    if columns is None and names >= {*MOVIELENS.names()}:
        ratings = CLASS_PRESETS["ratings"]
        scan = _Scan(source, MOVIELENS.time, time_scale=1e3)
        levels = np.array([float(c.name) for c in ratings])
        return Layout("movielens", MOVIELENS, Classifier(ratings, levels=levels), scan.time_scale, scan.ordered)
    if columns is None and names >= {*KUAIRAND.names()}:
        clicks = Classifier(CLASS_PRESETS["clicks"], labels={"0": 0, "false": 0, "1": 1, "true": 1})
        found = replace(KUAIRAND, value=WATCHED if WATCHED in names else None)
        scan = _Scan(source, KUAIRAND.time, time_scale=1.0)
        return Layout(
            "kuairand",
            found,
            clicks,
            scan.time_scale,
            scan.ordered,
            value_scale=1e-3,
            context=TAB if TAB in names else None,
            drop_copies=True,
        )
    found = columns or _guess(path, source.names)
    if missing := [name for name in found.names() if name not in names]:
        raise _missing(path, f"has no column {', '.join(missing)}", source.names)
    scan = _Scan(source, found.time, found.feedback_class, None if found.feedback_class else found.value)
    return Layout("plain", found, _classify(path, found, scan), scan.time_scale, scan.ordered)


def _guess(path: Path, names: list[str]) -> Columns:
    plain = {"".join(c for c in name.lower() if c not in "_- "): name for name in reversed(names)}
    found = {role: next((plain[n] for n in known.split() if n in plain), None) for role, known in GUESSES.items()}
    user, item = found.pop("user"), found.pop("item")
    if user is None or item is None:
        raise _missing(path, "has no columns that look like a user's and an item's id", names)
    return Columns(user, item, **found)


def _missing(path: Path, what: str, names: list[str]) -> InputFileError:
    return InputFileError(
        f"{path} {what}; it has {', '.join(names)}: name them with --user and --item, "
        "and where there are such with --time, --class and --value"
    )


class _Scan:
    """Learn from a first pass what must be known before the first row: order, unit of time, labels or levels."""

    def __init__(
        self,
        source: Source,
        time: str | None,
        label: str | None = None,
        value: str | None = None,
        *,
        time_scale: float | None = None,
    ) -> None:
        self.time_scale = time_scale
        self.ordered = True
        self.labels: set[str] = set()
        self.levels: set[float] = set()
        self.low, self.high = float("inf"), float("-inf")
        wanted = [name for name in (time, label, value) if name is not None]
        latest, undecided = 0.0, time_scale is None
        for batch in source.batches(wanted) if wanted else ():
            if time is not None:
                column = batch.columns[time]
                if undecided:
                    self.time_scale, undecided = guess_time_scale(column)
                times = as_times_ms(column, self.time_scale)
                times = np.concatenate([[latest], times[~np.isnan(times)]])
                self.ordered, latest = self.ordered and bool(np.all(np.diff(times) >= 0)), times[-1]
            if label is not None and len(self.labels) <= MOST_CLASSES:
                self.labels.update(text for text in as_texts(batch.columns[label]).unique().to_pylist() if text)
            if value is not None:
                self._see(as_numbers(batch.columns[value]))

    def _see(self, values: Array) -> None:
        values = values[np.isfinite(values)]
        if len(values):
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        if len(self.levels) <= MOST_LEVELS:
            self.levels.update(np.unique(values).tolist())


def _classify(path: Path, columns: Columns, scan: _Scan) -> Classifier:
    """Make the classes of a plain file.

    A label is a class of worth 1, positive and in the history, unless it is "impression". Without labels up to 20
    different values are classes, more fall into ten bins of equal width named by their lower edges; all are positive
    and worth their distance from the lowest plus the smallest step, which makes ratings 1 to 5 worth just that.
    """
    if columns.feedback_class is None and columns.value is None:
        return Classifier(CLASS_PRESETS["clicks"])
    try:
        if columns.feedback_class is not None:
            names = sorted(scan.labels)
            if len(names) > MOST_CLASSES:
                raise InputFileError(f"{path}: column {columns.feedback_class} holds over {MOST_CLASSES} classes")
            if not scan.labels - {"impression"}:
                raise InputFileError(f"{path}: column {columns.feedback_class} holds no class but impression")
            worths = [float(name != "impression") for name in names]
            return Classifier(_classes(names, worths), labels={name: i for i, name in enumerate(names)})
        if not scan.levels:
            raise InputFileError(f"{path}: column {columns.value} holds no number")
        binned = len(scan.levels) > MOST_LEVELS
        width = (scan.high - scan.low) / BINS
        levels = scan.low + width * np.arange(BINS) if binned else np.array(sorted(scan.levels))
        step = float(np.diff(levels).min()) if len(levels) > 1 else 1.0
        names = [f"{level:g}" for level in levels]
        if len(set(names)) < len(names):
            names = [repr(level) for level in levels.tolist()]
        worths = (levels - levels[0] + step).tolist()
        return Classifier(_classes(names, worths), levels=levels, binned=binned)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputFileError(f"{path}: {problem['input']!r} cannot be a class: {problem['msg']}") from None


def _classes(names: list[str], worths: list[float]) -> tuple[FeedbackClass, ...]:
    return tuple(
        FeedbackClass(name=name, positive=worth > 0, history=worth > 0, worth=worth)
        for name, worth in zip(names, worths, strict=True)
    )
