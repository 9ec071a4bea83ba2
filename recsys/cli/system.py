"""System: store, trainer and server as processes of this one, started together and stopped in order.

Nothing accepted is lost when it stops: the server goes first and finishes its calls, the trainer commits what it has
learned, the store has written everything before it goes.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO, Any

from recsys.cli.settings_flags import SECURED
from recsys.errors import RecsysError
from recsys.settings import ENVIRONMENT_PREFIX, Settings

# Keep freed pages instead of giving them back to the kernel: a third of a learning step went into page faults on fresh
# ones (61 ms a step without, 41 ms with, before the step itself became leaner; see benchmarks/RESULTS.md).
KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}
# Beyond drain_seconds: a stopping part may have a version to commit, or an append-only file to write.
STOP_SECONDS = 60.0
PR_SET_PDEATHSIG = 1
# What the settings say of how to reach another store does not hold for the embedded one, on loopback.
PLAIN_STORE = dict.fromkeys(SECURED, "")


class PartStopped(RecsysError):
    """Tell that a part stopped by itself; what it said on stderr is the reason."""

    reason = "PART_STOPPED"


class Part:
    """Run one of this program's commands as a process.

    It is in a session of its own, so that Ctrl-C reaches this process alone and the order of stopping is ours. Should
    this process be killed, the kernel sends the part SIGTERM (Linux), and it stops as if it had been told to.
    """

    def __init__(self, name: str, command: str, settings: Settings, descriptors: Sequence[int] = ()) -> None:
        """Start the command, which inherits `descriptors` and has their numbers as its arguments."""
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "recsys", command, *map(str, descriptors)],
            pass_fds=descriptors,
            env=environment_of(settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
        )
        assert self._process.stdout is not None
        self._stdout: IO[str] = self._process.stdout

    @property
    def pid(self) -> int:
        """Return the process's id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.poll() is None

    def ready(self, line: str) -> tuple[str, ...]:
        """Wait for the line that says that the part is ready, and return the groups of the pattern `line`.

        Raises:
            PartStopped: when it ends before that.
        """
        for text in self._stdout:
            if found := re.fullmatch(line, text.strip()):
                return found.groups()
            print(text, end="", file=sys.stderr)
        self._process.wait()
        raise self._stopped()

    def pass_on(self) -> None:
        """Print on stderr what the part prints from here on, in a thread: a full pipe would hold it up."""

        def copy() -> None:
            for text in self._stdout:
                print(text, end="", file=sys.stderr)

        threading.Thread(target=copy, name=self.name).start()

    def check(self) -> None:
        """Raise PartStopped when the part does not run any more."""
        if not self.running:
            raise self._stopped()

    def stop(self, seconds: float | None) -> None:
        """Stop in good order; kill what has not stopped after `seconds` (None: wait), or at a second Ctrl-C."""
        self._process.terminate()
        while True:
            try:
                self._process.wait(seconds)
                return
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                if seconds is not None:
                    print(f"the {self.name} did not stop in time and is killed", file=sys.stderr)
                    self._process.kill()

    def _stopped(self) -> PartStopped:
        code = self._process.returncode
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return PartStopped(f"the {self.name} stopped by itself ({how})")


class System:
    """Run everything over the embedded store in `settings.data_dir`; use as a context manager, from the main thread.

    Start it before any gRPC or thread of this process, because processes are forked.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._parts: list[Part] = []
        self.addresses: dict[str, str] = {}

    def __enter__(self) -> System:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def pids(self) -> dict[str, int]:
        """Return each part's process id by its name."""
        return {part.name: part.pid for part in self._parts}

    def check(self) -> None:
        """Raise PartStopped when a part does not run any more."""
        for part in self._parts:
            part.check()

    def wait(self) -> None:
        """Wait until a part stops by itself, and raise PartStopped."""
        while True:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            self.check()

    def _start(self) -> None:
        store = self._run("store", self._settings)
        (url,) = store.ready(r"storing in .* at (\S+)")
        settings = self._settings.model_copy(update={"redis_url": url, **PLAIN_STORE})
        trainer, server = self._run("trainer", settings, "train"), self._run("server", settings, "serve")
        (trainer_metrics,) = trainer.ready(r"learning on .*metrics on (\S+)")
        grpc, metrics = server.ready(r"serving on (\S+), metrics on (\S+)")
        for part in self._parts:
            part.pass_on()
        self.addresses = {
            "grpc": grpc,
            "metrics": f"http://{metrics}",
            "trainer_metrics": f"http://{trainer_metrics}",
            "store": url,
            "data_dir": str(self._settings.data_dir),
        }

    def _run(self, name: str, settings: Settings, command: str | None = None) -> Part:
        part = Part(name, command or name, settings)
        self._parts.append(part)
        return part

    def _stop(self) -> None:
        while self._parts:
            part = self._parts.pop()
            # The store is never killed: its server would live on without it, over an unlocked directory.
            part.stop(None if part.name == "store" else self._settings.drain_seconds + STOP_SECONDS)


def environment_of(settings: Settings) -> dict[str, str]:
    """Make a part's environment: ours, and the settings that were given, so that no part sees others than we do.

    Defaults stay unsaid: a limit that is said is asked for, of callers on this machine too.
    """
    values: dict[str, Any] = settings.model_dump(mode="json", exclude_unset=True)
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)},
        **KEEP_PAGES,
        "OMP_NUM_THREADS": str(settings.torch_threads),
        **{ENVIRONMENT_PREFIX + name.upper(): text for name, text in texts.items()},
    }


def _die_with(parent: int) -> Callable[[], None] | None:
    """Make what a new process does before it becomes a part, so that it does not outlive `parent`."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def before_exec() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        # The parent may have gone before that.
        if os.getppid() != parent:
            os._exit(1)

    return before_exec
