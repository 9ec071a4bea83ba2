"""Tables of what an evaluation found, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from recsys.cli.output import console, plain

RANKING = {
    **{f"hr_at_{k}": f"HR@{k}" for k in (1, 5, 10, 20)},
    **{f"ndcg_at_{k}": f"NDCG@{k}" for k in (5, 10, 20)},
    **{f"mrr_at_{k}": f"MRR@{k}" for k in (10, 20)},
}
SLICES = {"new_users": "new users", "new_items": "new items"}
CLICKS = {"auc": "AUC", "log_loss": "log loss", "calibration_error": "ECE"}
RATINGS = {"mae": "MAE", "rmse": "RMSE"}
MEBIBYTE = 1 << 20


def print_evaluation(result: Mapping[str, Any]) -> None:
    """Print a result as tables, each with the methods that have something to say there."""
    out, methods = console(), result["methods"]
    ranked = [method for method in methods if "hr_at_10" in method]
    if ranked:
        out.print(_ranking(ranked))
    if any("clicks" in method for method in methods):
        out.print(_table("click or not", CLICKS, [m | m["clicks"] for m in methods if "clicks" in m]))
        out.print(_tenths([m for m in methods if "clicks" in m]))
    if any("ratings" in method for method in methods):
        out.print(_table("ratings", RATINGS, [m | m["ratings"] for m in methods if "ratings" in m]))
    for method in methods:
        if "class_report" in method:
            out.print(_report(method))
    out.print(_table("cost", {}, methods))
    out.print(
        f"{result['stream']}, {result['protocol']}: {result['events']:,} events in {result['feedback']:,} feedback, "
        f"{result['users']:,} users, {result['items']:,} items, {result['bad_rows']:,} bad rows left out"
    )


def print_comparison(sides: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what two sets of weights find on the same feedback, beside each other."""
    out, named = console(), [{"name": name, **measures} for name, measures in sides.items()]
    out.print(_ranking([side for side in named if "hr_at_10" in side]))
    for side in named:
        for key, columns in (("clicks", CLICKS), ("ratings", RATINGS)):
            if key in side:
                numbers = ", ".join(f"{title} {number(side[key][name])}" for name, title in columns.items())
                out.print(f"{side['name']}: {numbers}")
    if all("class_report" in side for side in named):
        out.print(_reports(named))


def _ranking(methods: Sequence[Mapping[str, Any]]) -> Table:
    slices = [f"HR@10, {title}" for title in SLICES.values()]
    table = Table("method", *RANKING.values(), *slices, "coverage", box=None, pad_edge=False)
    for method in methods:
        numbers = [number(method.get(name)) for name in RANKING]
        numbers += [number(method.get(name, {}).get("hr_at_10")) for name in SLICES]
        table.add_row(method["name"], *numbers, number(method.get("coverage_at_10")))
    return table


def _table(title: str, columns: Mapping[str, str], methods: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("method", *columns.values(), "seconds", "MiB", title=title, title_justify="left", box=None)
    for method in methods:
        cost = [f"{method['seconds']:.1f}", f"{method['bytes'] / MEBIBYTE:.1f}"]
        table.add_row(method["name"], *(number(method[name]) for name in columns), *cost)
    return table


def _tenths(methods: Sequence[Mapping[str, Any]]) -> Table:
    """Show AUC and log loss over each tenth of the stream."""
    table = Table(
        "method",
        "",
        *(str(n) for n in range(1, 11)),
        title="click or not, by tenth of the stream",
        title_justify="left",
        box=None,
    )
    for method in methods:
        for name, shown in CLICKS.items():
            parts = [number(part[name]) for part in method["clicks"]["tenths"]]
            table.add_row(method["name"] if name == "auc" else "", shown, *parts)
    return table


def _reports(sides: Sequence[Mapping[str, Any]]) -> Table:
    """Show what several sets of weights say of the same feedback's classes."""
    losses = ", ".join(f"{side['class_log_loss']:.4f} {side['name']}" for side in sides)
    columns = [f"{title} {side['name']}" for side in sides for title in ("precision", "recall", "F1")]
    title = f"feedback classes, log loss {losses}"
    table = Table("class", "feedback", *columns, title=title, title_justify="left", box=None)
    for rows in zip(*(side["class_report"] for side in sides), strict=True):
        numbers = [row[name] for row in rows for name in ("precision", "recall", "f1")]
        table.add_row(plain(rows[0]["class"]), f"{rows[0]['count']:,}", *map(number, numbers))
    return table


def _report(method: Mapping[str, Any]) -> Table:
    """Show the classes over everything, and how F1 on a sample changed by learning it."""
    title = f"{method['name']}: feedback classes, log loss {method['class_log_loss']:.4f}"
    columns = ("class", "feedback", "precision", "recall", "F1", "F1 before learning", "and after")
    table = Table(*columns, title=title, title_justify="left", box=None)
    before, after = method.get("class_report_before"), method.get("class_report_after")
    for n, row in enumerate(method["class_report"]):
        numbers = [row["precision"], row["recall"], row["f1"]]
        numbers += [part and part[n]["f1"] for part in (before, after)]
        table.add_row(plain(row["class"]), f"{row['count']:,}", *map(number, numbers))
    return table


def number(value: float | None) -> str:
    """Write a measure, a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"
