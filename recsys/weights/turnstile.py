"""Turnstile: a lock between processes that many may hold to answer, or one to change; a dead process holds none."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turnstile:
    """Let many answer or one change; who wants to change is not kept waiting by a stream of answers.

    Both are paths of files, opened anew here: locks belong to a descriptor, and an inherited one would share its locks
    with the process that it came from.
    """

    def __init__(self, answers: str, turnstile: str) -> None:
        self._answers, self._turnstile = (os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in (answers, turnstile))
        # Locks are the descriptor's, not the thread's.
        self._own = threading.Lock()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Answer."""
        with self._own:
            with _locked(self._turnstile, fcntl.LOCK_SH):
                fcntl.flock(self._answers, fcntl.LOCK_SH)
            try:
                yield
            finally:
                fcntl.flock(self._answers, fcntl.LOCK_UN)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Change: the turnstile first, which no new answer passes then."""
        with self._own, _locked(self._turnstile, fcntl.LOCK_EX), _locked(self._answers, fcntl.LOCK_EX):
            yield

    def close(self) -> None:
        """Let go."""
        os.close(self._answers)
        os.close(self._turnstile)


@contextmanager
def _locked(descriptor: int, kind: int) -> Iterator[None]:
    fcntl.flock(descriptor, kind)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
