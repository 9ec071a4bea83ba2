"""Forgetting a user: nothing of the user is left in the store, everything of the others is, and learning goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import redis
import torch
from calls import SECONDS, violations
from learning import (
    CPU,
    append,
    fork,
    head,
    learn_all,
    learn_with_restarts,
    make_feedback,
    small,
    tick,
    trainer,
    versions,
)
from serving import Running, serve

from recsys.accounts import NOBODY, account, place
from recsys.cli.app import main
from recsys.client import AsyncClient, Client
from recsys.feedback import Feedback
from recsys.feedback_log import BEGINNING, PAGE, FeedbackLog
from recsys.forgetting import Forgetting
from recsys.histories import Histories
from recsys.quarantine import Quarantine
from recsys.settings import Settings
from recsys.store.v1.log_pb2 import FeedbackRecord
from recsys.v1 import model_pb2
from recsys.v1.model_pb2_grpc import ModelServiceStub
from recsys.weights import WeightStore
from recsys.weights.earlier import roll_back
from trainer.daemon import Daemon
from trainer.rebuild import Rebuild
from trainer.trust import ACCOUNTS

# Random enough that the store cannot hide it by compressing it.
USER = "Zq7-only-this-user-9xK"


def by(user_id: str, count: int, first: int = 0) -> list[Feedback]:
    """Make feedback of one user."""
    return [
        Feedback(user_id, f"item-{number % 25}", "click", time_ms=1_700_000_000_000 + 1000 * number)
        for number in range(first, first + count)
    ]


def mixed(count: int, first: int = 0) -> list[Feedback]:
    """Make feedback of several users, of which USER is one in three."""
    others = make_feedback(2 * count, first + 1, first=first)
    mine = by(USER, count, first)
    return [each for number in range(count) for each in (*others[2 * number : 2 * number + 2], mine[number])]


def anywhere(store: redis.Redis, text: str) -> list[str]:
    """Name the keys that hold a text, in their names or in the bytes that the store keeps and writes to its files."""
    store.config_set("rdbcompression", "no")
    found = []
    for key in store.scan_iter(count=1000):
        if text.encode() in key or text.encode() in (store.dump(key) or b""):
            found.append(key.decode())
    return found


def records_of(log: FeedbackLog) -> list[tuple[str, bytes]]:
    entries = log.read_after(BEGINNING, 100_000)
    return [(e.position, e.record.SerializeToString()) for e in entries if e.record is not None]


# --- What is removed


def test_nothing_of_the_user_is_left_and_all_of_the_others_is(store: redis.Redis, settings: Settings) -> None:
    log, forgetting = FeedbackLog(store, settings), Forgetting(store, settings)
    log.append(mixed(PAGE))
    # A user whose name begins alike, and one whose feedback speaks of the user.
    log.append([*by(USER + "x", 2), Feedback("other", USER, "click"), Feedback("other", "item-1", "click")])
    about = [name for name in anywhere(store, USER) if name.endswith(("records", f"history:{USER}"))]
    assert len(about) == 2
    kept = [(p, r) for p, r in records_of(log) if FeedbackRecord.FromString(r).user_id != USER]
    usage = log.usage()
    found = forgetting.forget(USER, BEGINNING)
    assert (found.history_entries, found.log_records, found.unlearned_records, found.set_aside_records) == (
        *(min(PAGE, settings.history_limit), PAGE, PAGE, 0),
    )
    assert records_of(log) == kept
    after = log.usage()
    assert after.records == usage.records - PAGE
    assert after.bytes == sum(len(record) for _, record in kept)
    histories = Histories(store, settings)
    assert histories.read([USER]) == [[]]
    assert len(histories.read([USER + "x"])[0]) == len(histories.read(["other"])[0]) == 2


def test_the_users_bytes_are_gone_from_the_stores_memory(store: redis.Redis, settings: Settings) -> None:
    log = FeedbackLog(store, settings)
    log.append(mixed(40))
    assert anywhere(store, USER)
    found = Forgetting(store, settings).forget(USER, BEGINNING)
    assert anywhere(store, USER) == []
    assert not any("stream-node-max-entries" in sentence for sentence in found.remains)


def test_a_store_that_keeps_the_bytes_is_told_of(store: redis.Redis, settings: Settings) -> None:
    store.config_set("stream-node-max-entries", 100)
    try:
        FeedbackLog(store, settings).append(mixed(40))
        found = Forgetting(store, settings).forget(USER, BEGINNING)
        assert any("stream-node-max-entries" in sentence for sentence in found.remains)
    finally:
        store.config_set("stream-node-max-entries", 1)


def test_forgetting_again_or_nobody_changes_nothing(store: redis.Redis, settings: Settings) -> None:
    log, forgetting = FeedbackLog(store, settings), Forgetting(store, settings)
    assert forgetting.forget(USER, BEGINNING).log_records == 0
    log.append(mixed(5))
    forgetting.forget(USER, BEGINNING)

    def standing() -> tuple[object, ...]:
        # But for the last position: the trainer is told each time.
        return records_of(log), replace(log.usage(), last_position=""), log.appended()

    before = standing()
    for user_id in (USER, "nobody", "item-1", "click"):
        found = forgetting.forget(user_id, BEGINNING)
        assert (found.history_entries, found.log_records, found.set_aside_records) == (0, 0, 0)
    assert standing() == before


@pytest.mark.parametrize("length", [1, 127, 128, 256])
def test_names_of_every_length_are_found(store: redis.Redis, settings: Settings, length: int) -> None:
    log = FeedbackLog(store, settings)
    name = "é" * (length // 2) + "u" * (length % 2)
    log.append([*by(name, 3), *by("other", 1)])
    assert Forgetting(store, settings).forget(name, BEGINNING).log_records == 3
    assert len(records_of(log)) == 1


def test_what_was_forgotten_unlearned_is_no_backlog(store: redis.Redis, settings: Settings) -> None:
    log, forgetting = FeedbackLog(store, settings), Forgetting(store, settings)
    first = log.append(mixed(4))
    log.append(mixed(2, first=4))
    found = forgetting.forget(USER, first[-1].position)
    assert (found.log_records, found.unlearned_records) == (6, 2)
    assert log.appended() == 18 - 2


def test_positions_of_the_forgotten_are_trimmed_with_the_log(store: redis.Redis, settings: Settings) -> None:
    log, forgetting = FeedbackLog(store, settings), Forgetting(store, settings)
    clock = iter(range(100))
    positions = [p for each in mixed(4) if (p := append_later(store, settings, each, next(clock)))]
    forgetting.forget(USER, BEGINNING)
    assert forgetting.lost(BEGINNING, positions[-1]) == 4
    assert forgetting.lost(positions[2], positions[5]) == 1
    assert forgetting.lost(positions[1], positions[2]) == 1
    log.trim(positions[6])
    assert forgetting.lost(BEGINNING, positions[-1]) == 2
    assert log.usage().records == 4


def test_a_store_out_of_memory_forgets_too(store: redis.Redis, settings: Settings) -> None:
    log = FeedbackLog(store, settings)
    log.append(mixed(4))
    store.config_set("maxmemory", 1)
    try:
        found = Forgetting(store, settings).forget(USER, BEGINNING)
    finally:
        store.config_set("maxmemory", 0)
    assert (found.history_entries, found.log_records) == (4, 4)
    assert log.read_after(BEGINNING, 100)[-1].forgotten == place(USER)
    assert anywhere(store, USER) == []


def append_later(store: redis.Redis, settings: Settings, feedback: Feedback, tick: int) -> str:
    """Append in a millisecond of its own."""
    log = FeedbackLog(store, settings)
    before = log.last_position().partition("-")[0]
    while str(int(store.time()[0]) * 1000 + int(store.time()[1]) // 1000) <= before:
        pass
    return log.append([feedback])[0].position


# --- Learning


def learn(daemon: Daemon, feedback: list[Feedback]) -> int:
    """Append feedback and a tick and learn them; return the last version."""
    append(daemon.settings, feedback)
    tick(daemon.settings)
    while daemon.step():
        pass
    head = daemon.store.head()
    assert head is not None
    return int(head.version)


def position(daemon: Daemon) -> str:
    head = daemon.store.head()
    assert head is not None
    return str(head.position)


def test_a_trainer_goes_on_and_restarts_behind_a_forgotten_user(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    with trainer(base) as daemon:
        daemon.start()
        last = learn(daemon, mixed(8))
        # Some that nobody has learned yet.
        append(base, mixed(3, first=8))
        found = Forgetting(store, base).forget(USER, position(daemon))
        assert (found.log_records, found.unlearned_records) == (11, 3)
        assert learn(daemon, make_feedback(8, 3, first=40)) > last
        assert store.hget(f"{base.key_prefix}:{{log}}:stats", "appended") == b"41"
        head = daemon.store.head()
        assert head is not None
        assert daemon.log.appended() == head.feedback_learned == 38
    with trainer(base) as again:
        again.start()
        assert again.store.head() == head
        learned = learn(again, make_feedback(8, 4, first=50))
        assert learned > head.version
        # The window that was filled behind the gap is the window from there on: all since can be made again.
        store_ = WeightStore(store, base)
        record = next(r for r in store_.versions(1, learned + 1))
        assert record.feedback_learned == 46
        assert store_.verify().problems == []


def known(accounts: np.ndarray) -> set[int]:
    return {*accounts[0].tolist()} - {NOBODY}


def test_what_is_kept_by_account_is_let_go_of(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    with trainer(base) as daemon:
        daemon.start()
        last = learn(daemon, mixed(16))
        before = known(daemon.learner.trust.write()[ACCOUNTS])
        assert account(USER) in before
        Forgetting(store, base).forget(USER, position(daemon))
        # With a version of its own, should nothing else come, and with none for a user whom nobody knows.
        assert learn(daemon, []) == last + 1
        Forgetting(store, base).forget("nobody", position(daemon))
        assert learn(daemon, []) == last + 1
    (delta,) = WeightStore(store, base).read_after(last, trainer=True)
    assert delta.trainer_payload is not None
    assert known(delta.trainer_payload.dense[ACCOUNTS]) == before - {account(USER)}


def test_what_is_held_lets_go_of_an_account_at_once(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    with trainer(base) as daemon:
        daemon.start()
        last = learn(daemon, mixed(16))
        with torch.no_grad():
            daemon.learner.network.position.mul_(1e6)
        assert learn(daemon, make_feedback(3, 1, first=30)) == last, "held"
        Forgetting(store, base).forget(USER, position(daemon))
        # Without any more feedback: what was held is set aside, then the account leaves.
        assert learn(daemon, []) == last + 1
        assert Quarantine(store, base).cases()[0].feedback == 3
        assert learn(daemon, []) == last + 2
        accounts = known(daemon.learner.trust.write()[ACCOUNTS])
        assert accounts
        assert account(USER) not in accounts
        assert learn(daemon, []) == last + 2, "nothing is left to be done"
    (delta,) = WeightStore(store, base).read_after(last + 1, trainer=True)
    assert delta.trainer_payload is not None
    assert known(delta.trainer_payload.dense[ACCOUNTS]) == accounts


def test_an_account_whose_choices_still_wait_to_be_learned_does_not_come_back(
    settings: Settings, store: redis.Redis
) -> None:
    base = small(settings)
    with trainer(base) as daemon:
        daemon.start()
        learn(daemon, mixed(16))
        # Fewer than a batch: read, and not learned yet.
        append(base, by(USER, base.batch_size - 1, first=16))
        daemon.step()
        assert not daemon._learning.empty
        Forgetting(store, base).forget(USER, position(daemon))
        learn(daemon, make_feedback(8, 3, first=90))
        accounts = known(daemon.learner.trust.write()[ACCOUNTS])
        assert accounts
        assert account(USER) not in accounts


def test_behind_a_forgotten_account_all_is_learned_bit_for_bit(
    settings: Settings, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small(settings)
    # None of whose records can be removed; so that the account of another, in the same place, is let go of.
    name = next(name for number in count() if place(name := f"other-{number}") == place("user-3"))
    told = []
    for turn in range(4):
        append(base, make_feedback(30, turn, first=30 * turn))
        Forgetting(store, base).forget(name, BEGINNING)
        told.append(FeedbackLog(store, base).last_position())
    append(base, make_feedback(6, 9, first=150))
    restarted, untold = fork(base, "restarted"), fork(base, "untold")
    assert store.xdel(f"{untold.key_prefix}:{{log}}:records", *told) == 4
    for each in (base, untold):
        learn_all(each)
    assert versions(untold) != versions(base)
    learn_with_restarts(restarted, monkeypatch, 41)
    assert versions(restarted) == versions(base)
    assert Rebuild(store, base, CPU).run(head(base)[0]).equal


def test_a_rollback_does_not_bring_an_account_back(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    with trainer(base) as daemon:
        daemon.start()
        good = learn(daemon, mixed(16))
        Forgetting(store, base).forget(USER, position(daemon))
        learn(daemon, make_feedback(8, 3, first=90))
        roll_back(daemon.store, Quarantine(store, base), good, "spoiled", 5)
    for _ in range(2):
        with trainer(base) as again:
            again.start()
            # With a version of its own, should nothing else come.
            learn(again, [])
            accounts = known(again.learner.trust.write()[ACCOUNTS])
            assert accounts
            assert account(USER) not in accounts
            learn(again, make_feedback(8, 4, first=100))


def test_a_rebuild_says_that_records_were_forgotten(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    with trainer(base) as daemon:
        daemon.start()
        for turn in range(3):
            last = learn(daemon, mixed(4, first=4 * turn))
        rebuild = Rebuild(daemon._client, base, daemon._device)
        whole = rebuild.run(last)
        assert (whole.equal, whole.forgotten) == (True, 0)
        learn(daemon, make_feedback(8, 9, first=90))
        Forgetting(store, base).forget(USER, position(daemon))
        made = rebuild.run(last)
        assert not made.equal
        assert made.forgotten == 12
        # The user was in the first batch of all: every version since is another.
        assert made.different == tuple(range(2, last + 1))


def test_the_command_says_it_too(settings: Settings, store: redis.Redis, capsys: pytest.CaptureFixture[str]) -> None:
    """With the settings that commands take; the network is of its usual size."""
    base = settings.model_copy(update={"device": "cpu"})
    with trainer(base) as daemon:
        daemon.start()
        last = learn(daemon, mixed(4))
        Forgetting(store, base).forget(USER, position(daemon))
    arguments = ["rebuild", "--version", str(last), "--redis-url", base.redis_url, "--device", "cpu"]
    assert main([*arguments, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["equal"], told["forgotten"], told["different"]) == (False, 4, [last])
    assert main(arguments) == 1
    assert "4 records of this range were forgotten" in capsys.readouterr().out


def test_where_all_were_the_users_there_is_nothing_to_rebuild_from(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    with trainer(base) as daemon:
        daemon.start()
        learn(daemon, by(USER, 8))
        last = learn(daemon, by(USER, 8, first=8))
        Forgetting(store, base).forget(USER, position(daemon))
        store.xtrim(f"{base.key_prefix}:{{log}}:records", maxlen=0)
        made = Rebuild(daemon._client, base, daemon._device).run(last)
        assert made.different == tuple(range(2, last + 1))
        assert made.forgotten == 16
    with trainer(base) as again:
        again.start()
        assert learn(again, make_feedback(8, 2, first=50)) == last + 1


def test_what_was_set_aside_is_forgotten_too(settings: Settings, store: redis.Redis) -> None:
    base = small(settings)
    quarantine = Quarantine(store, base)
    with trainer(base) as daemon:
        daemon.start()
        good = learn(daemon, mixed(4))
        learn(daemon, mixed(4, first=4))
        roll_back(daemon.store, quarantine, good, "spoiled", 5)
        (case,) = quarantine.cases()
        assert case.feedback == 12
        found = Forgetting(store, base).forget(USER, position(daemon))
        assert (found.log_records, found.set_aside_records) == (8, 4)
        assert all(record.user_id != USER for record in quarantine.show(case.number, 100))
        assert quarantine.release(case.number) == 8
        while daemon.step():
            pass
        assert anywhere(store, USER) == []
        # Once more, as a trainer does that restarts behind a crash.
        quarantine.set_aside(case.after, case.until, "spoiled", 5)
        assert [each.feedback for each in quarantine.cases()] == [0]


# --- The door


@pytest.fixture
def running(settings: Settings) -> Iterator[Running]:
    with serve(settings) as running:
        yield running


def test_clients_and_the_command_forget(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    log = FeedbackLog(running.store, running.settings)
    log.append(mixed(4))
    with Client(running.target, timeout=SECONDS) as client:
        found = client.forget_user(USER)
        assert (found.history_entries, found.log_records, found.unlearned_records) == (4, 4, 4)
        assert client.status().backlog == 8
        assert any("the weights keep what they learned" in sentence for sentence in found.remains)
    log.append(by(USER, 2))

    async def again() -> Any:
        async with AsyncClient(running.target, timeout=SECONDS) as client:
            return await client.forget_user(USER)

    assert asyncio.run(again()).log_records == 2
    log.append(by(USER, 3))
    command = ["forget", "user", USER, "--server", running.target]
    # Nobody can be asked here.
    assert main(command) == 2
    assert "--yes" in capsys.readouterr().err
    assert main([*command, "--yes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["user_id"], told["history_entries"], told["log_records"]) == (USER, 3, 3)
    assert main([*command, "--yes"]) == 0
    shown = capsys.readouterr().out
    assert "log_records" in shown
    assert all(sentence[:40] in shown for sentence in told["remains"])


def test_who_cannot_be_a_user_is_refused(running: Running) -> None:
    stub: Any = ModelServiceStub(running.channel)
    for name in ("", "u" * 257):
        refused = violations(lambda name=name: stub.ForgetUser(model_pb2.ForgetUserRequest(user_id=name)))
        assert list(refused) == ["user_id"]
