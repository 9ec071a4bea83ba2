"""The connection to Redis or Valkey: no silent repeats, bounded waits, and our own errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from recsys.errors import SettingsError, StoreFull, StoreUnavailable
from recsys.settings import Settings


def connect(settings: Settings) -> redis.Redis:
    """Make a client for `settings.redis_url`; nothing is sent yet.

    Bytes in, bytes out. A failed command is never sent again by the library: an append whose answer was lost would
    be applied twice. Every wait is bounded by `store_timeout_seconds`; a blocking read adds its own wait to it by
    passing less than that to BLOCK.

    Raises:
        SettingsError: when the URL is malformed.
    """
    try:
        return redis.Redis.from_url(
            settings.redis_url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=settings.store_timeout_seconds,
            socket_connect_timeout=settings.store_timeout_seconds,
            health_check_interval=0,
        )
    except ValueError as error:
        raise SettingsError(f"redis_url: {error}") from None


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn the library's errors into StoreUnavailable and StoreFull; the text never holds the URL's password."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise StoreFull(f"the store is out of memory: {error}") from error
    except redis.exceptions.ResponseError as error:
        text = str(error)
        if text.startswith(("OOM", "MISCONF")) or "OOM command" in text:
            raise StoreFull(f"the store refuses writes: {text}") from error
        if text.startswith(("LOADING", "READONLY", "MASTERDOWN", "BUSY", "CLUSTERDOWN", "TRYAGAIN")):
            raise StoreUnavailable(f"the store is not ready: {text}") from error
        raise
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        raise StoreUnavailable(f"the store cannot be reached: {error}") from error
