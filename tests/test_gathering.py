"""An event loop that looks less often for what comes while there is too much of it."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from recsys.service import gathering
from recsys.service.gathering import CROWDED_SECONDS, GATHER_SECONDS, GatheringLoop
from recsys.service.transport import event_loop
from recsys.settings import load


class Clock:
    """Time that passes where somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(gathering, "time", SimpleNamespace(monotonic=found.monotonic, sleep=found.sleep))
    return found


@pytest.fixture
def loop(clock: Clock) -> Iterator[GatheringLoop]:
    """A loop for which there is always something."""
    here, there = socket.socketpair()
    with here, there:
        there.send(b"x")
        made = GatheringLoop()
        made._gathering.register(here, selectors.EVENT_READ)
        yield made
        made.close()


def test_nothing_waits_where_nobody_is_refused(loop: GatheringLoop, clock: Clock) -> None:
    assert all(loop._gathering.select(timeout) for timeout in (None, 0, 1.0))
    assert not clock.slept


def test_looks_are_apart_while_calls_are_refused_and_for_a_while(loop: GatheringLoop, clock: Clock) -> None:
    for _ in range(100):
        loop.crowded()
        assert loop._gathering.select(None)
    for _ in range(100):
        assert loop._gathering.select(None)
    assert set(clock.slept) == {GATHER_SECONDS}
    assert len(clock.slept) == pytest.approx(99 + CROWDED_SECONDS / GATHER_SECONDS, abs=1)


def test_no_timer_is_late_and_what_is_ready_goes_on_at_once(loop: GatheringLoop, clock: Clock) -> None:
    loop.crowded()
    assert loop._gathering.select(0)
    assert not clock.slept
    assert loop._gathering.select(GATHER_SECONDS / 5)
    assert clock.slept == [GATHER_SECONDS / 5]


def test_it_is_for_what_does_not_answer_on_the_loop() -> None:
    for transport, expected in (("native", True), ("grpcio", False)):
        loop = event_loop(load({"transport": transport}, environment={}))
        assert isinstance(loop, GatheringLoop) == expected
        loop.close()
