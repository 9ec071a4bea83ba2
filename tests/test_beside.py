"""Beside: what is done there comes back, and gives way to whoever answers."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading

import pytest

from recsys.beside import NICER, SLICE_NANOSECONDS, Beside

# sched_getattr(2).
GET_ATTRIBUTES = {"x86_64": 315, "aarch64": 275}


def test_what_is_done_beside_returns_and_raises_as_it_does_here() -> None:
    beside = Beside("beside")
    assert beside(divmod, 7, 2) == (3, 1)
    assert beside(sorted, [1, 2], reverse=True) == [2, 1]
    with pytest.raises(ZeroDivisionError):
        beside(divmod, 1, 0)
    assert beside(threading.get_ident) == beside(threading.get_ident) != threading.get_ident()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_it_gives_way() -> None:
    here = os.getpriority(os.PRIO_PROCESS, 0)
    assert Beside("beside")(os.getpriority, os.PRIO_PROCESS, 0) == min(19, here + NICER)
    assert os.getpriority(os.PRIO_PROCESS, 0) == here


def _slice() -> int:
    """Return for how many nanoseconds this thread goes on when another wants the core."""
    attributes = (ctypes.c_uint64 * 6)()
    number = GET_ATTRIBUTES[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, attributes, ctypes.sizeof(attributes), 0) == 0
    return int(attributes[3])


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in GET_ATTRIBUTES, reason="another system")
def test_its_turns_are_short() -> None:
    if not (usual := _slice()):
        pytest.skip("this kernel (before 6.12) chooses the slice itself")
    assert Beside("beside")(_slice) == SLICE_NANOSECONDS < usual
    assert _slice() == usual
