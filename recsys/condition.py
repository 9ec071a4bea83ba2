"""Condition: are recommendations good, fresh and healthy, and what to do if not; one judgement for page and terminal.

Every finding says what was found, and what a person can do about it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Topic = Literal["good", "fresh", "healthy"]
Level = Literal["ok", "unknown", "warning", "problem"]
LEVELS: tuple[Level, ...] = ("ok", "unknown", "warning", "problem")

# The objective of freshness, and what nobody can call fresh any more.
FRESH_SECONDS, STALE_SECONDS = 1.0, 10.0
# Without a commit for so long while feedback waits, nothing is being learned.
STANDSTILL_SECONDS = 15.0
# How long a server may take to serve a version that stands in the store.
APPLY_SECONDS = 5.0
# Before so much feedback neither popularity nor we have anything to go by.
LEAST_FEEDBACK = 2000
# Accuracy beside popularity's, and beside its own of before.
WORSE_THAN_POPULARITY, FALLEN = 0.9, 0.7
SLOW_SECONDS = 0.1
FAILED_WARNING, FAILED_PROBLEM = 0.001, 0.01
FULL_WARNING, FULL_PROBLEM = 0.8, 0.95
# A drift that was found is a metric of 1 under such a name; without a stream, of any stream.
DRIFTING = re.compile(r"drift(?:_(\w+?))?_(?:detected|on|active)")
# The kinds of versions, as in the messages of ModelService.
LEARNED, ROLLBACK, REPAIR = "learned", "rollback", "repair"
ACCURACY, BESIDE = "hr_at_10", "popularity_hr_at_10"
UNDER_ATTACK, DISTRUSTED_ACCOUNTS, PUSHED_ITEMS = "under_attack", "distrusted_accounts", "pushed_items"


@dataclass(frozen=True, slots=True)
class Facts:
    """Hold what is known; None where it is not."""

    now_ms: int
    store_problem: str = ""
    serving_problem: str = ""
    served_version: int = 0
    # The newest in the store, 0 before the first.
    newest_version: int = 0
    newest_committed_ms: int = 0
    newest_verdict: str = ""
    newest_reason: str = ""
    # How often the version after the newest was held so far, and why the last time.
    held_times: int = 0
    held_reason: str = ""
    feedback_learned: int = 0
    backlog: int = 0
    paused: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    # The accuracy of versions before, oldest first.
    earlier_accuracy: Sequence[float] = ()
    freshness_seconds: float | None = None
    set_aside: int = 0
    log_bytes: int = 0
    log_max_bytes: int = 0
    used_memory: int = 0
    max_memory: int = 0
    failed_ratio: float | None = None
    answer_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Say what was found, and what to do: a sentence each, and a command where there is one."""

    topic: Topic
    level: Level
    title: str
    advice: str
    command: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Answer one of the three questions in a sentence."""

    level: Level
    sentence: str


@dataclass(frozen=True, slots=True)
class Condition:
    """Hold the three answers and, worst first, what was found."""

    good: Verdict
    fresh: Verdict
    healthy: Verdict
    findings: Sequence[Finding]


# Before anything is known.
_LOOKING = Verdict("unknown", "looking")
UNKNOWN = Condition(_LOOKING, _LOOKING, _LOOKING, ())


def judge(facts: Facts) -> Condition:
    """Judge by what is known."""
    found = sorted((*_good(facts), *_fresh(facts), *_healthy(facts)), key=lambda f: -LEVELS.index(f.level))
    return Condition(
        _verdict("good", found, _accuracy_sentence(facts)),
        _verdict("fresh", found, _freshness_sentence(facts)),
        _verdict("healthy", found, Verdict("ok", "answers, learns and stores as it should")),
        found,
    )


def _verdict(topic: Topic, found: Sequence[Finding], otherwise: Verdict) -> Verdict:
    worst = next((f for f in found if f.topic == topic and f.level in ("problem", "warning")), None)
    return Verdict(worst.level, worst.title) if worst else otherwise


def _accuracy_sentence(facts: Facts) -> Verdict:
    ours, theirs = facts.metrics.get(ACCURACY), facts.metrics.get(BESIDE)
    if facts.feedback_learned < LEAST_FEEDBACK:
        return Verdict(
            "unknown", f"too early to tell: {facts.feedback_learned:,} feedback learned, {LEAST_FEEDBACK:,} are needed"
        )
    if ours is None or theirs is None:
        return Verdict("unknown", "the newest version was not measured on any choice")
    if theirs <= 0:
        return Verdict("ok", f"{ours:.1%} of choices were among the first ten, popularity has none")
    return Verdict("ok", f"{ours / theirs:.1f} times as often right as popularity")


def _freshness_sentence(facts: Facts) -> Verdict:
    if facts.store_problem:
        return Verdict("unknown", "cannot be told while the store does not answer")
    if not facts.newest_version:
        return Verdict("unknown", "nothing has been learned yet")
    if facts.backlog == 0:
        return Verdict("ok", "all feedback is learned")
    return Verdict("ok", "feedback is learned as it comes")


def _good(facts: Facts) -> Iterator[Finding]:
    ours, theirs = facts.metrics.get(ACCURACY), facts.metrics.get(BESIDE)
    enough = facts.feedback_learned >= LEAST_FEEDBACK
    if ours is not None and theirs is not None and enough and ours < WORSE_THAN_POPULARITY * theirs:
        yield Finding(
            *("good", "problem", "recommendations are worse than a list of what is popular"),
            "Find in the versions since when accuracy falls, and go back to one before that. If it never was better, "
            "check that feedback carries the right user and item ids, and which classes count as positive.",
            "recsys versions; recsys rollback VERSION",
        )
    before = sorted(facts.earlier_accuracy)
    usual = before[len(before) // 2] if before else 0.0
    if ours is not None and enough and usual and ours < FALLEN * usual:
        yield Finding(
            *("good", "warning", f"accuracy has fallen from {usual:.3f} to {ours:.3f}"),
            "Look for drift, or a change in what sends feedback. Learning catches up with new tastes by itself; after "
            "bad feedback go back to a version before it.",
            "recsys versions",
        )
    drifting = drifts(facts.metrics)
    if drifting:
        yield Finding(
            *("good", "warning", f"drift: {', '.join(drifting)}"),
            "What users do or items are offered has changed. Watch accuracy: it should recover as the new is learned. "
            "If a release or an import caused it, correct that first.",
            "recsys versions show VERSION",
        )
    accounts, pushed = (facts.metrics.get(name, 0) for name in (DISTRUSTED_ACCOUNTS, PUSHED_ITEMS))
    if facts.metrics.get(UNDER_ATTACK) and pushed:
        yield Finding(
            *(
                "good",
                "warning",
                f"under attack: {accounts:,.0f} accounts are not counted, {pushed:,.0f} items are pushed",
            ),
            "New accounts choose items that hardly anybody else does, and are not counted as long as that lasts. The "
            "trainer's log names the items. Find who makes these accounts, or which campaign sends newcomers there.",
            "recsys versions show VERSION",
        )
    elif facts.metrics.get(UNDER_ATTACK):
        yield Finding(
            *("good", "warning", f"under attack: {accounts:,.0f} accounts behave as if taken over"),
            "What they choose no longer has to do with their histories, and is not counted as long as that lasts. Find "
            "where it comes from: stolen passwords, a client that mixes up user ids, or a release that changed what "
            "many are shown.",
            "recsys versions show VERSION",
        )
    if facts.held_times:
        yield Finding(
            *("good", "warning", f"version {facts.newest_version + 1} is held: {facts.held_reason}"),
            f"The one before is served meanwhile. It was held {times(facts.held_times)}, and is judged again with "
            "each batch that comes; what stays worse is set aside. Look for a burst of bad feedback.",
            "recsys status --watch",
        )
    if facts.newest_verdict in ("set aside", "rolled back"):
        yield Finding(
            *("good", "warning", f"the version served was {facts.newest_verdict}"),
            f"{facts.newest_reason or 'No reason was given'}. Look at the feedback that was set aside; release it if "
            "it was good, correct its sender if not.",
            "recsys quarantine list",
        )


def drifts(metrics: Mapping[str, float]) -> list[str]:
    """Name the drifts that a version's metrics report as detected."""
    on = [name for name, value in metrics.items() if DRIFTING.fullmatch(name) and value >= 1]
    named = [name for name in (DRIFTING.sub(r"\1", name).replace("_", " ") for name in on) if name]
    # One flag stands for all: it is named only where no other is.
    return named or ["detected"] * bool(on)


def _fresh(facts: Facts) -> Iterator[Finding]:
    age = (facts.now_ms - facts.newest_committed_ms) / 1000
    if facts.store_problem:
        # Nothing below can be told.
        return
    if facts.paused:
        yield Finding(
            *("fresh", "warning", "learning is paused"),
            f"{facts.backlog:,} feedback wait, and more are taken. Let learning go on when you are done.",
            "recsys resume",
        )
    elif not facts.newest_version:
        yield Finding(
            *("fresh", "problem", "no trainer has published anything yet"),
            "Start one against the same store and key_prefix; its log says what stops it.",
            "recsys train",
        )
    elif facts.backlog and age > STANDSTILL_SECONDS:
        yield Finding(
            *("fresh", "problem", f"nothing has been learned for {duration(age)}, and {facts.backlog:,} feedback wait"),
            "Is the trainer running? Its log says so, and why it holds a version. Feedback is kept meanwhile, and "
            "learned when the trainer is back.",
            "recsys train",
        )
    if facts.served_version < facts.newest_version and age > APPLY_SECONDS:
        yield Finding(
            *("fresh", "problem", f"version {facts.newest_version} stands, but {facts.served_version} is served"),
            "The server could not take newer weights; its log says why. Check what is stored.",
            "recsys verify",
        )
    seconds = facts.freshness_seconds
    if seconds is not None and seconds > FRESH_SECONDS:
        yield Finding(
            *("fresh", "problem" if seconds > STALE_SECONDS else "warning"),
            f"feedback takes {duration(seconds)} to be served, {FRESH_SECONDS:g} s is the objective",
            "The trainer cannot keep up, or shares its processor. Give it a core of its own, or raise batch_size.",
            "recsys doctor",
        )


def _healthy(facts: Facts) -> Iterator[Finding]:
    if facts.store_problem:
        yield Finding(
            *("healthy", "problem", facts.store_problem),
            "Answers come from the weights at hand and without histories; feedback is refused and should be sent "
            "again. Start the store, or correct redis_url.",
            "recsys doctor",
        )
    if not facts.served_version:
        yield Finding(
            *("healthy", "problem", "the server has no weights yet"),
            "It begins to serve once a trainer has published the first version and it is loaded.",
            "recsys train",
        )
    if facts.serving_problem:
        yield Finding(
            *("healthy", "problem", "newer weights in the store cannot be used"),
            f"{facts.serving_problem}. A repair goes back to the newest version that is whole.",
            "recsys verify --repair",
        )
    if facts.failed_ratio is not None and facts.failed_ratio > FAILED_WARNING:
        yield Finding(
            *("healthy", "problem" if facts.failed_ratio > FAILED_PROBLEM else "warning"),
            f"{facts.failed_ratio:.1%} of calls fail",
            "By code: grpc_server_handled_total. RESOURCE_EXHAUSTED is overload: fewer calls or more servers. "
            "INTERNAL stands in the server's log.",
            "recsys doctor",
        )
    if facts.answer_seconds is not None and facts.answer_seconds > SLOW_SECONDS:
        yield Finding(
            *("healthy", "warning", f"the slowest hundredth of answers takes {duration(facts.answer_seconds)}"),
            "Too many calls for this server, or a slow store. More server_processes, or more servers.",
            "recsys doctor",
        )
    yield from _room("the feedback log", facts.log_bytes, facts.log_max_bytes, "log_max_bytes")
    yield from _room("the store's memory", facts.used_memory, facts.max_memory, "maxmemory of the store")
    if facts.set_aside:
        yield Finding(
            *("healthy", "warning", f"{facts.set_aside:,} feedback are set aside"),
            "They made recommendations worse, or a person rolled back. Release what was good.",
            "recsys quarantine list",
        )


def _room(what: str, used: int, bound: int, setting: str) -> Iterator[Finding]:
    if bound and used > FULL_WARNING * bound:
        yield Finding(
            *("healthy", "problem" if used > FULL_PROBLEM * bound else "warning"),
            f"{what} is {used / bound:.0%} full",
            f"When it is full feedback is refused. Let the trainer catch up, or raise {setting}.",
            "recsys doctor",
        )


def duration(seconds: float) -> str:
    """Write a time for a person."""
    for bound, size, unit in ((1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min"), (172_800.0, 3600.0, "h")):
        if seconds < bound:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def times(number: int) -> str:
    """Write how often."""
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def verdict(kind: str, reason: str, version: int, restored: int) -> str:
    """Say what became of a version at the gate, and by whose hand."""
    if kind == ROLLBACK:
        # Only the trainer commits again what was in force already: behind feedback that it could not learn.
        return "set aside" if restored == version - 1 else "rolled back"
    if kind == LEARNED:
        return "held" if reason else "learned"
    return "repaired" if kind == REPAIR else kind
