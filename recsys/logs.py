"""Logs: one line per event worth knowing, as text (logfmt) or JSON, on stderr.

An event is a few words and named values. No user's or item's id is among them at level info and above; what comes with
every call is told at level debug only, and what comes often is summed up.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from recsys.settings import Settings

# What comes often is told once in this time.
SUMMARY_SECONDS = 10.0
# Values that logfmt takes as they are.
_PLAIN = re.compile(r"[^\s\"=\x00-\x1f]+")


class Event:
    """Hold an event's words and values; as text it is what a plain handler shows."""

    __slots__ = ("fields", "words")

    def __init__(self, words: str, fields: Mapping[str, Any]) -> None:
        self.words = words
        self.fields = fields

    def __str__(self) -> str:
        return " ".join([self.words, *(f"{name}={_value(value)}" for name, value in self.fields.items())])


def tell(log: logging.Logger, level: int, words: str, **fields: Any) -> None:
    """Log an event; fields that are None are left out."""
    if log.isEnabledFor(level):
        log.log(level, Event(words, {name: value for name, value in fields.items() if value is not None}), stacklevel=2)


class Summary:
    """Sum up what happens often; safe to call from any thread. `clock` gives seconds that only rise."""

    def __init__(self, seconds: float = SUMMARY_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._sums: Counter[str] = Counter()
        self._told = float("-inf")
        self._lock = threading.Lock()

    def add(self, counts: Mapping[str, int]) -> dict[str, int] | None:
        """Add counts; return all that was added since they were last returned, None when that is not long ago."""
        with self._lock:
            self._sums.update(counts)
            now = self._clock()
            if now - self._told < self._seconds:
                return None
            self._told = now
            sums, self._sums = dict(self._sums), Counter()
            return sums


class TextFormatter(logging.Formatter):
    """Write time, level, logger and event on one line, a traceback behind it."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        line = f"{_time(record)} {record.levelname} {record.name}: {_one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """Write one JSON object a line: time, level, logger, event, the event's values, and error where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        about = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        event = record.msg
        if isinstance(event, Event):
            found = {**about, "event": event.words, **event.fields}
        else:
            found = {**about, "event": record.getMessage()}
        if record.exc_info:
            found["error"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


def configure(settings: Settings) -> None:
    """Send this process's log to stderr as `log_format` and `log_level` say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # Other libraries' details are not ours to tell.
    for ours in ("recsys", "trainer"):
        logging.getLogger(ours).setLevel(settings.log_level.upper())


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _value(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")
