"""why and forget: what a score for one user comes from, and the end of what is kept of a user; by way of a server."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from recsys.cli.admin_commands import ask
from recsys.cli.client_commands import TIMEOUT_SECONDS, Server, connected
from recsys.cli.output import AsJson, console, facts, plain, print_json

User = Annotated[str, typer.Argument(metavar="USER")]


def why(
    ctx: typer.Context,
    user: User,
    item: Annotated[str, typer.Argument(metavar="ITEM")],
    server: Server = None,
    json: AsJson = False,
) -> None:
    """Tell what an item's score for a user is made of, and what each entry of the user's history does to it.

    An entry's influence is the score less the score without that entry.
    """
    with connected(ctx, server) as client:
        found = client.explain(user, item, timeout=TIMEOUT_SECONDS)
        asked = list(dict.fromkeys([item, *(entry.item_id for entry in found.history)]))
        known = client.get_items(asked, timeout=TIMEOUT_SECONDS)
    titles = {each.item_id: each.title for each in known if each is not None}
    parts = {name: getattr(found.parts, name) for name in ("network", "standing", "transitions", "worth")}
    history: list[dict[str, Any]] = [
        {
            "item_id": entry.item_id,
            "title": titles.get(entry.item_id, ""),
            "feedback_class": entry.feedback_class,
            "time": entry.time.ToJsonString(),
            "influence": entry.influence,
        }
        for entry in found.history
    ]
    told: dict[str, Any] = {
        "user_id": user,
        "item_id": item,
        "title": titles.get(item, ""),
        "known": found.item.known,
        "version": found.version,
        "score": found.item.score,
        "parts": parts,
        "content": found.parts.content,
        "class_probabilities": dict(found.item.class_probabilities),
        "history": history,
    }
    if json:
        print_json(told)
        return
    rows = {name: told[name] for name in ("item_id", "title", "known", "version")}
    rows |= {"score": f"{found.item.score:.4f}"} | {f"  {name}": f"{value:+.4f}" for name, value in parts.items()}
    chances = sorted(found.item.class_probabilities.items())
    console().print(facts(rows | {f"chance of {name}": f"{value:.4f}" for name, value in chances}))
    table = Table("influence", "item", "title", "class", "time", box=None, pad_edge=False)
    for entry in sorted(history, key=lambda entry: -abs(entry["influence"])):
        texts = (entry["item_id"], entry["title"], entry["feedback_class"], entry["time"])
        table.add_row(f"{entry['influence']:+.4f}", *map(plain, texts))
    console().print(table if history else "the user has no history")


forget = typer.Typer(help="Remove what was logged of a user.")


@forget.command("user")
def forget_user(
    ctx: typer.Context,
    user: User,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    server: Server = None,
    json: AsJson = False,
) -> None:
    """Remove a user's history, and the user's records from the feedback log and from quarantine; tell what remains.

    Reads all of the feedback log. What comes later is feedback of a new user. May be run again.
    """
    with connected(ctx, server) as client:
        if not yes:
            ask(f"forget {user}, for good?")
        found = client.forget_user(user)
    counts = {
        "history_entries": found.history_entries,
        "log_records": found.log_records,
        "unlearned_records": found.unlearned_records,
        "set_aside_records": found.set_aside_records,
    }
    if json:
        print_json({"user_id": user, **counts, "remains": list(found.remains)})
        return
    console().print(facts(counts))
    print("remains:")
    for sentence in found.remains:
        console().print(f"- {plain(sentence)}")
