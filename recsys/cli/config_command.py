"""config: print the settings in force."""

from __future__ import annotations

import re

from rich.table import Table

from recsys.cli.output import AsJson, console, plain, print_json
from recsys.cli.settings_flags import Given, class_text

MASK = "***"


def config(given: Given, json: AsJson = False) -> None:
    """Print the settings in force, and where each comes from."""
    values = given.settings.model_dump(mode="json") | {"redis_url": masked(given.settings.redis_url)}
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


def masked(url: str) -> str:
    """Return a URL with a mask for its password, in whichever of its two places that stands."""
    url = re.sub(r"(//[^:/@]*:).*@", rf"\1{MASK}@", url)
    return re.sub(r"([?&]password=)[^&]*", rf"\1{MASK}", url)
