"""Shared weights: one copy for several processes, whole in every answer, wherever the one that moves it is killed."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.errors import CorruptWeights
from recsys.settings import Settings, load
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights import WeightPayload, encode
from recsys.weights import shared as shared_module
from recsys.weights.replica import CLOCK, Replica
from recsys.weights.shared import SharedWeights, create

CPU = torch.device("cpu")
# Processes killed, versions that they may put in place in all, and how long after its first one a process lives.
KILLS, VERSIONS, LONGEST_MS = 30, 150, 4
# How long a change is waited for at most, where a process is to be killed in one.
MIDDLE_SECONDS = 1.0
SMALL = {"dimension": 8, "history_length": 4, "successors": 3, "context_buckets": 16}


@pytest.fixture
def small() -> Settings:
    return load(SMALL, environment={})


@pytest.fixture
def memory() -> Iterator[tuple[int, ...]]:
    descriptors = create()
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def filled(replica: Replica, value: int) -> Replica:
    """Set every number of a replica."""
    table = replica.table
    for column in table.columns.values():
        column[: table.rows] = value
    for tensor in replica.network.state_dict().values():
        tensor.fill_(value)
    table.clock = value
    return replica


def rows_of(version: int) -> int:
    """Tell how many rows a version has: they grow, in steps that memory has to follow, and are cut off again."""
    return 2 + version % 7 * 300


def item_of(version: int, row: int) -> str:
    """Tell which item has a row: most keep it for a while, some pass it on with every version, some leave it free."""
    if row % 11 == version % 11:
        return ""
    return f"item-{version // 7}-{row}" if row % 5 else f"item-{version}-{row}"


def whole(settings: Settings, version: int) -> WeightPayload:
    replica = Replica(settings, CPU)
    replica.table.extend([item_of(version, row) for row in range(1, rows_of(version))])
    return filled(replica, version).write_all()


def change(settings: Settings, version: int) -> WeightPayload:
    """Make what leads from the version before to this one: every number is another."""
    made = whole(settings, version)
    if version % 7 == 0:
        return replace(made, whole=False, kept_rows=1)
    before = [item_of(version - 1, row) for row in range(1, rows_of(version - 1))]
    after = [(item_id, row) for item_id, row in made.new_items if before[row - 1 : row] != [item_id]]
    return replace(made, whole=False, new_items=after)


def check(shared: SharedWeights, settings: Settings) -> int:
    """Assert that what is read is all of one version; return which."""
    with shared.reading() as number:
        if not number:
            return 0
        assert shared.replica is not None
        version = shared.record.version
        expected = whole(settings, version)
        assert encode(shared.replica.write_all()) == encode(expected)
        assert all(shared.replica.table.row(item_id) == row for item_id, row in expected.new_items if item_id)
        return version


def record(version: int) -> VersionRecord:
    return VersionRecord(version=version, chain=bytes(version % 100))


def begun(settings: Settings, memory: tuple[int, ...]) -> tuple[SharedWeights, SharedWeights]:
    """Return what two processes hold of a first version, which the first has put in place."""
    first, second = SharedWeights(settings, memory), SharedWeights(settings, memory)
    spare = first.spare()
    spare.apply(whole(settings, 1))
    first.take(record(1), spare)
    assert check(second, settings) == 1
    return first, second


@pytest.mark.parametrize("least_given", [0, shared_module.LEAST_GIVEN])
def test_one_process_moves_and_all_see_it(
    small: Settings, memory: tuple[int, ...], least_given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_module, "LEAST_GIVEN", least_given)
    first, second = SharedWeights(small, memory), SharedWeights(small, memory)
    start_ms = time.time_ns() // 1_000_000
    assert (check(first, small), check(second, small)) == (0, 0)
    assert (first.leads(), second.leads(), first.leads()) == (True, False, True)
    spare = first.spare()
    spare.apply(whole(small, 1))
    assert check(second, small) == 0
    first.take(record(1), spare)
    assert check(second, small) == check(first, small) == 1
    for version in range(2, 30):
        first.apply(record(version), change(small, version))
        # The second does not look at every version.
        if version % 3 == 0:
            assert check(second, small) == version
            assert second.record == record(version)
            assert start_ms <= second.applied_ms == first.applied_ms <= time.time_ns() // 1_000_000
        assert check(first, small) == version
    late = SharedWeights(small, memory)
    assert check(late, small) == 29
    first.close()
    assert second.leads(), "the lock went with the process that held it"
    second.apply(record(30), whole(small, 30))
    second.apply(record(31), change(small, 31))
    assert check(late, small) == check(second, small) == 31
    for each in (second, late):
        each.close()


def test_a_change_is_told_before_it_is_made(
    small: Settings, memory: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = begun(small, memory)
    for each in (first, second):
        assert not each.calls()
        each.listen()
        assert each.foretold() is None
    told: list[int] = []

    def prepare() -> None:
        for each in (first, second):
            assert each.calls()
            foretold = each.foretold()
            assert foretold is not None
            with each.reading() as number:
                assert (foretold.before, each.record.version) == (number, version - 1)
            assert encode(foretold.payload()) == encode(made)
            told.append(foretold.number)
            each.heard(foretold.number)
            assert each.foretold() is None

    for version in range(2, 16):
        made = change(small, version)
        first.apply(record(version), made, prepare)
        assert check(second, small) == version
        with second.reading():
            assert second.point().foretold == told[-1] == told[-2] == version - 1
    # No row need change.
    made = replace(Replica(small, CPU).write(torch.empty(0, dtype=torch.int64), []), whole=False)
    version = 16
    first.apply(record(version), made, prepare)
    with second.reading() as number:
        assert second.changes(second.point()._replace(number=number - 1)) is not None
    # A whole version is told to nobody.
    first.apply(record(16), whole(small, 16), prepare)
    assert check(second, small) == 16
    with second.reading():
        assert second.point().foretold == 0
    assert len(told) == 2 * 15
    for each in (first, second):
        each.close()


def test_who_stands_still_is_waited_for_once(
    small: Settings, memory: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = begun(small, memory)
    second.listen()
    for version, patience in ((2, 0.3), (3, 60.0), (4, 60.0)):
        monkeypatch.setattr(shared_module, "READY_SECONDS", patience)
        start = time.monotonic()
        first.apply(record(version), change(small, version))
        assert (time.monotonic() - start >= patience) == (version == 2)
    # It hears too late: what was foretold is in force.
    assert second.calls()
    assert second.foretold() is None
    assert not second.calls()
    assert check(second, small) == 4

    def hear() -> None:
        foretold = second.foretold()
        assert foretold is not None
        second.heard(foretold.number)

    # Once it has been in time it is waited for again.
    for version in (5, 6):
        first.apply(record(version), change(small, version), hear)
    first.apply(record(7), change(small, 7), threading.Timer(0.1, hear).start)
    assert not second.calls()
    assert check(second, small) == 7
    for each in (first, second):
        each.close()


def test_what_is_being_written_is_not_heard(small: Settings, memory: tuple[int, ...]) -> None:
    """Whoever leads may die while it writes what is to come, or go on without a process that reads it."""
    first, second = begun(small, memory)
    first.apply(record(2), change(small, 2))
    second.listen()
    first._foretell(record(3), change(small, 3))
    assert second.calls()
    # The next one is begun.
    first._numbers[shared_module._FORETELLING] += 1
    assert second.foretold() is None
    assert not second.calls()
    first.apply(record(3), change(small, 3))
    assert check(second, small) == 3
    assert second.foretold() is None
    for each in (first, second):
        each.close()


def test_what_does_not_fit_changes_nothing(small: Settings, memory: tuple[int, ...]) -> None:
    shared = SharedWeights(small, memory)
    spare = shared.spare()
    spare.apply(whole(small, 1))
    shared.take(record(1), spare)
    good = change(small, 2)
    bad = replace(good, dense={**good.dense, CLOCK: np.zeros(2, np.int64)})
    with pytest.raises(CorruptWeights):
        shared.apply(record(2), bad)
    assert check(shared, small) == 1
    shared.apply(record(2), good)
    assert check(shared, small) == 2
    shared.close()


def test_memory_is_given_back(small: Settings, memory: tuple[int, ...]) -> None:
    """A reload takes the place of what was held, and its memory; what nobody wrote to takes none."""
    shared = SharedWeights(small, memory)
    taken = []
    for version in (6, 13, 20, 27):
        spare = shared.spare()
        spare.apply(whole(small, version))
        shared.take(record(version), spare)
        taken.append(os.fstat(memory[0]).st_blocks * 512)
    assert taken[0] < 2_000_000
    assert max(taken) - min(taken) <= 4096
    shared.close()


def test_a_killed_process_leaves_a_whole_version_and_nothing_locked() -> None:
    found = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["kills"] == KILLS
    assert told["versions"] > KILLS
    assert told["finished_for_the_dead"] > 0, "no kill came in the middle of a change"
    assert told["never_backwards"]


def _move(shared: SharedWeights, changes: list[WeightPayload], told: int) -> None:
    """Move the weights on until killed, as the process that leads does."""
    assert shared.leads()
    with shared.reading():
        version = shared.record.version
    os.write(told, b"!")
    for each in range(version + 1, VERSIONS):
        shared.apply(record(each), changes[each])
    signal.pause()


def _kill_again_and_again() -> None:
    """Kill processes while they move the weights, and look at them after each; in a process that may fork."""
    torch.set_num_threads(1)
    settings = load(SMALL, environment={})
    descriptors = create()
    shared = SharedWeights(settings, descriptors)
    spare = shared.spare()
    spare.apply(whole(settings, 1))
    shared.take(record(1), spare)
    changes = [whole(settings, each) if each % 10 == 9 else change(settings, each) for each in range(VERSIONS)]
    draw, last, finished, forwards = random.Random(1), 1, 0, True
    for kill in range(KILLS):
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            try:
                _move(SharedWeights(settings, descriptors), changes, writes)
            finally:
                os._exit(1)
        assert select.select([reads], [], [], 30)[0]
        os.read(reads, 1)
        os.close(reads)
        os.close(writes)
        before, deadline = shared.number(), time.monotonic() + 30
        while shared.number() == before and time.monotonic() < deadline:
            pass
        until = time.monotonic() + draw.uniform(0, LONGEST_MS) / 1000
        # Every other one is killed as soon as a change is seen: few of these end before the signal is there.
        middle, deadline = kill % 2 == 0, time.monotonic() + MIDDLE_SECONDS
        while time.monotonic() < (deadline if middle else until) and not (middle and shared.changing()):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = shared.number()
        version = check(shared, settings)
        # Reading finished what the dead had begun.
        finished += shared.number() > before
        forwards, last = forwards and version >= last, version
    told = {"kills": KILLS, "versions": last, "finished_for_the_dead": finished, "never_backwards": forwards}
    print(json.dumps(told))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    _kill_again_and_again()
