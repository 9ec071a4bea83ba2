"""Stored: the store, and the versions in it."""

from __future__ import annotations

from collections.abc import Iterator

from recsys.cli.doctor.finding import Finding, Level
from recsys.cli.output import size
from recsys.condition import FULL_PROBLEM, FULL_WARNING, duration
from recsys.errors import CorruptWeights, RecsysError, SettingsError
from recsys.feedback_log import FeedbackLog
from recsys.quarantine import Quarantine
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.durability import Durability
from recsys.store.inspection import REWRITE, Files, Inspection, files, inspect
from recsys.weights import WeightStore

# What the scripts need; Valkey began at 7.2.
OLDEST = (6, 2)
SLOW_SECONDS = 0.02
# Times are compared across machines to a fraction of a second; feedback may be five minutes ahead before it is refused.
CLOCK_WARNING, CLOCK_PROBLEM = 0.25, 60.0
# As the alert has it.
LEAST_FREE_BYTES = 1 << 30
# The newest versions, read whole and compared with their checksums; `recsys verify` reads them all.
VERSIONS_READ = 16


def examine(settings: Settings) -> Iterator[Finding]:
    """Ask the store; without it nothing else can be told."""
    try:
        with connect(settings) as client:
            inspection = inspect(client)
            yield from _store(settings, inspection)
            yield from _durability(settings, Durability(client, settings), inspection)
            yield from room(files(client))
            yield _clock(inspection)
            yield from _log(FeedbackLog(client, settings), Quarantine(client, settings))
            yield from _versions(settings, WeightStore(client, settings))
    except SettingsError as error:
        yield Finding("store", "problem", str(error), "correct the setting")
    except RecsysError as error:
        advice = (
            "start it, or correct redis_url and its password or TLS files; the embedded store of a running `recsys up` "
            "is found by its data_dir, on Linux and by the same user, else by the address that it tells when it starts"
        )
        yield Finding("store", "problem", str(error), advice)


def _store(settings: Settings, found: Inspection) -> Iterator[Finding]:
    name = f"{found.server} {found.version}"
    if tuple(int(part) for part in found.version.split(".")[:2] if part.isdigit()) < OLDEST:
        yield Finding("store", "problem", f"{name} is too old", "take Redis 6.2 or newer, or Valkey")
    elif found.role != "master":
        yield Finding("store", "problem", f"{name} is a replica and takes no writes", "let redis_url name the primary")
    elif found.loading:
        yield Finding("store", "warning", f"{name} is still reading its files", "wait, then look again")
    elif found.answer_seconds > SLOW_SECONDS:
        yield Finding(
            *("store", "warning", f"{name} takes {duration(found.answer_seconds)} to answer"),
            "every request waits for it once: bring it closer, or look for slow commands (SLOWLOG GET)",
        )
    else:
        yield Finding("store", "ok", f"{name} answers within {duration(found.answer_seconds)}")
    yield from _memory(settings, found)


def _memory(settings: Settings, found: Inspection) -> Iterator[Finding]:
    use = f"{size(found.used_memory)} in use"
    if found.max_memory and found.policy != "noeviction":
        yield Finding(
            *("memory", "problem", f"maxmemory {size(found.max_memory)} with maxmemory-policy {found.policy}: {use}"),
            "a full store would throw feedback and weights away: set maxmemory-policy noeviction",
        )
        return
    if not found.max_memory:
        yield Finding("memory", "ok", f"{use}, no bound (maxmemory 0)")
        return
    share = found.used_memory / found.max_memory
    text = f"{use}, of {size(found.max_memory)} ({share:.0%})"
    allowed = settings.log_max_bytes + settings.weights_max_bytes
    if share > FULL_WARNING:
        level: Level = "problem" if share > FULL_PROBLEM else "warning"
        yield Finding("memory", level, text, "raise maxmemory, or lower log_max_bytes and weights_max_bytes")
    elif found.max_memory < allowed:
        advice = (
            "raise maxmemory, or lower log_max_bytes and weights_max_bytes: both bounds then hold before the store's"
        )
        yield Finding("memory", "warning", f"{text}; log and weights may grow to {size(allowed)}", advice)
    else:
        yield Finding("memory", "ok", text)


def _durability(settings: Settings, durability: Durability, found: Inspection) -> Iterator[Finding]:
    if found.last_write_failed:
        yield Finding(
            *("durability", "problem", "the store could not write its files the last time it tried"),
            "make room on its disk and look at its log: it refuses feedback until it can",
        )
        return
    try:
        durability.check()
    except SettingsError as error:
        yield Finding("durability", "problem", str(error), "change the store or the setting")
        return
    asked = f"durability = {settings.durability}"
    if settings.durability == "replica" and found.replicas < settings.durable_replicas:
        text = f"{asked} with {settings.durable_replicas} replicas, and {found.replicas} connected: feedback is refused"
        yield Finding("durability", "problem", text, "connect replicas, or lower durable_replicas")
    elif found.append_only is False:
        yield Finding(
            *(
                "durability",
                "warning",
                f"{asked}, and the store has no append-only file: a restart may lose everything",
            ),
            "set appendonly yes in the store (CONFIG SET appendonly yes, then CONFIG REWRITE)",
        )
    elif found.flushed == "no":
        advice = "set appendfsync everysec or always in the store"
        yield Finding("durability", "warning", f"{asked}, and appendfsync no: a crash may lose half a minute", advice)
    else:
        flushed = f", appendfsync {found.flushed}" if found.flushed else ""
        yield Finding("durability", "ok", f"{asked}{flushed}")


def room(found: Files) -> Iterator[Finding]:
    """Tell whether the store's append-only file can be kept short, and of the room for it where that is known."""
    text = f"append-only file {size(found.append_only_bytes)}" if found.append_only_bytes >= 0 else ""
    if found.free_bytes >= 0:
        text = ", ".join(filter(None, (text, f"{size(found.free_bytes)} free on the store's disk")))
    if found.written[REWRITE] == 0:
        advice = "make room on the store's disk and look at its log; then BGREWRITEAOF: until then the file only grows"
        yield Finding("files", "warning", f"{text}; it could not be replaced by a shorter one the last time", advice)
    elif found.free_bytes < max(LEAST_FREE_BYTES, found.append_only_bytes):
        yield Finding("files", "warning", text, "make room: a rewrite takes as much again as the file that it makes")
    elif text:
        yield Finding("files", "ok", text)


def _clock(found: Inspection) -> Finding:
    apart, precise = abs(found.clock_ahead), duration(found.answer_seconds)
    text = f"{duration(apart)} {'behind' if found.clock_ahead > 0 else 'ahead of'} the store's, give or take {precise}"
    if apart <= CLOCK_WARNING + found.answer_seconds:
        return Finding("clock", "ok", text)
    advice = "let NTP set the clocks of both machines: times of feedback and freshness are wrong by as much"
    return Finding("clock", "problem" if apart > CLOCK_PROBLEM else "warning", text, advice)


def _log(log: FeedbackLog, quarantine: Quarantine) -> Iterator[Finding]:
    usage = log.usage()
    share = usage.bytes / usage.max_bytes
    text = f"{usage.records:,} records, {size(usage.bytes)} of {size(usage.max_bytes)} ({share:.0%})"
    if share > FULL_WARNING:
        level: Level = "problem" if share > FULL_PROBLEM else "warning"
        advice = (
            "let the trainer run, so that what is learned can go, or raise log_max_bytes: a full log refuses feedback"
        )
        yield Finding("feedback log", level, text, advice)
    else:
        yield Finding("feedback log", "ok", text)
    aside = sum(case.feedback for case in quarantine.cases())
    if aside:
        advice = "`recsys quarantine list` says why; release what was good"
        yield Finding("quarantine", "warning", f"{aside:,} feedback are set aside", advice)


def _versions(settings: Settings, store: WeightStore) -> Iterator[Finding]:
    head = store.head()
    if head is None:
        advice = "start a trainer: `recsys train`, or `recsys up`"
        yield Finding("versions", "warning", f"none yet under key_prefix {settings.key_prefix}", advice)
        return
    try:
        read = read_newest(store)
    except CorruptWeights as error:
        advice = "`recsys verify` reads all; `recsys verify --repair` goes back to the newest that is whole"
        yield Finding("versions", "problem", str(error), advice)
    else:
        text = f"version {head.version} is the newest; the newest {read} are whole and continue one another"
        yield Finding("versions", "ok", text)
    if head.settings_digest != settings.learning_digest():
        text = f"version {head.version} was learned with other settings than are in force here"
        advice = "fine when they were changed on purpose; else give this command the trainer's (--config)"
        yield Finding("versions", "warning", text, advice)
    if store.paused():
        yield Finding("versions", "warning", "learning is paused", "`recsys resume` lets it go on")


def read_newest(store: WeightStore) -> int:
    """Read the newest versions with all that belongs to them; return how many.

    Raises:
        CorruptWeights: when one of them is not whole, or does not continue the one before.
    """
    records = store.versions(VERSIONS_READ)[::-1]
    chain: bytes | None = None
    for record in records:
        # One by one: of several, a damaged one would only end what is returned.
        try:
            store.read_after(record.version - 1, count=1, chain=chain, trainer=True)
        except CorruptWeights:
            # It may have been let go of meanwhile.
            if record in store.versions(1, record.version + 1):
                raise
        chain = record.chain
    return len(records)
