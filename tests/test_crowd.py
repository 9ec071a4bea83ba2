"""Crowd: what newcomers push is found and counted nowhere while they do, and everything counts otherwise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
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

from recsys.condition import DISTRUSTED_ACCOUNTS, PUSHED_ITEMS, UNDER_ATTACK
from recsys.encoding import RowHistory
from recsys.errors import CorruptWeights
from recsys.feedback import Feedback
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import decode, encode
from trainer.crowd import CROWD, MOST_PUSHED, NEWCOMER, PUSHING, RECENT, Crowd
from trainer.examples import Event, ReplayWindow
from trainer.examples import encode as encode_events
from trainer.learner import Learner
from trainer.rebuild import Rebuild

LENGTH, ITEMS, USERS, BATCH = 20, 100, 40, 64
PUSHED = np.array([ITEMS + 1, ITEMS + 2])
BOT = 1000


class Stream:
    """A made-up stream: users choose any item, bots two items and now and then another; one Crowd looks at it."""

    def __init__(self, seed: int = 1, users: int = USERS) -> None:
        self.crowd, self.random, self.users = Crowd(), np.random.default_rng(seed), users
        self.histories: dict[int, list[int]] = {}
        self.choices: list[tuple[list[int], int, int]] = []

    def go(self, batches: int, poison: float = 0.0, bots: int = 200, camouflage: float = 0.0) -> list[bool]:
        """Take batches, so much of each of bots; return behind which anything is pushed."""
        found = []
        for _ in range(batches):
            for _ in range(BATCH):
                if self.random.random() < poison:
                    disguised = self.random.random() < camouflage
                    account = BOT + int(self.random.integers(bots))
                    self.choose(account, self.any() if disguised else int(self.random.choice(PUSHED)))
                else:
                    self.choose(int(self.random.integers(1, self.users)), self.any())
            self.crowd.observe(*self.asked())
            found.append(self.crowd.attacked)
        return found

    def any(self) -> int:
        return int(self.random.integers(1, ITEMS + 1))

    def choose(self, account: int, item: int) -> None:
        history = self.histories.setdefault(account, [])
        self.choices.append(([0] * (LENGTH - len(history)) + history, item, account))
        history.append(item)
        del history[:-LENGTH]

    def trusted(self, batch: int = 1) -> np.ndarray:
        """Tell of the last batches whose feedback counts, and whose is a user's."""
        rows_BL, item_B, account_B = self.newest(batch * BATCH)
        return np.stack([self.crowd.trusted(rows_BL, item_B), account_B < BOT])

    def asked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return what is looked at, all of which was chosen."""
        newest = self.newest(RECENT)
        return *newest, np.ones(len(newest[1]), np.bool_)

    def newest(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return histories, items and accounts of the newest choices."""
        rows, items, accounts = (np.array(each) for each in zip(*self.choices[-count:], strict=True))
        return rows, items, accounts


def test_what_newcomers_alone_choose_is_pushed_and_who_pushes_counts_no_more_until_they_are_gone() -> None:
    stream = Stream()
    assert not any(stream.go(40))
    found = stream.go(30, poison=0.5)
    # Behind some 60 choices of each item, and from then on, though bots are no newcomers by then.
    assert all(found[6:])
    assert sorted(stream.crowd.pushed.tolist()) == PUSHED.tolist()
    trusted_B, users_B = stream.trusted(8)
    assert (trusted_B == users_B).all()
    lengths = [len(history) for account, history in stream.histories.items() if account >= BOT]
    assert np.mean(np.array(lengths) >= NEWCOMER) > 0.8
    assert stream.crowd.accounts == sum(length > 0 for length in lengths)
    stream.go(1 + RECENT // BATCH)
    assert not stream.crowd.attacked
    assert stream.crowd.accounts == 0
    assert stream.trusted()[0].all()


def test_who_pushes_is_known_by_its_history_whatever_it_chooses() -> None:
    stream = Stream(2)
    stream.go(40)
    stream.go(40, poison=0.5, bots=100, camouflage=0.5)
    trusted_B, users_B = stream.trusted(8)
    assert trusted_B[users_B].all()
    assert trusted_B[~users_B].mean() < 0.1
    # A user who once chose a pushed item among many is none of them.
    most, one = np.arange(1, LENGTH + 1)[None], np.array([1])
    few = most.copy()
    few[0, 0] = PUSHED[0]
    assert PUSHING * (1 + LENGTH) > 1
    assert stream.crowd.trusted(few, one).all()
    few[0, : math.ceil(PUSHING * (1 + LENGTH))] = PUSHED[0]
    assert not stream.crowd.trusted(few, one).any()


def test_newcomers_who_choose_what_others_choose_push_nothing() -> None:
    stream = Stream(3)
    stream.go(40)
    assert not any(stream.go(40, poison=0.7, bots=1000, camouflage=1.0))


@pytest.mark.parametrize("item", [7, PUSHED[0]])
def test_what_others_have_already_is_not_pushed_by_those_who_come_later(item: int) -> None:
    stream = Stream(8, users=200)
    for account in range(1, 200):
        stream.choose(account, 7)
    # So that all had it before what is looked at, and none has forgotten it.
    stream.go(1 + RECENT // BATCH)
    for account in range(BOT, BOT + 40):
        stream.choose(account, item)
        stream.choose(account, stream.any())
    stream.crowd.observe(*stream.asked())
    assert stream.crowd.attacked == (item != 7)


def test_what_others_come_to_choose_too_is_pushed_no_longer() -> None:
    stream = Stream(4)
    stream.go(40)
    assert stream.go(20, poison=0.5)[-1]
    for _ in range(RECENT // 4):
        stream.choose(int(stream.random.integers(1, USERS)), int(stream.random.choice(PUSHED)))
    # All who choose it at present: that is what makes an item one of everybody's.
    assert not stream.go(1, poison=0.5)[-1]


def test_where_all_are_newcomers_nothing_is_pushed() -> None:
    stream = Stream(5)
    assert not any(stream.go(30, poison=1.0, bots=5000, camouflage=0.5))


def test_rows_that_lose_their_items_are_let_go_of() -> None:
    stream = Stream(6)
    stream.go(40)
    stream.go(20, poison=0.5)
    stream.crowd.free(PUSHED[:1])
    assert stream.crowd.pushed.tolist() == PUSHED[1:].tolist()


def test_what_is_remembered_goes_on_bit_for_bit_and_off_nothing_is() -> None:
    stream, other, off = Stream(7), Crowd(), Crowd(on=False)
    stream.go(40)
    stream.go(20, poison=0.5)
    written = stream.crowd.write()
    other.check(written, PUSHED)
    other.restore(written)
    late = stream.asked()
    for crowd in (stream.crowd, other):
        crowd.observe(*late)
    assert other.write()[CROWD].tobytes() == stream.crowd.write()[CROWD].tobytes()
    off.restore(written)
    off.observe(*late)
    assert (off.write(), off.attacked) == ({}, False)
    # An earlier release wrote nothing of it.
    other.restore({})
    assert not other.attacked


@pytest.mark.parametrize("wrong", [np.zeros(3, np.int64), np.zeros(1 + MOST_PUSHED), np.full(1 + MOST_PUSHED, -1)])
def test_what_does_not_fit_is_refused(wrong: np.ndarray) -> None:
    Crowd().check({}, PUSHED)
    with pytest.raises(CorruptWeights, match=CROWD):
        Crowd().check({CROWD: wrong}, PUSHED)


@pytest.mark.parametrize("added", [3, 8, 11, 16, 21])
def test_a_window_gives_its_newest_as_they_are_kept(settings: Settings, added: int) -> None:
    base = small(settings).model_copy(update={"replay_capacity": 8})
    window, learner = ReplayWindow(base), Learner(base, CPU)
    for number in range(added):
        examples = learner.window.newest(0)
        one = {name: np.full((1, *getattr(examples, name).shape[1:]), number + 1) for name in examples.__slots__}
        window.add(type(examples)(**one))
    for count in (0, 1, 5, 8, 50):
        item_B, rows_BL = window.columns(count, "item_B", "rows_BL")
        expected = np.arange(added + 1 - min(count, 8, added), added + 1)
        assert item_B.tolist() == expected.tolist()
        assert (rows_BL == expected[:, None]).all()


# In the trainer: users go round, until new accounts choose little but two items.

QUIET, COUNT = 1536, 2560


def _log(base: Settings, attack: bool) -> None:
    random, feedback = np.random.default_rng(9), []
    for number in range(COUNT):
        user, item = f"user-{random.integers(USERS)}", f"item-{random.integers(ITEMS)}"
        if attack and number >= QUIET and random.random() < 0.5:
            user = f"bot-{random.integers(60)}"
            item = f"pushed-{random.integers(2)}" if random.random() < 0.7 else item
        feedback.append(Feedback(user, item, "click", START_MS + 1000 * number))
    append(base, feedback)


@pytest.mark.parametrize("attack", [True, False], ids=["attacked", "quiet"])
def test_the_trainer_counts_nothing_of_a_crowd_and_everything_otherwise(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, attack: bool
) -> None:
    base = small(settings, batch_size=64, replay_size=4, gate_events=4)
    _log(base, attack)
    plain = fork(base, "plain").model_copy(update={"trust": False})
    restarted = fork(base, "restarted")
    registry = CollectorRegistry()
    with trainer(base, registry=registry) as daemon:
        daemon.start()
        while daemon.step():
            pass
        learner = daemon.learner
        rows = learner.table.look_up(["pushed-0", "pushed-1"])
        counted = learner.table.columns["total"][rows].tolist()
        weights = encode(learner.replica.write_all())
        accounts = learner.distrusted
    newest = newest_metrics(base)
    assert newest[UNDER_ATTACK] == registry.get_sample_value("recsys_under_attack") == attack
    assert newest[DISTRUSTED_ACCOUNTS] == registry.get_sample_value("recsys_accounts_distrusted")
    assert newest[PUSHED_ITEMS] == 2 * attack
    told = [each.getMessage() for each in caplog.records if "under attack" in each.getMessage()]
    if attack:
        assert accounts is not None
        assert 50 <= accounts <= 60
        # Until they were found: a third at most of some 180 choices of each.
        assert all(0 < total < 60 for total in counted)
        # Of each item once, though they may be found one after the other; and of no account.
        assert all("newcomers who push items" in each and "bot-" not in each for each in told)
        assert 1 <= len(told) <= 2
        assert all(any(item in each for each in told) for item in ("pushed-0", "pushed-1"))
    else:
        assert accounts is None
        assert not told
        assert learn_all(plain) == weights
    # Wherever a trainer restarts, in the middle of an attack too, and whoever makes a version again, finds the same.
    learn_with_restarts(restarted, monkeypatch, 1250)
    assert versions(restarted) == versions(base)
    with connect(base) as client:
        assert Rebuild(client, base, CPU).run(head(base)[0]).equal


def test_a_learner_is_restored_with_its_crowd(settings: Settings) -> None:
    first, second = (Learner(small(settings), CPU) for _ in range(2))
    first.allocate([f"item-{number}" for number in range(MOST_PUSHED)])
    served, own = first.write_all()
    own.dense[CROWD][-1] = MOST_PUSHED + 1
    with pytest.raises(CorruptWeights, match="crowd does not fit"):
        second.restore(served, own)
    own.dense[CROWD][:] = np.arange(1 + MOST_PUSHED)
    second.restore(served, decode(encode(own)))
    assert second.crowd.pushed.tolist() == list(range(1, 1 + MOST_PUSHED))
    second.restore(served, replace(own, dense={name: tensor for name, tensor in own.dense.items() if name != CROWD}))
    assert not second.crowd.attacked


def test_what_is_not_counted_takes_nothing_back(settings: Settings) -> None:
    settings = small(settings)
    learner = Learner(settings, CPU)
    learner.allocate([f"item-{number}" for number in range(20)])
    classes = [each.name for each in settings.classes]
    assert settings.provisional_class is not None
    shown, chosen, item = settings.provisional_class, classes.index("click"), 7

    def told(feedback_class: int, history: tuple[int, ...], number: int) -> Event:
        times = tuple(range(len(history)))
        return Event(
            item, feedback_class, START_MS, RowHistory(history, (chosen,) * len(history), times), {}, number, number
        )

    learner.step(encode_events([told(shown, (1, 2, 3, 4, 5, 6), number) for number in range(1, 21)], settings))
    before = {name: learner.table.column(name).clone() for name in ("classes", "audience", "total")}
    learner.crowd.restore({CROWD: np.array([0, item, *[0] * (MOST_PUSHED - 1)])})
    # Each by an account that chose nothing but the item; what it is shown counts as long as it has not chosen it.
    pairs = [told(each, (item,), number) for number in range(50, 60) for each in (shown, chosen)]
    assert learner.step(encode_events(pairs, settings)).distrusted == len(pairs)
    for name, column in before.items():
        assert torch.equal(learner.table.column(name), column), name


def test_the_first_look_that_finds_a_crowd_counts_it() -> None:
    stream = Stream()
    stream.go(40)
    while not stream.go(1, poison=0.5)[0]:
        assert not stream.crowd.accounts
    assert stream.crowd.accounts >= 10


def test_who_is_shown_what_is_pushed_does_not_push() -> None:
    crowd = Crowd()
    crowd.restore({CROWD: np.array([0, 7, *[0] * (MOST_PUSHED - 1)])})
    rows_BL = np.array([[0, 0, 3], [0, 0, 7]])
    assert crowd.trusted(rows_BL, np.array([0, 0])).tolist() == [True, False]
    assert crowd.trusted(rows_BL, np.array([7, 3])).tolist() == [False, False]
