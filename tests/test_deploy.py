"""What deploy/ promises: that it names only settings, ports and files that exist, and exposes nothing by itself."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from promql import DASHBOARDS, DEPLOY, ROOT, read

from recsys.cli.doctor.chosen import FILES_BEHIND_FRONT, OTHER_FILES
from recsys.settings import load


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read(DEPLOY / "compose.yaml")["services"]
    return found


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


def test_a_server_may_open_the_files_that_its_connections_take(services: dict[str, dict[str, Any]]) -> None:
    server = services["server"]
    needed = FILES_BEHIND_FRONT * load(environment=server["environment"]).max_connections + OTHER_FILES
    assert server["ulimits"]["nofile"] >= needed


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


def test_image_holds_the_fast_transport_too() -> None:
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    (command,) = re.findall(r"^RUN (python -c .*?) > requirements.txt", text, re.MULTILINE | re.DOTALL)
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert done.stdout.split("\n")[:-1] == project["dependencies"] + project["optional-dependencies"]["native"]


def test_image_copies_what_the_build_context_holds() -> None:
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    copied = {
        source for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for source in line.split()
    }
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert copied == kept == {"pyproject.toml", "README.md", "recsys", "trainer"}
    # Setuptools reads the readme that pyproject.toml names.
    assert 'readme = "README.md"' in (ROOT / "pyproject.toml").read_text("utf-8")
