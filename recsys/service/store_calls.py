"""StoreCalls: single calls to the store, in one thread, bounded like everything that waits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from recsys.batcher import Batcher
from recsys.settings import Settings

Result = TypeVar("Result")


class StoreCalls:
    """Run blocking calls of one kind, named after what asks for them, one after the other."""

    def __init__(self, settings: Settings, name: str = "store") -> None:
        self._batcher: Batcher[Callable[[], Any], Any] = Batcher(
            name, lambda calls: [call() for call in calls], max_batch=1, queue_limit=settings.queue_limit
        )

    def submit(self, call: Callable[[], Result], deadline: float) -> Future[Result]:
        """Return the future of what `call` returns; it is not begun after `deadline` (time.monotonic()).

        The future ends with DeadlinePassed when its turn comes after the deadline.

        Raises:
            Overloaded: when too many calls wait.
        """
        return self._batcher.submit(call, deadline)

    def close(self) -> None:
        """Finish the calls that wait and stop the thread."""
        self._batcher.close()
