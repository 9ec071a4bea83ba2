"""Batcher: everything that waits while one batch is being worked on forms the next, in one thread, with no timer.

What cannot be in time is refused when it comes, which costs next to nothing, and never worked on: under overload the
work that is done is done for callers who still wait for it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from recsys.errors import DeadlinePassed, Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")

# Batches by whose times the next ones are judged. The most efficient of them counts: one that was slow by chance
# refuses nobody.
RECENT = 3


class Batcher(Generic[Item, Result]):
    """Hand waiting items to `handler` in batches, and its results, one per item in order, to their futures.

    `handler` runs in the batcher's one thread and never twice at a time. When it raises, that batch's futures get the
    exception and the next batch goes on. `size` weighs an item; a batch takes items in order while their sizes sum to
    at most `max_batch`, and to no more than what recent batches let expect in `max_seconds`, and always at least one.
    """

    def __init__(
        self,
        name: str,
        handler: Callable[[list[Item]], Sequence[Result]],
        *,
        max_batch: int,
        queue_limit: int,
        max_seconds: float = float("inf"),
        size: Callable[[Item], int] = lambda item: 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._handler = handler
        self._max_batch = max_batch
        self._queue_limit = queue_limit
        self._max_seconds = max_seconds
        self._size = size
        self._clock = clock
        self._queue: OrderedDict[Future[Result], tuple[Item, float | None]] = OrderedDict()
        self._waiting_size = 0
        # The size of a batch and the seconds that it took.
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._batch_started: float | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"recsys-{name}", daemon=True)
        self._thread.start()

    def submit(self, item: Item, deadline: float | None = None) -> Future[Result]:
        """Queue an item; its future ends with the handler's result, or with what stood in the way.

        `deadline` is in seconds of time.monotonic(). An item whose deadline has passed when its turn comes ends with
        DeadlinePassed, and the handler never sees it, nor one whose future was cancelled: that leaves the queue.

        Raises:
            Overloaded: when the queue is full or closed, or when by the length of the queue and the time of recent
                batches the result would come after the deadline.
        """
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise Overloaded(f"the {self._name} queue is closed: the server is stopping")
            now = self._clock()
            wait, seconds = self._expect(now)
            full = len(self._queue) >= self._queue_limit
            # With the time of one batch to spare. An item that meets no other is always taken: were it refused too,
            # nothing would ever correct what is expected.
            late = deadline is not None and wait > 0 and now < deadline < now + wait + 2 * seconds
            if full or late:
                fault = "full" if full else "too long for the deadline"
                raise Overloaded(f"the {self._name} queue is {fault}: {len(self._queue)} calls are waiting", wait)
            self._queue[future] = (item, deadline)
            self._waiting_size += self._size(item)
            self._changed.notify()
        future.add_done_callback(self._leave)
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

    def _expect(self, now: float) -> tuple[float, float]:
        """Return how long an item that comes now will wait for its batch, and what that batch will take.

        Both are 0 when nothing is known yet, and the first when nothing is waiting or being worked on.
        """
        if not self._recent:
            return 0.0, 0.0
        seconds = self._efficient()[1]
        if self._batch_started is None and not self._queue:
            return 0.0, seconds
        left = max(0.0, self._batch_started + seconds - now) if self._batch_started is not None else 0.0
        return left + seconds * (self._waiting_size // self._limit()), seconds

    def _efficient(self) -> tuple[int, float]:
        """Return the recent batch that took the least for its size."""
        return min(self._recent, key=lambda batch: batch[1] / batch[0])

    def _limit(self) -> int:
        """Return the largest size of the next batch."""
        if not self._recent or self._max_seconds == float("inf"):
            return self._max_batch
        size, seconds = self._efficient()
        return max(1, min(self._max_batch, int(size * self._max_seconds / max(seconds, 1e-9))))

    def _leave(self, future: Future[Result]) -> None:
        if future.cancelled():
            with self._changed:
                self._forget(future)

    def _forget(self, future: Future[Result]) -> None:
        waiting = self._queue.pop(future, None)
        if waiting is not None:
            self._waiting_size -= self._size(waiting[0])

    def _work(self) -> None:
        while batch := self._take():
            now = self._clock()
            live = []
            for future, item, deadline in batch:
                if not future.set_running_or_notify_cancel():
                    continue
                if deadline is not None and deadline <= now:
                    future.set_exception(DeadlinePassed("the deadline passed while the call was waiting for its turn"))
                    continue
                live.append((item, future))
            if live:
                with self._changed:
                    self._batch_started = now
                results = self._handle(live)
                with self._changed:
                    self._recent.append((sum(self._size(item) for item, _ in live), self._clock() - now))
                    self._batch_started = None
                _end(live, results)

    def _take(self) -> list[tuple[Future[Result], Item, float | None]]:
        """Wait for items and take the next batch; empty when closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            batch: list[tuple[Future[Result], Item, float | None]] = []
            total, limit = 0, self._limit()
            while self._queue:
                future, (item, deadline) = next(iter(self._queue.items()))
                total += self._size(item)
                if batch and total > limit:
                    break
                batch.append((future, item, deadline))
                self._forget(future)
            return batch

    def _handle(self, live: list[tuple[Item, Future[Result]]]) -> Sequence[Result] | Exception:
        try:
            results = self._handler([item for item, _ in live])
            if len(results) != len(live):
                raise RuntimeError(f"{self._name}: {len(results)} results for {len(live)} items")
        except Exception as error:
            return error
        return results


def _end(live: list[tuple[Item, Future[Result]]], results: Sequence[Result] | Exception) -> None:
    if isinstance(results, Exception):
        for _, future in live:
            future.set_exception(results)
        return
    for (_, future), result in zip(live, results, strict=True):
        future.set_result(result)
