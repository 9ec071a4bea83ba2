"""Chosen: settings that are valid, and would harm all the same, alone or together."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from recsys.cli.doctor.finding import Finding
from recsys.cli.output import size
from recsys.condition import duration
from recsys.errors import SettingsError
from recsys.server import check_exposure
from recsys.service.auth import read_tokens
from recsys.service.front import needed
from recsys.service.transport import chosen
from recsys.settings import Settings, is_loopback
from recsys.tls import CERTIFICATES, Named, expiries

# A record with a history of 50 entries; see README.
RECORD_BYTES = 1400
# Files that a process has open beside its connections.
OTHER_FILES = 64
# Files that a connection takes behind a front: its own, and both ends of what it is passed on by.
FILES_BEHIND_FRONT = 3
HIGH_LEARNING_RATE = 0.03
# As the alert has it: time enough to ask somebody for a new one.
EXPIRING_SECONDS = 14 * 86_400.0


def examine(settings: Settings) -> Iterator[Finding]:
    """Go through what is dangerous, then say that the rest is fine."""
    found = [
        *_exposure(settings),
        *_learning(settings),
        *_capacity(settings),
        *_transport(settings),
        *_certificates(settings),
    ]
    yield from found
    if all(finding.level == "ok" for finding in found):
        yield Finding("settings", "ok", "valid, and none of them dangerous together with others")


def _refused(check: Callable[[], object], advice: str) -> Iterator[Finding]:
    try:
        check()
    except SettingsError as error:
        yield Finding("settings", "problem", str(error), advice)


def _exposure(settings: Settings) -> Iterator[Finding]:
    yield from _refused(lambda: check_exposure(settings), "until then `recsys serve` does not start")
    path = settings.tokens_file
    if path:
        yield from _refused(lambda: read_tokens(Path(path)), "write the file as docs/security.md says")
    if is_loopback(settings.host) or not settings.insecure:
        return
    if not path:
        found = f"insecure: anyone who reaches {settings.host} may call every method, forgetting users included"
        yield Finding("settings", "warning", found, "set tokens_file, unless the network itself is guarded")
    elif not settings.tls_certificate:
        found = "tokens_file without tls_certificate: tokens cross the network unencrypted"
        yield Finding("settings", "warning", found, "set tls_certificate and tls_key, unless the network encrypts")


def _learning(settings: Settings) -> Iterator[Finding]:
    if not settings.gate:
        found = "gate = false: a version that makes recommendations worse is published like any other"
        yield Finding("settings", "warning", found, "set gate = true")
    if settings.learning_rate > HIGH_LEARNING_RATE:
        found = f"learning_rate = {settings.learning_rate:g} is far above what was found to learn well (0.001)"
        yield Finding("settings", "warning", found, "lower it, unless it was tried: `recsys evaluate` compares")
    worthless = [c.name for c in settings.classes if c.positive and not c.worth]
    if worthless and settings.worth_weight:
        found = f"classes: {', '.join(worthless)} are positive and worth nothing, so that they lower an item's place"
        yield Finding("settings", "warning", found, "give them a worth above 0, or set worth_weight = 0")
    if not any(c.history for c in settings.classes):
        found = "classes: none enters the history, so that everyone is recommended what is popular"
        yield Finding("settings", "problem", found, "set history = true for what users choose")


def _capacity(settings: Settings) -> Iterator[Finding]:
    replayed = settings.replay_capacity * RECORD_BYTES
    if replayed > settings.log_max_bytes:
        found = (
            f"replay_capacity = {settings.replay_capacity:,} takes about {size(replayed)} of the log, and "
            f"log_max_bytes is {size(settings.log_max_bytes)}: the log fills up and feedback is refused"
        )
        yield Finding("settings", "problem", found, "raise log_max_bytes or lower replay_capacity")
    cores = os.cpu_count() or 1
    wanted = settings.torch_threads * settings.server_processes
    if wanted > cores:
        found = f"torch_threads x server_processes = {wanted} on {cores} cores: threads would wait for one another"
        yield Finding("settings", "warning", found, "lower one of them")


def _transport(settings: Settings) -> Iterator[Finding]:
    try:
        name = chosen(settings)
    except SettingsError as error:
        yield Finding("transport", "problem", str(error), "until then `recsys serve` does not start")
        return
    faster = ""
    if name == "grpcio" and settings.transport == "auto":
        faster = "; the extra recsys[native] has one that takes several times as many calls"
    yield Finding("transport", "ok", f"{name} (transport = {settings.transport}){faster}")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    each = FILES_BEHIND_FRONT if name == "native" and needed(settings) else 1
    if files != resource.RLIM_INFINITY and files < each * settings.max_connections + OTHER_FILES:
        found = f"max_connections = {settings.max_connections:,}, and a process may open {files:,} files"
        yield Finding("settings", "warning", found, "raise it (ulimit -n), or lower max_connections")


def _certificates(settings: Settings) -> Iterator[Finding]:
    try:
        found = expiries(Named(name, getattr(settings, name)) for name in CERTIFICATES)
    except SettingsError as error:
        yield Finding("certificates", "problem", str(error), "name the right file, in PEM form")
        return
    for setting, expires in found.items():
        left = expires - time.time()
        day = f"{datetime.fromtimestamp(expires, UTC):%Y-%m-%d %H:%M} UTC"
        if left <= 0:
            advice = "renew it and start again what uses it: nobody who checks it connects any more"
            yield Finding("certificates", "problem", f"{setting} expired at {day}", advice)
        elif left < EXPIRING_SECONDS:
            advice = "renew it, and start again what uses it: the file is read at start"
            yield Finding("certificates", "warning", f"{setting} expires in {duration(left)}, at {day}", advice)
        else:
            yield Finding("certificates", "ok", f"{setting} expires in {duration(left)}, at {day}")
