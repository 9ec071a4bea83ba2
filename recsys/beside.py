"""Beside: a thread that lets all others go first."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")

# How much nicer the thread is than the rest: beside answers it gets a tenth of a core that it shares with them, and all
# that they leave.
NICER = 10
# How long it goes on when another wants the core, where the system lets one choose: some milliseconds otherwise, in
# which no answer is made.
SLICE_NANOSECONDS = 100_000
# The number of the system call sched_setattr(2), which the standard library does not have.
_SET_ATTRIBUTES = {"x86_64": 314, "aarch64": 274}
# struct sched_attr: size, policy (the usual one), flags, nice, priority, slice, and two that are of no use here.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")


class Beside:
    """Work on one thing at a time in a thread that gives way to those that answer."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name, _give_way)

    def __call__(self, function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """Return what `function` returns there, or raise what it raises."""
        return self.begin(function, *arguments, **named).result()

    def begin(self, function: Callable[..., Result], *arguments: Any, **named: Any) -> Future[Result]:
        """Return what will have what `function` returns or raises, once what was begun before is done."""
        return self._pool.submit(function, *arguments, **named)


def _give_way() -> None:
    """Let other threads go before this one; on Linux alone a thread has a priority of its own."""
    if sys.platform != "linux":
        return
    nice = min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICER)
    # Some sandboxes do not allow it.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    # Linux before 6.12 chooses the slice itself, whatever is asked for.
    if (number := _SET_ATTRIBUTES.get(platform.machine())) is not None:
        attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, SLICE_NANOSECONDS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, attributes, 0)
