"""Daemon: read the feedback log, test, learn, publish. `step` does it once, `run` until it is told to stop.

What is learned is a pure function of the log: a batch is `batch_size` feedback or what stands before a tick, a version
is `batches_per_version` batches or what stands before a tick. The trainer's impatience enters by appending a tick.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, start_http_server

from recsys.device import choose
from recsys.encoding import row_history
from recsys.errors import AddressInUse, CorruptWeights, StoreFull, StoreUnavailable
from recsys.feedback_log import BEGINNING, FeedbackLog, LogEntry
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.v1.log_pb2 import FeedbackRecord
from recsys.weights import Lineage, VersionRecord, WeightStore, encode
from trainer.examples import Event
from trainer.examples import encode as encode_events
from trainer.learner import Learner
from trainer.metrics import TrainerMetrics
from trainer.quality import Quality

# Feedback read from the log in one command.
READ_COUNT = 256
# Feedback encoded at once while the replay window is filled after a start.
FILL_COUNT = 1000
# Between attempts while the store is away; doubled up to the longest.
RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 2.0
# How often the sizes of log and backlog are looked up for the metrics.
LOOK_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Daemon:
    """Learn from the log and publish versions; one at a time may, the newest wins.

    `clock` gives seconds that only rise; it decides when a tick is appended and nothing else.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: TrainerMetrics,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._client = connect(settings)
        self.log = FeedbackLog(self._client, settings)
        self.store = WeightStore(self._client, settings)
        self._metrics, self._device, self._clock = metrics, device, clock
        self.quality = Quality()
        self.stopping = threading.Event()
        self._looked = float("-inf")

    def start(self) -> VersionRecord:
        """Take over: fence off any other trainer, then restore the last version, or publish the first one."""
        self._epoch = self.store.acquire()
        self.learner = Learner(self.settings, self._device)
        self._since_snapshot = 0
        # Feedback read and not yet learned, and what the version in the making holds.
        self._pending: list[tuple[LogEntry, FeedbackRecord]] = []
        self._batches = 0
        self._accepted_ms: list[int] = []
        self._read_ms: list[int] = []
        self._waiting_since: float | None = None
        self._tick_sent = False
        self._caught_up = False
        self._consumed = 0
        self._learn_seconds = 0.0
        self._items_published = 0
        head = self.store.head()
        self._window: deque[str] = deque(maxlen=self.settings.replay_capacity)
        if head is None:
            self._head = VersionRecord(position=BEGINNING)
            self._read_position = self._position = BEGINNING
            self._publish(everything=True)
        else:
            self._restore()
        return self._head

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()

    def _restore(self) -> None:
        snapshot = self.store.load_snapshot(trainer=True)
        version = 0
        if snapshot is not None:
            assert snapshot.trainer_payload is not None
            self.learner.restore(snapshot.payload, snapshot.trainer_payload)
            self._head, version = snapshot.record, snapshot.record.version
        while deltas := self.store.read_after(version, trainer=True):
            for delta in deltas:
                assert delta.trainer_payload is not None
                self.learner.restore(delta.payload, delta.trainer_payload)
                self._since_snapshot += delta.record.bytes + delta.record.trainer_bytes
                self._head, version = delta.record, delta.record.version
        if version == 0:
            raise CorruptWeights("the store has a head but neither a snapshot nor the deltas from the first version")
        self.learner.take_changed()
        self._items_published = len(self.learner.table)
        self._read_position = self._position = self._head.position
        if self._head.settings_digest != self.settings.learning_digest():
            _log.warning("settings that learning depends on have changed since version %d", self._head.version)
        self._fill_window()

    def _fill_window(self) -> None:
        """Fill the replay window with the feedback before the position, as it was when the version was committed."""
        entries = self.log.read_before(self._position, self.settings.replay_capacity)
        for start in range(0, len(entries), FILL_COUNT):
            part = [
                (entry.position, event)
                for entry in entries[start : start + FILL_COUNT]
                if entry.record is not None and (event := self._event(entry.record)) is not None
            ]
            if part:
                self.learner.window.add(encode_events([event for _, event in part], self.settings))
                self._window.extend(position for position, _ in part)

    def step(self, wait_seconds: float = 0.0) -> bool:
        """Read what is new (waiting for it up to `wait_seconds`), learn and publish; False when there was nothing.

        Raises:
            FencedOff: when another trainer has taken over.
            StoreUnavailable, StoreFull: when the store fails; calling again goes on where this left off.
        """
        entries = self.log.read_after(self._read_position, READ_COUNT, self._patience(wait_seconds))
        now_ms = time.time_ns() // 1_000_000
        for entry in entries:
            self._take(entry, now_ms)
        self._caught_up = len(entries) < READ_COUNT
        self._maybe_tick()
        self._look()
        return bool(entries)

    def _patience(self, wait_seconds: float) -> float:
        """Return how long to wait for feedback: no longer than until a tick is due."""
        if self._waiting_since is None or self._tick_sent:
            return wait_seconds
        return max(0.0, min(wait_seconds, self._waiting_since + self.settings.publish_seconds - self._clock()))

    def _take(self, entry: LogEntry, now_ms: int) -> None:
        """Go past one entry of the log: what it completes is learned and published."""
        closes = entry.tick
        if entry.record is None and not entry.tick:
            self._metrics.skipped("malformed", 1)
        elif entry.record is not None and entry.record.feedback_class not in self.settings.class_index:
            self._metrics.skipped("unknown_class", 1)
            self._consumed += 1
        elif entry.record is not None:
            if self._waiting_since is None:
                self._waiting_since = self._clock()
            self._pending.append((entry, entry.record))
            self._consumed += 1
            self._read_ms.append(now_ms)
            self._metrics.freshness("accepted_to_read", [(now_ms - entry.accepted_ms) / 1000])
        if len(self._pending) == self.settings.batch_size or (closes and self._pending):
            self._learn()
        self._read_position = entry.position
        if not self._pending:
            self._position = entry.position
        if self._batches == self.settings.batches_per_version or (closes and self._batches):
            self._publish()

    def _event(self, record: FeedbackRecord) -> Event | None:
        """Turn a record into an example; every item in it gets a row, so that it looks the same ever after."""
        index = self.settings.class_index.get(record.feedback_class)
        if index is None:
            return None
        self.learner.allocate([*(entry.item_id for entry in record.history), record.item_id])
        table = self.learner.table
        history = row_history(record.history, table, self.settings.class_index)
        return Event(table.row(record.item_id), index, record.time_ms, history, record.context)

    def _learn(self) -> None:
        started = self._clock()
        events = [event for _, record in self._pending if (event := self._event(record)) is not None]
        report = self.learner.step(encode_events(events, self.settings))
        self._window.extend(entry.position for entry, _ in self._pending)
        self._accepted_ms.extend(entry.accepted_ms for entry, _ in self._pending)
        if not report.learned:
            self._metrics.skipped("non_finite", len(events))
        else:
            self._metrics.gradient_norm(report.gradient_norm)
            for name, value in report.losses.items():
                self._metrics.loss(name, value)
        self.quality.add_ranks("recsys", report.rank_B)
        self.quality.add_ranks("popularity", report.popularity_rank_B)
        self.quality.add_losses(report.item_loss_B, report.class_loss_B)
        self._pending.clear()
        self._batches += 1
        self._learn_seconds += self._clock() - started

    def _publish(self, *, everything: bool = False) -> None:
        """Commit all that was learned since the last version; on a store's failure try until it is committed."""
        learned_ms = time.time_ns() // 1_000_000
        started = self._clock()
        learner = self.learner
        rows = learner.take_changed()
        if everything:
            rows = torch.arange(learner.table.rows, device=self._device)
        served, own = learner.write(rows, self._items_published + 1)
        payload, own_payload = encode(served), encode(own)
        lineage = self._lineage()
        head = self._committed(payload, own_payload, lineage)
        self._head = head
        self._items_published = len(learner.table)
        self._since_snapshot += head.bytes + head.trainer_bytes
        self._observe(head, learned_ms, started)
        self._accepted_ms, self._read_ms = [], []
        self._batches, self._consumed, self._learn_seconds = 0, 0, 0.0
        self._waiting_since, self._tick_sent = None, False
        if everything or self._since_snapshot >= self.settings.snapshot_every_bytes:
            self._snapshot()

    def _lineage(self) -> Lineage:
        metrics = self.quality.metrics("recsys", recent=True) | self.quality.losses(recent=True)
        return Lineage(
            position=self._position,
            window_position=self._window[0] if self._window else BEGINNING,
            feedback_learned=self._head.feedback_learned + self._consumed,
            feedback_added=len(self._accepted_ms),
            settings_digest=self.settings.learning_digest(),
            metrics=metrics,
            accepted_ms=list(self._accepted_ms),
            committed_ms=time.time_ns() // 1_000_000,
        )

    def _committed(self, payload: bytes, own_payload: bytes, lineage: Lineage) -> VersionRecord:
        """Commit, again and again while the store fails: a commit that stands already is recognised."""
        pause = RETRY_SECONDS
        while True:
            try:
                return self.store.commit(self._epoch, self._head.version, payload, own_payload, lineage)
            except (StoreUnavailable, StoreFull) as error:
                self._metrics.store_errors(1)
                _log.warning("version %d waits for the store: %s", self._head.version + 1, error)
                if self.stopping.wait(pause):
                    raise
                pause = min(2 * pause, LONGEST_RETRY_SECONDS)

    def _observe(self, head: VersionRecord, learned_ms: int, started: float) -> None:
        metrics = self._metrics
        metrics.version_committed(head.version, head.bytes + head.trainer_bytes, self._clock() - started)
        metrics.learned(len(self._accepted_ms), self._batches, self._learn_seconds)
        metrics.freshness("read_to_learned", [(learned_ms - each) / 1000 for each in self._read_ms])
        now_ms = time.time_ns() // 1_000_000
        metrics.freshness("learned_to_committed", [(now_ms - learned_ms) / 1000] * len(self._read_ms))
        for window, recent in (("recent", True), ("all", False)):
            popularity = self.quality.metrics("popularity", recent=recent)
            metrics.quality(
                window,
                self.quality.metrics("recsys", recent=recent)
                | {f"popularity_{name}": value for name, value in popularity.items()}
                | self.quality.losses(recent=recent),
            )

    def _snapshot(self) -> None:
        """Write a full copy, then let go of the log that no retained version's replay window reaches back to."""
        started = self._clock()
        served, own = self.learner.write(torch.arange(self.learner.table.rows, device=self._device), 1)
        payload, own_payload = encode(served), encode(own)
        self.store.write_snapshot(self._epoch, self._head.version, payload, own_payload)
        self._since_snapshot = 0
        self._metrics.snapshot_written(len(payload) + len(own_payload), self._clock() - started)
        self.log.trim(self.store.snapshots()[-1].window_position)

    def _maybe_tick(self) -> None:
        """Append a tick when the feedback that waits has waited long enough and nothing more is to be read."""
        if self._waiting_since is None or self._tick_sent or not self._caught_up:
            return
        if self._clock() - self._waiting_since >= self.settings.publish_seconds:
            self.log.tick()
            self._tick_sent = True

    def _look(self) -> None:
        """Look up the sizes of log and backlog for the metrics, now and then."""
        if self._clock() - self._looked >= LOOK_SECONDS:
            self._looked = self._clock()
            usage = self.log.usage()
            self._metrics.log_usage(usage.records, usage.bytes, usage.max_bytes)
            self._metrics.backlog(max(0, self.log.appended() - self._head.feedback_learned))

    def run(self) -> None:
        """Step until `stopping` is set, through any failure of the store; then publish what is learned already."""
        pause = RETRY_SECONDS
        while not self.stopping.is_set():
            try:
                self.step(self.settings.publish_seconds)
                pause = RETRY_SECONDS
            except (StoreUnavailable, StoreFull) as error:
                self._metrics.store_errors(1)
                _log.warning("waiting for the store: %s", error)
                self.stopping.wait(pause)
                pause = min(2 * pause, LONGEST_RETRY_SECONDS)
        self.finish()

    def finish(self) -> None:
        """Publish the version in the making if it holds all that the log holds; else leave it to a restart."""
        if self._caught_up and self._waiting_since is not None:
            try:
                self.log.tick()
                while self._waiting_since is not None and self.step():
                    pass
            except (StoreUnavailable, StoreFull) as error:
                _log.warning("the last feedback will be learned after a restart: %s", error)


def _started(daemon: Daemon) -> VersionRecord | None:
    """Start the daemon as soon as the store lets it; None when told to stop before that."""
    while not daemon.stopping.is_set():
        try:
            return daemon.start()
        except (StoreUnavailable, StoreFull) as error:
            _log.warning("waiting for the store: %s", error)
            daemon.stopping.wait(LONGEST_RETRY_SECONDS)
    return None


def run(settings: Settings) -> None:
    """Learn until SIGTERM or SIGINT; print one line when the first version stands.

    Raises:
        AddressInUse: when the metrics' port is taken.
        FencedOff: when another trainer takes over.
    """
    torch.set_num_threads(settings.torch_threads)
    device = choose(settings.device)
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    metrics.device(device.type, name)
    try:
        server, thread = start_http_server(settings.trainer_metrics_port, settings.host, registry)
    except OSError as error:
        raise AddressInUse(
            f"cannot serve metrics on {settings.host}:{settings.trainer_metrics_port} (host, trainer_metrics_port): "
            f"{error.strerror}"
        ) from error
    daemon = Daemon(settings, metrics, device)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stopping.set())
    try:
        record = _started(daemon)
        if record is not None:
            where = f"{settings.host}:{server.server_port}"
            print(f"learning on {name} from version {record.version}, metrics on {where}/metrics", flush=True)
            daemon.run()
    finally:
        daemon.close()
        server.shutdown()
        server.server_close()
        thread.join()
