"""Board: a dashboard as rows of panels, rendered as Grafana's JSON model; one that any Grafana can provision.

It names no data source of its own: the variable `datasource` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
TAG = "recsys"
# Grafana's grid: columns, and the heights of a row's title, of single values and of charts.
COLUMNS, TITLE_HEIGHT, STAT_HEIGHT, CHART_HEIGHT = 24, 1, 4, 8


@dataclass(frozen=True)
class Panel:
    """Show `queries` (PromQL by legend); `description` says what it means and what to do."""

    title: str
    description: str
    unit: str
    queries: Mapping[str, str]
    width: int = 8
    # One value each, instead of lines over time.
    stat: bool = False
    stacked: bool = False
    # From each value on its colour holds; below the first, `base`.
    limits: Sequence[tuple[float, str]] = ()
    base: str = "green"
    # What is written in place of certain values.
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def height(self) -> int:
        """Return the height on the grid."""
        return STAT_HEIGHT if self.stat else CHART_HEIGHT

    def json(self, panel_id: int, x: int, y: int) -> dict[str, Any]:
        """Render for a place on the grid."""
        return {
            "id": panel_id,
            "type": "stat" if self.stat else "timeseries",
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": self._defaults(), "overrides": []},
            "options": self._options(),
            "targets": [
                {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
                for i, (legend, expr) in enumerate(self.queries.items())
            ],
        }

    def _defaults(self) -> dict[str, Any]:
        steps = [{"color": self.base, "value": None}, *({"color": c, "value": v} for v, c in self.limits)]
        defaults: dict[str, Any] = {"unit": self.unit, "thresholds": {"mode": "absolute", "steps": steps}}
        if self.texts:
            shown = {value: {"text": text, "index": i} for i, (value, text) in enumerate(self.texts.items())}
            defaults["mappings"] = [{"type": "value", "options": shown}]
        if self.stat:
            return defaults | {"color": {"mode": "thresholds"}, "noValue": "nothing measured"}
        return defaults | {
            "custom": {
                "fillOpacity": 40 if self.stacked else 8,
                "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
                "thresholdsStyle": {"mode": "dashed" if self.limits else "off"},
            }
        }

    def _options(self) -> dict[str, Any]:
        if self.stat:
            return {
                "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
                "colorMode": "background" if self.limits else "value",
                "graphMode": "none" if self.texts else "area",
            }
        return {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }


@dataclass(frozen=True)
class Mark:
    """Mark in every chart when `expr` is not empty."""

    name: str
    colour: str
    expr: str
    text: str
    shown: bool = True

    def json(self) -> dict[str, Any]:
        """Render as an annotation."""
        return {
            "name": self.name,
            "enable": self.shown,
            "iconColor": self.colour,
            "datasource": DATASOURCE,
            "expr": self.expr,
            # As far back as the expressions look: no change falls between two steps.
            "step": "60s",
            "titleFormat": self.text,
        }


# What changed in what is served, and when: the first question to any chart that jumps.
MARKS = (
    Mark("Drift", "orange", "sum by (stream) (increase(recsys_drifts_total[1m])) > 0", "drift: {{stream}}"),
    Mark(
        "Rollback",
        "purple",
        'sum (increase(grpc_server_handled_total{grpc_method="Rollback", grpc_code="OK"}[1m])) > 0',
        "rolled back by a person",
    ),
    Mark("Attack", "dark-red", "sum (increase(recsys_feedback_distrusted_total[1m])) > 0", "accounts under attack"),
    Mark("Version held", "yellow", "sum (increase(recsys_versions_held_total[1m])) > 0", "version held by the gate"),
    Mark("Set aside", "red", "sum (increase(recsys_feedback_set_aside_total[1m])) > 0", "feedback set aside"),
    Mark(
        "Weights reloaded",
        "semi-dark-orange",
        'sum by (reason) (increase(recsys_weights_reloads_total{reason!="start"}[1m])) > 0',
        "weights reloaded: {{reason}}",
    ),
    Mark(
        "Software",
        "blue",
        "count by (version) (recsys_build_info) unless count by (version) (recsys_build_info offset 1m)",
        "server {{version}} began",
    ),
    # Several a second while feedback comes: asked for when it is wanted.
    Mark(
        "Version committed",
        "green",
        "sum (increase(recsys_versions_committed_total[1m])) > 0",
        "versions committed",
        shown=False,
    ),
)


@dataclass(frozen=True)
class Board:
    """A dashboard; `name` is its file's, and part of its uid, which must stay as it is."""

    name: str
    title: str
    description: str
    rows: Mapping[str, Sequence[Panel]]

    def json(self) -> dict[str, Any]:
        """Render as Grafana's JSON model."""
        return {
            "id": None,
            "uid": f"recsys-{self.name}",
            "title": self.title,
            "description": self.description,
            "tags": [TAG],
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
            "annotations": {"list": [mark.json() for mark in MARKS]},
            # To each other, with the time that is looked at.
            "links": [
                {
                    "title": "recsys",
                    "type": "dashboards",
                    "tags": [TAG],
                    "asDropdown": False,
                    "includeVars": True,
                    "keepTime": True,
                }
            ],
            "panels": self._panels(),
        }

    def text(self) -> str:
        """Render the file's content."""
        return json.dumps(self.json(), indent=2) + "\n"

    def _panels(self) -> list[dict[str, Any]]:
        """Lay the rows out on the grid."""
        panels: list[dict[str, Any]] = []
        y = 0
        for title, row in self.rows.items():
            grid = {"x": 0, "y": y, "w": COLUMNS, "h": TITLE_HEIGHT}
            panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": grid})
            x, y, height = 0, y + TITLE_HEIGHT, 0
            for panel in row:
                if x + panel.width > COLUMNS:
                    x, y, height = 0, y + height, 0
                panels.append(panel.json(len(panels) + 1, x, y))
                x, height = x + panel.width, max(height, panel.height)
            y += height
        return panels
