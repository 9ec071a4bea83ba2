from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from recsys.batcher import Batcher
from recsys.errors import DeadlinePassed, Overloaded


class Doubler:
    """Doubles numbers; holds its batch until `gate` opens, and records every batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.entered.release()
        assert self.gate.wait(30)
        if 13 in items:
            raise ValueError("13")
        return [2 * item for item in items]


@pytest.fixture
def doubler() -> Doubler:
    return Doubler()


@pytest.fixture
def batcher(doubler: Doubler) -> Iterator[Batcher[int, int]]:
    batcher = Batcher("test", doubler, max_batch=4, queue_limit=8)
    yield batcher
    doubler.gate.set()
    batcher.close()


def hold(batcher: Batcher[int, int], doubler: Doubler) -> None:
    """Keep the thread busy with the item 0."""
    batcher.submit(0)
    assert doubler.entered.acquire(timeout=30)


def test_what_waits_while_a_batch_is_handled_forms_the_next_up_to_the_maximum(
    batcher: Batcher[int, int], doubler: Doubler
) -> None:
    hold(batcher, doubler)
    futures = [batcher.submit(item) for item in range(1, 7)]
    assert len(batcher) == 6
    doubler.gate.set()
    assert [future.result(30) for future in futures] == [2, 4, 6, 8, 10, 12]
    assert doubler.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert len(batcher) == 0


def test_a_full_queue_refuses(batcher: Batcher[int, int], doubler: Doubler) -> None:
    hold(batcher, doubler)
    futures = [batcher.submit(item) for item in range(1, 9)]
    with pytest.raises(Overloaded, match="8 calls are waiting"):
        batcher.submit(9)
    doubler.gate.set()
    assert [future.result(30) for future in futures] == [2 * item for item in range(1, 9)]


def test_an_item_whose_deadline_passed_is_never_handled(batcher: Batcher[int, int], doubler: Doubler) -> None:
    hold(batcher, doubler)
    late = batcher.submit(1, deadline=time.monotonic())
    in_time = batcher.submit(2, deadline=time.monotonic() + 60)
    doubler.gate.set()
    with pytest.raises(DeadlinePassed):
        late.result(30)
    assert in_time.result(30) == 4
    assert doubler.batches == [[0], [2]]


def test_a_cancelled_item_is_never_handled(batcher: Batcher[int, int], doubler: Doubler) -> None:
    hold(batcher, doubler)
    given_up = batcher.submit(1)
    kept = batcher.submit(2)
    assert given_up.cancel()
    doubler.gate.set()
    assert kept.result(30) == 4
    with pytest.raises(CancelledError):
        given_up.result(30)
    assert doubler.batches == [[0], [2]]


def test_a_failing_batch_fails_alone(batcher: Batcher[int, int], doubler: Doubler) -> None:
    hold(batcher, doubler)
    failing = [batcher.submit(item) for item in (1, 2, 3, 13)]
    fine = batcher.submit(5)
    doubler.gate.set()
    for future in failing:
        with pytest.raises(ValueError, match="13"):
            future.result(30)
    assert fine.result(30) == 10


def test_a_handler_that_loses_an_item_fails_its_batch() -> None:
    batcher: Batcher[int, int] = Batcher("lossy", lambda items: items[1:], max_batch=4, queue_limit=8)
    with pytest.raises(RuntimeError, match="lossy: 0 results for 1 items"):
        batcher.submit(1).result(30)
    batcher.close()


def test_closing_finishes_what_waits_and_takes_no_more(doubler: Doubler) -> None:
    batcher = Batcher("test", doubler, max_batch=4, queue_limit=8)
    hold(batcher, doubler)
    futures = [batcher.submit(item) for item in (1, 2)]
    closer = threading.Thread(target=batcher.close)
    closer.start()
    doubler.gate.set()
    closer.join(30)
    assert [future.result(0) for future in futures] == [2, 4]
    with pytest.raises(Overloaded, match="stopping"):
        batcher.submit(3)


def test_size_bounds_a_batch_but_lets_a_large_item_through_alone() -> None:
    handled: list[list[str]] = []
    gate = threading.Event()
    entered = threading.Semaphore(0)

    def handle(items: list[str]) -> list[int]:
        handled.append(items)
        entered.release()
        assert gate.wait(30)
        return [len(item) for item in items]

    batcher = Batcher("sized", handle, max_batch=4, queue_limit=8, size=len)
    batcher.submit("first")
    assert entered.acquire(timeout=30)
    futures = [batcher.submit(item) for item in ("aa", "bb", "c", "dddddd", "e")]
    gate.set()
    assert [future.result(30) for future in futures] == [2, 2, 1, 6, 1]
    assert handled == [["first"], ["aa", "bb"], ["c"], ["dddddd"], ["e"]]
    batcher.close()
