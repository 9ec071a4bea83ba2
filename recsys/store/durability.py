"""Durability: how far a write has come when it counts as done: the store's memory, its disk, or its replicas."""

from __future__ import annotations

import logging
from typing import Any

import redis
from redis.commands.core import Script

from recsys.errors import NotDurable, SettingsError, StoreUnavailable
from recsys.settings import Settings
from recsys.store.connection import store_errors

# Of the longest wait for an answer: a store ends a wait late, and its answer must not be taken for silence.
WAIT_SHARE = 0.75

_log = logging.getLogger(__name__)


class Durability:
    """Run writing scripts and wait until what they wrote is as durable as `settings.durability` says.

    memory: the store has it. A store that is killed may lose its last second, and two when its disk is so busy that it
    puts off writing its append-only file. disk: flushed to the disk (WAITAOF). replica: in the memory of
    `durable_replicas` replicas too (WAIT). One wait per script, in the same round trip.
    """

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._client = client
        self._degree, self._replicas = settings.durability, settings.durable_replicas
        self._seconds = settings.store_timeout_seconds * WAIT_SHARE
        milliseconds = max(1, int(self._seconds * 1000))
        self._wait: tuple[str | int, ...] | None = {
            "memory": None,
            "disk": ("WAITAOF", 1, 0, milliseconds),
            "replica": ("WAIT", self._replicas, milliseconds),
        }[self._degree]
        # A store may be away when its client is made.
        self._checked = self._wait is None

    def check(self) -> None:
        """Find out whether the store can do what is asked; replicas may still come, so their lack is only logged.

        Raises:
            SettingsError: when it cannot, saying what to change.
            StoreUnavailable: when it cannot be asked.
        """
        if self._checked:
            return
        if self._degree == "disk":
            self._check_disk()
        else:
            with store_errors():
                connected = int(self._client.info("replication").get("connected_slaves", 0))
            if connected < self._replicas:
                _log.warning(
                    "durability: %d replicas are asked for and %d connected: feedback is refused until there are more",
                    *(self._replicas, connected),
                )
        self._checked = True

    def _check_disk(self) -> None:
        assert self._wait is not None
        try:
            with store_errors():
                self._client.execute_command(*self._wait)
        except redis.exceptions.ResponseError as error:
            if "unknown command" not in str(error):
                raise SettingsError(f"durability: the store cannot tell what is on its disk: {error}") from error
            with store_errors():
                found: Any = self._client.config_get("append*")
            if (found.get("appendonly"), found.get("appendfsync")) != ("yes", "always"):
                raise SettingsError(
                    "durability: disk needs Valkey, Redis 7.2 or newer (WAITAOF), or a store with appendonly yes and "
                    f"appendfsync always; this one has appendonly {found.get('appendonly')} and appendfsync "
                    f"{found.get('appendfsync')}"
                ) from error
            # Such a store flushes before it answers.
            self._wait = None

    def run(self, script: Script, keys: list[str | bytes], arguments: list[Any]) -> Any:
        """Run a script that writes, wait, and return its answer.

        The wait is for all that the store wrote before the script too: a duplicate is as durable as new feedback.

        Raises:
            NotDurable: the store has it in memory, but not more than that in time.
            SettingsError: the store cannot do what is asked at all.
        """
        self.check()
        if self._wait is None:
            with store_errors():
                return script(keys, arguments)
        with store_errors():
            reply, reached = self._confirmed(script, keys, arguments)
            if isinstance(reply, redis.exceptions.NoScriptError):
                self._client.script_load(script.script)
                reply, reached = self._confirmed(script, keys, arguments)
            if isinstance(reply, Exception):
                raise reply
        self._check_reached(reached)
        return reply

    def _confirmed(self, script: Script, keys: list[str | bytes], arguments: list[Any]) -> list[Any]:
        """Send script and wait together: a connection waits for what it wrote itself."""
        assert self._wait is not None
        pipeline = self._client.pipeline(transaction=False)
        pipeline.evalsha(script.sha, len(keys), *keys, *arguments)
        pipeline.execute_command(*self._wait)
        return pipeline.execute(raise_on_error=False)

    def _check_reached(self, reached: Any) -> None:
        if isinstance(reached, redis.exceptions.ResponseError):
            # Its settings have changed, or it became a replica.
            raise NotDurable(f"the store cannot tell how durable its writes are any more: {reached}") from reached
        if isinstance(reached, Exception):
            with store_errors():
                raise reached
        if self._degree == "disk" and not reached[0]:
            raise NotDurable(f"the store has it in memory, but not on its disk within {self._seconds:g} s")
        if self._degree == "replica" and reached < self._replicas:
            raise NotDurable(
                f"the store has it in memory, but only {reached} of {self._replicas} replicas within "
                f"{self._seconds:g} s"
            )


def check_durability(client: redis.Redis, settings: Settings) -> None:
    """Refuse a store that cannot do what `settings.durability` asks; one that is away is left to the first write.

    Raises:
        SettingsError: saying what to change in the store or in the settings.
    """
    try:
        Durability(client, settings).check()
    except StoreUnavailable as error:
        _log.warning("durability: not checked yet: %s", error)
