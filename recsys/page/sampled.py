"""Sampled: something looked at again and again in a thread of its own, as long as anybody asks for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Found = TypeVar("Found")

# Between two looks, and how long after the last question nobody counts as interested any more.
LOOK_SECONDS = 2.0
IDLE_SECONDS = 30.0

_log = logging.getLogger(__name__)


class Sampled(Generic[Found]):
    """Hold what `look` found last; who asks never waits for it, whatever it waits for itself."""

    def __init__(self, name: str, look: Callable[[], Found]) -> None:
        self._look = look
        self._asked = float("-inf")
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._found: Found | None = None
        self._thread = threading.Thread(target=self._run, name=f"recsys-{name}", daemon=True)
        self._thread.start()

    def latest(self) -> Found | None:
        """Return what was found last, None before the first look, and let looking go on."""
        self._asked = time.monotonic()
        self._wanted.set()
        return self._found

    def close(self) -> None:
        """End the thread and wait for it."""
        self._stopping.set()
        self._wanted.set()
        self._thread.join()

    def _run(self) -> None:
        while self._wanted.wait() and not self._stopping.is_set():
            if time.monotonic() - self._asked > IDLE_SECONDS:
                self._wanted.clear()
                continue
            try:
                self._found = self._look()
            except Exception:
                # A thread that ends in silence would leave a page that says for ever what once was.
                _log.exception("could not look at what the page shows")
            self._stopping.wait(LOOK_SECONDS)
