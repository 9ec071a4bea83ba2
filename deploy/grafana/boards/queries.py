"""PromQL as the panels need it: sums of rates, quantiles and shares over all instances and processes."""

from __future__ import annotations

SERVICES = 'grpc_service=~"recsys.v1.+"'
# Codes that are the server's doing.
OUR_FAULT = 'grpc_code=~"UNKNOWN|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|UNAVAILABLE|DATA_LOSS"'
HANDLED = f"grpc_server_handled_total{{{SERVICES}}}"
FAILED = f"grpc_server_handled_total{{{SERVICES}, {OUR_FAULT}}}"
APPLIED = 'stage="accepted_to_applied"'


def rate(series: str, by: str = "") -> str:
    """Sum the rates of `series`, by the labels `by`."""
    return f"sum{_by(by)} (rate({series}[$__rate_interval]))"


def quantile(q: float, metric: str, by: str = "", where: str = "") -> str:
    """Estimate the quantile `q` of a histogram's recent observations, by the labels `by`."""
    labels = f"le, {by}" if by else "le"
    series = f"{metric}_bucket{{{where}}}" if where else f"{metric}_bucket"
    return f"histogram_quantile({q}, {rate(series, labels)})"


def mean(metric: str, by: str = "") -> str:
    """Return the mean of a histogram's recent observations."""
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"


def share(part: str, whole: str) -> str:
    """Divide, where there is something to divide by."""
    return f"{part} / ({whole} > 0)"


def of_all(series: str, by: str) -> str:
    """Return the share that each value of the label `by` has in the rate of all."""
    return f"{rate(series, by)} / on () group_left () ({rate(series)} > 0)"


def newest(series: str, by: str = "") -> str:
    """Take the greatest of what several processes say of the same thing."""
    return f"max{_by(by)} ({series})"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
