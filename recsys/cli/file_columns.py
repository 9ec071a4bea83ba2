"""The flags that name a feedback file's columns and a file of items, for every command that reads one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from recsys.feedback_file import Columns

PANEL = "Columns of a file whose layout is not recognised"

UserColumn = Annotated[str | None, typer.Option("--user", metavar="NAME", help="the user's id", rich_help_panel=PANEL)]
ItemColumn = Annotated[str | None, typer.Option("--item", metavar="NAME", help="the item's id", rich_help_panel=PANEL)]
TimeColumn = Annotated[
    str | None,
    typer.Option("--time", metavar="NAME", help="when; else the file's order counts", rich_help_panel=PANEL),
]
ClassColumn = Annotated[
    str | None, typer.Option("--class", metavar="NAME", help="the feedback's class", rich_help_panel=PANEL)
]
ValueColumn = Annotated[
    str | None,
    typer.Option("--value", metavar="NAME", help="a number, such as a rating", rich_help_panel=PANEL),
]
ItemsFile = Annotated[
    Path | None,
    typer.Option("--items", metavar="FILE", help="the items' categories: MovieLens' or KuaiRand's, or .csv"),
]


def contents(items: Path | None) -> dict[str, Sequence[str]]:
    """Read the categories of items, by id; {} without a file."""
    from recsys.feedback_file import read_items

    return {item.item_id: tuple(item.categories) for item in (read_items(items) if items is not None else ())}


def columns(
    user: str | None, item: str | None, time: str | None, feedback_class: str | None, value: str | None
) -> Columns | None:
    """Put the names together; None when none is given and the file's layout is to be recognised.

    Raises:
        BadParameter: when some are given, but not both user and item.
    """
    from recsys.feedback_file import Columns

    if not any((user, item, time, feedback_class, value)):
        return None
    if user is None or item is None:
        raise typer.BadParameter("name both --user and --item where any column is named")
    return Columns(user, item, time, feedback_class, value)
