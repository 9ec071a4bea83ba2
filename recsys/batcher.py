"""Batcher: everything that waits while one batch is being worked on forms the next, in one thread, with no timer.

What cannot be in time is refused when it comes, which costs next to nothing, and never worked on: under overload the
work that is done is done for callers who still wait for it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from recsys.errors import DeadlinePassed, Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")
# Submits what has come, waiting for it as many seconds as the function says, which is asked at the last moment. Returns
# the seconds that this took, the waiting apart; None when nothing will come any more.
Look: TypeAlias = Callable[[Callable[[], float]], float | None]

# Of what is known of earlier batches, this much is kept with each new one.
MEMORY = 0.9
# A batch counts as at most this many times slower than expected: one that was slow by chance refuses nobody, and when
# everything has become slower that is known after a few.
SURPRISE = 2.0
# Where a batch's fixed part alone takes long, a batch may take this many times as long: two thirds of the time then go
# into the items.
FIXED_PARTS = 3.0
# The factor grows with a batch that took longer than it said, and shrinks a fiftieth as much with every other: who is
# answered late was worked on for nothing.
FIRST_STRETCH, LARGEST_STRETCH = 1.5, 3.0
STRETCH_MORE, STRETCH_LESS = 1.1, 0.998
# How long a look for items lasts at most: an item that comes another way waits for its end, and so does who closes.
RECEIVE_SECONDS = 0.05


class Pace:
    """Expect how long a batch takes from those before it: a fixed part, and a part for each unit of its size.

    While all are of one size the two parts cannot be told apart; then the second is believed less and less, so that
    larger batches are tried and it is learned anew.
    """

    def __init__(self) -> None:
        self._known = False
        self._size = self._seconds = self._square = self._product = 0.0
        self.fixed = self.each = 0.0

    def add(self, size: int, seconds: float) -> None:
        """Learn from a batch that has ended."""
        kept = MEMORY if self._known else 0.0
        if self._known:
            in_proportion = size * self._seconds / self._size
            seconds = min(seconds, SURPRISE * max(self.expect(size), in_proportion))
        self._known = True
        self._size += (1 - kept) * (size - self._size)
        self._seconds += (1 - kept) * (seconds - self._seconds)
        self._square += (1 - kept) * (size * size - self._square)
        self._product += (1 - kept) * (size * seconds - self._product)
        spread = self._square - self._size**2
        # Sizes that differ by less than a tenth tell more of chance than of the parts.
        if spread > (0.1 * self._size) ** 2:
            self.each = max(0.0, (self._product - self._size * self._seconds) / spread)
        else:
            self.each *= MEMORY
        self.each = min(self.each, self._seconds / self._size)
        self.fixed = self._seconds - self.each * self._size

    def expect(self, size: int) -> float:
        """Return the seconds that a batch of this size will take; 0 when nothing is known."""
        return self.fixed + self.each * size

    def largest(self, seconds: float, limit: int) -> int:
        """Return the largest size up to `limit` that takes no longer than `seconds`, or FIXED_PARTS fixed parts."""
        left = max(seconds, FIXED_PARTS * self.fixed) - self.fixed
        return limit if left >= self.each * limit else max(1, int(left / self.each))


class Stretch:
    """Learn by which factor items take longer than expected, so that 98 in 100 take no longer than it says."""

    def __init__(self) -> None:
        self.factor = FIRST_STRETCH

    def add(self, factor: float) -> None:
        """Learn from the largest factor of a batch."""
        change = STRETCH_MORE if factor > self.factor else STRETCH_LESS
        self.factor = min(LARGEST_STRETCH, max(1.0, self.factor * change))


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Item]):
    """Hold an item with its deadline, and when it came and was expected to be done."""

    item: Item
    deadline: float | None
    came: float
    expected: float


class Batcher(Generic[Item, Result]):
    """Hand waiting items to `handler` in batches, and its results, one per item in order, to their futures.

    `handler` runs in the batcher's one thread and never twice at a time. When it raises, that batch's futures get the
    exception and the next batch goes on. `size` weighs an item; a batch takes items in order while their sizes sum to
    at most `max_batch`, and to no more than what earlier batches let expect in `max_seconds` (longer where a batch of
    one takes that long already), and always at least one.
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
        self._queue: OrderedDict[Future[Result], _Waiting[Item]] = OrderedDict()
        self._waiting_size = 0
        self._pace = Pace()
        # The largest size of the next batch.
        self._limit = max_batch
        self._stretch = Stretch()
        # When the batch in work began, and when it is expected to end.
        self._started: float | None = None
        self._busy_until: float | None = None
        self._changed = threading.Condition()
        self._look: Look | None = None
        # Spent on looking since the last batch.
        self._look_seconds = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"recsys-{name}", daemon=True)
        self._thread.start()

    def submit(self, item: Item, deadline: float | None = None) -> Future[Result]:
        """Queue an item; its future ends with the handler's result, or with what stood in the way.

        `deadline` is in seconds of time.monotonic(). An item whose deadline has passed when its turn comes ends with
        DeadlinePassed, and the handler never sees it, nor one whose future was cancelled: that leaves the queue.

        Raises:
            Overloaded: when the queue is full or closed, or when by the length of the queue and the time of earlier
                batches the result would come after the deadline.
        """
        future: Future[Result] = Future()
        with self._changed:
            now, seconds, refused = self._check(deadline)
            if refused is not None:
                raise refused
            self._queue[future] = _Waiting(item, deadline, now, now + seconds)
            self._waiting_size += self._size(item)
            self._changed.notify()
        future.add_done_callback(self._leave)
        return future

    def __len__(self) -> int:
        """Count the items that wait, those being worked on apart."""
        return len(self._queue)

    def refusal(self, deadline: float | None) -> Overloaded | None:
        """Return what submit would raise at present; None where it would take an item."""
        with self._changed:
            return self._check(deadline)[2]

    def receive_from(self, look: Look) -> None:
        """Let the batcher's own thread look for items before each batch, and wait for them there when none are waiting.

        While a batch is worked on nothing is gained by receiving what can only wait, and two threads that want the
        interpreter at once slow each other down several times over.
        """
        with self._changed:
            self._look = look
            self._changed.notify()

    def busy_seconds(self) -> float:
        """Return how long the batch in work has taken so far; 0 when there is none."""
        started = self._started
        return 0.0 if started is None else self._clock() - started

    def close(self) -> None:
        """Take no more items, finish those that wait, and stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _check(self, deadline: float | None) -> tuple[float, float, Overloaded | None]:
        """Return the time, after how many seconds an item that comes now is expected to be done, and why it may not."""
        now = self._clock()
        if self._closed:
            return now, 0.0, Overloaded(f"the {self._name} queue is closed: the server is stopping")
        wait, seconds = self._expect(now)
        full = len(self._queue) >= self._queue_limit
        # An item that meets no other is always taken: were it refused too, nothing would ever correct what is expected.
        meets = self._busy_until is not None or self._queue
        # What fills the next batch is taken on hope: to be late is no worse than to have left the place empty.
        stretch = self._stretch.factor if self._waiting_size >= self._limit else 1.0
        late = deadline is not None and meets and now < deadline < now + stretch * (wait + seconds)
        if not (full or late):
            return now, wait + seconds, None
        fault = "full" if full else "too long for the deadline"
        refused = Overloaded(f"the {self._name} queue is {fault}: {len(self._queue)} calls are waiting", wait)
        return now, wait + seconds, refused

    def _expect(self, now: float) -> tuple[float, float]:
        """Return how long an item that comes now will wait for its batch, and what that batch will take."""
        limit = self._limit
        before, beside = divmod(self._waiting_size, limit)
        left = max(0.0, self._busy_until - now) if self._busy_until is not None else 0.0
        return left + before * self._pace.expect(limit), self._pace.expect(beside + 1)

    def _leave(self, future: Future[Result]) -> None:
        if future.cancelled():
            with self._changed:
                self._forget(future)

    def _forget(self, future: Future[Result]) -> None:
        waiting = self._queue.pop(future, None)
        if waiting is not None:
            self._waiting_size -= self._size(waiting.item)

    def _work(self) -> None:
        while batch := self._take():
            now = self._clock()
            live = []
            for future, waiting in batch:
                if not future.set_running_or_notify_cancel():
                    continue
                if waiting.deadline is not None and waiting.deadline <= now:
                    future.set_exception(DeadlinePassed("the deadline passed while the call was waiting for its turn"))
                    continue
                live.append((waiting, future))
            if live:
                size = sum(self._size(waiting.item) for waiting, _ in live)
                with self._changed:
                    self._started, self._busy_until = now, now + self._pace.expect(size)
                results = self._handle(live)
                _end(live, results)
                with self._changed:
                    ended = self._clock()
                    self._learn_stretch([waiting for waiting, _ in live], ended)
                    self._pace.add(size, ended - now + self._look_seconds)
                    self._limit = self._pace.largest(self._max_seconds, self._max_batch)
                    self._look_seconds = 0.0
                    self._started = self._busy_until = None

    def _learn_stretch(self, done: list[_Waiting[Item]], ended: float) -> None:
        # Nothing was expected before anything was known.
        taken = [(ended - each.came) / (each.expected - each.came) for each in done if each.expected > each.came]
        if taken:
            self._stretch.add(max(taken))

    def _take(self) -> list[tuple[Future[Result], _Waiting[Item]]]:
        """Wait for items and take the next batch; empty when closed and nothing waits."""
        self._gather()
        with self._changed:
            batch: list[tuple[Future[Result], _Waiting[Item]]] = []
            total, limit = 0, self._limit
            while self._queue:
                future, waiting = next(iter(self._queue.items()))
                total += self._size(waiting.item)
                if batch and total > limit:
                    break
                batch.append((future, waiting))
                self._forget(future)
            return batch

    def _gather(self) -> None:
        """Wait until something waits or the batcher is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed or self._look)
                look = self._look
            if look is not None:
                seconds = look(self._patience)
                self._look_seconds += seconds or 0.0
                if seconds is None:
                    self._look = None
            if self._queue or self._closed:
                return
            # What brought nothing is no part of what the next batch takes: before the first weights all is refused.
            self._look_seconds = 0.0

    def _patience(self) -> float:
        return 0.0 if self._queue or self._closed else RECEIVE_SECONDS

    def _handle(self, live: list[tuple[_Waiting[Item], Future[Result]]]) -> Sequence[Result] | Exception:
        try:
            results = self._handler([waiting.item for waiting, _ in live])
            if len(results) != len(live):
                raise RuntimeError(f"{self._name}: {len(results)} results for {len(live)} items")
        except Exception as error:
            return error
        return results


def _end(live: list[tuple[_Waiting[Item], Future[Result]]], results: Sequence[Result] | Exception) -> None:
    if isinstance(results, Exception):
        for _, future in live:
            future.set_exception(results)
        return
    for (_, future), result in zip(live, results, strict=True):
        future.set_result(result)
