"""What the dashboards promise: that they are what their description says, fit any Grafana and name only what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from promql import (
    DASHBOARDS,
    DEPLOY,
    dashboards,
    known_metrics,
    marks,
    metrics_in,
    needs_promtool,
    panels,
    promtool,
    queries,
)

UNITS = {"none", "short", "s", "percentunit", "reqps", "cps", "ops", "bytes", "Bps"}
# Stats that say so in their title may look back further than to the last scrapes.
WINDOWS = {"$__rate_interval", "1h"}


def test_the_five_dashboards_are_what_their_description_says() -> None:
    assert [path.stem for path in DASHBOARDS] == ["drift-and-data", "learning", "overview", "serving", "store"]
    script = DEPLOY / "grafana" / "write.py"
    done = subprocess.run([sys.executable, "-B", str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run `python deploy/grafana/write.py`: {done.stderr}"


def test_every_dashboard_can_be_provisioned_anywhere() -> None:
    def datasources(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            if "datasource" in node:
                yield node["datasource"]
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                yield from datasources(child)

    for path, content in zip(DASHBOARDS, dashboards(), strict=True):
        # The uid is in people's bookmarks and in links.
        assert (content["id"], content["uid"]) == (None, f"recsys-{path.stem}")
        assert "__inputs" not in path.read_text("utf-8")
        assert [(v["name"], v["type"], v["query"]) for v in content["templating"]["list"]] == [
            ("datasource", "datasource", "prometheus")
        ]
        found = list(datasources(content))
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in found)
        targets = sum(len(panel["targets"]) for panel in panels(content))
        assert len(found) == len(panels(content)) + targets + len(content["annotations"]["list"])


def test_every_dashboard_leads_to_the_others() -> None:
    for content in dashboards():
        (link,) = content["links"]
        assert (link["type"], link["keepTime"]) == ("dashboards", True)
        assert set(link["tags"]) <= set(content["tags"])


def test_every_panel_says_what_it_shows_in_which_unit_and_what_to_do() -> None:
    for content in dashboards():
        for panel in panels(content):
            assert len(panel["description"]) > 60, panel["title"]
            unit = panel["fieldConfig"]["defaults"]["unit"]
            assert unit in UNITS or unit.startswith("suffix: "), panel["title"]
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
            steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
            assert steps[0]["value"] is None
            assert [s["value"] for s in steps[1:]] == sorted(s["value"] for s in steps[1:])
        ids = [panel["id"] for panel in content["panels"]]
        assert len(set(ids)) == len(ids)
        titles = [panel["title"] for panel in content["panels"]]
        assert len(set(titles)) == len(titles), content["title"]


def test_the_overview_begins_with_the_three_questions() -> None:
    (overview,) = (content for content in dashboards() if content["uid"] == "recsys-overview")
    first = [panel for panel in panels(overview) if panel["gridPos"]["y"] == 1]
    assert [panel["title"].split("?")[0] for panel in first] == ["Good", "Fresh", "Healthy"]
    assert all(panel["type"] == "stat" and panel["options"]["colorMode"] == "background" for panel in first)


def test_panels_lie_beside_each_other() -> None:
    for content in dashboards():
        taken: set[tuple[int, int]] = set()
        for panel in content["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert at["x"] + at["w"] <= 24
            assert not cells & taken, panel["title"]
            taken |= cells


def test_queries_over_time_follow_the_scrape_interval() -> None:
    for where, expr in queries():
        windows = set(re.findall(r"\[([^\]]*)\]", expr))
        assert windows <= WINDOWS, where
        assert "1h" not in windows or "last hour" in where, where


def test_every_metric_named_exists() -> None:
    found = [*queries(), *marks()]
    named = {name for _, expr in found for name in metrics_in(expr)}
    assert named - known_metrics() == set()
    assert len(named) > 60


def test_every_metric_is_shown_or_judged_somewhere() -> None:
    from promql import rules

    named = {name for _, expr in [*queries(), *marks()] for name in metrics_in(expr)}
    named |= {name for rule in rules() for name in metrics_in(rule["expr"])}
    plain = {re.sub(r"_(bucket|sum|count|total|info)$", "", name) for name in named}
    exported = {re.sub(r"_(bucket|sum|count|total|info)$", "", name) for name in known_metrics() if ":" not in name}
    # Asked for by other people's dashboards, and what a person looks up.
    kept = {"grpc_server_started", "grpc_server_msg_received", "grpc_server_msg_sent", "recsys_trainer"}
    assert exported - plain - kept == set()


def test_what_changed_is_marked_in_every_dashboard() -> None:
    names = [[mark["name"] for mark in content["annotations"]["list"]] for content in dashboards()]
    assert all(found == names[0] for found in names)
    assert {"Drift", "Rollback", "Version held", "Set aside", "Version committed"} <= set(names[0])


@needs_promtool
def test_every_query_parses(tmp_path: Path) -> None:
    path = tmp_path / "queries.yml"
    found = [{"record": "query", "expr": expr} for _, expr in [*queries(), *marks()]]
    for i, rule in enumerate(found):
        rule["record"] = f"query:{i}"
        rule["expr"] = rule["expr"].replace("$__rate_interval", "1m")
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": found}]}), encoding="utf-8")
    promtool("check", "rules", path)
