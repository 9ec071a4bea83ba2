"""What deploy/ promises: that it names only metrics, settings, ports and files that exist, and that its rules hold."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from recsys.metrics import ServerMetrics
from recsys.settings import load
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
    expr = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expr)
    expr = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", expr)
    return set(re.findall(r"(?<![\w.:])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()", expr)) - KEYWORDS


def rules() -> Iterator[dict[str, Any]]:
    for path in RULES:
        for group in read(path)["groups"]:
            yield from group["rules"]


def dashboard() -> dict[str, Any]:
    (path,) = DASHBOARDS
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def exprs() -> list[str]:
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return found + [annotation["expr"] for annotation in dashboard()["annotations"]["list"]]


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every name that a query may use: what both processes export, what the rules record, and `up`."""
    names = {"up"} | {rule["record"] for rule in rules() if "record" in rule}
    for metrics in (ServerMetrics, TrainerMetrics):
        registry = CollectorRegistry()
        metrics(registry)
        names |= {sample.name for family in registry.collect() for sample in family.samples}
    return names


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read(DEPLOY / "compose.yaml")["services"]
    return found


def test_metric_names_are_found_in_queries() -> None:
    expr = 'sum by (le) (rate(a_bucket{x="b c"}[5m])) / on () group_left () job:d:rate5m > 0.9 unless e offset 5m'
    assert metrics_in(expr.replace("offset 5m", "")) == {"a_bucket", "job:d:rate5m", "e"}


def test_every_metric_named_exists(known: set[str]) -> None:
    named = {name for expr in exprs() for name in metrics_in(expr)}
    named |= {name for rule in rules() for name in metrics_in(rule["expr"])}
    for path in RULE_TESTS:
        for test in read(path)["tests"]:
            named |= {name for series in test["input_series"] for name in metrics_in(series["series"])}
            named |= {name for check in test.get("promql_expr_test", []) for name in metrics_in(check["expr"])}
    assert named - known == set()
    assert len(named) > 40


def test_every_alert_says_what_happened_how_bad_it_is_and_what_to_do() -> None:
    runbooks = {
        match.lower() for match in re.findall(r"^### (\w+)$", (DEPLOY / "README.md").read_text("utf-8"), re.MULTILINE)
    }
    for alert in (rule for rule in rules() if "alert" in rule):
        assert re.fullmatch(r"Recsys([A-Z][a-z]+)+", alert["alert"])
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
        assert "{{" not in alert["annotations"]["summary"], "a summary is the same sentence every time"
        assert "{{" in alert["annotations"]["description"]
        assert alert["annotations"]["runbook_url"] == f"deploy/README.md#{alert['alert'].lower()}"
        assert alert["alert"].lower() in runbooks


def test_every_alert_is_tested_to_fire_and_not_to_fire() -> None:
    fires: dict[str, set[bool]] = {rule["alert"]: set() for rule in rules() if "alert" in rule}
    for path in RULE_TESTS:
        for test in read(path)["tests"]:
            for check in test["alert_rule_test"]:
                fires[check["alertname"]].add(bool(check["exp_alerts"]))
    assert {alert for alert, seen in fires.items() if seen != {True, False}} == set()


@needs_promtool
def test_promtool_accepts_configuration_and_rules() -> None:
    promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    promtool("check", "rules", *RULES)


@needs_promtool
def test_alerts_fire_and_do_not_fire() -> None:
    promtool("test", "rules", *RULE_TESTS)


@needs_promtool
def test_every_query_of_the_dashboard_parses(tmp_path: Path) -> None:
    path = tmp_path / "queries.yml"
    queries = [
        {"record": f"query:{i}", "expr": expr.replace("$__rate_interval", "1m")} for i, expr in enumerate(exprs())
    ]
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": queries}]}), encoding="utf-8")
    promtool("check", "rules", path)


def test_dashboard_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(DEPLOY / "grafana" / "overview.py"))
    assert script["PATH"].read_text(encoding="utf-8") == script["text"](), "run `python deploy/grafana/overview.py`"


def test_dashboard_can_be_provisioned_anywhere() -> None:
    content = dashboard()
    assert (content["id"], content["uid"]) == (None, "recsys-overview")
    assert "__inputs" not in content
    assert [(v["name"], v["type"], v["query"]) for v in content["templating"]["list"]] == [
        ("datasource", "datasource", "prometheus")
    ]

    def datasources(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            if "datasource" in node:
                yield node["datasource"]
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                yield from datasources(child)

    found = list(datasources(content))
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in found)
    assert len(found) == len(panels()) + len(exprs())


def test_every_panel_says_what_it_shows_in_which_unit() -> None:
    for panel in panels():
        assert panel["title"], panel
        assert len(panel["description"]) > 40, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_panels_lie_beside_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_queries_over_time_follow_the_scrape_interval() -> None:
    for panel in panels():
        for target in panel["targets"]:
            assert set(re.findall(r"\[([^\]]*)\]", target["expr"])) <= {"$__rate_interval"}, panel["title"]


def test_prometheus_scrapes_the_settings_default_ports(services: dict[str, dict[str, Any]]) -> None:
    settings = load(environment={})
    jobs = {
        job["job_name"]: job["static_configs"][0]["targets"]
        for job in read(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]
    }
    assert jobs == {
        "recsys-server": [f"server:{settings.metrics_port}"],
        "recsys-trainer": [f"trainer:{settings.trainer_metrics_port}"],
    }
    assert {target.split(":")[0] for targets in jobs.values() for target in targets} <= set(services)


def test_compose_sets_settings_that_exist(services: dict[str, dict[str, Any]]) -> None:
    gpu = read(DEPLOY / "compose.gpu.yaml")["services"]["trainer"]["environment"]
    for name in ("server", "trainer"):
        settings = load(environment=services[name]["environment"] | (gpu if name == "trainer" else {}))
        assert settings.redis_url == "redis://redis:6379/0"
        assert settings.host == "0.0.0.0"
    assert services["server"]["ports"] == [f"127.0.0.1:{load(environment={}).port}:{load(environment={}).port}"]


def test_compose_exposes_nothing_and_waits_for_what_is_healthy(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == {"redis", "server", "trainer", "prometheus", "grafana"}
    dockerfile_has_healthcheck = "HEALTHCHECK" in (DEPLOY / "Dockerfile").read_text("utf-8")
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["restart"] == "unless-stopped"
        assert "healthcheck" in service or ("build" in service and dockerfile_has_healthcheck), name
        for other, condition in service.get("depends_on", {}).items():
            assert "healthcheck" in services[other]
            assert condition == {"condition": "service_healthy"}


def test_compose_mounts_and_builds_what_exists(services: dict[str, dict[str, Any]]) -> None:
    volumes = set(read(DEPLOY / "compose.yaml")["volumes"])
    for service in services.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in volumes or (DEPLOY / source).is_dir(), mount
        if build := service.get("build"):
            assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
            text = (DEPLOY / "Dockerfile").read_text("utf-8")
            assert all(f"ARG {argument}" in text for argument in build["args"])
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.name in {path.name for path in DASHBOARDS}


def test_store_keeps_what_it_is_given(services: dict[str, dict[str, Any]]) -> None:
    command = services["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "everysec"
    assert options["--maxmemory-policy"] == "noeviction"
    assert services["redis"]["volumes"] == ["store:/data"]


def test_grafana_is_provisioned_with_the_prometheus_of_compose(services: dict[str, dict[str, Any]]) -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = read(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    scrape = read(DEPLOY / "prometheus" / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
    (provider,) = read(provisioning / "dashboards" / "recsys.yaml")["providers"]
    mounts = [mount.split(":")[1] for mount in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounts


def test_image_is_small_and_runs_without_privileges() -> None:
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    last_stage = text[text.rindex("\nFROM ") :]
    assert text.count("\nFROM ") == 2
    assert re.search(r"^USER (?!0$|root$)\S+$", last_stage, re.MULTILINE)
    assert 'ENTRYPOINT ["recsys"]' in last_stage
    assert "HEALTHCHECK" in last_stage
    assert "pip install" not in last_stage
    assert "://" not in text, "registries are build arguments"
    settings = load(environment={})
    (ports,) = re.findall(r"^EXPOSE (.*)$", text, re.MULTILINE)
    assert ports.split() == [str(p) for p in (settings.port, settings.metrics_port, settings.trainer_metrics_port)]


def test_image_copies_what_the_build_context_holds() -> None:
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    copied = {
        source for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for source in line.split()
    }
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert copied == kept == {"pyproject.toml", "README.md", "recsys", "trainer"}
    # Setuptools reads the readme that pyproject.toml names.
    assert 'readme = "README.md"' in (ROOT / "pyproject.toml").read_text("utf-8")
