"""Witnesses: threads that use a system while its parts are killed, and remember what it told them."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Any

import redis

from recsys import Client, Feedback
from recsys.client import Recommendations
from recsys.errors import RecsysError
from recsys.feedback_log import BEGINNING, FeedbackLog, LogEntry
from recsys.settings import Settings
from recsys.store.connection import connect

USERS, ITEMS, CLASSES = 9, 40, ("impression", "click", "click", "like", "purchase")
PER_CALL = 6
WRITE_PAUSE_SECONDS, READ_PAUSE_SECONDS, RETRY_SECONDS = 0.05, 0.01, 0.02
# How often a client sends again what was acknowledged, as one that lost the answer would.
REPEATED = 0.1
CALL_SECONDS = 2.0
# A user without a history: the answer depends on the weights alone.
NOBODY, ANSWER_ITEMS = "nobody", 20
TAIL_COUNT = 1000

Shown = tuple[tuple[str, float], ...]


def make_feedback(draw: random.Random, feedback_id: str) -> Feedback:
    """Make up one feedback; some have a context."""
    context = {"page": draw.choice("ab")} if draw.random() < 0.3 else {}
    user_id, item_id = f"user-{draw.randrange(USERS)}", f"item-{draw.randrange(ITEMS)}"
    return Feedback(user_id, item_id, draw.choice(CLASSES), feedback_id=feedback_id, context=context)


class Tail(threading.Thread):
    """Copy the log while it is written: what is learned is trimmed sooner or later."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self._settings = settings
        self._over = threading.Event()
        self.entries: list[tuple[LogEntry, dict[bytes, bytes]]] = []

    def run(self) -> None:
        """Read until `finish`, through kills of the store."""
        position = BEGINNING
        key = f"{self._settings.key_prefix}:{{log}}:records"
        with connect(self._settings) as client:
            log = FeedbackLog(client, self._settings)
            while True:
                last = self._over.is_set()
                try:
                    found = log.read_after(position, TAIL_COUNT, 0 if last else CALL_SECONDS / 4)
                    raw: Any = client.xrange(key, found[0].position, found[-1].position) if found else []
                except (RecsysError, redis.exceptions.RedisError):
                    time.sleep(RETRY_SECONDS)
                    continue
                if len(raw) == len(found):
                    self.entries += [(entry, fields) for entry, (_, fields) in zip(found, raw, strict=True)]
                    position = found[-1].position if found else position
                if last and not found:
                    return

    def finish(self) -> None:
        """Read what is left and stop."""
        self._over.set()
        self.join()


class Writer(threading.Thread):
    """Log feedback over gRPC, the same again and again until it is acknowledged, and now and then once more."""

    def __init__(self, settings: Settings, name: str, seed: int) -> None:
        super().__init__(daemon=True)
        self._settings, self._name, self._draw = settings, name, random.Random(f"{name}-{seed}")
        self.over = threading.Event()
        self.acknowledged: list[str] = []
        self.resent = self.wrong_answers = 0

    def run(self) -> None:
        """Write until `over`; what was begun is acknowledged then."""
        ids = count()
        with Client(f"127.0.0.1:{self._settings.port}", timeout=CALL_SECONDS) as client:
            while not self.over.wait(self._draw.uniform(0, 2 * WRITE_PAUSE_SECONDS)):
                names = [f"{self._name}-{next(ids)}" for _ in range(self._draw.randint(1, PER_CALL))]
                self._write(client, [make_feedback(self._draw, name) for name in names])
                self.acknowledged += names

    def _write(self, client: Client, batch: Sequence[Feedback]) -> None:
        again, repeated = True, False
        while again:
            try:
                results = client.log_feedback(batch)
            except RecsysError:
                self.resent += len(batch)
                time.sleep(RETRY_SECONDS)
                continue
            # A batch counts as a whole or not at all; what was acknowledged is a duplicate from then on.
            self.wrong_answers += len({each.duplicate for each in results}) != 1
            self.wrong_answers += sum(not each.accepted or (repeated and not each.duplicate) for each in results)
            again = repeated = not repeated and self._draw.random() < REPEATED


class Reader(threading.Thread):
    """Ask for the same recommendations over and over; `lives` counts the server's, from `killed`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self._settings = settings
        self.over = threading.Event()
        self.lives = 0
        self.seen: dict[int, Counter[Shown]] = {}
        self.answers = self.backwards = self.behind = 0

    def run(self) -> None:
        """Ask until `over`."""
        newest: Counter[int] = Counter()
        with Client(f"127.0.0.1:{self._settings.port}", timeout=CALL_SECONDS) as client:
            while not self.over.wait(READ_PAUSE_SECONDS):
                life = self.lives
                try:
                    answer = client.recommend(NOBODY, ANSWER_ITEMS)
                except RecsysError:
                    continue
                self.answers += 1
                self.seen.setdefault(answer.version, Counter())[shown(answer)] += 1
                if life == self.lives:
                    self.behind += newest[life] == 0 and answer.version < max(newest.values(), default=0)
                    self.backwards += answer.version < newest[life]
                    newest[life] = max(newest[life], answer.version)


def shown(answer: Recommendations) -> Shown:
    """Return the items of an answer with their scores."""
    return tuple((item.item_id, item.score) for item in answer.items)
