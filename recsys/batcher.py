"""Batcher: everything that waits while one batch is being worked on forms the next, in one thread, with no timer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from recsys.errors import DeadlinePassed, Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Hand waiting items to `handler` in batches, and its results, one per item in order, to their futures.

    `handler` runs in the batcher's one thread and never twice at a time. When it raises, that batch's futures get the
    exception and the next batch goes on. `size` weighs an item; a batch takes items in order while their sizes sum to
    at most `max_batch`, and always at least one.
    """

    def __init__(
        self,
        name: str,
        handler: Callable[[list[Item]], Sequence[Result]],
        *,
        max_batch: int,
        queue_limit: int,
        size: Callable[[Item], int] = lambda item: 1,
    ) -> None:
        self._name = name
        self._handler = handler
        self._max_batch = max_batch
        self._queue_limit = queue_limit
        self._size = size
        self._queue: deque[tuple[Item, float | None, Future[Result]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"recsys-{name}", daemon=True)
        self._thread.start()

    def submit(self, item: Item, deadline: float | None = None) -> Future[Result]:
        """Queue an item; its future ends with the handler's result, or with what stood in the way.

        `deadline` is in seconds of time.monotonic(). An item whose deadline has passed when its turn comes ends with
        DeadlinePassed, and the handler never sees it, nor one whose future was cancelled.

        Raises:
            Overloaded: when the queue is full or closed.
        """
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise Overloaded(f"the {self._name} queue is closed: the server is stopping")
            if len(self._queue) >= self._queue_limit:
                raise Overloaded(f"the {self._name} queue is full: {self._queue_limit} calls are waiting")
            self._queue.append((item, deadline, future))
            self._changed.notify()
        return future

    def __len__(self) -> int:
        """Count the items that wait, those being worked on apart."""
        return len(self._queue)

    def close(self) -> None:
        """Take no more items, finish those that wait, and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._take():
            now = time.monotonic()
            live = []
            for item, deadline, future in batch:
                if not future.set_running_or_notify_cancel():
                    continue
                if deadline is not None and deadline <= now:
                    future.set_exception(DeadlinePassed("the deadline passed while the call was waiting for its turn"))
                    continue
                live.append((item, future))
            if live:
                self._handle(live)

    def _take(self) -> list[tuple[Item, float | None, Future[Result]]]:
        """Wait for items and take the next batch; empty when closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            batch: list[tuple[Item, float | None, Future[Result]]] = []
            total = 0
            while self._queue:
                total += self._size(self._queue[0][0])
                if batch and total > self._max_batch:
                    break
                batch.append(self._queue.popleft())
            return batch

    def _handle(self, live: list[tuple[Item, Future[Result]]]) -> None:
        try:
            results = self._handler([item for item, _ in live])
            if len(results) != len(live):
                raise RuntimeError(f"{self._name}: {len(results)} results for {len(live)} items")
        except Exception as error:
            for _, future in live:
                future.set_exception(error)
            return
        for (_, future), result in zip(live, results, strict=True):
            future.set_result(result)
