"""StoreCalls: single calls to the store from the event loop, in one thread, bounded like everything that waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from recsys.batcher import Batcher
from recsys.settings import Settings

Result = TypeVar("Result")


class StoreCalls:
    """Run blocking calls for the catalogue and the model service, one after the other."""

    def __init__(self, settings: Settings) -> None:
        self._batcher: Batcher[Callable[[], Any], Any] = Batcher(
            "store", lambda calls: [call() for call in calls], max_batch=1, queue_limit=settings.queue_limit
        )

    async def run(self, call: Callable[[], Result], deadline: float) -> Result:
        """Return what `call` returns; it is not begun after `deadline` (time.monotonic()).

        Raises:
            Overloaded: when too many calls wait.
            DeadlinePassed: when its turn comes after the deadline.
        """
        return await asyncio.wrap_future(self._batcher.submit(call, deadline))

    def close(self) -> None:
        """Finish the calls that wait and stop the thread."""
        self._batcher.close()
