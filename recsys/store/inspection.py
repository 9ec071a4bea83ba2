"""Inspection: what a store says of itself: version, memory, persistence and clock, as far as it tells."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import redis

from recsys.store.connection import store_errors

TIMES_ASKED = 5


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


def inspect(client: redis.Redis) -> Inspection:
    """Ask a store for what it says of itself, and for the time more than once: the quickest answer tells most.

    Raises:
        StoreUnavailable: when it does not answer.
    """
    with store_errors():
        took, ahead = min(_ask_time(client) for _ in range(TIMES_ASKED))
        said: dict[str, Any] = client.info()
    flushed = _configured(client, "appendfsync")
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
        last_write_failed="err" in (said.get("aof_last_write_status"), said.get("rdb_last_bgsave_status")),
        replicas=int(said.get("connected_slaves", 0)),
        clock_ahead=ahead,
        answer_seconds=took,
    )


def memory(client: redis.Redis) -> tuple[float, float]:
    """Return how much memory a store uses, and its bound (0: none), in bytes; NaN where it does not say.

    Raises:
        StoreUnavailable: when it does not answer.
    """
    with store_errors():
        try:
            said: dict[str, Any] = client.info("memory")
        except redis.exceptions.NoPermissionError:
            # Nothing that learning needs; whoever keeps the store may keep this to themselves.
            said = {}
    return float(said.get("used_memory", math.nan)), float(said.get("maxmemory", math.nan))


def _ask_time(client: redis.Redis) -> tuple[float, float]:
    """Return how long an answer took, and how far the store's clock is ahead of ours."""
    asked, started = time.time(), time.monotonic()
    seconds, microseconds = client.time()
    took = time.monotonic() - started
    return took, seconds + microseconds / 1e6 - (asked + took / 2)


def _configured(client: redis.Redis, name: str) -> str:
    """Read a directive; "" where the store lets nobody read it."""
    try:
        with store_errors():
            found: Any = client.config_get(name)
    except redis.exceptions.ResponseError:
        return ""
    return str(found.get(name, ""))
