"""rollback, pause and resume, by way of a server; verify and rebuild, against the store itself."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.cli.client_commands import TIMEOUT_SECONDS, Server, connected, version_facts
from recsys.cli.output import AsJson, console, facts, plain, print_json, progress
from recsys.cli.settings_flags import Given

if TYPE_CHECKING:
    from recsys.weights import WeightStore
    from recsys.weights.verification import Verification


def rollback(
    ctx: typer.Context,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, help="`recsys versions` lists them")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="why, for whoever reads the list of versions")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    server: Server = None,
    json: AsJson = False,
) -> None:
    """Put the content of an earlier version in force again, as a new version.

    The feedback learned since is set aside: it stays in the log, and learning goes on behind it.
    """
    with connected(ctx, server) as client:
        wanted = client.version(version, timeout=TIMEOUT_SECONDS)
        last = next(client.versions(timeout=TIMEOUT_SECONDS))
        aside = last.feedback_learned - wanted.feedback_learned
        if not yes:
            ask(f"roll back from version {last.version} to {version}, setting {aside:,} feedback aside?")
        made = client.rollback(version, reason)
    if json:
        print_json(version_facts(made))
    else:
        since = made.feedback_learned - wanted.feedback_learned
        print(f"version {made.version} has the content of version {version}; {since:,} feedback are set aside")


def pause(ctx: typer.Context, server: Server = None, json: AsJson = False) -> None:
    """Stop learning; feedback is accepted as before and waits in the log."""
    with connected(ctx, server) as client:
        client.pause_learning(timeout=TIMEOUT_SECONDS)
    _tell_paused(True, json)


def resume(ctx: typer.Context, server: Server = None, json: AsJson = False) -> None:
    """Go on learning, with all that waits in the log."""
    with connected(ctx, server) as client:
        client.resume_learning(timeout=TIMEOUT_SECONDS)
    _tell_paused(False, json)


def verify(
    given: Given,
    repair: Annotated[
        bool, typer.Option("--repair", help="if anything is wrong, go back to the newest version that is whole")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask before a repair")] = False,
    json: AsJson = False,
) -> None:
    """Read every retained version and snapshot in the store at redis_url and compare chains and checksums.

    Exit code 1 when something is wrong, and is not repaired. A repair puts the newest whole version in force again, as
    a new one: what was learned since is learned again from the log, and earlier versions are let go of.
    """
    from recsys.store.connection import connect
    from recsys.weights import WeightStore
    from recsys.weights.earlier import newest_whole
    from recsys.weights.repair import repair as repair_

    with connect(given.settings) as client:
        store = WeightStore(client, given.settings)
        found = _verified(store)
        made: dict[str, Any] = {}
        if repair and found.problems:
            whole = newest_whole(store)[0].version
            if not yes:
                ask(f"{found.problems[0]}; go back to version {whole}, and let go of all before it?")
            record = repair_(store, time.time_ns() // 1_000_000)
            made = {"version": record.version, "restored_version": whole, "left": list(_verified(store).problems)}
    if json:
        repaired = {"repair": made} if repair else {}
        print_json({**_counts(found), "problems": list(found.problems), **repaired})
    else:
        for problem in found.problems:
            console().print(plain(problem))
        console().print(facts(_counts(found) | {"problems": len(found.problems)}))
        if made:
            print(f"version {made['version']} has the content of version {made['restored_version']}")
    left = made["left"] if made else found.problems
    raise typer.Exit(1 if left else 0)


def _verified(store: WeightStore) -> Verification:
    with progress() as bar:
        task = bar.add_task("verify", total=None)
        return store.verify(lambda done, of: bar.update(task, completed=done, total=of))


def rebuild(
    given: Given,
    version: Annotated[int, typer.Option(metavar="VERSION", min=2, help="a retained version behind a snapshot")],
    verify: Annotated[bool, typer.Option(help="compare what is made with what the store holds, bit for bit")] = True,
    json: AsJson = False,
) -> None:
    """Make a version again from the snapshot before it and the feedback log, in the store at redis_url.

    Nothing is written. Bit for bit the same on one CPU type, torch version, thread count and settings; exit code 1 when
    a version comes out otherwise.
    """
    import torch

    from recsys.device import choose
    from recsys.store.connection import connect
    from trainer.rebuild import Rebuild

    torch.set_num_threads(given.settings.torch_threads)
    started = time.monotonic()
    with connect(given.settings) as client, progress() as bar:
        task = bar.add_task("rebuild", total=None)
        made = Rebuild(client, given.settings, choose(given.settings.device)).run(
            version, lambda done, of: bar.update(task, completed=done, total=of)
        )
    found: dict[str, Any] = {
        "version": made.version,
        "from_version": made.from_version,
        "versions": made.versions,
        "feedback": made.feedback,
        "seconds": round(time.monotonic() - started, 3),
    }
    if verify:
        found |= {"equal": made.equal, "different": list(made.different), "forgotten": made.forgotten}
    if json:
        print_json(found)
    else:
        console().print(facts(found))
        if verify and not made.equal and made.forgotten:
            print(f"{made.forgotten:,} records of this range were forgotten: what learned them cannot be made again")
    raise typer.Exit(1 if verify and not made.equal else 0)


def ask(question: str) -> None:
    """Go on only when a person agrees.

    Raises:
        Exit: when the answer is no.
        UsageError: when there is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise typer.BadParameter("nobody can be asked here; give --yes", param_hint="--yes")
    if not typer.confirm(question, err=True):
        raise typer.Exit(1)


def _tell_paused(paused: bool, json: bool) -> None:
    if json:
        print_json({"learning_paused": paused})
    else:
        print("learning is paused" if paused else "learning goes on")


def _counts(found: Any) -> dict[str, Any]:
    return {"versions": found.versions, "snapshots": found.snapshots, "bytes": found.bytes}
