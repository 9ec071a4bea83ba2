"""Follower: load the weights and keep the scorer and the catalogue's copy up to date, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from recsys import traces
from recsys.catalog import CatalogMirror
from recsys.errors import CorruptWeights, StoreFull, StoreUnavailable
from recsys.logs import Summary, tell
from recsys.metrics import ServerMetrics
from recsys.scorer import Scorer
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.inspection import files
from recsys.store.v1.weights_pb2 import PayloadHeader
from recsys.weights import VersionRecord, WeightStore
from recsys.weights.replica import Replica

# How long one wait for a new version lasts; changes of the catalogue are looked for in between.
WAIT_SECONDS = 0.5
# Between attempts while the store is away, has no weights yet, or holds damaged ones. The latter are read again less
# and less often, unless there is another snapshot.
RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 30.0
# How often a process looks at the weights that another one keeps up to date, and whether it is about to move them.
LOOK_SECONDS = 0.05
CALLED_SECONDS = 0.005
# How often the store is asked whether it can write its files.
FILES_SECONDS = 1.0
# More than a store can forget when it crashes.
VERSIONS_REMEMBERED = 1000
VERSIONS_AWAITED = 100

_log = logging.getLogger(__name__)


class Follower:
    """Follow the store's versions; `ready` is set once the first weights are loaded and warm.

    While the store is away the scorer keeps what it holds. Of the processes that share weights one follows the
    versions; the others look at what it has put in place, and one of them takes over when it goes.
    """

    def __init__(self, settings: Settings, scorer: Scorer, mirror: CatalogMirror, metrics: ServerMetrics) -> None:
        self.ready = threading.Event()
        self._client = connect(settings)
        self._store = WeightStore(self._client, settings)
        self._scorer, self._mirror, self._metrics = scorer, mirror, metrics
        self._chain: bytes | None = None
        # Chains of the versions that were served, by version.
        self._past: dict[int, bytes] = {}
        self._reason = "start"
        self._leads = False
        self._retry_seconds = RETRY_SECONDS
        # Versions whose first answer is still to come, with when their feedback was accepted; where nobody asks, the
        # oldest go unobserved.
        self._awaiting_answer: deque[tuple[int, list[int]]] = deque(maxlen=VERSIONS_AWAITED)
        self._awaiting_lock = threading.Lock()
        self._stopping = threading.Event()
        self._applied_summary = Summary()
        self._store_lost = False
        self._asked_files = float("-inf")
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        scorer.on_first_answer = self._answered

    def start(self) -> None:
        """Begin to load and follow."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._client.close()

    def _run(self) -> None:
        try:
            self._follow()
        finally:
            self._scorer.leave()

    def _follow(self) -> None:
        while not self._stopping.is_set():
            try:
                if not self.step(WAIT_SECONDS):
                    self._stopping.wait(RETRY_SECONDS)
                self._metrics.store_reachable(True)
                self._ask_files()
                if self._store_lost:
                    self._store_lost = False
                    tell(_log, logging.INFO, "the store is back", version=self._scorer.version)
            except (StoreUnavailable, StoreFull) as error:
                self._metrics.store_reachable(False)
                if not self._store_lost:
                    self._store_lost = True
                    words = "the store is lost: serving the weights that are held"
                    tell(_log, logging.WARNING, words, version=self._scorer.version, error=error)
                self._stopping.wait(RETRY_SECONDS)
            except CorruptWeights as error:
                _log.error("loading the weights anew: %s", error)
                self._load_anew("corrupt", str(error))
            except Exception as error:
                # A thread that ends in silence would leave the server with weights that grow old.
                _log.exception("loading the weights anew after an unexpected error")
                self._load_anew("other", f"{type(error).__name__}: {error}")

    def _ask_files(self) -> None:
        """Ask now and then whether the store can write its files: it goes on to answer reads when it cannot."""
        if time.monotonic() - self._asked_files >= FILES_SECONDS:
            self._asked_files = time.monotonic()
            self._metrics.store_files(files(self._client))

    def _load_anew(self, reason: str, problem: str) -> None:
        """Give up what follows the version held; wait, longer each time, unless what is retained changes."""
        self._reason, self._chain, self._scorer.problem = reason, None, problem
        deadline = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, LONGEST_RETRY_SECONDS)
        retained = self._snapshots()
        while not self._stopping.wait(min(RETRY_SECONDS, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline or self._snapshots() != retained:
                return

    def _snapshots(self) -> list[str]:
        """Name the snapshots that are retained; none while that cannot be told."""
        try:
            return self._store.snapshot_names()
        except (StoreUnavailable, CorruptWeights):
            return []

    def step(self, wait_seconds: float) -> bool:
        """Load the newest version if none is held, else apply what followed; False when there is none yet.

        Where another process keeps shared weights up to date, look at what it has put in place.

        Raises:
            StoreUnavailable: when the store does not answer.
            CorruptWeights: when what follows is not whole or does not continue the version held.
        """
        self._mirror.refresh()
        if not self._scorer.leads():
            self._wait_for_call(min(wait_seconds, LOOK_SECONDS))
            self._look()
            return self._scorer.version > 0
        self._look()
        if not self._leads:
            self._leads = True
            if self._scorer.version:
                # Another process led before: go on from where it was.
                self._remember(self._scorer.record)
        if self._chain is None and not self._load():
            return False
        held = self._scorer.version
        deltas = self._scorer.beside(self._store.read_after, held, wait_seconds, chain=self._chain)
        if not deltas:
            self._check_past()
        for delta in deltas:
            # Before it can give its first answer.
            with self._awaiting_lock:
                self._awaiting_answer.append((delta.record.version, list(delta.record.accepted_ms)))
            with traces.span("apply version", delta.record.version):
                self._scorer.apply(delta.record, delta.payload)
            self._applied(delta.record)
        self._retry_seconds, self._scorer.problem = RETRY_SECONDS, ""
        self._look()
        return True

    def _wait_for_call(self, seconds: float) -> None:
        """Wait until another process is about to move the weights, or as long."""
        deadline = time.monotonic() + seconds
        while not self._scorer.called() and (left := deadline - time.monotonic()) > 0:
            if self._stopping.wait(min(CALLED_SECONDS, left)):
                return

    def _look(self) -> None:
        """Take what stands, show it, and be ready when that is the first."""
        self._scorer.refresh()
        if not self._scorer.version:
            return
        self._scorer.prepare()
        status = self._scorer.status
        self._metrics.version_applied(
            status.version, status.committed_ms / 1000, status.applied_ms / 1000, status.items
        )
        if not self.ready.is_set():
            # The compiler may take a minute.
            self._scorer.leave()
            self._scorer.warm_up()
            self.ready.set()

    def _check_past(self) -> None:
        """Tell a store that forgot its last second, and will get there again, from one that began anew."""
        head = self._store.head()
        if head is not None and head.version < self._scorer.version and self._past.get(head.version) != head.chain:
            raise CorruptWeights(f"the store began anew: it stands at another version {head.version}")

    def _load(self) -> bool:
        """Put the newest version together beside what is held, and take it when it is newer or another past."""
        # A new one for each snapshot that is tried; the last has the columns of the one that is whole.
        replicas: list[Replica] = []

        def place(header: PayloadHeader) -> Mapping[str, NDArray[Any]]:
            replicas[:] = [self._scorer.new_replica()]
            return replicas[0].place(header)

        snapshot = self._store.load_snapshot(place=place)
        first = None if snapshot else next(iter(self._store.read_after(0, count=1)), None)
        found = snapshot or first
        if found is None:
            return False
        replica = replicas[0] if snapshot else self._scorer.new_replica()
        replica.apply(found.payload)
        passed = [found.record]
        try:
            while deltas := self._store.read_after(passed[-1].version, chain=passed[-1].chain):
                for delta in deltas:
                    replica.apply(delta.payload)
                    passed.append(delta.record)
        except CorruptWeights as error:
            _log.error("version %d is the last that can be put together: %s", passed[-1].version, error)
        self._metrics.weights_reloaded(self._reason)
        last, held = passed[-1], self._scorer.version
        if last.version <= held and self._past.get(last.version) == last.chain:
            # Answers never go back: what is held came out of this very version.
            self._chain = self._past[held]
            return True
        with self._awaiting_lock:
            self._awaiting_answer.clear()
        self._scorer.take(last, replica)
        tell(_log, logging.INFO, "weights loaded", version=last.version, reason=self._reason)
        for record in passed:
            self._remember(record)
        return True

    def _applied(self, record: VersionRecord) -> None:
        self._remember(record)
        applied_ms = self._scorer.status.applied_ms
        if applied := self._applied_summary.add({"versions": 1}):
            tell(_log, logging.INFO, "version applied", version=record.version, kind=record.kind or None, **applied)
        accepted_ms = list(record.accepted_ms)
        committed = [max(0, applied_ms - record.committed_ms) / 1000] * len(accepted_ms)
        self._metrics.freshness("committed_to_applied", committed)
        self._metrics.freshness("accepted_to_applied", [max(0, applied_ms - each) / 1000 for each in accepted_ms])

    def _remember(self, record: VersionRecord) -> None:
        self._chain = self._past[record.version] = record.chain
        while len(self._past) > VERSIONS_REMEMBERED:
            del self._past[next(iter(self._past))]

    def _answered(self, version: int) -> None:
        """Observe the feedback whose first answer this was; called from the scoring thread."""
        now_ms = _now_ms()
        answered: list[list[int]] = []
        with self._awaiting_lock:
            while self._awaiting_answer and self._awaiting_answer[0][0] <= version:
                answered.append(self._awaiting_answer.popleft()[1])
        for accepted_ms in answered:
            self._metrics.freshness("accepted_to_answered", [max(0, now_ms - each) / 1000 for each in accepted_ms])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
