"""Rendezvous: who waits waits for those who attend, and for no dead or late one."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys.weights.rendezvous import Rendezvous

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes share memory on Linux only")
# Waited for at most where all will be ready, and where somebody will not.
LONG, SHORT = 60.0, 0.02


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, str]:
    for name in ("even", "odd"):
        (tmp_path / name).touch()
    return str(tmp_path / "even"), str(tmp_path / "odd")


@pytest.fixture
def three(paths: tuple[str, str]) -> Iterator[list[Rendezvous]]:
    found = [Rendezvous(*paths) for _ in range(3)]
    yield found
    for each in found:
        each.close()


def test_all_who_attend_are_waited_for(three: list[Rendezvous]) -> None:
    leader, first, second = three
    assert leader.wait(1, SHORT), "nobody attends"
    for number in range(1, 6):
        first.attend(number)
        second.attend(number)
        assert not leader.wait(number, SHORT)
        first.attend(number + 1)
        assert not leader.wait(number, SHORT)
        # Who is ready attends at the next already, which is another's business.
        threading.Timer(SHORT, second.attend, [number + 1]).start()
        assert leader.wait(number, LONG)
        assert not leader.wait(number + 1, SHORT)


def test_who_leaves_or_is_late_is_not_waited_for(three: list[Rendezvous]) -> None:
    leader, first, second = three
    first.attend(1)
    second.attend(1)
    first.leave()
    assert not leader.wait(1, SHORT)
    # The second still works on what came first: it is not waited for at what comes next.
    assert leader.wait(2, SHORT)
    second.attend(3)
    assert leader.wait(2, SHORT)
    assert not leader.wait(3, SHORT)
    # Who leads attends as well, and waits for itself no more than for others.
    leader.attend(4)
    second.attend(4)
    assert leader.wait(3, SHORT)


def test_the_dead_are_not_waited_for(paths: tuple[str, str], three: list[Rendezvous]) -> None:
    code = "import sys, time; from recsys.weights.rendezvous import Rendezvous\n"
    code += "met = Rendezvous(*sys.argv[1:]); met.attend(7); print('there', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, *paths], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], LONG)[0]
        assert process.stdout.readline() == b"there\n"
        assert not three[0].wait(7, SHORT)
        os.kill(process.pid, signal.SIGKILL)
        begun = time.monotonic()
        assert three[0].wait(7, LONG)
        assert time.monotonic() - begun < LONG
