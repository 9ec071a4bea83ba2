"""Rendezvous: one process waits until the others are ready for what it is about to do; a dead one is not waited for."""

from __future__ import annotations

import fcntl
import os
import time

# Between two looks at whether all are ready.
LOOK_SECONDS = 0.001


class Rendezvous:
    """Wait at numbers that rise by one for those who attend.

    Both are paths of files, opened anew here twice: who attends at an even number holds a lock of the one, who attends
    at an odd number one of the other, and who waits sees whether it can have the lock alone.
    """

    def __init__(self, even: str, odd: str) -> None:
        self._attending, self._waiting = (
            [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in (even, odd)] for _ in range(2)
        )

    def attend(self, number: int) -> None:
        """Be waited for at this number, and at the one before no more."""
        fcntl.flock(self._attending[number % 2], fcntl.LOCK_SH)
        fcntl.flock(self._attending[(number + 1) % 2], fcntl.LOCK_UN)

    def leave(self) -> None:
        """Be waited for no more."""
        for descriptor in self._attending:
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    def wait(self, number: int, seconds: float) -> bool:
        """Wait until nobody attends at this number any more; False when somebody still does after so many seconds."""
        descriptor, deadline = self._waiting[number % 2], time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(LOOK_SECONDS)
                continue
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            return True

    def close(self) -> None:
        """Let go."""
        for descriptor in (*self._attending, *self._waiting):
            os.close(descriptor)
