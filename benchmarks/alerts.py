"""Whether anything fires in a healthy load: `recsys up`, simulated users, and Prometheus with deploy's own rules.

    python -m benchmarks.alerts --minutes 60

Prints every alert that was pending or fired, when it first was, and once a minute what the users saw. The rules are as
they are deployed, their waits too; exit code 1 when one fired.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from observed import Observed, observed

LOOK_SECONDS = 5
SHOWN = {
    "learned": "recsys_feedback_learned_total",
    "hits": 'recsys_prequential_hit_ratio{window="recent", k="10", method="recsys"}',
    "hits of popularity": 'recsys_prequential_hit_ratio{window="recent", k="10", method="popularity"}',
    "freshness p99": "histogram_quantile(0.99, sum by (le) "
    '(rate(recsys_freshness_seconds_bucket{stage="accepted_to_applied"}[1m])))',
    "Recommend p99": "histogram_quantile(0.99, sum by (le) "
    '(rate(grpc_server_handling_seconds_bucket{grpc_method="Recommend"}[1m])))',
    "drifts": "sum (recsys_drifts_total)",
}


def main() -> int:
    """Run, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two visits")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, observed(Path(folder), pause=given.pause, scrape="5s") as run:
        fired = _watch(run, 60 * given.minutes)
    print("fired:", ", ".join(sorted(fired)) or "nothing")
    return 1 if fired else 0


def _watch(run: Observed, seconds: float) -> set[str]:
    seen: set[tuple[str, str, str]] = set()
    looks = 0
    while (passed := time.time() - run.began) < seconds:
        time.sleep(LOOK_SECONDS)
        looks += 1
        for alert in run.prometheus.ask("alerts")["alerts"]:
            labels = alert["labels"]
            key = (labels["alertname"], labels["severity"], alert["state"])
            if key not in seen:
                seen.add(key)
                print(f"{passed:5.0f} s", *key, f"{float(alert['value']):.3g}", flush=True)
        if looks % (60 // LOOK_SECONDS) == 0:
            numbers = {name: run.prometheus.values(expr, time.time() - LOOK_SECONDS) for name, expr in SHOWN.items()}
            print(f"{passed:5.0f} s", {name: round(v[-1], 4) if v else None for name, v in numbers.items()}, flush=True)
    return {name for name, _, state in seen if state == "firing"}


if __name__ == "__main__":
    sys.exit(main())
