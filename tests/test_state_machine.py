"""Any sequence of what can happen to log, trainer and versions, on a real store, beside a model of a few lists.

Feedback is accepted, lost on the way, repeated and reordered; trainers learn, crash at any command, restart and
overtake each other; the log is trimmed and versions are rolled back. What the model says always holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from learning import CPU, CUT, DONE_AND_CUT, PASS, Proxy, head, held, learn_all, small, still
from prometheus_client import CollectorRegistry

from recsys.errors import FencedOff, NotRetained, StoreUnavailable
from recsys.feedback import Feedback, to_record
from recsys.feedback_log import BEGINNING, FeedbackLog, position_key
from recsys.quarantine import Quarantine
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.weights import WeightStore
from recsys.weights.earlier import roll_back
from trainer.daemon import Daemon
from trainer.metrics import TrainerMetrics
from trainer.rebuild import Rebuild

EXAMPLES, STEPS = 4, 20
# More commands than a step needs.
LONGEST_LIFE = 40
CLASSES = ("impression", "click", "purchase")
REMEMBERED = {"click", "purchase"}
prefixes = count()
few = strategies.integers(1, 9)
numbers = strategies.integers(0, 1 << 30)


class Life(RuleBasedStateMachine):
    """Drive log and trainer through whatever hypothesis thinks of."""

    url: str
    proxy: Proxy

    def __init__(self) -> None:
        super().__init__()
        base = small(
            Settings(redis_url=self.url), snapshot_every_bytes=60_000, snapshots_retained=2, replay_capacity=12
        )
        changes = {"batch_size": 3, "batch_growth": 2, "key_prefix": f"life-{next(prefixes)}"}
        self.base = base.model_copy(update=changes)
        self.through = self.base.model_copy(update={"redis_url": self.proxy.url})
        self.client, self.cut_client = connect(self.base), connect(self.through)
        self.log = FeedbackLog(self.client, self.base)
        self.weights = WeightStore(self.client, self.base)
        self.daemon: Daemon | None = None
        # The model: what was sent, by id; the ids in the order in which they were accepted.
        self.sent: dict[str, Feedback] = {}
        self.accepted: list[str] = []
        # Batches whose senders heard nothing.
        self.unanswered: list[list[Feedback]] = []
        # The log as it was read so far, before anything of it was trimmed; how much of it has been checked.
        self.entries: list[tuple[str, dict[bytes, bytes]]] = []
        self.positions: list[str] = []
        self.histories: dict[str, list[str]] = defaultdict(list)
        self.version = 0
        self.rollbacks = 0

    def make(self, number: int) -> list[Feedback]:
        batch = []
        for _ in range(number):
            one = len(self.sent)
            feedback_id = f"f{one}"
            user, item = f"user-{one * 7 % 3}", f"item-{one * one % 11}"
            feedback = Feedback(user, item, CLASSES[one % 3], 1000 + one, feedback_id=feedback_id)
            self.sent[feedback_id] = feedback
            batch.append(feedback)
        return batch

    def accept(self, batch: list[Feedback]) -> None:
        known = set(self.accepted)
        appended = self.log.append(batch)
        assert [each.duplicate for each in appended] == [one.feedback_id in known for one in batch]
        self.accepted += [one.feedback_id for one in batch if one.feedback_id not in known]

    def trainer(self, *, gives_up: bool = False) -> Daemon:
        """Return the trainer at work, or a new one; one that gives up ends where others try again."""
        made = self.daemon is None
        if self.daemon is None:
            self.daemon = Daemon(self.through, TrainerMetrics(CollectorRegistry()), CPU, still)
        if gives_up:
            self.daemon.stopping.set()
        if made:
            self.daemon.start()
        return self.daemon

    def end(self) -> None:
        if self.daemon is not None:
            self.daemon.close()
            self.daemon = None

    # Feedback

    @rule(number=few)
    def feedback_is_accepted(self, number: int) -> None:
        self.accept(self.make(number))

    @rule(number=few, done=strategies.booleans())
    def an_answer_is_lost(self, number: int, done: bool) -> None:
        batch = self.make(number)
        fate = DONE_AND_CUT if done else CUT
        self.proxy.restart(lambda _, command: fate if command[0] == b"EVALSHA" else PASS)
        # What the script is called by must be known to the store, or it is sent twice.
        self.client.script_load(self.log._append.script)
        with pytest.raises(StoreUnavailable):
            FeedbackLog(self.cut_client, self.through).append(batch)
        self.proxy.restart(lambda number, command: PASS)
        if done:
            self.accepted += [one.feedback_id for one in batch]
        self.unanswered.append(batch)

    @precondition(lambda self: self.unanswered)
    @rule(which=numbers)
    def what_was_not_answered_is_sent_again_in_any_order(self, which: int) -> None:
        self.accept(self.unanswered.pop(which % len(self.unanswered)))

    @precondition(lambda self: self.accepted)
    @rule(which=numbers, number=few)
    def what_was_accepted_is_sent_again_among_new(self, which: int, number: int) -> None:
        start = which % len(self.accepted)
        self.accept([self.sent[name] for name in self.accepted[start : start + number]] + self.make(1))

    @rule()
    def a_tick(self) -> None:
        self.log.tick()

    # Trainers

    @rule(steps=strategies.integers(1, 3))
    def the_trainer_learns(self, steps: int) -> None:
        for _ in range(steps):
            self.trainer().step()

    @rule(commands=strategies.integers(0, LONGEST_LIFE))
    def the_trainer_dies_at_any_command(self, commands: int) -> None:
        self.proxy.restart(lambda number, _: PASS if number <= commands else CUT)
        with suppress(StoreUnavailable):
            dying = self.trainer(gives_up=True)
            while dying.step():
                pass
        self.proxy.restart(lambda number, command: PASS)
        self.end()

    @rule()
    def the_trainer_is_restarted(self) -> None:
        self.trainer().finish()
        self.end()

    @rule(number=few)
    def another_trainer_takes_over(self, number: int) -> None:
        older, self.daemon = self.trainer(), None
        newer = self.trainer()
        self.accept(self.make(number))
        self.log.tick()
        with pytest.raises(FencedOff):
            older.step()
        older.close()
        assert newer.step()

    # What is let go of

    @rule()
    def the_log_is_trimmed_behind_the_replay_window(self) -> None:
        record = self.weights.head()
        if record is not None:
            self.log.trim(record.window_position)

    @rule(back=few)
    def a_version_is_rolled_back(self, back: int) -> None:
        record = self.weights.head()
        if record is None:
            return
        try:
            made = roll_back(self.weights, Quarantine(self.client, self.base), record.version - back, "", 1000)
        except NotRetained:
            return
        assert (made.version, made.restored_version) == (record.version + 1, record.version - back) or made == record
        self.rollbacks += made != record

    # What always holds

    @invariant()
    def each_feedback_stands_in_the_log_once_with_its_history(self) -> None:
        last = self.entries[-1][0] if self.entries else BEGINNING
        found: Any = self.client.xrange(f"{self.base.key_prefix}:{{log}}:records", f"({last}")
        self.entries += [(position.decode(), fields) for position, fields in found]
        for entry in self.log.read_after(last, 100_000):
            if entry.record is None:
                continue
            number = len(self.positions)
            self.positions.append(entry.position)
            record = entry.record
            assert record.feedback_id == self.accepted[number]
            history = self.histories[record.user_id]
            assert [each.item_id for each in record.history] == history[-self.base.history_length :]
            expected = to_record(self.sent[record.feedback_id])
            expected.history.extend(record.history)
            assert record == expected
            if record.feedback_class in REMEMBERED:
                history.append(record.item_id)
        assert len(self.positions) == len(self.accepted)

    @invariant()
    def versions_go_on_and_leave_no_feedback_out(self) -> None:
        record = self.weights.head()
        if record is None:
            return
        assert record.version >= self.version
        self.version = record.version
        position = position_key(record.position)
        assert record.feedback_learned == sum(position_key(each) <= position for each in self.positions)

    def teardown(self) -> None:
        try:
            self.check_end()
        finally:
            self.end()
            self.client.close()
            self.cut_client.close()

    def check_end(self) -> None:
        """Let everything be learned, and make it again."""
        self.end()
        self.log.tick()
        self.each_feedback_stands_in_the_log_once_with_its_history()
        learn_all(self.base)
        assert head(self.base)[3] == len(self.accepted)
        assert self.weights.verify().problems == []
        with suppress(NotRetained):
            assert Rebuild(self.client, self.base, CPU).run(head(self.base)[0]).equal
        cases = Quarantine(self.client, self.base).cases()
        if self.rollbacks:
            assert cases
            return
        assert not cases
        reference = self.base.model_copy(update={"key_prefix": f"{self.base.key_prefix}-reference"})
        for position, fields in self.entries:
            self.client.xadd(f"{reference.key_prefix}:{{log}}:records", fields, id=position)
        assert learn_all(reference) == held(self.base)
        assert head(reference) == head(self.base)


@pytest.fixture
def _proxied(embedded_store: EmbeddedStore) -> Iterator[None]:
    with Proxy(embedded_store.url) as proxy, connect(Settings(redis_url=embedded_store.url)) as client:
        client.flushall()
        Life.url, Life.proxy = embedded_store.url, proxy
        yield


@pytest.mark.usefixtures("_proxied")
def test_whatever_happens_nothing_is_lost_or_learned_twice() -> None:
    bounded = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Life, settings=bounded)
