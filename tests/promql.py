"""What tests of dashboards, rules and runbooks share: deploy's files, the names in a query, and promtool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from recsys.metrics import ServerMetrics
from trainer.metrics import TrainerMetrics

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
RULES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
RULE_TESTS = sorted((DEPLOY / "prometheus" / "tests").glob("*.yml"))
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
KEYWORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "offset", "bool"}

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is absent; Debian's package `prometheus` has it"
)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def metrics_in(expr: str) -> set[str]:
    """List the metric names of a PromQL expression: what is left without strings, labels, functions and numbers."""
    expr = re.sub(r'"[^"]*"', "", expr)
    expr = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\boffset \w+", "", expr)
    expr = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", expr)
    return set(re.findall(r"(?<![\w.:])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()", expr)) - KEYWORDS


def rules() -> Iterator[dict[str, Any]]:
    for path in RULES:
        for group in read(path)["groups"]:
            yield from group["rules"]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in DASHBOARDS]


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Give each panel's queries, behind where they stand."""
    for dashboard in dashboards():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield f"{dashboard['title']} / {panel['title']} / {target['legendFormat']}", target["expr"]


def marks() -> set[tuple[str, str]]:
    """Give the annotations' queries, behind their names."""
    return {(mark["name"], mark["expr"]) for board in dashboards() for mark in board["annotations"]["list"]}


def known_metrics() -> set[str]:
    """Give every name that a query may use: what both processes export, what the rules record, Prometheus' own."""
    names = {"up", "ALERTS"} | {rule["record"] for rule in rules() if "record" in rule}
    for metrics in (ServerMetrics, TrainerMetrics):
        registry = CollectorRegistry()
        metrics(registry)
        names |= {sample.name for family in registry.collect() for sample in family.samples}
    return names
