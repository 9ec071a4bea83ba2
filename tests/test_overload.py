"""More calls than can be answered: who is refused, when, and with what advice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import grpc
import pytest
from calls import SECONDS, Request, check_refusal, recommend, recommender
from serving import WAYS, Running, serve

from recsys import Client, errors
from recsys.batcher import Batcher, Pace, Stretch
from recsys.service.gathering import GatheringLoop
from recsys.settings import Settings


class Timed:
    """A handler whose batches take as long as the test says, on a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds_each = 1.0
        self.batches: list[list[Any]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def clock(self) -> float:
        return self.now

    def __call__(self, items: list[Any]) -> list[Any]:
        self.batches.append(items)
        self.entered.release()
        assert self.gate.wait(SECONDS)
        self.now += self.seconds_each * len(items)
        return items


@pytest.fixture
def timed() -> Timed:
    return Timed()


@pytest.fixture
def batcher(timed: Timed) -> Iterator[Batcher[Any, Any]]:
    """A batcher of at most 4 items, of which it knows that each takes a second."""
    batcher: Batcher[Any, Any] = Batcher("test", timed, max_batch=4, queue_limit=100, clock=timed.clock)
    for future in teach(batcher, timed):
        future.result(SECONDS)
    # Its turn comes when everything is learned from the batches before.
    batcher.submit("last").result(SECONDS)
    yield batcher
    timed.gate.set()
    batcher.close()


def teach(batcher: Batcher[Any, Any], timed: Timed) -> list[Any]:
    """Let batches of 1 and of 3 be handled, from which the parts of the time are known."""
    futures = hold(batcher, timed, waiting=3)
    timed.gate.set()
    return futures


def hold(batcher: Batcher[Any, Any], timed: Timed, waiting: int) -> list[Any]:
    """Keep the thread busy with a batch of one, and let some wait behind it."""
    while timed.entered.acquire(blocking=False):
        pass
    timed.gate.clear()
    held = [batcher.submit("held")]
    assert timed.entered.acquire(timeout=SECONDS)
    return held + [batcher.submit(number) for number in range(waiting)]


def test_what_cannot_be_in_time_is_refused_at_once(batcher: Batcher[Any, Any], timed: Timed) -> None:
    hold(batcher, timed, waiting=9)
    # A second for the batch in work, four for each of two full ones, two for its own of two: eleven, and half as much
    # again to spare, less a five-hundredth for the one wait that was no longer than expected.
    now = timed.now
    with pytest.raises(errors.Overloaded, match="too long for the deadline: 9 calls are waiting") as caught:
        batcher.submit("late", now + 16.46)
    assert caught.value.retry_seconds == pytest.approx(9.0)
    in_time = batcher.submit("in time", now + 16.48)
    timed.gate.set()
    assert in_time.result(SECONDS) == "in time"
    assert "late" not in chain(*timed.batches)


@pytest.mark.parametrize(("waiting", "seconds"), [(0, 1.0), (3, 1.0), (4, 5.0), (8, 9.0), (12, 13.0)])
def test_the_advice_grows_with_the_queue(
    batcher: Batcher[Any, Any], timed: Timed, waiting: int, seconds: float
) -> None:
    hold(batcher, timed, waiting)
    with pytest.raises(errors.Overloaded) as caught:
        batcher.submit("late", timed.now + 0.1)
    assert caught.value.retry_seconds == pytest.approx(seconds)
    # Half of the batch in work is over.
    timed.now += 0.5
    with pytest.raises(errors.Overloaded) as caught:
        batcher.submit("late", timed.now + 0.1)
    assert caught.value.retry_seconds == pytest.approx(seconds - 0.5)


def test_what_fills_the_next_batch_is_taken_when_it_is_expected_to_be_just_in_time(
    batcher: Batcher[Any, Any], timed: Timed
) -> None:
    hold(batcher, timed, waiting=3)
    # A second for the batch in work, four for its own: nothing to spare.
    with pytest.raises(errors.Overloaded):
        batcher.submit("late", timed.now + 4.9)
    in_time = batcher.submit("in time", timed.now + 5.1)
    timed.gate.set()
    assert in_time.result(SECONDS) == "in time"


def test_looking_in_vain_is_no_part_of_a_batch(timed: Timed) -> None:
    """As in a server that has refused calls for a minute, for want of weights, when the first it can answer comes."""
    batcher: Batcher[Any, Any] = Batcher("test", timed, max_batch=4, queue_limit=100, clock=timed.clock)
    futures: list[Any] = []

    def bring() -> float:
        futures.append(batcher.submit("first"))
        return 0.5

    looks: list[Callable[[], float | None]] = [lambda: 1000.0, lambda: 1000.0, bring, lambda: None]
    batcher.receive_from(lambda patience: looks.pop(0)())
    try:
        while not futures:
            time.sleep(0.001)
        assert futures[0].result(SECONDS) == "first"
        hold(batcher, timed, waiting=0)
        # A second and a half for the batch in work, as much for its own.
        batcher.submit("in time", timed.now + 5)
        with pytest.raises(errors.Overloaded):
            batcher.submit("late", timed.now + 2)
    finally:
        timed.gate.set()
        batcher.close()


def test_the_factor_settles_where_98_in_100_are() -> None:
    stretch = Stretch()
    beyond = 0
    for number in range(3000):
        factor = 1 + 0.01 * (number * 37 % 100)
        beyond += number >= 1000 and factor > stretch.factor
        stretch.add(factor)
    assert beyond / 2000 == pytest.approx(0.02, abs=0.005)
    for _ in range(1000):
        stretch.add(1000.0)
    assert stretch.factor == 3.0
    for _ in range(1000):
        stretch.add(0.5)
    assert stretch.factor == 1.0


def test_an_item_that_meets_no_other_is_always_taken(batcher: Batcher[Any, Any], timed: Timed) -> None:
    timed.seconds_each = 1000.0
    for _ in range(3):
        batcher.submit("slow").result(SECONDS)
    timed.seconds_each = 0.001
    assert batcher.submit("quick", timed.now + 1).result(SECONDS) == "quick"


def test_one_slow_batch_refuses_nobody(batcher: Batcher[Any, Any], timed: Timed) -> None:
    timed.seconds_each = 1000.0
    batcher.submit("slow").result(SECONDS)
    hold(batcher, timed, waiting=3)
    in_time = batcher.submit("in time", timed.now + 10)
    timed.seconds_each = 1.0
    timed.gate.set()
    assert in_time.result(SECONDS) == "in time"


def test_an_item_whose_deadline_passes_while_it_waits_is_never_handled(
    batcher: Batcher[Any, Any], timed: Timed
) -> None:
    hold(batcher, timed, waiting=0)
    late = batcher.submit("late", timed.now + 5)
    timed.now += 6
    timed.gate.set()
    with pytest.raises(errors.DeadlinePassed):
        late.result(SECONDS)
    assert "late" not in chain(*timed.batches)


def test_a_cancelled_item_gives_its_place_to_another(timed: Timed) -> None:
    batcher: Batcher[Any, Any] = Batcher("test", timed, max_batch=4, queue_limit=2)
    _, first, second = hold(batcher, timed, waiting=2)
    with pytest.raises(errors.Overloaded, match="full"):
        batcher.submit("one too many")
    assert first.cancel()
    assert len(batcher) == 1
    third = batcher.submit("in its place")
    timed.gate.set()
    assert [second.result(SECONDS), third.result(SECONDS)] == [1, "in its place"]
    batcher.close()
    assert 0 not in chain(*timed.batches)


def test_batches_are_cut_to_what_is_expected_to_take_the_time_that_is_given(timed: Timed) -> None:
    batcher: Batcher[Any, Any] = Batcher(
        "test", timed, max_batch=100, queue_limit=100, max_seconds=5.0, clock=timed.clock
    )
    for waiting in (9, 12):
        futures = hold(batcher, timed, waiting)
        timed.gate.set()
        for future in futures:
            future.result(SECONDS)
    # While all that is known is one batch of one, the next is as large as may be.
    assert [len(batch) for batch in timed.batches] == [1, 9, 1, 5, 5, 2]
    batcher.close()


def test_a_pace_is_learned_from_batches_of_two_sizes() -> None:
    pace = Pace()
    assert (pace.expect(7), pace.largest(1.0, 32)) == (0.0, 32)
    for _ in range(20):
        pace.add(2, 10 + 2 * 1.0)
        pace.add(8, 10 + 8 * 1.0)
    assert (pace.fixed, pace.each) == (pytest.approx(10), pytest.approx(1))
    assert pace.expect(5) == pytest.approx(15)
    # By the time that is given; by three fixed parts, two of them for the items; by the limit.
    assert [pace.largest(seconds, 32) for seconds in (35.5, 1.0, 100.0)] == [25, 20, 32]


def test_a_pace_that_knows_one_size_only_tries_larger_ones_again() -> None:
    pace = Pace()
    for size in (1, 3):
        pace.add(size, 10.0 * size)
    assert pace.largest(20.0, 32) == 2
    for _ in range(100):
        pace.add(1, 10.0)
    assert pace.largest(20.0, 32) == 32
    assert pace.expect(1) == pytest.approx(10.0, rel=1e-3)


def test_a_pace_follows_what_becomes_slower_and_not_what_is_slow_once() -> None:
    pace = Pace()
    for _ in range(10):
        pace.add(4, 1.0)
    pace.add(4, 1000.0)
    assert pace.expect(4) == pytest.approx(1.1)
    for _ in range(100):
        pace.add(4, 5.0)
    assert pace.expect(4) == pytest.approx(5.0, rel=0.01)


# --- Over a socket


@pytest.fixture(params=WAYS)
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    """Settings for each transport."""
    return settings.model_copy(update=WAYS[request.param])


@pytest.fixture
def full(settings: Settings) -> Iterator[Running]:
    """A server whose scoring is held up, with one call waiting, which is all that may."""
    with serve(settings.model_copy(update={"queue_limit": 1})) as running:
        recommend(running)
        assert running.scorer.entered.acquire(timeout=SECONDS)
        running.scorer.gate.clear()
        stub = recommender(running)
        held = stub.Recommend.future(Request(user_id="held"), timeout=SECONDS)
        assert running.scorer.entered.acquire(timeout=SECONDS)
        waits = stub.Recommend.future(Request(user_id="waits"), timeout=SECONDS)
        until(lambda: waiting_in(running) == 1)
        yield running
        running.scorer.gate.set()
        assert held.result().version == 1
        waits.cancel()


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < deadline


def waiting_in(running: Running) -> int:
    return len(running.server._scoring)


def test_a_refused_call_is_told_how_long_the_queue_takes(full: Running) -> None:
    details = check_refusal(lambda: recommend(full), grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert details["message"] == "the scoring queue is full: 1 calls are waiting"
    with Client(full.target) as client, pytest.raises(errors.Overloaded) as caught:
        client.recommend("u", timeout=SECONDS)
    assert caught.value.retry_seconds
    assert 0 < caught.value.retry_seconds < SECONDS


def test_what_is_refused_makes_the_loop_beside_look_less_often(full: Running) -> None:
    loop = full.loop._loop
    if isinstance(loop, GatheringLoop):
        assert loop._gathering.crowded_until < 0
    check_refusal(lambda: recommend(full), grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert isinstance(loop, GatheringLoop) == (full.settings.transport == "native")
    if isinstance(loop, GatheringLoop):
        assert loop._gathering.crowded_until > 0


def test_a_caller_that_hangs_up_frees_its_place(settings: Settings) -> None:
    with serve(settings.model_copy(update={"queue_limit": 1})) as running:
        stub = recommender(running)
        running.scorer.gate.clear()
        held = stub.Recommend.future(Request(user_id="held"), timeout=SECONDS)
        assert running.scorer.entered.acquire(timeout=SECONDS)
        given_up = stub.Recommend.future(Request(user_id="u"), timeout=SECONDS)
        until(lambda: waiting_in(running) == 1)
        given_up.cancel()
        until(lambda: waiting_in(running) == 0)
        in_its_place = stub.Recommend.future(Request(user_id="u"), timeout=SECONDS)
        until(lambda: waiting_in(running) == 1)
        running.scorer.gate.set()
        assert (held.result().version, in_its_place.result().version) == (1, 1)
        assert running.scorer.batches == [1, 1]
