"""Output: tables for people, one JSON object for programs, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# Where nobody looks at it, a table is as wide as its longest line may be.
FILE_WIDTH = 200

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else on stdout")]


def console(*, stderr: bool = False) -> Console:
    """Make a console for stdout or stderr."""
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=FILE_WIDTH)


def print_json(value: Any) -> None:
    """Print one object on one line."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def facts(rows: Mapping[str, Any], title: str | None = None) -> Table:
    """Make a table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, plain(value))
    return table


def plain(value: Any) -> str:
    """Write a value for a person; brackets in it are no markup."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("[", r"\[")


def size(number: float) -> str:
    """Write a number of bytes for a person."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while number >= 1024 and power < len(units) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.1f} {units[power]}" if power and number < 10 else f"{number:.0f} {units[power]}"


def progress() -> Progress:
    """Make a progress bar on stderr, which disappears when done; nothing where stderr is no terminal."""
    stderr = console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )
