"""View: a demo's numbers as a table that renews itself, as a line now and then, and as a summary."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from recsys.cli.output import facts, plain

LINE_SECONDS = 5.0


class View:
    """Show numbers while they change: on a terminal in place, elsewhere a line every LINE_SECONDS."""

    def __init__(self, out: Console, addresses: Mapping[str, str]) -> None:
        self._out, self._addresses = out, addresses
        self._live = Live(console=out, auto_refresh=False, transient=True) if out.is_terminal else None
        self._printed = time.monotonic()

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, numbers: Mapping[str, Any], done: int, total: int) -> None:
        """Show the numbers; `done` of `total` events are over."""
        if self._live:
            head = (
                f"[bold]{plain(numbers['stream'])}[/]: {done:,} of {total:,} events, gRPC on {self._addresses['grpc']}"
            )
            self._live.update(Group(head, accuracy(numbers), progress(numbers), ""), refresh=True)
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            self._out.print(
                f"{done:,} of {total:,} events, HR@10 {_share(numbers['hr_at_10'])} (popularity "
                f"{_share(numbers['popularity_hr_at_10'])}), {numbers['feedback_per_second']:,.0f} feedback/s, "
                f"version {numbers['versions_published']}, freshness {_seconds(numbers['freshness_p50_seconds'])}, "
                f"backlog {numbers['backlog']:,}",
                soft_wrap=True,
            )


def accuracy(numbers: Mapping[str, Any]) -> Table:
    """Make the table of accuracies."""
    table = Table("accuracy, tested before learning", "HR@1", "HR@10", "NDCG@10", "HR@10, last 2,000", box=None)
    for name, prefix in (("recsys", ""), ("popularity", "popularity_")):
        columns = ("hr_at_1", "hr_at_10", "ndcg_at_10", "recent_hr_at_10")
        table.add_row(name, *(_share(numbers[prefix + column]) for column in columns))
    if numbers["best_hr_at_10"] is not None:
        table.add_row("best possible", "", _share(numbers["best_hr_at_10"]), "", "", style="dim")
    return table


def progress(numbers: Mapping[str, Any]) -> Table:
    """Make the table of everything but accuracy."""
    median, last = (_seconds(numbers[f"freshness_{p}_seconds"]) for p in ("p50", "p99"))
    rows = {
        "feedback accepted": f"{numbers['feedback_accepted']:,}, {numbers['feedback_per_second']:,.0f} per second",
        "learned": f"{numbers['feedback_learned']:,}, backlog {numbers['backlog']:,}",
        "versions": f"{numbers['versions_published']:,}",
        "freshness": f"half within {median}, 99 of 100 within {last}",
    }
    if numbers["click_rate"] is not None:
        rows["clicks on recommendations"] = (
            f"{_share(numbers['click_rate'])} of those shown, best possible {_share(numbers['best_click_rate'])}"
        )
    return facts(rows)


def summary(out: Console, numbers: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> None:
    """Print how it went."""
    out.print(accuracy(numbers), "", progress(numbers))
    lost = numbers["feedback_lost"]
    out.print(
        f"{numbers['events']:,} events of {plain(numbers['stream'])} in {numbers['seconds']:.0f} s, {lost:,} feedback "
        f"lost, {numbers['feedback_refused']:,} refused, {numbers['bad_rows']:,} bad rows left out"
    )
    out.print(f"[dim]Freshness: {numbers['freshness']}.[/]", soft_wrap=True)
    for example in examples:
        table = Table("", "recommended", "because", box=None, title_justify="left")
        table.title = f"{plain(example['user_id'])}, who chose {plain(', '.join(example['latest']))}"
        for rank, item in enumerate(example["recommendations"], 1):
            table.add_row(str(rank), plain(item["title"]), plain(item["reason"]))
        out.print("", table)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
