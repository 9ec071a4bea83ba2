"""config: print the settings in force."""

from __future__ import annotations

from rich.table import Table

from recsys.cli.output import AsJson, console, plain, print_json
from recsys.cli.settings_flags import Given, class_text


def config(given: Given, json: AsJson = False) -> None:
    """Print the settings in force, and where each comes from."""
    values = given.settings.redacted()
    if json:
        print_json({"settings": values, "origin": {name: given.origin.get(name, "default") for name in values}})
        return
    values["classes"] = class_text(given.settings.classes)
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for name, value in values.items():
        origin = given.origin.get(name, "default")
        # Without separators in numbers, so that a value can be copied.
        table.add_row(name, plain(str(value)), origin, style="dim" if origin == "default" else "bold")
    console().print(table)
