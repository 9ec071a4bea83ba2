"""TrainerMetrics: what the trainer counts, times and measures, under the names that dashboards and alerts use.

Every series that can be known beforehand is exported from the start: counts as 0, accuracy and loss as NaN until they
have been measured, since 0 would be a claim.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

import recsys
from recsys.stages import FRESHNESS_BUCKETS, FRESHNESS_HELP, FRESHNESS_METRIC, TRAINER_STAGES, TrainerStage
from trainer.drift import LEVELS, MEASURES, MIXES, TRANSITIONS, detected_key, score_key

OTHER = "other"
SKIPS = ("malformed", "unknown_class", "non_finite", "not_admitted")
LOSSES = ("total", "item", "class")
WINDOWS = ("recent", "all")
METHODS = ("recsys", "popularity")

SLICES = ("new_user", "new_item")

_RANKING_KEY = re.compile(r"(popularity_)?(hr|ndcg|mrr)_at_(\d+)")
_SLICE_KEY = re.compile(r"(new_user|new_item)_(?:hr_at_(\d+)|share)")
_USUAL_K = 10
_DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class TrainerMetrics:
    """Export the trainer's metrics through `registry`; safe to call from any thread.

    Turns off the client library's `_created` series for the whole process: they double the series and nobody reads
    them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._info = Info("recsys_trainer", "The software that learns, and the device it learns on.", registry=registry)
        self._info.info({"version": recsys.__version__})
        self._learned = Counter("recsys_feedback_learned", "Feedback learned from.", registry=registry)
        self._steps = Counter(
            "recsys_learning_steps", "Batches learned; replays between them are not counted.", registry=registry
        )
        self._learn_seconds = Histogram(
            "recsys_learn_seconds", "Time to learn one version's steps.", registry=registry, buckets=_DURATION_BUCKETS
        )
        self._skipped = Counter(
            "recsys_feedback_skipped", "Feedback read but not learned from, by reason.", ["reason"], registry=registry
        )
        self._committed_version = Gauge(
            "recsys_committed_version",
            "Newest version committed; 0 before the first.",
            registry=registry,
        )
        self._committed = Counter("recsys_versions_committed", "Versions committed to the store.", registry=registry)
        self._committed_bytes = Counter(
            "recsys_committed_bytes", "Bytes of deltas committed to the store.", registry=registry
        )
        self._commit_seconds = Histogram(
            "recsys_commit_seconds",
            "Time to commit one version to the store.",
            registry=registry,
            buckets=_DURATION_BUCKETS,
        )
        self._backlog = Gauge(
            "recsys_feedback_backlog", "Feedback in the log that is not learned yet.", registry=registry
        )
        self._log_records = Gauge("recsys_feedback_log_records", "Records in the feedback log.", registry=registry)
        self._log_bytes = Gauge("recsys_feedback_log_bytes", "Bytes in the feedback log.", registry=registry)
        self._log_max_bytes = Gauge(
            "recsys_feedback_log_max_bytes",
            "Bound of the feedback log; past it feedback is refused.",
            registry=registry,
        )
        self._store_memory = Gauge(
            "recsys_store_memory_bytes",
            "Memory that the store uses; NaN where it does not say.",
            registry=registry,
        )
        self._store_max_memory = Gauge(
            "recsys_store_max_memory_bytes",
            "Bound of the store's memory, 0: none; past it the store refuses writes.",
            registry=registry,
        )
        self._loss = Gauge(
            "recsys_learning_loss",
            "Mean loss of the last version's steps, in nats; NaN until measured.",
            ["part"],
            registry=registry,
        )
        self._gradient_norm = Gauge(
            "recsys_gradient_norm", "Norm of the last step's dense gradient, before clipping.", registry=registry
        )
        self._snapshot_bytes = Gauge("recsys_snapshot_bytes", "Size of the newest snapshot.", registry=registry)
        self._snapshot_seconds = Histogram(
            "recsys_snapshot_seconds", "Time to write one snapshot.", registry=registry, buckets=_DURATION_BUCKETS
        )
        self._freshness = Histogram(
            FRESHNESS_METRIC, FRESHNESS_HELP, ["stage"], registry=registry, buckets=FRESHNESS_BUCKETS
        )
        self._store_errors = Counter(
            "recsys_store_errors", "Commands to the store that failed or timed out.", registry=registry
        )
        self._prequential = {
            key: Gauge(
                f"recsys_prequential_{name}_ratio",
                f"{title} on feedback not learned from yet, all items ranked, of more than 16,384 a sample; NaN until "
                "measured.",
                ["window", "k", "method"],
                registry=registry,
            )
            for key, name, title in (
                ("hr", "hit", "Share of chosen items among the first k"),
                ("ndcg", "ndcg", "Normalised discounted cumulative gain of chosen items among the first k"),
                ("mrr", "mrr", "Mean reciprocal rank of chosen items among the first k"),
            )
        }
        self._log_loss = Gauge(
            "recsys_prequential_log_loss",
            "Log loss of the feedback classes, in nats, on feedback not learned from yet; NaN until measured.",
            ["window"],
            registry=registry,
        )
        self._probabilities = {
            key: Gauge(f"recsys_prequential_{name}", f"{help_}; NaN until measured.", ["window"], registry=registry)
            for key, name, help_ in (
                (
                    "auc",
                    "auc_ratio",
                    "Probability that positive feedback was given a higher probability of being so than other feedback",
                ),
                (
                    "calibration_error",
                    "calibration_error_ratio",
                    "Mean difference between the probability of positive feedback and its share, over 15 bins",
                ),
            )
        }
        self._slice_hits = Gauge(
            "recsys_prequential_slice_hit_ratio",
            "Share of chosen items among the first k, of users without history (new_user) and of items chosen less "
            "than ten times before (new_item); NaN until measured.",
            ["window", "k", "slice"],
            registry=registry,
        )
        self._slice_shares = Gauge(
            "recsys_prequential_slice_ratio",
            "Share of positive feedback that is of new users or new items; NaN until measured.",
            ["window", "slice"],
            registry=registry,
        )
        self._held = Counter(
            "recsys_versions_held_total",
            "Versions not published because they were worse than the one being served.",
            registry=registry,
        )
        self._expired = Counter(
            "recsys_items_expired_total",
            "Items that lost their row because they were unused for too long.",
            registry=registry,
        )
        self._set_aside = Counter(
            "recsys_feedback_set_aside_total",
            "Feedback put into quarantine because what was learned from it was held too often.",
            registry=registry,
        )
        self._under_attack = Gauge(
            "recsys_under_attack",
            "1 while accounts attack that were taken over, or newcomers who push items, and are not counted, else 0.",
            registry=registry,
        )
        self._distrusted_accounts = Gauge(
            "recsys_accounts_distrusted", "Accounts of which nothing is counted at present.", registry=registry
        )
        self._distrusted = Counter(
            "recsys_feedback_distrusted",
            "Feedback of accounts that were not trusted, which was learned and counted nowhere.",
            registry=registry,
        )
        self._drift_score = Gauge(
            "recsys_drift_score",
            "How far a monitored stream is from what was usual, by measure: psi and js (bits) of the last whole block, "
            "adwin and page_hinkley as shares of what a detection takes; how far a version moved from the last; "
            "fading_gain, by how many nats less of what followed items would foresee choices better.",
            ["stream", "measure"],
            registry=registry,
        )
        self._drifts = Counter(
            "recsys_drifts", "Versions in whose feedback a monitored stream had changed.", ["stream"], registry=registry
        )
        self._export_zeros()

    def device(self, kind: str, name: str) -> None:
        """Name the device that learns: "cpu" or "cuda", and its maker's name for it."""
        self._info.info({"version": recsys.__version__, "device": kind, "device_name": name})

    def learned(self, feedback: int, steps: int, seconds: float) -> None:
        """Count the feedback and the steps of one version, and the time they took."""
        self._learned.inc(feedback)
        self._steps.inc(steps)
        self._learn_seconds.observe(seconds)

    def skipped(self, reason: str, n: int) -> None:
        """Count feedback that was read but not learned from; `reason` is one of SKIPS."""
        self._skipped.labels(reason if reason in SKIPS else OTHER).inc(n)

    def version_committed(self, version: int, bytes_: int, seconds: float) -> None:
        """Count a commit of `bytes_` that took `seconds`."""
        self._committed_version.set(version)
        self._committed.inc()
        self._committed_bytes.inc(bytes_)
        self._commit_seconds.observe(seconds)

    def backlog(self, n: int) -> None:
        """Record how much feedback waits to be learned."""
        self._backlog.set(n)

    def log_usage(self, records: int, bytes_: int, max_bytes: int) -> None:
        """Record what the feedback log holds, and its bound."""
        self._log_records.set(records)
        self._log_bytes.set(bytes_)
        self._log_max_bytes.set(max_bytes)

    def store_memory(self, used: float, bound: float) -> None:
        """Record the memory that the store uses, and its bound, in bytes; NaN where it does not say."""
        self._store_memory.set(used)
        self._store_max_memory.set(bound)

    def quality(self, window: str, metrics: Mapping[str, float]) -> None:
        """Record accuracy over one of WINDOWS.

        Keys look like "hr_at_10", "ndcg_at_10", "mrr_at_10", each with "popularity_" before it for what popularity
        alone would have reached, like "new_user_hr_at_10" and "new_user_share", or are "log_loss", "auc" or
        "calibration_error". Keys of any other form belong to the version, not to the panels.
        """
        window = window if window in WINDOWS else OTHER
        for key, value in metrics.items():
            if match := _RANKING_KEY.fullmatch(key):
                popularity, metric, k = match.groups()
                method = "popularity" if popularity else "recsys"
                self._prequential[metric].labels(window, k, method).set(value)
            elif match := _SLICE_KEY.fullmatch(key):
                slice_, cutoff = match.groups()
                gauge = self._slice_hits.labels(window, cutoff, slice_) if cutoff else None
                (gauge or self._slice_shares.labels(window, slice_)).set(value)
            elif key == "log_loss":
                self._log_loss.labels(window).set(value)
            elif key in self._probabilities:
                self._probabilities[key].labels(window).set(value)

    def drift(self, metrics: Mapping[str, float]) -> None:
        """Record what a published version's metrics say of the monitored streams."""
        for stream, measures in MEASURES.items():
            for measure in measures:
                if (value := metrics.get(score_key(stream, measure))) is not None:
                    self._drift_score.labels(stream, measure).set(value)
            if metrics.get(detected_key(stream)):
                self._drifts.labels(stream).inc()

    def loss(self, name: str, value: float) -> None:
        """Record the last version's mean of one part of the loss; `name` is one of LOSSES."""
        self._loss.labels(name if name in LOSSES else OTHER).set(value)

    def gradient_norm(self, value: float) -> None:
        """Record the norm of the last step's dense gradient, before clipping."""
        self._gradient_norm.set(value)

    def freshness(self, stage: TrainerStage, seconds: Iterable[float]) -> None:
        """Record how long each of some feedback spent in `stage`."""
        histogram = self._freshness.labels(stage)
        for value in seconds:
            # Two machines' clocks may differ by more than a fast stage takes.
            histogram.observe(max(value, 0.0))

    def expired(self, n: int) -> None:
        """Count items that lost their row."""
        self._expired.inc(n)

    def held(self, n: int) -> None:
        """Count versions that were held because they were worse than the one being served."""
        self._held.inc(n)

    def set_aside(self, n: int) -> None:
        """Count feedback that was set aside after too many holds."""
        self._set_aside.inc(n)

    def trust(self, attacked: bool, accounts: int) -> None:
        """Record whether accounts are under attack, and of how many nothing is counted."""
        self._under_attack.set(attacked)
        self._distrusted_accounts.set(accounts)

    def distrusted(self, n: int) -> None:
        """Count feedback that was learned and counted nowhere."""
        self._distrusted.inc(n)

    def store_errors(self, n: int) -> None:
        """Count commands to the store that failed."""
        self._store_errors.inc(n)

    def snapshot_written(self, bytes_: int, seconds: float) -> None:
        """Record the size of a snapshot and the time to write it."""
        self._snapshot_bytes.set(bytes_)
        self._snapshot_seconds.observe(seconds)

    def _export_zeros(self) -> None:
        for reason in (*SKIPS, OTHER):
            self._skipped.labels(reason)
        for stage in TRAINER_STAGES:
            self._freshness.labels(stage)
        for name in LOSSES:
            self._loss.labels(name).set(math.nan)
        for stream, measures in MEASURES.items():
            for measure in measures:
                self._drift_score.labels(stream, measure)
        for stream in (*MIXES, *LEVELS, TRANSITIONS):
            self._drifts.labels(stream)
        for gauge in self._probabilities.values():
            # What orders all feedback cannot be summed up over it.
            gauge.labels("recent").set(math.nan)
        for window in WINDOWS:
            self._log_loss.labels(window).set(math.nan)
            for slice_ in SLICES:
                self._slice_hits.labels(window, _USUAL_K, slice_).set(math.nan)
                self._slice_shares.labels(window, slice_).set(math.nan)
            for gauge in self._prequential.values():
                for method in METHODS:
                    gauge.labels(window, _USUAL_K, method).set(math.nan)
