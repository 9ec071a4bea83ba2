"""Inspection: what a store says of itself: version, memory, files and clock, as far as it tells."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from recsys.store.connection import store_errors

TIMES_ASKED = 5
# What a store writes: its append-only file, the shorter one that replaces it now and then, and dumps of all it holds.
APPEND_ONLY, REWRITE, DUMP = FILES = ("append_only", "rewrite", "dump")


@dataclass(frozen=True, slots=True)
class Inspection:
    """Hold what a store said; "" or None where it does not say, as managed stores do of their configuration."""

    server: str
    version: str
    role: str
    used_memory: int
    # 0: no bound.
    max_memory: int
    policy: str
    # Entries removed to make room since the store started.
    evicted: int
    loading: bool
    append_only: bool | None
    flushed: str
    last_write_failed: bool
    replicas: int
    # How far its clock is ahead of ours, give or take half of what the question took; seconds.
    clock_ahead: float
    answer_seconds: float


@dataclass(frozen=True, slots=True)
class Files:
    """Tell how a store's files are; NaN where it does not say, has none, or keeps them on another machine."""

    # By FILES: 1 where the last write was done, 0 where it failed. A dump that is asked for by hand is none of them.
    written: Mapping[str, float]
    append_only_bytes: float
    # Room on the disk that they are on.
    free_bytes: float


def inspect(client: redis.Redis) -> Inspection:
    """Ask a store for what it says of itself, and for the time more than once: the quickest answer tells most.

    Raises:
        StoreUnavailable: when it does not answer.
    """
    with store_errors():
        took, ahead = min(_ask_time(client) for _ in range(TIMES_ASKED))
        said: dict[str, Any] = client.info()
    flushed = _configured(client, "appendfsync")
    statuses = said.get("aof_last_write_status"), said.get("rdb_last_bgsave_status") if _dumps(client) else None
    enabled = said.get("aof_enabled")
    return Inspection(
        server="Valkey" if "valkey_version" in said else "Redis",
        version=str(said.get("valkey_version") or said.get("redis_version") or ""),
        role=str(said.get("role", "")),
        used_memory=int(said.get("used_memory", 0)),
        max_memory=int(said.get("maxmemory", 0)),
        policy=str(said.get("maxmemory_policy", "")),
        evicted=int(said.get("evicted_keys", 0)),
        loading=bool(said.get("loading", 0)),
        append_only=None if enabled is None else bool(enabled),
        flushed=flushed,
        last_write_failed="err" in statuses,
        replicas=int(said.get("connected_slaves", 0)),
        clock_ahead=ahead,
        answer_seconds=took,
    )


def memory(client: redis.Redis) -> tuple[float, float]:
    """Return how much memory a store uses, and its bound (0: none), in bytes; NaN where it does not say.

    Raises:
        StoreUnavailable: when it does not answer.
    """
    said = _said(client, "memory")
    return float(said.get("used_memory", math.nan)), float(said.get("maxmemory", math.nan))


def files(client: redis.Redis) -> Files:
    """Return how a store's files are.

    Raises:
        StoreUnavailable: when it does not answer.
    """
    said = _said(client, "persistence")
    status = {
        **{APPEND_ONLY: "aof_last_write_status", REWRITE: "aof_last_bgrewrite_status"},
        **{DUMP: "rdb_last_bgsave_status"},
    }
    appends = bool(said.get("aof_enabled"))
    told = {file: said.get(name) if appends or file == DUMP else None for file, name in status.items()}
    if told[DUMP] == "err" and not _dumps(client):
        told[DUMP] = None
    written = {file: math.nan if text is None else float(text == "ok") for file, text in told.items()}
    return Files(written, float(said.get("aof_current_size", math.nan)), _free_bytes(_said(client, "server")))


def _free_bytes(said: Mapping[str, Any]) -> float:
    """Return the room where a store's files are: its working directory, if the process that it names is one of ours."""
    process = Path(f"/proc/{said.get('process_id')}")
    try:
        if (process / "exe").readlink() == Path(str(said.get("executable"))).resolve():
            return float(shutil.disk_usage((process / "cwd").readlink()).free)
    except OSError:
        # On another machine, in another container, or of a user whose processes are not ours to look at.
        pass
    return math.nan


def _said(client: redis.Redis, section: str) -> Mapping[str, Any]:
    """Return one section of what a store says of itself; nothing where whoever keeps it keeps that to themselves."""
    with store_errors():
        try:
            said: dict[str, Any] = client.info(section)
        except redis.exceptions.NoPermissionError:
            return {}
    return said


def _ask_time(client: redis.Redis) -> tuple[float, float]:
    """Return how long an answer took, and how far the store's clock is ahead of ours."""
    asked, started = time.time(), time.monotonic()
    seconds, microseconds = client.time()
    took = time.monotonic() - started
    return took, seconds + microseconds / 1e6 - (asked + took / 2)


def _dumps(client: redis.Redis) -> bool:
    """Return whether a store dumps all it holds of its own accord, and so takes no writes while it cannot.

    So it is taken to be where it lets nobody know.
    """
    return _configured(client, "save", unknown="?") != ""


def _configured(client: redis.Redis, name: str, unknown: str = "") -> str:
    """Read a directive; `unknown` where the store lets nobody read it."""
    try:
        with store_errors():
            found: Any = client.config_get(name)
    except redis.exceptions.ResponseError:
        return unknown
    return str(found.get(name, unknown))
