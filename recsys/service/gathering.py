"""Gathering loop: an event loop that, while calls are refused, lets what comes gather.

Each look for what has come takes the interpreter from the thread that scores. While more comes than can be answered
that costs answers: then looks are apart, and many packets, and what is told of many calls, are passed on together.
Otherwise nothing waits here.
"""

from __future__ import annotations

import asyncio
import selectors
import time

# How far apart looks are, and for how long after a call was refused.
GATHER_SECONDS = 0.005
CROWDED_SECONDS = 0.1


class _Selector(selectors.DefaultSelector):
    """Select as the system's best selector does, while crowded after a wait."""

    crowded_until = float("-inf")

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # At 0 the loop has more to do, and comes again.
        if timeout != 0 and time.monotonic() < self.crowded_until:
            time.sleep(GATHER_SECONDS if timeout is None else min(GATHER_SECONDS, timeout))
        return super().select(timeout)


class GatheringLoop(asyncio.SelectorEventLoop):
    """Gather while it is told that it is crowded."""

    def __init__(self) -> None:
        self._gathering = _Selector()
        super().__init__(self._gathering)

    def crowded(self) -> None:
        """Take note that a call was refused; from any thread."""
        self._gathering.crowded_until = time.monotonic() + CROWDED_SECONDS
