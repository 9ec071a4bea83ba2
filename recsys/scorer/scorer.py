"""Scorer: recommend and score against one whole version of the weights, which another may replace at any time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from recsys.beside import Beside
from recsys.catalog import CatalogMirror
from recsys.collector import give_back
from recsys.errors import NotReady
from recsys.item_table import ItemTable
from recsys.logs import Summary, tell
from recsys.scorer.items import Ahead, Items, looked_at_roughly, partitioned_from
from recsys.scorer.query import Answer, Query, Status
from recsys.scorer.retrieval import TOGETHER, Retrieval
from recsys.scorer.search import Search
from recsys.scorer.served import Layers, Served
from recsys.settings import Settings
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights.payload import WeightPayload
from recsys.weights.replica import Ready, Replica
from recsys.weights.shared import Foretold, Point, SharedWeights

# Batch sizes scored once before the first request is let in.
WARM_UP_SIZES = (1, 8, 32)

_log = logging.getLogger(__name__)


class Scorer:
    """Answer queries from the newest version given; safe to call from any threads.

    Versions are put in place between batches, under the same lock that a batch holds; with `shared` weights by any of
    the processes that share them.
    """

    def __init__(
        self, settings: Settings, mirror: CatalogMirror, device: torch.device, shared: SharedWeights | None = None
    ) -> None:
        self._settings = settings
        self._partitioned_from = partitioned_from(settings.retrieval)
        self._mirror = mirror
        self.device = device
        self._lock = threading.Lock()
        self._replica: Replica | None = None
        self._shared = shared
        self._shared_number = 0
        self._shared_point = Point(0, 0, 0, 0)
        # The partitions that are being found, which takes seconds, while versions go on.
        self._apart = Beside("recsys-partitions")
        self._parting: _Parting | None = None
        # Where versions change much of few items that is often.
        self._parted_summary = Summary()
        # What was computed of a version before it was put in place, with the number of what foretold it.
        self._foreseen: tuple[int, Ahead] | None = None
        self._record = VersionRecord()
        # Why a newer version that there is cannot be served; empty where all is well.
        self.problem = ""
        self._status = Status()
        self._retrieval = Search() if looked_at_roughly(device) else Retrieval(device)
        # For what moves the weights and has time, the reading of it included.
        self.beside = Beside("recsys-beside")
        self._items: Items | None = None
        self._served: Served | None = None
        # Called with a version after the first answer that it gave.
        self.on_first_answer: Callable[[int], None] = lambda version: None
        # Called with made-up answers, by whoever makes more of them.
        self.on_warm_up: Callable[[Answer], object] = lambda answer: None
        self._unanswered = False
        # Whether batches of every size have run: a first one may wait a minute for the compiler.
        self.warm = False

    @property
    def status(self) -> Status:
        """Return what is being served."""
        return self._status

    @property
    def version(self) -> int:
        """Return the version being served; 0 before the first."""
        return self._status.version

    @property
    def record(self) -> VersionRecord:
        """Return the record of the version being served."""
        return self._record

    def leads(self) -> bool:
        """Return whether it is for this process to move the weights: of those that share them, one does."""
        return self._shared is None or self._shared.leads()

    def refresh(self) -> None:
        """Take what another process has put in place, rather than at the next answer."""
        if self._shared is not None and self._shared.number() != self._shared_number:
            with self._held():
                pass

    def called(self) -> bool:
        """Tell, without waiting, whether a version waits for this process to `prepare`."""
        return self._shared is not None and self._shared.calls()

    def prepare(self) -> None:
        """Compute, beside the answers, what has to be computed of all items: of a version to come, and partitions.

        Whoever moves or follows the weights calls it now and then, in the one thread in which it does that, and where
        processes share them whenever it is `called`: from now on versions wait a moment for this process.
        """
        if self._shared is not None:
            self._shared.listen()
            self._foresee(self._shared)
        if self._parting is None:
            self._begin_parting()
        elif self._parting.found.done():
            self._end_parting()
            self.beside(give_back)

    def leave(self) -> None:
        """Keep no version waiting until this process prepares again."""
        if self._shared is not None:
            self._shared.deaf()

    def _foresee(self, shared: SharedWeights) -> None:
        """Compute what can be had of a version that waits for this process, and let it come."""
        if (foretold := shared.foretold()) is None:
            return
        try:
            with self._held():
                items, point, replica = self._items, self._shared_point, self._replica
            if items is None or replica is None or point.number != foretold.before:
                return
            ahead = self.beside(_ahead, items, replica, foretold)
            with self._lock:
                # Otherwise what it was computed from may have changed under it.
                if ahead is not None and shared.number() == foretold.before and not shared.changing():
                    self._foreseen = foretold.number, ahead
        finally:
            shared.heard(foretold.number)

    def _begin_parting(self) -> None:
        """Begin to find partitions where there should be some; what versions change meanwhile is moved afterwards."""
        with self._held():
            items, point, replica = self._items, self._shared_point, self._replica
        if items is not None and replica is not None and items.lack_partitions(self._partitioned_from):
            self._parting = _Parting(replica, point, [], self._apart.begin(self._part, replica))

    def _end_parting(self) -> None:
        """Put the partitions that were found in place."""
        parting, self._parting = self._parting, None
        assert parting is not None
        shared, table = self._shared, parting.replica.table
        with self._held():
            point = self._shared_point
            changed_R = shared.changes(parting.point) if shared else _rows(parting.changed)
            if self._replica is not parting.replica or changed_R is None:
                return
        # Versions wait: they are moved in this thread, or by a process that waits for this one.
        items = self.beside(_moved, parting.found.result(), table, changed_R)
        with self._held():
            if self._replica is not parting.replica:
                return
            if point != self._shared_point:
                # It did not wait long enough.
                assert shared is not None
                if (changed_R := shared.changes(parting.point)) is None:
                    return
                items = items.moved(table, changed_R)
            # It would bring back what lies in no partitions, or in those before.
            self._foreseen = None
            self._install(self._record, self._status.applied_ms, items)
        if parted := self._parted_summary.add({"times": 1}):
            tell(_log, logging.INFO, "items lie in partitions", rows=items.rows, **parted)

    @torch.inference_mode()
    def _part(self, replica: Replica) -> Items:
        """Return the items of a replica, in partitions; what answers from them is compiled by then."""
        items = Items.of(replica.table, parted=True)
        served = Served(self._settings, self._mirror, replica, items, Search())
        for size in WARM_UP_SIZES:
            served.recommend([Query(history=())] * size, _now_ms())
        return items

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Keep what is held from changing."""
        with self._lock:
            if self._shared is None:
                yield
                return
            with self._shared.reading() as number:
                if number != self._shared_number:
                    self._follow(self._shared)
                    # Last: `refresh` looks at it without the lock.
                    self._shared_number = number
                yield

    def _follow(self, shared: SharedWeights) -> None:
        """Take the version in force: what was foreseen of it, or else the rows that changed since the one seen last."""
        self._replica = shared.replica
        assert self._replica is not None
        table, items, point = self._replica.table, self._items, shared.point()
        foreseen, self._foreseen = self._foreseen, None
        if foreseen and foreseen[0] == point.foretold:
            items = foreseen[1].land(table)
        else:
            changed_R = shared.changes(self._shared_point)
            items = items.moved(table, changed_R) if items and changed_R is not None else Items.of(table)
        self._install(shared.record, shared.applied_ms, items)
        self._shared_point = point

    def load(self, record: VersionRecord, payload: WeightPayload) -> None:
        """Take a whole version in place of whatever is held; the one before answers until then.

        Raises:
            CorruptWeights: when the payload does not fit the settings; nothing was changed then.
        """
        self.take(record, self.replica_of(payload))

    def replica_of(self, payload: WeightPayload) -> Replica:
        """Make a replica of a whole version, to be moved further by its caller and then taken.

        Raises:
            CorruptWeights: when the payload does not fit the settings.
        """
        replica = self.new_replica()
        replica.apply(payload)
        return replica

    def new_replica(self) -> Replica:
        """Make an empty replica, to be moved to a version by its caller and then taken."""
        if self._shared is not None:
            return self._shared.spare()
        replica = Replica(self._settings, self.device)
        replica.network.eval()
        return replica

    def take(self, record: VersionRecord, replica: Replica) -> None:
        """Take a replica of `record`'s version in place of whatever is held; the one before answers until then."""
        if self._shared is not None:
            self._shared.take(record, replica)
            self.refresh()
            return
        # Beside the answers of the one before.
        items = _items_of(replica)
        with self._lock:
            self._parting, self._replica = None, replica
            self._install(record, _now_ms(), items)

    def apply(self, record: VersionRecord, payload: WeightPayload) -> None:
        """Move from the version held to the next one.

        Raises:
            CorruptWeights: when the payload does not fit; nothing was changed then.
        """
        if self._shared is not None:
            self._shared.apply(record, payload, partial(self._foresee, self._shared))
            self.refresh()
            return
        replica = self._replica
        assert replica is not None
        assert self._items is not None
        # Whoever applies is the only one who changes the table: it can be read without the lock.
        next_ = self.beside(_next, self._items, replica, payload)
        with self._lock:
            replica.put(payload, next_.ready)
            items = next_.ahead.land(replica.table) if next_.ahead else _items_of(replica)
            self._install(record, _now_ms(), items, next_.layers)
        if next_.ahead is None:
            self._parting = None
        elif self._parting is not None:
            self._parting.changed.append(next_.ahead.changed_R)

    @torch.inference_mode()
    def _install(self, record: VersionRecord, applied_ms: int, items: Items, layers: Layers | None = None) -> None:
        """Put a version in place, which it came to be at `applied_ms`."""
        assert self._replica is not None
        self._items = items
        self._served = Served(self._settings, self._mirror, self._replica, items, self._retrieval, layers)
        self._record = record
        self._unanswered = True
        self._status = Status(
            record.version, record.committed_ms, applied_ms, len(self._replica.table), record.feedback_learned
        )

    def chosen(self) -> NDArray[np.float32]:
        """Return how often the item of each row of the item table was chosen.

        Keeps no batch waiting: while another version is put in place this may be of both.
        """
        replica = self._replica
        if replica is None:
            return np.zeros(1, np.float32)
        # Synchronises with the GPU: when Prometheus asks.
        chosen_I: NDArray[np.float32] = replica.table.column("total").cpu().numpy()
        return chosen_I

    def warm_up(self) -> None:
        """Score made-up batches, so that the first real request does not pay for lazy initialisation."""
        for size in WARM_UP_SIZES:
            for answer in self._answer([Query(history=())] * size, _now_ms()):
                self.on_warm_up(answer)
        if self._items is not None and self._items.lack_partitions(self._partitioned_from):
            # To find those of all items takes seconds, the compiler a minute.
            few = Replica(self._settings, self.device)
            few.table.allocate(["one", "two"])
            few.network.eval()
            self._part(few)
        self.warm = True

    def answer(self, queries: Sequence[Query], now_ms: int | None = None) -> list[Answer]:
        """Answer a batch; queries for recommendations and for candidates may be mixed.

        `now_ms` is the time of the requests, milliseconds since 1970; default the clock.

        Raises:
            NotReady: before the first version.
        """
        answers = self._answer(queries, _now_ms() if now_ms is None else now_ms)
        if answers:
            version = answers[0].version
            with self._lock:
                first, self._unanswered = self._unanswered, False
            if first:
                self.on_first_answer(version)
        return answers

    @torch.inference_mode()
    def _answer(self, queries: Sequence[Query], now_ms: int) -> list[Answer]:
        answers: dict[int, Answer] = {}
        with self._held():
            if self._served is None:
                raise NotReady("no weights are loaded yet; the trainer has to publish a first version")
            open_ones = [i for i, query in enumerate(queries) if query.candidates is None]
            given = [i for i, query in enumerate(queries) if query.candidates is not None]
            for answer, asked in ((self._served.recommend, open_ones), (self._served.score, given)):
                for first in range(0, len(asked), TOGETHER):
                    places = asked[first : first + TOGETHER]
                    for i, items in zip(places, answer([queries[i] for i in places], now_ms), strict=True):
                        answers[i] = Answer(self.version, items)
        return [answers[i] for i in range(len(queries))]


class _Parting(NamedTuple):
    """Hold what of partitions are being found, from which point on, and the rows that were changed since."""

    replica: Replica
    point: Point
    changed: list[NDArray[np.int64]]
    found: Future[Items]


class _Next(NamedTuple):
    """Hold what can be had of the next version before it is put in place."""

    ahead: Ahead | None
    ready: Ready | None
    layers: Layers | None


def _next(items: Items, replica: Replica, payload: WeightPayload) -> _Next:
    replica.check(payload)
    if payload.whole:
        # Copied column by column when it is put in place, rather than held twice.
        return _Next(None, None, None)
    ready = replica.ready(payload)
    # Only now: a tensor made in this mode cannot be written to outside it, and the network's will be.
    with torch.inference_mode():
        return _Next(Ahead.of(items, replica.table, payload), ready, Layers(ready.network))


@torch.inference_mode()
def _ahead(items: Items, replica: Replica, foretold: Foretold) -> Ahead | None:
    return Ahead.of(items, replica.table, foretold.payload())


@torch.inference_mode()
def _items_of(replica: Replica) -> Items:
    return Items.of(replica.table)


@torch.inference_mode()
def _moved(items: Items, table: ItemTable, changed_R: NDArray[np.int64]) -> Items:
    return items.moved(table, changed_R)


def _rows(changed: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the rows that any of several versions changed, ascending."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *changed]))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
