"""recommend, feedback and versions: what any client of a server does, from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from recsys.cli.output import AsJson, console, facts, plain, print_json
from recsys.condition import verdict

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from recsys.client import Client
    from recsys.v1.model_pb2 import Version

# Much longer than any answer should take: a person rather waits than asks again.
TIMEOUT_SECONDS = 10.0

Server = Annotated[
    str | None,
    typer.Option("--server", metavar="HOST:PORT", help="which server; the settings host and port unless given"),
]


def recommend(
    ctx: typer.Context,
    user: Annotated[str, typer.Argument(metavar="USER")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="how many items")] = 10,
    exclude: Annotated[list[str] | None, typer.Option(metavar="ITEM", help="never this item; may be repeated")] = None,
    allow_seen: Annotated[bool, typer.Option("--allow-seen", help="also items that the user already has")] = False,
    any_of: Annotated[list[str] | None, typer.Option(metavar="CATEGORY", help="items with one of these")] = None,
    all_of: Annotated[list[str] | None, typer.Option(metavar="CATEGORY", help="items with all of these")] = None,
    none_of: Annotated[list[str] | None, typer.Option(metavar="CATEGORY", help="items with none of these")] = None,
    server: Server = None,
    json: AsJson = False,
) -> None:
    """Recommend items to a user, best first, with the reason for each."""
    from recsys.catalog import CategoryFilter

    wanted = CategoryFilter(frozenset(any_of or ()), frozenset(all_of or ()), frozenset(none_of or ()))
    with connected(ctx, server) as client:
        answer = client.recommend(
            user, count, exclude_item_ids=exclude or (), allow_seen=allow_seen, filter=wanted, timeout=TIMEOUT_SECONDS
        )
        known = client.get_items([i.item_id for i in answer.items], timeout=TIMEOUT_SECONDS) if answer.items else []
    items: list[dict[str, Any]] = [
        {
            "item_id": item.item_id,
            "title": entry.title if entry else "",
            "score": item.score,
            "source": item.source,
            "reason": item.reason,
        }
        for item, entry in zip(answer.items, known, strict=True)
    ]
    if json:
        print_json({"recommendation_id": answer.recommendation_id, "version": answer.version, "items": items})
        return
    table = Table("", "item", "title", "score", "source", "reason", box=None, pad_edge=False)
    for rank, each in enumerate(items, 1):
        texts = (each["item_id"], each["title"], f"{each['score']:.3f}", each["source"], each["reason"])
        table.add_row(str(rank), *map(plain, texts))
    console().print(table)
    console().print(f"version {answer.version}")


def feedback(
    ctx: typer.Context,
    user: Annotated[str, typer.Argument(metavar="USER")],
    item: Annotated[str, typer.Argument(metavar="ITEM")],
    feedback_class: Annotated[str, typer.Argument(metavar="CLASS", help="such as click; `recsys status` lists them")],
    value: Annotated[float | None, typer.Argument(metavar="[VALUE]", help="a number, such as seconds watched")] = None,
    server: Server = None,
    json: AsJson = False,
) -> None:
    """Log one feedback of a user about an item."""
    from recsys.errors import InvalidInput, Violation
    from recsys.feedback import Feedback

    with connected(ctx, server) as client:
        given = Feedback(user, item, feedback_class, value=value)
        (result,) = client.log_feedback([given], timeout=TIMEOUT_SECONDS)
    if not result.accepted:
        raise InvalidInput([Violation(result.field, result.refusal)])
    if json:
        print_json({"accepted": True, "duplicate": result.duplicate})
    else:
        print("accepted")


versions = typer.Typer(invoke_without_command=True)


@versions.callback()
def list_versions(
    ctx: typer.Context,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="how many")] = 20,
    server: Server = None,
    json: AsJson = False,
) -> None:
    """List the retained versions of the weights, newest first; `recsys versions show V` tells all of one."""
    if ctx.invoked_subcommand is not None:
        return
    with connected(ctx, server) as client:
        found = [version for _, version in zip(range(count), client.versions(timeout=TIMEOUT_SECONDS), strict=False)]
    rows = [version_facts(version) for version in found]
    if json:
        print_json({"versions": rows})
        return
    columns = ("version", "committed_time", "feedback_learned", "feedback_added", "bytes", "epoch")
    table = Table(*columns, "chain", "HR@10", "snapshot", "kind", "reason", box=None, pad_edge=False)
    for row in rows:
        accuracy = row["metrics"].get("hr_at_10")
        kind = f"{row['kind']} to {row['restored_version']}" if row["restored_version"] else row["kind"]
        texts = (
            *(row["chain"][:12], "" if accuracy is None else f"{accuracy:.4f}"),
            *("yes" if row["snapshot"] else "", kind, row["reason"]),
        )
        table.add_row(*(plain(row[name]) for name in columns), *map(plain, texts))
    console().print(table)


@versions.command("show")
def show_version(
    ctx: typer.Context,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1)],
    server: Server = None,
    json: AsJson = False,
) -> None:
    """Tell all of one retained version: where it comes from, which part of the log it learned, how good it was found.

    Metrics are those of feedback before it was learned: of this version beside the version before, where that is kept.
    """
    given = ctx.parent.params if ctx.parent else {}
    with connected(ctx, server or given.get("server")) as client:
        found = client.version(version, timeout=TIMEOUT_SECONDS)
        parent = _retained(client, found.parent)
    row = version_facts(found)
    row["records"] = {"after": parent.position if parent else None, "until": found.position}
    row["metrics_before"] = dict(parent.metrics) if parent else {}
    if json or given.get("json"):
        print_json(row)
        return
    after, before = row.pop("metrics"), row.pop("metrics_before")
    row["records"] = f"({row['records']['after'] or 'not kept'}, {found.position}]"
    row["set_aside"] = ", ".join(f"({part['after']}, {part['until']}]" for part in row["set_aside"])
    console().print(facts(row))
    table = Table("metric", "before", "after", box=None, pad_edge=False)
    for name in sorted({*before, *after}):
        table.add_row(plain(name), *(f"{each[name]:.4f}" if name in each else "" for each in (before, after)))
    console().print(table if table.rows else "no metrics yet")


def _retained(client: Client, version: int) -> Version | None:
    """Read a version; None before the first, and when it is not kept any more."""
    from recsys.errors import NotRetained

    try:
        return client.version(version, timeout=TIMEOUT_SECONDS) if version else None
    except NotRetained:
        return None


def version_facts(version: Version) -> dict[str, Any]:
    """Return all of a version, as programs read it."""
    return {
        "version": version.version,
        "parent": version.parent,
        "kind": version.kind,
        "restored_version": version.restored_version,
        "reason": version.reason,
        "verdict": verdict(version.kind, version.reason, version.version, version.restored_version),
        "committed_time": time_text(version.committed_time),
        "feedback_learned": version.feedback_learned,
        "feedback_added": version.feedback_added,
        "position": version.position,
        "set_aside": [{"after": part.after, "until": part.until} for part in version.set_aside],
        "bytes": version.bytes,
        "trainer_bytes": version.trainer_bytes,
        "epoch": version.epoch,
        "chain": version.chain,
        "settings_digest": version.settings_digest,
        "snapshot": version.snapshot,
        "metrics": dict(version.metrics),
    }


@contextmanager
def connected(ctx: typer.Context, server: str | None) -> Iterator[Client]:
    """Connect to the server that the flag or the settings name."""
    from recsys.client import Client, TlsOptions
    from recsys.settings import load

    settings = load(file=ctx.obj)
    tls = TlsOptions(settings.client_tls_ca, settings.client_tls_certificate, settings.client_tls_key)
    token = _token(settings.client_token_file)
    with Client(target_of(ctx, server), tls=tls if settings.client_tls_ca else None, token=token) as client:
        yield client


def _token(path: str) -> str | None:
    from recsys.errors import SettingsError

    try:
        return Path(path).read_text(encoding="utf-8").strip() if path else None
    except OSError as error:
        raise SettingsError(f"client_token_file: {path} cannot be read: {error.strerror}") from None


def target_of(ctx: typer.Context, server: str | None) -> str:
    """Return "host:port" from the flag, else from the settings.

    Raises:
        SettingsError: when the settings leave the port to chance.
    """
    from recsys.errors import SettingsError
    from recsys.settings import load

    if server is not None:
        return server
    settings = load(file=ctx.obj)
    if settings.port == 0:
        raise SettingsError("port: 0 lets the server take any; say with --server where it listens")
    # Servers listen on these; clients cannot call them everywhere.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"


def time_text(time: Timestamp) -> str:
    """Write a time as RFC 3339, in UTC."""
    return time.ToJsonString()
