"""Trust: accounts that left their users' habits count nowhere while there are many, and everything counts otherwise."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from learning import (
    CPU,
    START_MS,
    append,
    fork,
    head,
    learn_all,
    learn_with_restarts,
    newest_metrics,
    small,
    trainer,
    versions,
)
from prometheus_client import CollectorRegistry

from recsys.accounts import NOBODY, PLACES, account
from recsys.condition import DISTRUSTED_ACCOUNTS, UNDER_ATTACK
from recsys.errors import CorruptWeights
from recsys.feedback import Feedback
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import decode, encode
from trainer.learner import Learner
from trainer.rebuild import Rebuild
from trainer.trust import (
    ACCOUNTS,
    ANYBODY,
    EARNED,
    LATELY,
    LEAST_TOLD,
    MOST,
    SPREAD,
    TRUST,
    Trust,
    told,
)

BATCH = 64
OWN, UNRELATED, SPREAD_OF_TOLD = 1.5, -1.0, 1.0
CROWD = np.arange(1, BATCH + 1)


class Clock:
    """Feed batches to one Trust."""

    def __init__(self, seed: int = 1) -> None:
        self.trust, self.now, self.random = Trust(), 0, np.random.default_rng(seed)

    def go(self, steps: int, mean_B: np.ndarray | float, accounts: np.ndarray = CROWD) -> list[bool]:
        """Take batches of choices of which so much is told; return after which there is an attack."""
        found = []
        for _ in range(steps):
            self.now += len(accounts)
            told_B = self.random.normal(np.broadcast_to(mean_B, accounts.shape), SPREAD_OF_TOLD)
            self.trust.observe(accounts, told_B, self.now)
            found.append(self.trust.attacked)
        return found


def _taken(every: int) -> np.ndarray:
    return np.where(CROWD % every == 0, UNRELATED, OWN)


def test_an_account_is_one_number_and_nobody_another() -> None:
    numbers = {account(f"user-{n}") for n in range(1000)}
    assert account("user-7") in numbers
    assert len(numbers) == 1000
    assert min(numbers) > NOBODY
    assert max(numbers) < 2**31


def test_what_histories_tell_by_hand() -> None:
    led_B, anywhere_B = np.array([3.0, 0.0, 0.0, np.nan]), np.array([50.0, 50.0, 0.0, np.nan])
    popular_B = np.log([0.02, 0.02, 0.02, np.nan])
    expected = [math.log(share / 0.02) for share in ((3 + SPREAD / 40) / (50 + SPREAD), SPREAD / 40 / (50 + SPREAD))]
    np.testing.assert_allclose(told(led_B, anywhere_B, popular_B, 40), [*expected, np.nan, np.nan])


def test_the_evidence_by_hand() -> None:
    trust, one = Trust(), np.array([7])
    for number in range(1, 4):
        trust.observe(one, np.array([1.9]), number)
    each = math.log(ANYBODY + (1 - ANYBODY) * math.exp(1.9 - LEAST_TOLD))
    assert 2 * each < EARNED < 3 * each
    assert trust.write()[TRUST][3 + 7] == pytest.approx(min(MOST, 3 * each))
    assert trust.write()[ACCOUNTS][:, 7].tolist() == [7, 3, 1]
    # Another account that has the same place begins anew.
    trust.observe(one + PLACES, np.array([1.9]), 4)
    assert trust.write()[TRUST][3 + 7] == pytest.approx(each)
    assert trust.write()[ACCOUNTS][:, 7].tolist() == [7 + PLACES, 4, 0]


def test_accounts_that_many_lost_count_no_more_until_their_users_are_back() -> None:
    clock = Clock()
    assert not any(clock.go(60, OWN))
    assert clock.trust.distrusted == 0
    clock.go(20, _taken(2))
    assert clock.trust.attacked
    trusted_B = clock.trust.trusted(CROWD)
    assert clock.trust.distrusted == (~trusted_B).sum()
    assert trusted_B[1::2].mean() < 0.05
    assert trusted_B[::2].mean() > 0.95
    assert clock.trust.trusted(np.array([NOBODY, 1000])).all()
    clock.go(30, OWN)
    assert not clock.trust.attacked
    assert clock.trust.distrusted == 0
    assert clock.trust.trusted(CROWD).all()


def test_a_forgotten_account_begins_anew() -> None:
    clock = Clock()
    clock.go(60, OWN)
    clock.go(20, _taken(2))
    (lost, *_) = CROWD[~clock.trust.trusted(CROWD)].tolist()
    count = clock.trust.distrusted
    assert clock.trust.forget(lost)
    assert clock.trust.trusted(np.array([lost])).all()
    assert clock.trust.distrusted == count - 1
    assert lost not in clock.trust.write()[ACCOUNTS][0]
    # Nobody is there any more.
    assert not clock.trust.forget(lost)


def test_a_few_that_change_are_no_attack_and_neither_are_new_accounts() -> None:
    clock = Clock(2)
    clock.go(60, OWN)
    assert not any(clock.go(60, _taken(12)))
    assert clock.trust.trusted(CROWD).all()
    strangers = CROWD + BATCH
    assert not any(clock.go(100, UNRELATED, strangers))
    # Not even in an attack of others.
    clock.go(20, _taken(2))
    assert clock.trust.attacked
    assert clock.trust.trusted(strangers).all()


def test_nothing_is_an_attack_where_histories_tell_nothing() -> None:
    clock = Clock(3)
    assert not any(clock.go(200, UNRELATED))
    assert not any(clock.go(200, 0.0))


def test_an_attack_is_over_when_its_accounts_are_gone() -> None:
    clock = Clock(4)
    clock.go(60, OWN)
    assert clock.go(20, UNRELATED)[-1]
    others = CROWD + BATCH
    assert not clock.go(2 + LATELY // BATCH, OWN, others)[-1]
    assert clock.trust.trusted(CROWD).all()


def test_what_was_not_asked_and_what_is_nobodys_changes_nothing() -> None:
    clock = Clock(5)
    clock.go(30, _taken(2))
    before = encoded(clock.trust)
    clock.trust.observe(CROWD, np.full(BATCH, np.nan), clock.now + BATCH)
    clock.trust.observe(np.full(BATCH, NOBODY), np.full(BATCH, -5.0), clock.now + BATCH)
    assert encoded(clock.trust) == before
    off = Trust(on=False)
    off.observe(CROWD, np.full(BATCH, 5.0), BATCH)
    assert off.write() == {}
    # Nor does it heed what another setting left.
    off.restore(clock.trust.write())
    assert not off.attacked


def encoded(trust: Trust) -> list[bytes]:
    return [array.tobytes() for array in trust.write().values()]


def test_what_is_remembered_goes_on_bit_for_bit() -> None:
    one, other = Clock(6), Clock(7)
    one.go(60, OWN)
    one.go(8, _taken(2))
    other.trust.check(one.trust.write())
    other.trust.restore(one.trust.write())
    for clock in (one, other):
        clock.now, clock.random = 10_000, np.random.default_rng(8)
        clock.go(20, _taken(2))
    assert encoded(one.trust) == encoded(other.trust)
    other.trust.restore({})
    assert not any(array.any() for array in other.trust.write().values())


@pytest.mark.parametrize(
    "wrong",
    [{TRUST: np.zeros(3)}, {TRUST: np.full(3 + PLACES, np.nan)}, {ACCOUNTS: np.zeros((3, PLACES), np.int32)}],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, np.ndarray]) -> None:
    trust = Trust()
    trust.check({})
    with pytest.raises(CorruptWeights, match=next(iter(wrong))):
        trust.check(wrong)


# In the trainer: each user goes round an own part of the items, until most accounts choose anything.

USERS, RING, QUIET, COUNT, STOLEN = 40, 10, 1920, 2816, 3


def _log(base: Settings, attack: bool, count: int = COUNT) -> None:
    random = np.random.default_rng(9)
    places, feedback = random.integers(0, RING, USERS), []
    for number in range(count):
        user = int(random.integers(USERS))
        places[user] = (places[user] + 1) % RING
        item = RING * (user % 20) + places[user]
        if attack and number >= QUIET and user % STOLEN:
            item = random.integers(RING * 20)
        feedback.append(Feedback(f"user-{user}", f"item-{item}", "click", START_MS + 1000 * number))
    append(base, feedback)


def _settings(base: Settings, **changes: object) -> Settings:
    # The item that a history repeats tells nothing, so that it must be shorter than what a user goes round.
    return small(base, batch_size=64, replay_size=4, successors=32, gate_events=4, **changes)


@pytest.fixture(params=[True, False], ids=["attacked", "quiet"])
def world(settings: Settings, request: pytest.FixtureRequest) -> tuple[Settings, bool]:
    base = _settings(settings)
    _log(base, request.param)
    return base, request.param


def test_the_trainer_counts_nothing_of_lost_accounts_and_everything_otherwise(
    world: tuple[Settings, bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, attack = world
    registry = CollectorRegistry()
    plain = fork(base, "plain").model_copy(update={"trust": False})
    restarted = fork(base, "restarted")
    with trainer(base, registry=registry) as daemon:
        daemon.start()
        while daemon.step():
            pass
        learner = daemon.learner
        counted = float(learner.table.columns["total"].sum())
        assert learner.trust.attacked == attack
        numbers = np.array([account(f"user-{user}") for user in range(USERS)])
        trusted = learner.trust.trusted(numbers)
        weights = encode(learner.replica.write_all())
    told = [text for text in caplog.messages if "under attack" in text or "the attack is over" in text]
    newest = newest_metrics(base)
    shown = [registry.get_sample_value(name) for name in ("recsys_under_attack", "recsys_accounts_distrusted")]
    assert shown == [newest[UNDER_ATTACK], newest[DISTRUSTED_ACCOUNTS]] == [attack, learner.trust.distrusted]
    distrusted = registry.get_sample_value("recsys_feedback_distrusted_total")
    assert (len(told), distrusted) == (int(attack), COUNT - counted)
    stolen = np.arange(USERS) % STOLEN > 0
    assert learn_all(plain) == weights or attack
    if attack:
        assert trusted[stolen].mean() < 0.2
        assert trusted[~stolen].mean() > 0.9
        assert counted < COUNT - 0.25 * (COUNT - QUIET)
    else:
        assert trusted.all()
        assert counted == COUNT
    # Wherever a trainer restarts, in the middle of an attack too, and whoever makes a version again, finds the same.
    learn_with_restarts(restarted, monkeypatch, 1150)
    assert versions(restarted) == versions(base)
    with connect(base) as client:
        assert Rebuild(client, base, CPU).run(head(base)[0]).equal


def test_an_attack_is_told_of_when_it_begins_and_when_it_is_over(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trainer")
    base, registry = _settings(settings), CollectorRegistry()
    _log(base, attack=True)
    _log(base, attack=False, count=COUNT - QUIET)
    with trainer(base, registry=registry) as daemon:
        daemon.start()
        while daemon.step():
            pass
    said = [record for record in caplog.records if "attack" in record.getMessage()]
    assert [record.levelname for record in said] == ["WARNING", "INFO"]
    assert "accounts=" in said[0].getMessage()
    assert "the attack is over" in said[1].getMessage()
    # Of no user.
    assert not any("user-" in record.getMessage() for record in said)
    assert registry.get_sample_value("recsys_under_attack") == 0
    assert registry.get_sample_value("recsys_accounts_distrusted") == 0
    assert registry.get_sample_value("recsys_feedback_distrusted_total") > 100


def test_a_learner_is_restored_with_its_trust(settings: Settings) -> None:
    first, second = (Learner(small(settings), CPU) for _ in range(2))
    served, own = first.write_all()
    own.dense[TRUST][:] = np.arange(3 + PLACES)
    own.dense[ACCOUNTS][:] = 5
    second.restore(served, decode(encode(own)))
    assert (second.trust.write()[TRUST] == np.arange(3 + PLACES)).all()
    assert (second.trust.write()[ACCOUNTS] == 5).all()
    # An earlier release wrote none: it begins anew.
    del own.dense[TRUST], own.dense[ACCOUNTS]
    second.restore(served, own)
    assert not second.trust.write()[TRUST].any()
