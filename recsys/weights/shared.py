"""SharedWeights: one copy of the weights for all server processes of a machine, moved by one of them at a time.

The copy lies in memory that has no name: the kernel frees it when the last process has gone, however it went. Answers
are computed under a lock that many may hold; a version is put in place under one that nobody else holds, behind a
journal, so that whoever comes next finishes what a killed process began. The kernel lets go of a dead process's locks.
The journal is written first, and tells the others what comes, so that they can compute what they need of it while they
still answer from the version before.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.errors import SettingsError
from recsys.packed_ids import PackedIds
from recsys.settings import Settings
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights.payload import NewItems, WeightPayload, decode, encode
from recsys.weights.rendezvous import Rendezvous
from recsys.weights.replica import SERVED_COLUMNS, Replica, items_of
from recsys.weights.turnstile import Turnstile

# The file is as large as addresses allow and holes cost nothing: everything has a window of its own that it never
# outgrows, so that growing moves nothing.
WINDOW_BYTES = 1 << 40
_HEADER, _RECORDS, _JOURNAL, _AREAS = 0, 1, 3, 4
# Windows of an area; the columns' follow. A whole version is read into the area that is not in use. Which row got which
# item is a list that grows at its end: each process goes on from where it read last. Of each row stands which state
# changed it last.
_DENSE, _GIVEN_ROWS, _ID_ENDS, _ID_BYTES, _CHANGED_BY, _COLUMNS = 0, 1, 2, 3, 4, 5
_WINDOWS_PER_AREA = _COLUMNS + len(SERVED_COLUMNS)
_WINDOWS = _AREAS + 2 * _WINDOWS_PER_AREA
# In the header: the number of the state in force, that of the one that was begun, those of the journal that is written
# next, or is being written, and of the one that was, and two places for states.
_CURRENT, _BEGUN, _FORETELLING, _FORETOLD, _STATES = 0, 1, 2, 3, 128
_STATE = struct.Struct("<8q")
_JOURNAL_START = struct.Struct("<3q")
# How long a version waits for processes that compute what they need of it. One that was not ready by then is waited for
# the shorter time until it is: it may stand still.
READY_SECONDS = 1.0
LATE_SECONDS = 0.02
# Rows that may have been given before the list of them is written anew, as it is once they are twice those in use.
LEAST_GIVEN = 1 << 16
# How dense tensors are aligned.
_ALIGNMENT = 64
# fallocate(2): give pages back, keep the size.
_PUNCH_HOLE, _KEEP_SIZE = 2, 1
# The memory, the lock of answers against changes, the turnstile in front of it, the lock of who follows the store, and
# those of who waits to be told of even and of odd journals.
_FILES = ("memory", "answers", "turnstile", "follower", "even", "odd")


def create() -> tuple[int, ...]:
    """Make the memory and its locks; return descriptors for the processes that are to share it.

    Raises:
        SettingsError: where the system has no such memory.
    """
    if sys.platform != "linux":
        raise SettingsError("server_processes: more than one needs Linux; start several servers instead")
    found = tuple(os.memfd_create(f"recsys-{name}") for name in _FILES)
    os.truncate(found[0], _WINDOWS * WINDOW_BYTES)
    return found


@dataclass(frozen=True, slots=True)
class _State:
    """Say what is in force.

    An area, how often rows were cut off, its table's rows, those given in all, its clock, the record's size, and the
    journal it came out of, 0 where there was none.
    """

    area: int
    cuts: int
    rows: int
    given: int
    clock: int
    applied_ms: int
    record_bytes: int
    foretold: int


class Point(NamedTuple):
    """Say how far a process has followed: the number of a state, its area and cuts, and what foretold it."""

    number: int
    area: int
    cuts: int
    foretold: int


@dataclass(frozen=True, slots=True)
class Foretold:
    """Tell of a change before it is made: the number of its journal, and of the state that it changes."""

    number: int
    before: int
    packed: bytes

    def payload(self) -> WeightPayload:
        """Return what changes.

        Raises:
            CorruptWeights: when it cannot be read.
        """
        return decode(self.packed)


class SharedWeights:
    """Share weights with the processes that hold the same descriptors; one object a process.

    Any thread may read; one thread of the process that leads takes and applies.
    """

    def __init__(self, settings: Settings, descriptors: Sequence[int]) -> None:
        self._settings = settings
        # One turnstile for answers and one for changes: a lock that the same descriptor takes again turns into the
        # other kind.
        memory, answers, turnstile, follower, even, odd = (f"/proc/self/fd/{number}" for number in descriptors)
        self._memory = os.open(memory, os.O_RDWR | os.O_CLOEXEC)
        self._reading = Turnstile(answers, turnstile)
        self._writing = Turnstile(answers, turnstile)
        self._follower = os.open(follower, os.O_RDWR | os.O_CLOEXEC)
        self._rendezvous = Rendezvous(even, odd)
        # The journal that this process heard of last, None while it does not listen.
        self._heard: int | None = None
        # How many changes are still waited for less long. Who stands still is seen at every other.
        self._late = 0
        self._header = self._map(_HEADER, mmap.PAGESIZE)
        self._numbers = memoryview(self._header).cast("q")
        self._seen = 0
        self.replica: Replica | None = None
        self.record = VersionRecord()
        self.applied_ms = 0
        # The area of `replica`, the cuts and given rows that it has seen, and the journal that it came out of.
        self._area = self._cuts = self._given = self._foretold = 0

    @contextmanager
    def reading(self) -> Iterator[int]:
        """Keep the version in force from changing; yield a number that rises with every change, 0 before the first.

        `replica`, `record` and `applied_ms` are those of that version within.
        """
        with self._reading.shared():
            if not self.changing():
                # Whoever answers may do so in inference mode; what is made here is written to outside of it.
                with torch.inference_mode(mode=False):
                    self._refresh()
                yield self._seen
                return
        self._finish()
        with self.reading() as number:
            yield number

    def number(self) -> int:
        """Return the number of the state in force, without waiting."""
        return self._numbers[_CURRENT]

    def changing(self) -> bool:
        """Tell, without waiting, whether a change was begun that is not in force: it goes on, or who made it died."""
        return self._numbers[_BEGUN] > self._numbers[_CURRENT]

    def point(self) -> Point:
        """Return where the version in force stands; while `reading`."""
        return Point(self._seen, self._area, self._cuts, self._foretold)

    def changes(self, since: Point) -> NDArray[np.int64] | None:
        """Return the rows that changed since an earlier point, ascending, None where all may have; while `reading`."""
        assert self.replica is not None
        if (since.area, since.cuts) != (self._area, self._cuts) or not since.number:
            return None
        return np.flatnonzero(self._changed_by(self._area, self.replica.table.rows) > since.number)

    def foretold(self) -> Foretold | None:
        """Return what is about to change; None where nothing is, or it was heard, or nobody listens here.

        The change waits for those who `listen`, READY_SECONDS at most, until what it foretold was `heard`.
        """
        if not self.calls():
            return None
        number = self._numbers[_FORETOLD]
        before = self.number()
        foretold, _, packed = self._journal()
        if foretold == number == self._numbers[_FORETELLING] and self.number() == before:
            return Foretold(number, before, packed)
        # It came without this process, or another is being written.
        self.heard(number)
        return None

    def calls(self) -> bool:
        """Tell, without waiting, whether something was foretold that was not `heard` here."""
        return self._heard is not None and self._numbers[_FORETOLD] != self._heard

    def listen(self) -> None:
        """Keep each change waiting, from the next one on, until it was `heard` here; only one thread may listen."""
        if self._heard is None:
            self.heard(self._numbers[_FORETOLD])

    def heard(self, number: int) -> None:
        """Keep the change that this journal foretold waiting no longer; the next one waits."""
        self._heard = number
        self._rendezvous.attend(number + 1)

    def deaf(self) -> None:
        """Keep no change waiting."""
        self._heard = None
        self._rendezvous.leave()

    def leads(self) -> bool:
        """Return whether this process is the one that follows the store, trying to become it if there is none."""
        with suppress(BlockingIOError):
            # A descriptor that holds the lock gets it again.
            fcntl.flock(self._follower, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def spare(self) -> Replica:
        """Return an empty replica to be moved to a version and then taken; only for the process that leads."""
        area = 1 - self._state().area if self.number() else 0
        self._punch(area)
        return self._replica_in(area)

    def take(self, record: VersionRecord, replica: Replica) -> None:
        """Put the spare replica in place of whatever is held; answers wait for no longer than it takes to say so."""
        state = self._state() if self.number() else None
        area = 1 - state.area if state else 0
        given = self._give(area, items_of(replica.table), 0)
        with self._writing.exclusive():
            self._commit(area, state.cuts + 1 if state else 0, given, replica, record)
            self._adopt(area, replica, record)
        if state:
            self._punch(state.area)

    def apply(
        self,
        record: VersionRecord,
        payload: WeightPayload,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        """Move everyone to the next version; only for the process that leads.

        `prepare` is called once the others know what comes, while they prepare themselves.

        Raises:
            CorruptWeights: when the payload does not fit; nothing was changed then.
        """
        with self.reading():
            assert self.replica is not None
            self.replica.check(payload)
        if payload.whole:
            self._take_whole(record, payload)
            return
        foretold = self._foretell(record, payload)
        prepare()
        ready = self._rendezvous.wait(foretold, LATE_SECONDS if self._late else READY_SECONDS)
        self._late = max(0, self._late - 1) if ready else 2
        with self._writing.exclusive():
            self._numbers[_BEGUN] = self.number() + 1
            self._redo(record, payload, foretold)
        # Whoever has not read it yet need not.
        self._numbers[_FORETELLING] = foretold + 1
        if self._given > 2 * self.replica.table.rows + LEAST_GIVEN:
            self._take_whole(record, self.replica.write_all())

    def _foretell(self, record: VersionRecord, payload: WeightPayload) -> int:
        """Write which rows a change will change, and its journal; return the journal's number."""
        foretold = self._numbers[_FORETOLD] + 1
        # Who is told of a change too early looks at a row in vain.
        rows = int(payload.rows[-1]) + 1 if len(payload.rows) else 1
        self._changed_by(self._area, rows)[payload.rows] = self.number() + 1
        packed_record, packed = record.SerializeToString(), encode(payload)
        start = _JOURNAL_START.pack(foretold, len(packed_record), len(packed))
        self._numbers[_FORETELLING] = foretold
        journal = self._map(_JOURNAL, len(start) + len(packed_record) + len(packed))
        journal[:] = start + packed_record + packed
        self._numbers[_FORETOLD] = foretold
        return foretold

    def _journal(self) -> tuple[int, bytes, bytes]:
        """Read the journal's number, the record and the payload."""
        foretold, *sizes = _JOURNAL_START.unpack(self._map(_JOURNAL, _JOURNAL_START.size)[:])
        journal = self._map(_JOURNAL, _JOURNAL_START.size + sum(sizes))
        start = _JOURNAL_START.size + sizes[0]
        return foretold, journal[_JOURNAL_START.size : start], journal[start:]

    def _take_whole(self, record: VersionRecord, payload: WeightPayload) -> None:
        replica = self.spare()
        replica.apply(payload)
        self.take(record, replica)

    def close(self) -> None:
        """Let go of locks and memory."""
        for descriptor in (self._memory, self._follower):
            os.close(descriptor)
        for each in (self._reading, self._writing, self._rendezvous):
            each.close()

    def _finish(self) -> None:
        """Finish what a process that died had begun."""
        with self._writing.exclusive(), torch.inference_mode(mode=False):
            if self.changing():
                foretold, packed_record, packed = self._journal()
                record, payload = VersionRecord.FromString(packed_record), decode(packed)
                # What this process holds for itself may be half-way too. Of the rows only those that stay are sure.
                self.replica, self._seen = None, 0
                self._refresh(payload.kept_rows)
                self._redo(record, payload, foretold)

    def _redo(self, record: VersionRecord, payload: WeightPayload, foretold: int) -> None:
        """Write all that a version changes, from the state in force; to write it again changes nothing."""
        replica, state = self.replica, self._state()
        assert replica is not None
        kept = payload.kept_rows or state.rows
        replica.table.reserve(state.rows)
        for name in SERVED_COLUMNS:
            replica.table.columns[name][kept : state.rows] = 0
        replica.put(payload)
        given = self._give(state.area, NewItems.of(payload.new_items), state.given)
        self._commit(state.area, state.cuts + (kept < state.rows), given, replica, record, foretold)
        self._adopt(state.area, replica, record)

    def _commit(
        self, area: int, cuts: int, given: int, replica: Replica, record: VersionRecord, foretold: int = 0
    ) -> None:
        number = self.number() + 1
        packed = record.SerializeToString()
        self._map(_RECORDS + number % 2, len(packed))[:] = packed
        table, now_ms = replica.table, time.time_ns() // 1_000_000
        state = _STATE.pack(area, cuts, table.rows, given, table.clock, now_ms, len(packed), foretold)
        place = _STATES * (1 + number % 2)
        self._header[place : place + len(state)] = state
        # One aligned word: either all of it is in force or nothing.
        self._numbers[_CURRENT] = number

    def _adopt(self, area: int, replica: Replica, record: VersionRecord) -> None:
        state = self._state()
        self.replica, self.record, self.applied_ms = replica, record, state.applied_ms
        self._seen, self._area, self._cuts, self._given = self.number(), area, state.cuts, state.given
        self._foretold = state.foretold

    def _refresh(self, kept: int = 0) -> None:
        """Bring what this process holds for itself up to the state in force; with `kept`, no row from there on."""
        if self._seen == self.number() and not kept:
            return
        state = self._state()
        replica = self.replica
        if replica is None or (self._area, self._cuts) != (state.area, state.cuts) or kept:
            replica, self._given = self._replica_in(state.area), 0
        items = self._read_given(state.area, self._given, state.given, kept or state.rows)
        replica.table.assign(items.rows, items.ids)
        replica.table.clock = state.clock
        record = VersionRecord.FromString(self._map(_RECORDS + self.number() % 2, state.record_bytes)[:])
        self._adopt(state.area, replica, record)

    def _state(self) -> _State:
        place = _STATES * (1 + self.number() % 2)
        return _State(*_STATE.unpack(self._header[place : place + _STATE.size]))

    def _replica_in(self, area: int) -> Replica:
        """Make a replica whose tensors lie in an area; it has no items yet."""
        replica = Replica(self._settings, torch.device("cpu"))
        table = replica.table
        first = _AREAS + area * _WINDOWS_PER_AREA

        def enlarge(name: str, column: Tensor, capacity: int) -> Tensor:
            window = first + _COLUMNS + SERVED_COLUMNS.index(name)
            shape = (capacity, *column.shape[1:])
            mapped = self._map(window, max(1, int(np.prod(shape)) * column.element_size()))
            return torch.frombuffer(mapped, dtype=column.dtype, count=int(np.prod(shape))).view(shape)

        table.enlarge = enlarge
        table.columns = {name: enlarge(name, column, len(column)) for name, column in table.columns.items()}
        learned = replica.network.state_dict()
        named = [*replica.network.named_parameters(), *replica.network.named_buffers()]
        named = [(name, tensor) for name, tensor in named if name in learned]
        places = np.cumsum([0, *(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for _, tensor in named)]).tolist()
        dense = self._map(first + _DENSE, places[-1] or 1)
        for (_, tensor), place in zip(named, places[:-1], strict=True):
            tensor.data = torch.frombuffer(dense, dtype=tensor.dtype, count=tensor.numel(), offset=place).view(
                tensor.shape
            )
        replica.network.eval()
        return replica

    def _give(self, area: int, items: NewItems, first: int) -> int:
        """Write which rows got which items, behind the first so many; return how many there are then."""
        total = first + len(items)
        rows, ends = self._given_rows(area, total), self._id_ends(area, total)
        start = int(ends[first])
        rows[first:] = items.rows
        ends[first + 1 :] = start + np.cumsum(items.ids.length_N, dtype=np.int64)
        if len(items):
            text = self._map(self._area_window(area, _ID_BYTES), max(int(ends[-1]), 1))
            np.frombuffer(text, np.uint8)[start : int(ends[-1])] = items.ids.text()
        return total

    def _read_given(self, area: int, first: int, total: int, below: int) -> NewItems:
        """Read what the rows below `below` were given last, of what stands behind the first so many."""
        if total <= first:
            return NewItems([], [])
        row_N, ends_N = self._given_rows(area, total)[first:], self._id_ends(area, total)[first:]
        text_T = np.frombuffer(self._map(self._area_window(area, _ID_BYTES), max(int(ends_N[-1]), 1)), np.uint8)
        # Of a row that was given again the last holds; those cut off since are passed over.
        row_R, from_end_R = np.unique(row_N[::-1], return_index=True)
        place_R = (len(row_N) - 1 - from_end_R)[row_R < below]
        ids = PackedIds(text_T, ends_N[:-1], np.diff(ends_N).astype(np.int32))
        return NewItems(ids.take(place_R), row_N[place_R])

    def _given_rows(self, area: int, total: int) -> NDArray[Any]:
        mapped = self._map(self._area_window(area, _GIVEN_ROWS), max(8 * total, 1))
        return np.frombuffer(mapped, np.int64, total)

    def _changed_by(self, area: int, rows: int) -> NDArray[Any]:
        """Return the number of the state that changed each row last, 0 where none did since the area was taken."""
        return np.frombuffer(self._map(self._area_window(area, _CHANGED_BY), 8 * rows), np.int64, rows)

    def _id_ends(self, area: int, total: int) -> NDArray[Any]:
        """Return where each id begins, and where the last one ends."""
        return np.frombuffer(self._map(self._area_window(area, _ID_ENDS), 8 * (total + 1)), np.int64, total + 1)

    @staticmethod
    def _area_window(area: int, window: int) -> int:
        return _AREAS + area * _WINDOWS_PER_AREA + window

    def _map(self, window: int, length: int) -> mmap.mmap:
        return mmap.mmap(self._memory, length, offset=window * WINDOW_BYTES)

    def _punch(self, area: int) -> None:
        """Give the memory of an area back."""
        libc = ctypes.CDLL(None, use_errno=True)
        start, length = self._area_window(area, 0) * WINDOW_BYTES, _WINDOWS_PER_AREA * WINDOW_BYTES
        mode = _PUNCH_HOLE | _KEEP_SIZE
        if libc.fallocate(self._memory, mode, ctypes.c_int64(start), ctypes.c_int64(length)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
