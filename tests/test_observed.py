"""What a person on call sees: every panel shows a real run, and alerts tell of real faults, then fall silent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from observed import Observed, needs_prometheus, observed
from promql import marks, queries

from recsys import Client, Feedback
from recsys.errors import StoreFull

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), needs_prometheus]
# With a scrape a second: as Grafana would choose it, four scrapes and more.
RATE_INTERVAL = "10s"
# Alerts wait so long and no longer, in seconds.
FAST = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    with observed(tmp_path_factory.mktemp("healthy"), fast=FAST) as running:
        yield running


def wait_for(run: Observed, *names: str) -> None:
    run.prometheus.wait_until(lambda: all(run.prometheus.alerts().get(name) == "firing" for name in names))


def wait_without(run: Observed, *names: str) -> None:
    run.prometheus.wait_until(lambda: not {*names} & {*run.prometheus.alerts()})


def fill(client: Client) -> None:
    """Log feedback until it is refused."""
    while True:
        client.log_feedback([Feedback("user", "item", "click")] * 50)


def test_every_panel_and_annotation_shows_a_real_run(run: Observed) -> None:
    # What has not happened is shown as zero. An annotation shows where it is above that.
    wanted = dict(queries()) | {name: expr.removesuffix(" > 0") for name, expr in marks() if expr.endswith(" > 0")}
    assert len(wanted) > 90

    def all_shown() -> bool:
        for where, expr in list(wanted.items()):
            if run.prometheus.values(expr.replace("$__rate_interval", RATE_INTERVAL), run.began):
                del wanted[where]
        return not wanted

    try:
        run.prometheus.wait_until(all_shown)
    finally:
        assert list(wanted) == []


def test_a_trainer_that_hangs_is_told_until_it_goes_on(run: Observed) -> None:
    told = ("RecsysTrainerDown", "RecsysNothingCommitted")
    wait_without(run, *told)
    with run.halted("trainer"):
        wait_for(run, *told)
    wait_without(run, *told)


def test_a_store_that_hangs_is_told_until_it_goes_on(run: Observed) -> None:
    wait_without(run, "RecsysStoreUnreachable")
    with run.halted("store"):
        wait_for(run, "RecsysStoreUnreachable", "RecsysAvailabilityBurning")
    wait_without(run, "RecsysStoreUnreachable")


def test_settings_that_break_objectives_are_told(tmp_path: Path) -> None:
    poison = ("--publish-seconds=3", "--log-max-bytes=65536")
    with observed(tmp_path, *poison, fast=FAST) as run, Client(run.grpc) as client:
        # Once the log is full nothing more is learned, and its freshness cannot be seen.
        wait_for(run, "RecsysFreshnessBurning")
        # Users alone take long to fill even so small a log.
        with pytest.raises(StoreFull):
            fill(client)
        wait_for(run, "RecsysFreshnessBurning", "RecsysLogNearlyFull", "RecsysAvailabilityBurning")
