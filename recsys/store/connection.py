"""The connection to Redis or Valkey: no silent repeats, bounded waits, no secret in any text, and our own errors."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.credentials import CredentialProvider
from redis.retry import Retry

from recsys.errors import SettingsError, StoreFull, StoreReadOnly, StoreUnavailable
from recsys.settings import Settings, masked
from recsys.tls import Named, read_pem


def connect(settings: Settings) -> redis.Redis:
    """Make a client for `settings.redis_url`; nothing is sent yet.

    Bytes in, bytes out. A failed command is never sent again by the library: an append whose answer was lost would
    be applied twice. Every wait is bounded by `store_timeout_seconds`; a blocking read adds its own wait to it by
    passing less than that to BLOCK.

    Raises:
        SettingsError: when the URL is malformed, or a password or TLS file cannot be used.
    """
    try:
        options = parse_url(settings.redis_url)
    except ValueError:
        # The library's text may quote a part of the password.
        raise SettingsError(
            f"redis_url: {masked(settings.redis_url)} is no URL of a store; write redis://[user:password@]host:port/0, "
            "rediss:// for TLS, or unix://path, with special characters of the password percent-encoded"
        ) from None
    pool = redis.ConnectionPool(
        **{
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": settings.store_timeout_seconds,
            "socket_connect_timeout": settings.store_timeout_seconds,
            "health_check_interval": 0,
            **_tls(settings),
            **options,
            **_password(settings, options),
        }
    )
    return redis.Redis.from_pool(pool)


class ReadingScript:
    """Run a script that only reads over a connection of its own; for any threads, one at a time.

    To take a connection from the library's pool and to give it back costs more than a short script does. A connection
    that the store closed while nobody used it is replaced, and the script sent again: reading twice does no harm.
    """

    def __init__(self, client: redis.Redis, script: str) -> None:
        self._pool: Any = client.connection_pool
        self._script = script.encode()
        self._name = hashlib.sha1(self._script, usedforsecurity=False).hexdigest()
        self._lock = threading.Lock()
        self._connection: Any = None

    def __call__(self, keys: Sequence[str]) -> Any:
        """Return what the script does.

        Raises:
            redis.RedisError: as commands of the library do.
        """
        with self._lock:
            kept = self._connection is not None
            try:
                return self._run(keys)
            except redis.exceptions.ConnectionError:
                if not kept:
                    raise
                return self._run(keys)

    def _run(self, keys: Sequence[str]) -> Any:
        connection = self._connection = self._connection or self._pool.get_connection()
        try:
            try:
                connection.send_command("EVALSHA", self._name, len(keys), *keys)
                return connection.read_response()
            except redis.exceptions.NoScriptError:
                connection.send_command("EVAL", self._script, len(keys), *keys)
                return connection.read_response()
        except redis.exceptions.ResponseError:
            raise
        except BaseException:
            # What of it was answered is not known.
            self._connection = None
            connection.disconnect()
            self._pool.release(connection)
            raise


class PasswordFile(CredentialProvider):
    """Give the library what stands in a file at the moment it connects, so that a password can be replaced."""

    def __init__(self, path: Path, username: str | None) -> None:
        self._path = path
        self._username = username

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Return the password, behind the user's name if there is one."""
        try:
            password = self._path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise redis.exceptions.AuthenticationError(
                f"redis_password_file: cannot read {self._path}: {getattr(error, 'strerror', 'it is not UTF-8')}"
            ) from None
        if not password:
            raise redis.exceptions.AuthenticationError(f"redis_password_file: {self._path} is empty")
        return (self._username, password) if self._username else (password,)


def _password(settings: Settings, options: dict[str, Any]) -> dict[str, Any]:
    if not settings.redis_password_file:
        return {}
    if options.get("password"):
        raise SettingsError("redis_url, redis_password_file: the password stands in both; leave it out of the URL")
    provider = PasswordFile(Path(settings.redis_password_file), options.get("username"))
    try:
        provider.get_credentials()
    except redis.exceptions.AuthenticationError as error:
        raise SettingsError(str(error)) from None
    return {"credential_provider": provider, "username": None}


def _tls(settings: Settings) -> dict[str, Any]:
    given = {
        "ssl_ca_certs": Named("redis_tls_ca", settings.redis_tls_ca),
        "ssl_certfile": Named("redis_tls_certificate", settings.redis_tls_certificate),
        "ssl_keyfile": Named("redis_tls_key", settings.redis_tls_key),
    }
    read_pem(*given.values())
    return {option: file.path for option, file in given.items() if file.path}


# What a store answers while it starts, fails over, or keeps this client out. The library turns some of these replies
# into classes of their own, without the word that they began with, and leaves others as they are.
NOT_READY = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    redis.exceptions.NoPermissionError,
)
NOT_READY_TEXTS = ("NOREPLICAS", "BUSY")


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn the library's errors into StoreUnavailable, kinds of it, and StoreFull; no text holds the URL's password."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError as error:
        raise StoreFull(f"the store is out of memory: {error}") from error
    except NOT_READY as error:
        raise StoreUnavailable(f"the store is not ready: {type(error).__name__}: {error}") from error
    except redis.exceptions.ResponseError as error:
        text = str(error)
        if "OOM command" in text:
            raise StoreFull(f"the store refuses writes: {text}") from error
        if "MISCONF" in text:
            raise StoreReadOnly(f"the store refuses writes: {text}") from error
        if text.startswith(NOT_READY_TEXTS):
            raise StoreUnavailable(f"the store is not ready: {text}") from error
        raise
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
        raise StoreUnavailable(f"the store cannot be reached: {error}") from error
