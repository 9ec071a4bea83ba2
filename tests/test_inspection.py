"""inspection: what a real store says of its memory, and one that keeps it to itself."""

from __future__ import annotations

import math

import redis

from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.inspection import inspect, memory


def test_memory_and_its_bound_are_what_the_store_says(store: redis.Redis) -> None:
    store.config_set("maxmemory", 1 << 30)
    try:
        used, bound = memory(store)
        assert bound == 1 << 30
        assert 0 < used < bound
        store.set("a", bytes(4 << 20))
        assert memory(store)[0] > used + (4 << 20)
    finally:
        store.config_set("maxmemory", 0)
    assert memory(store)[1] == inspect(store).max_memory == 0


def test_a_store_that_lets_nobody_ask_stops_nothing(settings: Settings, store: redis.Redis) -> None:
    store.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "-info")
    try:
        url = settings.redis_url.replace("redis://", "redis://app:secret@")
        with connect(settings.model_copy(update={"redis_url": url})) as client:
            assert all(map(math.isnan, memory(client)))
    finally:
        store.execute_command("ACL", "DELUSER", "app")
