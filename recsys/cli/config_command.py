"""config: print the settings in force."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

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
    parts = urlsplit(url)
    user, has_user, address = parts.netloc.rpartition("@")
    name, has_password, _ = user.partition(":")
    netloc = f"{name}:{MASK}@{address}" if has_user and has_password else parts.netloc
    query = [(key, MASK if key == "password" else value) for key, value in parse_qsl(parts.query)]
    return urlunsplit(parts._replace(netloc=netloc, query=urlencode(query, safe="*")))
