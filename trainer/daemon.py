"""Daemon: read the feedback log, learn it, publish. `step` does it once, `run` until it is told to stop.

What is learned is a pure function of the log (see log_learner). The trainer's impatience enters by appending a tick.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry, start_http_server
from torch import Tensor

import recsys
from recsys import traces
from recsys.collector import settle
from recsys.device import choose
from recsys.encoding import RowHistory
from recsys.errors import AddressInUse, OtherVersionCameFirst, StoreFull, StoreUnavailable
from recsys.feedback_log import FeedbackLog, LogEntry, position_key
from recsys.logs import Summary, tell
from recsys.quarantine import Quarantine
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.inspection import memory
from recsys.weights import ObjectionRecord, VersionRecord, WeightStore
from recsys.weights.earlier import ROLLBACK
from trainer.examples import Event, encode
from trainer.learner import Learner
from trainer.log_learner import LogLearner, Outcome
from trainer.metrics import TrainerMetrics
from trainer.publisher import LONGEST_RETRY_SECONDS, RETRY_SECONDS, Publisher, now_ms

# Feedback read from the log in one command.
READ_COUNT = 256
# How often the sizes of log and backlog are looked up for the metrics.
LOOK_SECONDS = 1.0
# Share of the log's bound from which on it is trimmed as far as learning allows.
NEARLY_FULL = 0.8
# Longest wait for feedback, so that a signal is heeded soon.
LONGEST_WAIT_SECONDS = 0.25

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
        self._quarantine = Quarantine(self._client, settings)
        self._metrics, self._device, self._clock = metrics, device, clock
        self.stopping = threading.Event()
        self._publisher = Publisher(settings, self.store, self.log, metrics, self.stopping, clock)
        self._looked = float("-inf")
        # What people were told last.
        # Of the attack that goes on: its kinds and the pushed items that people were told of.
        self._attack_told: set[str] = set()
        self._committed = Summary()

    @property
    def learner(self) -> Learner:
        """Return the learner."""
        return self._learning.learner

    @property
    def version(self) -> int:
        """Return the last version that was committed, as far as this trainer knows."""
        return self._learning.head.version

    def start(self) -> VersionRecord:
        """Take over: fence off any other trainer, then restore the last version, or publish the first one."""
        self._publisher.take_over()
        return self._resume()

    def _resume(self) -> VersionRecord:
        """Go on from the store's last version, forgetting all that was not published."""
        self._caught_up = self._ahead = False
        self._learning = LogLearner(self.settings, self._metrics, self._device)
        head = self._publisher.restore(self._learning.learner)
        if head is None:
            changed = self.learner.take_changed()
            self._begin(self._publisher.publish(self.learner, changed, self._learning.lineage(now_ms())), changed)
        else:
            self._learning.fill_window(self.log, head)
            self._learning.read_aside(self.log, head)
            self._begin(head)
            self._keep_aside(head)
        return self._learning.head

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()

    def _begin(self, head: VersionRecord, changed: Tensor | None = None) -> None:
        """Begin the version after `head`."""
        self._learning.begin(head, changed)
        self._read_ms: list[int] = []
        self._sources = traces.Sources()
        self._learn_seconds = 0.0
        # When the version's first feedback was read, on `clock`; whether a tick that will close it was appended.
        self._waiting_since: float | None = None
        self._tick_sent = False

    def step(self, wait_seconds: float = 0.0) -> bool:
        """Read what is new (waiting for it up to `wait_seconds`), learn and publish; False when there was nothing.

        Raises:
            FencedOff: when another trainer has taken over.
            StoreUnavailable, StoreFull: when the store fails; calling again goes on where this left off.
        """
        try:
            if self._ahead:
                self._resume()
            entries = self._read(wait_seconds)
            for entry in entries:
                self._take(entry)
            self._tell_of_trust()
        except OtherVersionCameFirst:
            _log.warning("another version came first; going on from it")
            self._resume()
            return True
        self._maybe_tick()
        self._look()
        return bool(entries)

    def _read(self, wait_seconds: float) -> list[LogEntry]:
        """Read what follows, waiting no longer than until a tick is due; nothing while learning is paused."""
        if self.store.paused():
            self.stopping.wait(wait_seconds)
            return []
        if self._waiting_since is not None and not self._tick_sent:
            due = self._waiting_since + self.settings.publish_seconds - self._clock()
            wait_seconds = max(0.0, min(wait_seconds, due))
        entries = self.log.read_after(self._learning.read_position, READ_COUNT, wait_seconds)
        read_ms = now_ms()
        feedback = [entry for entry in entries if entry.record is not None]
        self._metrics.freshness("accepted_to_read", [(read_ms - entry.accepted_ms) / 1000 for entry in feedback])
        self._read_ms.extend([read_ms] * len(feedback))
        self._caught_up = len(entries) < READ_COUNT
        return entries

    def _take(self, entry: LogEntry) -> None:
        started = self._clock()
        if entry.record is not None:
            self._sources.add(entry.record.traceparent)
        outcome = self._learning.take(entry)
        self._learn_seconds += self._clock() - started
        if outcome is Outcome.COMPLETE:
            self._publish()
        elif outcome is Outcome.SPOILED:
            self._set_aside()
        elif outcome is Outcome.HELD:
            self._tell_held()
        if self._learning.empty:
            self._waiting_since, self._tick_sent = None, False
        elif self._waiting_since is None:
            self._waiting_since = self._clock()

    def _publish(self) -> None:
        """Publish all that was learned since the last version."""
        learning, metrics, learned_ms = self._learning, self._metrics, now_ms()
        # Until the commit stands the learner is ahead of the store and must not go on.
        self._ahead = True
        changed = self.learner.take_changed()
        with traces.learned(self._sources, learning.head.version + 1):
            head = self._publisher.publish(self.learner, changed, learning.lineage(learned_ms))
        self._ahead = False
        count = len(learning.accepted_ms)
        if committed := self._committed.add({"versions": 1, "feedback": count, "bytes": head.bytes}):
            tell(_log, logging.INFO, "version committed", version=head.version, **committed)
        metrics.learned(count, learning.batches, self._learn_seconds)
        read_ms, left = self._read_ms[:count], self._read_ms[count:]
        metrics.freshness("read_to_learned", [(learned_ms - each) / 1000 for each in read_ms])
        metrics.freshness("learned_to_committed", [(now_ms() - learned_ms) / 1000] * count)
        for window in ("recent", "all"):
            metrics.quality(window, learning.quality.summary(recent=window == "recent"))
        metrics.drift(head.metrics)
        if learning.drifted:
            _log.warning("version %d: drift in %s", head.version, ", ".join(sorted(learning.drifted)))
        self._begin(head, changed)
        self._read_ms = left

    def _tell_held(self) -> None:
        """Let people know that the version in the making was held, and why."""
        follows, objections = self._learning.head.version, self._learning.objections
        self._metrics.held(1)
        tell(_log, logging.WARNING, "version held", follows=follows, because=f"it {objections[-1]}")
        try:
            self.store.write_objection(
                ObjectionRecord(version=follows + 1, times=len(objections), reason=objections[-1], time_ms=now_ms())
            )
        except (StoreUnavailable, StoreFull) as error:
            # Learning does not depend on it.
            self._metrics.store_errors(1)
            _log.warning("the store was not told that a version is held: %s", error)

    def _tell_of_trust(self) -> None:
        """Let people know when an attack begins and when it is over; a version may come much later."""
        learner, follows = self.learner, self._learning.head.version
        attacked, accounts = learner.distrusted is not None, learner.distrusted or 0
        self._metrics.trust(attacked, accounts)
        if not attacked:
            if self._attack_told:
                tell(_log, logging.INFO, "the attack is over: all accounts are counted", follows=follows)
            self._attack_told = set()
            return
        kinds = {"accounts that left their users' habits": learner.trust.attacked}
        kinds["newcomers who push items that nobody else chooses"] = learner.crowd.attacked
        found = [each for each, on in kinds.items() if on]
        items = list(learner.table.item_ids.take(learner.crowd.pushed))
        # Once of each in an attack: which items are pushed may change with every batch.
        if not self._attack_told.issuperset(found + items):
            self._attack_told.update(found + items)
            words = f"under attack: {' and '.join(found)} are not counted"
            tell(_log, logging.WARNING, words, accounts=accounts, items=",".join(items), follows=follows)

    def _set_aside(self) -> None:
        """Go back to the last version and on behind the feedback that spoiled what came after it."""
        lineage, after = self._learning.spoiled_lineage(now_ms()), self._learning.head.position
        span = {"after": after, "until": lineage.position}
        tell(_log, logging.ERROR, "feedback set aside", **span, feedback=self._learning.consumed, reason=lineage.reason)
        self._metrics.held(1)
        self._metrics.set_aside(self._learning.consumed)
        self._resume()
        changed = self.learner.take_changed()
        head = self._publisher.publish(self.learner, changed, lineage)
        self._learning.read_aside(self.log, head)
        self._begin(head)
        self._keep_aside(head)

    def _keep_aside(self, head: VersionRecord) -> None:
        """Put into quarantine what a committed version left out; repeated after a crash it changes nothing.

        Only behind the commit: what is in quarantine can be released, so it must not be learned as well.
        """
        if head.kind == ROLLBACK and head.set_aside:
            part = head.set_aside[-1]
            self._quarantine.set_aside(part.after, part.until, head.reason, head.committed_ms)

    def _maybe_tick(self) -> None:
        """Append a tick when the feedback that waits has waited long enough and nothing more is to be read."""
        if self._waiting_since is None or self._tick_sent or not self._caught_up:
            return
        if self._clock() - self._waiting_since >= self.settings.publish_seconds:
            self.log.tick()
            self._tick_sent = True

    def _look(self) -> None:
        """Look up the sizes of log, store and backlog for the metrics, now and then."""
        if self._clock() - self._looked >= LOOK_SECONDS:
            self._looked = self._clock()
            usage = self.log.usage()
            self._metrics.log_usage(usage.records, usage.bytes, usage.max_bytes)
            self._metrics.store_memory(*memory(self._client))
            if usage.bytes > NEARLY_FULL * usage.max_bytes:
                self._publisher.make_room()
            self._metrics.backlog(max(0, self.log.appended() - self._learning.head.feedback_learned))

    def run(self) -> None:
        """Step until `stopping` is set, through any failure of the store; then publish what is learned already."""
        pause, lost = RETRY_SECONDS, False
        while not self.stopping.is_set():
            try:
                self.step(min(self.settings.publish_seconds, LONGEST_WAIT_SECONDS))
                if lost:
                    tell(_log, logging.INFO, "the store is back", version=self.version)
                pause, lost = RETRY_SECONDS, False
            except (StoreUnavailable, StoreFull) as error:
                self._metrics.store_errors(1)
                if not lost:
                    tell(_log, logging.WARNING, "the store is lost: waiting for it", error=error)
                lost = True
                self.stopping.wait(pause)
                pause = min(2 * pause, LONGEST_RETRY_SECONDS)
        self.finish()

    def finish(self) -> None:
        """Publish the version in the making if it holds all that the log holds; else leave it to a restart."""
        if self._caught_up and not self._ahead and self._waiting_since is not None:
            try:
                tick = position_key(self.log.tick())
                # Up to this tick and no further, however much more is coming in.
                while position_key(self._learning.read_position) < tick and self.step():
                    pass
            except (StoreUnavailable, StoreFull) as error:
                _log.warning("the last feedback will be learned after a restart: %s", error)


def run(settings: Settings) -> None:
    """Learn until SIGTERM or SIGINT; print one line when the first version stands.

    Raises:
        AddressInUse: when the metrics' port is taken.
        SettingsError: when the environment names an exporter of traces that is not installed.
        FencedOff: when another trainer takes over.
    """
    traces.start(settings, "recsys-trainer")
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
    stop_when_told(daemon.stopping)
    try:
        record = _started(daemon)
        if record is not None:
            warm_up(settings, device)
            settle()
            where = f"{settings.host}:{server.server_port}"
            tell(_log, logging.INFO, "started", software=recsys.__version__, device=name, version=record.version)
            print(f"learning on {name} from version {record.version}, metrics on {where}/metrics", flush=True)
            daemon.run()
            tell(_log, logging.INFO, "stopped", version=daemon.version)
    finally:
        traces.stop()
        daemon.close()
        server.shutdown()
        server.server_close()
        thread.join()


def stop_when_told(stopping: threading.Event) -> None:
    """Set an event at SIGTERM or SIGINT, in a thread of its own; to be called from the main one.

    A signal comes between any two steps of the main thread, which may hold the event's lock then, on its way into a
    wait or out of it: to set it there would wait for ever. What is put into this queue waits for nobody.
    """
    told: queue.SimpleQueue[int] = queue.SimpleQueue()

    def wait() -> None:
        told.get()
        stopping.set()

    threading.Thread(target=wait, name="recsys-signals", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.put(number))


def warm_up(settings: Settings, device: torch.device) -> None:
    """Let a learner that is thrown away learn made-up feedback, so that none waits while loops are compiled.

    After an installation that takes most of a minute, else next to nothing. The first version stands before that, so
    that servers compile their own loops meanwhile.
    """
    learner = Learner(settings, device)
    items = ["one", "two", "three"]
    learner.allocate(items)
    rows = learner.table.look_up(items).tolist()
    history = RowHistory(rows[:2], (0, 0), (0, 1))
    classes = range(len(settings.classes))
    for _ in range(2):
        learner.step(encode([Event(row, each, 2, history, {}) for row in rows for each in classes], settings))


def _started(daemon: Daemon) -> VersionRecord | None:
    """Start the daemon as soon as the store lets it; None when told to stop before that."""
    while not daemon.stopping.is_set():
        try:
            return daemon.start()
        except (StoreUnavailable, StoreFull) as error:
            _log.warning("waiting for the store: %s", error)
            daemon.stopping.wait(LONGEST_RETRY_SECONDS)
    return None
