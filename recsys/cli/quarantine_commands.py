"""quarantine: feedback that was set aside instead of learned; against the store itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from recsys.cli.output import AsJson, console, plain, print_json
from recsys.cli.settings_flags import Given, takes_settings

if TYPE_CHECKING:
    from recsys.quarantine import Quarantine

Number = Annotated[int, typer.Argument(metavar="NUMBER", min=1, help="`recsys quarantine list` gives them")]

quarantine = typer.Typer(help="List, show and release feedback that was set aside instead of learned.")


@contextmanager
def _opened(given: Given) -> Iterator[Quarantine]:
    from recsys.quarantine import Quarantine
    from recsys.store.connection import connect

    with connect(given.settings) as client:
        yield Quarantine(client, given.settings)


def list_(given: Given, json: AsJson = False) -> None:
    """List what was set aside, oldest first, and why."""
    with _opened(given) as opened:
        cases = opened.cases()
    if json:
        print_json({"cases": [asdict(case) for case in cases]})
        return
    table = Table("number", "time", "feedback", "after", "until", "reason", box=None, pad_edge=False)
    for case in cases:
        time = datetime.fromtimestamp(case.time_ms / 1000, UTC).isoformat(" ", "seconds")
        feedback = plain(case.feedback) if case.feedback else "released"
        table.add_row(str(case.number), time, feedback, case.after, case.until, plain(case.reason))
    console().print(table if cases else "nothing is set aside")


def show(
    given: Given,
    number: Number,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=100_000, help="how much of it")] = 20,
    json: AsJson = False,
) -> None:
    """Show the feedback of one case."""
    with _opened(given) as opened:
        records = opened.show(number, count)
    if json:
        rows = [
            {"user_id": r.user_id, "item_id": r.item_id, "feedback_class": r.feedback_class, "time_ms": r.time_ms}
            for r in records
        ]
        print_json({"number": number, "feedback": rows})
        return
    table = Table("user", "item", "class", "time", box=None, pad_edge=False)
    for record in records:
        time = datetime.fromtimestamp(record.time_ms / 1000, UTC).isoformat(" ", "seconds")
        table.add_row(plain(record.user_id), plain(record.item_id), plain(record.feedback_class), time)
    console().print(table)


def release(given: Given, number: Number, json: AsJson = False) -> None:
    """Append the feedback of one case to the log again: it is learned like any other."""
    with _opened(given) as opened:
        count = opened.release(number)
    if json:
        print_json({"number": number, "released": count})
    else:
        print(f"{count:,} feedback stand in the log again")


for _name, _command in (("list", list_), ("show", show), ("release", release)):
    quarantine.command(_name)(takes_settings(_command))
