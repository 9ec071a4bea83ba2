"""What rules and runbooks promise: each alert fires in its fault alone, and leads to what a person can do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from promql import (
    DEPLOY,
    ROOT,
    RULE_TESTS,
    RULES,
    alerts,
    known_metrics,
    metrics_in,
    needs_promtool,
    promtool,
    read,
    rules,
)

from recsys.cli.app import app
from recsys.settings import Settings

RUNBOOKS = "docs/runbooks.md"
PARTS = ("**Means.** ", "**Check.** ", "**Do.** ", "```sh\nrecsys ")


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / RUNBOOKS).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^###? (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named_commands(text: str) -> Iterator[list[str]]:
    """Give the words of each command of ours that is in a code span or block."""
    for line in re.findall(r"`(recsys [^`]+)`|^(recsys .*)$", text, re.MULTILINE):
        yield re.sub(r"\s#.*", "", "".join(line)).split()[1:]


def check_command(words: list[str]) -> None:
    """Find the command in the program's own tree, with all its options."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", ()):
        command = command.commands[rest.pop(0)]
    # What follows a group, if not an option of its own, would be a command that it does not have.
    unknown = getattr(command, "commands", ()) and rest and not rest[0].startswith("-")
    assert len(rest) < len(words), f"no such command: {' '.join(words)}"
    assert not unknown, f"no such command: {' '.join(words)}"
    options = {option for parameter in command.params for option in parameter.opts}
    for word in rest:
        assert not word.startswith("-") or word in options, f"no such option: {' '.join(words)}"


def test_metric_names_are_found_in_queries() -> None:
    expr = 'sum by (le) (rate(a_bucket{x="b c"}[5m])) / on () group_left () job:d:rate5m > 0.9 unless e offset 5m'
    assert metrics_in(expr) == {"a_bucket", "job:d:rate5m", "e"}


def test_every_metric_named_exists() -> None:
    named = {name for rule in rules() for name in metrics_in(rule["expr"])}
    for path in RULE_TESTS:
        for test in read(path)["tests"]:
            named |= {name for series in test["input_series"] for name in metrics_in(series["series"])}
            named |= {name for check in test.get("promql_expr_test", []) for name in metrics_in(check["expr"])}
    assert named - known_metrics() == set()
    assert len(named) > 20


def test_every_alert_says_what_happened_how_bad_it_is_and_where_its_runbook_is() -> None:
    for alert in alerts():
        assert re.fullmatch(r"Recsys([A-Z][a-z]+)+", alert["alert"])
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
        assert "{{" not in alert["annotations"]["summary"], "a summary is the same sentence every time"
        assert "{{" in alert["annotations"]["description"]
        assert alert["annotations"]["runbook_url"] == f"{RUNBOOKS}#{alert['alert'].lower()}"


def test_every_alert_has_a_runbook_and_every_runbook_an_alert(sections: dict[str, str]) -> None:
    names = {alert["alert"] for alert in alerts()}
    assert {title for title in sections if title.startswith("Recsys")} == names
    for name in names:
        for part in PARTS:
            assert part in sections[name], f"{name} lacks {part.strip()!r}"


def test_every_command_in_the_runbooks_exists(text: str) -> None:
    found = list(named_commands(text))
    assert len(found) > 30
    for words in found:
        check_command(words)
    for wrong in (["mend"], ["quarantine", "drop", "1"], ["verify", "--mend"]):
        with pytest.raises(AssertionError, match="no such"):
            check_command(wrong)


def test_runbooks_name_only_what_exists(text: str, sections: dict[str, str]) -> None:
    others = set(re.findall(r"\bRecsys[A-Z]\w+", text)) - set(sections)
    assert others == set()
    metrics = set(re.findall(r"`((?:recsys|grpc)_\w+)`", text))
    assert metrics - known_metrics() == set()
    # Of the other names in code spans those with an underscore are settings, the store's or the gate's words apart.
    settings = {name for name in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text) if name not in metrics}
    assert settings - set(Settings.model_fields) == set()


def test_panels_named_in_the_runbooks_exist(text: str) -> None:
    from promql import dashboards, panels

    titles = {panel["title"] for dashboard in dashboards() for panel in panels(dashboard)}
    for board, title in re.findall(r'(Overview|Learning|Serving|Drift and Data|Store), "([^"]+)"', text):
        assert any(known == title or known.startswith(f"{title},") for known in titles), f"{board}: {title}"


def test_objectives_are_judged_alike() -> None:
    # Each pair of windows is tested by one of them.
    exprs: dict[str, set[str]] = {}
    for alert in alerts():
        if objective := re.search(r'objective="(\w+)"', alert["expr"]):
            exprs.setdefault(alert["labels"]["severity"], set()).add(alert["expr"].replace(objective[1], "each"))
    assert {severity: len(found) for severity, found in exprs.items()} == {"critical": 1, "warning": 1}


def test_every_alert_is_tested_to_fire_in_each_severity_and_to_be_silent() -> None:
    severities = {(alert["alert"], alert["labels"]["severity"]) for alert in alerts()}
    fires: set[tuple[str, str]] = set()
    silent: set[str] = set()
    for path in RULE_TESTS:
        for test in read(path)["tests"]:
            for check in test["alert_rule_test"]:
                fires |= {(check["alertname"], found["exp_labels"]["severity"]) for found in check["exp_alerts"]}
                silent |= {check["alertname"]} - {check["alertname"] for _ in check["exp_alerts"]}
    assert fires == severities
    assert silent == {name for name, _ in severities}


@needs_promtool
def test_promtool_accepts_configuration_and_rules() -> None:
    promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    promtool("check", "rules", *RULES)


@needs_promtool
@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_alerts_fire_and_do_not_fire(path: object) -> None:
    promtool("test", "rules", str(path))
