"""Write dashboards/overview.json: `python deploy/grafana/overview.py`, after every change to this file.

The dashboard is kept as this list because its JSON says everything forty times.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "dashboards" / "overview.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SERVICES = 'grpc_service=~"recsys.v1.+"'
OUR_FAULT = 'grpc_code=~"UNKNOWN|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|UNAVAILABLE|DATA_LOSS"'


@dataclass(frozen=True)
class Panel:
    """Show `queries` (PromQL by legend); `description` says what it means and what to do."""

    title: str
    description: str
    unit: str
    queries: dict[str, str]
    width: int = 8
    stat: bool = False
    stacked: bool = False
    # The value from which on it is drawn in red.
    limit: float | None = None


def _quantile(q: float, metric: str, by: str = "", selector: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{selector}[$__rate_interval])))"


def _rate(metric: str, by: str = "", selector: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{selector}[$__rate_interval]))"


_FAILED = _rate("grpc_server_handled_total", selector=f"{{{SERVICES}, {OUR_FAULT}}}")
_HANDLED = _rate("grpc_server_handled_total", selector=f"{{{SERVICES}}}")
_APPLIED = '{stage="accepted_to_applied"}'


def _accuracy(metric: str) -> dict[str, str]:
    return {
        "{{method}}, first {{k}}, {{window}}": f"max by (method, k, window) (recsys_prequential_{metric}_ratio)",
    }


ROWS: dict[str, list[Panel]] = {
    "At a glance": [
        Panel(
            "Requests",
            "Calls handled per second. Zero while users are about: look at the client's channel, then at the server.",
            "reqps",
            {"requests": _HANDLED},
            width=4,
            stat=True,
        ),
        Panel(
            "Failed by the server",
            "Share of calls that failed by the server's doing. Above 1%: see the errors below for which code.",
            "percentunit",
            {"errors": f"{_FAILED} / {_HANDLED}"},
            width=4,
            stat=True,
            limit=0.01,
        ),
        Panel(
            "Feedback to weights, p99",
            "From accepted feedback to served weights. Above 1 s: see which stage below takes the time.",
            "s",
            {"accepted to applied": _quantile(0.99, "recsys_freshness_seconds", selector=_APPLIED)},
            width=4,
            stat=True,
            limit=1.0,
        ),
        Panel(
            "Backlog",
            "Feedback in the log that is not learned yet. Rising for minutes: the trainer is too slow, or stopped.",
            "short",
            {"backlog": "max(recsys_feedback_backlog)"},
            width=4,
            stat=True,
            limit=1000,
        ),
        Panel(
            "Served version committed",
            "Age of the oldest version being served. It rises while no feedback arrives; while feedback does, "
            "compare served and committed versions below.",
            "s",
            {"age": "time() - min(recsys_served_version_committed_timestamp_seconds > 0)"},
            width=4,
            stat=True,
        ),
        Panel(
            "Items known",
            "Items that the served weights hold. Falling: items were expired or the weights were replaced.",
            "short",
            {"items": "max(recsys_items)"},
            width=4,
            stat=True,
        ),
    ],
    "Traffic": [
        Panel(
            "Calls per second",
            "Handled calls by method. Recommend without LogFeedback: the site shows items but does not tell what users "
            "did with them, so nothing is learned.",
            "reqps",
            {"{{grpc_method}}": _rate("grpc_server_handled_total", "grpc_method", f"{{{SERVICES}}}")},
        ),
        Panel(
            "Calls that failed, per second",
            "By code. INVALID_ARGUMENT: the caller must change. RESOURCE_EXHAUSTED: add servers. UNAVAILABLE: look at "
            "the store and at whether weights are loaded.",
            "reqps",
            {"{{grpc_code}}": _rate("grpc_server_handled_total", "grpc_code", f'{{{SERVICES}, grpc_code!="OK"}}')},
        ),
        Panel(
            "Latency",
            "Time to handle a call. A rising p99 with a long queue: add servers. Without one: look at the store.",
            "s",
            {
                "{{grpc_method}} p50": _quantile(0.5, "grpc_server_handling_seconds", "grpc_method", f"{{{SERVICES}}}"),
                "{{grpc_method}} p99": _quantile(
                    0.99, "grpc_server_handling_seconds", "grpc_method", f"{{{SERVICES}}}"
                ),
            },
            limit=0.25,
        ),
        Panel(
            "Waiting and batches",
            "Requests waiting to be scored, and how many are scored at once. Both high for long: add servers.",
            "short",
            {
                "waiting": "sum(recsys_queue_requests)",
                "in a batch, mean": f"{_rate('recsys_score_batch_requests_sum')} / "
                f"{_rate('recsys_score_batch_requests_count')}",
            },
        ),
        Panel(
            "Requests turned away, per second",
            "overloaded: add servers, or raise queue_limit if callers can wait. deadline_passed: callers wait too "
            "briefly or the queue is long. histories_unavailable: the store. not_ready: no weights yet.",
            "reqps",
            {"{{reason}}": _rate("recsys_requests_rejected_total", "reason")},
        ),
        Panel(
            "Store",
            "1 while every server reaches the store. 0: answers go on from the weights held, feedback is refused; "
            "restore the store. Reloads other than at a start mean that a server fell behind or found damage.",
            "short",
            {
                "reachable": "min(recsys_store_reachable)",
                "reloads per second, {{reason}}": _rate("recsys_weights_reloads_total", "reason"),
                "trainer's errors per second": _rate("recsys_store_errors_total"),
            },
        ),
    ],
    "Freshness": [
        Panel(
            "Time in each stage, p99",
            "accepted_to_read: the trainer is behind. read_to_learned: learning is slow, or publish_seconds is long. "
            "learned_to_committed: the store. committed_to_applied: the server. accepted_to_answered also waits for "
            "a user to ask.",
            "s",
            {"{{stage}}": _quantile(0.99, "recsys_freshness_seconds", "stage")},
            limit=1.0,
        ),
        Panel(
            "Time in each stage, p50",
            "What most feedback meets. Far below the p99: pauses, such as snapshots, rather than a slow stage.",
            "s",
            {"{{stage}}": _quantile(0.5, "recsys_freshness_seconds", "stage")},
            limit=1.0,
        ),
        Panel(
            "Within a second",
            "Share of feedback in the served weights within a second. Below 99%: the objective is missed; see the "
            "stages beside.",
            "percentunit",
            {
                "accepted to applied": _rate(
                    "recsys_freshness_seconds_bucket", selector='{stage="accepted_to_applied", le="1.0"}'
                )
                + " / "
                + _rate("recsys_freshness_seconds_count", selector=_APPLIED)
            },
        ),
    ],
    "Accuracy, measured on feedback before it is learned": [
        Panel(
            "Hit ratio",
            "Share of chosen items among the first k of all items. Below popularity for long: see the runbook of "
            "RecsysAccuracyBelowPopularity.",
            "percentunit",
            _accuracy("hit"),
            width=6,
        ),
        Panel(
            "NDCG",
            "As the hit ratio, with more credit near the top. Falling while hits stay: the order got worse.",
            "percentunit",
            _accuracy("ndcg"),
            width=6,
        ),
        Panel(
            "Mean reciprocal rank",
            "How near the top the chosen item was. Read it together with NDCG; one alone may jump.",
            "percentunit",
            _accuracy("mrr"),
            width=6,
        ),
        Panel(
            "Log loss of feedback classes",
            "In nats, lower is better. A step upwards: the audience or the meaning of a class has changed.",
            "none",
            {"{{window}}": "max by (window) (recsys_prequential_log_loss)"},
            width=6,
        ),
    ],
    "Learning": [
        Panel(
            "Feedback per second",
            "Accepted and learned should lie on each other. Learned below accepted: the backlog grows.",
            "cps",
            {
                "accepted": _rate("recsys_feedback_accepted_total"),
                "learned": _rate("recsys_feedback_learned_total"),
                "duplicate": _rate("recsys_feedback_duplicate_total"),
                "refused, {{field}}": _rate("recsys_feedback_refused_total", "field") + " > 0",
                "skipped, {{reason}}": _rate("recsys_feedback_skipped_total", "reason") + " > 0",
            },
        ),
        Panel(
            "Backlog",
            "Feedback waiting to be learned. A sawtooth is healthy; a slope is not: give the trainer a faster device, "
            "or lower replay_size.",
            "short",
            {"backlog": "max(recsys_feedback_backlog)"},
            limit=1000,
        ),
        Panel(
            "Versions",
            "Committed by the trainer and served by the slowest server. A lasting gap: that server does not follow; "
            "look at its log.",
            "none",
            {"committed": "max(recsys_committed_version)", "served": "min(recsys_served_version)"},
        ),
        Panel(
            "Held by the gate",
            "Versions that were worse than the one being served, and feedback set aside because of it. More "
            "than now and then: `recsys quarantine list` says what it was.",
            "none",
            {
                "versions held": "sum(increase(recsys_versions_held_total[$__rate_interval]))",
                "feedback set aside": "sum(increase(recsys_feedback_set_aside_total[$__rate_interval]))",
            },
        ),
        Panel(
            "Loss while learning",
            "In nats, of the last version. Rising for long while accuracy falls: lower the learning rates.",
            "none",
            {"{{part}}": "max by (part) (recsys_learning_loss)"},
        ),
        Panel(
            "Time per version",
            "p99 to learn, to commit and to write a snapshot. Learning dominates on a CPU; commits above 100 ms point "
            "at the store.",
            "s",
            {
                "learn": _quantile(0.99, "recsys_learn_seconds"),
                "commit": _quantile(0.99, "recsys_commit_seconds"),
                "snapshot": _quantile(0.99, "recsys_snapshot_seconds"),
            },
        ),
        Panel(
            "Bytes committed per second",
            "What every server receives. Too much for the network: raise batches_per_version or publish_seconds.",
            "Bps",
            {"committed": _rate("recsys_committed_bytes_total")},
        ),
    ],
    "Feedback log": [
        Panel(
            "Log size",
            "Past its bound feedback is refused. Near it: raise log_max_bytes if the store has the memory, or lower "
            "replay_capacity.",
            "bytes",
            {"used": "max(recsys_feedback_log_bytes)", "bound": "max(recsys_feedback_log_max_bytes)"},
        ),
        Panel(
            "Records in the log",
            "Feedback kept for learning and replay. Rising without end: the trainer does not learn.",
            "short",
            {"records": "max(recsys_feedback_log_records)"},
        ),
        Panel(
            "Bytes per record",
            "Mostly the history inside each record. Too large: lower history_length, or shorten item ids.",
            "bytes",
            {"mean": "max(recsys_feedback_log_bytes) / (max(recsys_feedback_log_records) > 0)"},
        ),
    ],
    "Recommendations": [
        Panel(
            "Where items come from",
            "Share of recommended items by what lifted them. Nearly all trending: histories are missing, or nothing "
            "has been learned yet.",
            "percentunit",
            {
                "{{source}}": f"{_rate('recsys_items_recommended_total', 'source')} "
                f"/ on () group_left () {_rate('recsys_items_recommended_total')}"
            },
            width=12,
            stacked=True,
        ),
        Panel(
            "Time per answer",
            "Of Recommend, waiting included. Well below the call's latency: the time goes into gRPC or the store.",
            "s",
            {"p50": _quantile(0.5, "recsys_recommend_seconds"), "p99": _quantile(0.99, "recsys_recommend_seconds")},
            width=12,
        ),
    ],
}


def _panel(panel: Panel, panel_id: int, x: int, y: int) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.limit is not None:
        steps.append({"color": "red", "value": panel.limit})
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    options: dict[str, Any]
    if panel.stat:
        defaults["color"] = {"mode": "thresholds"}
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "graphMode": "area"}
    else:
        defaults["custom"] = {
            "fillOpacity": 40 if panel.stacked else 8,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "off" if panel.limit is None else "dashed"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "id": panel_id,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": _height(panel)},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def _height(panel: Panel) -> int:
    return 4 if panel.stat else 8


def _panels() -> list[dict[str, Any]]:
    """Lay the rows out on Grafana's grid of 24 columns."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        grid = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": grid})
        x, y = 0, y + 1
        for panel in row:
            if x + panel.width > 24:
                x, y = 0, y + _height(panel)
            panels.append(_panel(panel, len(panels) + 1, x, y))
            x += panel.width
        y += _height(row[-1])
    return panels


def dashboard() -> dict[str, Any]:
    """Build the dashboard as Grafana's JSON model."""
    return {
        "id": None,
        "uid": "recsys-overview",
        "title": "recsys overview",
        "tags": ["recsys"],
        "schemaVersion": 41,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [{"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}]
        },
        "annotations": {
            "list": [
                {
                    "name": "Weights reloaded",
                    "enable": True,
                    "iconColor": "orange",
                    "datasource": DATASOURCE,
                    "expr": 'sum by (reason) (increase(recsys_weights_reloads_total{reason!="start"}[1m])) > 0',
                    "titleFormat": "weights reloaded: {{reason}}",
                }
            ]
        },
        "links": [],
        "panels": _panels(),
    }


def text() -> str:
    """Render the file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
