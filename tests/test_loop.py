"""The loop over real sockets: a click changes the next answer, at once by the history and then by the weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from learning import CPU, small, still
from prometheus_client import CollectorRegistry
from serving import Loop

from recsys.client import Client
from recsys.feedback import Feedback
from recsys.server import Parts, Server, assemble
from recsys.settings import Settings
from trainer.daemon import Daemon
from trainer.metrics import TrainerMetrics

SECONDS = 30


@dataclass
class Running:
    """A server with its real scorer and follower, a client of it, and a trainer to be stepped."""

    client: Client
    parts: Parts
    daemon: Daemon

    def click(self, user_id: str, *item_ids: str, kind: str = "click") -> None:
        feedback = [Feedback(user_id, item_id, kind) for item_id in item_ids]
        assert len(self.client.log_feedback(feedback, timeout=SECONDS)) == len(item_ids)

    def recommended(self, user_id: str, count: int = 100) -> list[str]:
        return [item.item_id for item in self.client.recommend(user_id, count, timeout=SECONDS).items]

    def learn(self) -> int:
        """Learn and publish all that the log holds; return the version when it is served."""
        while self.daemon.step():
            pass
        self.daemon.finish()
        version = self.daemon.store.head()
        assert version is not None
        until(lambda: self.parts.scorer.version == version.version)
        return int(version.version)

    def value(self, name: str, **labels: str) -> float:
        return self.parts.registry.get_sample_value(name, labels) or 0.0


def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + SECONDS
    idle = threading.Event()
    while not true():
        assert time.monotonic() < deadline
        idle.wait(0.005)


@contextmanager
def serving(settings: Settings) -> Iterator[Running]:
    registry = CollectorRegistry()
    daemon = Daemon(settings, TrainerMetrics(registry), CPU, still)
    loop = Loop(settings)
    parts = assemble(settings)
    server = Server(settings, parts)
    try:
        daemon.start()
        loop.run(server.start())
        try:
            loop.run(server.serving())
            with Client(f"127.0.0.1:{server.port}", timeout=SECONDS) as client:
                yield Running(client, parts, daemon)
        finally:
            loop.run(server.stop())
    finally:
        loop.close()
        daemon.close()


@pytest.fixture
def running(settings: Settings) -> Iterator[Running]:
    with serving(small(settings, drain_seconds=0.05)) as running:
        yield running


def test_a_click_changes_the_next_answer(running: Running) -> None:
    assert running.recommended("anna") == []
    running.click("bert", "a", "b", "c", "d", "e")
    version = running.learn()
    first = running.recommended("anna")
    assert sorted(first) == ["a", "b", "c", "d", "e"]
    # At once, by the history: what was clicked does not come back. The weights are still the same ones.
    running.click("anna", first[0])
    answer = running.client.recommend("anna", 100)
    assert sorted(item.item_id for item in answer.items) == sorted(first[1:])
    assert answer.version == version
    # After a step of the trainer, by the weights: what Anna chose trends for everybody.
    scores = {item.item_id: item.score for item in running.client.recommend("carl", 100).items}
    assert running.learn() == version + 1
    answer = running.client.recommend("carl", 100)
    assert answer.version == version + 1
    assert {item.item_id: item.score for item in answer.items} != scores


def test_what_follows_what_is_learned_from_one_click(running: Running) -> None:
    running.click("bert", *"abcdefghij")
    running.learn()
    running.click("anna", "j")
    running.click("anna", "new")
    running.learn()
    running.click("carl", "j")
    answer = running.client.recommend("carl", 100)
    assert answer.items[0].item_id == "new"
    by_item = {item.item_id: item.source for item in answer.items}
    assert by_item["new"] == "transition"


def test_a_new_item_can_be_recommended_after_its_first_feedback(running: Running) -> None:
    running.click("bert", "a", "b")
    running.learn()
    assert not running.client.score("anna", ["new"]).items[0].known
    running.click("bert", "new")
    assert "new" not in running.recommended("anna")
    running.learn()
    assert "new" in running.recommended("anna")
    assert "new" not in running.recommended("bert")
    assert running.client.score("anna", ["new"]).items[0].known


def test_a_new_user_is_served_from_the_first_click_on(running: Running) -> None:
    running.click("bert", *"abcdef")
    running.learn()
    strangers = running.client.recommend("anna", 100)
    assert {item.source for item in strangers.items} == {"trending"}
    running.click("anna", "a")
    # No step of the trainer: the history alone makes the answer Anna's own.
    answer = running.client.recommend("anna", 100)
    assert answer.version == strangers.version
    assert {item.item_id for item in answer.items} == set("bcdef")
    assert "trending" not in {item.source for item in answer.items[:1]}


def test_an_impression_is_learned_and_shown_again(running: Running) -> None:
    running.click("bert", "a", "b")
    running.click("anna", "a", kind="impression")
    running.learn()
    assert running.recommended("anna") == running.recommended("carl")
    assert running.client.status().feedback_learned == 3


def test_all_that_is_accepted_is_learned_once(running: Running) -> None:
    sent = [Feedback(f"user-{n % 5}", f"item-{n % 17}", "click", feedback_id=f"id-{n % 40}") for n in range(55)]
    results = running.client.log_feedback(sent)
    assert len(results) == 55
    running.learn()
    accepted = running.value("recsys_feedback_accepted_total")
    assert accepted == 40
    assert running.value("recsys_feedback_duplicate_total") == 15
    status = running.client.status()
    assert status.feedback_learned == accepted
    records = list(running.client.versions())
    assert max(record.feedback_learned for record in records) == accepted
    # Every one of them was timed from its acceptance to the weights, and then to the first answer.
    until(lambda: running.value("recsys_freshness_seconds_count", stage="accepted_to_applied") == 40)
    running.recommended("user-1")
    until(lambda: running.value("recsys_freshness_seconds_count", stage="accepted_to_answered") == 40)


def test_a_trainer_in_its_own_thread_keeps_up(settings: Settings) -> None:
    """Nothing is stepped by hand: feedback goes in, and the answers change within the time of a few versions."""
    with serving(small(settings, drain_seconds=0.05, publish_seconds=0.02)) as running:
        running.daemon._clock = time.monotonic
        learning = threading.Thread(target=running.daemon.run)
        learning.start()
        try:
            for number in range(30):
                running.click(f"user-{number % 3}", f"item-{number}")
            until(lambda: running.parts.scorer.status.feedback_learned == 30)
            assert sorted(running.recommended("anna")) == sorted(f"item-{n}" for n in range(30))
        finally:
            running.daemon.stopping.set()
            learning.join()
