"""doctor: look at everything that this program stands on, and say of each part whether it is right and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import typer
from rich.table import Table

from recsys.cli.doctor.finding import Finding
from recsys.cli.output import AsJson, console, plain, print_json
from recsys.cli.settings_flags import Given
from recsys.settings import Settings

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[bold red]problem[/]"}


def doctor(given: Given, json: AsJson = False) -> None:
    """Check settings, store, versions, disk, clock, ports, device and packages; say what to do about what is wrong.

    Looks from this machine, with the settings in force here; nothing is changed. Exit code 1 when there is a problem,
    2 when the settings cannot be used at all.
    """
    found = list(_examined(given.settings))
    bad = any(finding.level == "problem" for finding in found)
    if json:
        print_json({"ok": not bad, "findings": [asdict(finding) for finding in found]})
    else:
        table = Table("", "what", "found, and what to do", box=None, pad_edge=False)
        for finding in found:
            advice = f"\n[bold]->[/] {plain(finding.advice)}" if finding.advice else ""
            table.add_row(MARKS[finding.level], finding.check, plain(finding.found) + advice)
        console().print(table)
    raise typer.Exit(1 if bad else 0)


def _examined(settings: Settings) -> Iterator[Finding]:
    # Torch and gRPC are loaded by what is examined only.
    from recsys.cli.doctor import chosen, machine, ports, stored

    for part in (chosen, machine, ports, stored):
        yield from part.examine(settings)
