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
from recsys.errors import AddressInUse, StoreFull, StoreUnavailable
from recsys.feedback_log import BEGINNING, FeedbackLog, LogEntry
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.v1.log_pb2 import FeedbackRecord
from recsys.weights import Lineage, VersionRecord, WeightStore
from trainer.examples import Event, encode
from trainer.learner import Learner
from trainer.metrics import TrainerMetrics
from trainer.publisher import LONGEST_RETRY_SECONDS, RETRY_SECONDS, Publisher, now_ms
from trainer.quality import Quality

# Feedback read from the log in one command.
READ_COUNT = 256
# Feedback encoded at once while the replay window is filled after a start.
FILL_COUNT = 1000
# How often the sizes of log and backlog are looked up for the metrics.
LOOK_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Daemon:
    """Learn from the log and publish versions; one at a time may, the newest wins.

    `clock` gives seconds that only rise; it decides when a tick is appended and nothing else that is learned.
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
        self.stopping = threading.Event()
        self._publisher = Publisher(settings, self.store, self.log, metrics, self.stopping, clock)
        self.quality = Quality()
        self._looked = float("-inf")

    def start(self) -> VersionRecord:
        """Take over: fence off any other trainer, then restore the last version, or publish the first one."""
        self.learner = Learner(self.settings, self._device)
        # Feedback read and not yet learned.
        self._pending: list[tuple[LogEntry, FeedbackRecord]] = []
        self._caught_up = False
        # Positions of the feedback in the replay window.
        self._window: deque[str] = deque(maxlen=self.settings.replay_capacity)
        self._begin_version()
        self._publisher.take_over(self.learner)
        self._read_position = self._position = self._publisher.head.position
        if self._publisher.head.version:
            self._fill_window()
        else:
            self._publish()
        return self._publisher.head

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()

    def _begin_version(self) -> None:
        """Forget what the last version was made of."""
        self._batches = self._consumed = 0
        self._accepted_ms: list[int] = []
        self._read_ms: list[int] = []
        self._learn_seconds = 0.0
        # When the version's first feedback was read, on `clock`; whether a tick that will close it was appended.
        self._waiting_since: float | None = None
        self._tick_sent = False

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
                self.learner.window.add(encode([event for _, event in part], self.settings))
                self._window.extend(position for position, _ in part)

    def step(self, wait_seconds: float = 0.0) -> bool:
        """Read what is new (waiting for it up to `wait_seconds`), learn and publish; False when there was nothing.

        Raises:
            FencedOff: when another trainer has taken over.
            StoreUnavailable, StoreFull: when the store fails; calling again goes on where this left off.
        """
        entries = self.log.read_after(self._read_position, READ_COUNT, self._patience(wait_seconds))
        read_ms = now_ms()
        for entry in entries:
            self._take(entry, read_ms)
        self._caught_up = len(entries) < READ_COUNT
        self._maybe_tick()
        self._look()
        return bool(entries)

    def _patience(self, wait_seconds: float) -> float:
        """Return how long to wait for feedback: no longer than until a tick is due."""
        if self._waiting_since is None or self._tick_sent:
            return wait_seconds
        return max(0.0, min(wait_seconds, self._waiting_since + self.settings.publish_seconds - self._clock()))

    def _take(self, entry: LogEntry, read_ms: int) -> None:
        """Go past one entry of the log: what it completes is learned and published."""
        if entry.record is None and not entry.tick:
            self._metrics.skipped("malformed", 1)
        elif entry.record is not None:
            self._consumed += 1
            if entry.record.feedback_class in self.settings.class_index:
                if self._waiting_since is None:
                    self._waiting_since = self._clock()
                self._pending.append((entry, entry.record))
                self._read_ms.append(read_ms)
                self._metrics.freshness("accepted_to_read", [(read_ms - entry.accepted_ms) / 1000])
            else:
                self._metrics.skipped("unknown_class", 1)
        if len(self._pending) == self.settings.batch_size or (entry.tick and self._pending):
            self._learn()
        self._read_position = entry.position
        if not self._pending:
            self._position = entry.position
        if self._batches == self.settings.batches_per_version or (entry.tick and self._batches):
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
        report = self.learner.step(encode(events, self.settings))
        self._window.extend(entry.position for entry, _ in self._pending)
        self._accepted_ms.extend(entry.accepted_ms for entry, _ in self._pending)
        self._pending.clear()
        self._batches += 1
        if report.learned:
            self._metrics.gradient_norm(report.gradient_norm)
            for name, value in report.losses.items():
                self._metrics.loss(name, value)
        else:
            self._metrics.skipped("non_finite", len(events))
        self.quality.add_ranks("recsys", report.rank_B)
        self.quality.add_ranks("popularity", report.popularity_rank_B)
        self.quality.add_losses(report.item_loss_B, report.class_loss_B)
        self._learn_seconds += self._clock() - started

    def _publish(self) -> None:
        """Publish all that was learned since the last version."""
        learned_ms = now_ms()
        lineage = Lineage(
            position=self._position,
            feedback_learned=self._publisher.head.feedback_learned + self._consumed,
            feedback_added=len(self._accepted_ms),
            settings_digest=self.settings.learning_digest(),
            metrics=self.quality.metrics("recsys", recent=True) | self.quality.losses(recent=True),
            accepted_ms=self._accepted_ms,
            committed_ms=learned_ms,
            window_position=self._window[0] if self._window else BEGINNING,
        )
        self._publisher.publish(self.learner, lineage)
        self._observe(learned_ms)
        self._begin_version()

    def _observe(self, learned_ms: int) -> None:
        metrics, quality = self._metrics, self.quality
        metrics.learned(len(self._accepted_ms), self._batches, self._learn_seconds)
        metrics.freshness("read_to_learned", [(learned_ms - each) / 1000 for each in self._read_ms])
        metrics.freshness("learned_to_committed", [(now_ms() - learned_ms) / 1000] * len(self._read_ms))
        for window, recent in (("recent", True), ("all", False)):
            popularity = quality.metrics("popularity", recent=recent)
            beside = {f"popularity_{name}": value for name, value in popularity.items()}
            own = quality.metrics("recsys", recent=recent) | quality.losses(recent=recent)
            metrics.quality(window, own | beside)

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
            self._metrics.backlog(max(0, self.log.appended() - self._publisher.head.feedback_learned))

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
    address = f"{settings.host}:{settings.trainer_metrics_port}"
    try:
        server, thread = start_http_server(settings.trainer_metrics_port, settings.host, registry)
    except OSError as error:
        reason = error.strerror
        raise AddressInUse(f"cannot serve metrics on {address} (host, trainer_metrics_port): {reason}") from error
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


def _started(daemon: Daemon) -> VersionRecord | None:
    """Start the daemon as soon as the store lets it; None when told to stop before that."""
    while not daemon.stopping.is_set():
        try:
            return daemon.start()
        except (StoreUnavailable, StoreFull) as error:
            _log.warning("waiting for the store: %s", error)
            daemon.stopping.wait(LONGEST_RETRY_SECONDS)
    return None
