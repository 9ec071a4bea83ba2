"""Why a score is what it is, and where a version comes from, against what can be asked for by hand."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import pytest
from calls import SECONDS, check_refusal, violations
from learning import START_MS, append, make_feedback, small, tick, trainer
from serving import Loop, Running, serve

from recsys.catalog import Item
from recsys.cli.app import main
from recsys.client import AsyncClient, Client
from recsys.errors import StoreUnavailable
from recsys.feedback import Feedback
from recsys.server import Server, assemble
from recsys.settings import Settings
from recsys.v1 import recommender_pb2
from recsys.v1.recommender_pb2_grpc import RecommenderServiceStub
from trainer.daemon import Daemon

# What floating point leaves of a sum of parts of this size.
EXACT = 1e-4


@dataclass
class System:
    """A server with its real scorer, over what a trainer has learned."""

    settings: Settings
    client: Client
    daemon: Daemon
    target: str

    def learn(self, feedback: Sequence[Feedback]) -> int:
        append(self.settings, feedback)
        tick(self.settings)
        while self.daemon.step():
            pass
        head = self.daemon.store.head()
        assert head is not None
        return int(head.version)

    def live(self, user_id: str, history: Sequence[tuple[str, str]]) -> None:
        """Give a user this history of items and classes, of the same times for every user; nothing is learned."""
        append(
            self.settings,
            [
                Feedback(user_id, item, kind, time_ms=START_MS + 1000 * place)
                for place, (item, kind) in enumerate(history)
            ],
        )

    def score(self, user_id: str, item_id: str, context: dict[str, str] | None = None) -> float:
        return self.client.score(user_id, [item_id], context=context).items[0].score


@pytest.fixture
def system(settings: Settings) -> Iterator[System]:
    quick = small(settings, drain_seconds=0.05, gate=False)
    loop = Loop(quick)
    try:
        with trainer(quick) as daemon:
            daemon.start()
            append(quick, make_feedback(160, 3))
            tick(quick)
            while daemon.step():
                pass
            server = Server(quick, assemble(quick))
            loop.run(server.start())
            try:
                loop.run(server.serving())
                target = f"127.0.0.1:{server.port}"
                with Client(target, timeout=SECONDS) as client:
                    yield System(quick, client, daemon, target)
            finally:
                loop.run(server.stop())
    finally:
        loop.close()


def without(history: Sequence[Any], place: int) -> list[Any]:
    return [*history[:place], *history[place + 1 :]]


# --- Influence


def test_an_entrys_influence_is_the_score_less_the_score_of_a_user_without_it(system: System) -> None:
    kinds = ["click", "like", "purchase", "click"]
    history = [(f"item-{number}", kind) for number, kind in zip((3, 7, 3, 11), kinds, strict=True)]
    context = {"page": "a"}
    times = [START_MS + 1000 * place for place in range(4)]
    system.live("whole", history)
    for place in range(4):
        shorter = [
            Feedback(f"without-{place}", item, kind, time_ms=time)
            for (item, kind), time in without(list(zip(history, times, strict=True)), place)
        ]
        append(system.settings, shorter)
    for item in ("item-5", "item-3", "item-20"):
        found = system.client.explain("whole", item, context=context)
        score = system.score("whole", item, context)
        assert found.item.score == pytest.approx(score, abs=EXACT)
        assert found.version == system.client.status().version
        assert [(e.item_id, e.feedback_class, e.time.ToMilliseconds()) for e in found.history] == [
            (name, kind, time) for (name, kind), time in zip(history, times, strict=True)
        ]
        by_hand = [score - system.score(f"without-{place}", item, context) for place in range(4)]
        assert [entry.influence for entry in found.history] == pytest.approx(by_hand, abs=EXACT)
        assert max(map(abs, by_hand)) > 100 * EXACT, "else this tells nothing"


def test_without_an_entry_the_next_older_one_takes_part(system: System) -> None:
    length = system.settings.history_length
    history = [(f"item-{number}", "click") for number in range(length + 3)]
    times = [START_MS + 1000 * place for place in range(len(history))]
    system.live("long", history)
    for place in range(3, len(history)):
        kept = without(list(zip(history, times, strict=True)), place)
        append(system.settings, [Feedback(f"no-{place}", i, kind, time_ms=time) for (i, kind), time in kept])
    found = system.client.explain("long", "item-20")
    assert [entry.item_id for entry in found.history] == [item for item, _ in history[3:]]
    by_hand = [found.item.score - system.score(f"no-{place}", "item-20") for place in range(3, len(history))]
    assert [entry.influence for entry in found.history] == pytest.approx(by_hand, abs=EXACT)


def test_an_entry_that_the_weights_do_not_know_has_no_influence(system: System) -> None:
    system.live("u", [("item-3", "click"), ("never-learned", "click")])
    known, unknown = system.client.explain("u", "item-5").history
    assert unknown.influence == pytest.approx(0, abs=1e-6)
    assert known.influence != 0


# --- Parts


def test_the_parts_sum_to_the_score(system: System) -> None:
    system.live("u", [("item-3", "click"), ("item-9", "like")])
    for user in ("u", "nobody"):
        for item in (*(f"item-{number}" for number in range(25)), "never-seen"):
            found = system.client.explain(user, item)
            parts = found.parts
            total = parts.network + parts.standing + parts.transitions + parts.worth
            assert total == pytest.approx(found.item.score, abs=EXACT)
            assert found.item.score == pytest.approx(system.score(user, item), abs=EXACT)
            assert found.item.known == (item != "never-seen")
            assert sum(found.item.class_probabilities.values()) == pytest.approx(1)
            if user == "nobody":
                assert (parts.network, parts.transitions) == (0, 0)
                assert list(found.history) == []


def test_each_part_is_that_of_the_arithmetic(system: System) -> None:
    """The worth from the answer's own probabilities; the transitions of an item that never followed."""
    system.live("u", [("item-3", "click")])
    settings = system.settings
    moved = []
    for number in range(25):
        found = system.client.explain("u", f"item-{number}")
        chances = found.item.class_probabilities
        worth = sum(c.worth * chances[c.name] for c in settings.classes)
        assert found.parts.worth == pytest.approx(settings.worth_weight * math.log(worth + 1e-6), abs=EXACT)
        moved.append(found.parts.transitions)
    # Item 3 was followed by at most so many items as are remembered.
    assert 0 < sum(part != 0 for part in moved) <= settings.successors


def test_all_is_of_one_version(system: System) -> None:
    system.live("u", [("item-3", "click"), ("item-9", "like")])
    before = system.client.explain("u", "item-5")
    last = system.learn(make_feedback(40, 8, first=500))
    for _ in range(3000):
        found = system.client.explain("u", "item-5")
        parts = found.parts
        total = parts.network + parts.standing + parts.transitions + parts.worth
        assert total == pytest.approx(found.item.score, abs=EXACT)
        if found.version == last:
            break
    assert found.version == last > before.version
    assert found.item.score != before.item.score


# --- The door


def test_clients_and_the_command_tell_the_same(system: System, capsys: pytest.CaptureFixture[str]) -> None:
    system.live("u", [("item-3", "click"), ("item-9", "like")])
    system.client.upsert_items([Item("item-3", "Three [3]"), Item("item-5", "Five")])
    found = system.client.explain("u", "item-5")

    async def again() -> Any:
        async with AsyncClient(system.target, timeout=SECONDS) as client:
            return await client.explain("u", "item-5")

    assert asyncio.run(again()) == found
    command = ["why", "u", "item-5", "--server", system.target]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["title"] == "Five"
    assert (told["version"], told["score"]) == (found.version, found.item.score)
    assert sum(told["parts"].values()) == pytest.approx(told["score"], abs=EXACT)
    assert told["class_probabilities"] == dict(found.item.class_probabilities)
    assert [(e["item_id"], e["title"], e["influence"]) for e in told["history"]] == [
        ("item-3", "Three [3]", found.history[0].influence),
        ("item-9", "", found.history[1].influence),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Three [3]" in shown
    assert f"{found.item.score:.4f}" in shown
    assert f"{found.history[1].influence:+.4f}" in shown
    assert main(["why", "nobody", "item-5", "--server", system.target]) == 0
    assert "the user has no history" in capsys.readouterr().out


def test_bad_requests_name_their_fields(settings: Settings) -> None:
    with serve(settings) as running:
        request = recommender_pb2.ExplainRequest(item_id="i" * 257, context={"key": "v" * 300})
        assert set(violations(lambda: _explain(running, request))) == {"user_id", "item_id", "context"}


def test_before_the_first_version_there_is_nothing_to_explain(settings: Settings) -> None:
    quick = small(settings, drain_seconds=0.05)
    loop = Loop(quick)
    try:
        server = Server(quick, assemble(quick))
        loop.run(server.start())
        try:
            with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                stub: Any = RecommenderServiceStub(channel)
                request = recommender_pb2.ExplainRequest(user_id="u", item_id="item-5")
                call = partial(stub.Explain, request, timeout=SECONDS)
                check_refusal(call, grpc.StatusCode.UNAVAILABLE, "WEIGHTS_NOT_LOADED")
        finally:
            loop.run(server.stop())
    finally:
        loop.close()


def test_without_its_history_a_score_is_not_explained(settings: Settings) -> None:
    """Recommend answers without a history then; an explanation would be that of another score."""
    away = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    with serve(away) as running, Client(running.target, timeout=2.0) as client:
        assert client.recommend("u").items
        with pytest.raises(StoreUnavailable):
            client.explain("u", "item-5")


def _explain(running: Running, request: recommender_pb2.ExplainRequest) -> Any:
    stub: Any = RecommenderServiceStub(running.channel)
    return stub.Explain(request, timeout=SECONDS)


# --- Versions


def test_a_version_is_shown_beside_the_one_before(system: System, capsys: pytest.CaptureFixture[str]) -> None:
    last = system.learn(make_feedback(24, 9, first=600))
    parent, version = system.client.version(last - 1), system.client.version(last)
    assert version.metrics, "else this tells nothing"
    command = ["versions", "show", "--server", system.target]
    assert main([*command, str(last), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parent"] == last - 1
    assert told["records"] == {"after": parent.position, "until": version.position}
    assert told["settings_digest"] == system.settings.learning_digest()
    assert told["kind"] == "learned"
    assert told["metrics"] == dict(version.metrics)
    assert told["metrics_before"] == dict(parent.metrics)
    assert main([*command, str(last)]) == 0
    shown = capsys.readouterr().out
    assert f"({parent.position}, {version.position}]" in shown
    name = next(iter(version.metrics))
    (line,) = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
    assert line.split()[1:] == [f"{each.metrics[name]:.4f}" for each in (parent, version) if name in each.metrics]
    # Nothing stands before the first.
    assert main([*command, "1", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["records"]["after"], first["metrics_before"]) == (None, {})
