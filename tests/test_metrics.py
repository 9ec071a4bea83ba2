"""What server and trainer export: names by the conventions, closed labels, zeros from the start, exact values.

Run as a program it prints docs/metrics.md, the reference of all metrics.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from recsys import metrics as server_metrics
from recsys.metrics import ServerMetrics
from recsys.recommendation_id import issue, parse
from recsys.stages import FRESHNESS_BUCKETS, SERVER_STAGES, TRAINER_STAGES
from recsys.store.inspection import FILES, Files
from trainer.metrics import TrainerMetrics

PREFIXES = ("recsys_", "grpc_server_")
# What a gauge may count or measure without one of the suffixes _seconds, _bytes, _ratio, _info.
PLAIN = {
    *("recsys_served_version", "recsys_committed_version", "recsys_items", "recsys_queue_requests"),
    *("recsys_score_batch_requests", "recsys_store_reachable", "recsys_feedback_backlog"),
    *("recsys_feedback_log_records", "recsys_learning_loss", "recsys_prequential_log_loss", "recsys_gradient_norm"),
    *("recsys_recommended_novelty", "recsys_drift_score", "recsys_under_attack", "recsys_accounts_distrusted"),
    "recsys_store_file_written",
}
LABELS = {
    *("grpc_type", "grpc_service", "grpc_method", "grpc_code", "field", "source", "reason", "stage", "part"),
    *("position", "outcome", "versions_behind", "history", "slice", "stream", "measure"),
    *("setting", "file", "window", "k", "method", "version", "python_version", "device", "device_name", "le"),
}
RECOMMENDER = "recsys.v1.RecommenderService"
REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
INTRODUCTION = """# Metrics

Written by `.venv/bin/python tests/test_metrics.py > docs/metrics.md`; a test holds that it is what the code exports.

The server exports its metrics at `metrics_port`, the trainer at `trainer_metrics_port`, both at `/metrics`. With
`server_processes` above 1 one target has the series of all processes, each with the label `process`: sum counters and
histograms over it, and take the maximum of what each process says of the same thing (versions, times of versions,
`recsys_items`). Counters are exported as 0 from the start; what has to be measured first is NaN until then. No label
names a user, an item or a version.

What users did with what was recommended is told by the `recommendation_id` that they send back: it says by itself which
version answered and what stood where, so that any process can count it, also after a restart. Click-through by source
(or `position`), and by how old the answer was where feedback that is not positive, such as impressions, is logged too:

```
sum by (source) (rate(recsys_recommendation_feedback_total{outcome="positive"}[1h]))
  / sum by (source) (rate(recsys_items_recommended_total[1h]))
sum by (versions_behind) (rate(recsys_recommendation_version_feedback_total{outcome="positive"}[1h]))
  / sum by (versions_behind) (rate(recsys_recommendation_version_feedback_total[1h]))
```

One answer can be followed by several positive feedback on an item, a click and a purchase say: each counts.
"""
SUFFIX_UNITS = {"_seconds": "seconds", "_bytes": "bytes", "_ratio": "ratio", "_info": ""}
# What is NaN until it was measured.
UNMEASURED = (
    *("recsys_prequential_", "recsys_recommended_", "recsys_learning_loss"),
    *("recsys_store_file_written", "recsys_store_append_only_bytes", "recsys_store_disk_free_bytes"),
)
# Values of a label that are listed in the reference, and series of a metric that need no reason.
MOST_VALUES = 12
MOST_SERIES = 100
NAME_UNITS = {
    "recsys_gradient_norm": "norm",
    "recsys_learning_loss": "nats",
    "recsys_recommended_novelty": "bits",
    "recsys_prequential_log_loss": "nats",
    "recsys_served_version": "version",
    "recsys_committed_version": "version",
    "recsys_store_reachable": "0 or 1",
    "recsys_store_file_written": "0 or 1",
    "recsys_under_attack": "0 or 1",
}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def both() -> list[CollectorRegistry]:
    server, trainer = CollectorRegistry(), CollectorRegistry()
    ServerMetrics(server)
    TrainerMetrics(trainer)
    return [server, trainer]


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    found = registry.get_sample_value(name, labels)
    assert found is not None, f"{name} {labels} is not exported"
    return found


def reference() -> str:
    """Write every metric with its type, labels, unit and meaning as Markdown."""
    server, trainer = both()
    lines = [INTRODUCTION]
    for title, registry in (("Server", server), ("Trainer", trainer)):
        lines += [f"## {title}", "", "| metric | type | unit | labels | meaning |", "|---|---|---|---|---|"]
        lines += sorted(_row(family) for family in registry.collect())
        lines.append("")
    return "\n".join(lines)


def _row(family: Metric) -> str:
    names = {sample.name for sample in family.samples}
    name = family.name + next((s for s in ("_total", "_info") if family.name + s in names), "")
    labels: dict[str, list[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le" and value not in labels.setdefault(label, []):
                labels[label].append(value)
    measured = name.removesuffix("_total")
    unit = NAME_UNITS.get(name) or next((u for suffix, u in SUFFIX_UNITS.items() if measured.endswith(suffix)), "count")
    shown = "; ".join(f"`{label}`{_values(values)}" for label, values in labels.items())
    kind = "gauge" if family.type == "info" else family.type
    return f"| `{name}` | {kind} | {unit} | {shown} | {family.documentation} |"


def _values(values: list[str]) -> str:
    """List the values of a label where they are few, and the code alone knows them."""
    return ": " + ", ".join(values) if len(values) <= MOST_VALUES and not any("." in value for value in values) else ""


def test_the_reference_is_current() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == reference(), (
        "docs/metrics.md is not what the code exports: .venv/bin/python tests/test_metrics.py > docs/metrics.md"
    )


def test_no_two_processes_mean_different_things_by_one_name() -> None:
    told: dict[str, set[tuple[str, str]]] = {}
    for registry in both():
        for family in registry.collect():
            told.setdefault(family.name, set()).add((family.type, family.documentation))
    assert [name for name, meanings in told.items() if len(meanings) > 1] == []


def test_series_stay_few() -> None:
    """More than a hundred series of a metric are for a reason: gRPC's own are by method and code."""
    for registry in both():
        for family in registry.collect():
            count = max(Counter(sample.name for sample in family.samples).values())
            assert count <= MOST_SERIES or family.name.startswith("grpc_server_"), family.name


@pytest.mark.parametrize("registry", both(), ids=["server", "trainer"])
def test_names_follow_the_conventions(registry: CollectorRegistry) -> None:
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        name = family.name
        assert re.fullmatch("[a-z][a-z0-9_]*", name)
        assert name.startswith(PREFIXES), name
        assert family.documentation.endswith("."), f"{name} has no help"
        assert family.type in {"counter", "gauge", "histogram"}, name
        assert not re.search(r"_(ms|milliseconds|minutes|percent|kb|mb|age|created)(_|$)", name), name
        exported = {sample.name for sample in family.samples}
        assert any(n.endswith("_total") for n in exported) == (family.type == "counter"), name
        if family.type == "gauge" or (family.type == "histogram" and not name.endswith("_seconds")):
            assert name in PLAIN or name.endswith(tuple(SUFFIX_UNITS)), f"{name} has no unit"
        for sample in family.samples:
            assert set(sample.labels) <= LABELS, sample


@pytest.mark.parametrize("registry", both(), ids=["server", "trainer"])
def test_known_series_are_there_from_the_start(registry: CollectorRegistry) -> None:
    for family in registry.collect():
        assert family.samples, f"{family.name} shows nothing before its first use"
        for sample in family.samples:
            unmeasured = family.name.startswith(UNMEASURED)
            expected = math.nan if unmeasured else 1.0 if sample.name.endswith("_info") else 0.0
            assert sample.value == expected or (math.isnan(sample.value) and math.isnan(expected)), sample


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is absent; Debian's package `prometheus` has it")
@pytest.mark.parametrize("registry", both(), ids=["server", "trainer"])
def test_promtool_accepts_the_exposition(registry: CollectorRegistry) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_every_method_of_the_protocol_is_known() -> None:
    assert set(server_metrics.METHODS) == {
        (RECOMMENDER, "Recommend"),
        (RECOMMENDER, "Score"),
        (RECOMMENDER, "Explain"),
        (RECOMMENDER, "LogFeedback"),
        ("recsys.v1.CatalogService", "UpsertItems"),
        ("recsys.v1.CatalogService", "GetItems"),
        ("recsys.v1.CatalogService", "DeleteItems"),
        ("recsys.v1.ModelService", "GetStatus"),
        ("recsys.v1.ModelService", "ListVersions"),
        ("recsys.v1.ModelService", "GetVersion"),
        ("recsys.v1.ModelService", "Rollback"),
        ("recsys.v1.ModelService", "PauseLearning"),
        ("recsys.v1.ModelService", "ResumeLearning"),
        ("recsys.v1.ModelService", "ForgetUser"),
    }


def test_codes_are_those_of_grpc() -> None:
    grpc = pytest.importorskip("grpc")
    assert (
        tuple(code.name for code in sorted(grpc.StatusCode, key=lambda code: int(code.value[0])))
        == server_metrics.CODES
    )


def test_calls_are_counted_by_method_and_code(registry: CollectorRegistry) -> None:
    metrics = ServerMetrics(registry)
    metrics.rpc_started(RECOMMENDER, "Recommend")
    metrics.rpc_started(RECOMMENDER, "Recommend")
    metrics.rpc_handled(RECOMMENDER, "Recommend", "OK", 0.004)
    metrics.rpc_handled(RECOMMENDER, "Recommend", "UNAVAILABLE", 0.2)
    of = {"grpc_type": "unary", "grpc_service": RECOMMENDER, "grpc_method": "Recommend"}
    assert value(registry, "grpc_server_started_total", **of) == 2
    assert value(registry, "grpc_server_msg_received_total", **of) == 2
    assert value(registry, "grpc_server_msg_sent_total", **of) == 1
    assert value(registry, "grpc_server_handled_total", **of, grpc_code="OK") == 1
    assert value(registry, "grpc_server_handled_total", **of, grpc_code="UNAVAILABLE") == 1
    assert value(registry, "grpc_server_handling_seconds_count", **of) == 2
    assert value(registry, "grpc_server_handling_seconds_bucket", **of, le="0.005") == 1


def test_callers_cannot_invent_series(registry: CollectorRegistry) -> None:
    metrics = ServerMetrics(registry)
    before = sum(len(family.samples) for family in registry.collect())
    for i in range(10):
        metrics.rpc_started(f"evil.v1.Service{i}", f"Method{i}")
        metrics.rpc_handled(f"evil.v1.Service{i}", f"Method{i}", f"CODE_{i}", 0.1)
        metrics.feedback_refused(f"field_{i}", 1)
        metrics.rejected(f"reason_{i}")
        metrics.weights_reloaded(f"reason_{i}")
        metrics.recommended(np.array([i]), [100 + i], 0.1)
        shown = issue(10**i, [f"item-{i}"], [i % 4])
        metrics.recommendation_feedback(parse(shown), f"item-{i}", 10**9, positive=True)
        metrics.recommendation_feedback(parse(f"invented-{i}"), f"item-{i}", 10**9, positive=False)
    assert sum(len(family.samples) for family in registry.collect()) == before
    of = {"grpc_type": "unary", "grpc_service": "other", "grpc_method": "other"}
    assert value(registry, "grpc_server_handled_total", **of, grpc_code="UNKNOWN") == 10
    assert value(registry, "recsys_feedback_refused_total", field="other") == 10
    assert value(registry, "recsys_items_recommended_total", source="other", position="1") == 10


def test_server_values(registry: CollectorRegistry) -> None:
    metrics = ServerMetrics(registry)
    metrics.feedback_accepted(3)
    metrics.feedback_duplicate(2)
    metrics.feedback_refused("item_id", 4)
    metrics.recommended(np.arange(1, 5), [1, 2, 1, 3], 0.02)
    metrics.scored("empty", 2)
    metrics.batch_scored(5)
    waiting = [1, 2]
    metrics.watch_queue(lambda: len(waiting))
    metrics.rejected("overloaded")
    metrics.version_applied(42, 1_700_000_000.25, 1_700_000_000.5, 9000)
    metrics.weights_reloaded("corrupt")
    metrics.store_reachable(True)
    assert value(registry, "recsys_feedback_accepted_total") == 3
    assert value(registry, "recsys_feedback_duplicate_total") == 2
    assert value(registry, "recsys_feedback_refused_total", field="item_id") == 4
    assert [
        value(registry, "recsys_items_recommended_total", source=source, position=position)
        for source, position in (("network", "1"), ("transition", "2"), ("network", "3"), ("trending", "4-5"))
    ] == [1, 1, 1, 1]
    assert value(registry, "recsys_scored_requests_total", history="empty") == 2
    assert value(registry, "recsys_recommend_seconds_sum") == 0.02
    assert value(registry, "recsys_score_batch_requests_sum") == 5
    assert value(registry, "recsys_queue_requests") == 2
    waiting.clear()
    assert value(registry, "recsys_queue_requests") == 0
    assert value(registry, "recsys_requests_rejected_total", reason="overloaded") == 1
    assert value(registry, "recsys_served_version") == 42
    assert value(registry, "recsys_served_version_committed_timestamp_seconds") == 1_700_000_000.25
    assert value(registry, "recsys_served_version_applied_timestamp_seconds") == 1_700_000_000.5
    assert value(registry, "recsys_items") == 9000
    assert value(registry, "recsys_weights_reloads_total", reason="corrupt") == 1
    assert value(registry, "recsys_store_reachable") == 1
    metrics.store_reachable(False)
    assert value(registry, "recsys_store_reachable") == 0
    metrics.store_files(Files({"append_only": 1.0, "rewrite": 0.0, "dump": math.nan}, 5000.0, 6e9))
    written = [value(registry, "recsys_store_file_written", file=file) for file in FILES]
    assert (written[:2], math.isnan(written[2])) == ([1, 0], True)
    assert value(registry, "recsys_store_append_only_bytes") == 5000
    assert value(registry, "recsys_store_disk_free_bytes") == 6e9


def test_freshness_has_an_edge_at_the_objective_and_survives_clocks_that_differ(registry: CollectorRegistry) -> None:
    assert {0.25, 0.5, 1.0} <= set(FRESHNESS_BUCKETS)
    metrics = ServerMetrics(registry)
    metrics.freshness("accepted_to_applied", [-0.003, 0.3, 1.0, 1.01])
    of = {"stage": "accepted_to_applied"}
    assert value(registry, "recsys_freshness_seconds_bucket", **of, le="1.0") == 3
    assert value(registry, "recsys_freshness_seconds_count", **of) == 4
    assert value(registry, "recsys_freshness_seconds_sum", **of) == pytest.approx(2.31)


def test_each_stage_is_observed_in_one_process_only() -> None:
    server, trainer = both()
    for registry, stages in ((server, SERVER_STAGES), (trainer, TRAINER_STAGES)):
        (family,) = [f for f in registry.collect() if f.name == "recsys_freshness_seconds"]
        assert {sample.labels["stage"] for sample in family.samples} == set(stages)
    assert not set(SERVER_STAGES) & set(TRAINER_STAGES)


def test_trainer_values(registry: CollectorRegistry) -> None:
    metrics = TrainerMetrics(registry)
    metrics.device("cpu", "Some CPU")
    metrics.learned(feedback=256, steps=4, seconds=0.5)
    metrics.skipped("non_finite", 64)
    metrics.skipped("invented", 1)
    metrics.version_committed(7, 1000, 0.01)
    metrics.version_committed(8, 500, 0.01)
    metrics.backlog(12)
    metrics.log_usage(10, 6000, 60_000)
    metrics.store_memory(5e6, 4e9)
    metrics.loss("item", 3.5)
    metrics.gradient_norm(0.75)
    metrics.freshness("read_to_learned", [0.1, 0.2])
    metrics.trust(True, 30)
    metrics.distrusted(7)
    metrics.store_errors(2)
    metrics.snapshot_written(1 << 20, 0.25)
    assert value(registry, "recsys_trainer_info", version="0.1.0", device="cpu", device_name="Some CPU") == 1
    assert value(registry, "recsys_feedback_learned_total") == 256
    assert value(registry, "recsys_learning_steps_total") == 4
    assert value(registry, "recsys_learn_seconds_sum") == 0.5
    assert value(registry, "recsys_feedback_skipped_total", reason="non_finite") == 64
    assert value(registry, "recsys_feedback_skipped_total", reason="other") == 1
    assert value(registry, "recsys_committed_version") == 8
    assert value(registry, "recsys_versions_committed_total") == 2
    assert value(registry, "recsys_committed_bytes_total") == 1500
    assert value(registry, "recsys_feedback_backlog") == 12
    assert value(registry, "recsys_feedback_log_records") == 10
    assert value(registry, "recsys_feedback_log_bytes") == 6000
    assert value(registry, "recsys_feedback_log_max_bytes") == 60_000
    assert value(registry, "recsys_store_memory_bytes") == 5e6
    assert value(registry, "recsys_store_max_memory_bytes") == 4e9
    assert value(registry, "recsys_learning_loss", part="item") == 3.5
    assert value(registry, "recsys_gradient_norm") == 0.75
    assert value(registry, "recsys_freshness_seconds_count", stage="read_to_learned") == 2
    assert value(registry, "recsys_under_attack") == 1
    assert value(registry, "recsys_accounts_distrusted") == 30
    assert value(registry, "recsys_feedback_distrusted_total") == 7
    assert value(registry, "recsys_store_errors_total") == 2
    assert value(registry, "recsys_snapshot_bytes") == 1 << 20
    assert value(registry, "recsys_snapshot_seconds_count") == 1


def test_quality_reads_the_keys_of_a_version_s_metrics(registry: CollectorRegistry) -> None:
    metrics = TrainerMetrics(registry)
    metrics.quality(
        "recent",
        {"hr_at_10": 0.2, "ndcg_at_10": 0.1, "mrr_at_50": 0.05, "popularity_hr_at_10": 0.08, "log_loss": 0.7, "n": 9},
    )
    of = {"window": "recent", "k": "10"}
    assert value(registry, "recsys_prequential_hit_ratio", **of, method="recsys") == 0.2
    assert value(registry, "recsys_prequential_hit_ratio", **of, method="popularity") == 0.08
    assert value(registry, "recsys_prequential_ndcg_ratio", **of, method="recsys") == 0.1
    assert value(registry, "recsys_prequential_mrr_ratio", window="recent", k="50", method="recsys") == 0.05
    assert value(registry, "recsys_prequential_log_loss", window="recent") == 0.7
    metrics.quality("recent", {"auc": 0.75, "calibration_error": 0.01, "new_item_hr_at_10": 0.3, "new_user_share": 0.5})
    assert value(registry, "recsys_prequential_auc_ratio", window="recent") == 0.75
    assert value(registry, "recsys_prequential_calibration_error_ratio", window="recent") == 0.01
    assert value(registry, "recsys_prequential_slice_hit_ratio", **of, slice="new_item") == 0.3
    assert value(registry, "recsys_prequential_slice_ratio", window="recent", slice="new_user") == 0.5
    assert math.isnan(value(registry, "recsys_prequential_slice_hit_ratio", **of, slice="new_user"))
    assert math.isnan(value(registry, "recsys_prequential_hit_ratio", window="all", k="10", method="recsys"))


def test_drift_reads_the_keys_of_a_version_s_metrics(registry: CollectorRegistry) -> None:
    metrics = TrainerMetrics(registry)
    before = sum(len(family.samples) for family in registry.collect())
    found = {"drift_item_mix_psi": 0.3, "drift_item_loss_page_hinkley": 0.5, "drift_network_norm_change": 0.01}
    metrics.drift({**found, "drift_detected": 1.0, "drift_item_mix_detected": 1.0, "drift_invented_psi": 2.0})
    metrics.drift({"drift_item_mix_psi": 0.05, "drift_detected": 0.0})
    assert value(registry, "recsys_drift_score", stream="item_mix", measure="psi") == 0.05
    assert value(registry, "recsys_drift_score", stream="item_loss", measure="page_hinkley") == 0.5
    assert value(registry, "recsys_drift_score", stream="network", measure="norm_change") == 0.01
    assert value(registry, "recsys_drifts_total", stream="item_mix") == 1
    assert value(registry, "recsys_drifts_total", stream="item_loss") == 0
    assert sum(len(family.samples) for family in registry.collect()) == before


if __name__ == "__main__":
    print(reference(), end="")
